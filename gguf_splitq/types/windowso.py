# SPDX-License-Identifier: MIT
"""sq3wo, sq2wo: sq3wc and sq2wc with open chains. The scale byte keeps what follows the last code of the block's chain.

    weight[r, c] = scale[c] * scale(d[r, c / 32]) * table[window]

Blocks have as many bytes as those of windows.py; `d` has the sign in its highest bit, a number s below it, and the
state: what windows take from codes beyond the last, in the place of the first ones.

    sq3wo  d: | sign | s: 4 bits | state: 3 bits |   bit 0 is behind the last bit of qh, bits 1, 2 are behind that of q
    sq2wo  d: | sign | s: 3 bits | state: 4 bits |   the bits behind the last one of q

    scale(d) = SCALES[base + step * s], negative with the sign

Word 5 of the side tensor's header is `base`, word 6 is `step`, 1, 2 or 4: each matrix chooses them. See windowsc.py for
the rest.

Source: windows.py for the codes; that a trellis code of a block need not close where its state is stored is common.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ..runtime import native
from . import windows
from .columns import PLAIN, Side
from .splitquant import SCALES
from .windows import STEPS, Window
from .windowsc import METHOD, ROWS, WindowColumns

BASES = range(1, 128)
GRIDS = (1, 2, 4)  # steps there can be, in eighths of an octave
# Eighths of an octave: what a base loses that is further from a block's scale is the same, or never the least.
_FAR = 64
_SAMPLE = 64  # blocks that this is measured on


@dataclass(frozen=True)
class OpenWindow(Window):
    """The rows, in units of their columns' scales, with the block scales of one matrix. One chain: 3 or 2 bits."""

    base: int = 1
    step: int = 1

    @property
    def table(self) -> windows.Table:
        return windows.tables()[self.name[:-1]]

    @property
    def state_bits(self) -> int:
        """Of the scale byte, the lowest."""
        return 6 - self.code_bits

    @property
    def n_scales(self) -> int:
        return 1 << 7 - self.state_bits

    @property
    def scales(self) -> np.ndarray:
        """As Window's, the largest ones from n_scales on; none is 0."""
        number = np.minimum(np.arange(128), self.n_scales - 1)
        return SCALES[np.concatenate([number, number]) * self.step + self.base + 128 * (np.arange(256) > 127)]

    def encode(self, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        if lib := native.library():
            size = self.row_bytes(rows.shape[1])
            return native.encode_open(lib, self.gguf_id, rows, importance, size, self.base, self.step)
        return self.encode_numpy(rows, importance)

    def decode(self, data: np.ndarray) -> np.ndarray:
        if lib := native.library():
            n_cols = data.shape[1] // self.block_bytes * self.block_size
            return native.decode_open(lib, self.gguf_id, data, n_cols, self.base, self.step)
        return self.decode_numpy(data)

    def energy(self, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """float64 [128]: by the index of the scale that blocks ask for, the squares of their weights, by importance."""
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, 32)
        given = None if importance is None else np.broadcast_to(importance, rows.shape).reshape(-1, 32)
        w, _, ratio = self._ordered(blocks, given)
        squares = np.square(blocks, dtype=np.float64) * (1 if given is None else given)
        return np.bincount(self._nominal(w, ratio), squares.sum(1), 128)

    def over(self, energy: np.ndarray) -> OpenWindow:
        """The same with the block scales that lose least, by what `energy` found in all rows of a matrix."""
        kinds = [replace(self, base=base, step=step) for step in GRIDS for base in BASES]
        fit = [kind for kind in kinds if kind.base + kind.step * (kind.n_scales - 1) <= 127]
        far = np.arange(128)
        lost = [_lost(self)[kind.step][np.clip(kind.base - far, -_FAR, _FAR) + _FAR] @ energy for kind in fit]
        return fit[int(np.argmin(lost))]

    def _tried(self, nominal: np.ndarray) -> np.ndarray:
        nearest = (nominal - self.base) // self.step
        number = [np.clip(nearest + step, 0, self.n_scales - 1) for step in STEPS]
        return np.stack([self.base + self.step * s + mirror for s in number for mirror in (0, 128)])

    def _best(self, shared: np.ndarray, share: np.ndarray, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least = self._free(shared, share, tried).min(-1).sum(-1).astype(np.float32) * np.square(SCALES[tried])
        scale = np.take_along_axis(tried, least.argmin(0)[None], 0)[0]
        return scale, self._path(shared, share, scale, None)

    def _packed(self, w: np.ndarray, weight: np.ndarray, scale: np.ndarray, edges: np.ndarray) -> np.ndarray:
        found = np.empty(edges.shape, np.uint8)
        found[:, self.chain.ravel()] = self.edge_windows[edges]
        return self.pack_windows(found, ((scale & 127) - self.base) // self.step | scale & 128)

    def pack_windows(self, windows: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """As Window's; scale: indices of `scales`."""
        last = windows[:, -1]
        state = last >> 2 if self.code_bits == 2 else last >> 5 | (last >> 2 & 3) << 1
        d = scale & 128 | (scale & 127) << self.state_bits | state
        return self.pack(self.codes(windows), d.astype(np.uint8))

    def unpack_windows(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Window's, the scales as indices of `scales`."""
        codes, d = self.unpack(data)
        beyond = [d & 3, d >> 2 & 3] if self.code_bits == 2 else [d >> 1 & 3 | (d & 1) << 2, np.zeros_like(d)]
        follow = np.concatenate([codes[:, self.chain[0]], np.stack(beyond, 1)], 1)
        found = np.empty_like(codes)
        found[:, self.chain[0]] = self.window(follow[:, :-2], follow[:, 1:-1], follow[:, 2:])
        return found, d & 128 | (d & 127) >> self.state_bits

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        found, scale = self.unpack_windows(data)
        return self.scales[scale, None] * self.table.levels.astype(np.float32)[found]


@cache
def _lost(kind: OpenWindow) -> dict[int, np.ndarray]:
    """Step -> float64 [2 _FAR + 1]: the relative error of a Gaussian block, by how far the base is above its scale."""
    w = (np.random.default_rng(0).normal(size=(_SAMPLE, 32)) * kind.table.rms * SCALES[64]).astype(np.float32)
    far = np.arange(-_FAR, _FAR + 1)
    tried = kind._nominal(w, np.ones_like(w))[:, None] + far  # also where there are no scales
    scale = np.ldexp(8.0 + tried % 8, tried // 8 - 22)
    units = w[:, None] / np.stack([scale, -scale]).astype(np.float32)[..., None]
    cost = np.zeros((*units.shape[:3], kind.n_states), np.float32)
    for column in kind.chain[0, ::-1]:
        cost = kind._ways(cost, np.square(units[..., column, None] - kind.edges.astype(np.float32))).min(-2)
    error = (cost.min(-1) * scale**2).min(0) / np.square(w).sum(1)[:, None]
    reached = np.pad(error, [(0, 0), (0, GRIDS[-1] * kind.n_scales)], constant_values=np.inf)
    steps = {step: range(0, step * kind.n_scales, step) for step in GRIDS}
    return {s: np.min([reached[:, at : at + len(far)] for at in each], 0).mean(0) for s, each in steps.items()}


@dataclass(frozen=True)
class OpenColumns(WindowColumns):
    """A type of the family."""

    @property
    def stand_in(self) -> str:
        return f"sq{self.code_bits}w"

    @property
    def plain(self) -> OpenWindow:
        return OpenWindow(
            self.name, self.gguf_id, self.file_type, 32, self.block_bytes, self.method, self.purpose,
            code_bits=self.code_bits,
        )  # fmt: skip

    def rows_for(self, parts: Iterable[np.ndarray], importance: np.ndarray | None) -> OpenWindow:
        energy = sum((self.plain.energy(part, importance) for part in parts), np.zeros(128))
        return self.plain.over(energy)

    def rows_of(self, side: Side) -> OpenWindow:
        base, step = map(int, side.grid)
        return replace(self.plain, base=base, step=step)

    def has_grid(self, base: int, step: int) -> bool:
        return step in GRIDS and 1 <= base <= 127 - step * (self.plain.n_scales - 1)

    def side_of(self, n_rows: int, scale: np.ndarray, rows: Window) -> np.ndarray:
        assert isinstance(rows, OpenWindow)
        side = Side(np.arange(len(scale)), scale, grid=np.array([rows.base, rows.step]))
        return self.pack_side(np.empty((n_rows, len(scale)), np.uint8), side, PLAIN)


TYPES = [
    OpenColumns("sq3wo", 118, 118, 32, 13, METHOD, "the best of 3 bits", code_bits=3, wide_bits=3, least_rows=ROWS),
    OpenColumns("sq2wo", 119, 119, 32, 9, METHOD, "the best of 2 bits", code_bits=2, wide_bits=2, least_rows=ROWS),
]
