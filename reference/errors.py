"""The error that an experiment shows to its user: one sentence with what was found and the way out."""

from __future__ import annotations


class ExperimentError(Exception):
    """A setting, a folder, a file or a model with which the experiment cannot run."""
