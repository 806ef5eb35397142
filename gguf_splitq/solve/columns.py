"""Coding a matrix for a type with a side tensor: claq.py codes the cq types, here are sq2c and sq3c.

Columns are divided by their scales, wide ones come first, and all are then coded as blocks: by solver.py, where an
input's second moment is multiplied by its column's scale, or each block for itself.
"""

from __future__ import annotations

import numpy as np
import torch

from ..types.claq import Claq
from ..types.columns import ColumnType, Side
from ..types.splitquant import MAX_ABS
from . import claq, formats, solver
from .solver import Solution

SIZE = 8  # a column's scale, in root mean squares of its weights: keeps block scales inside the range of their bytes
LEAST = 1e-6  # of the mean of a Hessian's diagonal: what columns get that are zero, or never active


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    kind: ColumnType,
    importance: torch.Tensor | None = None,
    passes: int = solver.PASSES,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols], or without one.

    importance: float32 [n_cols], not negative, in the place of a Hessian. `errors` is empty without one, for sq2c and
    sq3c. Raises InputError as `solver.solve` does.
    """
    if isinstance(kind, Claq):
        return claq.solve(weight, hessian, kind, importance)
    scale = torch.from_numpy(scales(weight.numpy()))
    size = scale.float()
    inverse = torch.where(size > 0, 1 / size, 0)
    order = torch.arange(len(size))
    if hessian is not None:
        hessian = hessian.float().double() * size * size[:, None]  # float32 as in a file of Hessians: the same bytes
        hessian.diagonal().clamp_min_(LEAST * hessian.diagonal().mean())
    if kind.wide:
        if hessian is not None:
            price = claq.prices(solver._prepare(hessian, solver.DAMPING)[0]) * inverse**2
        else:
            price = torch.ones(len(size)) if importance is None else importance
        parts = claq.ranked(weight.T.contiguous(), price, kind.metric).tensor_split([32 * kind.wide])
        order = torch.cat(
            [part.sort().values for part in parts]
        )  # neighbours stay together: heads have their own sizes
    stored = weight[:, order] * inverse[order]
    if hessian is None:
        # An input that nothing is known of is taken to be the larger, the smaller its column.
        relevance = None if importance is None else (importance * size**2)[order].numpy()
        codes, d = kind.nearest(stored.numpy(), relevance)
        errors, damping = {}, 0.0
    else:
        solved = solver.solve(stored, hessian[order][:, order], formats.ColumnFormat(kind), passes=passes)
        codes, d = np.split(solved.packed.numpy(), [len(size)], 1)
        errors, damping = solved.errors, solved.damping
    packed, side = kind.pack(codes, Side(order.numpy(), scale[order].numpy()), d)
    value = kind.decode_rows(packed, kind.read_side(side, *weight.shape, kind.name), 0)
    return Solution(torch.from_numpy(packed), torch.from_numpy(value), errors, damping, side)


def scales(weight: np.ndarray) -> np.ndarray:
    """float16 [n_cols]: SIZE times the column's root mean square, or what its largest weight needs; 0 for zeros."""
    least = np.abs(weight).max(0) / np.float32(MAX_ABS)
    wanted = np.maximum(SIZE * np.sqrt(np.square(weight).mean(0, dtype=np.float64)), least).clip(max=65504)
    half = wanted.astype(np.float16)
    return np.where(half < least, np.nextafter(half, np.float16(65504)), half)
