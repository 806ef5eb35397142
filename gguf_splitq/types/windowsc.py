# SPDX-License-Identifier: MIT
"""sq4wc, sq3wc, sq2wc: the blocks of sq4w, sq3w and sq2w with a scale for every column.

    weight[r, c] = scale[c] * scale(d[r, c / 32]) * table[window]

Rows are stored as windows.py draws them. The side tensor has a header (wide and outliers 0) and scales, see columns.py.

Source: windows.py for the codes; scales of columns as in sqc.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from . import windows
from .columns import PLAIN, ColumnType, Layout, Require, Side


@dataclass(frozen=True)
class WindowColumns(ColumnType):
    """A type of the family. Columns keep their order, and all have as many bits."""

    @property
    def plain(self) -> windows.Window:
        """The type of the rows without scales of columns."""
        return next(kind for kind in windows.TYPES if kind.code_bits == self.code_bits)

    @property
    def stand_in(self) -> str:
        return self.plain.name

    def sections(self, n_rows: int, n_cols: int, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: self.section(name, n_rows, n_cols, layout) for name in ("header", "order", "scale", "extra")}

    def checked(self, found: Mapping[str, np.ndarray], layout: Layout, require: Require) -> Side:
        require(not layout.outliers, f"it has {layout.outliers} outliers, which this type cannot have")
        return super().checked(found, layout, require)

    def rows_for(self, parts: Iterable[np.ndarray], importance: np.ndarray | None) -> windows.Window:
        """The type of the rows of a matrix, float32 [some rows, n_cols] at a time, divided by the scales of columns.

        importance: float32 [n_cols] or None.
        """
        return self.plain

    def rows_of(self, side: Side) -> windows.Window:
        """The type of the rows of the matrix with this side tensor."""
        return self.plain

    def decode_rows(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        return self.rows_of(side).decode(data) * side.scale.astype(np.float32)

    def side_of(self, n_rows: int, scale: np.ndarray, rows: windows.Window) -> np.ndarray:
        """The side tensor, uint8 [side_bytes], of a matrix with these scales float16 [n_cols] and rows of this type."""
        order = np.arange(len(scale))
        return self.pack_side(np.empty((n_rows, len(scale)), np.uint8), Side(order, scale), PLAIN)


METHOD = "window codes, a scale per column"
ROWS = 32
TYPES = [
    WindowColumns("sq4wc", 113, 113, 32, 17, METHOD, "outlier channels in 4 bits",
                  code_bits=4, wide_bits=4, least_rows=ROWS),
    WindowColumns("sq3wc", 114, 114, 32, 13, METHOD, "the same in 3 bits",
                  code_bits=3, wide_bits=3, least_rows=ROWS),
    WindowColumns("sq2wc", 115, 115, 32, 9, METHOD, "the same in 2 bits",
                  code_bits=2, wide_bits=2, least_rows=ROWS),
]  # fmt: skip
