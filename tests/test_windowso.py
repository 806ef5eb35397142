# SPDX-License-Identifier: MIT
"""sq3wo and sq2wo: window codes whose chains are open, with the block scales of a matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_claq import without_data
from test_solve import problem
from test_windows import decibels

from gguf_splitq import types
from gguf_splitq.coding import columns as coder
from gguf_splitq.errors import InputError
from gguf_splitq.types import windows, windowso
from gguf_splitq.types.columns import PLAIN
from gguf_splitq.types.splitquant import SCALES

FAMILY = pytest.mark.parametrize("kind", windowso.TYPES, ids=lambda t: t.name)
GRIDS = [(1, 1), (60, 1), (50, 2), (30, 4)]


def rows_with(kind: windowso.OpenColumns, base: int, step: int) -> windowso.OpenWindow:
    return replace(kind.plain, base=base, step=step)


def blocks(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (n, 32)).astype(np.float32)


def errors(kind: windowso.OpenWindow, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    found = kind.decode_numpy(kind.encode_numpy(x, importance))
    return ((x - found).astype(np.float64) ** 2 * (1 if importance is None else importance)).sum(1)


@FAMILY
@pytest.mark.parametrize("grid", GRIDS)
def test_what_follows_a_chain_is_in_the_scale_byte(kind, grid):
    """Each weight by the words of docs/format.md, on whole numbers of any size."""
    rows, table = rows_with(kind, *grid), windows.tables()[f"sq{kind.code_bits}w"].levels
    data = np.random.default_rng(1).integers(0, 256, (20, kind.block_bytes), np.uint8)
    for block, found in zip(data, rows.decode_numpy(data), strict=True):
        *codes, d = map(int, block)
        q = int.from_bytes(bytes(codes[:8]), "little")
        if kind.code_bits == 2:
            base, step, number = *grid, d >> 4 & 7
            word = q | (d & 15) << 64
            index = [word >> 8 * (c % 8) + 2 * (c // 8) & 63 for c in range(32)]
        else:
            base, step, number = *grid, d >> 3 & 15
            word = q | (d >> 1 & 3) << 64
            high = int.from_bytes(bytes(codes[8:]), "little") | (d & 1) << 32
            index = [
                word >> 8 * (c % 8) + 2 * (c // 8) & 15 | (high >> 4 * (c % 8) + c // 8 & 3) << 4 for c in range(32)
            ]
        scale = SCALES[base + step * number] * (-1 if d & 128 else 1)
        assert found.tolist() == [scale * float(table[i]) for i in index]


@FAMILY
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_c_gives_the_same_bytes_and_weights(runtime_library, kind, grid, weighted):
    rows, rng = rows_with(kind, *grid), np.random.default_rng(2)
    x = (rng.standard_t(4, (37, 96)) * np.exp2(rng.uniform(0, 4, (37, 1))) * 20 * rows.scales[2]).astype(np.float32)
    x[3], x[4, :32] = 0, 1e-42
    importance = np.append(np.zeros(32), 10 ** rng.uniform(0, 4, 64)).astype(np.float32) if weighted else None
    encoded = rows.encode_numpy(x, importance)
    np.testing.assert_array_equal(rows.encode(x, importance), encoded)
    assert len(np.unique(encoded.reshape(-1, kind.block_bytes)[:, -1] >> 6 - kind.code_bits & rows.n_scales - 1)) > 3
    random = rng.integers(0, 256, encoded.shape, np.uint8)
    np.testing.assert_array_equal(rows.decode(random), rows.decode_numpy(random))


@FAMILY
@pytest.mark.parametrize("decades", [0, 2])
def test_hardly_anything_is_lost_against_all_paths_at_all_scales(kind, decades):
    x, importance = blocks(256), 10 ** np.random.default_rng(4).uniform(0, decades, 32).astype(np.float32)
    rows = kind.rows_for([x], importance)
    least = np.full(len(x), np.inf)
    for scale in rows.scales[[*range(rows.n_scales), *range(128, 128 + rows.n_scales)]].astype(np.float64):
        cost = np.zeros((len(x), rows.n_states))
        for column in rows.chain[0, ::-1]:
            metric = (x[:, column, None] - scale * rows.edges) ** 2 * importance[column]
            cost = (np.repeat(cost, 1 << kind.code_bits, 1) + metric).reshape(len(x), -1, rows.n_states).min(1)
        least = np.minimum(least, cost.min(1))
    assert decibels(errors(rows, x, importance).sum() / least.sum()) < 0.05 + 0.1 * (decades > 0)


@pytest.mark.parametrize(("name", "gain"), [("sq3wo", 0.35), ("sq2wo", 0.45)])
def test_errors_are_below_those_of_closed_chains(name, gain):
    weight, _ = problem(256, 128)
    found = [
        float((weight - without_data(weight, types.get(n), PLAIN)[0]).square().sum()) for n in (name, name[:-1] + "c")
    ]
    assert decibels(found[1] / found[0]) > gain


@FAMILY
@pytest.mark.parametrize("octaves", [0, 0.5, 1])
def test_rows_of_different_sizes_get_scales_further_apart(kind, octaves):
    """At most a twentieth is lost against the best base and step, and closed chains are never as good."""
    x = blocks(64) * np.exp2(octaves * np.random.default_rng(5).normal(size=(64, 1))).astype(np.float32)
    rows = kind.rows_for([x[:10], x[10:]], None)
    assert rows == kind.rows_for([x], None)
    assert rows.step == 1 if octaves == 0 else rows.step > 1 or octaves < 1
    others = [rows_with(kind, base, step) for step in windowso.GRIDS for base in range(40, 90, 2)]
    least = min(errors(other, x).sum() for other in others if kind.has_grid(other.base, other.step))
    assert errors(rows, x).sum() < 1.05 * least
    assert errors(rows, x).sum() < errors(types.get(f"sq{kind.code_bits}w"), x).sum()


@FAMILY
def test_weights_of_any_size_have_scales(kind):
    x = blocks(8)
    for size in (1e-9, 1e-6, 1e-3, 100):
        rows = kind.rows_for([x * np.float32(size)], None)
        assert kind.has_grid(rows.base, rows.step)
        assert size < 1e-4 or errors(rows, x * np.float32(size)).sum() < 0.2 * np.square(x * size).sum()
    assert kind.rows_for([0 * x], None).base == 1


@pytest.mark.parametrize(("name", "base", "step"), [
    ("sq2wo", 0, 1), ("sq2wo", 121, 1), ("sq2wo", 50, 0), ("sq2wo", 50, 3), ("sq2wo", 100, 4), ("sq3wo", 113, 1),
    ("sq3wo", 68, 4), ("sq2wc", 1, 0), ("sq2wc", 0, 1),
])  # fmt: skip
def test_block_scales_that_there_are_not_are_refused(name, base, step):
    kind = types.get(name)
    side = kind.side_of(40, np.ones(64, np.float16), kind.plain).copy()
    side[20:28].view("<u4")[:] = base, step
    with pytest.raises(InputError, match="header is not that"):
        kind.read_side(side, 40, 64, "x")


@pytest.mark.parametrize(("name", "ratio"), [("sq3wo", 0.93), ("sq2wo", 0.91)])
def test_with_a_hessian_errors_are_below_those_of_closed_chains(runtime_library, name, ratio):
    weight, hessian = problem(96, 256)
    weight[5] = 0
    found, closed = (coder.solve_windows(weight, hessian, types.get(n)) for n in (name, name[:-1] + "c"))
    assert found.errors["polish"] < ratio * closed.errors["polish"]
    assert torch.equal(coder.solve_windows(weight, hessian, types.get(name)).packed, found.packed)
