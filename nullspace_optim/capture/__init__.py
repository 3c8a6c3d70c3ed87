"""Capture of the rows that meet each weight, operator by operator."""
