# SPDX-License-Identifier: MIT
"""Half-way aims: matrices solved behind the stored weights of all before them, for weights that repair half the damage.

A matrix W gets inputs x in the float model and x' behind what is stored of the matrices before it. Where its output is
added to the residual stream, that sum is off by e = (h + W x) - (h' + W x'); elsewhere its output is, by W x - W x'.
Least squares over the calibration tokens, each counted by its Fisher information w = |g|^2 (fisher.py),

    H = sum w x' x'^T / sum w        W' = W + 1/2 (sum w e x'^T / sum w) (H + RIDGE mean(diag H) I)^-1

and the solver codes W' against H. The whole correction is GPTAQ's (Li et al., arXiv 2504.02692) and that of Qronos
(Zhang et al., arXiv 2505.11695); more than half of it fits the calibration text better and other texts worse.

The output matrix comes last. Its e is W (x - x'), so the sum is W times one of the size of H, whatever the vocabulary.
Embeddings are stored before the first layer, which repairs half of their error as of any other (ends.py).

Layers go from the first to the last, and matrices in stages: those with the same inputs (q, k, v; gate, up) are solved
at once, those behind them afterwards. In a layer with experts the stored model is routed as the float model is, so that
an expert sees the same tokens in both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div

from ..coding import solver
from . import fisher, moments
from .ends import Standing
from .model import BATCH, CONTEXT, Model, OnDisk
from .moments import Key, Layer
from .ranks import ALONE, Alone
from .watch import Watch

SHARE = 0.5  # of the correction
RIDGE = 1e-4

# By batch, float32 [2, n]: |g|^2 of the tokens that a matrix saw, and their numbers in the batch.
Weights = Mapping[Key, Mapping[int, torch.Tensor]]
ADDITIONS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__,
             torch.Tensor.__iadd__)  # fmt: skip


@dataclass
class Stage:
    """Matrices to be solved together; whoever takes a stage sets what is stored of them before taking the next.

    last: of its decoder layer; then passing() gives what goes through that next, where the layer was measured.
    """

    index: int
    layers: list[Layer]
    last: bool
    passing: Callable[[], Passing] | None = None


@dataclass
class Passing:
    """A decoder layer, solved, and the hidden states that go into it in the float model and behind what is stored.

    exact, stored: [BATCH, CONTEXT, hidden] by batch; held: both of other tokens, None where there are none. weights:
    float32 [BATCH, CONTEXT] by batch: |g|^2 at the output of the last matrix that is added to the hidden states. Of
    most models that is what the layer puts out. Where experts or a norm come after that matrix, the gradient has gone
    through them as well; where there is no such matrix, all tokens have the weight 1.
    """

    model: Model
    module: torch.nn.Module
    index: int
    pool: Executor
    exact: OnDisk
    stored: OnDisk
    held: tuple[torch.Tensor, torch.Tensor] | None
    weights: list[torch.Tensor]


def information(
    model: Model,
    tokens: torch.Tensor,
    scratch: Path,
    threads: int,
    keep: Callable[[int, Weights], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Alone = ALONE,
    ends: fisher.Ends | None = None,
) -> None:
    """Calls keep(decoder layer, weights of its tokens), the last layer first. Errors as of `fisher.backward`.

    ranks: the processes that share the tokens; the first one keeps.
    """
    found: dict[Key, dict[int, torch.Tensor]] = {}
    begin, batches = ranks.share(tokens.split(BATCH))
    before = {0: begin * BATCH}

    def take(x: torch.Tensor, g: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
        weights = g.float().square().sum(1)
        if numbers is None:  # then all of the batch get the mean
            weights, numbers = weights.mean()[None], torch.zeros(1)
        return torch.stack([weights, numbers.to(g.device, non_blocking=True)])

    def see(index: int, batch: int, taken: fisher.Seen) -> None:
        for key, parts in taken.items():
            found.setdefault(key, {}).update({begin + batch: torch.cat(list(parts), 1)} if parts else {})

    with fisher.workers(threads) as pool:
        for index, _ in fisher.backward(model, batches, take, see, scratch, pool, progress, before, ends):
            every: dict[Key, dict[int, torch.Tensor]] = {}
            own = {key: {batch: part.cpu() for batch, part in parts.items()} for key, parts in found.items()}
            for key, parts in itertools.chain(*(part.items() for part in ranks.gathered(own))):
                every.setdefault(key, {}).update(parts)
            if not ranks.rank:
                keep(index, every)
            found.clear()


def run(
    model: Model,
    tokens: torch.Tensor,
    held: torch.Tensor,
    weights: Callable[[int], Weights],
    wanted: Callable[[int, list[Layer]], Collection[str]],
    scratch: Path,
    threads: int = 1,
    done: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Alone = ALONE,
    ends: Standing | None = None,
) -> Generator[Stage, None, dict[str, float] | None]:
    """Yields stage after stage, the first layer first; its layers have `hessian` and `pull`, and are given `stored`.

    Returns the divergence from the float model on `held`, in nats a token, of nearest rounding ("nearest") and of what
    is stored ("feedback"), or of an encoder's vectors 1 - cosine; None without such tokens. tokens: int64 [sequences,
    CONTEXT]. held: others, at most BATCH, for which layers are given `nearest` as well. weights(index): what
    `information` kept. wanted(index, layers): the names of those that are not stored as they are. done: decoder layers
    that come as one stage, not measured, because what is stored of them is known. ranks: the processes that share the
    tokens, all of which take the same stages; what is held, known, wanted and stored is asked of the first. ends: what
    stands there, of one process; its output comes as a stage behind the last layer, with `drift` in place of `pull`.
    The same tokens give the same bits at any number of threads. Raises InputError when an activation is NaN or Inf.
    """
    ends = ends or Standing()
    begin, batches = ranks.share(tokens.split(BATCH))
    streams = [_begun(model, batches, instead, scratch) for instead in ({}, ends.stored)]
    tried = []
    if len(held):
        tried = [hidden for instead in ({}, ends.nearest, ends.stored) for hidden in _begun(model, held, instead)]
    with fisher.workers(threads) as pool:
        for index in range(len(model)):
            with model.layer(index, index + 1) as module:
                decoder = _Decoder(model, module, index, pool, ranks)
                names, measured = ranks.first(functools.partial(wanted, index, decoder.layers)), index not in done
                stages = decoder.stages(names, streams[0]) if measured else [set(names)]
                known = ranks.first(functools.partial(weights, index)) if measured else {}
                for number, chosen in enumerate(stages):
                    members = [layer for layer in decoder.layers if layer.name in chosen]
                    if measured:
                        decoder.measure(members, known, streams[0], streams[1], begin)
                    last = number + 1 == len(stages)
                    held_states = (tried[0], tried[2]) if tried else None
                    passing = functools.partial(decoder.passing, known, streams, held_states)
                    yield Stage(index, members, last, passing if last and measured else None)
                    decoder.store(members)
                for stream, stands in zip(streams, ({}, decoder.stored), strict=True):
                    for batch, hidden in enumerate(stream):
                        stream[batch] = decoder.through(hidden, stands)
                if tried:
                    instead: list[Mapping[Key, torch.Tensor]] = [{}, decoder.nearest, decoder.stored]
                    tried = [decoder.through(*pair) for pair in zip(tried, instead, strict=True)]
                fisher.check(model, module, index)
            progress(index + 1, len(model))
        if ends.output is not None:
            if len(model) not in done:
                _measure_output(model, ends.output, ends.weights, streams, pool)
            yield Stage(len(model), [ends.output], True)
            ends.put("output", ends.output)
    if not tried:
        return None
    exact, *others = tried
    with model.heads() as head, torch.no_grad():
        compared = _turned if model.encoder else _divergence
        found = [compared(model, head, exact, *pair) for pair in zip(others, (ends.nearest, ends.stored), strict=True)]
    return dict(zip(("nearest", "feedback"), found, strict=True))


def moved(weight: torch.Tensor, layer: Layer, order: torch.Tensor) -> torch.Tensor:
    """float32 [n_rows, n_cols]: the aim for rows `weight` of a matrix, whose numbers in it are `order`.

    Raises InputError as `solver.solve` does.
    """
    if layer.hessian is None:
        return weight
    if layer.drift is not None:
        pull = weight.to(layer.drift) @ layer.drift
    elif layer.pull is not None:
        pull = layer.pull[order]
    else:
        return weight
    _, _, factor, _ = solver.factored(layer.hessian, RIDGE)
    change = torch.cholesky_solve(solver.backwards(pull.T), factor)  # which is of the reverse order
    return weight + SHARE * solver.backwards(change).T.to(weight)


def _begun(
    model: Model,
    tokens: torch.Tensor | Sequence[torch.Tensor],
    instead: Mapping[str, torch.Tensor],
    scratch: Path | None = None,
) -> Any:
    """`Model.inputs` with other matrices at the ends."""
    with model.standing(instead):
        return model.inputs(tokens, scratch)


def _measure_output(
    model: Model, layer: Layer, weights: torch.Tensor | None, streams: Sequence[Iterable], pool: Executor
) -> None:
    """Gives the output matrix its Hessian and its drift. weights: float32 |g|^2 of all tokens, in order."""
    if weights is None:
        return
    moment, first = moments.Moment(), 0
    with model.heads() as head:
        inputs = functools.partial(_inputs, head, model.module.get_output_embeddings())
        for both in zip(*streams, strict=True):
            exact, stored = (fisher.each_part(model, pool, inputs, hidden) for hidden in both)
            taken: list[moments.Taken] = []
            for a, b in zip(exact, stored, strict=True):
                taken.append((b, weights[first : first + len(b)].to(b.device), a.float() - b.float()))
                first += len(b)
            moments.add_up(moment.add(taken), pool, model)
    layer.hessian = moment.mean()
    if layer.hessian is not None and moment.pull is not None:
        layer.drift = moment.pull / moment.information


def _inputs(head: Callable, output: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """[tokens, in]: what the output matrix is multiplied with, for hidden states after the last layer."""
    with torch.no_grad(), contextlib.suppress(_Enough), _Inputs(output) as seen:
        head(hidden)
    return seen.x.flatten(0, -2)


class _Decoder:
    """A loaded decoder layer. stored, nearest: what stands in place of its matrices; routed: it has experts."""

    def __init__(self, model: Model, module: torch.nn.Module, index: int, pool: Executor, ranks: Alone):
        self.model, self.module, self.index, self.pool, self.ranks = model, module, index, pool, ranks
        self.layers = moments.layers_of(module)
        self.routed = any(layer.key[1] is not None for layer in self.layers)
        self.stored: dict[Key, torch.Tensor] = {}
        self.nearest: dict[Key, torch.Tensor] = {}
        self.planned: set[str] = set()  # parameters that are not stored as they are
        self.added: set[str] = set()  # of these, whose outputs are added to something at once
        self.last: str | None = None  # of these, the last one whose outputs are added to the hidden states

    def stages(self, wanted: Collection[str], states: Sequence[torch.Tensor] | OnDisk) -> list[set[str]]:
        """Names of matrices, those with the same inputs together, in the order in which they run on a sequence."""
        self.planned, self.added, self.last, stages = self.ranks.first(lambda: self._stages(wanted, states[0][:1]))
        return stages

    def _stages(
        self, wanted: Collection[str], hidden: torch.Tensor
    ) -> tuple[set[str], set[str], str | None, list[set[str]]]:
        """Planned and added names, the last one added to the hidden states, and the stages."""
        members: dict[str, set[str]] = defaultdict(set)
        for layer in self.layers:
            if layer.name in wanted:
                members[layer.key[0]].add(layer.name)
        with torch.no_grad(), _Pass(self.module, set(members), {}) as seen:
            self.model.forward(self.module, self.index, hidden)
        calls = seen.calls
        totals = {call.name: call.total.shape for call in calls if call.total is not None}
        last = next((name for name in reversed(totals) if totals[name] == hidden.shape), None)
        first: dict[str, _Call] = {}
        for call in calls:
            first.setdefault(call.name, call)
        stages: list[set[str]] = []
        x = None
        for name in [*first, *(members.keys() - first.keys())]:
            call = first.get(name)
            if x is None or call is None or call.x is not x:
                stages.append(set())
            x = call and call.x
            stages[-1] |= members[name]
        return set(members), set(totals), last, stages or [set()]

    def passing(
        self, known: Weights, streams: Sequence[OnDisk], held: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Passing:
        """What goes through the layer; of one process."""
        exact, stored = streams
        found = known.get((self.last, None), {}) if self.last else {}
        weights = [torch.ones(shape[:2]) for shape in exact.shapes]
        if len(found) == len(weights):
            weights = [_by_token(found[i])[: w.numel()].view(w.shape) for i, w in enumerate(weights)]
        return Passing(self.model, self.module, self.index, self.pool, exact, stored, held, weights)

    def measure(
        self, members: list[Layer], weights: Weights, exact: Iterable, stored: Iterable, begin: int = 0
    ) -> None:
        """Gives the layers of a stage their Hessians and pulls. begin: the number of the first batch."""
        names = {layer.key[0] for layer in members}
        sums: dict[Key, moments.Moment] = {}
        for batch, both in enumerate(zip(exact, stored, strict=True), begin):
            seen: dict[Key, list[_Pair]] = defaultdict(list)
            parts = *both, fisher.numbers(both[0])
            for pairs in fisher.each_part(self.model, self.pool, functools.partial(self._pairs, names), *parts):
                for key, pair in pairs:
                    seen[key].append(pair)
            blocks = []
            for key, found in seen.items():
                moment, known = sums.setdefault(key, moments.Moment()), weights.get(key, {}).get(batch)
                if known is not None:
                    blocks += moment.add(_weighted(found, known))
            moments.add_up(blocks, self.pool, self.model)
        moments.measured(members, moments.joined(sums, self.model.device, self.ranks), {})

    def store(self, members: list[Layer]) -> None:
        """Take over what stands in place of matrices."""
        if self.ranks.count > 1:
            changed = self.ranks.first(lambda: {layer.name for layer in members if layer.stored is not None})
            for layer in members:
                if layer.name in changed:
                    like = torch.empty_like(layer.weight) if layer.stored is None else layer.stored
                    layer.stored = self.ranks.same(like)
        self.stored |= {layer.key: layer.stored for layer in members if layer.stored is not None}
        self.nearest |= {layer.key: layer.nearest for layer in members if layer.nearest is not None}
        for layer in members:
            layer.hessian = layer.pull = None

    def through(self, hidden: torch.Tensor, instead: Mapping[Key, torch.Tensor]) -> torch.Tensor:
        """Hidden states of a batch after the layer, with other matrices in it."""

        def part(hidden: torch.Tensor) -> torch.Tensor:
            with _Pass(self.module, (), instead):
                return fisher.forward(self.model, self.module, self.index, hidden)

        return torch.cat(fisher.each_part(self.model, self.pool, part, hidden))

    def _run(
        self,
        hidden: torch.Tensor,
        names: set[str],
        instead: Mapping,
        tokens: torch.Tensor,
        results: Iterable | None = None,
    ) -> _Pass:
        """A pass that ends when it has seen all of `names`; experts may get any number of calls."""
        due = None if self.routed else (names, names & self.added)
        seen = _Pass(self.module, names, instead, self.planned, results, due, tokens)
        with torch.no_grad(), contextlib.suppress(_Enough), seen:
            self.model.forward(self.module, self.index, hidden)
        return seen

    def _pairs(
        self, names: set[str], exact: torch.Tensor, stored: torch.Tensor, tokens: torch.Tensor
    ) -> list[tuple[Key, _Pair]]:
        """What a worker's part shows of a stage's matrices."""
        one = self._run(exact, names, {}, tokens)
        other = self._run(stored, names, self.stored, tokens, one.others if self.routed else None)
        same = [(a.key, a.x.shape) for a in one.calls] == [(b.key, b.x.shape) for b in other.calls]
        pairs = []
        for a, b in zip(one.calls, other.calls if same else one.calls, strict=True):
            off = a.off(b, a.name in self.added) if same else None
            pairs.append((a.key, _Pair((b if same else a).x.flatten(0, -2), off, a.rows)))
        return pairs


@dataclass(frozen=True)
class _Pair:
    """x: [tokens, in], behind what is stored; off: float32 [tokens, out], what its outputs should repair, or None.

    rows: int64 [tokens], their numbers in the batch, or None.
    """

    x: torch.Tensor
    off: torch.Tensor | None
    rows: torch.Tensor | None


def _weighted(pairs: list[_Pair], known: torch.Tensor) -> list[moments.Taken]:
    """With the tokens' weights, by those that are `known` (see `Weights`); their mean where one is not."""
    mean, every = known[0].mean(), _by_token(known)
    plain = any(pair.off is None for pair in pairs)
    found = []
    for pair in pairs:
        own = mean.expand(len(pair.x)) if pair.rows is None else every[pair.rows]
        found.append((pair.x, own.to(pair.x.device, non_blocking=True), pair.off))
    return [[part for part in parts if part is not None][: 2 if plain else 3] for parts in found]


