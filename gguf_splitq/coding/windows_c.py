# SPDX-License-Identifier: MIT
"""Window codes in C (ggml-windows-solve.c), for CPUs: several blocks in a call, on one thread, without Python's lock.

It adds in another order than the reference: see docs.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from .sweeps import COLUMNS

if TYPE_CHECKING:
    from .formats import WindowFormat
    from .solver import Group
    from .windows import Trellis

BLOCK = 32


class _Kind(ctypes.Structure):
    """`splitq_windows_kind`."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "n_scales", "closed", "positive")),
        *((name, ctypes.c_void_p) for name in ("levels", "table", "added", "turned")),
    ]


class Coder:
    """Blocks of a type, of which some scales are tried."""

    def __init__(
        self, library: ctypes.CDLL, trellis: Trellis, fmt: WindowFormat, tried: tuple[torch.Tensor, ...], closed: int
    ):
        """tried: int64 [n_scales, 1] each, what is added to a scale byte's magnitude and turned of its sign."""
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._code, self._search = library.splitq_windows_code, library.splitq_windows_search
        self._code.argtypes = [pointer, i32, i64, *[pointer] * 3, i64, *[pointer] * 5]
        self._search.argtypes = [pointer, i32, *[pointer] * 2, i64, *[pointer] * 9]
        self._code.restype = self._search.restype = None
        self.kept = trellis.levels, fmt.scales, *(part.int().contiguous() for part in tried)
        found = 0 if trellis.open else closed
        self.kind = ctypes.byref(_Kind(trellis.bits, len(tried[0]), found, fmt.positive, *map(_at, self.kept)))

    def code(
        self, weight: torch.Tensor, push: torch.Tensor | None, costs: torch.Tensor, params: torch.Tensor
    ) -> torch.Tensor:
        """Edges of all blocks, coded as `windows._sweep` does. params: uint8 [n_blocks, n_rows], changed."""
        n_cols, n_rows = weight.shape
        edges, changes = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
        aims = weight if push is None else weight.clone()
        push = None if push is None else push.contiguous()
        span = n_cols if push is None else COLUMNS
        for start in range(0, n_cols, span):
            end = min(start + span, n_cols)
            pushed = (None, 0) if push is None else (_at(push[start:, start:]), push.stride(0))
            self._code(
                self.kind, (end - start) // BLOCK, n_rows, _at(aims[start:]), _at(weight[start:]), *pushed,
                _at(costs[start:]), None, _at(params[start // BLOCK :]), _at(edges[start:]), _at(changes[start:]),
            )  # fmt: skip
            if push is not None and end < n_cols:
                aims[end:].addmm_(push[start:end, end:].T, changes[start:end])
        return edges

    def search(
        self, group: Group, blocks: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, h: torch.Tensor,
        params: torch.Tensor, edges: torch.Tensor,
    ) -> None:  # fmt: skip
        """Code a group of int64 `blocks` and keep what lowers a row's error.

        Changes pull, edges, and params uint8 [n_blocks, n_rows], which are of all columns, as value and h are.
        """
        if not group.usable:
            return
        columns, n_rows = group.columns, value.shape[1]
        changes, push = torch.empty(len(columns), n_rows), group.push.contiguous()
        self._search(
            self.kind, len(blocks), _at(blocks), _at(columns), n_rows,
            *map(_at, (value, pull, group.inverse, push, group.h, group.costs, params, edges, changes)),
        )  # fmt: skip
        pull.addmm_(h.index_select(0, columns).T, changes, alpha=-1)


def _at(part: torch.Tensor) -> int:
    return part.data_ptr()
