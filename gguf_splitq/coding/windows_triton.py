# SPDX-License-Identifier: MIT
"""The sweep of windows.py on GPUs, in Triton, which comes with PyTorch's builds for CUDA. What it computes: windows.py.

A program, one warp, codes a few lanes, a lane being a row at one of its scales. It keeps, for every state of a lane,
what the path that leads there has changed so far, and takes the aim of a column from these changes and the column's
pushes when it comes to it. So nothing but the result leaves the registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from .windows import Trellis

LANES = {2: 2, 3: 4, 4: 8, 5: 8, 6: 8}  # of a program, by code bits: what one warp has registers for


@triton.jit
def _code(  # type: ignore[no-untyped-def]
    aims, base, scales, push, costs, levels, states, edges, errors, n_rows, n_lanes, push_row, push_column,
    BITS: tl.constexpr, LENGTH: tl.constexpr, CHAINS: tl.constexpr, HELD: tl.constexpr, CLOSE: tl.constexpr,
    STORE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Chains of all lanes, one after another: free; from a given state to the same (HELD); or closed (CLOSE).

    Lane l is row l mod n_rows at scale l of scales; states: of rows. edges are written where STORE is set.
    """
    EDGES: tl.constexpr = 128 if BITS > 4 else 64
    STATES: tl.constexpr = EDGES >> BITS
    CODES: tl.constexpr = 1 << BITS
    TURNS: tl.constexpr = 3 if CLOSE else 1
    WORD: tl.constexpr = LENGTH if LENGTH * BITS <= 64 else LENGTH // 2  # codes that one word of a path holds
    lane = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = lane < n_lanes
    row = lane % n_rows
    scale = tl.load(scales + lane, real, 0.0)
    state = tl.arange(0, STATES)
    column = tl.arange(0, LENGTH)
    edge = tl.arange(0, EDGES)
    before = tl.broadcast_to((edge >> BITS)[None, :], (WIDTH, EDGES))
    values = tl.load(levels + edge)[None, :] * scale[:, None]
    total = tl.zeros((WIDTH,), tl.float32)
    pushed = tl.zeros((WIDTH, LENGTH), tl.float32)  # by earlier chains on the aims of this one
    for chain in range(CHAINS):
        first = chain * LENGTH
        held = tl.full((WIDTH,), -1, tl.int32)
        if HELD:
            held = tl.load(states + chain * n_rows + row, real, 0).to(tl.int32)
        ended, began = held, held
        least = tl.full((WIDTH,), float("inf"), tl.float32)
        kept_start = tl.zeros((WIDTH,), tl.int32)
        kept_early = tl.zeros((WIDTH,), tl.int64)
        kept_late = tl.zeros((WIDTH,), tl.int64)
        kept_changes = tl.zeros((WIDTH, LENGTH), tl.float32)
        for turn in range(TURNS):  # with CLOSE: free, then closed in the state it ended in, then in that it began in
            if CLOSE:
                held = tl.where(turn == 0, -1, tl.where(turn == 1, ended, began))
            forbidden = (held[:, None] >= 0) & (held[:, None] != state[None, :])
            cost = tl.where(forbidden, 1e30, 0.0)
            start = tl.broadcast_to(state[None, :], (WIDTH, STATES))
            early = tl.zeros((WIDTH, STATES), tl.int64)
            late = tl.zeros((WIDTH, STATES), tl.int64)
            changes = tl.zeros((WIDTH, STATES, LENGTH), tl.float32)
            for i in range(LENGTH):
                pushes = tl.load(push + (first + column) * push_row + (first + i) * push_column, column < i, 0.0)
                aim = tl.load(aims + (first + i) * n_rows + row, real, 0.0)
                aim += tl.sum(tl.where(column[None, :] == i, pushed, 0.0), 1)
                own = aim[:, None] + tl.sum(changes * pushes[None, None, :], 2)
                distance = tl.gather(own, before, 1) - values
                reached = tl.gather(cost, before, 1) + tl.load(costs + first + i) * (distance * distance)
                cost, k = tl.min(tl.reshape(reached, (WIDTH, CODES, STATES)), 1, return_indices=True)
                taken = k * STATES + state[None, :]
                path = taken >> BITS
                change = tl.load(levels + taken) * scale[:, None]
                change -= tl.load(base + (first + i) * n_rows + row, real, 0.0)[:, None]
                everywhere = tl.broadcast_to(path[:, :, None], (WIDTH, STATES, LENGTH))
                changes = tl.gather(changes, everywhere, 1)
                changes = tl.where(column[None, None, :] == i, change[:, :, None], changes)
                start = tl.gather(start, path, 1)
                early, late = tl.gather(early, path, 1), tl.gather(late, path, 1)
                code = (taken & (CODES - 1)).to(tl.int64)
                early = tl.where(i < WORD, early << BITS | code, early)
                late = tl.where(i < WORD, late, late << BITS | code)
            end = tl.where(held < 0, tl.argmin(cost, 1), held)
            here = state[None, :] == end[:, None]
            its = tl.sum(tl.where(here, cost, 0.0), 1)
            its_start = tl.sum(tl.where(here, start, 0), 1)
            better = ((TURNS == 1) | (turn > 0)) & (its < least)
            least = tl.where(better, its, least)
            kept_start = tl.where(better, its_start, kept_start)
            kept_early = tl.where(better, tl.sum(tl.where(here, early, 0), 1), kept_early)
            kept_late = tl.where(better, tl.sum(tl.where(here, late, 0), 1), kept_late)
            its_changes = tl.sum(tl.where(here[:, :, None], changes, 0.0), 1)
            kept_changes = tl.where(better[:, None], its_changes, kept_changes)
            if CLOSE:
                ended, began = tl.where(turn == 0, end, ended), tl.where(turn == 0, its_start, began)
        total += least
        if CHAINS > 1:
            then = first + LENGTH + column
            across = (first + column)[:, None] * push_row + then[None, :] * push_column
            pushes = tl.load(push + across, tl.broadcast_to(then[None, :], (LENGTH, LENGTH)) < CHAINS * LENGTH, 0.0)
            pushed = tl.sum(kept_changes[:, :, None] * pushes[None, :, :], 1)
        if STORE:
            at = kept_start
            for i in range(LENGTH):
                word = tl.where(i < WORD, kept_early, kept_late)
                left = tl.where(i < WORD, WORD, LENGTH) - 1 - i
                code = ((word >> (left * BITS)) & (CODES - 1)).to(tl.int32)
                went = at << BITS | code
                tl.store(edges + (first + i) * n_lanes + lane, went.to(tl.uint8), real)
                at = went & (STATES - 1)
    tl.store(errors + lane, total, real)


