# SPDX-License-Identifier: MIT
"""The solver's inner loops on GPUs, in Triton, which comes with PyTorch for CUDA. What they compute: sweeps.py.

A program has some rows, and a group of columns in sequence: nothing is launched for a column. Of the columns swept it
keeps the changes in registers, and takes the aim of a column from these and the column's pushes when it comes to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import sweeps
from .sweeps import Found, Levels

if TYPE_CHECKING:
    from .solver import Format

COLUMNS = 128  # swept by one program; a group of columns to search or refit has at most as many
LANES = 32  # rows of a program, or rows at one of their scales
HALVINGS = 7  # that find one of the 128 values of a table


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    aims, base, old, push, scale, offset, block, numbers, plain, wide, units, changes,
    n_rows, n_lanes, n_aims, n_base, n_old, push_row, push_column, copy, n_wide, first, last,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Lane l is row l mod n_rows at scale l div n_rows, [n_copies, n_blocks, n_rows] with `copy` between copies.

    aims, base, old: [COLUMNS, n_rows or n_lanes]; changes: from `old`. WIDTH: COLUMNS or the next power of 2.
    """
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = lane < n_lanes
    params = lane // n_rows * copy + lane % n_rows
    aims, base, old = aims + lane % n_aims, base + lane % n_base, old + lane % n_old
    column = tl.arange(0, WIDTH)
    pushed = tl.zeros((WIDTH, LANES), tl.float32)
    for i in range(COLUMNS):
        pushes = tl.load(push + column * push_row + i * push_column, column < i, 0.0)
        aim = tl.load(aims + i * n_aims, real, 0.0) + tl.sum(pushed * pushes[:, None], 0)
        at = params + tl.load(block + i) * n_rows
        size, middle = tl.load(scale + at, real, 0.0), tl.load(offset + at, real, 0.0)
        double = tl.where(size == 0, 0.0, tl.div_rn(2.0, tl.where(size == 0, 1.0, size)))
        place = tl.ceil(aim * double + (-middle * double - first))
        index = tl.minimum(tl.maximum(place, 0.0), last).to(tl.int32)
        table = tl.where(tl.load(numbers + i) < n_wide, tl.load(wide + index), tl.load(plain + index))
        value = table * size + middle
        tl.store(units + i * n_lanes + lane, table, real)
        tl.store(changes + i * n_lanes + lane, value - tl.load(old + i * n_old, real, 0.0), real)
        change = value - tl.load(base + i * n_base, real, 0.0)
        pushed = tl.where(column[:, None] == i, change[None, :], pushed)


