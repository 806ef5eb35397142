# SPDX-License-Identifier: MIT
"""What is trained of stored matrices, block scales and codes, and how: of a whole model (tune.py) or of a decoder layer
(layerwise.py).

A scale is used as what the format can store of it, and a code as that of the level, or of the path of levels, that is
nearest to a number per weight; the gradient passes both roundings unchanged ("straight through", Bengio et al., arXiv
1308.3432). Adam, a rate that rises for some steps and then falls to zero with a cosine.

The integer scales that blocks of a super-block have are too coarse for small steps: of such formats codes are trained,
of those with side tensors nothing.

A weight takes 7 bytes: its code, its number as a whole one of 16 bits, and Adam's moments in bfloat16. These three are
rounded up or down at random, which in expectation changes nothing, so that steps smaller than their units add up
(Gupta et al., arXiv 1502.02551). Weights and gradients are there for one layer.
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import types
from ..coding import formats, solver, windows
from ..plan import Entry
from . import moments
from .moments import Key
from .ranks import ALONE, Alone
from .watch import Watch

WARM = 10  # steps until the rate is whole, an eighth of few
BETAS = 0.9, 0.98
EPSILON = 0.01  # Adam's, relative to the first gradient's root mean square: 1e-8 is more than many gradients here
EVERY = 4  # steps between searches for paths, which change slowly
NEAR = 0.9  # how far a code's number begins towards the weight, of the way to where another code would be nearer
HELD_OUT = 16  # one sequence in so many is not trained on, where the text has no others
ROWS = 256  # of a matrix that are one thread's work; a GPU takes all
LARGEST = (1 << 15) - 1  # a number, as it is kept

Call = tuple[Key, torch.Tensor, torch.Tensor]  # a matrix, its inputs [tokens, in], and its outputs or their gradients


@dataclass(frozen=True)
class Step:
    """One of `total`, the first of which has the number 0."""

    number: int
    total: int

    @property
    def rate(self) -> float:
        """What the rates are multiplied by."""
        rise = (self.number + 1) / min(WARM, 1 + self.total // 8)
        return min(1, rise) * (1 + math.cos(math.pi * self.number / self.total)) / 2

    @property
    def last(self) -> bool:
        """Whether no other one follows."""
        return self.number + 1 == self.total


class Adam:
    """Adam (Kingma and Ba, arXiv 1412.6980) for one tensor. Its moments are bfloat16 [shape]."""

    def __init__(self, shape: torch.Size, device: torch.device):
        self.first, self.second = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        self.epsilon = torch.finfo(torch.float32).tiny

    def begin(self, square: float) -> None:
        """Before the first step. square: the mean one of gradients."""
        self.epsilon = max(EPSILON * math.sqrt(square), self.epsilon)

    def change(self, gradient: torch.Tensor, step: Step, noise: Sequence[torch.Tensor]) -> torch.Tensor:
        """float32: what is to be taken away at rate 1. noise: two, as of `rounded`."""
        first = self.first.float().lerp_(gradient, 1 - BETAS[0])
        second = self.second.float().mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        self.first, self.second = rounded(first, noise[0]), rounded(second, noise[1])
        corrected = [1 - beta ** (step.number + 1) for beta in BETAS]
        root = second.div_(corrected[1]).sqrt_().add_(self.epsilon)
        return first.div_(corrected[0]).div_(root)


def rounded(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """bfloat16, up or down at random: float32 `values` in expectation. noise: int16 like them."""
    return (values.view(torch.int32) + (noise.int() & 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def noises(like: torch.Tensor, chance: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Three of int16 like a tensor, evenly over all values."""
    drawn = torch.empty(like.shape, dtype=torch.int64, device=like.device).random_(generator=chance)
    return drawn.view(torch.int16).view(*like.shape, 4)[..., :3].unbind(-1)  # the last one has no sign


