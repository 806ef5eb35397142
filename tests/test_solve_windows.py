# SPDX-License-Identifier: MIT
"""Error feedback for window codes: the sweep against brute force and against its own formula, and whole matrices."""

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from test_solve import problem, solve

from gguf_splitq import types
from gguf_splitq.coding import formats, solver, windows
from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.types.windows import Window

torch.set_num_threads(1)  # the problems are too small to share

NAMES = ["sq6w", "sq5w", "sq4w", "sq3w", "sq2w"]
OPEN = {"sq3wo": (55, 1), "sq2wo": (55, 2)}  # and base and step that fit the problems


def type_of(name: str) -> Window:
    if name not in OPEN:
        return types.get(name)
    base, step = OPEN[name]
    return replace(types.get(name).plain, base=base, step=step)


def block(name: str, n_rows: int, n_scales: int, seed: int = 0) -> tuple:
    """What a sweep is given, for a block whose Hessian is not diagonal."""
    trellis, rng = windows.Trellis.of(type_of(name)), torch.Generator().manual_seed(seed)
    weight, hessian = problem(n_rows, 32, seed)
    factor = torch.linalg.cholesky(solver.backwards(solver.damped(hessian)))
    scales = 0.02 / 44 * (0.3 * torch.randn(n_scales, n_rows, generator=rng)).exp()
    base = weight.T + 0.01 * torch.randn(32, n_rows, generator=rng)
    return weight.T.contiguous(), base, scales, solver.pushes(factor), solver.costs(factor), trellis


def rows_of(name: str, weight: torch.Tensor, hessian: torch.Tensor) -> windows._Rows:
    kind = type_of(name)
    trellis = windows.Trellis.of(kind)
    h, order, factor, _ = solver.factored(hessian, solver.DAMPING, lambda diagonal: windows._order(diagonal, trellis))
    push, costs = solver.pushes(factor), solver.costs(factor)
    return windows._Rows(weight, h, formats.for_type(kind), order, push, costs, trellis)


def errors(edges: torch.Tensor, scale: torch.Tensor, given: tuple) -> torch.Tensor:
    """float64 [n_rows]: what codes of a block cost, column after column."""
    aims, base, _, push, costs, trellis = given
    aims, total = aims.double().clone(), 0
    for i in range(32):
        value = trellis.levels[edges[i].int()].double() * scale
        total = total + costs[i].double() * (aims[i] - value) ** 2
        aims[i + 1 :] += push[i, i + 1 :, None].double() * (value - base[i])
    return total


@pytest.mark.parametrize("name", NAMES)
def test_edges_are_the_windows_of_the_codes_they_carry(name):
    kind, rng = types.get(name), torch.Generator().manual_seed(0)
    trellis = windows.Trellis.of(kind)
    codes = torch.randint(1 << kind.code_bits, (50, 32), generator=rng, dtype=torch.uint8)
    expected = torch.from_numpy(kind.windows(codes.numpy()))
    codes_of, windows_of = torch.empty_like(codes), torch.empty_like(codes)
    for chain in trellis.walk:
        state = torch.zeros(50, dtype=torch.int64)
        for column in [*chain, *chain]:  # the second time round the state is that of the closed chain
            edge = state << kind.code_bits | codes[:, column].long()
            found, state = trellis.windows[edge], edge % trellis.n_states
            codes_of[:, column], windows_of[:, column] = torch.from_numpy(kind.codes(found.numpy())), found
    assert torch.equal(windows_of, expected) and torch.equal(codes_of, codes)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_closes_its_chains_and_takes_the_best_scale(name, states):
    given = block(name, 40, 4)
    trellis, scales = given[5], given[2]
    n_chains, length = trellis.walk.shape
    held = torch.randint(trellis.n_states, (n_chains, 40), dtype=torch.uint8) if states else None
    edges, choice = windows.in_torch(*given, held)
    chains = edges.view(n_chains, length, -1).int()
    assert torch.equal(chains[:, 1:] >> trellis.bits, chains[:, :-1] % trellis.n_states)
    assert torch.equal(chains[:, 0] >> trellis.bits, chains[:, -1] % trellis.n_states)
    if states:
        assert torch.equal(chains[:, 0] >> trellis.bits, held.int())
    found = errors(edges, scales.gather(0, choice[None])[0], given)
    assert all(((edges >= 0) & (edges < len(trellis.levels))).flatten())
    for number in range(len(scales)):
        alone = *given[:2], scales[number : number + 1], *given[3:]
        other = errors(windows.in_torch(*alone, held)[0], scales[number], given)
        better = (other < found * (1 - 1e-4)).double().mean()
        assert better == 0 if states else better < 0.2  # of free chains only the most promising are closed


