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

Error feedback is not run for this: it lowers the divergence of sq4, sq3 and sq2 by nearly the same factor, `FEEDBACK`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..coding import formats
from ..files.gguf_file import Gguf, Tensor
from ..rewrite import each_matrix
from ..types import TensorType
from . import fisher, moments
from .model import CONTEXT, Model

TOKENS = 8192  # of the calibration text
FEEDBACK = 0.64  # divergence of a type with error feedback / with an importance matrix: sq4 0.64, sq3 0.66, sq2 0.63


@dataclass
class _Sums:
    """Sums of G^2 over the sequences. rows: float64 [out]; columns: float64 [in]."""

    rows: torch.Tensor | float = 0.0
    columns: torch.Tensor | float = 0.0

    def add(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self.rows, self.columns = self.rows + rows, self.columns + columns


def _take(x: torch.Tensor, g: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
) -> dict[str, dict[str, float]]:
    """`measure` on the checkpoint that `file` was made from, on `TOKENS` of at most `tokens` tokens of the text."""
    torch.set_num_threads(threads)
    model = Model(folder, device)
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
                sums.setdefault(key, _Sums()).add(*part)

    with fisher.workers(threads) as pool:
        for _ in fisher.backward(model, tokens, _take, see, scratch, pool, progress):
            pass
    costs: dict[str, dict[str, float]] = {}
    for index in range(len(model)):
        wanted = [t for t in file.tensors if t.name in candidates and t.name.startswith(f"blk.{index}.")]
        if not wanted:
            continue
        with model.layer(index) as module:
            layers = [layer for layer in moments.layers_of(module) if (index, layer.name) in sums]
            for tensor in wanted:
                found = _cost(tensor, file, candidates[tensor.name], layers, sums, index)
                if found is not None:
                    costs[tensor.name] = {type: float(f"{c / tokens.numel():.3g}") for type, c in found.items()}
    return costs


def _cost(
    tensor: Tensor, file: Gguf, types: Sequence[TensorType], layers: list[moments.Layer], sums: Mapping, index: int
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
        found = sums[index, layer.name]
        share, mean = (found.rows / found.rows.sum())[order].numpy(), float(found.columns.mean())
        columns = (found.columns / mean).float().numpy()
        for type in types:
            error = type.decode(type.encode(rows, np.maximum(columns, 1e-6)))
            error -= rows
            gain = FEEDBACK if formats.for_type(type) else 1
            total[type.name] += gain * float(share @ (np.square(error, out=error) @ columns)) * mean / 2
    return total if any(total.values()) else None