def _by_token(known: torch.Tensor) -> torch.Tensor:
    """float32 [BATCH CONTEXT]: the weights of a batch's tokens, of those that are not `known` the mean."""
    weights, numbers = known
    none = torch.zeros(BATCH * CONTEXT)
    counts = none.index_add(0, numbers.long(), torch.ones_like(weights))  # more than 1 of a matrix that is run twice
    return torch.where(counts > 0, none.index_add(0, numbers.long(), weights) / counts, weights.mean())


@dataclass
class _Call:
    """A product y = x W^T. rows: as of `Watch`; total: y and what it is added to."""

    name: str
    expert: int | None
    x: torch.Tensor
    y: torch.Tensor
    rows: torch.Tensor | None
    total: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.version = self.y._version

    @property
    def key(self) -> Key:
        return self.name, self.expert

    def off(self, other: _Call, added: bool) -> torch.Tensor | None:
        """float32 [tokens, out]: by how much the other model's outputs, or sums, fall short of these."""
        ours, theirs = (self.total, other.total) if added else (self.y, other.y)
        if ours is None or theirs is None or not (self.intact(added) and other.intact(added)):
            return None
        return (ours.float() - theirs.float()).flatten(0, -2)

    def intact(self, added: bool) -> bool:
        """Whether nothing was written over y since."""
        return added or self.y._version == self.version