@pytest.mark.parametrize("name", OPEN)
def test_an_open_chain_is_at_least_as_good_as_any_closed_one_and_takes_the_best_scale(name):
    given = block(name, 40, 4)
    edges, choice = windows.in_torch(*given, None)
    trellis, scales = given[5], given[2]
    assert torch.equal(edges[1:].int() >> trellis.bits, edges[:-1].int() % trellis.n_states)
    found = errors(edges, scales.gather(0, choice[None])[0], given)
    for number in range(len(scales)):
        alone = *given[:2], scales[number : number + 1], *given[3:]
        assert (found <= errors(windows.in_torch(*alone, None)[0], scales[number], given) * (1 + 1e-4)).all()
    diagonal = *given[:3], torch.zeros(32, 32), given[4], trellis  # where nothing is left to chance
    closed = windows.in_torch(*diagonal[:5], replace(trellis, open=False), None)
    least, others = (
        errors(part, scales.gather(0, number[None])[0], diagonal)
        for part, number in (windows.in_torch(*diagonal, None), closed)
    )
    assert (least <= others * (1 + 1e-5)).all() and (least / others).mean() < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_paths_of_a_diagonal_hessian_are_the_best_there_are(name):
    """A column's error then depends on nothing else: Viterbi's algorithm finds the least. Here with every state."""
    aims, base, scales, _, costs, trellis = block(name, 6, 1)
    given = aims, base, scales, torch.zeros(32, 32), costs, trellis
    n_chains, length = trellis.walk.shape
    tries = []
    for state in range(trellis.n_states):
        held = torch.full((n_chains, 6), state, dtype=torch.uint8)
        edges = windows.in_torch(*given, held)[0].view(n_chains, length, -1)
        value = trellis.levels[edges.int()] * scales[0]
        cost = costs.view(n_chains, length, 1) * (aims.view_as(value) - value) ** 2
        tries.append(cost.sum(1, dtype=torch.float64))
        # no change of one code is better
        codes = (edges % (1 << trellis.bits)).long()
        for i, new in itertools.product(range(length), range(1 << trellis.bits)):
            changed = codes.clone()
            changed[:, i] = new
            windowed, at = torch.empty_like(codes), torch.full((n_chains, 6), state)
            for j in range(length):
                windowed[:, j] = at << trellis.bits | changed[:, j]
                at = windowed[:, j] % trellis.n_states
            other = costs.view(n_chains, length, 1) * (aims.view_as(value) - trellis.levels[windowed] * scales[0]) ** 2
            closed = at == state
            assert (other.sum(1, dtype=torch.float64) >= tries[-1] * (1 - 1e-5))[closed].all()
    free = errors(windows.in_torch(*given, None)[0], scales[0], given)
    least = torch.stack(tries).min(0).values.sum(0)
    assert (free >= least * (1 - 1e-5)).all() and float((free / least).mean()) < 1.02


@pytest.mark.parametrize("name", [*NAMES, *OPEN])
def test_feedback_costs_what_its_formula_says(name):
    """The columns' costs add up to the whole error, so that scales are compared by what they cost."""
    weight, hessian = problem(20, 32)
    rows = rows_of(name, weight, hessian)
    before = rows.error()
    rows.feedback()
    given = rows.weight[rows.order], rows.weight[rows.order], None, rows.push, rows.costs, rows.trellis
    total = errors(rows.edges[rows.order], rows.fmt.scale(rows.params)[:, 0], given).sum()
    assert float(total) == pytest.approx(rows.error(), rel=1e-3)
    assert rows.error() < 0.7 * before


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [*NAMES, *OPEN])
def test_no_step_after_feedback_raises_the_error(name, seed):
    weight, hessian = problem(24, 192, seed)
    rows = rows_of(name, weight, hessian)
    rows.feedback()
    found, chance = [rows.error()], torch.Generator().manual_seed(seed)
    for _ in range(2):
        for step in (rows.refit, lambda: rows.search(chance, rows.pull())):
            step()
            found.append(rows.error())
            assert torch.equal(rows.units, rows.trellis.levels[rows.edges.int()])
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))
    assert found[-1] < found[0]


