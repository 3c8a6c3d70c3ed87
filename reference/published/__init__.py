"""The published tables of the gradient-projection family, run again: `python -m reference.published`."""