class _Enough(Exception):
    pass


class _Pass(Watch):
    """One of the two models' passes through a layer.

    calls: of matrices in `names`, in order. instead: other matrices to multiply with. others: results of matrices that
    are not `planned`, or `results`, to be given in their place. due: names that are to have calls, and those that are
    to have totals: then the pass ends. tokens: as of `Watch`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        names: Collection[str],
        instead: Mapping[Key, torch.Tensor],
        planned: Collection[str] = (),
        results: Iterable | None = None,
        due: tuple[set[str], set[str]] | None = None,
        tokens: torch.Tensor | None = None,
    ):
        super().__init__(module, lambda *_: None, tokens)
        self.names, self.instead, self.planned = names, instead, planned
        self.results, self.due = None if results is None else iter(list(results)), due
        self.calls: list[_Call] = []
        self.others: list[torch.Tensor] = []

    def product(
        self, name: str, expert: int | None, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Watch`."""
        if name not in self.planned and self.results is not None:
            return next(self.results)
        y = torch.nn.functional.linear(x, self.instead.get((name, expert), weight), bias)
        if name not in self.planned:
            self.others.append(y)
        if name in self.names:
            self.calls.append(_Call(name, expert, x, y, self.rows_of(expert, x)))
            self._end()
        return y

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func in ADDITIONS and self.calls:
            a, b = args[0], args[1] if len(args) > 1 else None
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
                for call in self.calls:
                    if (
                        call.total is None
                        and call.y.shape == a.shape
                        and call.y.data_ptr() in (a.data_ptr(), b.data_ptr())
                    ):
                        call.total = result.clone()
                        self._end()
        return result

    def _end(self) -> None:
        if self.due and self.due[0] <= {c.name for c in self.calls}:
            if self.due[1] <= {c.name for c in self.calls if c.total is not None}:
                raise _Enough


