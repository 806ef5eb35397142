# SPDX-License-Identifier: MIT
"""sq6w, sq5w, sq4w, sq3w, sq2w: window codes. A weight's level is looked up by its own code and bits of its neighbours.

Block of 32 weights: 64-bit words of codes, then the scale byte `d` of splitquant.py:

    sq6w  25 bytes  | q: low 4 bits of two chains of 16 codes | qh: two high bits | d |   6.25 bpw
    sq5w  21 bytes  | q: low 4 bits of two chains of 16 codes | qh: high bits     | d |   5.25 bpw
    sq4w  17 bytes  | q: two chains of 16 4-bit codes              | d |   4.25 bpw
    sq3w  13 bytes  | q: low 2 bits of 32 codes | qh: high bits    | d |   3.25 bpw
    sq2w   9 bytes  | q: a chain of 32 2-bit codes                 | d |   2.25 bpw

    weight = scale(d) * table[window], the window being 6 bits, of sq5w and sq6w 7; ror turns a 64-bit word right:

    sq6w  column 16 h + 8 i + k:  byte k of ror(q[h], 4 i), low 4 bits; above them byte k of ror(qh, 4 h + 2 i), low
                                  2 bits; above them bit 4 of the first byte
    sq5w  column 16 h + 8 i + k:  byte k of ror(q[h], 4 i), low 4 bits; above them bit 4 k + 2 h + i of qh; above that
                                  bits 5 and 4 of the byte
    sq4w  column 16 h + 8 i + k:  byte k of ror(q[h], 4 i), low 6 bits
    sq2w  column 8 i + k:         byte k of ror(q, 2 i), low 6 bits
    sq3w  column 8 i + k:         byte k of ror(q, 2 i), low 4 bits; bits p, p + 1 of qh above them, p = 4 k + i

So of a window some bits are the weight's own, the others belong to the codes that follow in the chain, which closes on
itself. With 7 bits the highest is a sign: entry 64 + i is -1 - entry i ^ 1. The tables are read from
patches/files/ggml/src/ggml-windows-tables.h, which the C side includes.

Source: a bit-shift trellis as in QTIP, arXiv 2406.11235; one so small that its table is one register, chains that close
within a block, the tables and the bytes are this project's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ..resources import folder
from .base import TensorType
from .splitquant import MAX_ABS, SCALES, pack_2bit, scale_below, tree_sum, unpack_2bit

# Constants of the encoder, explained in ggml-windows.c, which has the same.
STEPS = range(-3, 3)
_KEPT = {6: 3, 5: 5, 4: 4, 3: 3, 2: 6}
_SPREAD = np.float32(1.25)
_REACH = np.float32(255)
_SLOPE = np.float32(32500)
_LEAST = np.float32(32)
_NEVER = 1 << 30
_BY_BIT = np.arange(32).reshape(4, 8).T.ravel()  # the column that each bit of qh belongs to

LARGEST = float(64 * SCALES[127])
"""No block whose weights are this large or smaller asks for a much larger scale than there is."""


@dataclass(frozen=True)
class Table:
    """One entry of ggml-windows-tables.h. rms: of the levels in use; levels: int8 [64], of sq5w and sq6w [128]."""

    rms: float
    levels: np.ndarray


@cache
def tables() -> dict[str, Table]:
    """The tables by type name, read from the header that C includes."""
    text = (folder("patches") / "files/ggml/src/ggml-windows-tables.h").read_text()
    found = re.findall(r"^SPLITQ_WINDOWS\((\w+), (\d), ([\d.]+)f,([^)]*)\)", text, re.M)
    halves = {name: (int(bits), float(rms), np.array(levels.split(","), np.int8)) for name, bits, rms, levels in found}
    return {
        name: Table(rms, half if bits <= 4 else np.concatenate([half, -1 - half[np.arange(64) ^ 1]]))
        for name, (bits, rms, half) in halves.items()
    }


@dataclass(frozen=True)
class Window(TensorType):
    """A type of the family; `code_bits` is 6 to 2."""

    code_bits: int = 4

    @property
    def table(self) -> Table:
        """Its entry of the tables."""
        return tables()[self.name]

    @property
    def scales(self) -> np.ndarray:
        """float32 [256]: positive scales first, negative ones from 128 on."""
        return SCALES

    @property
    def n_scales(self) -> int:
        """Positive scales there are, 0 among them."""
        return 128

    @property
    def n_edges(self) -> int:
        """Windows there are."""
        return 128 if self.code_bits > 4 else 64

    @property
    def n_states(self) -> int:
        """States of the trellis: what the upper bits of a window can be."""
        return self.n_edges >> self.code_bits

    @cached_property
    def edge_windows(self) -> np.ndarray:
        """uint8 [n_edges], indices into the table. Edge e = s << code_bits | c: code c, the codes that follow in the
        chain being s; it leads to state e % n_states."""
        codes = np.arange(self.n_edges) >> self.code_bits * np.arange(3)[:, None] & (1 << self.code_bits) - 1
        return self.window(*codes.astype(np.uint8))

    @cached_property
    def edges(self) -> np.ndarray:
        """int32 [n_edges], levels."""
        return self.table.levels[self.edge_windows].astype(np.int32)

    @property
    def chain(self) -> np.ndarray:
        """int [n_chains, length]: the columns in the order of their chain; a window reaches on to the next ones."""
        step = 2 if self.code_bits >= 4 else 4
        return np.arange(32).reshape(-1, step, 8).transpose(0, 2, 1).reshape(-1, 8 * step)

    def windows(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes [n, 32] -> uint8 [n, 32]: each weight's index into the table."""
        out = np.empty_like(codes)
        for columns in self.chain:
            out[:, columns] = self.window(*(codes[:, np.roll(columns, -i)] for i in range(3)))
        return out

    def window(self, own: np.ndarray, after: np.ndarray, last: np.ndarray) -> np.ndarray:
        """uint8: the window of codes `own`, given the codes that follow each of them and those behind these."""
        if self.code_bits == 6:
            return own | (after & 1) << 6
        if self.code_bits == 5:
            return own | (after & 2) << 4 | (after & 1) << 6
        if self.code_bits == 4:
            return own | (after & 3) << 4
        if self.code_bits == 3:
            return own & 3 | (after & 3) << 2 | own >> 2 << 4 | after >> 2 << 5
        return own | after << 2 | last << 4

    def codes(self, windows: np.ndarray) -> np.ndarray:
        """uint8 windows -> uint8: the weights' own codes, of any shape; the inverse of `windows`."""
        if self.code_bits == 3:
            return windows & 3 | windows >> 4 << 2 & 4
        return windows & (1 << self.code_bits) - 1

    def encode_blocks(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        w, weight, ratio = self._ordered(blocks, importance)
        tried = self._tried(self._nominal(w, ratio))
        reach = (SCALES[tried[0]] * _REACH)[:, None]
        shared = np.clip(w, -reach, reach)
        most = (ratio * np.abs(shared)).max(1) / SCALES[tried[0]]
        share = np.maximum(np.rint(ratio * (_SLOPE / np.maximum(most, _LEAST))[:, None]), np.float32(1))
        shared = share * shared
        scale, edges = self._best(shared, share, tried)
        return self._packed(w, weight, scale, edges)

    def _ordered(self, blocks: np.ndarray, importance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 [n, 32], by chain: weights within reach, their importance, and that over the block's largest."""
        order = self.chain.ravel()
        w = (np.clip(blocks, np.float32(-MAX_ABS), np.float32(MAX_ABS)) + np.float32(0))[:, order]
        weight = np.ones(w.shape, np.float32) if importance is None else importance[:, order]
        weight = np.where((weight > 0).any(1, keepdims=True), weight, np.float32(1))
        return w, weight, weight / weight.max(1, keepdims=True)

    def _nominal(self, w: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        """int [n]: the index of the scale that a block's fourth moment asks for."""
        power = tree_sum(ratio * ((w * w) * (w * w))) / tree_sum(ratio)
        return scale_below(np.sqrt(np.sqrt(power)) / (_SPREAD * np.float32(self.table.rms)))

    def _tried(self, nominal: np.ndarray) -> np.ndarray:
        """int [n_tried, n]: the scale bytes that are tried, from the smallest step up."""
        return np.stack([np.clip(nominal + step, 1, 127) + mirror for step in STEPS for mirror in (0, 128)])

    def _best(self, shared: np.ndarray, share: np.ndarray, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale byte [n] and the edges [n, 32], by chain, of least error."""
        scale, ends = self._search(shared, share, tried)
        return scale, self._path(shared, share, scale, ends)

    def _packed(self, w: np.ndarray, weight: np.ndarray, scale: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """uint8 [n, block_bytes]; zeros where these are no worse."""
        error = w - SCALES[scale, None] * self.edges.astype(np.float32)[edges]
        worth = tree_sum(weight * error * error) < tree_sum(weight * w * w)
        codes = np.empty(edges.shape, np.uint8)
        codes[:, self.chain.ravel()] = np.where(worth[:, None], edges & (1 << self.code_bits) - 1, 0)
        return self.pack(codes, np.where(worth, scale, 0).astype(np.uint8))

    def _metrics(
        self, shared: np.ndarray, share: np.ndarray, scale: np.ndarray, backwards: bool = False
    ) -> Iterator[np.ndarray]:
        """int32 [n, n_chains, n_edges] for each weight of the chains: what each edge adds to the error, less what
        level 0 would, in units of the scale squared and of the importance that has a share of 1.
        """
        slope = np.rint(shared * (np.float32(-1) / SCALES[scale])[:, None]).astype(np.int32)
        slope, share = (part.astype(np.int32).reshape(-1, *self.chain.shape, 1) for part in (slope, share))
        for i in range(self.chain.shape[1])[:: -1 if backwards else 1]:
            yield slope[:, :, i] * (2 * self.edges) + share[:, :, i] * self.edges**2

    def _ways(self, cost: np.ndarray, metric: np.ndarray) -> np.ndarray:
        """Costs of states [..., n_states], metric [..., n_edges] -> costs of all ways to them [..., ways, n_states]."""
        ways = np.repeat(cost, 1 << self.code_bits, axis=-1) + metric
        return ways.reshape(*cost.shape[:-1], -1, self.n_states)

    def _free(self, shared: np.ndarray, share: np.ndarray, tried: np.ndarray) -> np.ndarray:
        """int32 [n_tried, n, n_chains, n_states]: least costs of chains that end in each state and begin in any."""
        last = np.zeros((*tried.shape, len(self.chain), self.n_states), np.int32)
        for i, scale in enumerate(tried):
            for metric in self._metrics(shared, share, scale, backwards=True):
                last[i] = self._ways(last[i], metric).min(-2)
        return last

    def _search(self, shared: np.ndarray, share: np.ndarray, tried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of scale bytes [n_tried, n] the best [n], and the states [n, n_chains] that its chains begin and end in."""
        last = self._free(shared, share, tried)
        free = last.min(-1).sum(-1)
        order = np.argsort(free.astype(np.float32) * np.square(SCALES[tried]), axis=0, kind="stable")

        block, least = np.arange(len(share)), np.full(len(share), np.inf, np.float32)
        best, ends = np.zeros(len(share), tried.dtype), np.zeros((len(share), len(self.chain)), np.int64)
        for kept in order[: _KEPT[self.code_bits]]:
            scale, first = tried[kept, block], np.zeros_like(last[0])
            for metric in self._metrics(shared, share, scale):
                ways = np.tile(first, 1 << self.code_bits) + metric
                first = ways.reshape(*first.shape, -1).min(-1)
            closed = last[kept, block] + first
            error = (closed.min(-1).sum(-1) - free[kept, block]).astype(np.float32) * np.square(SCALES[scale])
            better = error < least
            least[better], best[better], ends[better] = error[better], scale[better], closed.argmin(-1)[better]
        return best, ends

    def _path(self, shared: np.ndarray, share: np.ndarray, scale: np.ndarray, ends: np.ndarray | None) -> np.ndarray:
        """int [n, 32], by chain: the edges of the least path that begins and ends in the states [n, n_chains].

        ends: None where it may begin and end in any.
        """
        cost = np.zeros((len(share), len(self.chain), self.n_states), np.int32)
        if ends is not None:
            cost[np.arange(self.n_states) != ends[..., None]] = _NEVER
        taken = []
        for metric in self._metrics(shared, share, scale, backwards=True):
            ways = self._ways(cost, metric)
            taken.append(ways.argmin(-2))
            cost = ways.min(-2)
        state = cost.argmin(-1) if ends is None else ends
        edges = np.empty((len(share), *self.chain.shape), np.int64)
        for i, way in enumerate(taken[::-1]):
            edges[..., i] = np.take_along_axis(way, state[..., None], -1)[..., 0] * self.n_states + state
            state = edges[..., i] >> self.code_bits
        return edges.reshape(-1, 32)

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        windows, scale = self.unpack_windows(data)
        return SCALES[scale, None] * self.table.levels.astype(np.float32)[windows]

    def pack_windows(self, windows: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """uint8 indices into the table [n, 32], by column, and scale bytes [n] -> uint8 [n, block_bytes]."""
        return self.pack(self.codes(windows), scale)

    def unpack_windows(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, block_bytes] -> uint8 indices into the table [n, 32], by column, and scale bytes [n]."""
        codes, scale = self.unpack(data)
        return self.windows(codes), scale

    def pack(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """uint8 codes [n, 32], by column, and scale bytes [n] -> uint8 [n, block_bytes]."""
        if self.code_bits >= 4:
            halves = codes.reshape(-1, 2, 2, 8) & 15
            parts: list[np.ndarray] = [(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 16)]
        else:
            parts = [pack_2bit(codes)]
        if self.code_bits == 6:
            parts.append(pack_2bit(codes >> 4))
        elif self.code_bits in (5, 3):
            parts.append(np.packbits(codes[:, _BY_BIT] >> self.code_bits - 1, axis=1, bitorder="little"))
        return np.concatenate([*parts, scale[:, None]], axis=1)

    def unpack(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, block_bytes] -> uint8 codes [n, 32], by column, and scale bytes [n]."""
        if self.code_bits >= 4:
            q = data[:, :16].reshape(-1, 2, 1, 8)
            codes, high = np.concatenate([q & 15, q >> 4], 2).reshape(-1, 32), data[:, 16:-1]
        else:
            codes, high = unpack_2bit(data[:, :8]), data[:, 8:-1]
        if self.code_bits == 6:
            codes |= unpack_2bit(high) << 4
        elif self.code_bits in (5, 3):
            codes[:, _BY_BIT] |= np.unpackbits(high, axis=1, bitorder="little") << self.code_bits - 1
        return codes, data[:, -1]


_METHOD = "window codes"
TYPES = [
    Window("sq6w", 117, 117, 32, 25, _METHOD, "6 bits, for embeddings and output", LARGEST, code_bits=6),
    Window("sq5w", 116, 116, 32, 21, _METHOD, "5 bits", LARGEST, code_bits=5),
    Window("sq4w", 110, 110, 32, 17, _METHOD, "4 bits", LARGEST, code_bits=4),
    Window("sq3w", 111, 111, 32, 13, _METHOD, "3 bits", LARGEST, code_bits=3),
    Window("sq2w", 112, 112, 32, 9, _METHOD, "2 bits", LARGEST, code_bits=2),
]
