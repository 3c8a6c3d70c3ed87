"""Measurements behind every figure of speed and drift: `python -m reference.benchmarks.{step,consolidate,drift}`."""
