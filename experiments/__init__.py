"""Measurements behind the numbers in README.md; run from a checkout as `python -m experiments.NAME`."""
