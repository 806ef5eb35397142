# SPDX-License-Identifier: MIT
"""Training what is stored of a model layer by layer (`--tune layers`), where all of it does not fit into memory.

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
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from . import fisher, moments, training
from .aims import SHARE, Passing
from .model import OnDisk
from .moments import Key
from .training import HELD_OUT, Bundle, Call, Piece, Products, Quantized, Step, by_bits

STEPS = 128  # of BATCH sequences
RATES = {3.0: 6e-3, 4.0: 1.5e-3, math.inf: 5e-4}  # of scales, relative to their own size, below so many bits a weight
CODE_RATES = {3.0: 6e-3, 4.0: 5e-3, math.inf: 3e-3}  # of codes, in mean gaps of levels, likewise
WINDOW_RATE = 5e-4  # of window codes, of which one step moves many
SHOWN = 16  # steps from one line of progress to the next


def run(
    given: Passing,
    pieces: Sequence[Piece],
    stored: Mapping[Key, torch.Tensor],
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(tensor name -> uint8 [n_rows, row_bytes] to store instead, a report).

    pieces: what is trained. stored: what stands in place of all matrices. progress: steps done and in all. The report
    has the error on held-out tokens "before" and "after", a mean over weighted tokens, which are equal when nothing is
    stored instead, and the share of codes that have "changed". Raises InputError when an activation is NaN or Inf.
    """
    chance = torch.Generator().manual_seed(given.index)
    each = map if given.model.at_once else given.pool.map
    parts = training.parts_of(pieces, True, given.model.device, each)
    layer = _Layer(given, Quantized(parts, _rates, given.index, each), stored)
    batches, judge = layer.divided()
    before = layer.error(judge)
    left: list[int] = []
    with moments.tf32(given.model.device):  # as precise as a gradient has to be
        for number in range(steps):
            if not left:
                left.extend(torch.randperm(len(batches), generator=chance).tolist())
            layer.descend(Step(number, steps), *batches[left.pop()]())
            if (number + 1) % SHOWN == 0 or number + 1 == steps:
                progress(number + 1, steps)
    after = layer.error(judge)
    if not after < before:
        return {}, {"before": before, "after": before, "changed": 0.0}
    return layer.quantized.packed(), {"before": before, "after": after, "changed": training.changed([layer.quantized])}


def _rates(bundle: Bundle) -> tuple[float, float]:
    return by_bits(RATES, bundle), WINDOW_RATE if bundle.windows else by_bits(CODE_RATES, bundle)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, what is to come of them, tokens' weights


class _Layer:
    """The layer, as it is and as it is stored."""

    def __init__(self, given: Passing, quantized: Quantized, stored: Mapping[Key, torch.Tensor]):
        self.given, self.quantized = given, quantized
        self.model, self.module = given.model, given.module
        self.others = {key: weight for key, weight in stored.items() if key not in quantized.shapes}

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
        weights = self._weights()

        def part(hidden: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> float:
            with torch.no_grad(), Products(self.module, weights):
                return float(self._loss(hidden, target, counts))

        return sum(fisher.each_part(self.model, self.given.pool, part, *batch)) / float(batch[2].sum())

    def descend(self, step: Step, *batch: torch.Tensor) -> None:
        """Take a step against the gradient of the loss, summed over a batch."""
        self.quantized.descend(self.calls(*batch), step)

    def calls(self, *batch: torch.Tensor) -> list[Call]:
        """Inputs of the matrices that are trained, and the gradients at their outputs."""
        part = functools.partial(self._calls, self._weights())
        return list(itertools.chain.from_iterable(fisher.each_part(self.model, self.given.pool, part, *batch)))

    def _weights(self) -> dict[Key, torch.Tensor]:
        """What stands in place of all matrices, as the model multiplies with it."""
        return self.others | self.quantized.weights(self.model.dtype)

    def _loss(self, hidden: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        off = self.model.forward(self.module, self.given.index, hidden).float() - target.to(self.model.device)
        return (off.square().sum(-1) * counts.to(off.device)).sum()

    def _calls(self, weights: Mapping[Key, torch.Tensor], *part: torch.Tensor) -> list[Call]:
        with torch.enable_grad(), Products(self.module, weights, self.quantized.shapes) as seen:
            hidden, *others = part
            loss = self._loss(hidden.detach().to(self.model.device).requires_grad_(), *others)
        return seen.gradients(loss)[0]
