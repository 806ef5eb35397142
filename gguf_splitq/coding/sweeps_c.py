# SPDX-License-Identifier: MIT
"""The solver's inner loops in C (ggml-splitq-solve.c), for CPUs. What they compute: sweeps.py.

C keeps some rows of a group of columns in the first-level cache, where PyTorch makes several small operations of every
column. Each of these takes Python's lock, which a call of C does not hold: so C does all of a group but the large
products, and threads that solve pieces of a matrix seldom wait for each other.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from . import sweeps
from .sweeps import COLUMNS, Grid, Levels

if TYPE_CHECKING:
    from .solver import Format, Group

KINDS = ["table", "half", "steps"]  # `enum splitq_solve_kind`


class _Levels(ctypes.Structure):
    """`struct splitq_solve_levels`."""

    _fields_ = [
        ("plain", ctypes.c_void_p), ("wide", ctypes.c_void_p), ("first", ctypes.c_int32), ("last", ctypes.c_int32),
    ]  # fmt: skip


class _Columns(ctypes.Structure):
    """`struct splitq_solve_columns`."""

    _fields_ = [
        ("count", ctypes.c_int32), ("numbers", ctypes.c_void_p), ("block", ctypes.c_void_p), ("n_wide", ctypes.c_int64),
        ("levels", _Levels),
    ]  # fmt: skip


class _Grid(ctypes.Structure):
    """`struct splitq_solve_grid`."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "least", "most")),
        *((name, ctypes.c_void_p) for name in ("table", "steps", "steps_below")),
    ]


class Sweeps(sweeps.Reference):
    """See `sweeps.Sweeps`. All tensors are on the CPU, matrices of all columns are contiguous, and h is symmetric."""

    def __init__(self, library: ctypes.CDLL):
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._sweep, self._search = library.splitq_solve_sweep, library.splitq_solve_search
        self._refit = library.splitq_solve_refit
        self._sweep.argtypes = [pointer, i64, *[pointer] * 3, i64, *[pointer] * 4]
        self._search.argtypes = [pointer, i64, *[pointer] * 5, i32, i64, *[pointer] * 5]
        self._refit.argtypes = [pointer, i32, i32, i64, *[pointer] * 4, i64, *[pointer] * 3]
        self._sweep.restype = self._search.restype = self._refit.restype = None

    def sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
        block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> torch.Tensor:  # fmt: skip
        units, changes = torch.empty_like(aims), torch.empty_like(aims)
        base, push, scale, offset = (part.contiguous() for part in (base, push, scale, offset))
        for start in range(0, len(aims), COLUMNS):
            end = min(start + COLUMNS, len(aims))
            self._sweep(
                _columns(numbers[start:end], block[start:end], levels), aims.shape[1],
                _row(aims, start), _row(base, start), _row(push, start, start), push.stride(0),
                *_at(scale, offset), _row(units, start), _row(changes, start),
            )  # fmt: skip
            aims[end:].addmm_(push[start:end, end:].T, changes[start:end])
        return units

    def search_group(
        self, group: Group, here: torch.Tensor, block: torch.Tensor, value: torch.Tensor, pull: torch.Tensor,
        h: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: Levels, units: torch.Tensor,
        taken: torch.Tensor,
    ) -> None:  # fmt: skip
        if not group.usable:
            return
        (copies, blocks, n_rows), block = scale.shape, here[block]
        changes, push = torch.empty(len(block), n_rows), group.push.contiguous()
        self._search(
            _columns(group.columns, block, levels), n_rows, *_at(value, pull, group.inverse, push, group.h),
            copies, blocks, *_at(scale, offset, units, changes, taken),
        )  # fmt: skip
        pull.addmm_(h.index_select(0, group.columns).T, changes, alpha=-1)

    def refit_all(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> None:
        scale, offset = (of(params).T.contiguous() for of in (fmt.scale, fmt.offset))
        grid = fmt.grid(params)
        assert grid
        self._refitted(fmt.block_size, grid, units, None, pull, h, scale, offset if fmt.has_offset else None)
        params.copy_(fmt.nearest(scale.T.contiguous(), offset.T.contiguous(), params))  # they can be stored as they are

    def stretch_all(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> None:
        shared = fmt.shared(params)
        if shared is None:
            return super().stretch_all(units, pull, h, params, fmt)
        first, second = (part.T.repeat_interleave(fmt.block_size, 0) for part in shared[:2])
        factors = shared.factors.permute(2, 1, 0).contiguous()
        below = (second, factors[1]) if fmt.has_offset else (None, None)
        self._refitted(fmt.super_size, Grid("half"), units * first, below[0], pull, h, factors[0], below[1])
        params.copy_(fmt.share(factors.permute(2, 1, 0), params))

    def _refitted(
        self, size: int, grid: Grid, units: torch.Tensor, second: torch.Tensor | None, pull: torch.Tensor,
        h: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Refit blocks of so many columns; changes pull, and scale and offset [n_blocks, n_rows].

        second: what offsets are multiplied by where that is not 1, [n_cols, n_rows].
        """
        n_cols, n_rows = units.shape
        steps = [step.T.contiguous() for step in grid.steps or ()]
        span = max(COLUMNS // size, 1) * size
        changes = torch.empty(span, n_rows)
        for first in range(0, n_cols, span):
            end, block = min(first + span, n_cols), first // size
            of = _Grid(
                KINDS.index(grid.kind), grid.least, grid.most, None if grid.table is None else grid.table.data_ptr(),
                *(_row(step, block) for step in steps),
            )  # fmt: skip
            self._refit(
                ctypes.byref(of), end - first, size, n_rows, _row(units, first), _row(second, first), _row(pull, first),
                _row(h, first, first), n_cols, _row(scale, block), _row(offset, block), changes.data_ptr(),
            )  # fmt: skip
            pull.addmm_(h[:, first:end], changes[: end - first], alpha=-1)


def _row(matrix: torch.Tensor | None, row: int, column: int = 0) -> int | None:
    """Where in a contiguous matrix of float32 this is. To slice the matrix would be an operation of PyTorch."""
    return None if matrix is None else matrix.data_ptr() + 4 * (row * matrix.shape[1] + column)


def _columns(numbers: torch.Tensor, block: torch.Tensor, levels: Levels) -> object:
    """A pointer to a `struct splitq_solve_columns`, of int64 tensors that have to be kept."""
    assert len(numbers) <= COLUMNS and numbers.is_contiguous() and block.is_contiguous()
    of = _Levels(*_at(*levels.tables), levels.first, levels.first + len(levels.tables[0]) - 1)
    return ctypes.byref(_Columns(len(numbers), *_at(numbers, block), levels.wide, of))


def _at(*parts: torch.Tensor) -> list[int]:
    return [part.data_ptr() for part in parts]
