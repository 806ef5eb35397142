# SPDX-License-Identifier: MIT
"""The solver's inner loops in C beside those in PyTorch, which say what they compute."""

import pytest
import torch
from test_solve import problem

from gguf_splitq import types
from gguf_splitq.coding import formats, solver, sweeps, sweeps_c


def exact(rng: torch.Generator, *shape: int, span: int = 8) -> torch.Tensor:
    """Multiples of 1/8 up to `span`: products and sums of few of them are exact, in whatever order."""
    return torch.randint(-8 * span, 8 * span + 1, shape, generator=rng) / 8


def to_sweep(n_cols: int, n_rows: int) -> list[torch.Tensor]:
    """Arguments of `sweep`, the levels aside, whose sums are exact."""
    rng = torch.Generator().manual_seed(n_cols)
    push = torch.randint(-1, 2, (n_cols, n_cols), generator=rng) * (torch.rand(n_cols, n_cols, generator=rng) < 0.05)
    scale = 2.0 ** torch.randint(-2, 2, (n_cols // 16, n_rows), generator=rng)
    scale[1] *= -1
    scale[0, 0] = 0
    offset = exact(rng, n_cols // 16, n_rows, span=1)
    numbers = torch.randperm(n_cols, generator=rng)
    base = exact(rng, n_cols, n_rows)
    aims = base + exact(rng, n_cols, n_rows, span=1)
    return [aims, base, push.float(), scale, offset, numbers // 16, numbers]


def to_search(n_rows: int) -> list[torch.Tensor]:
    """Arguments of `search`, the levels aside."""
    rng, n = torch.Generator().manual_seed(n_rows), 64
    weight, hessian = problem(n_rows, n)
    h = solver.damped(hessian).float()
    numbers = torch.randperm(n, generator=rng)
    scale = 0.01 * torch.rand(2, n // 32, n_rows, generator=rng)
    offset, value = 0.01 * torch.randn(2, n // 32, n_rows, generator=rng), 0.02 * torch.randn(n, n_rows, generator=rng)
    pull, push = h @ (weight.T - value), torch.triu(-h / h.diagonal())
    return [weight.T.contiguous(), value, pull, push, h, scale, offset, numbers // 32, numbers]


@pytest.fixture
def both(runtime_library):
    return sweeps.Reference(), sweeps_c.Sweeps(runtime_library)


@pytest.fixture
def levels():
    plain, wide = (torch.tensor(found) for found in ([-5.0, -2, 1, 6], [-7.0, -5, -4, -1, 0, 3, 4, 6]))
    return sweeps.Levels.of(plain, wide, 32)


@pytest.mark.parametrize(("n_cols", "n_rows"), [(32, 1), (128, 37), (160, 16), (288, 5)])
def test_a_sweep_gives_the_same_codes(both, levels, n_cols, n_rows):
    aims, *given = to_sweep(n_cols, n_rows)
    found = [each.sweep(aims.clone(), *given, levels) for each in both]
    assert torch.equal(*found)
    assert len(found[0].unique()) == 10 or n_rows == 1 or n_cols == 32  # all levels, those of plain columns too


@pytest.mark.parametrize("n_rows", [1, 16, 45])
def test_a_search_finds_the_same(both, levels, n_rows):
    given = to_search(n_rows)
    slow, fast = (each.search(*given, levels) for each in both)
    assert (slow.copy == fast.copy).float().mean() > 0.9 and slow.copy.max() >= 0
    same = (slow.copy == fast.copy) & (slow.copy >= 0)
    for one, other in ((slow.units, fast.units), (slow.change, fast.change)):
        assert (one - other)[:, same].abs().gt(1e-5).float().mean() < 0.01
    _, value, pull, _, h, *_ = given
    gain = [float(sweeps.gains(h, pull, each.change)[each.copy >= 0].sum()) for each in (slow, fast)]
    assert gain[0] == pytest.approx(gain[1], rel=1e-3) and gain[0] > 0
    for each in both:  # of weights that are stored as they are
        assert (each.search(value, value, 0 * pull, *given[3:], levels).copy == -1).all()


@pytest.mark.parametrize("name", ["sq3", "q4_k", "q2_k", "iq4_xs", "sdr4"])
def test_whole_solutions_are_as_good(both, monkeypatch, name):
    weight, hessian = problem(70, 512)
    errors = []
    for each in both:
        monkeypatch.setattr(solver, "_inner", lambda device, each=each: each)
        errors.append(solver.solve(weight, hessian, formats.for_type(types.get(name))).errors)
    for stage, error in errors[0].items():
        assert errors[1][stage] == pytest.approx(error, rel=1e-3), stage


def test_the_library_is_used_where_it_is_built(runtime_library):
    assert isinstance(solver._inner(torch.device("cpu")), sweeps_c.Sweeps)
    assert isinstance(solver._inner(torch.device("meta")), sweeps.Reference)
