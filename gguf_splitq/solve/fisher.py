"""Inputs and gradients of every matrix of a model, on calibration tokens, one decoder layer in memory at a time.

A small error dy at a matrix's output changes the model's distribution by the divergence (g . dy)^2 / 2 in expectation,
g being the gradient at that output of log p(label) with the label drawn from the model: the Fisher information. The
model runs forward once, the hidden states between the layers kept in a file, then backward, each layer run again with
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..errors import InputError
from .model import Model, OnDisk
from .watch import Watch

See = Callable[[int, str, int | None, torch.Tensor, torch.Tensor], None]


def backward(
    model: Model,
    tokens: torch.Tensor,
    see: See,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yields (layer, its loaded module) from the last to the first, once `see` was called for all of its matrices.

    see(layer, name, expert, x, g) comes for each matrix and batch of int64 `tokens` [sequences, CONTEXT], in order.
    expert: None unless the matrix is one of a stack. x: the matrix's inputs [rows, in]. g: the gradient at its outputs
    [rows, out] of the log-likelihood summed over the batch, its labels drawn with a fixed seed. scratch: the folder
    for hidden states, `scratch_bytes` of them. progress: decoder layers done and in all, forwards and backwards.
    Raises InputError when an activation is NaN or Inf.
    """
    boundaries = [model.inputs(tokens, scratch)]
    for index in range(len(model)):
        after = OnDisk(scratch)
        with model.layer(index) as layer, torch.no_grad():
            for hidden in boundaries[-1]:
                output = model.forward(layer, index, hidden)
                if not torch.isfinite(output).all():
                    with Watch(layer, _finite(index)):  # where it comes from
                        model.forward(layer, index, hidden)
                    raise InputError(f"decoder layer {index}: an activation is NaN or Inf: check the checkpoint")
                after.append(output)
        boundaries.append(after)
        progress(index + 1, 2 * len(model))
    random = torch.Generator(model.device).manual_seed(0)
    gradients = OnDisk(scratch)
    for hidden in boundaries.pop():
        gradients.append(_at_the_head(model, hidden, random))
    for index in reversed(range(len(model))):
        with model.layer(index) as layer:
            for batch, hidden in enumerate(boundaries.pop()):
                gradients[batch] = _through(model, layer, index, hidden, gradients[batch], see)
            yield index, layer
        progress(2 * len(model) - index, 2 * len(model))


def scratch_bytes(layers: int, tokens: int, width: int, dtype: torch.dtype) -> int:
    """What `backward` keeps in files: hidden states before and after each layer, and gradients."""
    return (layers + 2) * tokens * width * dtype.itemsize


def _finite(index: int) -> Callable:
    def check(name: str, expert: int | None, x: torch.Tensor, y: torch.Tensor) -> None:
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            where = f"decoder layer {index}, {name.removesuffix('.weight')}"
            raise InputError(f"{where}: an activation is NaN or Inf: check the checkpoint")

    return check


def _at_the_head(model: Model, hidden: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The gradient at the hidden states [batch, CONTEXT, hidden] after the last layer."""
    gradients = []
    for sequence in hidden.split(1):  # the logits of a batch would be the largest tensor of all
        with torch.enable_grad():
            sequence = sequence.to(model.device).requires_grad_()
            logits = model.head(sequence).flatten(0, 1)
        p = logits.detach().softmax(-1)
        up_to = p.cumsum(-1)
        drawn = torch.rand(len(p), 1, generator=random, device=p.device) * up_to[:, -1:]
        labels = torch.searchsorted(up_to, drawn, right=True).clamp_(max=p.shape[1] - 1)
        slope = p.neg_().scatter_add_(1, labels, torch.ones_like(drawn))  # of log p(label) by the logits
        gradients.append(torch.autograd.grad(logits, sequence, slope)[0])
    return torch.cat(gradients)


def _through(
    model: Model, layer: torch.nn.Module, index: int, hidden: torch.Tensor, gradient: torch.Tensor, see: See
) -> torch.Tensor:
    """The gradient at the layer's input, from that at its output; the matrices are seen on the way."""
    calls = []
    with torch.enable_grad(), Watch(layer, lambda *call: calls.append(call)):
        hidden = hidden.to(model.device).requires_grad_()
        output = model.forward(layer, index, hidden)
    wanted = [hidden, *(y for _, _, _, y in calls)]
    first, *rest = torch.autograd.grad(output, wanted, gradient.to(model.device), allow_unused=True)
    for (name, expert, x, _), g in zip(calls, rest, strict=True):
        if g is not None:
            see(index, name, expert, x.detach().flatten(0, -2), g.flatten(0, -2))
    return first
