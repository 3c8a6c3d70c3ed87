"""The model under experiment, its training steps, and what a run leaves behind."""
