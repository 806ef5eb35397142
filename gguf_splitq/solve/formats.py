"""What the solver needs of each type: its levels, its scales and its packing.

In every format here a block is 32 weights and weight = scale * level[code] + offset. Fitting is done by the type's own
encoder, weighted by the Hessian's diagonal, and the parameters are read from its bytes; the bytes of the stock types
are drawn in ggml/src/ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import numpy as np
import torch

from ..types import TensorType, splitquant


class CodebookFormat:
    """Levels and what follows from them; a subclass reads and writes the parameters."""

    block_size = 32

    def __init__(self, tensor_type: TensorType, levels: np.ndarray, device: str | torch.device):
        self.type = tensor_type
        self.levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        blocks = self.type.encode(weight.cpu().numpy(), importance.cpu().numpy())
        return self._params(blocks.reshape(len(weight), -1, self.type.block_bytes)).to(weight.device)

    def round(self, column: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        units = (column - self.offset(params)) / self.scale(params)
        return torch.bucketize(units, self.middles, out_int32=True).to(torch.uint8)

    def unit(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels[codes.int()]

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(self.scale(params))


class ScaleByteFormat(CodebookFormat):
    """sq4, sq3, sq2: the parameter is the scale byte, uint8 [n_rows, n_blocks]."""

    def __init__(self, tensor_type: TensorType, device: str | torch.device = "cpu"):
        super().__init__(tensor_type, splitquant.codebooks()[tensor_type.name].levels, device)
        self.scales = torch.from_numpy(splitquant.SCALES).to(device)

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return self.scales[params.int()]

    def nearest(self, scale: torch.Tensor, params: torch.Tensor | None = None) -> torch.Tensor:
        positive = self.scales[1:128]
        index = torch.bucketize(scale.abs(), (positive[1:] + positive[:-1]) / 2) + 1
        return (index + 128 * (scale < 0)).to(torch.uint8)

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        blocks = self.type.pack(codes.reshape(-1, 32).cpu().numpy(), params.reshape(-1).cpu().numpy())
        return torch.from_numpy(blocks.reshape(len(codes), -1))

    def _params(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.maximum(blocks[..., -1], 1))  # a zero scale could not be divided by


class HalfScaleFormat(CodebookFormat):
    """q4_0 and iq4_nl: | d: float16 | 16 bytes of 4-bit codes as in sq4 |; the parameter is d."""

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return params.float()

    def nearest(self, scale: torch.Tensor, params: torch.Tensor | None = None) -> torch.Tensor:
        half = scale.half()
        return torch.where(half == 0, torch.finfo(torch.float16).tiny, half)

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        blocks = np.hstack([_bytes(params.reshape(-1, 1)), splitquant.pack_4bit(_blocks_of(codes, 32))])
        return torch.from_numpy(blocks.reshape(len(codes), -1))

    def _params(self, blocks: np.ndarray) -> torch.Tensor:
        return self.nearest(_halves(blocks[..., :2])[..., 0])


class SuperBlockFormat(CodebookFormat):
    """iq4_xs and q4_k: 6-bit integers times one or two float16 per 256 weights.

    Parameters are float32 [n_rows, n_blocks, 4]: the block's integer scale and minimum, the super-block's d and dmin.
    d and dmin stay as fitted.
    """

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0] * params[..., 2]

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        return -params[..., 1] * params[..., 3]

    def nearest(self, scale: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        whole = torch.round(scale / params[..., 2]).clamp(self.least, self.most)
        return torch.cat([torch.where(whole == 0, 1, whole)[..., None], params[..., 1:]], -1)

    def _params(self, blocks: np.ndarray) -> torch.Tensor:
        scale, minimum, d, dmin = (torch.from_numpy(np.asarray(part, np.float32)) for part in self._read(blocks))
        d = torch.where(d == 0, torch.finfo(torch.float16).tiny, d)
        wide = (part.expand(scale.shape) for part in (d, dmin))
        params = torch.stack([torch.where(scale == 0, 1, scale), minimum, *wide], -1)
        return params.flatten(1, 2)  # [n_rows, super-blocks, 8, 4] -> [n_rows, n_blocks, 4]

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        parts = params.reshape(-1, 8, 4).cpu()
        scale, minimum = parts[..., 0].numpy().astype(np.int64), parts[..., 1].numpy().astype(np.int64)
        blocks = self._write(scale, minimum, parts[:, 0, 2:].half(), _blocks_of(codes, 256).reshape(-1, 8, 32))
        return torch.from_numpy(blocks.reshape(len(codes), -1))


class Iq4XsFormat(SuperBlockFormat):
    """| d: float16 | 16 bits: high 2 bits of 8 scales | 4 bytes: low 4 bits | 8 x 16 bytes of codes as in sq4 |.

    A scale is stored plus 32.
    """

    least, most = -32, 31

    def _read(self, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
        high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2").astype(np.int64) >> 2 * np.arange(8) & 3
        low = np.repeat(blocks[..., 4:8], 2, -1) >> np.tile(np.uint8([0, 4]), 4) & 15
        zero = np.zeros((1, 1, 1))
        return (low | high << 4) - 32, np.zeros(high.shape), _halves(blocks[..., :2]), zero

    def _write(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> np.ndarray:
        stored = scale + 32
        high = ((stored >> 4) << 2 * np.arange(8)).sum(1, keepdims=True).astype("<u2").view(np.uint8)
        low = (stored[:, ::2] & 15 | (stored[:, 1::2] & 15) << 4).astype(np.uint8)
        return np.hstack([_bytes(d[:, :1]), high, low, splitquant.pack_4bit(codes).reshape(-1, 128)])


class Q4KFormat(SuperBlockFormat):
    """| d, dmin: float16 | 12 bytes: 8 scales and 8 minima of 6 bits | 4 x 32 bytes of codes |.

    The 12 bytes: scales 0-3 and minima 0-3 in the low 6 bits of bytes 0-7, whose high 2 bits belong to scales 4-7 and
    minima 4-7; bytes 8-11 hold their low 4 bits, scale first. Code bytes: block 2i in the low, 2i + 1 in the high half.
    """

    least, most = 1, 63

    def _read(self, blocks: np.ndarray) -> tuple[np.ndarray, ...]:
        first, last = blocks[..., 4:12] & 63, blocks[..., 12:16]
        high = blocks[..., 4:12] >> 6 << 4
        scale = np.concatenate([first[..., :4], last & 15 | high[..., :4]], -1)
        minimum = np.concatenate([first[..., 4:], last >> 4 | high[..., 4:]], -1)
        return scale, minimum, _halves(blocks[..., :2]), _halves(blocks[..., 2:4])

    def _write(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> np.ndarray:
        both = np.hstack([scale[:, :4] | scale[:, 4:] >> 4 << 6, minimum[:, :4] | minimum[:, 4:] >> 4 << 6])
        last = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1, 128)
        return np.hstack([_bytes(d), both.astype(np.uint8), last.astype(np.uint8), packed])


def for_type(tensor_type: TensorType, device: str | torch.device = "cpu") -> CodebookFormat | None:
    """The format of a type, None when the solver does not handle it."""
    from gguf.quants import IQ4_NL

    if isinstance(tensor_type, splitquant.SplitQuant):
        return ScaleByteFormat(tensor_type, device)
    stock = {
        "q4_0": (HalfScaleFormat, np.arange(-8, 8)),
        "iq4_nl": (HalfScaleFormat, np.array(IQ4_NL.kvalues)),
        "iq4_xs": (Iq4XsFormat, np.array(IQ4_NL.kvalues)),
        "q4_k": (Q4KFormat, np.arange(16)),
    }
    if tensor_type.name not in stock:
        return None
    kind, levels = stock[tensor_type.name]
    return kind(tensor_type, levels, device)


def _blocks_of(codes: torch.Tensor, size: int) -> np.ndarray:
    return codes.reshape(-1, size).cpu().numpy()


def _bytes(halves: torch.Tensor) -> np.ndarray:
    """float16 [n, k] -> uint8 [n, 2 k]."""
    return np.ascontiguousarray(halves.cpu().numpy()).view(np.uint8)


def _halves(data: np.ndarray) -> torch.Tensor:
    """uint8 [..., 2 k] -> float32 [..., k]."""
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float16).astype(np.float32))