@dataclass
class Bundle:
    """Blocks of one type that are trained. codes: uint8 [n, weights of a block], as the format has them.

    params: of each block. change: float32 [n, scales of a block], relative. units: int16 like codes, of which these are
    the nearest; `wanted` has them in levels. Of the last two, None is what is not trained.
    """

    fmt: formats.BlockFormat
    codes: torch.Tensor
    params: torch.Tensor
    change: torch.Tensor | None = None
    units: torch.Tensor | None = None

    @classmethod
    def of(cls, fmt: formats.BlockFormat, rows: np.ndarray) -> Bundle:
        """From uint8 [n_rows, row_bytes]; scales are trained where blocks have their own."""
        codes, params = fmt.unpack(rows.reshape(-1, fmt.type.block_bytes))
        found = cls(fmt, codes, params)
        found.train_scales()
        return found

    def train_scales(self) -> None:
        """Begin `change` where blocks have their own scales."""
        if self.fmt.own_scale:
            self.change = torch.zeros_like(self.fmt.scale(self.params))

    def stored(self) -> torch.Tensor:
        """The parameters with the storable scales nearest to the trained ones."""
        if self.change is None:
            return self.params
        scale = self.fmt.scale(self.params) * (1 + self.change)
        return self.fmt.nearest(scale, self.fmt.offset(self.params), self.params)

    def weight(self) -> torch.Tensor:
        """float32 like codes, as stored."""
        params, fmt = self.stored(), self.fmt
        blocks = self._levels(fmt.scale(params)).mul_(fmt.scale(params)[..., None])
        return (blocks.add_(fmt.offset(params)[..., None]) if fmt.has_offset else blocks).flatten(1)

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
        self.codes = self._nearest(self.wanted, chance)

    @functools.cached_property
    def gap(self) -> float:
        """Between neighbouring levels of a weight, on average."""
        fmt = self.fmt
        count = 1 << fmt.type.code_bits if isinstance(fmt, formats.WindowFormat) else len(fmt.levels)
        return float(fmt.levels.max() - fmt.levels.min()) / (count - 1)

    @functools.cached_property
    def reach(self) -> tuple[float, float]:
        """The levels that units may be, from -LARGEST to LARGEST."""
        return float(self.fmt.levels.min()) - self.gap / 2, float(self.fmt.levels.max()) + self.gap / 2

    @property
    def wanted(self) -> torch.Tensor:
        """float32 like codes: the units, in levels."""
        assert self.units is not None
        low, high = self.reach
        return self.units.float().mul_((high - low) / 2 / LARGEST).add_((high + low) / 2)

    def want(self, levels: torch.Tensor) -> None:
        """Take the units nearest to float32 `levels`, like codes."""
        low, high = self.reach
        units = (levels - (high + low) / 2).mul_(2 * LARGEST / (high - low)).round_()
        self.units = units.clamp_(-LARGEST, LARGEST).to(torch.int16)

    def train_codes(self, weight: torch.Tensor, chance: torch.Generator) -> None:
        """Begin `units` between the levels and `weight` float32 like codes, where the codes are what they are."""
        fmt, scale = self.fmt, self.fmt.scale(self.params)[..., None]
        levels = fmt.levels[self.codes.int()]
        wanted = weight.unflatten(1, (scale.shape[1], -1)) - fmt.offset(self.params)[..., None]
        wanted = torch.where(scale == 0, 0, wanted / scale).flatten(1).clamp_(*self.reach).sub_(levels)
        found = levels
        for share in (0.2, 0.4, 0.6, 0.8, 1.0):
            same = self._nearest(levels + share * wanted, chance) == self.codes
            if isinstance(fmt, formats.WindowFormat):
                same = same.all(1, keepdim=True)  # one path
            found = torch.where(same, levels + NEAR * share * wanted, found)
        self.want(found)

    def move(self, adam: Adam, gradient: torch.Tensor, rate: float, step: Step, noise: Sequence[torch.Tensor]) -> None:
        """Take a step with the units. gradient: float32 of levels; rate: in mean gaps; noise: of `noises`."""
        assert self.units is not None
        low, high = self.reach
        change = adam.change(gradient, step, noise).mul_(-rate * self.gap * 2 * LARGEST / (high - low))
        moved = change.add_(self.units).add_(noise[2], alpha=2**-16).add_(0.5).floor_()
        self.units = moved.clamp_(-LARGEST, LARGEST).to(torch.int16)

    def gradients(self, slope: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Those of `change`, and of the levels that `units` are, from that of `weight`.

        They are those without any rounding.
        """
        scale = self.fmt.scale(self.stored())
        blocks = slope.unflatten(1, (scale.shape[1], -1))
        change = None
        if self.change is not None:
            change = (blocks * self._levels(scale)).sum(-1).mul_(self.fmt.scale(self.params))
        return change, None if self.units is None else (blocks * scale[..., None]).flatten(1)

    def _levels(self, scale: torch.Tensor) -> torch.Tensor:
        """float32 [n, scales of a block, weights of each]."""
        found = self.fmt.levels.index_select(0, self.codes.flatten().int())
        return found.view(len(self.codes), scale.shape[1], -1)

    def _nearest(self, levels: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """uint8 codes of the nearest levels; of windows, of a path nearer than `codes`."""
        if isinstance(self.fmt, formats.WindowFormat):
            return windows.nearest(levels, self.codes, self.fmt, chance)
        known = self.fmt.levels
        return torch.bucketize(levels, (known[1:] + known[:-1]) / 2, out_int32=True).to(torch.uint8)


@dataclass
class Piece:
    """A GGUF matrix, or one of a stack. layer: the model's matrix that it is a part of.

    order: int64 [n_rows], the numbers of its rows in that. packed: uint8 [n_rows, row_bytes]. original: float32
    [n_rows, n_cols], where codes are trained.
    """

    entry: Entry
    layer: moments.Layer
    order: torch.Tensor
    packed: np.ndarray
    original: np.ndarray | None


def whole(pieces: list[Piece]) -> list[Piece]:
    """Those whose tensor and whose matrix all have pieces: either is trained whole or not at all."""
    while True:
        found: Counter[str | Key] = Counter()
        for piece in pieces:
            found.update({piece.entry.name: len(piece.packed), piece.layer.key: len(piece.packed)})
        kept = [
            p for p in pieces
            if found[p.entry.name] == p.entry.tensor.n_rows and found[p.layer.key] == len(p.layer.weight)
        ]  # fmt: skip
        if len(kept) == len(pieces):
            return kept
        pieces = kept


@dataclass
class Part:
    """Rows of a GGUF tensor that are trained by one thread. tensor: its name; key: the model's matrix.

    order: int64 [n_rows], their numbers in that. before: uint8 [n_rows, row_bytes], of the first process.
    """

    tensor: str
    key: Key
    order: torch.Tensor
    bundle: Bundle
    before: np.ndarray | None = None

    @classmethod
    def of(cls, piece: Piece, rows: slice, codes: bool, device: torch.device) -> Part:
        """Some rows of a piece. codes: whether those are trained."""
        packed = piece.packed[rows]
        bundle = Bundle.of(_format(piece.entry.coder.name, device), packed)
        if codes:
            assert piece.original is not None
            weight = torch.from_numpy(piece.original[rows]).to(device)
            bundle.train_codes(weight.view(bundle.codes.shape), torch.Generator().manual_seed(0))
        return cls(piece.entry.name, piece.layer.key, piece.order[rows].to(device), bundle, packed)

    def begin(self, number: int, rates: tuple[float, float]) -> None:
        """Before it is trained. number: of all parts, from which chance begins. rates: as of `Quantized`."""
        device, leaves = self.order.device, (self.bundle.change, self.bundle.units)
        self.rates, self.chance = rates, torch.Generator().manual_seed(number)
        self.noise = self.chance if device.type == "cpu" else torch.Generator(device).manual_seed(number)
        self.of_scales, self.of_codes = (None if leaf is None else Adam(leaf.shape, device) for leaf in leaves)

    def changed(self) -> int:
        """How many codes are others than before."""
        assert self.before is not None
        return int((Bundle.of(self.bundle.fmt, self.before).codes != self.bundle.codes).sum())

    def slope(self, calls: Sequence[Call]) -> torch.Tensor:
        """float32 [n_rows, n_cols]: the gradient of its weights."""
        shape = len(self.order), self.bundle.codes.numel() // len(self.order)
        total = torch.zeros(shape, device=self.order.device)
        for _, x, gradient in calls:
            total += (gradient.index_select(1, self.order).T @ x).float()
        return total

    def sizes(self, slope: torch.Tensor) -> list[tuple[float, int]]:
        """Sums of squares, and of how many numbers: of the gradients of scales, and of codes."""
        found = self.bundle.gradients(slope.view(self.bundle.codes.shape))
        return [(0.0, 0) if g is None else (float(g.square().sum(dtype=torch.float64)), g.numel()) for g in found]

    def descend(self, slope: torch.Tensor, step: Step) -> None:
        """Take a step against the gradient of the weights."""
        bundle = self.bundle
        of_change, of_units = bundle.gradients(slope.view(bundle.codes.shape))
        if self.of_scales and of_change is not None and bundle.change is not None:
            change = self.of_scales.change(of_change, step, noises(of_change, self.noise))
            bundle.change.sub_(change, alpha=self.rates[0] * step.rate)
        if self.of_codes and of_units is not None:
            bundle.move(self.of_codes, of_units, self.rates[1] * step.rate, step, noises(of_units, self.noise))
            if step.number % bundle.every == 0 or step.last:
                bundle.choose(self.chance)


class Quantized:
    """The trained matrices of a decoder layer. each: does some of the parts.

    rates: of scales, relative to their own size, and of codes, in mean gaps of levels. number: the layer's.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rates: Callable[[Bundle], tuple[float, float]],
        number: int,
        each: solver.Each = map,
    ):
        self.parts, self.each = parts, each
        for i, part in enumerate(parts):
            part.begin(number << 20 | i, rates(part.bundle))
        self.shapes: dict[Key, tuple[int, int]] = {}
        for part in parts:
            n_rows = len(part.order) + self.shapes.get(part.key, (0, 0))[0]
            self.shapes[part.key] = n_rows, part.bundle.codes.numel() // len(part.order)

    def weights(self, dtype: torch.dtype = torch.float32) -> dict[Key, torch.Tensor]:
        """[n_rows, n_cols], as stored."""
        if not self.parts:
            return {}
        device = self.parts[0].order.device
        found = {key: torch.empty(shape, dtype=dtype, device=device) for key, shape in self.shapes.items()}

        def put(part: Part) -> None:
            rows = part.bundle.weight().to(dtype).view(len(part.order), -1)
            found[part.key].index_copy_(0, part.order, rows)

        _done(self.each(put, self.parts))
        return found

    def descend(self, calls: Iterable[Call], step: Step, ranks: Alone = ALONE) -> None:
        """Take a step against the gradient of the products in `calls`, in order, and of other processes'."""
        seen: dict[Key, list[Call]] = defaultdict(list)
        for call in calls:
            seen[call[0]].append(call)
        slopes: Iterable[torch.Tensor] = map(
            ranks.summed, self.each(lambda part: part.slope(seen[part.key]), self.parts)
        )
        if step.number == 0:
            slopes = [*slopes]
            self._begin(slopes)
        _done(self.each(lambda pair: pair[0].descend(pair[1], step), zip(self.parts, slopes, strict=True)))

    def _begin(self, slopes: Sequence[torch.Tensor]) -> None:
        """Tell Adam the size of the first gradients, one for all scales, and one for all codes, of a type."""
        sums: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
        every = list(self.each(lambda pair: pair[0].sizes(pair[1]), zip(self.parts, slopes, strict=True)))
        for part, sizes in zip(self.parts, every, strict=True):
            for which, size in zip((True, False), sizes, strict=True):
                total = sums[part.bundle.fmt.type.name, which]
                total[:] = (a + b for a, b in zip(total, size, strict=True))
        for part in self.parts:
            for which, adam in zip((True, False), (part.of_scales, part.of_codes), strict=True):
                square, count = sums[part.bundle.fmt.type.name, which]
                if adam and count:
                    adam.begin(square / count)

    def packed(self) -> dict[str, np.ndarray]:
        """Tensor name -> rows as trained; the experts of a stack follow one another."""
        found: dict[str, list[np.ndarray]] = {}
        for part, blocks in zip(self.parts, self.each(lambda part: part.bundle.packed(), self.parts), strict=True):
            found.setdefault(part.tensor, []).append(blocks.reshape(len(part.order), -1))
        return {name: np.concatenate(parts) for name, parts in found.items()}


