"""The reference experiment: CLIP fine-tuned on task after task, several methods in one harness.

Run it with `python -m reference.run`; the package uses only what `nullspace_optim` exports.
"""
