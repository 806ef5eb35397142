"""Calibration: the Hessian of every matrix, and which matrix a GGUF tensor is.

The Hessian is the second moment of a matrix's inputs, each token counted by its Fisher information |g|^2 (fisher.py):
what an error at this token costs the model's output. Products are float32 per batch, their sum is float64. The huge
activations of a sequence's first token stay in: without, the result measured worse. An expert that saw fewer tokens
than it has columns takes the moments of all experts together.

GGUF tensors are found by content, not by name: the rows of a GGUF matrix are rows of one matrix here, in any order
(llama.cpp reorders those of Q and K), and perhaps not all of them (it splits what transformers fuses). What no matrix
has is left to nearest rounding and is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import fisher
from .model import Model
from .watch import matrices


@dataclass
class Layer:
    """One matrix, ready to be solved. weight: [out, in], the model's own; hessian: float64 [in, in], None if unknown.

    pooled: the Hessian is that of all experts, because this one saw too few tokens. keys: row content -> row numbers.
    """

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor | None = None
    pooled: bool = False
    keys: dict[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self):
        self.keys = defaultdict(list)
        for row, key in enumerate(_row_keys(self.weight)):
            self.keys[key].append(row)


def run(
    model: Model,
    tokens: torch.Tensor,
    scratch: Path,
    skip: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, list[Layer]]]:
    """Yields (decoder layer, its matrices with their Hessians), the last layer first; those in `skip` are left out.

    Arguments and errors as of `fisher.backward`.
    """
    moments: dict[tuple[str, int | None], _Moment] = {}

    def see(index: int, name: str, expert: int | None, x: torch.Tensor, g: torch.Tensor) -> None:
        if index not in skip:
            moments.setdefault((name, expert), _Moment()).add(x, g)

    for index, module in fisher.backward(model, tokens, see, scratch, progress):
        if index not in skip:
            layers = layers_of(module)
            for layer in layers:
                _measured(layer, moments)
            yield index, layers
        moments.clear()


def layers_of(module: torch.nn.Module) -> list[Layer]:
    """All that may be a matrix of a decoder layer, experts as NAME[NUMBER], without Hessians."""
    found = []
    for name, p in matrices(module).items():
        found += [Layer(name, p.data)] if p.dim() == 2 else [Layer(f"{name}[{i}]", w) for i, w in enumerate(p.data)]
    return found


def match(gguf_rows: np.ndarray, layers: list[Layer]) -> tuple[Layer, torch.Tensor] | None:
    """The layer that has all of `gguf_rows` float32 [n_rows, n_cols], and their numbers in it, or None."""
    wanted = _row_keys(torch.from_numpy(gguf_rows))
    for layer in layers:
        if layer.weight.shape[1] != gguf_rows.shape[1] or wanted[0] not in layer.keys:
            continue
        unused = {key: iter(layer.keys[key]) for key in wanted if key in layer.keys}  # equal rows are used in turn
        rows = [next(unused.get(key, iter(())), -1) for key in wanted]
        if min(rows) >= 0:
            return layer, torch.tensor(rows)
    return None


def _row_keys(rows: torch.Tensor) -> list[int]:
    """Compared in bfloat16, so that neither the compute nor the stored precision matters."""
    rows = rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return [hash(row.tobytes()) for row in rows]


@dataclass
class _Moment:
    """total: float64, the sum of |g|^2 x x^T over `count` tokens; information: the sum of |g|^2."""

    total: torch.Tensor | float = 0.0
    information: float = 0.0
    count: int = 0

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        x, information = x.float(), g.float().square().sum(1)
        self.total = self.total + (x.T @ (x * information[:, None])).double()
        self.information += float(information.sum())
        self.count += len(x)

    def mean(self) -> torch.Tensor | None:
        return self.total / self.information if self.information else None


def _measured(layer: Layer, moments: dict[tuple[str, int | None], _Moment]) -> None:
    """Gives a layer its Hessian."""
    name, _, number = layer.name.rstrip("]").partition("[")
    if not number:
        layer.hessian = moments[name, None].mean() if (name, None) in moments else None
        return
    own = moments.get((name, int(number)))
    layer.pooled = own is None or own.count < layer.weight.shape[1]
    if not layer.pooled:
        layer.hessian = own.mean()
    elif all_of := [m for (n, expert), m in moments.items() if n == name and expert is not None]:
        layer.hessian = _Moment(sum(m.total for m in all_of), sum(m.information for m in all_of)).mean()
