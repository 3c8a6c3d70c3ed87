"""Grids of settings and models of language, run with the script and never imported by it."""
