"""The reference experiment: CLIP fine-tuned on task after task, several methods in one harness.

Run it with `python -m reference.run`, which loads `data`, `training`, `methods` and `evaluation`, and of
`nullspace_optim` what is public. Beside it stand `studies` (grids of settings, models of language), `published` (tables
of papers run again) and `benchmarks` (speed and drift); the script never imports them.
"""
