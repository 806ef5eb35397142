"""Calibration: the inputs of every linear layer of a decoder layer, behind the quantized prefix.

Whatever multiplies the hidden states by a matrix is seen where PyTorch does it, in F.linear, whether the matrix is a
module's or one expert's slice of a stacked parameter. The second moments X^T X of its inputs are added up in float32
per batch and float64 in all. The huge activations of a sequence's first token stay in them: without, the result
measured worse. An expert that saw fewer tokens than it has columns takes the moments of all experts together.

GGUF tensors are found by content, not by name: the rows of a GGUF matrix are rows of one matrix here, in any order
(llama.cpp reorders those of Q and K), and perhaps not all of them (it splits what transformers fuses). What no matrix
has is left to nearest rounding and is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    hessian: torch.Tensor
    pooled: bool = False
    keys: dict[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self):
        self.keys = defaultdict(list)
        for row, key in enumerate(_row_keys(self.weight)):
            self.keys[key].append(row)


@torch.no_grad()
def layers_of(model: Model, module: torch.nn.Module, index: int, states: Sequence[torch.Tensor]) -> list[Layer]:
    """The matrices that decoder layer `index`, loaded as `module`, applies to `states` (those entering the layer).

    Raises InputError when an activation is NaN or Inf.
    """
    with _Moments(module) as seen:
        for state in states:
            model.forward(module, index, state)
    layers = []
    for name, parameter in seen.parameters.items():
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
            layers.append(Layer(name, parameter.data, moments[0].mean()))
            continue
        pooled = None
        for expert, weight in enumerate(parameter.data):
            own = moments.get(expert)
            if few := own is None or own.count < weight.shape[1]:
                pooled = pooled if pooled is not None else _pool(moments.values())
            layers.append(Layer(f"{name}[{expert}]", weight, pooled if few else own.mean(), few))
    return layers


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
    """total: float64 X^T X of `count` rows X."""

    total: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).float()
        self.total += rows.T @ rows
        self.count += len(rows)

    def mean(self) -> torch.Tensor:
        return self.total / max(self.count, 1)


def _pool(moments) -> torch.Tensor:
    return sum(moment.total for moment in moments) / max(sum(moment.count for moment in moments), 1)


class _Moments(TorchFunctionMode):
    """Watches F.linear. moments: parameter -> expert (0 when it is one matrix) -> moment.

    Matrices fed by the same tensor (Q, K and V; gate and up) share one.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.parameters = {name: p for name, p in module.named_parameters() if p.dim() in (2, 3)}
        self.starts: dict[int, tuple[str, int]] = {}  # address of each matrix
        for name, p in self.parameters.items():
            for expert, weight in enumerate(p if p.dim() == 3 else [p]):
                self.starts[weight.data_ptr()] = name, expert
        self.moments: dict[str, dict[int, _Moment]] = defaultdict(dict)
        self.last: tuple[torch.Tensor | None, _Moment | None] = (None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            self._see(*args[:2])
        return func(*args, **(kwargs or {}))

    def _see(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        name, expert = self.starts.get(weight.data_ptr(), (None, 0))
        if name is None or weight.shape != self.parameters[name].shape[-2:] or not x.numel():
            return
        moments = self.moments[name]
        if x is self.last[0]:
            moments.setdefault(expert, self.last[1])
            return
        if expert not in moments:
            moments[expert] = _Moment(torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device))
        moments[expert].add(x)
        self.last = (x, moments[expert])
