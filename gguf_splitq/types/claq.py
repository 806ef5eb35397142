# SPDX-License-Identifier: MIT
"""cq4, cq3, cq2: CLAQ, a codebook for every column, with wide columns and outliers.

All rows of the matrix share a column's codebook. Codes and what all side tensors have are drawn in columns.py; wide
columns have 4-bit codes. The side tensor's sections:

    header, order
    row      f16 [rows]
    scale    f16 [columns]
    levels   i8 [32 wide, 16], then i8 [the other columns, 2^bits], rising in a column
    extra
    start    u32 [rows + 1]    outliers of row r are start[r] .. start[r + 1] - 1, only if there are, as
             what follows
    column   u16 [outliers]    stored column, rising in a row
    value    f16 [outliers]    added to the weight

    weight[r, order[i]] = row[r] * scale[i] * level[i, code[r, i]] (+ value)

Source: CLAQ, arXiv 2405.17233 (a codebook per column, adaptive precision, reserved outliers); integer levels, the scale
of a row and the bytes are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .columns import ColumnType, Layout, Require, Side


@dataclass(frozen=True)
class Claq(ColumnType):
    """A type of the family. wide_share: of what cq2.x and cq3.x have beyond cq2 and cq3; outliers take the rest."""

    wide_share: float = 0.75

    def within(self, n_rows: int, n_cols: int, room: int, layout: Layout) -> Layout:
        least = self.matrix_bytes(n_rows, n_cols, layout)
        wide = super().within(n_rows, n_cols, least + int(self.wide_share * (room - least)), layout)
        return self.largest(lambda count: replace(wide, outliers=count), n_rows * n_cols // 8, n_rows, n_cols, room)

    def sections(self, n_rows: int, n_cols: int, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
        wide, outliers = 32 * layout.wide, layout.outliers
        return {
            "header": self.section("header", n_rows, n_cols, layout),
            "order": self.section("order", n_rows, n_cols, layout),
            "row": ("<f2", (n_rows,)),
            "scale": self.section("scale", n_rows, n_cols, layout),
            "levels": ("i1", (16 * wide + (n_cols - wide << self.code_bits),)),
            "extra": self.section("extra", n_rows, n_cols, layout),
            "start": ("<u4", (n_rows + 1 if outliers else 0,)),
            "column": ("<u2", (outliers,)),
            "value": ("<f2", (outliers,)),
        }

    def contents(self, side: Side, layout: Layout) -> dict[str, np.ndarray]:
        wide = 32 * layout.wide
        levels = [side.levels[:wide].ravel(), side.levels[wide:, : 1 << self.code_bits].ravel()]
        return super().contents(side, layout) | {"levels": np.concatenate(levels)}

    def checked(self, found: Mapping[str, np.ndarray], layout: Layout, require: Require) -> Side:
        finite = all(np.isfinite(found[name]).all() for name in ("row", "scale", "value"))
        require(finite, "a scale or an outlier is not finite")
        n_cols, wide, packed, start = len(found["order"]), 32 * layout.wide, found["levels"], found["start"]
        if layout.outliers:
            rising = start[0] == 0 and start[-1] == layout.outliers and (np.diff(start.astype(np.int64)) >= 0).all()
            require(bool(rising), "the starts of its outliers do not rise to their number")
            require(found["column"].max() < n_cols, "an outlier lies in a column that is not there")
        levels = np.zeros((n_cols, 16), np.int8)
        levels[:wide] = packed[: 16 * wide].reshape(-1, 16)
        levels[wide:, : 1 << self.code_bits] = packed[16 * wide :].reshape(n_cols - wide, -1)
        return super().checked({**found, "levels": levels}, layout, require)

    def decode_rows(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        codes, rows = self.codes_of(data, side, first), slice(first, first + len(data))
        table = side.scale.astype(np.float32)[:, None] * side.levels
        stored = table[np.arange(len(table)), codes] * side.row[rows].astype(np.float32)[:, None]
        if len(side.start):
            begin, end = int(side.start[first]), int(side.start[first + len(data)])
            counts = np.diff(side.start[first : first + len(data) + 1].astype(np.int64))
            row = np.repeat(np.arange(len(data)), counts.astype(np.int64))
            np.add.at(stored, (row, side.column[begin:end]), side.value[begin:end].astype(np.float32))
        out = np.empty_like(stored)
        out[:, side.order] = stored
        return out


_METHOD = "CLAQ, a codebook per column"
TYPES = [
    Claq("cq4", 105, 105, 32, 16, _METHOD, "models with outlier channels", code_bits=4),
    Claq("cq3", 106, 106, 32, 12, _METHOD, "the same in 3 bits; cq3.1 to cq3.9 are larger", code_bits=3),
    Claq("cq2", 107, 107, 32, 8, _METHOD, "the same in 2 bits; cq2.1 to cq2.9 are larger", code_bits=2),
]