def changed(layers: Sequence[Quantized]) -> float:
    """The share of codes that are others than before."""
    moved = count = 0
    for layer in layers:
        moved += sum(layer.each(Part.changed, layer.parts))
        count += sum(part.bundle.codes.numel() for part in layer.parts)
    return moved / max(count, 1)


def parts_of(pieces: Sequence[Piece], codes: bool, device: torch.device, each: solver.Each = map) -> list[Part]:
    """The parts of these pieces, in order. codes: whether those are trained."""
    due = []
    for piece in pieces:
        n_rows = len(piece.packed)
        step = ROWS if device.type == "cpu" else n_rows
        due += [(piece, slice(first, min(first + step, n_rows))) for first in range(0, n_rows, step)]
    return list(each(lambda given: Part.of(given[0], given[1], codes, device), due))


def shared(parts: Sequence[Part], device: torch.device, ranks: Alone) -> list[Part]:
    """What the first process has, at all of them."""
    if ranks.count == 1:
        return list(parts)

    def told() -> list[tuple]:
        described = []
        for part in parts:
            bundle = part.bundle
            leaves = [leaf if leaf is None else (leaf.shape, leaf.dtype) for leaf in _leaves(bundle)]
            described.append((part.tensor, part.key, part.order.cpu(), bundle.fmt.type.name, leaves))
        return described

    found = list(parts)
    for number, (tensor, key, order, kind, leaves) in enumerate(ranks.first(told)):
        if not parts:
            codes, params, units = (leaf and torch.empty(leaf[0], dtype=leaf[1], device=device) for leaf in leaves)
            bundle = Bundle(_format(kind, device), codes, params, units=units)
            found.append(Part(tensor, key, order.to(device), bundle))
        for leaf in _leaves(found[number].bundle):
            if leaf is not None:
                ranks.same(leaf.contiguous())
        found[number].bundle.train_scales()
    return found


