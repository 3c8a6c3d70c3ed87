"""Measurements behind every figure of speed, memory and drift: `python -m reference.benchmarks.{step,consolidate,drift}`."""
