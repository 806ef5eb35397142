# SPDX-License-Identifier: MIT
"""What each type would cost each tensor: the divergence from the model's own output that rounding to it adds.

To second order that divergence is half the mean over sequences of (sum over tokens of g . dW x)^2 per token, x being a
matrix's input and g the gradient of fisher.py at its output. The bracket is <G, dW>, G = sum g x^T, and since rounding
errors of two weights have nothing to do with each other, only squares are left of its square:

    cost(dW) = 1/2 sum over o, i of  dW_oi^2 mean(G_oi^2),   mean(G_oi^2) ~ row_o column_i / total

row and column sums being all that is kept of each matrix, whatever the number of candidates.

Measured on 8 k tokens of text, against the divergence of a model with one matrix rounded at a time, on other
tokens: rank correlation 0.98 on ref-a (84 matrices, sq2) and 0.98 and 0.99 on the demo (28, sq2 and sq4); the sums are
0.76, 0.86 and 0.95 of the measured ones, since errors as large as sq2's are beyond second order. All of G^2 instead of
its sums gives the same. Tokens taken as independent, mean(g_o^2) mean(|g|^2 x_i^2), give 0.96 and 0.97, too little for
V; the relative output error of each matrix alone gives 0.73 on the demo.

The embedding and the output are measured alike (ends.py), a tied matrix in both uses.

Error feedback is not run for this: it lowers the divergence of sq4, sq3 and sq2 by nearly the same factor, `FEEDBACK`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..coding import families, solver
from ..files.gguf_file import Gguf, Tensor
from ..plan import ENDS
from ..rewrite import each_matrix
from ..types import TensorType
from ..types.columns import PLAIN
from . import fisher, moments, pieces
from .ends import END_OF, Ends, step, tied
from .model import CONTEXT, Model, Room

TOKENS = 8192  # of the calibration text
FEEDBACK = 0.64  # divergence of a type with error feedback / with an importance matrix: sq4 0.64, sq3 0.66, sq2 0.63


@dataclass
class _Sums:
    """Sums of G^2 over the sequences. rows: float64 [out]; columns: float64 [in]."""

    rows: torch.Tensor
    columns: torch.Tensor

    def add(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self.rows, self.columns = self.rows + rows, self.columns + columns


def _take(x: torch.Tensor, g: torch.Tensor, _: torch.Tensor | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each sequence adds to the sums."""
    # CONTEXT rows are a sequence, except for experts; tokens of two sequences are independent, so that is no error.
    pairs = zip(x.split(CONTEXT), g.split(CONTEXT), strict=True)
    squares = ((gradients.float().T @ inputs.float()).square() for inputs, gradients in pairs)
    return [(of.sum(1).double().cpu(), of.sum(0).double().cpu()) for of in squares]


def of_checkpoint(
    folder: Path,
    file: Gguf,
    candidates: Mapping[str, Sequence[TensorType]],
    calib: str | Path,
    tokens: int,
    threads: int,
    scratch: Path,
    progress: Callable[[int, int], None],
    device: str = "cpu",
    room: Room | None = None,
) -> dict[str, dict[str, float]]:
    """`measure` on the checkpoint that `file` was made from, on `TOKENS` of at most `tokens` tokens of the text."""
    torch.set_num_threads(threads)
    model = Model(folder, device, room=room)
    count = min(tokens, TOKENS)
    text = model.sample_tokens(count, threads) if calib == "self" else model.read_tokens(Path(calib), count)
    return measure(model, text, file, candidates, scratch, threads, progress)


