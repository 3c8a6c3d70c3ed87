"""Bases, and the linear algebra on them."""
