# SPDX-License-Identifier: MIT
"""Which module codes a type's matrices, with a Hessian and without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..types import TensorType
from ..types.claq import Claq
from ..types.columns import PLAIN, ColumnType, Layout
from ..types.sqc import ScaledColumns
from ..types.windows import Window
from ..types.windowsc import WindowColumns
from ..types.windowso import OpenColumns
from . import codebooks, columns, formats, free, solver, windows
from .solver import Solution

_SOLVE: dict[type, Callable[..., Solution]] = {
    Claq: codebooks.solve,
    ScaledColumns: columns.solve,
    WindowColumns: columns.solve_windows,
    OpenColumns: columns.solve_windows,
}
_BYTES: dict[type, Callable[[int, int], int]] = {
    Claq: codebooks.coding_bytes,
    ScaledColumns: columns.coding_bytes,
    WindowColumns: columns.windows_coding_bytes,
    OpenColumns: columns.windows_coding_bytes,
}
_CODE: dict[type, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    Claq: free.with_codebooks,
    ScaledColumns: free.in_blocks,
    WindowColumns: free.in_windows,
    OpenColumns: free.in_windows,
}


def coder(kind: TensorType, layout: Layout) -> Callable[..., Solution] | None:
    """What codes float32 [n_rows, n_cols] given its Hessian [n_cols, n_cols]; None for types without error feedback.

    Its argument `each` is that of `solver.solve`.
    """
    if solve := _SOLVE.get(type(kind)):
        return functools.partial(solve, kind=kind, layout=layout)
    if isinstance(kind, Window):
        return functools.partial(windows.solve, kind=kind)
    return functools.partial(_in_blocks, kind=kind) if formats.for_type(kind) else None


def _in_blocks(weight: torch.Tensor, hessian: torch.Tensor, kind: TensorType, **options: Any) -> Solution:
    """`solver.solve` with these options, on the device of the weight."""
    fmt = formats.for_type(kind, weight.device)
    assert fmt
    return solver.solve(weight, hessian, fmt, **options)


def on_gpu(kind: TensorType | None) -> bool:
    """Whether a GPU codes this type; k-means of columns runs on CPUs."""
    return not isinstance(kind, Claq)


def coding_bytes(kind: TensorType | None, n_rows: int, n_cols: int) -> int:
    """Bytes of memory that `coder`'s result takes for a matrix, beside the Hessian and the rows."""
    return _BYTES.get(type(kind), solver.coding_bytes)(n_rows, n_cols)


def code(
    weight: torch.Tensor, kind: ColumnType, layout: Layout = PLAIN, importance: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n_rows, row_bytes], uint8 [size]): rows and side tensor that stand for a matrix, found without a Hessian.

    weight: float32, float16 or bfloat16 [n_rows, n_cols], finite. importance: float32 [n_cols], not negative.
    """
    return _CODE[type(kind)](weight, kind, layout, importance)


def rounded(
    weight: torch.Tensor, kind: TensorType, layout: Layout = PLAIN, importance: torch.Tensor | None = None
) -> np.ndarray:
    """float32 [n_rows, n_cols]: what is stored of a matrix float32 without a Hessian. importance: as of `code`."""
    if columns_kind := kind.columns:
        packed, side = code(weight, columns_kind, layout, importance)
        n_rows, n_cols = weight.shape
        return columns_kind.decode_rows(packed, columns_kind.read_side(side, n_rows, n_cols, kind.name), 0)
    return kind.decode(kind.encode(weight.numpy(), None if importance is None else importance.numpy()))
