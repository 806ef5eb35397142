# SPDX-License-Identifier: MIT
"""What the solver needs of each type: its levels, its scales and offsets, and its packing.

Fitting is done by the type's own encoder, weighted by the Hessian's diagonal, and the parameters are read from its
bytes. The bytes of the stock types are those of ggml/src/ggml-common.h in llama.cpp, drawn at each class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..resources import cores
from ..types import TensorType, sdr, splitquant, sqc, windows
from ..types.columns import Layout
from ..types.splitquant import pack_4bit
from .sweeps import Grid, Shared, inverse
from .sweeps import nearest as nearest_level

FITTED = 1 << 22  # weights of super-blocks fitted at a time on a GPU
# Scales that are tried: as if the levels' ends were so many gaps further apart.
STARTS = np.linspace(-2.7, 2.7, 19).tolist()
ROUNDS = 2  # of rounding and least squares, for each of these


class BlockFormat:
    """Levels and what follows from them; a subclass reads and writes the parameters. See `solver.Format`."""

    block_size = 32
    has_offset = False
    own_scale = False  # whether each block has one, fine enough to be trained

    def __init__(self, tensor_type: TensorType, levels: Sequence[int] | np.ndarray, device: str | torch.device):
        self.type: TensorType = tensor_type
        self.super_size = tensor_type.block_size
        self.levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self.wide, self.wide_levels = 0, self.levels

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Parameters that the type's own encoder finds for float32 [n_rows, n_cols]. importance: float32 [n_cols]."""
        given = importance.cpu().numpy()
        fitted = _by_rows(lambda rows: self.type.encode(rows, given), weight.is_cuda, weight.cpu().numpy())
        return self._params(fitted).to(weight.device)

    def grid(self, params: torch.Tensor) -> Grid | None:
        """What `nearest` chooses from; None where it leaves all as they are."""
        raise NotImplementedError

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        """float32 [n_rows, n_blocks]: what a level is multiplied by."""
        raise NotImplementedError

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        """float32 [n_rows, n_blocks]: what is then added."""
        return torch.zeros_like(self.scale(params))

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Parameters of about this scale and offset. params: what they are now, for what blocks share."""
        raise NotImplementedError

    def stretch(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """Parameters whose super-blocks' factors are multiplied by these, float32 [n_rows, n_super_blocks]."""
        raise NotImplementedError("only blocks that share a factor can be stretched")

    def shared(self, params: torch.Tensor) -> Shared | None:
        """See `solver.Format`."""
        return None

    def share(self, factors: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """See `solver.Format`."""
        raise NotImplementedError("of blocks that share a factor which is any float16")

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """uint8 codes [n_rows, n_cols] -> uint8 [n_rows, row_bytes], on the CPU."""
        per_block = self.type.block_size // self.block_size

        def written(codes: np.ndarray, params: np.ndarray) -> np.ndarray:
            blocks = codes.reshape(-1, self.type.block_size)
            kept = torch.from_numpy(params).reshape(len(blocks), per_block, *params.shape[2:])
            return self._write(blocks, kept).reshape(len(codes), -1)

        return torch.from_numpy(_by_rows(written, codes.is_cuda, codes.cpu().numpy(), params.cpu().numpy()))

    def unpack(self, packed: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n_rows, row_bytes] -> uint8 codes [n_rows, n_cols] and parameters, on the levels' device."""
        device = self.levels.device
        params = self._params(packed).to(device)
        weight = torch.from_numpy(self.type.decode(packed)).to(device).unflatten(1, (-1, self.block_size))
        units = _ratio(weight - self.offset(params)[..., None], self.scale(params)[..., None]).flatten(1)
        return torch.bucketize(units, (self.levels[1:] + self.levels[:-1]) / 2).to(torch.uint8), params

    def _params(self, packed: np.ndarray) -> torch.Tensor:
        return self._read(packed.reshape(len(packed), -1, self.type.block_bytes))

    def _read(self, blocks: np.ndarray) -> torch.Tensor:
        """The parameters of uint8 [n_rows, n_blocks, block_bytes]."""
        raise NotImplementedError

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        """uint8 [n, block_bytes] from codes [n, type.block_size] and parameters [n, blocks in it, ...]."""
        raise NotImplementedError


class ScaleByteFormat(BlockFormat):
    """sq4, sq3, sq2: the parameter is the scale byte, uint8 [n_rows, n_blocks]."""

    type: splitquant.SplitQuant | windows.Window
    own_scale = True

    def __init__(
        self,
        tensor_type: splitquant.SplitQuant | windows.Window,
        device: str | torch.device = "cpu",
        levels: Sequence[int] | np.ndarray | None = None,
        scales: np.ndarray = splitquant.SCALES,
        positive: int = 128,
    ):
        """levels: those of a codebook of this name if not given. scales: float32 [256], what parameters stand for.

        positive: how many positive ones there are; negative ones begin at 128.
        """
        if levels is None:
            levels = splitquant.codebooks()[tensor_type.name].levels
        super().__init__(tensor_type, levels, device)
        self.scales, self.positive = torch.from_numpy(scales).to(device), positive

    def grid(self, params: torch.Tensor) -> Grid:
        return Grid("table", self.scales[:128])

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return self.scales[params.int()]

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        positive = self.scales[: self.positive]
        index = torch.bucketize(scale.abs(), (positive[1:] + positive[:-1]) / 2)
        return (index + 128 * (scale < 0)).to(torch.uint8)

    def _read(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(blocks[..., -1].copy())

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        return self.type.pack(codes, params[:, 0].numpy())


class WindowFormat(ScaleByteFormat):
    """sq6w to sq2w, and rows of sq3wo and sq2wo, where parameters are the numbers of a matrix' scales, not their bytes.

    The code of a weight is its whole window here, so that `levels` says what it stands for.
    """

    type: windows.Window

    def __init__(self, tensor_type: windows.Window, device: str | torch.device = "cpu"):
        super().__init__(tensor_type, device, tensor_type.table.levels, tensor_type.scales, tensor_type.n_scales)

    def unpack(self, packed: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        found, scale = self.type.unpack_windows(packed.reshape(-1, self.type.block_bytes))
        parts = (torch.from_numpy(part.reshape(len(packed), -1)) for part in (found, scale))
        codes, params = (part.to(self.levels.device) for part in parts)
        return codes, params

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        return self.type.pack_windows(codes, params[:, 0].numpy())


class ColumnFormat(ScaleByteFormat):
    """sq2c, sq3c: columns scaled and in stored order. Packed are codes, then scale bytes, [n_rows, n_cols 33 / 32]."""

    def __init__(self, tensor_type: sqc.ScaledColumns, layout: Layout, device: str | torch.device = "cpu"):
        super().__init__(tensor_type.plain, device)
        self.columns_type, self.layout, self.wide = tensor_type, layout, 32 * layout.wide
        levels = splitquant.codebooks()[tensor_type.widened.name].levels
        self.wide_levels = torch.tensor(levels, dtype=torch.float32, device=device)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        given = importance.cpu().numpy()

        def fitted(rows: np.ndarray) -> np.ndarray:
            return self.columns_type.nearest(rows, given, self.layout)[1]

        return torch.from_numpy(_by_rows(fitted, weight.is_cuda, weight.cpu().numpy())).to(weight.device)

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return torch.cat([codes, params], 1).cpu()


class RazorFormat(BlockFormat):
    """sdr4: two groups of 16 that share the step of a block of 32; which of them is shifted stays as fitted.

    Parameters are uint8 [n_rows, n_groups, 2]: the block's byte d, and which of its groups it is.
    """

    type: sdr.Razor
    block_size = sdr.GROUP

    def __init__(self, tensor_type: sdr.Razor, device: str | torch.device = "cpu"):
        super().__init__(tensor_type, range(-8, 8), device)
        self.steps = torch.from_numpy(sdr.group_steps(np.arange(256))).to(device)
        self.values = torch.from_numpy(sdr.STEPS).to(device)

    def grid(self, params: torch.Tensor) -> None:
        return None

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return self.steps[params[..., 0].int(), params[..., 1].int()]

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return params  # a group has no scale of its own

    def stretch(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        d, values = params[..., 0].int(), self.values
        step, fine, coarse = values[d] * scale, values[: sdr.FINE], values[2 * sdr.FINE : sdr.SHIFT_1ST]
        plain = torch.bucketize(step.abs(), (fine[1:] + fine[:-1]) / 2) + sdr.FINE * (step < 0)
        shifted = torch.bucketize(step, (coarse[1:] + coarse[:-1]) / 2)
        shifted = shifted + torch.where(d < sdr.SHIFT_1ST, 2 * sdr.FINE, sdr.SHIFT_1ST)
        return torch.stack([torch.where(d < 2 * sdr.FINE, plain, shifted).to(torch.uint8), params[..., 1]], -1)

    def _read(self, blocks: np.ndarray) -> torch.Tensor:
        d = np.repeat(blocks[..., -1], 2, -1)
        group = np.broadcast_to(np.arange(d.shape[-1], dtype=np.uint8) % 2, d.shape)
        return torch.from_numpy(np.stack([d, group], -1))

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        return self.type.pack(codes.astype(np.int8) - 8, params[:, 0, 0].numpy())


class HalfFormat(BlockFormat):
    """q4_0, q5_0, iq4_nl: | d: float16 | codes |; q4_1, q5_1: | d, m: float16 | codes |. weight = d * level + m.

    Codes: the fifth bits of 5-bit codes (bit i of 4 bytes belongs to weight i), then 16 bytes of 4-bit codes as in sq4.
    Parameters are float16 [n_rows, n_blocks, 1 or 2].
    """

    own_scale = True

    def __init__(self, tensor_type: TensorType, levels: Sequence[int] | np.ndarray, device: str | torch.device):
        super().__init__(tensor_type, levels, device)
        self.has_offset = tensor_type.name.endswith("_1")

    def grid(self, params: torch.Tensor) -> Grid:
        return Grid("half")

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0].float()

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 1].float() if self.has_offset else super().offset(params)

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return _half(torch.stack([scale, offset][: params.shape[-1]], -1))

    def _read(self, blocks: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(_halves(blocks[..., : 4 if self.has_offset else 2]))

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        fifth = [np.packbits(codes >> 4, 1, "little")] if len(self.levels) == 32 else []
        return np.hstack([_bytes(params[:, 0]), *fifth, pack_4bit(codes & 15)])


class SuperBlockFormat(BlockFormat):
    """256 weights in blocks of 16 or 32: weight = d * scale * level - dmin * minimum, scale and minimum integers.

    Parameters are float32 [n_rows, n_blocks, 4]: scale, minimum, and the super-block's d and dmin, which are float16
    values. A subclass gives the range of the integers (of minima from 0 on), and reads and writes them.
    """

    scales: tuple[int, int]

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        if not weight.is_cuda:
            return super().fit(weight, importance)
        rows = max(FITTED // weight.shape[1], 1)
        return torch.cat([self.fitted(some, importance) for some in weight.split(rows)])

    def fitted(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """As `fit`, by least squares on the weights' device: a GPU would wait for the encoder.

        Blocks are fitted by themselves, from several scales, and super-blocks to the largest of their blocks.
        """
        blocks, share = weight.unflatten(1, (-1, self.block_size)), importance.float().view(-1, self.block_size)
        lowest, highest = float(self.levels[0]), float(self.levels[-1])
        gap = (highest - lowest) / (len(self.levels) - 1)
        starts = [gap * part for part in STARTS]
        if self.has_offset:
            below = blocks.amin(-1).clamp(max=0)
            tried = [(blocks.amax(-1) - below) / (highest - lowest + start) for start in starts]
        else:
            largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
            below = torch.zeros_like(largest)
            tried = [largest / (end + math.copysign(start, end)) for end in (lowest, highest) for start in starts]
        scale, offset = _least_squares(blocks, share, tried, below, self.levels, self.has_offset)

        def shared(values: torch.Tensor) -> torch.Tensor:
            return _half(values).float().repeat_interleave(per, 1)

        least, most = self.scales
        per = self.type.block_size // self.block_size
        parts = scale.unflatten(1, (-1, per))
        d = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))[..., 0] / least if least else parts.amax(-1) / most
        d, dmin = shared(d), shared(offset.neg().unflatten(1, (-1, per)).amax(-1) / most)
        none = torch.zeros_like(d)
        return self.nearest(scale, offset, torch.stack([none, none, d, dmin], -1))

    def grid(self, params: torch.Tensor) -> Grid:
        return Grid("steps", None, (params[..., 2], params[..., 3]), *self.scales)

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        return params[..., 0] * params[..., 2]

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        return -params[..., 1] * params[..., 3]

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        new = params.clone()
        new[..., 0] = _ratio(scale, params[..., 2]).round().clamp(*self.scales)
        if self.has_offset:
            new[..., 1] = _ratio(-offset, params[..., 3]).round().clamp(0, self.scales[1])
        return new

    def stretch(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        factors = torch.stack([scale, offset], -1)
        return torch.cat([params[..., :2], _half(params[..., 2:] * factors).float()], -1)

    def shared(self, params: torch.Tensor) -> Shared:
        return Shared(params[..., 0], -params[..., 1], params[:, :: self.super_size // self.block_size, 2:])

    def share(self, factors: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return torch.cat([params[..., :2], factors.repeat_interleave(self.super_size // self.block_size, 1)], -1)

    def _read(self, blocks: np.ndarray) -> torch.Tensor:
        scale, minimum, d, dmin = (np.asarray(part, np.float32) for part in self._read_parts(blocks))
        params = np.stack(np.broadcast_arrays(scale, minimum, d, dmin), -1)
        return torch.from_numpy(params).flatten(1, 2)  # [n_rows, super-blocks, blocks, 4] -> [n_rows, n_blocks, 4]

    def _write(self, codes: np.ndarray, params: torch.Tensor) -> np.ndarray:
        scale, minimum = (params[..., i].numpy().astype(np.int64) for i in (0, 1))
        return np.hstack(self._write_parts(scale, minimum, params[:, 0, 2:].half(), codes))

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        """Scales and minima [..., blocks], d and dmin [..., 1] of uint8 [..., block_bytes]; 0 for what there is not."""
        raise NotImplementedError

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        """Parts of [n, block_bytes]. scale, minimum: int64 [n, blocks], d: float16 [n, 2], codes: uint8 [n, 256]."""
        raise NotImplementedError


class Iq4XsFormat(SuperBlockFormat):
    """| d: float16 | 16 bits: high 2 bits of 8 scales | 4 bytes: low 4 bits | 8 x 16 bytes of codes as in sq4 |.

    A scale is stored plus 32.
    """

    scales = -32, 31

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        high = np.ascontiguousarray(blocks[..., 2:4]).view("<u2").astype(np.int64) >> 2 * np.arange(8) & 3
        low = np.repeat(blocks[..., 4:8], 2, -1) >> np.tile(np.array([0, 4], np.uint8), 4) & 15
        return (low | high << 4) - 32, 0, _halves(blocks[..., :2]), 0

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        stored = scale + 32
        high = ((stored >> 4) << 2 * np.arange(8)).sum(1, keepdims=True).astype("<u2").view(np.uint8)
        low = (stored[:, ::2] & 15 | (stored[:, 1::2] & 15) << 4).astype(np.uint8)
        return [_bytes(d[:, :1]), high, low, pack_4bit(codes.reshape(-1, 8, 32)).reshape(-1, 128)]


class Q45KFormat(SuperBlockFormat):
    """q4_k, q5_k: | d, dmin: float16 | 12 bytes: 8 scales, 8 minima of 6 bits | fifth bits | 4 x 32 bytes of codes |.

    The 12 bytes: scales 0-3 and minima 0-3 in the low 6 bits of bytes 0-7, whose high 2 bits belong to scales 4-7 and
    minima 4-7; bytes 8-11 hold their low 4 bits, scale first. Code bytes: block 2i in the low, 2i + 1 in the high half.
    Fifth bits, q5_k only: bit b of byte i belongs to weight i of block b.
    """

    scales = 0, 63
    has_offset = True

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        first, last = blocks[..., 4:12] & 63, blocks[..., 12:16]
        high = blocks[..., 4:12] >> 6 << 4
        scale = np.concatenate([first[..., :4], last & 15 | high[..., :4]], -1)
        minimum = np.concatenate([first[..., 4:], last >> 4 | high[..., 4:]], -1)
        return scale, minimum, _halves(blocks[..., :2]), _halves(blocks[..., 2:4])

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        both = np.hstack([scale[:, :4] | scale[:, 4:] >> 4 << 6, minimum[:, :4] | minimum[:, 4:] >> 4 << 6])
        last = scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4
        codes = codes.reshape(-1, 8, 32)
        fifth = [np.packbits(codes >> 4, 1, "little")[:, 0]] if len(self.levels) == 32 else []
        packed = codes[:, ::2] & 15 | codes[:, 1::2] << 4
        return [_bytes(d), both.astype(np.uint8), last.astype(np.uint8), *fifth, packed.reshape(-1, 128)]


class Q2KFormat(SuperBlockFormat):
    """| 16 bytes: scale, minimum << 4 | 64 bytes of codes | d, dmin: float16 |, blocks of 16, codes as `_pack_2bit`."""

    block_size = 16
    scales = 0, 15
    has_offset = True

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        return blocks[..., :16] & 15, blocks[..., :16] >> 4, _halves(blocks[..., 80:82]), _halves(blocks[..., 82:])

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        return [(scale | minimum << 4).astype(np.uint8), _pack_2bit(codes), _bytes(d)]


class Q3KFormat(SuperBlockFormat):
    """| 32 bytes: third bits | 64 bytes: low 2 bits, as `_pack_2bit` | 12 bytes: 16 scales of 6 bits | d: float16 |.

    Third bits: bit b of byte i belongs to weight 32 b + i. Scales are stored plus 32: the low 4 bits of scales i and
    i + 8 in byte i, the high 2 bits of scale i in byte 8 + i mod 4, from bit 2 (i div 4).
    """

    block_size = 16
    scales = -32, 31

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        low = np.concatenate([blocks[..., 96:104] & 15, blocks[..., 96:104] >> 4], -1)
        high = np.tile(blocks[..., 104:108], 4) >> np.repeat(np.array([0, 2, 4, 6], np.uint8), 4) & 3
        return (low | high << 4).astype(np.int64) - 32, 0, _halves(blocks[..., 108:]), 0

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        stored = (scale + 32).astype(np.uint8)
        low = stored[:, :8] & 15 | (stored[:, 8:] & 15) << 4
        high = ((stored >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(1, dtype=np.uint8)
        third = np.packbits(codes.reshape(-1, 8, 32) >> 2, 1, "little")[:, 0]
        return [third, _pack_2bit(codes & 3), low, high, _bytes(d[:, :1])]


class Q6KFormat(SuperBlockFormat):
    """| 128 bytes: low 4 bits | 64 bytes: high 2 bits, as `_pack_2bit` | 16 scales: int8 | d: float16 |, blocks of 16.

    Low bits: of each 128 weights, weight i in the low and i + 64 in the high half of byte i.
    """

    block_size = 16
    scales = -128, 127

    def _read_parts(self, blocks: np.ndarray) -> tuple:
        return np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), 0, _halves(blocks[..., 208:]), 0

    def _write_parts(self, scale: np.ndarray, minimum: np.ndarray, d: torch.Tensor, codes: np.ndarray) -> list:
        low = (codes & 15).reshape(-1, 2, 2, 64)
        packed = low[:, :, 0] | low[:, :, 1] << 4
        return [packed.reshape(-1, 128), _pack_2bit(codes >> 4), scale.astype(np.int8).view(np.uint8), _bytes(d[:, :1])]


def for_type(tensor_type: TensorType, device: str | torch.device = "cpu") -> BlockFormat | None:
    """The format of a type, None when the solver does not handle it."""
    from gguf.quants import IQ4_NL

    if isinstance(tensor_type, splitquant.SplitQuant):
        return ScaleByteFormat(tensor_type, device)
    if isinstance(tensor_type, windows.Window):
        return WindowFormat(tensor_type, device)
    if isinstance(tensor_type, sdr.Razor):
        return RazorFormat(tensor_type, device)
    stock: dict[str, tuple[type[HalfFormat | SuperBlockFormat], np.ndarray]] = {
        "q4_0": (HalfFormat, np.arange(-8, 8)),
        "q4_1": (HalfFormat, np.arange(16)),
        "q5_0": (HalfFormat, np.arange(-16, 16)),
        "q5_1": (HalfFormat, np.arange(32)),
        "q2_k": (Q2KFormat, np.arange(4)),
        "q3_k": (Q3KFormat, np.arange(-4, 4)),
        "q4_k": (Q45KFormat, np.arange(16)),
        "q5_k": (Q45KFormat, np.arange(32)),
        "q6_k": (Q6KFormat, np.arange(-32, 32)),
        "iq4_nl": (HalfFormat, np.array(IQ4_NL.kvalues)),
        "iq4_xs": (Iq4XsFormat, np.array(IQ4_NL.kvalues)),
    }
    if tensor_type.name not in stock:
        return None
    kind, levels = stock[tensor_type.name]
    return kind(tensor_type, levels, device)


def _least_squares(
    blocks: torch.Tensor,
    share: torch.Tensor,
    tried: Iterable[torch.Tensor],
    below: torch.Tensor,
    levels: torch.Tensor,
    both: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset (0 at most) of least error of blocks float32 [n_rows, n_blocks, n], rounded to nearest.

    share: [n_blocks, n], what an error counts. tried, below: scales and the offset to begin with, [n_rows, n_blocks].
    """
    least, found = torch.full_like(below, torch.inf), (torch.zeros_like(below), torch.zeros_like(below))
    whole, mean = share.sum(-1), (share * blocks).sum(-1)
    for scale in tried:
        offset = below
        for _ in range(ROUNDS):
            unit = nearest_level((blocks - offset[..., None]) * inverse(scale)[..., None], levels)
            counted = share * unit
            first, second, product = counted.sum(-1), (counted * unit).sum(-1), (counted * blocks).sum(-1)
            scale = (product / second).masked_fill(second == 0, 0)
            if both:
                determinant = whole * second - first * first
                slope = (whole * product - first * mean) / determinant
                middle = (mean - slope * first) / whole
                better = (determinant > 1e-4 * whole * second) & (middle < 0)
                scale, offset = torch.where(better, slope, scale), torch.where(better, middle, 0)
            error = (share * (blocks - torch.addcmul(offset[..., None], unit, scale[..., None])).square_()).sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            found = torch.where(better, scale, found[0]), torch.where(better, offset, found[1])
    return found


def _pack_2bit(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 256] below 4 -> uint8 [n, 64]: of each 128 weights, i, i + 32, i + 64, i + 96 from bit 0 of byte i."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts, 2).reshape(-1, 64)


def _by_rows(work: Callable[..., np.ndarray], shared: bool, *parts: np.ndarray) -> np.ndarray:
    """`work` for all rows of these; shared: by all cores, because a GPU waits for it."""
    n_rows = len(parts[0])
    step = -(-n_rows // cores()) if shared else n_rows
    if step == n_rows:
        return work(*parts)
    with ThreadPoolExecutor(cores()) as pool:
        pieces = [[part[first : first + step] for part in parts] for first in range(0, n_rows, step)]
        return np.concatenate(list(pool.map(work, *zip(*pieces, strict=True))))


def _ratio(value: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return (value / unit).masked_fill(unit == 0, 0)


def _half(values: torch.Tensor) -> torch.Tensor:
    """float16, never infinite."""
    return values.clamp(-65504, 65504).half()


def _bytes(halves: torch.Tensor) -> np.ndarray:
    """float16 [n, k] -> uint8 [n, 2 k]."""
    return np.ascontiguousarray(halves.numpy()).view(np.uint8)


def _halves(data: np.ndarray) -> np.ndarray:
    """uint8 [..., 2 k] -> float16 [..., k]."""
    return np.ascontiguousarray(data).view(np.float16)
