# SPDX-License-Identifier: MIT
"""Inputs and gradients of every matrix of a model, on calibration tokens, one decoder layer in memory at a time.

A small error dy at a matrix's output changes the model's distribution by the divergence (g . dy)^2 / 2 in expectation,
g being the gradient at that output of log p(label) with the label drawn from the model: the Fisher information. Of an
encoder, it turns the sequence's vector v, the normalised mean of its outputs, by |dv|^2 = (g . dy)^2 in expectation, g
being the gradient of r . v for a random direction r. The model runs forward once, the hidden states between the layers
kept in a file, or on the GPU where there is room, then backward, each layer run again with gradients.

A sum in floating point depends on how many threads share it. So none is shared: a sequence goes to a thread, a thread
computes alone, and what threads give is joined in the order of the sequences. A GPU takes a batch whole, if it can.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from ..errors import InputError
from .model import BATCH, CONTEXT, Model, OnDisk
from .watch import Watch

T = TypeVar("T")
Take = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]
Seen = Mapping[tuple[str, int | None], Sequence[Any]]
See = Callable[[int, int, Seen], None]


class Ends(Protocol):
    """Who wants to see the embedding and the output too; `ends.py` says what they are."""

    def take(self, x: torch.Tensor, g: torch.Tensor) -> Any:
        """As `take` of `backward`, for a part of a sequence at the output, in order; called by workers."""

    def see_output(self, batch: int, taken: Sequence[Any], pool: ThreadPoolExecutor) -> None:
        """What `take` returned of a sequence, in order."""

    def see_embedding(self, batch: int, hidden: torch.Tensor, gradient: torch.Tensor, pool: ThreadPoolExecutor) -> None:
        """Hidden states [sequences, CONTEXT, hidden] before the first layer, and the gradient there."""


def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that compute alone, whatever they are given; at most BATCH, for which memory is stated."""
    return ThreadPoolExecutor(min(threads, BATCH), "calibrate", lambda: torch.set_num_threads(1))


def backward(
    model: Model,
    tokens: torch.Tensor | Sequence[torch.Tensor],
    take: Take,
    see: See,
    scratch: Path,
    pool: ThreadPoolExecutor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    before: Mapping[int, int] = MappingProxyType({}),
    ends: Ends | None = None,
) -> Iterator[tuple[int, torch.nn.Module]]:
    """Yields (layer, its loaded module) from the last to the first, once `see` was called for all batches.

    tokens: int64 [sequences, CONTEXT], or batches of them, the first one the largest. take(x, g, numbers) comes from a
    worker for each matrix and part of a batch. x: the matrix's inputs [rows, in]. g: the gradient at its outputs [rows,
    out] of the log-likelihood, its labels drawn with a fixed seed. numbers: int64 [rows], of the tokens in the batch;
    None where that is not known. see(layer, batch, taken) comes for each batch, in order: what
    `take` returned by (matrix, expert), in the order of the sequences; an empty list where no gradient reached the
    matrix. expert: None unless the matrix is one of a stack. scratch: the folder for hidden states, `scratch_bytes` of
    them. progress: decoder layers done and in all, forwards and backwards. before: how many sequences of other
    processes come before a batch, so that each sequence draws the same labels whoever runs it. ends: is shown the
    embedding and the output; not those of an encoder.
    Raises InputError when an activation is NaN or Inf.
    """
    boundaries = [model.inputs(tokens, scratch)]
    for index in range(len(model)):
        after = OnDisk(scratch, model.room)
        with model.layer(index, index + 1) as layer:
            through_it = functools.partial(forward, model, layer, index)
            for hidden in boundaries[-1]:
                after.append(torch.cat(each_part(model, pool, through_it, hidden)))
            check(model, layer, index, boundaries[-1])
        boundaries.append(after)
        progress(index + 1, 2 * len(model))
    random = torch.Generator(model.device).manual_seed(0)
    gradients = OnDisk(scratch, model.room)
    with model.heads() as head:
        for batch, hidden in enumerate(boundaries.pop()):
            for _ in range(before.get(batch, 0)):
                _chance(model, random)
            if model.encoder:
                gradients.append(_at_the_vector(head, model, hidden, random, pool))
                continue
            first, seen = _at_the_head(head, model, hidden, random, pool, ends.take if ends else None)
            gradients.append(first)
            if ends:
                for sequence in seen:
                    ends.see_output(batch, sequence, pool)
    for index in reversed(range(len(model))):
        with model.layer(index, index - 1) as layer:
            through = functools.partial(_through, model, layer, index, take)
            for batch, hidden in enumerate(boundaries.pop()):
                parts = each_part(model, pool, through, hidden, gradients[batch], numbers(hidden))
                earlier, taken = zip(*parts, strict=True)
                gradients[batch] = torch.cat(earlier)
                if index == 0 and ends:
                    ends.see_embedding(batch, hidden, gradients[batch], pool)
                see(index, batch, _joined(taken))
                del taken
            yield index, layer
        progress(2 * len(model) - index, 2 * len(model))


