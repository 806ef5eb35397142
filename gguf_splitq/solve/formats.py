"""What the solver needs of each type: its levels, its scales and its packing. All are codebooks with a scale per 32."""

from __future__ import annotations

import numpy as np
import torch

from ..types import TensorType, splitquant


class CodebookFormat:
    """weight = scale * level[code]; a subclass says how the scale is stored."""

    block_size = 32

    def __init__(self, tensor_type: TensorType, levels: np.ndarray, device: str | torch.device):
        self.type = tensor_type
        self.levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        blocks = self.type.encode(weight.cpu().numpy(), importance.cpu().numpy())
        return self._params(blocks.reshape(len(weight), -1, self.type.block_bytes)).to(weight.device)

    def round(self, column: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(column / self.scale(params), self.middles, out_int32=True).to(torch.uint8)

    def unit(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels[codes.int()]


class ScaleByteFormat(CodebookFormat):
    """sq4, sq3, sq2: a parameter is the scale byte, uint8."""

    def __init__(self, tensor_type: TensorType, device: str | torch.device = "cpu"):
        super().__init__(tensor_type, splitquant.codebooks()[tensor_type.name].levels, device)
        self.scales = torch.from_numpy(splitquant.SCALES).to(device)

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return self.scales[params.int()]

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        positive = self.scales[1:128]
        index = torch.bucketize(scale.abs(), (positive[1:] + positive[:-1]) / 2) + 1
        return (index + 128 * (scale < 0)).to(torch.uint8)

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        blocks = self.type.pack(codes.reshape(-1, 32).cpu().numpy(), params.reshape(-1).cpu().numpy())
        return torch.from_numpy(blocks.reshape(len(codes), -1))

    def _params(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.maximum(blocks[..., -1], 1))  # a zero scale could not be divided by


class HalfScaleFormat(CodebookFormat):
    """q4_0 and iq4_nl: a float16 scale, then 16 bytes of 4-bit codes laid out as in sq4."""

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return params.float()

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        half = scale.half()
        return torch.where(half == 0, torch.finfo(torch.float16).tiny, half)

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        scales = params.reshape(-1, 1).cpu().numpy().view(np.uint8)
        blocks = np.hstack([scales, splitquant.pack_4bit(codes.reshape(-1, 32).cpu().numpy())])
        return torch.from_numpy(blocks.reshape(len(codes), -1))

    def _params(self, blocks: np.ndarray) -> torch.Tensor:
        halves = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return self.nearest(torch.from_numpy(halves.astype(np.float32)))


def for_type(tensor_type: TensorType, device: str | torch.device = "cpu") -> CodebookFormat | None:
    """The format of a type, None when the solver does not handle it."""
    if isinstance(tensor_type, splitquant.SplitQuant):
        return ScaleByteFormat(tensor_type, device)
    if tensor_type.name == "q4_0":
        return HalfScaleFormat(tensor_type, np.arange(-8, 8), device)
    if tensor_type.name == "iq4_nl":
        from gguf.quants import IQ4_NL

        return HalfScaleFormat(tensor_type, np.array(IQ4_NL.kvalues), device)
    return None
