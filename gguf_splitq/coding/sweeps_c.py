# SPDX-License-Identifier: MIT
"""The solver's inner loops in C (ggml-splitq-solve.c), for CPUs. What they compute: sweeps.py.

C keeps some rows of a group of columns in the first-level cache, where PyTorch makes several small operations of every
column. A call holds no lock: each thread that solves a matrix has a processor to itself.
"""

from __future__ import annotations

import ctypes

import torch

from . import sweeps
from .sweeps import Found, Levels

COLUMNS = 128  # SPLITQ_SOLVE_COLUMNS


class _Levels(ctypes.Structure):
    """`struct splitq_solve_levels`."""

    _fields_ = [
        ("plain", ctypes.c_void_p), ("wide", ctypes.c_void_p), ("first", ctypes.c_int32), ("last", ctypes.c_int32),
    ]  # fmt: skip


class _Columns(ctypes.Structure):
    """`struct splitq_solve_columns`."""

    _fields_ = [
        ("count", ctypes.c_int32), ("blocks", ctypes.c_int32), ("block", ctypes.c_void_p), ("wide", ctypes.c_void_p),
        ("levels", _Levels),
    ]  # fmt: skip


class Sweeps(sweeps.Reference):
    """See `sweeps.Sweeps`. All tensors are float32 on the CPU; a group of columns to search has at most COLUMNS.

    It refits as the reference does.
    """

    def __init__(self, library: ctypes.CDLL):
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._sweep, self._search = library.splitq_solve_sweep, library.splitq_solve_search
        self._sweep.argtypes = [pointer, i64, *[pointer] * 3, i64, *[pointer] * 4]
        self._search.argtypes = [pointer, i64, *[pointer] * 5, i32, *[pointer] * 5]
        self._sweep.restype = self._search.restype = None

    def sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
        block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> torch.Tensor:  # fmt: skip
        units, changes = torch.empty_like(aims), torch.empty_like(aims)
        base, push = base.contiguous(), push.contiguous()
        for start in range(0, len(aims), COLUMNS):
            end = min(start + COLUMNS, len(aims))
            used, local = block[start:end].unique(return_inverse=True)
            columns, scales = _Group(local, numbers[start:end], levels, len(used)), (scale[used], offset[used])
            self._sweep(
                columns.pointer, aims.shape[1], *_at(aims[start:], base[start:], push[start:, start:]), push.stride(0),
                *_at(*scales, units[start:], changes[start:]),
            )  # fmt: skip
            aims[end:].addmm_(push[start:end, end:].T, changes[start:end])
        return units

    def search(
        self, aims: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, push: torch.Tensor, h: torch.Tensor,
        scale: torch.Tensor, offset: torch.Tensor, block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> Found:  # fmt: skip
        units, change = torch.zeros_like(aims), torch.empty_like(aims)
        best = torch.empty(aims.shape[1], dtype=torch.int32)
        given = [part.contiguous() for part in (aims, value, pull, push, h)]
        copies, blocks, n_rows = scale.shape
        columns, scales = _Group(block, numbers, levels, blocks), (scale.contiguous(), offset.contiguous())
        self._search(columns.pointer, n_rows, *_at(*given), copies, *_at(*scales, units, change, best))
        return Found(best, units, change)


class _Group:
    """A `struct splitq_solve_columns` and what it points to."""

    def __init__(self, block: torch.Tensor, numbers: torch.Tensor, levels: Levels, blocks: int):
        self.kept = block.int().contiguous(), (numbers < levels.wide).to(torch.uint8), *levels.tables
        of = _Levels(*_at(*self.kept[2:]), levels.first, levels.first + len(levels.tables[0]) - 1)
        assert len(block) <= COLUMNS
        self.pointer = ctypes.byref(_Columns(len(block), blocks, *_at(*self.kept[:2]), of))


def _at(*parts: torch.Tensor) -> list[int]:
    return [part.data_ptr() for part in parts]
