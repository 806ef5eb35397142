# SPDX-License-Identifier: MIT
"""What is trained of stored matrices, block scales and codes, and how: of a whole model (tune.py) or of a decoder layer
(layerwise.py).

A scale is used as what the format can store of it, and a code as that of the level, or of the path of levels, that is
nearest to a number per weight; the gradient passes both roundings unchanged ("straight through", Bengio et al., arXiv
1308.3432). Adam, a rate that rises for some steps and then falls to zero with a cosine.

The integer scales that blocks of a super-block have are too coarse for small steps: of such formats codes are trained,
of those with side tensors nothing.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..coding import formats, windows
from ..plan import Entry
from . import moments

WARM = 10  # steps until the rate is whole, an eighth of few
BETAS = 0.9, 0.98
EPSILON = 0.01  # Adam's, relative to the first gradient's root mean square: 1e-8 is more than many gradients here
EVERY = 4  # steps between searches for paths, which change slowly
NEAR = 0.9  # how far a code's number begins towards the weight, of the way to where another code would be nearer
OWN_SCALE = (formats.ScaleByteFormat, formats.HalfFormat)


@dataclass
class Bundle:
    """Blocks of one type that are trained. codes: uint8 [n, weights of a block], as the format has them.

    params: of each block. change: float32 [n, scales of a block], relative. units: float32 like codes, of which these
    are the nearest, in levels. Of the last two, None is what is not trained.
    """

    fmt: formats.BlockFormat
    codes: torch.Tensor
    params: torch.Tensor
    change: torch.Tensor | None = None
    units: torch.Tensor | None = None

    @classmethod
    def of(cls, fmt: formats.BlockFormat, packed: Sequence[np.ndarray]) -> Bundle:
        """From rows uint8 [n_rows, row_bytes], one below the other; scales are trained where blocks have their own."""
        parts = [fmt.unpack(rows.reshape(-1, fmt.type.block_bytes)) for rows in packed]
        codes, params = (torch.cat(part) for part in zip(*parts, strict=True))
        change = torch.zeros_like(fmt.scale(params), requires_grad=True) if isinstance(fmt, OWN_SCALE) else None
        return cls(fmt, codes, params, change)

    def stored(self) -> torch.Tensor:
        """The parameters with the storable scales nearest to the trained ones."""
        if self.change is None:
            return self.params
        scale = self.fmt.scale(self.params) * (1 + self.change.detach())
        return self.fmt.nearest(scale, self.fmt.offset(self.params), self.params)

    def weight(self) -> torch.Tensor:
        """float32 like codes, as stored, differentiable by `change` and `units`."""
        return _Straight.apply(self.change, self.units, self)

    def packed(self) -> np.ndarray:
        """uint8 [n, block_bytes]."""
        return self.fmt.pack(self.codes, self.stored()).cpu().numpy()

    @property
    def windows(self) -> bool:
        """Whether codes are chosen together, as paths."""
        return isinstance(self.fmt, formats.WindowFormat)

    @property
    def every(self) -> int:
        """Steps from one choice of codes to the next."""
        return EVERY if self.windows else 1

    def choose(self, chance: torch.Generator) -> None:
        """Take the codes nearest to the units."""
        assert self.units is not None
        self.codes = self._nearest(self.units.detach(), chance)

    @property
    def gap(self) -> float:
        """Between neighbouring levels of a weight, on average."""
        fmt = self.fmt
        count = 1 << fmt.type.code_bits if isinstance(fmt, formats.WindowFormat) else len(fmt.levels)
        return float(fmt.levels.max() - fmt.levels.min()) / (count - 1)

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """What units may be."""
        return float(self.fmt.levels.min()) - self.gap / 2, float(self.fmt.levels.max()) + self.gap / 2

    def train_codes(self, weight: torch.Tensor, chance: torch.Generator) -> None:
        """Begin `units` between the levels and `weight` float32 like codes, where the codes are what they are."""
        fmt, scale = self.fmt, self.fmt.scale(self.params)[..., None]
        levels = fmt.levels[self.codes.int()]
        wanted = weight.unflatten(1, (scale.shape[1], -1)) - fmt.offset(self.params)[..., None]
        wanted = torch.where(scale == 0, 0, wanted / scale).flatten(1).clamp_(*self.reach).sub_(levels)
        units = levels
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            same = self._nearest(levels + share * wanted, chance) == self.codes
            if isinstance(fmt, formats.WindowFormat):
                same = same.all(1, keepdim=True)  # one path
            units = torch.where(same, levels + NEAR * share * wanted, units)
        self.units = units.requires_grad_(True)

    def _nearest(self, units: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """uint8 codes of the levels nearest to `units`; of windows, of a path nearer than `codes`."""
        if isinstance(self.fmt, formats.WindowFormat):
            return windows.nearest(units, self.codes, self.fmt, chance)
        levels = self.fmt.levels
        return torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


class _Straight(torch.autograd.Function):
    """(scales' change, units) -> weights as stored. The gradient is that without any rounding."""

    @staticmethod
    def forward(ctx: Any, change: torch.Tensor | None, units: torch.Tensor | None, bundle: Bundle) -> torch.Tensor:
        """Keeps codes and parameters, which take less memory than the weights."""
        params, fmt = bundle.stored(), bundle.fmt
        ctx.bundle, ctx.codes, ctx.scale = bundle, bundle.codes, fmt.scale(params)
        weight = fmt.levels[ctx.codes.int()].unflatten(1, (ctx.scale.shape[1], -1)) * ctx.scale[..., None]
        return (weight + fmt.offset(params)[..., None] if fmt.has_offset else weight).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """See the class."""
        fmt, blocks = ctx.bundle.fmt, grads[0].unflatten(1, (ctx.scale.shape[1], -1))
        change = units = None
        if ctx.needs_input_grad[0]:
            change = (blocks * fmt.levels[ctx.codes.int()].view_as(blocks)).sum(-1) * fmt.scale(ctx.bundle.params)
        if ctx.needs_input_grad[1]:
            units = (blocks * ctx.scale[..., None]).flatten(1)
        return change, units, None


@dataclass
class Piece:
    """A GGUF matrix, or one of a stack. layer: the model's matrix that it is a part of.

    order: int64 [n_rows], the numbers of its rows in that. packed: uint8 [n_rows, row_bytes]. original: float32
    [n_rows, n_cols], until it is used.
    """

    entry: Entry
    layer: moments.Layer
    order: torch.Tensor
    packed: np.ndarray
    original: np.ndarray | None

    @property
    def address(self) -> int:
        """Of the model's matrix."""
        return self.layer.weight.data_ptr()

    @property
    def shape(self) -> tuple[int, int]:
        """Of its weights."""
        return len(self.packed), self.entry.tensor.n_cols


class Quantized:
    """The student's matrices: their blocks, all of a type in one bundle, so that little is launched on a GPU."""

    def __init__(self, pieces: Sequence[Piece], codes: bool, device: torch.device, chance: torch.Generator):
        self.pieces: list[tuple[Bundle, list[Piece]]] = []
        types = {piece.entry.target_name: piece.entry.coder for piece in pieces}
        for name, kind in types.items():
            fmt = formats.for_type(kind, device)
            assert fmt
            same = [piece for piece in pieces if piece.entry.target_name == name]
            bundle = Bundle.of(fmt, [piece.packed for piece in same])
            if codes:
                weights = [torch.from_numpy(piece.original).reshape(-1, kind.block_size) for piece in same]
                bundle.train_codes(torch.cat([weight.to(device) for weight in weights]), chance)
                for piece in same:
                    piece.original = None
            self.pieces.append((bundle, same))
        self.orders: dict[int, torch.Tensor | None] = {}
        for address in {piece.address for piece in pieces}:
            order = torch.cat([p.order for _, same in self.pieces for p in same if p.address == address]).argsort()
            in_order = torch.equal(order, torch.arange(len(order)))
            self.orders[address] = None if in_order else order.to(device)

    @property
    def bundles(self) -> list[Bundle]:
        """One for each type."""
        return [bundle for bundle, _ in self.pieces]

    def weights(self) -> dict[int, torch.Tensor]:
        """float32 [n_rows, n_cols] by address, as stored; differentiable."""
        parts: dict[int, list[torch.Tensor]] = {}
        for bundle, pieces in self.pieces:
            sizes = [math.prod(piece.shape) // bundle.codes.shape[1] for piece in pieces]
            for piece, part in zip(pieces, bundle.weight().split(sizes), strict=True):
                parts.setdefault(piece.address, []).append(part.view(piece.shape))
        whole = {address: found[0] if len(found) == 1 else torch.cat(found) for address, found in parts.items()}
        orders = self.orders
        return {address: w if (o := orders[address]) is None else w[o] for address, w in whole.items()}

    def packed(self) -> dict[str, np.ndarray]:
        """Tensor name -> rows as trained; the experts of a stack follow one another."""
        found: dict[str, list[np.ndarray]] = {}
        for bundle, pieces in self.pieces:
            rows, first = bundle.packed(), 0
            for piece in pieces:
                size = piece.packed.size // rows.shape[1]
                found.setdefault(piece.entry.name, []).append(rows[first : first + size].reshape(piece.packed.shape))
                first += size
        return {name: np.concatenate(parts) for name, parts in found.items()}


def whole(pieces: list[Piece]) -> list[Piece]:
    """Those whose tensor and whose matrix all have pieces: either is trained whole or not at all."""
    while True:
        found: Counter[str | int] = Counter()
        for piece in pieces:
            found.update({piece.entry.name: len(piece.packed), piece.address: len(piece.packed)})
        kept = [
            p for p in pieces
            if found[p.entry.name] == p.entry.tensor.n_rows and found[p.address] == len(p.layer.weight)
        ]  # fmt: skip
        if len(kept) == len(pieces):
            return kept
        pieces = kept


def groups_of(bundles: Sequence[Bundle], rates: Callable[[Bundle], tuple[float, float]]) -> Iterator[dict[str, Any]]:
    """Leaves with their rates. rates: of scales, relative to their own size, and of codes, in mean gaps of levels."""
    for bundle in bundles:
        of_scales, of_codes = rates(bundle)
        if bundle.change is not None:
            yield {"params": [bundle.change], "lr": of_scales}
        if bundle.units is not None:
            yield {"params": [bundle.units], "lr": of_codes * bundle.gap}


def by_bits(rates: Mapping[float, float], bundle: Bundle) -> float:
    """Of rates below so many bits a weight, the bundle's."""
    return next(rate for bits, rate in rates.items() if bundle.fmt.type.bpw < bits)


def descend(
    bundles: Sequence[Bundle],
    groups: list[dict[str, Any]],
    steps: int,
    chance: torch.Generator,
    gradients: Callable[[Callable[[], object]], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train the leaves in `groups`. gradients(clear) leaves those of a batch in them; clear() takes them away again."""

    def rate(step: int) -> float:
        return min(1, (step + 1) / min(WARM, 1 + steps // 8)) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        gradients(optimizer.zero_grad)
        for group in optimizer.param_groups if step == 0 else ():
            size = torch.stack([leaf.grad.square().mean() for leaf in group["params"]]).mean().sqrt()
            group["eps"] = max(EPSILON * float(size), torch.finfo(torch.float32).tiny)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for bundle in bundles:
            if bundle.units is not None:
                bundle.units.data.clamp_(*bundle.reach)
                if step % bundle.every == 0 or step + 1 == steps:
                    bundle.choose(chance)
        progress(step + 1, steps)
