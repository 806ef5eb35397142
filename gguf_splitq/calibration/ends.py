# SPDX-License-Identifier: MIT
"""The matrices at a model's two ends: the embedding, where tokens are looked up, and the output, which makes logits.

An error d of a row costs, to second order, as everywhere else (fisher.py)

    output      1/2 sum over tokens of  g_v^2 (d . x)^2      g_v: gradient at the row's logit, x: the output's input
    embedding   1/2 sum over sequences of  (d . G_v)^2       G_v: gradients at the tokens that are v, summed

so the second moments of x, each token counted by |g|^2, and of G are their Hessians. A tied matrix has the sum of both:
a token is looked up about as often as it is predicted, so the two parts have the same proportion in every row, and one
matrix serves all rows, those of tokens that the text lacks as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import numpy as np
import torch

from ..coding import solver
from ..files.gguf_file import Gguf, Tensor
from . import moments
from .model import BATCH, Model

END_OF = {"token_embd.weight": "embedding", "output.weight": "output"}  # as `Model.matrix` names them
WEIGHTS = 1 << 24  # of such a matrix that are read and coded at a time on a CPU, in whole rows

Taken = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [tokens, in], |g|^2 [tokens], and what it adds to `rows`


@dataclass
class Sums:
    """Of one use of a matrix. moment: of what its rows are multiplied with. rows: float64 [vocabulary], of squares."""

    moment: moments.Moment = field(default_factory=moments.Moment)
    rows: torch.Tensor | float = 0.0

    def add(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], pool: Executor, model: Model) -> None:
        """Take in inputs [n, in] and their weights [n]."""
        moments.add_up(self.moment.add(parts), pool, model)

    @property
    def total(self) -> torch.Tensor | None:
        """float64 [in, in]: the Hessian, summed over the tokens; None where nothing was seen."""
        return None if self.moment.total is None else moments.whole(self.moment.total)


class Ends:
    """What a backward pass over int64 `tokens` [sequences, CONTEXT] shows of a model's ends; see `fisher.Ends`.

    output, embedding: their sums. weights: float32 |g|^2 of the tokens at the output.
    """

    def __init__(self, model: Model, tokens: torch.Tensor):
        self.model, self.tokens, self.count = model, tokens.split(BATCH), tokens.numel()
        self.output, self.embedding = Sums(), Sums()
        self.weights: list[torch.Tensor] = []
        self.rows = model.matrix("embedding").detach()
        self.dots = [0.0, 0.0]  # of hidden states and rows, and of rows with themselves

    def take(self, x: torch.Tensor, g: torch.Tensor) -> Taken:
        """See `fisher.Ends`."""
        x, squares = x.detach(), g.float().square()
        return x, squares.sum(1), squares.T @ x.float().square().sum(1)

    def see_output(self, batch: int, taken: Sequence[Taken], pool: Executor) -> None:
        """See `fisher.Ends`."""
        if batch < len(self.tokens) and taken:
            for _, _, rows in taken:
                self.output.rows = self.output.rows + rows.double().cpu()
            self.output.add([part[:2] for part in taken], pool, self.model)
            self.weights += [weights.cpu() for _, weights, _ in taken]

    def see_embedding(self, batch: int, hidden: torch.Tensor, gradient: torch.Tensor, pool: Executor) -> None:
        """See `fisher.Ends`."""
        if batch >= len(self.tokens):
            return
        if not isinstance(self.embedding.rows, torch.Tensor):
            self.embedding.rows = torch.zeros(len(self.rows), dtype=torch.float64)
        device = self.model.device
        sequences = zip(self.tokens[batch], hidden.to(device), gradient.to(device), strict=True)
        for ids, looked_up, sums, dots in pool.map(lambda sequence: self._looked_up(*sequence), sequences):
            self.embedding.rows[ids] += looked_up.cpu()
            self.embedding.add([(sums, sums.new_ones(len(sums)))], pool, self.model)
            self.dots = [total + dot for total, dot in zip(self.dots, dots, strict=True)]

    def _looked_up(self, ids: torch.Tensor, hidden: torch.Tensor, gradient: torch.Tensor) -> tuple:
        """Of a sequence: its tokens, each once, |G|^2 and G of these, and what is added to `dots`."""
        found, of = ids.unique(return_inverse=True)
        same = (of == torch.arange(len(found))[:, None]).to(gradient.device, torch.float32)
        sums = same @ gradient.float()  # in a fixed order; a GPU's index_add_ has none
        rows = self.rows[ids.to(self.rows.device)].float()
        dots = float((hidden.float() * rows).sum()), float(rows.square().sum())
        return found, sums.square().sum(1, dtype=torch.float64), sums, dots

    @property
    def scale(self) -> float:
        """What the model multiplies a row with when it looks it up, by least squares; 1 in most."""
        return self.dots[0] / self.dots[1] if self.dots[1] else 1.0

    def uses(self, name: str, tied: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(float64 [vocabulary], float64 [in, in]) of each use of a GGUF tensor: rows' squares and Hessian, summed."""
        found = []
        if name == "token_embd.weight" and isinstance(self.embedding.rows, torch.Tensor):
            total = self.embedding.total
            assert total is not None
            found.append((self.embedding.rows * self.scale**2, (total * self.scale**2).cpu()))
        if (name == "output.weight" or tied) and isinstance(self.output.rows, torch.Tensor):
            total = self.output.total
            assert total is not None
            found.append((self.output.rows, total.cpu()))
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """What `Hessians.keep_ends` keeps: Hessians per token, float32 [in, in], and weights [1, tokens]."""
        found = {}
        for name, sums, scale in (("output", self.output, 1.0), ("embedding", self.embedding, self.scale**2)):
            if (total := sums.total) is not None:
                found[name] = (total * scale / self.count).float().cpu().numpy()
        if self.weights:
            found["weights"] = torch.cat(self.weights)[None].numpy()
        return found


@dataclass
class Standing:
    """What stands in place of a model's ends, by `Model.matrix`'s names, [vocabulary, hidden].

    stored: what the file has; nearest: nearest rounding. output: the matrix that is to be solved behind all layers.
    weights: float32 |g|^2 of all tokens at the output.
    """

    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    nearest: dict[str, torch.Tensor] = field(default_factory=dict)
    output: moments.Layer | None = None
    weights: torch.Tensor | None = None

    def put(self, end: str, layer: moments.Layer) -> None:
        """Take over what a layer was given."""
        for found, value in ((self.stored, layer.stored), (self.nearest, layer.nearest)):
            if value is not None:
                found[end] = value


def step(tensor: Tensor, on_gpu: bool = False) -> int:
    """Rows of such a tensor that are coded at a time."""
    weights = solver.ON_GPU * solver.WEIGHTS if on_gpu else WEIGHTS
    return max(1, weights // tensor.n_cols)


def tied(file: Gguf) -> bool:
    """Whether the embedding is the output as well."""
    return not any(tensor.name == "output.weight" for tensor in file.tensors)


def hessian(arrays: Mapping[str, torch.Tensor], name: str, tied: bool) -> torch.Tensor | None:
    """float64 [in, in] of a GGUF tensor, from what `Ends.arrays` gave; None where something is missing."""
    wanted = ["embedding"] * (name == "token_embd.weight") + ["output"] * (name == "output.weight" or tied)
    if any(use not in arrays for use in wanted):
        return None
    return torch.stack([arrays[use] for use in wanted]).double().sum(0)
