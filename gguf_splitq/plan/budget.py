# SPDX-License-Identifier: MIT
"""The bit budget: one type per tensor, so that the sum of the costs is least and the sum of the sizes fits. Pure.

A multiple-choice knapsack. Upgrading, again and again, the tensor that saves the most cost per byte walks along the
lower convex hull of every tensor's (size, cost) points: the solution of the Lagrangian relaxation, optimal for the
bytes it takes. Once the next step of the hull does not fit, the steps that still do fill what is left, and exchanges of
two tensors' types improve the result while they can.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import UsageError


def choose(
    costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, int]], budget: int
) -> dict[str, str]:
    """Tensor -> type. costs: tensor -> type -> what the type costs there, in any one unit; sizes: the same in bytes.

    Only types with a cost are candidates. The result takes at most `budget` bytes in all and is the same for equal
    input. Raises UsageError when even the smallest types take more.
    """
    if not costs:
        return {}
    names = list(costs)
    types = list(dict.fromkeys(t for name in names for t in costs[name]))
    cost = np.array([[costs[name].get(t, np.inf) for t in types] for name in names])
    size = np.array([[sizes[name][t] if t in costs[name] else 0 for t in types] for name in names], dtype=np.float64)
    size[np.isinf(cost)] = np.inf

    chosen = np.lexsort((cost, size), axis=1)[:, 0]
    rows = np.arange(len(names))
    left = budget - size[rows, chosen].sum()
    if left < 0:
        least = int(budget - left)
        raise UsageError(f"a budget of {budget} bytes cannot be met: the smallest types take {least} bytes")

    def moves() -> tuple[np.ndarray, np.ndarray]:
        """What every other type would save and would take in addition, [names, types]."""
        return cost[rows, chosen][:, None] - cost, size - size[rows, chosen][:, None]

    while True:
        saved, extra = moves()
        useful = (saved > 0) & (extra <= left)
        if not useful.any():
            break
        per_byte = np.divide(saved, np.maximum(extra, 1e-9), where=useful, out=np.full(saved.shape, -1.0))
        name, to = np.unravel_index(np.argmax(per_byte), saved.shape)
        left -= extra[name, to]
        chosen[name] = to

    while True:
        saved, extra = moves()
        flat, more = saved.ravel(), extra.ravel()
        # Every pair of an upgrade and a downgrade: the best partner of each upgrade among those that free enough.
        ups, downs = np.flatnonzero(flat > 0), np.flatnonzero((flat <= 0) & (more < 0))
        if not (len(ups) and len(downs)):
            break
        gain = flat[ups][:, None] + flat[downs]
        fits = (more[ups][:, None] + more[downs] <= left) & (ups[:, None] // len(types) != downs // len(types))
        gain = np.where(fits, gain, 0)
        up, down = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[up, down] <= 0:
            break
        for move in (ups[up], downs[down]):
            left -= more[move]
            chosen[move // len(types)] = move % len(types)
    return {name: types[i] for name, i in zip(names, chosen, strict=True)}