@triton.jit
def _stored(value, table, step, least, most, KIND: tl.constexpr, HALVINGS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest value of a `sweeps.Grid`."""
    if KIND == "table":
        size = tl.abs(value)
        at = tl.zeros_like(value).to(tl.int32)
        for k in tl.static_range(HALVINGS):
            above = at + (1 << (HALVINGS - 1 - k))
            at = tl.where((tl.load(table + above - 1) + tl.load(table + above)) / 2 < size, above, at)
        found = tl.load(table + at)
        return tl.where(value < 0, -found, found)
    elif KIND == "half":
        return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    else:
        times = tl.where(step == 0, 0.0, tl.div_rn(value, tl.where(step == 0, 1.0, step)))
        return step * tl.minimum(tl.maximum(tl.floor(times + 0.5), least), most)


@triton.jit
def _refit(  # type: ignore[no-untyped-def]
    units, pull, h, scale, offset, table, steps, steps_below, new_scale, new_offset, changes,
    n_rows, h_row, least, most,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, BOTH: tl.constexpr, LANES: tl.constexpr,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    """scale, offset, steps and the new ones: [BLOCKS, n_rows]."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = row < n_rows
    every = real[None, :]
    inside = tl.arange(0, SIZE)
    for b in range(BLOCKS):
        here = b * SIZE + inside
        place = here[:, None] * n_rows + row[None, :]
        unit, drawn = tl.load(units + place, every, 0.0), tl.load(pull + place, every, 0.0)
        for other in range(b):
            there = other * SIZE + inside
            moved = tl.load(changes + there[:, None] * n_rows + row[None, :], every, 0.0)
            across = tl.load(h + here[:, None] * h_row + there[None, :])
            drawn -= tl.dot(across, moved, input_precision="ieee")
        own = tl.load(h + here[:, None] * h_row + here[None, :])
        against = tl.dot(own, unit, input_precision="ieee")
        aa, pa = tl.sum(against * unit, 0), tl.sum(drawn * unit, 0)
        x = tl.where(aa > 0, pa / tl.where(aa > 0, aa, 1.0), 0.0)
        at = b * n_rows + row
        was, below = tl.load(scale + at, real, 0.0), tl.load(offset + at, real, 0.0)
        y = tl.zeros_like(x)
        ones = tl.sum(own, 1)
        if BOTH:
            ab, pb, bb = tl.sum(against, 0), tl.sum(drawn, 0), tl.sum(ones, 0)
            determinant = aa * bb - ab * ab
            solvable = determinant > 1e-4 * aa * bb
            safe = tl.where(solvable, determinant, 1.0)
            x = tl.where(solvable, (pa * bb - pb * ab) / safe, x)
            y = tl.where(solvable, (pb * aa - pa * ab) / safe, y)
        step = tl.load(steps + at, real, 0.0) if KIND == "steps" else was
        size = _stored(was + x, table, step, least, most, KIND, HALVINGS)
        middle = below
        if BOTH:
            step = tl.load(steps_below + at, real, 0.0) if KIND == "steps" else was
            middle = _stored(below + y, table, step, -most, 0.0, KIND, HALVINGS)
        change = unit * (size - was)[None, :] + (middle - below)[None, :]
        effect = against * (size - was)[None, :] + ones[:, None] * (middle - below)[None, :]
        better = tl.sum(change * (2 * drawn - effect), 0) > 0
        tl.store(changes + place, tl.where(better[None, :], change, 0.0), every)
        tl.store(new_scale + at, tl.where(better, size, was), real)
        tl.store(new_offset + at, tl.where(better, middle, below), real)
        tl.debug_barrier()  # other threads of the program read these changes


class Sweeps(sweeps.Sweeps):
    """See `sweeps.Sweeps`. All tensors are on the GPU."""

    def sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
        block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> torch.Tensor:  # fmt: skip
        scales, units = (scale.contiguous()[None], offset.contiguous()[None]), torch.empty_like(aims)
        for start in range(0, len(aims), COLUMNS):
            here, end = slice(start, start + COLUMNS), start + COLUMNS
            given = aims[here], base[here], base[here], push[here, here], *scales, block[here], numbers[here], levels
            units[here], changes = _swept(*given)
            aims[end:].addmm_(push[here, end:].T, changes)
        return units

    def search(
        self, aims: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, push: torch.Tensor, h: torch.Tensor,
        scale: torch.Tensor, offset: torch.Tensor, block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> Found:  # fmt: skip
        rest = scale.contiguous(), offset.contiguous(), block, numbers, levels
        copies, against = len(scale), h / -h.diagonal()
        _, change = _swept(aims, aims, aims, push, *rest)
        found = aims.repeat(1, copies) + change
        units, change = _swept(torch.addmm(found, against.T, change), found, value, against, *rest)
        return sweeps.best(h, pull.repeat(1, copies), units, change, copies)

    def refit(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grid, n_rows = fmt.grid(params), units.shape[1]
        assert grid and len(units) <= COLUMNS
        scale, offset = (of(params).T.contiguous() for of in (fmt.scale, fmt.offset))
        given = grid.steps or (fmt.scale(params),) * 2  # not read but where there are steps
        steps = [step.T.contiguous() for step in given]
        new, below, changes = torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(pull)
        table = scale if grid.table is None else grid.table
        with torch.cuda.device_of(units):
            _refit[(triton.cdiv(n_rows, LANES),)](
                units, pull.contiguous(), h, scale, offset, table, *steps, new, below, changes,
                n_rows, h.stride(0), float(grid.least), float(grid.most),
                len(scale), fmt.block_size, grid.kind, fmt.has_offset, LANES, HALVINGS,
            )  # fmt: skip
        new, below = new.T.contiguous(), below.T.contiguous()
        return fmt.nearest(new, below, params), changes  # what can be stored is nearest to itself


def _swept(
    aims: torch.Tensor, base: torch.Tensor, old: torch.Tensor, push: torch.Tensor, scale: torch.Tensor,
    offset: torch.Tensor, block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Units, and what their values change from `old`, float32 [n_cols, n_copies * n_rows]; aims stay as they are.

    aims, base, old: for all copies together or one after another. scale, offset: [n_copies, n_blocks, n_rows].
    """
    n_copies, n_blocks, n_rows = scale.shape
    n_columns, n_lanes = len(aims), n_copies * n_rows
    aims, base, old = (part.contiguous() for part in (aims, base, old))
    units, changes = (torch.empty((n_columns, n_lanes), device=aims.device) for _ in range(2))
    with torch.cuda.device_of(aims):
        _sweep[(triton.cdiv(n_lanes, LANES),)](
            aims, base, old, push, scale, offset, block, numbers, *levels.tables, units, changes,
            n_rows, n_lanes, aims.shape[1], base.shape[1], old.shape[1], *push.stride(), n_blocks * n_rows,
            levels.wide, float(levels.first), len(levels.tables[0]) - 1.0,
            n_columns, triton.next_power_of_2(n_columns), LANES,
        )  # fmt: skip
    return units, changes
