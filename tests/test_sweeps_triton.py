# SPDX-License-Identifier: MIT
"""The solver's inner loops on a GPU beside those in PyTorch; with TRITON_INTERPRET=1, where Triton is, on CPUs."""

import functools
import os

import pytest
import torch
from test_solve import problem
from test_sweeps import to_sweep

from gguf_splitq import types
from gguf_splitq.coding import families, formats, graphs, solver, sweeps
from gguf_splitq.runtime import native
from gguf_splitq.types.columns import PLAIN

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not torch.cuda.is_available() and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from gguf_splitq.coding import sweeps_triton  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
BOTH = sweeps.Reference(), sweeps_triton.Sweeps()
OTHERS = ["sq6w", "sq5w", "sq4w", "sq3w", "cq3", "sq3c", "sq4wc", "sq3wo", "sq2wo"]
NAMES = ["sq4", "q4_0", "q4_1", "q4_k", "q2_k", "q3_k", "iq4_xs", "sdr4"]


def needs(name: str) -> None:
    """Skips where only the runtime's library fits the type's first parameters, and that is not built."""
    if types.get(name).needs_library(True) and native.library() is None:
        pytest.skip("the runtime is not built")


def moved(*given: torch.Tensor) -> list[torch.Tensor]:
    return [each.to(DEVICE) for each in given]


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
def levels():
    plain, wide = moved(torch.tensor([-5.0, -2, 1, 6]), torch.tensor([-7.0, -5, -4, -1, 0, 3, 4, 6]))
    return sweeps.Levels.of(plain, wide, 32)


@pytest.mark.parametrize(("n_cols", "n_rows"), [(32, 1), (128, 37), (160, 16)])
def test_a_sweep_gives_the_same_codes(levels, n_cols, n_rows):
    aims, *given = moved(*to_sweep(n_cols, n_rows))
    found = [each.sweep(aims.clone(), *given, levels) for each in BOTH]
    assert torch.equal(*found)
    assert len(found[0].unique()) == 10 or n_rows == 1  # all levels, those of plain columns too


@pytest.mark.parametrize("n_rows", [1, 45])
def test_a_search_finds_the_same(levels, n_rows):
    given = moved(*to_search(n_rows))
    slow, fast = (each.search(*given, levels) for each in BOTH)
    same = slow.copy == fast.copy
    assert same.float().mean() > 0.9 and slow.copy.max() >= 0
    for one, other in ((slow.units, fast.units), (slow.change, fast.change)):
        assert (one - other)[:, same].abs().gt(1e-5).float().mean() < 0.01
    _, value, pull, _, h, *_ = given
    gain = [float(sweeps.gains(h, pull, each.change)[each.copy >= 0].sum()) for each in (slow, fast)]
    assert gain[0] == pytest.approx(gain[1], rel=1e-3) and gain[0] > 0
    for each in BOTH:  # of weights that are stored as they are
        assert (each.search(value, value, 0 * pull, *given[3:], levels).copy == -1).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sdr4"])
def test_a_refit_gives_the_same_parameters(name):
    needs(name)
    n_rows, n = 45, 256
    weight, hessian = problem(n_rows, n)
    weight[0] = 0
    fmt = formats.for_type(types.get(name), DEVICE)
    weight, hessian = moved(weight, hessian)
    rows = solver.Rows(weight, *solver.prepare(hessian, 1e-3)[:1], fmt, *solver.prepare(hessian, 1e-3)[1:3])
    blocks = 128 // fmt.block_size
    given = rows.units[:128], rows.pull()[:128], rows.h[:128, :128], rows.params[:, :blocks]
    (slow, change), (fast, other) = (each.refit(*given, fmt) for each in BOTH)
    kept = [torch.stack([fmt.scale(params), fmt.offset(params)]) for params in (slow, fast, given[3])]
    assert (kept[0] == kept[1]).float().mean() > 0.99  # the others lie halfway, but for what is rounded
    assert (kept[0] != kept[2]).any() and change.any()
    gain = [float(sweeps.gains(given[2], given[1], each).sum()) for each in (change, other)]
    assert gain[0] == pytest.approx(gain[1], rel=1e-3) and gain[0] > 0
    for params, each in ((slow, change), (fast, other)):  # what is reported is what the parameters change
        scale, offset = (
            (of(params) - of(given[3])).T.repeat_interleave(fmt.block_size, 0) for of in (fmt.scale, fmt.offset)
        )
        torch.testing.assert_close(each, given[0] * scale + offset, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["sq4", "q2_k"] if INTERPRETED else NAMES + OTHERS)
def test_whole_solutions_are_as_good_and_the_same_again(monkeypatch, name):
    needs(name)
    monkeypatch.setattr(formats.SuperBlockFormat, "fit", formats.SuperBlockFormat.fitted)  # as on a GPU
    weight, hessian = problem(32, 256)
    solve = functools.partial(families.coder(types.get(name), PLAIN), passes=1 if INTERPRETED else 8)
    expected = solve(weight, hessian)
    if INTERPRETED:
        monkeypatch.setattr(solver, "_inner", lambda device: BOTH[1])
    found = solve(*moved(weight, hessian))
    for stage, error in expected.errors.items():
        assert found.errors[stage] == pytest.approx(error, rel=3e-3), stage
    assert INTERPRETED or torch.equal(solve(*moved(weight, hessian)).packed, found.packed)


@pytest.mark.skipif(INTERPRETED, reason="a CPU records nothing")
@pytest.mark.parametrize("name", ["sq4", "q4_k", "sdr4", "sq4w"])
def test_what_is_recorded_gives_the_same_bytes(monkeypatch, name):
    needs(name)
    kind = types.get(name)
    weight, hessian = (part.to(DEVICE) for part in problem(40, 512))
    code = families.coder(kind, PLAIN)
    recorded = code(weight, hessian)
    monkeypatch.setattr(graphs.Repeated, "__call__", lambda _, work, *given: work(*given))
    assert torch.equal(recorded.packed, code(weight, hessian).packed)
