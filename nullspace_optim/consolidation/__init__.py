"""Consolidation: a finished task becomes larger bases, all or nothing."""
