# SPDX-License-Identifier: MIT
"""Measurements behind the numbers in docs/results.md; run from a checkout as `python -m experiments.NAME`."""
