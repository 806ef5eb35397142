# SPDX-License-Identifier: MIT
"""Error feedback for window codes, sq6w to sq2w: what solver.py does, for codes that are found as a path along a chain.

Which level a code stands for depends on the codes behind it in its chain, so codes of a chain are chosen together, by
Viterbi's algorithm. A chain is walked from its end to its beginning: then the bits of earlier steps are the state, and
an edge, state << code bits | code, has a level. A block is coded for all rows at once by a `Sweep`:

- Every state keeps the aims that its own path leaves to later columns (per-survivor processing, Raheli, Polydoros and
  Tzou, 1995). With the same aims for all states 0.5 dB are lost.
- A chain that is free to begin and end in any state is made to close on itself by two more runs: one begins and ends in
  the state that the free one ended in, one in the state that it began in. The better one is kept.
- Several scales are tried for each block, and the one with the least error is kept. Only the most promising of them are
  closed.

1. Feedback: blocks in the order of falling Hessian diagonal, at scales near those that fit the weights alone.
2. Refit, as in solver.py.
3. Search, as there, but each chain begins at a random place, in the state that it is in there, so one run closes it.

Open chains (windowso.py) need no second run, and can begin nowhere else.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..runtime import native
from ..types.windows import Window
from ..types.windowso import OpenWindow
from . import solver, sweeps, windows_c
from .formats import WindowFormat
from .solver import Solution

PASSES = 2  # of search and refit
BLOCK = 32
BLOCKS = 4  # searched at a time
CLOSED = 4  # scales of a block whose free chains are closed
FIRST = range(-5, 10)  # scale steps around the one that the root mean square asks for; larger ones for outliers
FEEDBACK = range(-3, 4)  # around the fitted one
SEARCH = range(-1, 2)
PIECE = 1 << 12  # rows times scales that PyTorch runs at a time
TRIED = 8  # blocks whose scales are looked up at a time

_NEVER = 1e30  # what a path costs that begins in a forbidden state


@dataclass(frozen=True)
class Trellis:
    """What is common to all blocks of a type.

    bits: of a code. walk: int64 [n_chains, length], the columns of a block in the order of coding. windows: uint8
    [n_edges], the index in the type's table of each edge. levels: float32 [n_edges], what each edge stands for at scale
    1. From state s code c leads along edge s << bits | c to state edge % n_states. open: whether a chain begins and
    ends in any states; else it ends in the one that it begins in.
    """

    bits: int
    walk: torch.Tensor
    windows: torch.Tensor
    levels: torch.Tensor
    open: bool = False

    @property
    def n_states(self) -> int:
        """How many states there are before and after each code."""
        return len(self.levels) >> self.bits

    @classmethod
    @functools.cache
    def of(cls, kind: Window, device: str | torch.device = "cpu") -> Trellis:
        parts = np.ascontiguousarray(kind.chain[:, ::-1]), kind.edge_windows, kind.edges.astype(np.float32)
        walk, indices, levels = (torch.from_numpy(part).to(device) for part in parts)
        return cls(kind.code_bits, walk, indices, levels, isinstance(kind, OpenWindow))


class Sweep(Protocol):
    """Codes one block for all rows."""

    def __call__(
        self,
        aims: torch.Tensor,
        base: torch.Tensor,
        scales: torch.Tensor,
        push: torch.Tensor,
        costs: torch.Tensor,
        trellis: Trellis,
        states: torch.Tensor | None,
        /,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(edges uint8 [32, n_rows], number int64 [n_rows] of the scale that is theirs), of least error.

        The columns are in the order of coding, chain after chain. aims: float32 [32, n_rows], where the columns are
        best given all other blocks; base: alike, from what their changes count that are pushed on. scales: float32
        [n_scales, n_rows]. push: float32 [32, 32], of which the upper triangle counts: from row to column. costs:
        float32 [32], of a squared distance from an aim. states: uint8 [n_chains, n_rows], in which chains begin and
        end, None where that is to be found, as it always is of open chains. Of scales with equal errors the first is
        taken, and of edges alike.
        """


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    kind: Window,
    damping: float = solver.DAMPING,
    passes: int = PASSES,
    each: solver.Each = map,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols], on the device they are on.

    Other arguments, the result and errors are as of `solver.solve`.
    """
    fmt, trellis = WindowFormat(kind, weight.device), Trellis.of(kind, weight.device)
    h, order, factor, damping = solver.factored(hessian, damping, lambda diagonal: _order(diagonal, trellis))
    push, costs = solver.pushes(factor), solver.costs(factor)
    del factor
    return solver.polished(
        weight, lambda piece: _Rows(piece, h, fmt, order, push, costs, trellis), passes, damping, each
    )


def _order(diagonal: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The columns, blocks with the largest diagonal first, in each as its chains are walked."""
    blocks = solver.falling(diagonal.view(-1, BLOCK).sum(1))
    return (blocks[:, None] * BLOCK + trellis.walk.flatten()).flatten()


