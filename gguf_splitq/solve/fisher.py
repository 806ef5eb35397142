"""How much each token matters to each matrix: gradients of what the model itself would say next.

A small error dy at a matrix's output changes the model's distribution by the divergence (g . dy)^2 / 2 in expectation,
g being the gradient at that output of log p(label) with the label drawn from the model: the Fisher information. It is
measured on the float model, one decoder layer in memory at a time: forward once, keeping the hidden states between the
layers, then backward, each layer run again with gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .calibrate import Watch
from .model import Model

KEPT = 1 << 30  # bytes of hidden states between the layers that are kept at a time


def visit(
    model: Model,
    tokens: torch.Tensor,
    see: Callable[[int, str, int | None, torch.Tensor, torch.Tensor], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Call `see(layer, name, expert, x, g)` for each matrix and batch of int64 `tokens` [sequences, CONTEXT], in order.

    expert: None unless the matrix is one of a stack. x: the matrix's inputs [rows, in]. g: the gradient at its outputs
    [rows, out] of the log-likelihood summed over the batch. Labels are drawn with a fixed seed. progress: decoder
    layers done and in all, forwards and backwards.
    """
    sequence = tokens.shape[1] * model.module.get_input_embeddings().embedding_dim * model.dtype.itemsize
    parts = tokens.split(max(8, KEPT // (sequence * (len(model) + 1)) // 8 * 8))
    steps = iter(range(1, 2 * len(model) * len(parts) + 1))
    random = torch.Generator(model.device).manual_seed(0)
    for part in parts:
        boundaries = [model.inputs(part)]
        for index in range(len(model)):
            with model.layer(index) as layer, torch.no_grad():
                boundaries.append([model.forward(layer, index, x).to(x.device) for x in boundaries[-1]])
            progress(next(steps), 2 * len(model) * len(parts))
        gradients = [_at_the_head(model, hidden, random) for hidden in boundaries.pop()]
        for index in reversed(range(len(model))):
            with model.layer(index) as layer:
                for batch, hidden in enumerate(boundaries.pop()):
                    gradients[batch] = _through(model, layer, index, hidden, gradients[batch], see)
            progress(next(steps), 2 * len(model) * len(parts))


def token_weights(
    model: Model, tokens: torch.Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[tuple[int, str], torch.Tensor]:
    """(layer, name) -> float32 [sequences * CONTEXT] |g|^2 of each token, 1 on average.

    Experts of a mixture have none: behind a quantized prefix other tokens may be routed to them.
    """
    found: dict[tuple[int, str], list[torch.Tensor]] = {}

    def see(index: int, name: str, expert: int | None, x: torch.Tensor, g: torch.Tensor) -> None:
        if expert is None:
            found.setdefault((index, name), []).append(g.float().square().sum(1).cpu())

    visit(model, tokens, see, progress)
    weights = {key: torch.cat(parts) for key, parts in found.items()}
    return {key: w / w.mean() for key, w in weights.items() if len(w) == tokens.numel() and w.any()}


def _at_the_head(model: Model, hidden: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The gradient at the hidden states [batch, CONTEXT, hidden] after the last layer, on the CPU."""
    gradients = []
    for sequence in hidden.split(1):  # the logits of a batch would be the largest tensor of all
        with torch.enable_grad():
            sequence = sequence.to(model.device).requires_grad_()
            logits = model.head(sequence).flatten(0, 1).log_softmax(-1)
            labels = torch.multinomial(logits.detach().exp(), 1, generator=random)
            likelihood = logits.gather(1, labels).sum()
        gradients.append(torch.autograd.grad(likelihood, sequence)[0].cpu())
    return torch.cat(gradients)


def _through(model: Model, layer, index: int, hidden: torch.Tensor, gradient: torch.Tensor, see) -> torch.Tensor:
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
    return first.cpu()
