"""Basis files and checkpoints: schema, writing, checking, comparing."""
