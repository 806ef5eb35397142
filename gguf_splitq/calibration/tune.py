# SPDX-License-Identifier: MIT
"""Training what is stored of a quantized model (`--tune`): block scales, norm weights, and the codes if wanted.

The model is trained as a whole to give the float model's distribution (mean KL divergence over all positions, Adam, a
cosine to zero), on the calibration text and, in a longer run, on text drawn from the float model: without that codes
learn the text by heart. Other text decides whether the result is taken: if it diverges more than before, the file stays
as it was. training.py has what is trained of a matrix; of formats with side tensors norms alone are.

The float model is run once, layer by layer: what its last layer gives for each token is kept. Of the quantized one its
codes and what trains them are in memory, and hidden states between its layers. On a GPU the weights of a layer are made
when it is run, and made and run again on the way back (checkpointing, Chen et al., arXiv 1604.06174). On a CPU, which
has more memory than time, they stay until then, with all that the layer has computed. A step is taken as soon as a
layer's gradient is there.

A sequence has its place in a batch, and a process has some of the places. On a CPU a sequence is run by one thread, and
rows of a matrix are trained by one; so neither the number of threads shows, nor, but for rounding, that of processes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import kl_div
from torch.overrides import TorchFunctionMode

from ..coding import formats
from ..files.gguf_file import Gguf, require_space
from ..plan import Entry
from ..rewrite import Rows, each_matrix, read_float32, to_float32
from . import fisher, layerwise, moments, training
from .model import BATCH, CONTEXT, Model, OnDisk
from .moments import Key
from .ranks import ALONE, Alone
from .stored import decoded, rounded
from .training import (
    HELD_OUT,
    Adam,
    Bundle,
    Call,
    Part,
    Piece,
    Products,
    Quantized,
    Step,
    by_bits,
    noises,
)
from .watch import matrices

STEPS = {"scales": 64, "codes": 640, "layers": layerwise.STEPS}  # by what is trained, each layer of the last
DRAWN = 1 << 20  # tokens that the model draws, at most
PASSES = 2  # over the calibration text before more is drawn
RATES = {"scales": 3e-3, "codes": 1e-3}  # of scales and norms, relative to their own size, by what is trained
CODE_RATES = {3.0: 3e-3, 4.0: 2e-3, math.inf: 2e-4}  # of codes, in mean gaps of levels, below so many bits a weight

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Given:
    """What the first process has. rows: tensor name -> uint8 [n_rows, row_bytes] as solved."""

    file: Gguf
    entries: Sequence[Entry]
    rows: Mapping[str, Rows]


def drawn(steps: int, tokens: int) -> int:
    """How many tokens are to be drawn from the model for so many steps, beside a calibration text of `tokens`."""
    return min(max(steps * BATCH * CONTEXT - PASSES * tokens, 0), DRAWN) // CONTEXT * CONTEXT


def run(
    model: Callable[[], Model],
    given: Given | None,
    tokens: torch.Tensor,
    held: torch.Tensor,
    what: str,
    steps: int,
    scratch: Path,
    threads: int,
    progress: Progress = lambda what, done, total: None,
    ranks: Alone = ALONE,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensor name -> the rows to store instead, a report); of the first process.

    model: makes the float model. given: None at other processes. tokens: int64 [sequences, CONTEXT], to train on; held:
    others, to judge by; where there are none, some of `tokens`. what: "scales" (and norms), or "codes", those too.
    scratch: the folder for hidden states. ranks: the processes that share the tokens; all take the same steps. The
    report has the divergence on held-out tokens "before" and "after", in nats a token, which are equal when nothing is
    stored instead, and the share of codes that have "changed". The same tokens give the same bytes at any number of
    threads. Raises InputError when an activation of the float model is NaN or Inf.
    """
    if not len(held):
        apart = torch.arange(len(tokens)) % HELD_OUT == 0
        tokens, held = tokens[~apart], tokens[apart]
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(fisher.workers(threads))
        student = _Student(model(), stack, given, what, steps, pool, ranks)
        stack.enter_context(moments.tf32(student.model.device))  # as precise as a gradient has to be
        text = _Text(tokens, held, steps, ranks)
        answers = _answers(model(), text.own, scratch, pool, functools.partial(progress, "running the original"))
        before = after = student.divergence(text.held(answers), held.numel())
        if student.trains:
            for number, (count, batch) in zip(range(steps), text.batches(answers), strict=False):
                student.descend(batch, count, Step(number, steps))
                progress("tuning", number + 1, steps)
            after = student.divergence(text.held(answers), held.numel())
        changed, share = student.changed() if after < before and not ranks.rank else ({}, 0.0)
    tried = {"what": what, "steps": steps, "tokens": tokens.numel()}
    return changed, tried | {"before": before, "after": min(before, after), "changed": share}


