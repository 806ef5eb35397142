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


def to_search_group(n_rows: int) -> tuple[solver.Group, dict[str, torch.Tensor]]:
    """Arguments of `search_group`, the levels aside: two blocks of four."""
    rng, n = torch.Generator().manual_seed(n_rows), 128
    weight, hessian = problem(n_rows, n)
    h = solver.damped(hessian).float()
    here = torch.tensor([3, 1])
    order = torch.randperm(64, generator=rng)
    columns = (here[:, None] * 32 + torch.arange(32)).flatten()[order]
    group = solver.Group(*(part[0] for part in solver.groups(h, columns[None])))
    scale = 0.01 * torch.rand(2, n // 32, n_rows, generator=rng)
    offset, value = 0.01 * torch.randn(2, n // 32, n_rows, generator=rng), 0.02 * torch.randn(n, n_rows, generator=rng)
    pull = h @ (weight.T - value)
    units, taken = torch.full_like(value, 99), torch.zeros(n // 32, n_rows, dtype=torch.int64)
    given = dict(here=here, block=order // 32, value=value, pull=pull, h=h, scale=scale, offset=offset)
    return group, given | dict(units=units, taken=taken)


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
    group, given = to_search_group(n_rows)
    found = []
    for each in both:
        parts = given | {name: given[name].clone() for name in ("pull", "units", "taken")}
        each.search_group(group, **parts, levels=levels)
        found.append(parts)
    slow, fast = found
    assert (slow["taken"] == fast["taken"]).float().mean() > 0.9 and (n_rows == 1 or slow["taken"].max() == 1)
    same = (slow["taken"] == fast["taken"]).all(0)
    assert (slow["units"] - fast["units"])[:, same].ne(0).float().mean() < 0.01
    gain = []
    for parts in found:
        others = torch.ones(128, dtype=torch.bool).index_fill(0, group.columns, False)
        assert (parts["units"][others] == 99).all() and (parts["taken"][[0, 2]] == 0).all()
        scale, offset = (
            given[name].gather(0, parts["taken"][None])[0].repeat_interleave(32, 0) for name in ("scale", "offset")
        )
        change = (parts["units"] * scale + offset - given["value"]).masked_fill(parts["units"] == 99, 0)
        assert torch.allclose(parts["pull"], given["pull"] - given["h"] @ change, atol=1e-4)
        gain.append(float(sweeps.gains(given["h"], given["pull"], change).sum()))
    assert gain[0] == pytest.approx(gain[1], rel=1e-3) and gain[0] > 0


@pytest.mark.parametrize("usable", [True, False])
def test_a_search_keeps_what_is_stored_where_nothing_is_better(both, levels, usable):
    group, given = to_search_group(45)
    for each in both:
        given["pull"] = torch.zeros_like(given["value"]) if usable else given["pull"]
        before = given["pull"].clone()
        each.search_group(group._replace(usable=torch.tensor(usable)), **given, levels=levels)
        assert (given["units"] == 99).all() and (given["taken"] == 0).all() and torch.equal(given["pull"], before)


@pytest.mark.parametrize("name", ["sq3", "sq4", "q5_1", "q4_0", "q4_k", "q6_k", "sq3w"])
@pytest.mark.parametrize("n_rows", [1, 37])
def test_a_refit_and_a_stretch_find_the_same(both, name, n_rows):
    fmt = formats.for_type(types.get(name))
    weight, hessian = problem(n_rows, 512)
    h, order, push, _ = solver.prepare(hessian, solver.DAMPING)
    rows = solver.Rows(weight, h, fmt, order, push)
    rng = torch.Generator().manual_seed(0)
    scale, offset = fmt.scale(rows.params), fmt.offset(rows.params)
    moved = 1 + 0.1 * torch.randn(scale.shape, generator=rng)
    start = rows.params = fmt.nearest(scale * moved, offset * moved, rows.params)
    before, steps = rows.error(), ["refit_all"]
    steps += ["stretch_all"] if fmt.super_size > fmt.block_size else []
    for step in steps:
        found = []
        for each in both:
            rows.params = start.clone()
            pull = rows.pull()
            getattr(each, step)(rows.units, pull, h, rows.params, fmt)
            assert torch.allclose(pull, rows.pull(), atol=1e-4)
            found.append((fmt.scale(rows.params), fmt.offset(rows.params), rows.error()))
        (scale, offset, error), (other, below, its) = found
        assert ((scale == other) & (offset == below)).float().mean() > 0.99
        assert its == pytest.approx(error, rel=1e-3) and error < 0.999 * before


def test_a_refit_rounds_to_halves_as_processors_do(both):
    """One weight of level 1 in each row, whose scale 0 is refitted to what is missing."""
    halves = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    beside = (ties.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    values = torch.cat([halves, ties, *beside, torch.tensor([65519.0, 1e6])])
    values = torch.cat([values, -values])
    units, pull = torch.zeros(32, len(values)), torch.zeros(32, len(values))
    units[0], pull[0] = 1, values
    for each in both:
        found = torch.zeros(len(values), 1, 1, dtype=torch.float16)
        each.refit_all(units, pull.clone(), torch.eye(32), found, formats.for_type(types.get("q4_0")))
        assert torch.equal(found.flatten(), values.clamp(-65504, 65504).half())


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
