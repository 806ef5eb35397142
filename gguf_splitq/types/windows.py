# SPDX-License-Identifier: MIT
"""sq4w, sq3w, sq2w: window codes. A weight's level is looked up by its own code and the bits of its neighbours.

Block of 32 weights: 64-bit words of codes, then the scale byte `d` of splitquant.py:

    sq4w  17 bytes  | q: two chains of 16 4-bit codes              | d |   4.25 bpw
    sq3w  13 bytes  | q: low 2 bits of 32 codes | qh: high bits    | d |   3.25 bpw
    sq2w   9 bytes  | q: a chain of 32 2-bit codes                 | d |   2.25 bpw

    weight = scale(d) * table[window], the window being 6 bits; ror turns a 64-bit word right:

    sq4w  column 16 h + 8 i + k:  byte k of ror(q[h], 4 i), low 6 bits
    sq2w  column 8 i + k:         byte k of ror(q, 2 i), low 6 bits
    sq3w  column 8 i + k:         byte k of ror(q, 2 i), low 4 bits; bits p, p + 1 of qh above them, p = 4 k + i

So of a window the lowest bits are the weight's own, the others belong to the codes that follow in the chain, which closes
on itself. The tables are read from patches/files/ggml/src/ggml-windows-tables.h, which the C side includes.

Source: a bit-shift trellis as in QTIP, arXiv 2406.11235; one so small that its table is one register, chains that close
within a block, the tables and the bytes are this project's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..resources import folder
from .base import TensorType
from .splitquant import MAX_ABS, SCALES, pack_2bit, unpack_2bit


@dataclass(frozen=True)
class Table:
    """One entry of ggml-windows-tables.h. rms: of the levels in use; levels: int8 [64]."""

    rms: float
    levels: np.ndarray


@cache
def tables() -> dict[str, Table]:
    """The tables by type name, read from the header that C includes."""
    text = (folder("patches") / "files/ggml/src/ggml-windows-tables.h").read_text()
    found = re.findall(r"^SPLITQ_WINDOWS\((\w+), ([\d.]+)f,([^)]*)\)", text, re.M)
    return {name: Table(float(rms), np.array(levels.split(","), np.int8)) for name, rms, levels in found}


@dataclass(frozen=True)
class Window(TensorType):
    """A type of the family; `code_bits` is 4, 3 or 2."""

    code_bits: int = 4

    @property
    def chain(self) -> np.ndarray:
        """int [n_chains, length]: the columns of a block in the order of their chain; each one's window reaches on to the next."""
        step = 2 if self.code_bits == 4 else 4
        return np.arange(32).reshape(-1, step, 8).transpose(0, 2, 1).reshape(-1, 8 * step)

    def windows(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes [n, 32] -> uint8 [n, 32]: each weight's index into the table."""
        out = np.empty_like(codes)
        for columns in self.chain:
            own, after, last = (codes[:, np.roll(columns, -i)] for i in range(3))
            if self.code_bits == 4:
                out[:, columns] = own | (after & 3) << 4
            elif self.code_bits == 3:
                out[:, columns] = own & 3 | (after & 3) << 2 | own >> 2 << 4 | after >> 2 << 5
            else:
                out[:, columns] = own | after << 2 | last << 4
        return out

    def codes(self, windows: np.ndarray) -> np.ndarray:
        """uint8 windows -> uint8: the weights' own codes, of any shape; the inverse of `windows`."""
        if self.code_bits == 3:
            return windows & 3 | windows >> 4 << 2 & 4
        return windows & (1 << self.code_bits) - 1

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        codes, scale = self.unpack(data)
        return SCALES[scale, None] * tables()[self.name].levels.astype(np.float32)[self.windows(codes)]

    def pack(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """uint8 codes [n, 32], by column, and scale bytes [n] -> uint8 [n, block_bytes]."""
        if self.code_bits == 4:
            halves = codes.reshape(-1, 2, 2, 8)
            parts = [(halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 16)]
        else:
            parts = [pack_2bit(codes)]
        if self.code_bits == 3:
            parts.append(np.packbits(codes[:, self.chain[0]] >> 2, axis=1, bitorder="little"))
        return np.concatenate([*parts, scale[:, None]], axis=1)

    def unpack(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, block_bytes] -> uint8 codes [n, 32], by column, and scale bytes [n]."""
        if self.code_bits == 4:
            q = data[:, :16].reshape(-1, 2, 1, 8)
            return np.concatenate([q & 15, q >> 4], 2).reshape(-1, 32), data[:, -1]
        codes = unpack_2bit(data[:, :8])
        if self.code_bits == 3:
            codes[:, self.chain[0]] |= np.unpackbits(data[:, 8:12], axis=1, bitorder="little") << 2
        return codes, data[:, -1]


_METHOD = "window codes"
TYPES = [
    Window("sq4w", 110, 110, 32, 17, _METHOD, "4 bits", MAX_ABS, code_bits=4),
    Window("sq3w", 111, 111, 32, 13, _METHOD, "3 bits", MAX_ABS, code_bits=3),
    Window("sq2w", 112, 112, 32, 9, _METHOD, "2 bits", MAX_ABS, code_bits=2),
]