Batch = tuple[torch.Tensor, list[torch.Tensor]]  # int64 [sequences, CONTEXT], and the original's states of each

# Of a part of a batch: the gradients at hidden states, those of norms, and what `Products` has of matrices.
Gradients = tuple[torch.Tensor, list[torch.Tensor | None], list[Call]]


class _Text:
    """The sequences of a process. own: int64 [sequences, CONTEXT], those to train on, then those to judge by."""

    def __init__(self, tokens: torch.Tensor, held: torch.Tensor, steps: int, ranks: Alone):
        self.chance = torch.Generator().manual_seed(0)
        order = torch.randperm(len(tokens), generator=self.chance)[: steps * BATCH]
        self.slots = [order[slot::BATCH] for slot in range(BATCH)]
        self.begin, mine = ranks.share(self.slots)
        first, some = ranks.share(range(len(held)))
        numbers = torch.cat([*mine, order[:0]])
        self.end, self.place = self.begin + len(mine), {int(n): i for i, n in enumerate(numbers)}
        self.own = torch.cat([tokens[numbers], held[first : first + len(some)]])

    def batches(self, answers: OnDisk) -> Iterator[tuple[int, Batch]]:
        """(tokens of all processes' batch, what this one has of it), without end: drawn without putting back."""
        slots = self.slots
        while True:
            for i in range(len(slots[0])):
                whole = [slot[i] for slot in slots if i < len(slot)]
                mine = [self.place[int(number)] for number in whole[self.begin : self.end]]
                yield len(whole) * CONTEXT, (self.own[mine], [answers[place] for place in mine])
            slots = [slot[torch.randperm(len(slot), generator=self.chance)] for slot in slots]

    def held(self, answers: OnDisk) -> Iterator[Batch]:
        """What this process has of the tokens to judge by."""
        for some in _by_batch(len(self.place), len(self.own)):
            yield self.own[some.start : some.stop], [answers[place] for place in some]


def _by_batch(start: int, stop: int) -> Iterator[range]:
    """These numbers, BATCH at a time."""
    return (range(first, min(first + BATCH, stop)) for first in range(start, stop, BATCH))


def _answers(
    model: Model, tokens: torch.Tensor, scratch: Path, pool: Executor, progress: Callable[[int, int], None]
) -> OnDisk:
    """The hidden states [1, CONTEXT, hidden] after the last layer, by sequence."""
    width = model.module.get_input_embeddings().embedding_dim
    require_space(scratch, tokens.numel() * width * model.dtype.itemsize)
    states = model.inputs([*tokens[:, None]], scratch)
    assert isinstance(states, OnDisk)
    for index in range(len(model)):
        with model.layer(index, index + 1) as module:
            through = functools.partial(fisher.forward, model, module, index)
            for some in _by_batch(0, len(states)):
                hidden = torch.cat([states[i].to(model.device) for i in some])
                found = torch.cat(fisher.each_part(model, pool, through, hidden))
                for i, after in zip(some, found.split(1), strict=True):
                    states[i] = after
            fisher.check(model, module, index)
        progress(index + 1, len(model))
    return states