class _Rows(solver.Rows):
    """Rows being coded. edges: uint8 [n_cols, n_rows]; units are their levels."""

    fmt: WindowFormat

    def __init__(
        self,
        weight: torch.Tensor,
        h: torch.Tensor,
        fmt: WindowFormat,
        order: torch.Tensor,
        push: torch.Tensor,
        costs: torch.Tensor,
        trellis: Trellis,
    ) -> None:
        """Fitted: coded with a Hessian that is diagonal, at scales near those that the root mean squares ask for."""
        self.weight, self.h, self.fmt, self.trellis = weight.T.contiguous(), h, fmt, trellis
        self.inner, self.repeated = solver._inner(h.device), defaultdict(solver.Repeated)
        self.order, self.push, self.costs = order, push, costs
        self.block = torch.arange(len(h), device=h.device) // BLOCK
        self.edges = torch.empty_like(self.weight, dtype=torch.uint8)
        diagonal = h.diagonal().view(-1, BLOCK, 1)
        share = diagonal / diagonal.sum(1, keepdim=True)
        size = (self.weight.view(-1, BLOCK, len(weight)).square() * share).sum(1).sqrt().T.contiguous()
        scale = size / fmt.type.table.rms
        self.params = fmt.nearest(scale, torch.zeros_like(scale), torch.empty(0))
        self._code(None, h.diagonal()[order], FIRST)

    def codes(self) -> torch.Tensor:
        return self.trellis.windows[self.edges.int()].T.contiguous()

    def feedback(self) -> None:
        """Code all columns, in their order."""
        self.params, self.edges = self.params.clone(), self.edges.clone()
        self._code(self.push, self.costs, FEEDBACK)

    def _code(self, push: torch.Tensor | None, costs: torch.Tensor, steps: range) -> None:
        order, blocks = self.order, self.block[self.order[::BLOCK]]
        tried = _scales(steps, (0, 128), self.weight.device)
        if coder := _coder(self.trellis, self.fmt, tried):
            params = self.params.T[blocks]
            self.edges[order] = coder.code(self.weight[order], push, costs, params)
            self.params[:, blocks] = params.T
        else:
            self.edges[order], self.params[:, blocks] = _sweep(
                self.weight[order], push, costs, self.params[:, blocks], tried, self.fmt, self.trellis, None
            )
        self.units = self.trellis.levels[self.edges.int()]

    def search(self, chance: torch.Generator, pull: torch.Tensor) -> torch.Tensor:
        """Code every block again, a few random ones at a time, and keep in each row what lowers its error.

        pull: as `refit` returns it; overwritten, and returned.
        """
        trellis, device, bits = self.trellis, self.weight.device, self.trellis.bits
        n_chains, length = trellis.walk.shape
        value, some = self.value(), torch.randperm(self.params.shape[1], generator=chance)
        places = 1 if trellis.open else length
        turns = solver.sent(torch.randint(places, (len(some), n_chains, 1), generator=chance), device)
        weights = self.h.diagonal().view(-1, BLOCK).sum(1)
        walk, column = trellis.walk.expand(len(some), -1, -1), torch.arange(length, device=device)
        walk = walk.gather(2, (column + turns) % length)  # of each block, its chains begun somewhere
        tried = _scales(SEARCH, (0,), device)
        coder = _coder(trellis, self.fmt, tried)
        params = self.params.T.contiguous() if coder else self.params
        for blocks in solver.in_groups(solver.sent(some, device), BLOCKS):
            blocks = blocks.gather(1, weights[blocks].argsort(dim=1, descending=True, stable=True))
            chains = walk[blocks] + blocks[..., None, None] * BLOCK
            stacked = solver.groups(self.h, chains.flatten(1))
            for number, group in enumerate(map(solver.Group, *stacked)):
                here, columns = blocks[number], group.columns
                if coder:
                    coder.search(group, here, value, pull, self.h, params, self.edges)
                    continue
                states = None if trellis.open else self.edges[chains[number, ..., 0]] >> bits
                base, drawn = value[columns], pull[columns]
                edges, chosen = _sweep(
                    torch.addmm(base, group.inverse, drawn), group.push, group.costs,
                    self.params[:, here], tried, self.fmt, trellis, states,
                )  # fmt: skip
                change = trellis.levels[edges.int()] * self.fmt.scale(chosen).T.repeat_interleave(BLOCK, 0) - base
                better = (sweeps.gains(group.h, drawn, change) > 0) & group.usable
                self.params[:, here] = torch.where(better[:, None], chosen, self.params[:, here])
                self.edges[columns] = torch.where(better, edges, self.edges[columns])
                pull.addmm_(self.h[:, columns], change.masked_fill(~better, 0), alpha=-1)
        if coder:
            self.params.copy_(params.T)
        torch.index_select(trellis.levels, 0, self.edges.int().flatten(), out=self.units.view(-1))
        return pull