def sweep(
    aims: torch.Tensor,
    base: torch.Tensor,
    scales: torch.Tensor,
    push: torch.Tensor,
    costs: torch.Tensor,
    trellis: Trellis,
    states: torch.Tensor | None,
    closed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `windows.Sweep` on a GPU; of free chains that are to close the `closed` most promising scales are closed."""
    given = aims.contiguous(), base.contiguous(), push, costs, trellis, states
    if states is None and not trellis.open:
        promising = _run(scales, *given, close=False)[1].argsort(dim=0, stable=True)[:closed]
        found, error = _run(scales.gather(0, promising), *given, close=True)
    else:
        promising = None
        found, error = _run(scales, *given, close=False)
    best = error.argmin(0, keepdim=True)
    choice = best if promising is None else promising.gather(0, best)
    return found.gather(1, best.expand(len(found), 1, -1))[:, 0], choice[0]


def _run(
    scales: torch.Tensor,
    aims: torch.Tensor,
    base: torch.Tensor,
    push: torch.Tensor,
    costs: torch.Tensor,
    trellis: Trellis,
    states: torch.Tensor | None,
    close: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges uint8 [32, n_scales, n_rows], unset for chains that are yet to close, and errors float32 alike."""
    scales = scales.contiguous()
    errors = torch.empty_like(scales)
    edges = torch.empty((len(aims), *scales.shape), dtype=torch.uint8, device=aims.device)
    n_chains, length = trellis.walk.shape
    width = LANES[trellis.bits]
    held = errors if states is None else states.contiguous()  # errors: any pointer, not read
    store = states is not None or close or trellis.open
    with torch.cuda.device_of(aims):
        _code[triton.cdiv(scales.numel(), width),](
            aims, base, scales, push, costs, trellis.levels, held, edges, errors, scales.shape[1], scales.numel(),
            *push.stride(), trellis.bits, length, n_chains, states is not None, close, store, width,
            num_warps=1,
        )  # fmt: skip
    return edges, errors
