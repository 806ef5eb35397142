# SPDX-License-Identifier: MIT
"""k-means in one dimension, near-exact: the best partition into a few bins by dynamic programming, then Lloyd's rounds.

Values are sorted once; by sums up to each of them, a round costs as much as looking up the boundaries.
"""

from __future__ import annotations

import numpy as np

BINS = 64
_BACKWARDS = np.triu(np.full((BINS + 1, BINS + 1), np.inf), 1)


def kmeans(
    values: np.ndarray, weights: np.ndarray, k: int, centres: np.ndarray | None = None, rounds: int = 8
) -> np.ndarray:
    """float64 [k]: rising centres of clusters of float [n] values, n >= 1, near the least weighted squared error.

    weights: float [n], not negative. centres: where to start instead of searching. rounds: of Lloyd's algorithm.
    """
    order = np.argsort(values)
    ranked, heavy = values[order].astype(np.float64), weights[order]
    sums = np.zeros((3, len(values) + 1))  # weight, first and second moment of the values below
    np.cumsum(heavy, out=sums[0, 1:])
    np.cumsum(heavy * ranked, out=sums[1, 1:])
    if centres is None:
        np.cumsum(heavy * ranked**2, out=sums[2, 1:])
        cuts = _partition(sums, _bins(ranked), k)
        centres = _means(sums, cuts, ranked[np.minimum(cuts[:-1], len(values) - 1)])
    cuts = np.empty(k + 1, np.int64)
    cuts[0], cuts[-1] = 0, len(values)
    for _ in range(rounds):
        cuts[1:-1] = np.searchsorted(ranked, (centres[1:] + centres[:-1]) / 2)
        before, centres = centres, _means(sums, cuts, centres)
        if (before == centres).all():
            break
    return centres


def _bins(ranked: np.ndarray) -> np.ndarray:
    """int [at most BINS + 1]: where bins begin, and the end; narrow where values are dense, as best clusters are."""
    n = len(ranked)
    if n <= BINS:
        return np.arange(n + 1)
    share = np.cumsum(np.cbrt(np.diff(ranked) ** 2))
    inner = np.searchsorted(share, share[-1] * np.arange(1, BINS) / BINS) + 1
    return np.unique(np.concatenate([[0], inner, [n]]))


def _partition(sums: np.ndarray, bins: np.ndarray, k: int) -> np.ndarray:
    """int [k + 1]: the cuts at bins' edges with the least squared error; equal ones when there are fewer bins."""
    mass, first, second = sums[:, bins]
    inside = mass[:, None] - mass  # from the second index to the first
    moment = first[:, None] - first
    cost = second[:, None] - second
    cost -= np.divide(moment * moment, inside, out=np.zeros_like(cost), where=inside > 0)
    cost += _BACKWARDS[: len(cost), : len(cost)]
    best, choices, rows = cost[:, 0], [], np.arange(len(cost))
    for _ in range(k - 1):
        total = cost + best
        choices.append(total.argmin(1))
        best = total[rows, choices[-1]]
    cuts = [len(bins) - 1]
    for choice in reversed(choices):
        cuts.append(choice[cuts[-1]])
    return bins[[0, *cuts[::-1]]]


def _means(sums: np.ndarray, cuts: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The mean of each cluster, `empty` where it has no weight."""
    below = sums[:2, cuts]
    inside, total = below[:, 1:] - below[:, :-1]
    return np.divide(total, inside, out=np.array(empty, np.float64), where=inside > 0)
