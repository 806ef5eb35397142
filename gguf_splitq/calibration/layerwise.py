# SPDX-License-Identifier: MIT
"""Training what is stored of a model layer by layer (`--tune layers`), where it does not fit into memory twice.

When all of a decoder layer is solved, and before the next one is measured behind it, its block scales and codes are
trained (training.py). With f the layer, f' the layer as it is stored, h and h' the hidden states that the float model
and the stored one give it, they lower

    sum over tokens  w |f'(h') - (f(h) + f(h')) / 2|^2

which is half-way as the aims of its matrices are (aims.py), w being a token's Fisher information. Error feedback solves
one matrix after the other, each against what is in front of it; this moves all of them together, through softmax and
gate. Other tokens decide, by the same error, whether a layer takes what was trained: each counts as those at its place
in a sequence do on average, since the first one's states are huge and its weight is small.

On a CPU a sequence is run by one thread, and a part of a gradient is multiplied by one thread, always the same part; so
the number of threads does not show. Called from a thread that computes alone, the rest does not depend on it either.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from . import fisher, moments
from .aims import SHARE, Passing
from .model import OnDisk
from .moments import Key
from .training import Bundle, Piece, Quantized, by_bits, descend, groups_of
from .watch import Watch

STEPS = 128  # of BATCH sequences
RATES = {3.0: 6e-3, 4.0: 1.5e-3, math.inf: 5e-4}  # of scales, relative to their own size, below so many bits a weight
CODE_RATES = {3.0: 6e-3, 4.0: 5e-3, math.inf: 3e-3}  # of codes, in mean gaps of levels, likewise
WINDOW_RATE = 5e-4  # of window codes, of which one step moves many
HELD_OUT = 16  # one sequence in so many, where the text has no others
ROWS = 256  # of a matrix whose gradient is one thread's work

Call = tuple[Key, torch.Tensor, torch.Tensor]  # a matrix, its inputs [tokens, in], and its outputs or their gradients


def run(
    given: Passing, pieces: Sequence[Piece], stored: Mapping[Key, torch.Tensor], steps: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(tensor name -> uint8 [n_rows, row_bytes] to store instead, a report).

    pieces: what is trained. stored: what stands in place of all matrices. The report has the error on held-out tokens
    "before" and "after", a mean over weighted tokens, which are equal when nothing is stored instead, and the share of
    codes that have "changed". Raises InputError when an activation is NaN or Inf.
    """
    chance = torch.Generator().manual_seed(given.index)
    quantized = Quantized(pieces, True, given.model.device, chance)
    codes = [bundle.codes for bundle in quantized.bundles]
    layer = _Layer(given, quantized, {piece.layer.key: piece.address for piece in pieces}, stored)
    batches, judge = layer.divided()
    before = layer.error(judge)
    left: list[int] = []

    def gradients(clear: Callable[[], object]) -> None:
        if not left:
            left.extend(torch.randperm(len(batches), generator=chance).tolist())
        layer.gradients(*batches[left.pop()]())

    with moments.tf32(given.model.device):  # as precise as a gradient has to be
        descend(quantized.bundles, [*groups_of(quantized.bundles, _rates)], steps, chance, gradients)
    after = layer.error(judge)
    moved = sum(int((old != b.codes).sum()) for old, b in zip(codes, quantized.bundles, strict=True))
    if not after < before:
        return {}, {"before": before, "after": before, "changed": 0.0}
    return quantized.packed(), {"before": before, "after": after, "changed": moved / sum(map(torch.numel, codes))}


def _rates(bundle: Bundle) -> tuple[float, float]:
    return by_bits(RATES, bundle), WINDOW_RATE if bundle.windows else by_bits(CODE_RATES, bundle)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, what is to come of them, tokens' weights


