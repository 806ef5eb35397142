# SPDX-License-Identifier: MIT
"""sq2c, sq3c: the blocks of sq2 and sq3 with a scale for every column, and columns of one bit more.

Block of 32 stored columns of one row (the codes are laid out as columns.py draws them, `d` is splitquant.py's):

    sq3c  13 bytes  | 2 words: low 2 bits of the codes | 1 word: high bits | d |
    sq2c   9 bytes  | 2 words: 2-bit codes                                 | d |

The side tensor has the sections that all types have: header (outliers 0), order, scale, extra (1 word). The codes of
the first `wide` blocks have one bit more, which is in `extra`.

    weight[r, order[i]] = scale[i] * scale(d[r, i / 32]) * level[code]

Levels are those of the sq type that has as many bits as the code: sq2's or sq3's, in wide blocks sq3's or sq4's.

Source: SplitQuantV2, arXiv 2503.07657 (the split), CLAQ, arXiv 2405.17233 (more bits for sensitive columns); scales of
columns, one bit more instead of CLAQ's two and the bytes are this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from . import splitquant
from .columns import ColumnType, Layout, Require, Side


@dataclass(frozen=True)
class ScaledColumns(ColumnType):
    """A type of the family."""

    @property
    def plain(self) -> splitquant.SplitQuant:
        """The sq type of the codes that are not wide."""
        return _of_bits(self.code_bits)

    @property
    def widened(self) -> splitquant.SplitQuant:
        """The sq type of those that are."""
        return _of_bits(self.wide_bits)

    def sections(self, n_rows: int, n_cols: int, layout: Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: self.section(name, n_rows, n_cols, layout) for name in ("header", "order", "scale", "extra")}

    def checked(self, found: Mapping[str, np.ndarray], layout: Layout, require: Require) -> Side:
        require(not layout.outliers, f"it has {layout.outliers} outliers, which this type cannot have")
        return super().checked(found, layout, require)

    def decode_rows(self, data: np.ndarray, side: Side, first: int) -> np.ndarray:
        codes = self.codes_of(data, side, first)
        d = data.reshape(len(data), -1, self.block_bytes)[..., -1]
        stored = np.empty(codes.shape, np.float32)
        for columns, kind in self._parts(side.wide):
            stored[:, columns] = np.array(splitquant.codebooks()[kind.name].levels, np.float32)[codes[:, columns]]
        stored.reshape(*d.shape, 32)[...] *= splitquant.SCALES[d][..., None]
        stored *= side.scale.astype(np.float32)
        out = np.empty_like(stored)
        out[:, side.order] = stored
        return out

    def nearest(self, rows: np.ndarray, importance: np.ndarray | None, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Each block for itself, by the sq types' encoders.

        rows: float32 [n_rows, n_cols], divided by the columns' scales and in stored order. importance: float32
        [n_cols], of the squared errors of these. Returns codes uint8 [n_rows, n_cols], d uint8 [n_rows, n_cols / 32].
        """
        codes, d = [], []
        for columns, kind in self._parts(32 * layout.wide):
            if (part := np.ascontiguousarray(rows[:, columns])).size:
                weights = None if importance is None else np.ascontiguousarray(importance[columns])
                found = kind.unpack(kind.encode(part, weights).reshape(-1, kind.block_bytes))
                codes.append(found[0].reshape(part.shape))
                d.append(found[1].reshape(len(part), -1))
        return np.concatenate(codes, 1), np.concatenate(d, 1)

    def _parts(self, wide: int) -> list[tuple[slice, splitquant.SplitQuant]]:
        """Wide columns and the others, with the sq types whose levels they have."""
        return [(slice(wide), self.widened), (slice(wide, None), self.plain)]


def _of_bits(bits: int) -> splitquant.SplitQuant:
    return next(kind for kind in splitquant.TYPES if kind.code_bits == bits)


_METHOD = "SplitQuantV2, a scale per column"
_ROWS = 32
TYPES = [
    ScaledColumns("sq3c", 109, 109, 32, 13, _METHOD, "outlier channels in 3 bits; sq3.3 to sq3.9 are larger",
                  code_bits=3, wide_bits=4, least_rows=_ROWS),
    ScaledColumns("sq2c", 108, 108, 32, 9, _METHOD, "the same in 2 bits; sq2.3 to sq2.9 are larger",
                  code_bits=2, wide_bits=3, least_rows=_ROWS),
]  # fmt: skip
