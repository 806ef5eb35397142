# SPDX-License-Identifier: MIT
"""The simulated methods of `make paper-splitquant`."""

import numpy as np
import pytest

from experiments import paper_splitquant as paper


@pytest.fixture
def clusters():
    """float32 [64, 64] with well-separated values around -10, 0 and 10."""
    rng = np.random.default_rng(0)
    return (rng.choice([-10, 0, 10], (64, 64)) + rng.uniform(-1, 1, (64, 64))).astype(np.float32)


def test_boundaries_are_between_the_clusters(clusters):
    assert paper.boundaries(clusters) == pytest.approx([-5, 5], abs=0.1)


@pytest.mark.parametrize("method, span", [(paper.linear, 22), (paper.split_tight, 2), (paper.split, 11)])
@pytest.mark.parametrize("bits", [4, 2])
def test_errors_are_at_most_half_a_step(clusters, method, span, bits):
    error = np.abs(method(clusters, bits) - clusters).max()
    half_step = span / (2**bits - 1) / 2
    assert 0.8 * half_step < error < 1.05 * half_step + (method is not paper.split_tight) * half_step


def test_zero_stays_zero(clusters):
    clusters[0, :8] = 0
    for method in (paper.linear, paper.split):
        assert not method(clusters, 4)[0, :8].any()
