"""Scores, figures and tables of finished runs."""
