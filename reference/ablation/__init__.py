"""Grids of settings on a short list of tasks: what makes the method work, how far to turn it, how to set its rivals."""
