"""Rows that can reach the model's output, by the structure of one forward pass."""
