# SPDX-License-Identifier: MIT
"""sq4x: SplitQuantV2 as published, three full 16-level linear ranges, for reproducing the paper.

Super-block of 256 weights, 204 bytes, 6.375 bpw:

    | scale: 3 x float16 | min: 3 x float16 | 8 x sub-block of 32: | range: 8 bytes, 2-bit | qs: 16 bytes, 4-bit | |

    weight = min[range] + scale[range] * code        ranges 0 lower, 1 middle, 2 upper; 3 is invalid

Ranges come from k-means (k = 3) over the super-block's weights; boundaries are the midpoints of the centres; each
range has 16 equally spaced levels from its least to its largest weight. The published method splits whole tensors;
`make paper-splitquant` measures that form too. 2- and 4-bit fields are laid out as in splitquant.py.

Source: SplitQuantV2, arXiv 2503.07657. An importance matrix changes nothing: the method uses no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import TensorType
from .splitquant import pack_2bit, pack_4bit, tree_sum, unpack_2bit, unpack_4bit

_HALF = np.float32(0.5)
_ROUNDS = 16
_MAX_ABS = 65504.0


@dataclass(frozen=True)
class PublishedSplit(TensorType):
    """The one type of this layout."""

    @property
    def uses_importance(self) -> bool:
        return False

    def encode_blocks(self, blocks: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        w = np.clip(blocks, np.float32(-_MAX_ABS), np.float32(_MAX_ABS)) + np.float32(0)
        centre = _k_means(w)
        ranges = _ranges(w, centre)

        scale = np.zeros((len(w), 3), np.float16)
        least = np.zeros((len(w), 3), np.float16)
        codes = np.zeros(w.shape, np.uint8)
        for k in range(3):
            inside = ranges == k
            used = inside.any(1)
            lo = np.where(inside, w, np.inf).min(1, where=inside, initial=np.inf)
            hi = np.where(inside, w, -np.inf).max(1, where=inside, initial=-np.inf)
            least[:, k] = np.where(used, lo, 0)
            first = least[:, k].astype(np.float32)
            spread = np.where(used & ~(hi < first), hi, first) - first
            scale[:, k] = spread / np.float32(15)
            step = scale[:, k].astype(np.float32)[:, None]
            q = np.rint((w - first[:, None]) / np.where(step > 0, step, np.float32(1)))
            codes += np.where(inside & (step > 0), np.clip(q, 0, 15), 0).astype(np.uint8)

        subs = (len(w), 8, 32)
        sub_blocks = np.concatenate([pack_2bit(ranges.reshape(subs)), pack_4bit(codes.reshape(subs))], axis=-1)
        header = np.concatenate([scale, least], axis=1).astype("<f2").view(np.uint8)
        return np.concatenate([header, sub_blocks.reshape(len(w), -1)], axis=1)

    def decode_blocks(self, data: np.ndarray) -> np.ndarray:
        header = np.ascontiguousarray(data[:, :12]).view("<f2").astype(np.float32)
        sub_blocks = data[:, 12:].reshape(-1, 8, 24)
        ranges = unpack_2bit(sub_blocks[..., :8]).reshape(-1, 256)
        codes = unpack_4bit(sub_blocks[..., 8:]).reshape(-1, 256)
        zero = np.zeros((len(data), 1), np.float32)  # what the invalid range reads as
        scale = np.take_along_axis(np.hstack([header[:, :3], zero]), ranges.astype(np.intp), 1)
        least = np.take_along_axis(np.hstack([header[:, 3:], zero]), ranges.astype(np.intp), 1)
        return least + scale * codes


def _k_means(w: np.ndarray) -> np.ndarray:
    """float32 [n, 3] centres of the three clusters of each row of w [n, 256]."""
    mean = tree_sum(w) / np.float32(w.shape[1])
    centre = np.stack([(w.min(1) + mean) * _HALF, mean, (w.max(1) + mean) * _HALF], axis=1)
    for _ in range(_ROUNDS):
        ranges = _ranges(w, centre)
        for k in range(3):
            inside = ranges == k
            count = inside.sum(1)
            total = tree_sum(np.where(inside, w, np.float32(0)))
            centre[:, k] = np.where(count > 0, total / np.maximum(count, 1).astype(np.float32), centre[:, k])
    return centre


def _ranges(w: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """uint8 like w: 0 lower (w <= b0), 1 middle, 2 upper (w >= b1), b the midpoints of the centres."""
    b0 = ((centre[:, 0] + centre[:, 1]) * _HALF)[:, None]
    b1 = ((centre[:, 1] + centre[:, 2]) * _HALF)[:, None]
    return np.where(w <= b0, 0, np.where(w < b1, 1, 2)).astype(np.uint8)


TYPES = [PublishedSplit("sq4x", 103, 103, 256, 204, "SplitQuantV2, as published", "the paper's claim", _MAX_ABS)]