@pytest.mark.parametrize(("name", "scalar", "ratio"), [
    ("sq6w", "q6_k", 1.25), ("sq5w", "q5_k", 1),  # these have 0.31 and 0.25 bits more, worth a factor of 1.54 and 1.41
    ("sq4w", "sq4", 0.9), ("sq3w", "sq3", 0.9), ("sq2w", "sq2", 0.9),
])  # fmt: skip
def test_better_than_a_scalar_code_of_as_many_bytes(runtime_library, name, scalar, ratio):
    window, other = (solve(each, *problem(48, 256)).errors["polish"] for each in (name, scalar))
    assert window < ratio * other


def test_pieces_of_rows_and_of_scales_are_joined(monkeypatch):
    weight, hessian = problem(12, 64)
    kind = types.get("sq3w")
    first = windows.solve(weight, hessian, kind)
    monkeypatch.setattr(solver, "WEIGHTS", 5 * 64)
    monkeypatch.setattr(solver, "LEAST_ROWS", 1)
    monkeypatch.setattr(windows, "PIECE", 90)
    again = windows.solve(weight, hessian, kind)
    assert torch.equal(first.packed, again.packed)


def exact_block(name: str, n_rows: int, n_scales: int) -> tuple:
    """What a sweep is given, of such numbers that no sum is rounded, in whatever order it is taken."""
    trellis, rng = windows.Trellis.of(type_of(name)), torch.Generator().manual_seed(n_rows)
    aims, base = (torch.randint(-90, 91, (32, n_rows), generator=rng).float() for _ in range(2))
    scales = 2.0 ** torch.randint(-1, 2, (n_scales, n_rows), generator=rng)
    scales[-1, 0] = 0
    push = torch.randint(-1, 2, (32, 32), generator=rng) / 4 * (torch.rand(32, 32, generator=rng) < 0.1)
    return aims, base, scales, push, torch.randint(1, 4, (32,), generator=rng).float(), trellis


def held_states(given: tuple, n_rows: int) -> torch.Tensor:
    trellis, rng = given[5], torch.Generator().manual_seed(0)
    return torch.randint(trellis.n_states, (len(trellis.walk), n_rows), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("n_rows", [1, 8, 45])
@pytest.mark.parametrize("name, states", [*itertools.product(NAMES, [False, True]), *((name, False) for name in OPEN)])
def test_c_gives_the_codes_of_the_reference(runtime_library, name, states, n_rows):
    given = exact_block(name, n_rows, 5)
    held = held_states(given, n_rows) if states else None
    for each in (given, (*given[:3], torch.zeros(32, 32), *given[4:])):
        expected, found = windows.in_torch(*each, held), windows.in_c(*each, held)
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("name", NAMES)
def test_without_the_runtime_the_result_is_as_good(runtime_library, monkeypatch, name):
    weight, hessian = problem(48, 96)
    fast = windows.solve(weight, hessian, types.get(name))
    monkeypatch.setattr(windows.native, "library", lambda: None)
    slow = windows.solve(weight, hessian, types.get(name))
    for stage, error in slow.errors.items():
        assert fast.errors[stage] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", [*NAMES, *OPEN])
def test_trained_scales_keep_the_codes(name):
    kind = type_of(name)
    packed = windows.solve(*problem(4, 64), kind).packed.numpy()
    fmt = formats.for_type(kind)
    found, params = fmt.unpack(packed)
    assert name not in OPEN or params.max() >= 128 and (params & 127).max() < kind.n_scales
    value = fmt.levels[found.int()].unflatten(1, (2, -1)) * fmt.scale(params)[..., None]
    assert torch.equal(value.flatten(1), torch.from_numpy(kind.decode(packed)))
    assert (fmt.pack(found, params).numpy() == packed).all()


def test_a_gpu_without_triton_is_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "gguf_splitq.coding.windows_triton", raising=False)
    with pytest.raises(EnvironmentFailed, match="needs Triton.*pip install triton"):
        windows._sweeper(torch.device("cuda"))
