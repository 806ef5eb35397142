# SPDX-License-Identifier: MIT
"""Seeing every product of a module's matrices where PyTorch does it, in F.linear, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def matrices(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that may be matrices [out, in], or stacks of them, one per expert [experts, out, in]."""
    return {name: p for name, p in module.named_parameters() if p.dim() in (2, 3)}


class Watch(TorchFunctionMode):
    """A context that calls `see(name, expert, x, y)` for each product y = x W^T of one of the module's matrices.

    expert: the number in a stack of matrices, None for a matrix that stands alone.
    """

    def __init__(self, module: torch.nn.Module, see: Callable[[str, int | None, torch.Tensor, torch.Tensor], None]):
        super().__init__()
        self.see = see
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
        return func(*args, **(kwargs or {}))

    def product(
        self, name: str, expert: int | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the module gets of it."""
        y = torch.nn.functional.linear(x, weight, bias)
        self.see(name, expert, x, y)
        return y
