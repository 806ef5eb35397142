# SPDX-License-Identifier: MIT
"""Coding a matrix for a type with a side tensor without a Hessian.

Columns do not see each other then, nor do the blocks of sq2c and sq3c: only the scales of rows, or those of columns,
take in all of the matrix. So a slice of it at a time is in floats, and the rest as the file has it. Importance tells
which columns are wide, and weighs in the scales of rows and blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from ..types.claq import Claq
from ..types.columns import PLAIN, Layout, Side
from ..types.sqc import ScaledColumns
from ..types.windowsc import WindowColumns
from . import codebooks
from .codebooks import PIECE, Cluster, Codebooks
from .columns import scales
from .kmeans import kmeans

PASSES = 2  # of scales of rows and new codebooks: there is little to gain
_CODE, _OUTLIER = 0x7F, 0x80  # of the bytes that codes are kept in


def in_windows(
    weight: torch.Tensor, kind: WindowColumns, layout: Layout = PLAIN, importance: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """sq4wc, sq3wo and their like: as `in_blocks`, columns staying where they are."""
    matrix = _Slices(weight)
    scale, size, inverse = _column_scales(matrix)
    relevance = None if importance is None else importance.numpy() * size**2
    packed = np.empty((matrix.n_rows, kind.row_bytes(matrix.n_cols)), np.uint8)

    def units(rows: slice) -> np.ndarray:
        return matrix.weight[rows].float().numpy() * inverse

    plain = kind.rows_for(map(units, matrix.rows), relevance)
    for rows in matrix.rows:
        packed[rows] = plain.encode(units(rows), relevance)
    return packed, kind.side_of(matrix.n_rows, scale, plain)


def in_blocks(
    weight: torch.Tensor, kind: ScaledColumns, layout: Layout = PLAIN, importance: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """sq2c, sq3c: each block for itself, columns divided by their scales. Arguments and result: see `families.code`."""
    matrix = _Slices(weight)
    scale, size, inverse = _column_scales(matrix)
    price = torch.ones(len(size)) if importance is None else importance
    order = codebooks.order(layout, matrix, price)
    # An input that nothing is known of is taken to be the larger, the smaller its column.
    relevance = None if importance is None else (importance.numpy() * size**2)[order]
    codes = np.empty((matrix.n_rows, matrix.n_cols), np.uint8)
    d = np.empty((matrix.n_rows, matrix.n_cols // 32), np.uint8)
    for rows in matrix.rows:
        stored = matrix.weight[rows].float().numpy()[:, order] * inverse[order]
        codes[rows], d[rows] = kind.nearest(stored, relevance, layout)
    return kind.pack(codes, Side(order, scale[order]), layout, d)


def with_codebooks(
    weight: torch.Tensor,
    kind: Claq,
    layout: Layout = PLAIN,
    importance: torch.Tensor | None = None,
    passes: int = PASSES,
    cluster: Cluster = kmeans,
    row_scales: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """cq types: each column clustered for itself. The first arguments and the result as of `families.code`.

    passes: of scales of rows and new codebooks. cluster, row_scales: as `codebooks.solve` takes them.
    """
    matrix = _Slices(weight)
    price = torch.ones(matrix.n_cols) if importance is None else importance
    price = price.clamp_min(1e-6 * float(price.max())) if price.any() else price + 1
    row = codebooks.row_sizes((matrix.of(rows) for rows in matrix.rows), price, row_scales)
    books = Codebooks(kind, layout, codebooks.order(layout, matrix, price), row, cluster)
    codes = np.empty((matrix.n_rows, matrix.n_cols), np.uint8)

    def values(part: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """float32 [some columns, some rows]: what codes stand for."""
        tables = books.scale[columns, None] * books.levels[columns]
        return np.take_along_axis(tables, part & _CODE, 1) * books.row_numpy[rows]

    def clustered() -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """All columns, in slices: which, float32 weights and uint8 codes [some columns, n_rows]."""
        for columns, part in zip(matrix.columns, matrix, strict=True):
            aims, found = part.numpy(), np.empty(part.shape, np.uint8)
            for c, aim, out in zip(range(columns.start, columns.stop), aims, found, strict=True):
                outliers = books.cluster(c, aim)
                out[:] = books.codes(c, aim)
                out[outliers] |= _OUTLIER
            codes[:, columns] = found.T
            yield columns, aims, found

    def refit() -> None:
        new = books.row.clone()
        for rows in matrix.rows:
            found = np.ascontiguousarray(codes[rows].T)
            unit = torch.from_numpy(values(found, rows, slice(None)))
            pull = price[:, None] * (matrix.of(rows) - unit)
            unit.masked_fill_(torch.from_numpy(found >= _OUTLIER), 0)
            new[rows] = books.refit(rows, pull, unit, price[:, None] * unit)
        books.set_row(new)

    if layout.outliers:
        costs = (np.square(a - values(f, slice(None), c)) * price[c, None].numpy() for c, a, f in clustered())
        books.kept = codebooks.counts(costs, layout.outliers)
    deque(clustered(), 0)
    for _ in range(passes):
        refit()
        deque(clustered(), 0)
    codes = codes[:, books.order]
    rows, columns = np.nonzero(codes & _OUTLIER) if layout.outliers else np.zeros((2, 0), np.int64)
    codes &= _CODE
    c = books.order[columns]
    exact = books.scale[c] * books.levels[c, codes[rows, columns]] * books.row_numpy[rows]
    rest = matrix.weight[torch.from_numpy(rows), torch.from_numpy(c)].float().numpy() - exact
    return books.pack(codes, rows, columns, codebooks.half(rest))


def _column_scales(matrix: _Slices) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n_cols]: scales of columns in float16 and in float32, and their inverses, 0 for 0."""
    scale = np.concatenate([scales(part.T.numpy()) for part in matrix])
    size = scale.astype(np.float32)
    return scale, size, np.divide(1, size, out=np.zeros_like(size), where=size > 0)


class _Slices:
    """A matrix in slices of columns, float32 [some columns, n_rows], each time it is iterated over."""

    def __init__(self, weight: torch.Tensor):
        self.weight, (self.n_rows, self.n_cols) = weight, weight.shape
        self.columns, self.rows = _slices(self.n_cols, self.n_rows), _slices(self.n_rows, self.n_cols)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.of(slice(None), columns) for columns in self.columns)

    def of(self, rows: slice, columns: slice = slice(None)) -> torch.Tensor:
        return self.weight[rows, columns].T.float().contiguous()


def _slices(count: int, size: int) -> list[slice]:
    """0 to `count`, cut so that slices of this size have about PIECE weights."""
    step = max(1, PIECE // size)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]
