# SPDX-License-Identifier: MIT
"""sq4, sq3, sq2: SplitQuantV2's three linear ranges sharing one short code.

Block of 32 weights (32-bit words of codes, then one scale byte `d`):

    sq4  17 bytes  | qs: 16 bytes of 4-bit codes             | d |   4.25 bpw
    sq3  13 bytes  | qs: 8 bytes, low 2 bits | qh: 4 bytes   | d |   3.25 bpw
    sq2   9 bytes  | qs: 8 bytes of 2-bit codes              | d |   2.25 bpw

    4-bit: byte j = code j | code j+16 << 4
    2-bit: byte j = code j | code j+8 << 2 | code j+16 << 4 | code j+24 << 6
    qh:    bit i of byte i/8 = high bit of code i
    d:     sign, 4 exponent bits, 3 mantissa bits; the sign mirrors the codebook

    weight = scale(d) * level[code]

Levels and the width of the scale search are read from patches/files/ggml/src/ggml-splitq-levels.h, which the C
side includes. Each float32 operation below is done in the same order by ggml-splitq.c: the bytes are equal.

Source: SplitQuantV2, arXiv 2503.07657 (the split); the shared code and the 8-bit scale are this project's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..resources import folder
from .base import TensorType

_ULP = np.float32(2.0**-21)  # unit in the last place of a subnormal scale
_MANTISSA = np.arange(128) % 8 + 8 * (np.arange(128) >= 8)
_POSITIVE = (_MANTISSA * 2.0 ** (np.maximum(np.arange(128) // 8, 1) - 1) * float(_ULP)).astype(np.float32)
SCALES = np.concatenate([_POSITIVE, -_POSITIVE])
"""float32 [256]: the value of each scale byte."""

MAX_ABS = float(127 * SCALES[127])


@dataclass(frozen=True)
class Codebook:
    """One line of ggml-splitq-levels.h: int levels in rising order, and the scale steps tried each way."""

    steps_down: int
    steps_up: int
    levels: tuple[int, ...]

    @property
    def middles(self) -> np.ndarray:
        """float32 [n_levels - 1]: halfway between neighbours; a scaled weight above middle i has a code above i."""
        levels = np.array(self.levels, np.float32)
        return (levels[:-1] + levels[1:]) * np.float32(0.5)


@cache
def codebooks() -> dict[str, Codebook]:
    """The codebooks by type name, read from the header that C includes."""
    text = (folder("patches") / "files/ggml/src/ggml-splitq-levels.h").read_text()
    lines = re.findall(r"^SPLITQ_LEVELS\((\w+), (\d+), (\d+), (.*)\)$", text, re.M)
    return {
        name: Codebook(int(down), int(up), tuple(int(n) for n in re.findall(r"-?\d+", ranges)))
        for name, down, up, ranges in lines
    }


def tree_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the last axis (a power of two), halves added to halves, as C's `tree_sum`."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def pack_4bit(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 32] -> uint8 [..., 16]."""
    return codes[..., :16] | codes[..., 16:] << 4


def pack_2bit(codes: np.ndarray) -> np.ndarray:
    """Low two bits of uint8 [..., 32] -> uint8 [..., 8]."""
    low = codes & 3
    return low[..., :8] | low[..., 8:16] << 2 | low[..., 16:24] << 4 | low[..., 24:] << 6


def unpack_4bit(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., 16] -> uint8 [..., 32]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def unpack_2bit(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., 8] -> uint8 [..., 32]."""
    return np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)


def scale_below(y: np.ndarray) -> np.ndarray:
    """int [n]: index of the largest positive scale not above y (float32, >= 0)."""
    subnormal = (np.minimum(y, 8 * _ULP) * (1 / _ULP)).astype(np.int32)
    normal = (y.view(np.uint32) >> 20).astype(np.int32) - ((127 - 18) << 3) + 8  # 2**-18 has index 8
    return np.where(y < 8 * _ULP, subnormal, np.minimum(normal, 127))


@dataclass(frozen=True)
class SplitQuant(TensorType):
    """A type of the family; `code_bits` is 4, 3 or 2."""

    code_bits: int = 4

    def encode_blocks(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        w = np.clip(blocks, np.float32(-MAX_ABS), np.float32(MAX_ABS)) + np.float32(0)
        weight = np.ones((1, 32), np.float32) if importance is None else importance
        weight = np.where((weight > 0).any(1, keepdims=True), weight, np.float32(1))

        book = codebooks()[self.name]
        levels, lookup = np.array(book.levels, np.float32), self._lookup()
        base = scale_below(np.abs(w).max(1) / np.float32(127))
        best = np.zeros(len(w), np.uint8)
        least = tree_sum(weight * w * w)
        for step in range(-book.steps_down, book.steps_up + 1):
            for mirror in (0, 128):
                d = np.clip(base + step, 1, 127) + mirror
                error = w - SCALES[d, None] * levels[self._codes(w, d, lookup)]
                error = tree_sum(weight * error * error)
                better = error < least
                least[better] = error[better]
                best[better] = d[better]

        codes = self._codes(w, np.maximum(best, 1), lookup)
        codes[best == 0] = 0
        return self.pack(codes, best)

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        codes, scale = self.unpack(data)
        return SCALES[scale, None] * np.array(codebooks()[self.name].levels, np.float32)[codes]

    def _codes(self, w: np.ndarray, d: np.ndarray, lookup: np.ndarray) -> np.ndarray:
        """uint8 [n, 32]: nearest level's index for weights [n, 32] at scale bytes [n].

        Middles are multiples of one half, so `2 * scaled > 2 * middle` is decided by the ceiling of the left side.
        """
        doubled = np.ceil(w * (np.float32(1) / SCALES[d])[:, None] * np.float32(2))
        return lookup[np.clip(doubled, -256, 255).astype(np.int16) + 256]

    def _lookup(self) -> np.ndarray:
        doubled = np.arange(-256, 256)
        return (doubled[:, None] > 2 * codebooks()[self.name].middles).sum(1).astype(np.uint8)

    def pack(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """uint8 codes [n, 32] and scale bytes [n] -> uint8 [n, block_bytes]."""
        parts = [pack_4bit(codes) if self.code_bits == 4 else pack_2bit(codes)]
        if self.code_bits == 3:
            parts.append(np.packbits(codes >> 2, axis=1, bitorder="little"))
        return np.concatenate([*parts, scale[:, None]], axis=1)

    def unpack(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, block_bytes] -> uint8 codes [n, 32] and scale bytes [n]."""
        codes = unpack_4bit(data[:, :16]) if self.code_bits == 4 else unpack_2bit(data[:, :8])
        if self.code_bits == 3:
            codes |= np.unpackbits(data[:, 8:12], axis=1, bitorder="little") << 2
        return codes, data[:, -1]


_METHOD = "SplitQuantV2, one code"
TYPES = [
    SplitQuant("sq4", 100, 100, 32, 17, _METHOD, "everyday 4 bits", MAX_ABS, code_bits=4),
    SplitQuant("sq3", 101, 101, 32, 13, _METHOD, "3 bits where memory is short", MAX_ABS, code_bits=3),
    SplitQuant("sq2", 102, 102, 32, 9, _METHOD, "the smallest, for large models", MAX_ABS, code_bits=2),
]
