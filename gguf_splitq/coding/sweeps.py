# SPDX-License-Identifier: MIT
"""The solver's inner loops: columns of many rows coded one after the other.

This is what they compute, in PyTorch for any device; `sweeps_c` does the same on CPUs and `sweeps_triton` on GPUs, many
times sooner. Matrices have a column of weights in each row, [n_cols, n_rows], so that what is done to a column is done
to neighbours in memory. Nothing here waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from .solver import Format, Group

COLUMNS = 128  # searched or refitted at a time
LEAF = 16  # columns whose changes are pushed on one by one


@dataclass(frozen=True)
class Levels:
    """What a weight at scale 1 and offset 0 is rounded to. Levels are whole, so the ceiling of twice the weight tells.

    tables: float32 [2 * (last level - first level) + 1], of plain columns and of the first `wide` ones: entry i is the
    level nearest to (first + i) / 2, first being twice the first level.
    """

    tables: tuple[torch.Tensor, torch.Tensor]
    first: int
    wide: int

    @classmethod
    def of(cls, levels: torch.Tensor, wide_levels: torch.Tensor, wide: int) -> Levels:
        """levels: float32 [n_levels], whole and rising."""
        both = levels, wide_levels
        first, last = (2 * int(end(each[i] for each in both)) for i, end in ((0, min), (-1, max)))
        halves = torch.arange(first, last + 1, device=levels.device) / 2
        return cls((nearest(halves, levels), nearest(halves, wide_levels)), first, wide)


class Found(NamedTuple):
    """copy: int [n_rows], -1 where nothing was better. units, change: float32 [n_cols, n_rows], of the other rows."""

    copy: torch.Tensor
    units: torch.Tensor
    change: torch.Tensor


class Grid(NamedTuple):
    """Which scales and offsets blocks can have.

    kind: "half", any float16; "table", a value of `table` with either sign; "steps", whole multiples of the `steps`
    that a block has for its scale and its offset: of scales from `least` to `most`, of offsets from -`most` to 0.
    table: float32 [128], rising from 0. steps: float32 [n_rows, n_blocks] each.
    """

    kind: str
    table: torch.Tensor | None = None
    steps: tuple[torch.Tensor, torch.Tensor] | None = None
    least: int = 0
    most: int = 0


class Shared(NamedTuple):
    """scale, offset: float32 [n_rows, n_blocks], to be multiplied by factors [n_rows, n_super_blocks, 2]."""

    scale: torch.Tensor
    offset: torch.Tensor
    factors: torch.Tensor


class Sweeps(Protocol):
    """An implementation. scale, offset: float32 [..., n_blocks, n_rows]; block: int64 [n_cols], which of these a column
    has; numbers: int64 [n_cols], which columns these are of all; the rest is float32 [n_cols, n_rows] if not said
    otherwise. Rows are independent of each other.
    """

    def sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
        block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> torch.Tensor:  # fmt: skip
        """Round column after column to its aim; what it changes from `base` moves the aims of the later ones.

        aims is overwritten. push: float32 [n_cols, n_cols], of which the upper triangle counts. Returns the level of
        each code.
        """

    def search(
        self, aims: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, push: torch.Tensor, h: torch.Tensor,
        scale: torch.Tensor, offset: torch.Tensor, block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> Found:  # fmt: skip
        """The best of several scales for a group of columns: swept by `push`, then each column given all others.

        scale, offset: float32 [n_copies, n_blocks, n_rows]. value: what is stored now; pull: h (weight - value), of
        which h [n_cols, n_cols] is the part of these columns. aims: where the error is least.
        """

    def refit(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Least squares for scale and offset of each block of a group in turn, kept where that lowers the error.

        Returns the new params of these blocks, and what that changes of the weights. units, pull and h as of `search`.
        """

    def search_group(
        self, group: Group, here: torch.Tensor, block: torch.Tensor, value: torch.Tensor, pull: torch.Tensor,
        h: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, levels: Levels, units: torch.Tensor,
        taken: torch.Tensor,
    ) -> None:  # fmt: skip
        """`search` for the columns of some blocks, int64 `here`, kept where it lowers a row's error.

        block: which of these a column has. The rest is of all columns and all blocks. Changes units, pull, and taken
        int64 [n_blocks, n_rows]: which copy of its parameters each block takes.
        """
        columns, base, drawn = group.columns, value[group.columns], pull[group.columns]
        found = self.search(
            torch.addmm(base, group.inverse, drawn), base, drawn, group.push, group.h,
            scale[:, here], offset[:, here], block, columns, levels,
        )  # fmt: skip
        better = (found.copy >= 0) & group.usable
        taken[here] = found.copy.long() * better
        units[columns] = torch.where(better, found.units, units[columns])
        pull.addmm_(h[:, columns], found.change.masked_fill(~better, 0), alpha=-1)

    def refit_all(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> None:
        """`refit` for the blocks of all columns. Changes params and pull."""
        in_spans(self.refit, max(COLUMNS // fmt.block_size, 1) * fmt.block_size, units, pull, h, params, fmt)

    def stretch_all(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> None:
        """As `refit_all`, of the factors that the blocks of each super-block share."""
        in_spans(stretched, fmt.super_size, units, pull, h, params, fmt)


class Reference(Sweeps):
    """In PyTorch, on any device."""

    def sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor,
        block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> torch.Tensor:  # fmt: skip
        scale, offset = scale[block], offset[block]
        wide = (numbers < levels.wide).tolist()
        double = 2 * inverse(scale)
        shift = -offset * double - levels.first
        units, changes = torch.empty_like(aims), torch.empty_like(aims)
        position, index = torch.empty_like(aims[0]), torch.empty_like(aims[0], dtype=torch.int64)
        parts = (aims, base, scale, offset, double, shift, units, changes)
        columns = list(zip(*(part.unbind() for part in parts), strict=True))

        def leaf(start: int, end: int) -> None:
            for i in range(start, end):
                aim, old, scale, offset, double, shift, unit, change = columns[i]
                table = levels.tables[wide[i]]
                torch.addcmul(shift, aim, double, out=position)
                index.copy_(position.ceil_().clamp_(0, len(table) - 1))
                torch.index_select(table, 0, index, out=unit)
                torch.addcmul(offset, unit, scale, out=change).sub_(old)
                if i + 1 < end:
                    aims[i + 1 : end].addr_(push[i, i + 1 : end], change)

        in_halves(leaf, aims, push, changes, 0, len(aims))
        return units

    def search(
        self, aims: torch.Tensor, value: torch.Tensor, pull: torch.Tensor, push: torch.Tensor, h: torch.Tensor,
        scale: torch.Tensor, offset: torch.Tensor, block: torch.Tensor, numbers: torch.Tensor, levels: Levels,
    ) -> Found:  # fmt: skip
        copies = len(scale)
        scale, offset = scale.transpose(0, 1).flatten(1), offset.transpose(0, 1).flatten(1)
        aims, value, pull = (part.repeat(1, copies) for part in (aims, value, pull))
        rest = block, numbers, levels
        units = self.sweep(aims.clone(), aims, push, scale, offset, *rest)
        found, ratio = units * scale[block] + offset[block], h / h.diagonal()
        units = self.sweep(torch.addmm(found, ratio.T, aims - found), found, -ratio, scale, offset, *rest)
        return best(h, pull, units, units * scale[block] + offset[block] - value, copies)

    def refit(
        self, units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pull, params, changes = pull.clone(), params.clone(), torch.empty_like(pull)
        for start in range(0, len(units), fmt.block_size):
            end, block = start + fmt.block_size, start // fmt.block_size
            here, old = slice(start, end), params[:, block : block + 1]
            scale, offset = fmt.scale(old), fmt.offset(old)
            steps = least_squares(h[here, here], pull[here], units[here], torch.ones_like(units[here]), fmt.has_offset)
            new = fmt.nearest(scale + steps[0][:, None], offset + steps[1][:, None], old)
            change = torch.addcmul((fmt.offset(new) - offset).T, units[here], (fmt.scale(new) - scale).T)
            params[:, block : block + 1], changes[here] = improved(h[here, here], pull[here], change, new, old)
            if end < len(units):
                pull[end:].addmm_(h[end:, here], changes[here], alpha=-1)
        return params, changes


def stretched(
    units: torch.Tensor, pull: torch.Tensor, h: torch.Tensor, params: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Sweeps.refit`, for the factors that the blocks of one super-block share."""
    block = torch.arange(len(units), device=units.device) // fmt.block_size
    scale, offset = (of(params).T[block] for of in (fmt.scale, fmt.offset))
    x, y = least_squares(h, pull, units * scale, offset, fmt.has_offset)
    new = fmt.stretch(1 + x[:, None], 1 + y[:, None], params)
    change = units * fmt.scale(new).T[block] + fmt.offset(new).T[block] - (units * scale + offset)
    return improved(h, pull, change, new, params)


def in_spans(
    step: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    span: int,
    units: torch.Tensor,
    pull: torch.Tensor,
    h: torch.Tensor,
    params: torch.Tensor,
    fmt: Format,
) -> None:
    """As `Sweeps.refit_all`, by a `step` like `Sweeps.refit` for so many columns after the other."""
    for first in range(0, len(pull), span):
        inside, blocks = slice(first, first + span), slice(first // fmt.block_size, (first + span) // fmt.block_size)
        params[:, blocks], change = step(units[inside], pull[inside], h[inside, inside], params[:, blocks], fmt)
        pull.addmm_(h[:, inside], change, alpha=-1)


def in_halves(
    leaf: Callable[[int, int], None],
    aims: torch.Tensor,
    push: torch.Tensor,
    changes: torch.Tensor,
    start: int,
    end: int,
) -> None:
    """Call leaf(first, behind) for LEAF columns after the other, so that most changes are pushed on in large groups."""
    if end - start <= LEAF:
        return leaf(start, end)
    half = (start + end) // 2
    in_halves(leaf, aims, push, changes, start, half)
    aims[half:end].addmm_(push[start:half, half:end].T, changes[start:half])
    in_halves(leaf, aims, push, changes, half, end)


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 for scale 0, where every code is as good as the one of the level nearest to 0."""
    return (1 / scale).masked_fill_(scale == 0, 0)


def nearest(units: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The level nearest to each of `units`; levels rise."""
    return levels[torch.bucketize(units, (levels[1:] + levels[:-1]) / 2, out_int32=True)]


def gains(h: torch.Tensor, pull: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """float32 [n_rows]: by how much a change of the weights [n_cols, n_rows] lowers the error; pull = H (W - Q)."""
    return (change * (2 * pull - h @ change)).sum(0)


def best(h: torch.Tensor, pull: torch.Tensor, units: torch.Tensor, change: torch.Tensor, copies: int) -> Found:
    """The copy that lowers the error most. pull, units and change: of all copies, one after another in each row."""
    gain, copy = gains(h, pull, change).view(copies, -1).max(0)
    at = copy * len(copy) + torch.arange(len(copy), device=copy.device)
    return Found(copy.masked_fill(~(gain > 0), -1), units[:, at], change[:, at])


def improved(
    h: torch.Tensor, pull: torch.Tensor, change: torch.Tensor, new: torch.Tensor, old: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """New parameters of blocks and what they change of the weights, where that lowers a row's error; else old and 0."""
    better = gains(h, pull, change) > 0
    return torch.where(better.view(-1, *[1] * (new.dim() - 1)), new, old), change.masked_fill(~better, 0)


def least_squares(
    h: torch.Tensor, pull: torch.Tensor, first: torch.Tensor, second: torch.Tensor, both: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of two directions [n_cols, n_rows] to add, or of the first alone: float32 [n_rows] each."""
    a = h @ first
    aa, pa = (a * first).sum(0), (pull * first).sum(0)
    x, y = (pa / aa).masked_fill_(~(aa > 0), 0), torch.zeros_like(pa)
    if both:
        ab, bb, pb = (a * second).sum(0), ((h @ second) * second).sum(0), (pull * second).sum(0)
        determinant = aa * bb - ab * ab
        solvable = determinant > 1e-4 * aa * bb
        x = torch.where(solvable, (pa * bb - pb * ab) / determinant, x)
        y = torch.where(solvable, (pb * aa - pa * ab) / determinant, y)
    return x, y