def _leaves(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return bundle.codes, bundle.params, bundle.units


def by_bits(rates: Mapping[float, float], bundle: Bundle) -> float:
    """Of rates below so many bits a weight, the bundle's."""
    return next(rate for bits, rate in rates.items() if bundle.fmt.type.bpw < bits)


class Products(Watch):
    """A pass with other matrices. calls: products of those in `wanted`, in order."""

    def __init__(self, module: torch.nn.Module, weights: Mapping[Key, torch.Tensor], wanted: Collection[Key] = ()):
        super().__init__(module, lambda *_: None)  # nothing that refers to this, or what it holds waits to be collected
        self.weights, self.wanted = weights, wanted
        self.calls: list[Call] = []

    def product(
        self, name: str, expert: int | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Watch`."""
        y = super().product(name, expert, x, self.weights.get((name, expert), weight), bias)
        if (name, expert) in self.wanted:
            self.calls.append(((name, expert), x, y))
        return y

    def gradients(
        self, output: torch.Tensor, slope: torch.Tensor | None = None, leaves: Sequence[torch.Tensor] = ()
    ) -> tuple[list[Call], list[torch.Tensor | None]]:
        """The calls with gradients instead of outputs, and those of leaves. slope: the output's."""
        wanted = [*leaves, *(y for _, _, y in self.calls)]
        found = torch.autograd.grad(output, wanted, slope, allow_unused=True)
        calls = zip(self.calls, found[len(leaves) :], strict=True)
        kept = [(key, x.detach().flatten(0, -2), g.flatten(0, -2)) for (key, x, _), g in calls if g is not None]
        return kept, list(found[: len(leaves)])


def _done(results: Iterable[object]) -> None:
    """Wait for all of them."""
    for _ in results:
        pass


@functools.cache
def _format(name: str, device: torch.device) -> formats.BlockFormat:
    found = formats.for_type(types.get(name), device)
    assert found
    return found
