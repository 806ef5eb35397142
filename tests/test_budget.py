# SPDX-License-Identifier: MIT
"""The bit budget: the choice of types against all choices."""

import itertools

import numpy as np
import pytest

from gguf_splitq.errors import UsageError
from gguf_splitq.plan import budget

pytestmark = pytest.mark.filterwarnings("error")


def problem(seed: int) -> tuple[dict, dict, int]:
    """Costs that fall with the bits at a rate of their own, sizes, and a budget that some choice meets."""
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.choice(np.arange(2, 20), rng.integers(1, 5), replace=False))
    costs, sizes = {}, {}
    for i in range(rng.integers(1, 6)):
        weights, scale, rate = rng.integers(1, 40), rng.exponential(), rng.uniform(0.5, 2)
        kept = bits if rng.random() < 0.7 else bits[: rng.integers(1, len(bits) + 1)]  # not every type fits a row
        sizes[f"tensor {i}"] = {f"{b} bits": int(weights * b) for b in kept}
        costs[f"tensor {i}"] = {f"{b} bits": float(scale * np.exp(-rate * b / 3) * rng.exponential()) for b in kept}
    least, most = (sum(map(f, (s.values() for s in sizes.values()))) for f in (min, max))
    return costs, sizes, int(rng.integers(least, most + 1))


def total(values: dict, plan: dict[str, str]) -> float:
    return sum(values[name][type] for name, type in plan.items())


def test_close_to_the_best_of_all_choices():
    ratios = []
    for seed in range(300):
        costs, sizes, limit = problem(seed)
        plan = budget.choose(costs, sizes, limit)
        assert plan.keys() == costs.keys() and total(sizes, plan) <= limit
        every = (dict(zip(costs, types, strict=True)) for types in itertools.product(*costs.values()))
        ratios.append(total(costs, plan) / min(total(costs, p) for p in every if total(sizes, p) <= limit))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-9) > 0.95
    assert np.mean(ratios) < 1.02


def test_large_problems_fill_the_budget_and_repeat():
    rng = np.random.default_rng(0)
    weights, scale = rng.integers(1, 40, 200) * 32_768, rng.exponential(size=200)
    bits = {"sq2": 2.25, "sq3": 3.25, "sq4": 4.25, "q6_k": 6.5625}
    sizes = {i: {t: int(weights[i] * b / 8) for t, b in bits.items()} for i in range(200)}
    costs = {i: {t: float(weights[i] * scale[i] * 4.0**-b) for t, b in bits.items()} for i in range(200)}
    limit = int(weights.sum() * 3.5 / 8)
    plan = budget.choose(costs, sizes, limit)
    assert plan == budget.choose(costs, sizes, limit)
    assert 0 <= limit - total(sizes, plan) < min(weights) / 8
    # At the optimum of the relaxation a tensor that costs more per weight never gets fewer bits; what fills may differ.
    sensitive = np.argsort(scale)
    kinds = np.array([bits[plan[i]] for i in sensitive])
    assert np.mean(np.diff(kinds) >= 0) > 0.95


def test_the_largest_types_where_everything_fits_and_nothing_where_nothing_is_asked():
    costs, sizes, _ = problem(0)
    assert total(costs, budget.choose(costs, sizes, 10**9)) == sum(min(c.values()) for c in costs.values())
    assert budget.choose({}, {}, 0) == {}


def test_a_budget_below_the_smallest_types_is_refused():
    costs, sizes, _ = problem(1)
    least = sum(min(s.values()) for s in sizes.values())
    assert total(sizes, budget.choose(costs, sizes, least)) == least
    with pytest.raises(UsageError, match=f"{least - 1} bytes.*{least} bytes"):
        budget.choose(costs, sizes, least - 1)