def scratch_bytes(layers: int, tokens: int, width: int, dtype: torch.dtype) -> int:
    """What `backward` keeps in files: hidden states before and after each layer, and gradients."""
    return (layers + 2) * tokens * width * dtype.itemsize


def numbers(hidden: torch.Tensor) -> torch.Tensor:
    """int64 [sequences, CONTEXT] of a batch of hidden states: its tokens' numbers."""
    return torch.arange(hidden.shape[:2].numel()).view(hidden.shape[:2])


def each_part(model: Model, pool: Executor, work: Callable[..., T], *batches: torch.Tensor) -> list[T]:
    """What `work` gives of each part of these batches, in order: a sequence to a worker, or what a GPU has room for.

    Once its memory runs out a GPU takes half as much, here and from then on, all of the batch anew.
    torch.OutOfMemoryError when one sequence is too much.
    """
    if model.at_once is None:
        return list(pool.map(work, *(batch.split(1) for batch in batches)))
    while True:
        at_once = model.at_once
        try:
            return [work(*part) for part in zip(*(batch.split(at_once) for batch in batches), strict=True)]
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        model.at_once = model.room.half(at_once, BATCH)


def forward(model: Model, layer: torch.nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states after a layer. Of a GPU `check` learns later whether they are finite: it is not waited for."""
    with torch.no_grad():
        output = model.forward(layer, index, hidden)
        finite = torch.isfinite(output).all()
        if model.at_once:
            model.finite.append(finite)
        elif not finite:
            _refuse(model, layer, index, [hidden])
        return output


def check(model: Model, layer: torch.nn.Module, index: int, inputs: Iterable[torch.Tensor] = ()) -> None:
    """Raises InputError when what `forward` gave since the last call has NaN or Inf; inputs: where it may come from."""
    sound = not model.finite or bool(torch.stack(model.finite).all())
    model.finite.clear()
    if not sound:
        _refuse(model, layer, index, inputs)


def _refuse(model: Model, layer: torch.nn.Module, index: int, inputs: Iterable[torch.Tensor]) -> NoReturn:
    with torch.no_grad(), Watch(layer, _finite(index)):  # which names the matrix
        for hidden in inputs:
            model.forward(layer, index, hidden)
    raise InputError(f"decoder layer {index}: an activation is NaN or Inf: check the checkpoint")


def _finite(index: int) -> Callable:
    def check(name: str, expert: int | None, x: torch.Tensor, y: torch.Tensor, _: torch.Tensor | None) -> None:
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            where = f"decoder layer {index}, {name.removesuffix('.weight')}"
            raise InputError(f"{where}: an activation is NaN or Inf: check the checkpoint")

    return check


def _at_the_head(
    head: Callable,
    model: Model,
    hidden: torch.Tensor,
    random: torch.Generator,
    pool: ThreadPoolExecutor,
    take: Callable[[torch.Tensor, torch.Tensor], Any] | None,
) -> tuple[torch.Tensor, list[list[Any]]]:
    """The gradient at the hidden states [batch, CONTEXT, hidden] after the last layer.

    And of each sequence what `take` makes of the output matrix's parts; nothing where the model has no such matrix.
    """
    device, output = model.device, model.module.get_output_embeddings()

    def gradient(hidden: torch.Tensor, chance: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        calls: list[tuple] = []
        watch = Watch(output, lambda *call: calls.append(call)) if take and output else contextlib.nullcontext()
        with torch.enable_grad(), watch:
            hidden = hidden.detach().to(device).requires_grad_()
            logits = head(hidden).flatten(0, 1)
        p = logits.detach().softmax(-1)
        up_to = p.cumsum(-1)
        labels = torch.searchsorted(up_to, chance * up_to[:, -1:], right=True).clamp_(max=p.shape[1] - 1)
        slope = p.neg_().scatter_add_(1, labels, torch.ones_like(chance))  # of log p(label) by the logits
        del up_to  # as large as the logits
        first, *rest = torch.autograd.grad(logits, [hidden, *(y for _, _, _, y, _ in calls)], slope)
        if take is None:
            return first, []
        return first, [take(x.flatten(0, -2), g.flatten(0, -2)) for (_, _, x, *_), g in zip(calls, rest, strict=True)]

    gradients, taken = [], []
    for sequence in hidden.split(1):  # the logits of a batch would be the largest tensor of all
        chance = _chance(model, random, sequence.shape[1])
        few = CONTEXT if model.at_once else CONTEXT // BATCH  # so that all workers have one sequence's logits
        parts, found = zip(*pool.map(gradient, sequence.split(few, 1), chance.split(few)), strict=True)
        gradients.append(torch.cat(parts, 1))
        taken.append(list(itertools.chain.from_iterable(found)))
    return torch.cat(gradients), taken


def _at_the_vector(
    head: Callable, model: Model, hidden: torch.Tensor, random: torch.Generator, pool: ThreadPoolExecutor
) -> torch.Tensor:
    """`_at_the_head` of an encoder."""

    def gradient(hidden: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            hidden = hidden.detach().to(model.device).requires_grad_()
            found = vectors(head(hidden))
        return torch.autograd.grad(found, hidden, direction)[0]

    sequences = hidden.split(1)
    return torch.cat(list(pool.map(gradient, sequences, [_chance(model, random) for _ in sequences])))


def vectors(outputs: torch.Tensor) -> torch.Tensor:
    """float32 [sequences, hidden] of an encoder's outputs [sequences, tokens, hidden]: their means, of length 1."""
    return torch.nn.functional.normalize(outputs.mean(1), dim=-1)


def _chance(model: Model, random: torch.Generator, tokens: int = CONTEXT) -> torch.Tensor:
    """What a sequence draws labels with, float32 [tokens, 1] from 0 to 1; of an encoder its direction [1, hidden]."""
    if model.encoder:
        width = model.module.get_input_embeddings().embedding_dim
        return torch.randn(1, width, generator=random, device=random.device)
    return torch.rand(tokens, 1, generator=random, device=random.device)


def _through(
    model: Model,
    layer: torch.nn.Module,
    index: int,
    take: Take,
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, list[tuple[tuple[str, int | None], Any]]]:
    """The gradient at the layer's input, from that at its output, and what is taken of its matrices on the way."""
    calls = []
    with torch.enable_grad(), Watch(layer, lambda *call: calls.append(call), tokens):
        hidden = hidden.detach().to(model.device).requires_grad_()
        output = model.forward(layer, index, hidden)
    wanted = [hidden, *(y for _, _, _, y, _ in calls)]
    first, *rest = torch.autograd.grad(output, wanted, gradient.to(model.device), allow_unused=True)
    taken = []
    for (name, expert, x, _, rows), g in zip(calls, rest, strict=True):
        taken.append(((name, expert), None if g is None else take(x.detach().flatten(0, -2), g.flatten(0, -2), rows)))
    return first, taken


def _joined(taken: Sequence[list[tuple[tuple[str, int | None], Any]]]) -> dict[tuple[str, int | None], list[Any]]:
    """By matrix, in the order of the sequences."""
    joined: dict[tuple[str, int | None], list[Any]] = {}
    for part in taken:
        for key, value in part:
            joined.setdefault(key, []).extend([] if value is None else [value])
    return joined