def measure(
    model: Model,
    tokens: torch.Tensor,
    file: Gguf,
    candidates: Mapping[str, Sequence[TensorType]],
    scratch: Path,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Tensor -> type -> expected divergence added, in nats a token, for int64 `tokens` [sequences, CONTEXT].

    candidates: tensor name of `file` -> types. Left out are tensors that no matrix of the model has the rows of, and
    those that no token reached. scratch: a folder for hidden states. progress: decoder layers done and in all, twice.
    """
    sums: dict[tuple[int, str], _Sums] = {}

    def see(index: int, batch: int, taken: fisher.Seen) -> None:
        for (name, expert), parts in taken.items():
            key = index, name if expert is None else f"{name}[{expert}]"
            for part in itertools.chain.from_iterable(parts):
                sums.setdefault(key, _Sums(*map(torch.zeros_like, part))).add(*part)

    ends = Ends(model, tokens) if any(name in candidates for name in ENDS) else None
    with fisher.workers(threads) as pool:
        for _ in fisher.backward(model, tokens, _take, see, scratch, pool, progress, ends=ends):
            pass
    costs: dict[str, dict[str, float]] = {}

    def keep(tensor: Tensor, found: dict[str, float] | None) -> None:
        if found is not None:
            costs[tensor.name] = {type: float(f"{c / tokens.numel():.3g}") for type, c in found.items()}

    with pieces.alone(threads) as pool:
        for tensor in file.tensors:
            if ends and tensor.name in ENDS and tensor.name in candidates:
                keep(tensor, _cost_of_end(tensor, file, candidates[tensor.name], model, ends, pool.map))
        for index in range(len(model)):
            wanted = [t for t in file.tensors if t.name in candidates and t.name.startswith(f"blk.{index}.")]
            if not wanted:
                continue
            with model.layer(index) as module:
                layers = [layer for layer in moments.layers_of(module) if (index, layer.name) in sums]
                for tensor in wanted:
                    keep(tensor, _cost(tensor, file, candidates[tensor.name], layers, sums, index, pool.map))
    return costs


def _cost(
    tensor: Tensor,
    file: Gguf,
    types: Sequence[TensorType],
    layers: list[moments.Layer],
    sums: Mapping,
    index: int,
    each: solver.Each,
) -> dict[str, float] | None:
    """Type -> divergence in nats, summed over the tokens; of a stack of experts, summed over the experts."""
    total = dict.fromkeys((t.name for t in types), 0.0)
    for rows in each_matrix(file, tensor):
        match = moments.match(rows, layers)
        if match is None:
            if len(tensor.shape) > 2:
                continue  # an expert that no token reached
            return None
        layer, order = match
        _add_cost(total, rows, types, [sums[index, layer.name]], order, each)
    return _usable(total)


def _cost_of_end(
    tensor: Tensor, file: Gguf, types: Sequence[TensorType], model: Model, ends: Ends, each: solver.Each
) -> dict[str, float] | None:
    """The same of the embedding or the output, some rows at a time."""
    total = dict.fromkeys((t.name for t in types), 0.0)
    uses = [_Sums(rows, hessian.diagonal()) for rows, hessian in ends.uses(tensor.name, tied(file))]
    layer = moments.Layer(tensor.name, model.matrix(END_OF[tensor.name]).detach())
    for rows in each_matrix(file, tensor, step(tensor)):
        match = moments.match(rows, [layer])
        if match is None or not uses:
            return None
        _add_cost(total, rows, types, uses, match[1], each)
    return _usable(total)


def _add_cost(
    total: dict[str, float],
    rows: np.ndarray,
    types: Iterable[TensorType],
    uses: Sequence[_Sums],
    order: torch.Tensor,
    each: solver.Each = map,
) -> None:
    """Add what each type costs these rows of a matrix, whose numbers in it are `order`. each: does some of the rows."""
    columns = torch.stack([found.columns for found in uses]).sum(0)
    importance = np.maximum((columns / columns.mean()).float().numpy(), 1e-6)
    means = [float(found.columns.mean()) for found in uses]
    weights = np.stack([(f.columns / mean).float().numpy() for f, mean in zip(uses, means, strict=True)], 1)
    largest = float(np.abs(rows).max())
    for type in types:
        if type.max_abs is not None and largest > type.max_abs:
            total[type.name] = math.inf
            continue
        step = len(rows) if type.columns else solver.rows_together(*rows.shape)
        parts = [rows[first : first + step] for first in range(0, len(rows), step)]
        squares = np.concatenate(list(each(functools.partial(_squares, type, importance, weights), parts)))
        gain = FEEDBACK if families.coder(type, PLAIN) else 1
        for found, mean, of_rows in zip(uses, means, squares.T, strict=True):
            share = (found.rows / found.rows.sum())[order].numpy()
            total[type.name] += gain * float(share @ of_rows) * mean / 2


def _squares(type: TensorType, importance: np.ndarray, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32 [n_rows, n_uses]: each row's squared errors, summed with weights [n_cols, n_uses]."""
    error = families.rounded(torch.from_numpy(rows), type, importance=torch.from_numpy(importance))
    error -= rows
    return np.square(error, out=error) @ weights


def _usable(total: dict[str, float]) -> dict[str, float] | None:
    """Without the types that do not hold the weights; None where nothing costs anything."""
    return {name: cost for name, cost in total.items() if cost < math.inf} if any(total.values()) else None