class _Inputs(Watch):
    """A pass that ends where the module's matrix is multiplied with `x`."""

    x: torch.Tensor

    def __init__(self, module: torch.nn.Module):
        super().__init__(module, lambda *_: None)

    def product(self, name: str, expert: int | None, x: torch.Tensor, *_: Any) -> torch.Tensor:
        """See `Watch`."""
        self.x = x
        raise _Enough


def _turned(
    model: Model, head: Callable, exact: torch.Tensor, other: torch.Tensor, instead: Mapping[str, torch.Tensor]
) -> float:
    """`_divergence` of an encoder: the mean of 1 - cosine between the sequences' vectors."""
    wanted = fisher.vectors(head(exact).double())
    with model.standing(instead):
        given = fisher.vectors(head(other).double())
    return float(1 - (given * wanted).sum(1).mean())


def _divergence(
    model: Model, head: Callable, exact: torch.Tensor, other: torch.Tensor, instead: Mapping[str, torch.Tensor]
) -> float:
    """KL divergence of the float model's distribution from that behind other hidden states, in nats a token.

    instead: the ends of the other model.
    """
    total = 0.0
    for one, changed in zip(exact.split(1), other.split(1), strict=True):
        wanted = head(one).log_softmax(-1)
        with model.standing(instead):
            given = head(changed).log_softmax(-1)
        total += float(kl_div(given, wanted, reduction="sum", log_target=True)) / one.shape[1]
    return total / len(exact)
