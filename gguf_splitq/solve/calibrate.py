"""Calibration: the inputs of every linear layer of a decoder layer, behind the quantized prefix.

Whatever multiplies the hidden states by a matrix is seen where PyTorch does it, in F.linear, whether the matrix is a
module's or one expert's slice of a stacked parameter. The second moments X^T X of its inputs, each token counted by
what it matters (fisher.py), are added up in float32 per batch and float64 in all. The huge activations of a sequence's
first token stay in them: without, the result measured worse. An expert that saw fewer tokens than it has columns takes
the moments of all experts together.

GGUF tensors are found by content, not by name: the rows of a GGUF matrix are rows of one matrix here, in any order
(llama.cpp reorders those of Q and K), and perhaps not all of them (it splits what transformers fuses). What no matrix
has is left to nearest rounding and is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from .model import Model


@dataclass
class Layer:
    """One matrix, ready to be solved. weight: [out, in], the model's own; hessian: float64 [in, in].

    pooled: the Hessian is that of all experts, because this one saw too few tokens. keys: row content -> row numbers,
    as the rows were before anything was solved.
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


@torch.no_grad()
def layers_of(
    model: Model,
    module: torch.nn.Module,
    index: int,
    states: Sequence[torch.Tensor],
    weights: Mapping[tuple[int, str], torch.Tensor] | None = None,
) -> list[Layer]:
    """The matrices that decoder layer `index`, loaded as `module`, applies to `states` (those entering the layer).

    weights: (layer, name) -> float32 [tokens], what each token counts; 1 where there is none.
    Raises InputError when an activation is NaN or Inf.
    """
    seen = _Moments(module, {name: w for (i, name), w in (weights or {}).items() if i == index})
    with Watch(module, seen.see):
        for state in states:
            model.forward(module, index, state)
    layers = []
    for name, parameter in matrices(module).items():
        moments = seen.moments.get(name, {})
        if not moments:
            continue  # not a matrix, or nothing went through it
        for moment in moments.values():
            if not torch.isfinite(moment.total).all():
                raise InputError(
                    f"decoder layer {index}, {name.removesuffix('.weight')}: an activation is NaN or Inf: "
                    "check the checkpoint"
                )
        if parameter.dim() == 2:
            layers.append(Layer(name, parameter.data, moments[None].mean()))
            continue
        pooled = None
        for expert, weight in enumerate(parameter.data):
            own = moments.get(expert)
            if few := own is None or own.count < weight.shape[1]:
                pooled = pooled if pooled is not None else _pool(moments.values())
            layers.append(Layer(f"{name}[{expert}]", weight, pooled if few else own.mean(), few))
    return layers


def bare_layers_of(module: torch.nn.Module) -> list[Layer]:
    """All that may be a matrix of a decoder layer, without Hessians, by the names that `layers_of` gives."""
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


def matrices(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that may be matrices [out, in], or stacks of them, one per expert [experts, out, in]."""
    return {name: p for name, p in module.named_parameters() if p.dim() in (2, 3)}


class Watch(TorchFunctionMode):
    """Calls `see(name, expert, x, y)` for each product y = x W^T of one of the module's matrices, in order.

    expert: the number in a stack of matrices, None for a matrix that stands alone.
    """

    def __init__(self, module: torch.nn.Module, see: Callable[[str, int | None, torch.Tensor, torch.Tensor], None]):
        super().__init__()
        self.see = see
        self.starts: dict[int, tuple[str, int | None, torch.Size]] = {}  # by the address of each matrix
        for name, p in matrices(module).items():
            for expert, weight in [(None, p)] if p.dim() == 2 else enumerate(p):
                self.starts[weight.data_ptr()] = name, expert, weight.shape

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[0].numel():
            name, expert, shape = self.starts.get(args[1].data_ptr(), (None, None, None))
            if shape == args[1].shape:
                self.see(name, expert, args[0], result)
        return result


@dataclass
class _Moment:
    """total: float64 X^T X of `count` rows X."""

    total: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
        rows = rows.float()
        self.total += rows.T @ (rows if weights is None else rows * weights[:, None].to(rows.device))
        self.count += len(rows)

    def mean(self) -> torch.Tensor:
        return self.total / max(self.count, 1)


def _pool(moments) -> torch.Tensor:
    return sum(moment.total for moment in moments) / max(sum(moment.count for moment in moments), 1)


class _Moments:
    """moments: name -> expert -> moment. Matrices fed by one tensor (experts' gate and up) share one if unweighted."""

    def __init__(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]):
        self.weights = weights
        self.moments: dict[str, dict[int | None, _Moment]] = defaultdict(dict)
        self.last: tuple[torch.Tensor | None, _Moment | None] = (None, None)

    def see(self, name: str, expert: int | None, x: torch.Tensor, y: torch.Tensor) -> None:
        moments, weights = self.moments[name], self.weights.get(name)
        if weights is None and x is self.last[0]:
            moments.setdefault(expert, self.last[1])
            return
        if expert not in moments:
            moments[expert] = _Moment(torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device))
        rows, done = x.flatten(0, -2), moments[expert].count
        moments[expert].add(rows, None if weights is None else weights[done : done + len(rows)])
        if weights is None:
            self.last = (x, moments[expert])
