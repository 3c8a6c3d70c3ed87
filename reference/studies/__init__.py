"""Grids of settings and a pretraining, run with the script and never imported by it."""
