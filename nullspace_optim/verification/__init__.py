"""Checks that everything kept is still what it was."""