class _Student:
    """The quantized model. stack: has what its layers hold."""

    def __init__(
        self,
        model: Model,
        stack: contextlib.ExitStack,
        given: Given | None,
        what: str,
        steps: int,
        pool: Executor,
        ranks: Alone,
    ):
        self.model, self.pool, self.ranks = model, pool, ranks
        self.each = map if model.at_once else pool.map
        self.modules: list[torch.nn.Module] = []
        every: list[list[Part]] = []
        for index in range(len(model)):
            module = stack.enter_context(model.layer(index))
            pieces, put = _pieces(module, index, given, what == "codes") if given else ([], set())
            for name in ranks.first(functools.partial(sorted, put)):
                ranks.same(module.get_parameter(name).data)
            parts = training.parts_of(pieces, what == "codes", model.device, self.each)
            every.append(training.shared(parts, model.device, ranks))
            _empty(module, {part.key for part in every[-1]})
            self.modules.append(module)
        slower = _slower([part.bundle for parts in every for part in parts], STEPS[what], steps)
        rate = slower * RATES[what]

        def rates(bundle: Bundle) -> tuple[float, float]:
            return rate, slower * by_bits(CODE_RATES, bundle)

        self.layers = [Quantized(parts, rates, index, self.each) for index, parts in enumerate(every)]
        names = ranks.first(lambda: _norms(model, given.file) if given else [])
        self.norms = [_Norm(number, *name, model, rate) for number, name in enumerate(names)]
        self.instead = {id(norm.parameter): norm.value for norm in self.norms}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.norms) or any(layer.parts for layer in self.layers)

    def changed(self) -> tuple[dict[str, np.ndarray], float]:
        """Tensor name -> the rows to store instead, and the share of codes that have changed."""
        found = {name: rows for layer in self.layers for name, rows in layer.packed().items()}
        found |= {norm.name: norm.stored() for norm in self.norms if norm.moved}
        return found, training.changed(self.layers)

    def divergence(self, batches: Iterator[Batch], count: int) -> float:
        """From the float model, in nats a token, of so many that all processes have."""
        total = 0.0
        for tokens, answers in batches:
            pairs = self._at_the_head(self._forward(tokens)[-1], answers)
            with self.model.heads() as head:
                total += sum(self.each(functools.partial(self._loss, head), pairs))
        totals = self.ranks.gathered(total)
        return self.ranks.first(lambda: sum(totals)) / count

    def descend(self, batch: Batch, count: int, step: Step) -> None:
        """Take a step against the gradient of the mean over `count` tokens, those of all processes' batch."""
        tokens, answers = batch
        runs: list[list[_Run]] | None = [] if self.model.at_once is None else None
        states = self._forward(tokens, runs) if len(tokens) else []
        found, slope = self._behind(states.pop(), answers, count) if states else ([], torch.empty(0))
        self._descend(None, found, step)
        for index in reversed(range(len(self.layers))):
            parts: list[Gradients] = []
            if states:
                hidden = states.pop()
                if runs:
                    backward = functools.partial(self._backward, index)
                    parts = list(self.pool.map(backward, runs.pop(), slope.split(1)))
                else:
                    again = functools.partial(self._again, index, self.layers[index].weights())
                    parts = fisher.each_part(self.model, self.pool, again, hidden, slope)
                slope = torch.cat([first for first, *_ in parts])
            self.layers[index].descend((call for *_, calls in parts for call in calls), step, self.ranks)
            self._descend(index, parts, step)

    def _forward(self, tokens: torch.Tensor, runs: list[list[_Run]] | None = None) -> list[torch.Tensor]:
        """Hidden states [sequences, CONTEXT, hidden] before each layer, and after the last.

        runs: takes in those of each layer, by sequence.
        """
        states = [*self.model.inputs([tokens])]
        for index, layer in enumerate(self.layers):
            if runs is None:
                through = functools.partial(self._through, index, layer.weights())
                states.append(torch.cat(fisher.each_part(self.model, self.pool, through, states[-1])))
            else:
                run = functools.partial(self._run, index, layer.weights())
                runs.append(fisher.each_part(self.model, self.pool, run, states[-1]))
                states.append(torch.cat([run.output.detach() for run in runs[-1]]))
        return states

    def _through(self, index: int, weights: Mapping[Key, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after a layer."""
        module = self.modules[index]
        with torch.no_grad(), _Instead(self.instead), Products(module, weights):
            return self.model.forward(module, index, hidden)

    def _run(self, index: int, weights: Mapping[Key, torch.Tensor], hidden: torch.Tensor) -> _Run:
        """Through a layer, with all that is needed on the way back."""
        module = self.modules[index]
        with torch.enable_grad(), _Instead(self.instead), Products(module, weights, self.layers[index].shapes) as seen:
            hidden = hidden.detach().to(self.model.device).requires_grad_()
            return _Run(seen, hidden, self.model.forward(module, index, hidden))

    def _backward(self, index: int, run: _Run, slope: torch.Tensor) -> Gradients:
        """From the gradient behind a layer."""
        values = [norm.value for norm in self._norms_of(index)]
        calls, (first, *rest) = run.seen.gradients(run.output, slope, [run.hidden, *values])
        assert first is not None
        return first, rest, calls

    def _again(
        self, index: int, weights: Mapping[Key, torch.Tensor], hidden: torch.Tensor, slope: torch.Tensor
    ) -> Gradients:
        """The same, given what is in front of the layer."""
        return self._backward(index, self._run(index, weights, hidden), slope)

    def _at_the_head(self, hidden: torch.Tensor, answers: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Hidden states of both models, so many tokens that a sequence's logits are there once."""
        few = CONTEXT if self.model.at_once else CONTEXT // BATCH
        for ours, theirs in zip(hidden.split(1), answers, strict=True):
            yield from zip(ours.split(few, 1), theirs.split(few, 1), strict=True)

    def _loss(self, head: Callable[[torch.Tensor], torch.Tensor], pair: tuple[torch.Tensor, ...]) -> float:
        """The divergence, summed over these tokens."""
        ours, theirs = pair
        with torch.no_grad():
            wanted = head(theirs).log_softmax(-1)
            with _Instead(self.instead):
                given = head(ours).log_softmax(-1)
        return float(kl_div(given, wanted, reduction="sum", log_target=True))

    def _behind(
        self, hidden: torch.Tensor, answers: Sequence[torch.Tensor], count: int
    ) -> tuple[list[Gradients], torch.Tensor]:
        """From behind the last layer: the gradients of its parts, and at these hidden states."""
        pairs = self._at_the_head(hidden, answers)
        with self.model.heads() as head:
            found: list[Gradients] = list(self.each(functools.partial(self._at_head, head, count), pairs))
        return found, torch.cat([first for first, *_ in found], 1).view(hidden.shape)

    def _at_head(
        self, head: Callable[[torch.Tensor], torch.Tensor], count: int, pair: tuple[torch.Tensor, ...]
    ) -> Gradients:
        ours, theirs = pair
        with torch.no_grad():
            wanted = head(theirs).softmax(-1)
        with torch.enable_grad(), _Instead(self.instead):
            ours = ours.detach().to(self.model.device).requires_grad_()
            logits = head(ours)
        slope = logits.detach().softmax(-1).sub_(wanted).div_(count)
        values = [norm.value for norm in self._norms_of(None)]
        found = torch.autograd.grad(logits, [ours, *values], slope, allow_unused=True)
        return found[0], list(found[1:]), []

    def _norms_of(self, index: int | None) -> list[_Norm]:
        """Those of a layer, or outside of layers."""
        return [norm for norm in self.norms if norm.index == index]

    def _descend(self, index: int | None, parts: Sequence[Gradients], step: Step) -> None:
        """Take a step with the norms of a layer, or outside of layers. parts: of a batch."""
        for number, norm in enumerate(self._norms_of(index)):
            total = torch.zeros_like(norm.value)
            for _, rest, _ in parts:
                if (gradient := rest[number]) is not None:
                    total += gradient
            norm.descend(self.ranks.summed(total), step)


class _Run(NamedTuple):
    """A pass through a layer, and the tensors between which it is differentiable."""

    seen: Products
    hidden: torch.Tensor
    output: torch.Tensor


class _Norm:
    """A norm's weight: its name in GGUF and in the model, and what llama.cpp's converter has added (1 for Gemma's)."""

    def __init__(self, number: int, name: str, key: str, shift: float, model: Model, rate: float):
        self.name, self.key, self.shift, self.parameter = name, key, shift, model.module.get_parameter(key)
        inside = key.removeprefix(model.prefix + ".").split(".")[0] if key.startswith(model.prefix + ".") else None
        self.index = None if inside is None else int(inside)
        self.value = self.parameter.detach().clone().requires_grad_()
        self.rate = rate * float(self.value.detach().float().square().mean().sqrt())
        self.adam = Adam(self.value.shape, self.value.device)
        self.chance = torch.Generator(self.value.device).manual_seed(number)

    @torch.no_grad()
    def descend(self, gradient: torch.Tensor, step: Step) -> None:
        """Take a step."""
        if step.number == 0:
            self.adam.begin(float(gradient.square().mean()))
        change = self.adam.change(gradient, step, noises(gradient, self.chance))
        self.value.sub_(change, alpha=self.rate * step.rate)

    @property
    def moved(self) -> bool:
        """Whether it has another value than before."""
        return not torch.equal(self.value, self.parameter)

    def stored(self) -> np.ndarray:
        """uint8 [1, row_bytes]."""
        return (self.value.detach().float().cpu().numpy() + self.shift).view(np.uint8).reshape(1, -1)


class _Instead(TorchFunctionMode):
    """Other tensors in place of a module's own, by their ids."""

    def __init__(self, instead: Mapping[int, torch.Tensor]):
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = {name: self.instead.get(id(value), value) for name, value in (kwargs or {}).items()}
        return func(*(self.instead.get(id(value), value) for value in args), **found)


def _slower(bundles: Sequence[Bundle], usual: int, steps: int) -> float:
    """What rates are multiplied by in a run of more than the `usual` steps: at full rates sq2w loses what it gained."""
    paths = any(bundle.windows and bundle.fmt.type.bpw < 3 for bundle in bundles)
    return min(1.0, usual / steps) if paths else 1.0


def _pieces(module: torch.nn.Module, index: int, given: Given, codes: bool) -> tuple[list[Piece], set[str]]:
    """What can be trained of a layer. What is stored of all else is put into the module: the names of these."""
    layers = moments.layers_of(module)
    pieces: list[Piece] = []
    found: list[tuple[Entry, moments.Layer, torch.Tensor, int]] = []
    for entry in given.entries:
        if entry.quantized and entry.name.startswith(f"blk.{index}."):
            fmt, first = formats.for_type(entry.coder), 0
            trains = entry.name in given.rows and fmt and (codes or fmt.own_scale)
            for matrix in each_matrix(given.file, entry.tensor):
                place = moments.match(matrix, layers)
                if place is None or entry.columns and entry.name not in given.rows:
                    break
                found.append((entry, *place, first))
                if trains:
                    packed = np.asarray(given.rows[entry.name][first : first + len(matrix)])
                    pieces.append(Piece(entry, *place, packed, matrix if codes else None))
                first += len(matrix)
    pieces = training.whole(pieces)
    trained, put = {piece.layer.key for piece in pieces}, set()
    for entry, layer, order, first in found:
        if layer.key not in trained:
            here = slice(first, first + len(order))
            if entry.name in given.rows:
                weight = decoded(entry, given.rows, first // len(order), here)
            else:
                weight = rounded(torch.from_numpy(read_float32(given.file, entry.tensor, first, len(order))), entry)
            layer.weight[order.to(layer.weight.device)] = weight.to(layer.weight)
            put.add(layer.key[0])
    return pieces, put


def _empty(module: torch.nn.Module, trained: Collection[Key]) -> None:
    """Give back the memory of matrices that stand nowhere: of each an address is left, by which it is known."""
    for name, p in matrices(module).items():
        if all((name, expert) in trained for expert in ([None] if p.dim() == 2 else range(len(p)))):
            p.data = p.new_full((*p.shape[:-2], 1, 1), torch.nan).expand(p.shape)


def _norms(student: Model, file: Gguf) -> list[tuple[str, str, float]]:
    """The name in GGUF of each norm's weight, that in the model, and what llama.cpp's converter has added to it."""
    found = []
    tensors = {tensor.name: tensor for tensor in file.tensors}
    for name, key in _gguf_names(student, file.get("general.architecture", str, "")):
        tensor = tensors.get(name)
        parameter = student.module.get_parameter(key)
        if tensor is not None and parameter.dim() == 1 and "norm" in key and tensor.n_weights == parameter.numel():
            values = torch.from_numpy(to_float32(file.read_rows(tensor, 0, tensor.n_rows), tensor.type_id)).flatten()
            for shift in (0.0, 1.0):  # 1: of Gemma's
                if torch.allclose(values, parameter.detach().float().cpu() + shift, atol=1e-6):
                    found.append((name, key, shift))
                    break
    return found


def _gguf_names(student: Model, architecture: str) -> Iterator[tuple[str, str]]:
    """(GGUF name, parameter name), by the table of the gguf package."""
    import gguf

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture in known:
        table = gguf.get_tensor_name_map(known[architecture], len(student))
        for key, _ in student.module.named_parameters():
            if name := table.get_name(key, try_suffixes=(".weight",)):
                yield name, key