def nearest(units: torch.Tensor, codes: torch.Tensor, fmt: WindowFormat, chance: torch.Generator) -> torch.Tensor:
    """uint8 [n_rows, n_cols] like `codes`, whole windows, of levels whose squares' sum to `units` is least.

    units: float32, in levels. Each chain begins at a random place and in the state that `codes` have there, so calls
    one after the other can change all of it, and one that finds nothing nearer changes nothing.
    """
    trellis, device = Trellis.of(fmt.type, units.device), units.device
    n_chains, length = trellis.walk.shape
    turns = solver.sent(torch.randint(length, (n_chains, 1), generator=chance), device)
    walk = trellis.walk.gather(1, (torch.arange(length, device=device) + turns) % length)
    edge = trellis.windows.argsort()  # of each window
    aims, before = units.reshape(-1, BLOCK).T[walk.flatten()], codes.reshape(-1, BLOCK).T
    states = edge[before[walk[:, 0]].int()] >> trellis.bits
    ones = torch.ones(1, aims.shape[1], device=device)
    free, costs = torch.zeros(BLOCK, BLOCK, device=device), torch.ones(BLOCK, device=device)
    edges, _ = _sweeper(device)(aims, aims, ones, free, costs, trellis, states.to(torch.uint8))
    found = torch.empty_like(before)
    found[walk.flatten()] = trellis.windows[edges.int()]
    return found.T.reshape(codes.shape)


