# SPDX-License-Identifier: MIT
"""What a file holds of a matrix, in floating point: after a calibration, and by rounding to nearest."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..coding import families, solver
from ..plan import Entry
from ..rewrite import Rows
from ..types.columns import side_name


def rounded(weight: torch.Tensor, entry: Entry, each: solver.Each = map) -> torch.Tensor:
    """float32 [n_rows, n_cols]: what is stored of a matrix without a calibration: rounded to nearest.

    each: does some of the rows; all at once where they have something in common.
    """
    step = len(weight) if entry.columns else solver.rows_together(*weight.shape)

    def some(rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(families.rounded(rows, entry.coder, entry.layout))

    return torch.cat(list(each(some, weight.split(step))))


def decoded(entry: Entry, rows: Mapping[str, Rows], number: int, here: slice) -> torch.Tensor:
    """float32 [n_rows, n_cols]: what the rows `here` of a tensor, those of its matrix `number`, stand for."""
    packed = rows[entry.name][here]
    if kind := entry.columns:
        [data] = rows[side_name(entry.name)][number : number + 1]
        side = kind.read_side(data, len(packed), entry.tensor.n_cols, entry.name)
        return torch.from_numpy(kind.decode_rows(packed, side, 0))
    return torch.from_numpy(entry.coder.decode(packed))
