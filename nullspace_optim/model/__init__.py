"""The user's module: found, fed, and left as it was."""
