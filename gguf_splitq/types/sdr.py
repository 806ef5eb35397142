# SPDX-License-Identifier: MIT
"""sdr4: significant data razoring, a 4-bit integer and a shift, with a step of its own for every 32 weights.

Block of 32 weights, two groups of 16, 17 bytes, 4.25 bpw:

    | qs: 16 bytes of 4-bit codes | d |

    qs: byte j = code j | code j+16 << 4, two's complement, -8 .. 7
    d:  0 .. 84 step d | 85 .. 169 minus step d-85 | 170 .. 212, 213 .. 255: coarse step, one group shifted by 1

    weight = step(d) * (code << shift of the group)

The published code (int8 base with one scale per row, a shift of 0 to 4 per group of 16) needs a row header, which block
formats do not have. Here the block carries the exponent that the two shifts have in common, two bits of the scale's
significand and its sign, and a group's shift is what is left: 0 or 1 (docs/format.md has the numbers).
Each float32 operation below is done in the same order by patches/files/ggml/src/ggml-sdr.c: the bytes are equal.

Source: QRazor, arXiv 2501.13331 (signed 4-bit integers, one shift per group); the byte d is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import TensorType
from .splitquant import tree_sum

GROUP = 16
FINE, COARSE = 85, 43  # steps with 4 and with 2 values per octave, 21 octaves and the next power of two
SHIFT_1ST = 2 * FINE + COARSE
"""From this byte on the first group is shifted, from 2 * FINE up to it the second."""

_LEAST_EXPONENT = -15  # the smallest step is 2**-15
_fine = 2.0 ** (np.arange(FINE) // 4 + _LEAST_EXPONENT) * (1 + np.arange(FINE) % 4 / 4)
STEPS = np.concatenate([_fine, -_fine, _fine[::2], _fine[::2]]).astype(np.float32)
"""float32 [256]: the step of each byte d."""

MAX_ABS = 7 * float(_fine[-1])

# Steps tried of each kind, from the largest one of which the largest |weight| is at least 8 units. Trying all
# 256 values of d instead lowers the error on Gaussian weights by less than 0.01 dB.
_TRIED = 3


# What the error along a block counts in addition in a cache, where scores and averages of values add up what lies along
# their blocks and average out the rest.
_ALONG = np.float32(4)


def shifts(d: np.ndarray) -> np.ndarray:
    """uint8 [...] -> uint8 [..., 2]: the shift of each group."""
    first = d >= SHIFT_1ST
    return np.stack([first, (d >= 2 * FINE) & ~first], axis=-1).astype(np.uint8)


def group_steps(d: np.ndarray) -> np.ndarray:
    """uint8 [...] -> float32 [..., 2]: what one unit of a code stands for in each group."""
    return STEPS[d][..., None] * (1 << shifts(d)).astype(np.float32)


def unpack(data: np.ndarray) -> np.ndarray:
    """uint8 [..., 17] -> int8 [..., 32] codes."""
    nibbles = np.concatenate([data[..., :16] << 4, data[..., :16] & 0xF0], axis=-1)
    return nibbles.view(np.int8) >> 4


@dataclass(frozen=True)
class Razor(TensorType):
    """The one type of this layout."""

    def encode_blocks(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        weight = np.ones((1, 32), np.float32) if importance is None else importance
        return self._encode(blocks, np.where((weight > 0).any(1, keepdims=True), weight, np.float32(1)), np.float32(0))

    def encode_cache(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n_rows, n_cols] -> uint8 [n_rows, bytes], as a KV cache stores keys and values."""
        blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, 32)
        return self._encode(blocks, np.ones((1, 32), np.float32), _ALONG).reshape(len(rows), -1)

    def _encode(self, blocks: np.ndarray, weight: np.ndarray, along: np.float32) -> np.ndarray:
        w = np.clip(blocks, np.float32(-MAX_ABS), np.float32(MAX_ABS)) + np.float32(0)
        largest = np.abs(w).reshape(-1, 2, GROUP).max(2)
        fine = _step_below(largest.max(1) / np.float32(8), 4)
        coarse = _step_below(largest.max(1) / np.float32(16), 2)
        shifted = np.where(largest[:, 0] > largest[:, 1], SHIFT_1ST, 2 * FINE)

        tried = []
        for up in range(_TRIED):
            step = np.minimum(fine + up, FINE - 1)
            tried += [step, step + FINE, np.minimum(coarse + up, COARSE - 1) + shifted]

        best = np.zeros(len(w), np.uint8)
        codes = np.zeros(w.shape, np.float32)
        least = tree_sum(weight * w * w)
        share, least = along / (least + np.float32(1e-30)), least * (1 + along)
        for d in tried:
            step = np.repeat(group_steps(d), GROUP, axis=1)
            q = np.clip(np.rint(w * (np.float32(1) / step)), np.float32(-8), np.float32(7))
            error = w - step * q
            product = tree_sum(w * error)
            error = tree_sum(weight * error * error) + product * product * share
            better = error < least
            least[better] = error[better]
            best[better] = d[better]
            codes[better] = q[better]
        return self.pack(codes.astype(np.int8), best)

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        return np.repeat(group_steps(data[:, 16]), GROUP, axis=1) * unpack(data)

    def pack(self, codes: np.ndarray, d: np.ndarray) -> np.ndarray:
        """int8 codes [n, 32], -8 .. 7, and bytes d [n] -> uint8 [n, 17]."""
        codes = codes.view(np.uint8) & 15
        return np.concatenate([codes[:, :16] | codes[:, 16:] << 4, d[:, None]], axis=1)


def _step_below(x: np.ndarray, per_octave: int) -> np.ndarray:
    """int [n]: index of the largest step not above x (float32, >= 0) where there are 4 or 2 per octave, 0 below all.

    A step's exponent and the one or two bits of its significand are its index.
    """
    bits = per_octave.bit_length() - 1
    return np.maximum((x.view(np.uint32) >> (23 - bits)).astype(np.int64) - ((127 + _LEAST_EXPONENT) << bits), 0)


TYPES = [Razor("sdr4", 104, 104, 32, 17, "QRazor, a step per block", "weights and KV cache in integers", MAX_ABS)]
