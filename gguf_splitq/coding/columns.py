# SPDX-License-Identifier: MIT
"""Coding a matrix for types with scales of columns against a Hessian; codebooks.py is for those with codebooks.

Columns are divided by their scales and then coded as blocks, by windows.py or, wide ones first, by solver.py, where an
input's second moment is multiplied by its column's scale. Without a Hessian: free.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ..types.columns import PLAIN, Layout, Side
from ..types.splitquant import MAX_ABS
from ..types.sqc import ScaledColumns
from ..types.windowsc import WindowColumns
from . import codebooks, formats, solver, sweeps, windows
from .solver import Solution

SIZE = 8  # a column's scale, in root mean squares of its weights: keeps block scales inside the range of their bytes
LEAST = 1e-6  # of the mean of a Hessian's diagonal: what columns get that are zero, or never active


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    kind: ScaledColumns,
    layout: Layout = PLAIN,
    passes: int = solver.PASSES,
    each: solver.Each = map,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols].

    Raises InputError as `solver.solve` does.
    """
    n_rows, n_cols = weight.shape
    scale, inverse, hessian = _scaled(weight, hessian)
    order = torch.arange(n_cols)
    if layout.wide:
        price = codebooks.prices(solver.prepare(hessian, solver.DAMPING)[0]) * inverse**2
        order = torch.from_numpy(codebooks.order(layout, [weight.T.contiguous().cpu()], price.cpu()))
    stored, fmt = order.to(weight.device), formats.ColumnFormat(kind, layout, weight.device)
    solved = solver.solve(
        weight[:, stored] * inverse[stored], hessian[stored][:, stored], fmt, passes=passes, each=each
    )
    codes, d = np.split(solved.packed.numpy(), [n_cols], 1)
    packed, side = kind.pack(codes, Side(order.numpy(), scale[stored].cpu().numpy()), layout, d)
    value = kind.decode_rows(packed, kind.read_side(side, n_rows, n_cols, kind.name), 0)
    return Solution(torch.from_numpy(packed), torch.from_numpy(value), solved.errors, solved.damping, side)


def solve_windows(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    kind: WindowColumns,
    layout: Layout = PLAIN,
    passes: int = windows.PASSES,
    each: solver.Each = map,
) -> Solution:
    """`solve` for sq4wc, sq3wo and their like, which have no layout but the plain one."""
    scale, inverse, hessian = _scaled(weight, hessian)
    units = weight * inverse
    whole = (part.cpu().numpy() for part in (units,))  # from a GPU only where it is looked at
    plain = kind.rows_for(whole, hessian.diagonal().float().cpu().numpy())
    solved = windows.solve(units, hessian, plain, passes=passes, each=each)
    side = kind.side_of(len(weight), scale.cpu().numpy(), plain)
    return replace(solved, weight=solved.weight * scale.float(), side=side)


def coding_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of memory that `solve` takes: the Hessian and the rows once more, with scaled columns and in order."""
    return solver.coding_bytes(n_rows, n_cols) + n_cols * (24 * n_cols + 20 * n_rows)


def windows_coding_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of memory that `solve_windows` takes: the Hessian and the rows once more, with scaled columns."""
    return solver.coding_bytes(n_rows, n_cols) + n_cols * (16 * n_cols + 12 * n_rows)


def _scaled(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales of the columns float16 [n_cols], their inverses float32, and the Hessian of columns divided by them."""
    scale = torch.from_numpy(scales(weight.cpu().numpy())).to(weight.device)
    size = scale.float()
    hessian = hessian.float().double() * size * size[:, None]  # float32 as in a file of Hessians: the same bytes
    hessian.diagonal().clamp_min_(LEAST * hessian.diagonal().mean())
    return scale, sweeps.inverse(size), hessian


def scales(weight: np.ndarray) -> np.ndarray:
    """float16 [n_cols]: SIZE times the column's root mean square, or what its largest weight needs; 0 for zeros."""
    least = np.abs(weight).max(0) / np.float32(MAX_ABS)
    wanted = np.maximum(SIZE * np.sqrt(np.square(weight).mean(0, dtype=np.float64)), least).clip(max=65504)
    half = wanted.astype(np.float16)
    return np.where(half < least, np.nextafter(half, np.float16(65504)), half)