class _Layer:
    """The layer, as it is and as it is stored. addresses: of the matrices that are trained."""

    def __init__(
        self,
        given: Passing,
        quantized: Quantized,
        addresses: Mapping[Key, int],
        stored: Mapping[Key, torch.Tensor],
    ):
        self.given, self.quantized, self.addresses = given, quantized, addresses
        self.model, self.module = given.model, given.module
        self.others = {key: weight for key, weight in stored.items() if key not in addresses}

    def divided(self) -> tuple[list[Callable[[], Batch]], Batch]:
        """Batches to train on, each made when it is called, and one to judge by."""
        given, mean = self.given, torch.cat(self.given.weights).mean()
        weights = [weight / mean if mean else torch.ones_like(weight) for weight in given.weights]
        targets = OnDisk(given.exact.folder, given.exact.room)
        for exact, stored in zip(given.exact, given.stored, strict=True):
            targets.append(self.target(exact, stored))

        def batch(number: int, some: slice = slice(None)) -> Batch:
            return given.stored[number][some], targets[number][some], weights[number][some]

        sizes = [len(weight) for weight in weights]
        batches: list[Callable[[], Batch]] = [functools.partial(batch, number) for number in range(len(sizes))]
        if given.held:
            exact, stored = given.held
            return batches, (stored, self.target(exact, stored), torch.cat(weights).mean(0).expand(len(exact), -1))
        first = max(0, sizes[-1] - max(1, sum(sizes) // HELD_OUT))
        kept = [functools.partial(batch, len(sizes) - 1, slice(first))] if first else []
        return [*batches[:-1], *kept], batch(len(sizes) - 1, slice(first, None))

    def target(self, exact: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """What hidden states behind what is stored should become, for those of the float model."""

        def part(exact: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
            through = functools.partial(fisher.forward, self.model, self.module, self.given.index)
            return through(stored).lerp(through(exact), SHARE)

        return torch.cat(fisher.each_part(self.model, self.given.pool, part, exact, stored))

    @torch.no_grad()
    def error(self, batch: Batch) -> float:
        """The mean over weighted tokens."""
        weights = self._weights(self.quantized.weights())

        def part(hidden: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> float:
            with torch.no_grad(), _Trained(self.module, weights, ()):
                return float(self._loss(hidden, target, counts))

        return sum(fisher.each_part(self.model, self.given.pool, part, *batch)) / float(batch[2].sum())

    def gradients(self, *batch: torch.Tensor) -> None:
        """Leave those of the loss, summed over a batch, in what is trained."""
        with torch.enable_grad():
            trained = self.quantized.weights()
        part = functools.partial(self._calls, self._weights(trained))
        found: dict[Key, list[Call]] = defaultdict(list)
        for calls in fisher.each_part(self.model, self.given.pool, part, *batch):
            for call in calls:
                found[call[0]].append(call)
        products = [self._product(found[key], trained[address]) for key, address in self.addresses.items()]
        torch.autograd.backward([trained[address] for address in self.addresses.values()], products)

    def _weights(self, trained: Mapping[int, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """What stands in place of all matrices, as the model multiplies with it."""
        return self.others | {key: trained[a].detach().to(self.model.dtype) for key, a in self.addresses.items()}

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        off = self.model.forward(self.module, self.given.index, hidden).float() - target.to(self.model.device)
        return (off.square().sum(-1) * counts.to(off.device)).sum()

    def _calls(self, weights: Mapping[Key, torch.Tensor], *part: torch.Tensor) -> list[Call]:
        """Inputs of the matrices that are trained, and the gradients at their outputs, for a worker's part."""
        with torch.enable_grad(), _Trained(self.module, weights, self.addresses) as seen:
            hidden, *others = part
            loss = self._loss(hidden.detach().to(self.model.device).requires_grad_(), *others)
        gradients = torch.autograd.grad(loss, [y for _, _, y in seen.calls], allow_unused=True)
        calls = zip(seen.calls, gradients, strict=True)
        return [(key, x.detach().flatten(0, -2), g.flatten(0, -2)) for (key, x, _), g in calls if g is not None]

    def _product(self, calls: Sequence[Call], like: torch.Tensor) -> torch.Tensor:
        """float32 [out, in]: the gradient of a matrix."""
        if not calls:
            return torch.zeros_like(like)
        x, g = (torch.cat(parts) for parts in list(zip(*calls, strict=True))[1:])
        parts = g.split(g.shape[1] if g.is_cuda else ROWS, 1)
        return torch.cat([*self.given.pool.map(lambda part: part.T @ x, parts)]).float()


class _Trained(Watch):
    """A pass with other matrices. calls: products of those in `wanted`, in order."""

    def __init__(self, module: torch.nn.Module, weights: Mapping[Key, torch.Tensor], wanted: Collection[Key]):
        super().__init__(module, self._keep)
        self.weights, self.wanted = weights, wanted
        self.calls: list[Call] = []

    def product(
        self, name: str, expert: int | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Watch`."""
        return super().product(name, expert, x, self.weights.get((name, expert), weight), bias)

    def _keep(self, name: str, expert: int | None, x: torch.Tensor, y: torch.Tensor, *_: Any) -> None:
        if (name, expert) in self.wanted:
            self.calls.append(((name, expert), x, y))