@functools.cache
def _scales(steps: range, mirrors: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is tried of a scale byte, nearest first: what is added to its magnitude, and what is turned of its sign.

    Both int64 [n_scales, 1]. Kept, for a GPU is waited for where something is sent there.
    """
    tried = [(step, mirror) for mirror in mirrors for step in sorted(steps, key=abs)]
    added, turned = torch.tensor(tried, device=device).T[..., None].unbind()
    return added, turned


def _sweep(
    weight: torch.Tensor,
    push: torch.Tensor | None,
    costs: torch.Tensor,
    params: torch.Tensor,
    tried: tuple[torch.Tensor, torch.Tensor],
    fmt: WindowFormat,
    trellis: Trellis,
    states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Code block after block; what is changed of the weights moves the aims of the later ones.

    weight: float32 [n_cols, n_rows], in the order of coding, as push (None: of zeros) and costs are. params: uint8
    [n_rows, n_blocks], around which scales are tried. states: uint8 [n_blocks, n_chains, n_rows], or None. Returns
    edges uint8 [n_cols, n_rows] and the new params.
    """
    edges, chosen, aims = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(params), weight.clone()
    code, free = _sweeper(weight.device), torch.zeros(BLOCK, BLOCK, device=weight.device)
    for number, (tries, scales) in enumerate(_tries(params, tried, fmt)):
        here, end = slice(number * BLOCK, (number + 1) * BLOCK), (number + 1) * BLOCK
        state = None if states is None else states[number]
        pushed = free if push is None else push[here, here]
        edges[here], choice = code(aims[here], weight[here], scales, pushed, costs[here], trellis, state)
        chosen[:, number] = tries.gather(0, choice[None])[0]
        if push is not None and end < len(weight):
            change = trellis.levels[edges[here].int()] * scales.gather(0, choice[None]) - weight[here]
            aims[end:].addmm_(push[here, end:].T, change)
    return edges, chosen


def _tries(
    params: torch.Tensor, tried: tuple[torch.Tensor, torch.Tensor], fmt: WindowFormat
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each block the scale bytes uint8 [n_scales, n_rows] that are tried, and their scales float32, alike."""
    added, turned = tried
    for some in params.T.split(TRIED):  # little is launched on a GPU then
        old = some[:, None].int()
        tries = (((old & 127) + added).clamp(0, fmt.positive - 1) + (old & 128 ^ turned)).to(torch.uint8)
        yield from zip(tries, fmt.scale(tries), strict=True)


def _sweeper(device: torch.device) -> Sweep:
    """The fastest one there is. Raises EnvironmentFailed on a GPU without Triton: PyTorch takes 100 times as long."""
    if device.type == "cuda":
        try:
            from .windows_triton import sweep
        except ImportError as error:
            raise solver.no_triton(error) from None
        return functools.partial(sweep, closed=CLOSED)
    return in_c if device.type == "cpu" and native.library() else in_torch


def _coder(trellis: Trellis, fmt: WindowFormat, tried: tuple[torch.Tensor, torch.Tensor]) -> windows_c.Coder | None:
    """What does in C what is done here, on CPUs where it is built."""
    library = native.library() if trellis.levels.device.type == "cpu" else None
    return windows_c.Coder(library, trellis, fmt, tried, CLOSED) if library else None


def in_c(
    aims: torch.Tensor,
    base: torch.Tensor,
    scales: torch.Tensor,
    push: torch.Tensor,
    costs: torch.Tensor,
    trellis: Trellis,
    states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Sweep` by the built runtime, on one thread. It adds in another order than the reference: see docs."""
    lib = native.library()
    assert lib
    arrays = [part.contiguous().numpy() for part in (trellis.levels, aims, base, scales, push, costs)]
    held = None if states is None else states.contiguous().numpy()
    edges, choice = native.sweep(lib, trellis.bits, 0 if trellis.open else CLOSED, arrays, held)
    return torch.from_numpy(edges), torch.from_numpy(choice)


def in_torch(
    aims: torch.Tensor,
    base: torch.Tensor,
    scales: torch.Tensor,
    push: torch.Tensor,
    costs: torch.Tensor,
    trellis: Trellis,
    states: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Sweep` on any device: the reference."""
    n_scales, n_rows = scales.shape
    edges = torch.empty_like(aims, dtype=torch.uint8)
    choice = torch.empty(n_rows, dtype=torch.int64, device=aims.device)
    for start in range(0, n_rows, PIECE // n_scales):
        rows = slice(start, start + PIECE // n_scales)
        given = _Block(aims[:, None, rows], base[:, None, rows], push, costs, trellis)
        scale = scales[:, rows]
        if states is None and not trellis.open:  # paths with free ends tell which scales are worth more
            promising = given.code(scale, None, False)[1].argsort(dim=0, stable=True)[:CLOSED]
            found, error = given.code(scale.gather(0, promising), None, True)
        else:
            promising = torch.arange(n_scales, device=aims.device)[:, None].expand_as(scale)
            found, error = given.code(scale, None if states is None else states[:, rows].long(), False)
        best = error.argmin(0, keepdim=True)
        choice[rows] = promising.gather(0, best)[0]
        edges[:, rows] = found.gather(1, best.expand(BLOCK, 1, -1))[:, 0]
    return edges, choice


@dataclass(frozen=True)
class _Block:
    """As of `Sweep`; aims and base float32 [32, 1, n_rows]."""

    aims: torch.Tensor
    base: torch.Tensor
    push: torch.Tensor
    costs: torch.Tensor
    trellis: Trellis

    def code(self, scales: torch.Tensor, states: torch.Tensor | None, close: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges uint8 [32, n, n_rows] and errors float32 [n, n_rows] for scales [n, n_rows].

        states: int64 [n_chains, n_rows], or None: to be found where chains are to be closed, or any.
        """
        trellis, error = self.trellis, torch.zeros_like(scales)
        aims = self.aims.repeat(1, len(scales), 1)
        edges = torch.empty_like(aims, dtype=torch.uint8)
        length = trellis.walk.shape[1]
        for number in range(len(trellis.walk)):
            here, end = slice(number * length, (number + 1) * length), (number + 1) * length
            state = None if states is None else states[number].expand_as(scales)
            path, cost = self._path(here, aims[here], scales, state)
            if close and states is None:
                ends = path[-1].long() % trellis.n_states, path[0].long() >> trellis.bits
                (path, cost), (other, its) = (self._path(here, aims[here], scales, state) for state in ends)
                path, cost = torch.where(its < cost, other, path), torch.minimum(cost, its)
            edges[here] = path
            error += cost
            change = trellis.levels[path.int()] * scales - self.base[here]
            aims[end:] += torch.tensordot(self.push[here, end:], change, ([0], [0]))
        return edges, error

    def _path(
        self, here: slice, aims: torch.Tensor, scales: torch.Tensor, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Edges uint8 [length, n, n_rows] and cost of a chain that begins and ends in `state` int64 [n, n_rows]."""
        trellis, n_states = self.trellis, self.trellis.n_states
        push, costs, base = self.push[here, here], self.costs[here], self.base[here, ..., None]
        states = torch.arange(n_states, device=aims.device)
        # [to, k]: the edges into each state
        into = states[:, None] + torch.arange(0, len(trellis.levels), n_states, device=aims.device)
        before = into >> trellis.bits
        values = trellis.levels[into] * scales[..., None, None]
        aims = aims[..., None].repeat(1, 1, 1, n_states)  # of the path that leads to each state
        cost = torch.zeros_like(aims[0])
        if state is not None:
            cost.masked_fill_(states != state[..., None], _NEVER)
        taken = []
        for i, each in enumerate(costs):
            totals = cost[..., before] + each * (aims[i][..., before] - values).square()
            k = totals.argmin(-1, keepdim=True)
            cost, edge = totals.gather(-1, k)[..., 0], (k * n_states)[..., 0] + states
            taken.append(edge)
            change = values.gather(-1, k)[..., 0] - base[i]
            if i + 1 < len(aims):
                later = aims[i + 1 :]
                paths = (edge >> trellis.bits).expand_as(later)
                aims[i + 1 :] = torch.addcmul(later.gather(-1, paths), push[i, i + 1 :, None, None, None], change)
        at = (cost.argmin(-1) if state is None else state)[..., None]
        path, cost = torch.empty_like(aims[..., 0], dtype=torch.uint8), cost.gather(-1, at)[..., 0]
        for i in reversed(range(len(taken))):
            edge = taken[i].gather(-1, at)
            path[i], at = edge[..., 0], edge >> trellis.bits
        return path, cost
