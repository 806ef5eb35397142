# SPDX-License-Identifier: MIT
"""Seeing every product of a module's matrices where PyTorch does it, in F.linear, whoever calls it.

And of which tokens: a mixture takes those of an expert out of all by an index, in an order that depends on what else is
in the batch, and then multiplies them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def matrices(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that may be matrices [out, in], or stacks of them, one per expert [experts, out, in]."""
    return {name: p for name, p in module.named_parameters() if p.dim() in (2, 3)}


class Watch(TorchFunctionMode):
    """A context that calls `see(name, expert, x, y, rows)` for each product y = x W^T of one of the module's matrices.

    expert: the number in a stack of matrices, None for a matrix that stands alone. tokens: int64 [sequences, CONTEXT],
    numbers of those that the module is called with; rows: int64 [n], of those that x has, None where it is not known.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        see: Callable[[str, int | None, torch.Tensor, torch.Tensor, torch.Tensor | None], None],
        tokens: torch.Tensor | None = None,
    ):
        super().__init__()
        self.see = see
        self.tokens = torch.empty(0, dtype=torch.long) if tokens is None else tokens.flatten()
        self.taken = self.tokens[:0]  # of these, by the last index
        self.starts: dict[int, tuple[str, int | None, torch.Size]] = {}  # by the address of each matrix
        for name, p in matrices(module).items():
            for expert, weight in [(None, p)] if p.dim() == 2 else enumerate(p):
                self.starts[weight.data_ptr()] = name, expert, weight.shape

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and args[0].numel():
            found = self.starts.get(args[1].data_ptr())
            if found and found[2] == args[1].shape:
                return self.product(*found[:2], *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__ and _takes_rows(args[0], args[1], len(self.tokens)):
            self.taken = self.tokens[args[1].cpu()]
        return result

    def rows_of(self, expert: int | None, x: torch.Tensor) -> torch.Tensor | None:
        """See the class."""
        count = x.shape[:-1].numel()
        if expert is not None and count == len(self.taken):
            return self.taken
        return self.tokens if count == len(self.tokens) else None

    def product(
        self, name: str, expert: int | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the module gets of it."""
        y = torch.nn.functional.linear(x, weight, bias)
        self.see(name, expert, x, y, self.rows_of(expert, x))
        return y


def _takes_rows(x: torch.Tensor, index: Any, count: int) -> bool:
    """Whether x[index] is some rows of the matrix x [count, n]."""
    return isinstance(index, torch.Tensor) and index.dim() == 1 and x.dim() == 2 and len(x) == count > 0
