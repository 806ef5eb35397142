# SPDX-License-Identifier: MIT
"""Error feedback: the codes of one weight matrix, chosen for the outputs they give on calibration inputs.

Knows no format. In a block, weight = scale * level[code] + offset; a `Format` says which levels there are, and which
scales and offsets can be stored. The error is the trace of (W - Q) H (W - Q)^T, H the second moment of the inputs.

1. Feedback (GPTQ, Frantar et al., arXiv 2210.17323): columns are coded in the order of falling Hessian diagonal, with
   block parameters fixed beforehand, each column to what is best given the columns already coded, if those still to
   come could be anything.
2. Refit: scale and offset of every block, then what the blocks of a super-block share, are set to their least-squares
   values for the codes they have.
3. Search: a few random blocks at a time are coded again by feedback, then each of their codes given all others, with
   their parameters as they are and in a slightly changed copy; a row keeps what lowers its error. It goes on where no
   single code could be improved, since it changes many codes and a scale at once.

Only feedback can do worse than nearest rounding, and is then dropped; refit and search change nothing that does not
lower the error, and see the whole Hessian. Rows are independent of each other.

A GPU is never waited for inside a pass, what can be done for all columns at once is, and the rest is recorded and
launched as one from the second pass on (graphs.py).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..errors import EnvironmentFailed, InputError
from ..runtime import native
from . import sweeps, sweeps_c
from .graphs import Repeated

DAMPING = 1e-3  # of the Hessian's mean diagonal; GPTQ uses ten times as much
MOST_DAMPING = 1.0
PASSES = 8  # of search and refit
STRETCHED = 4  # super-blocks are refitted in one of so many passes: in all of them the error is the same, to 0.2 %
EXACT = 4  # H (W - Q) is multiplied anew in one of so many passes, and else kept up to date
COPIES = 2  # of the parameters, the unchanged ones included
SPREAD = 0.05  # standard deviation of the relative change in a copy
FACTORED = 32  # groups at a time
WEIGHTS = 1 << 20  # coded at a time, in whole rows: what a thread takes, and what bounds the memory
LEAST_ROWS = 256  # of such a piece
ON_GPU = 64  # times as many: there a sweep of few rows takes as long as one of thousands
BYTES = 60  # per weight of these; measured: at most 30


class Format(Protocol):
    """What the solver needs of a block format.

    Parameters are one tensor [n_rows, n_cols / block_size, ...], whatever the format keeps for a block.
    block_size: columns that share a scale and an offset. super_size: columns whose scales share a factor, and their
    offsets another one; block_size where there is no such thing. has_offset: whether offsets can differ from 0.
    levels: float32 [n_levels], whole and rising: what the codes 0, 1, ... stand for at scale 1 and offset 0; of the
    first `wide` columns wide_levels.
    """

    block_size: int
    super_size: int
    has_offset: bool
    levels: torch.Tensor
    wide: int
    wide_levels: torch.Tensor

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """Block parameters for float32 weights [n_rows, n_cols], columns weighted by importance [n_cols]."""

    def grid(self, params: torch.Tensor) -> sweeps.Grid | None:
        """What `nearest` chooses from for these blocks; None where it leaves all as they are."""

    def scale(self, params: torch.Tensor) -> torch.Tensor:
        """float32 scale of each block; 0 is allowed."""

    def offset(self, params: torch.Tensor) -> torch.Tensor:
        """float32 offset of each block."""

    def nearest(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The parameters of blocks with the storable scales and offsets nearest to these, the rest unchanged."""

    def stretch(self, scale: torch.Tensor, offset: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The parameters of the blocks of a super-block, all scales and offsets multiplied by about these factors.

        params: [n_rows, super_size / block_size, ...]; the factors: float32 [n_rows, 1].
        """

    def shared(self, params: torch.Tensor) -> sweeps.Shared | None:
        """Scales and offsets of blocks as products with their super-blocks' factors, if these can be any float16."""

    def share(self, factors: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """The parameters of blocks with other factors, as `shared` has them, of their super-blocks."""

    def pack(self, codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        """uint8 codes [n_rows, n_cols] -> uint8 [n_rows, row_bytes], on the CPU."""


class Each(Protocol):
    """`map`, or that of a pool whose threads compute alone."""

    def __call__(self, work: Callable[[Any], Any], items: Iterable, /) -> Iterable:
        """What `work` gives of each item, in order."""


@dataclass(frozen=True)
class Solution:
    """packed: uint8 [n_rows, row_bytes], on the CPU; weight: float32, what the bytes stand for.

    errors: by stage, the mean of a row; "polish" is the final one. damping: what the Hessian needed. side: uint8
    [size], the side tensor of a type that has one.
    """

    packed: torch.Tensor
    weight: torch.Tensor
    errors: dict[str, float]
    damping: float
    side: np.ndarray | None = None


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: Format,
    damping: float = DAMPING,
    passes: int = PASSES,
    each: Each = map,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols], on the device they are on.

    damping: added to the diagonal, relative to its mean; tenfold as long as that is not positive definite. passes: of
    search and refit; the time goes with them. each: does pieces of rows. The same input gives the same bytes. Raises
    InputError when the Hessian is not finite or not positive definite even with MOST_DAMPING.
    """
    h, order, push, damping = prepare(hessian, damping)
    return polished(weight, lambda piece: Rows(piece, h, fmt, order, push), passes, damping, each)


def polished(
    weight: torch.Tensor,
    start: Callable[[torch.Tensor], Rows],
    passes: int,
    damping: float,
    each: Each = map,
) -> Solution:
    """All stages for all rows, pieces of them at once. start: some of the rows -> them, rounded to nearest."""

    def work(piece: torch.Tensor) -> tuple[tuple[float, float, float], tuple[torch.Tensor, torch.Tensor]]:
        rows, chance = start(piece), torch.Generator().manual_seed(0)
        nearest, rounded = rows.error(), copy.copy(rows)
        rows.feedback()
        fed = rows.error()
        if not fed < nearest:  # possible where the Hessian is nearly diagonal
            rows = rounded
        pull = None
        for number in range(passes):
            known = pull if number % EXACT else None
            pull = rows.search(chance, rows.refit(number % STRETCHED == 0, known))
        rows.refit(pull=pull)
        return (nearest, fed, rows.error()), (rows.fmt.pack(rows.codes(), rows.params), rows.value().T)

    size = rows_together(len(weight), weight.shape[1], ON_GPU if weight.is_cuda else 1)
    stages, parts = zip(*each(work, weight.split(size)), strict=True)
    errors = (sum(stage) / len(weight) for stage in zip(*stages, strict=True))
    packed, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return Solution(packed, values, dict(zip(("nearest", "feedback", "polish"), errors, strict=True)), damping)


def rows_together(n_rows: int, n_cols: int, times: int = 1) -> int:
    """Rows coded at a time."""
    return min(n_rows, max(LEAST_ROWS, times * WEIGHTS // n_cols))


def coding_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of memory that `solve` takes beside the Hessian and the rows, for each piece that is being coded."""
    return BYTES * rows_together(n_rows, n_cols) * n_cols


def damped(hessian: torch.Tensor, damping: float = DAMPING, size: torch.Tensor | float = 1.0) -> torch.Tensor:
    """float64 Hessian with `damping` times its mean diagonal added; columns that were never active get a 1.

    size: [n_cols], above 0: added is what makes this so for weights divided by it.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    if not torch.isfinite(h.sum()):  # as soon as one of them is not
        raise InputError("the Hessian is not finite: an activation was NaN or Inf; calibrate in float32")
    diagonal[diagonal <= 0] = 1
    diagonal += damping * (diagonal * size**2).mean() / size**2
    return h


def prepare(
    hessian: torch.Tensor, damping: float, size: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The damped Hessian in float32, the order of coding, the push matrix of that order, and the damping it took."""
    h, order, factor, damping = factored(hessian, damping, falling, size)
    return h, order, pushes(factor), damping


def falling(diagonal: torch.Tensor) -> torch.Tensor:
    """The columns, those with the largest diagonal first."""
    return diagonal.argsort(descending=True, stable=True)


def factored(
    hessian: torch.Tensor,
    damping: float,
    ordered: Callable[[torch.Tensor], torch.Tensor] | None = None,
    size: torch.Tensor | float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """As `prepare`, with the factor that `pushes` takes in place of the pushes.

    ordered: diagonal -> order of coding; None: as the columns come. Raises InputError as `solve` does.
    """
    while True:
        h = damped(hessian, damping, size)
        order = ordered(h.diagonal()) if ordered else torch.arange(len(h), device=h.device)
        back = order.flip(0)
        factor, failed = torch.linalg.cholesky_ex(h[back[:, None], back] if ordered else backwards(h))
        if not failed:
            return h.float(), order, factor, damping
        damping = max(10 * damping, 1e-6)
        if damping > MOST_DAMPING:
            raise InputError("the Hessian is not positive definite: use more calibration text or a larger damping")


def backwards(matrix: torch.Tensor) -> torch.Tensor:
    """Rows and columns in the reverse order."""
    return matrix.flip(-2, -1)


def pushes(factor: torch.Tensor) -> torch.Tensor:
    """How a change of a column moves the best value of each later one: float32 [earlier, later], for `sweeps.Sweeps`.

    factor: lower Cholesky factor of the Hessian with its columns in the reverse order of coding. With H = C^T G C, C
    unit lower triangular and G diagonal, an error e of a row costs sum_i G_i (e_i + sum_j<i C_ij e_j)^2: given the
    errors of the earlier columns, that of column i is best at minus the inner sum. C is this factor, turned around;
    the codes are GPTQ's, without its inverse of the Hessian.
    """
    return backwards(factor / factor.diagonal(0, -2, -1).unsqueeze(-2)).neg().float()


def costs(factor: torch.Tensor) -> torch.Tensor:
    """G of `pushes`, float32 [n_cols] in the order of coding: what a column's squared distance from its aim costs."""
    return factor.diagonal(0, -2, -1).flip(-1).square().float()


class Group(NamedTuple):
    """Columns coded together, in the order of coding; or several groups of them, stacked.

    columns: int64 [n]. h: float32 [n, n], the Hessian's part; inverse: alike. push, costs: as `pushes` and `costs` give
    them. usable: bool [], False where that part is not positive definite in float32, and the last are of a unit matrix.
    """

    columns: torch.Tensor
    h: torch.Tensor
    inverse: torch.Tensor
    push: torch.Tensor
    costs: torch.Tensor
    usable: torch.Tensor


def groups(h: torch.Tensor, columns: torch.Tensor) -> Group:
    """For int64 [n_groups, n] columns of float32 h, stacked."""
    return Group(*map(torch.cat, zip(*(_factored(h, some) for some in columns.split(FACTORED)), strict=True)))


def _factored(h: torch.Tensor, columns: torch.Tensor) -> Group:
    parts = h[columns[:, :, None], columns[:, None]]
    factor, failed = torch.linalg.cholesky_ex(backwards(parts).double())
    unit, usable = torch.eye(parts.shape[-1], dtype=factor.dtype, device=h.device), failed == 0
    factor = torch.where(usable[:, None, None], factor, unit)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    inverse = backwards(inverse.mT @ inverse).float()
    return Group(columns, parts, inverse, pushes(factor), costs(factor), usable)


def in_groups(order: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Split into `size` each, [n_groups, size], and the rest, [1, less]."""
    whole = len(order) // size * size
    return [part for part in (order[:whole].view(-1, size), order[None, whole:]) if part.numel()]


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same from the CPU on the device, which is not waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Rows:
    """Rows being coded. Matrices are transposed, so that a column of the weight is contiguous.

    weight: float32 [n_cols, n_rows]; units: the level of each code, alike; params: the format's, for all blocks.
    """

    def __init__(
        self, weight: torch.Tensor, h: torch.Tensor, fmt: Format, order: torch.Tensor, push: torch.Tensor
    ) -> None:
        """Fitted, and rounded to nearest. order, push: as `prepare` gives them."""
        self.weight, self.h, self.fmt, self.order, self.push = weight.T.contiguous(), h, fmt, order, push
        self.levels, self.inner = sweeps.Levels.of(fmt.levels, fmt.wide_levels, fmt.wide), _inner(h.device)
        self.params = fmt.fit(weight, h.diagonal())
        self.block = torch.arange(len(h), device=h.device) // fmt.block_size  # of each column
        self.repeated: dict[str, Repeated] = defaultdict(Repeated)
        scale, offset = self.columns_of(self.params, self.block)
        units = (self.weight - offset) * sweeps.inverse(scale)
        parts = (units[: fmt.wide], fmt.wide_levels), (units[fmt.wide :], fmt.levels)
        self.units = torch.cat([sweeps.nearest(*part) for part in parts])

    def columns_of(self, params: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and offset of columns that lie in these blocks, float32 [n, n_rows]."""
        return self.fmt.scale(params).T[block], self.fmt.offset(params).T[block]

    def codes(self) -> torch.Tensor:
        """uint8 [n_rows, n_cols], of the units."""
        fmt, wide = self.fmt, self.fmt.wide
        parts = (fmt.wide_levels, self.units[:wide]), (fmt.levels, self.units[wide:])
        return torch.cat([torch.searchsorted(levels, part.T.contiguous()) for levels, part in parts], 1).to(torch.uint8)

    def value(self) -> torch.Tensor:
        """What is stored, float32 [n_cols, n_rows]."""
        scale, offset = self.columns_of(self.params, self.block)
        return self.units * scale + offset

    def pull(self) -> torch.Tensor:
        """H (W - Q), float32 [n_cols, n_rows]."""
        return self.h @ (self.weight - self.value())

    def error(self) -> float:
        """Summed over the rows."""
        difference = self.weight - self.value()
        return float(((self.h @ difference) * difference).sum(dtype=torch.float64))

    def feedback(self) -> None:
        """Code all columns, in their order."""
        order, weight = self.order, self.weight[self.order]
        scales = self.fmt.scale(self.params).T, self.fmt.offset(self.params).T
        units = self.inner.sweep(weight.clone(), weight, self.push, *scales, self.block[order], order, self.levels)
        self.units = torch.empty_like(units)
        self.units[order] = units

    def refit(self, stretch: bool = True, pull: torch.Tensor | None = None) -> torch.Tensor:
        """Least squares for the parameters of each block in turn, then of each super-block, given the codes.

        stretch: the latter, too; where blocks have no parameters of their own in any case. pull: as `search` returns
        it; overwritten. Returns `pull`, which is valid until the next call.
        """
        fmt = self.fmt
        pull = self.pull() if pull is None else pull
        has_own = fmt.grid(self.params) is not None
        if has_own:
            pull = self.repeated["refit"](self._refit, pull)
        if fmt.super_size > fmt.block_size and (stretch or not has_own):
            pull = self.repeated["stretch"](self._stretch, pull)
        return pull

    def _refit(self, pull: torch.Tensor) -> torch.Tensor:
        self.inner.refit_all(self.units, pull, self.h, self.params, self.fmt)
        return pull

    def _stretch(self, pull: torch.Tensor) -> torch.Tensor:
        self.inner.stretch_all(self.units, pull, self.h, self.params, self.fmt)
        return pull

    def search(self, chance: torch.Generator, pull: torch.Tensor) -> torch.Tensor:
        """Code every block again, a few random ones at a time, and keep in each row what lowers its error.

        pull: as `refit` returns it; overwritten. Returns `pull`, which is valid until the next call.
        """
        fmt, size, device = self.fmt, self.fmt.block_size, self.weight.device
        n_rows, n_blocks = self.params.shape[:2]
        some = torch.randperm(n_blocks, generator=chance)
        factors = 1 + SPREAD * torch.randn(COPIES - 1, 1 + fmt.has_offset, n_rows, n_blocks, generator=chance)
        diagonal, inside = self.h.diagonal(), torch.arange(size, device=device)
        turns: list[torch.Tensor] = []
        for blocks in in_groups(sent(some, device), max(sweeps.COLUMNS // size, 1)):
            columns = (blocks[..., None] * size + inside).flatten(1)
            order = diagonal[columns].argsort(dim=1, descending=True, stable=True)
            turns += [blocks, order // size, *groups(self.h, columns.gather(1, order))]
        return self.repeated["search"](self._search, pull, sent(factors, device), *turns)

    def _search(self, pull: torch.Tensor, factors: torch.Tensor, *turns: torch.Tensor) -> torch.Tensor:
        """turns: of groups that are searched one after the other, stacked: the numbers of their blocks, in which of
        these each column is, in the order of coding, and the parts of `Group`; then of others, alike.
        """
        fmt, value, params = self.fmt, self.value(), self.params
        scale, offset = fmt.scale(params), fmt.offset(params)
        copies = torch.stack([params, *(fmt.nearest(scale * f[0], offset * f[-1], params) for f in factors)])
        scale, offset = (of(copies).transpose(1, 2).contiguous() for of in (fmt.scale, fmt.offset))
        taken = torch.zeros_like(scale[0], dtype=torch.int64)
        rest = value, pull, self.h, scale, offset, self.levels, self.units, taken
        for turn in zip(*[iter(turns)] * (2 + len(Group._fields)), strict=True):
            for here, block, *parts in zip(*turn, strict=True):
                self.inner.search_group(Group(*parts), here, block, *rest)
        at = taken.T.reshape(1, *params.shape[:2], *[1] * (params.dim() - 2))
        params.copy_(copies.gather(0, at.expand(1, *params.shape))[0])
        return pull


def _inner(device: torch.device) -> sweeps.Sweeps:
    """What sweeps matrices on this device. Raises EnvironmentFailed on a GPU without Triton."""
    if device.type == "cuda":
        try:
            from . import sweeps_triton
        except ImportError as error:
            raise no_triton(error) from None
        return sweeps_triton.Sweeps()
    library = native.library() if device.type == "cpu" else None
    return sweeps_c.Sweeps(library) if library else sweeps.Reference()


def no_triton(error: ImportError) -> EnvironmentFailed:
    """Instead of PyTorch's operations, which take 100 times as long."""
    return EnvironmentFailed(f"a GPU needs Triton to solve ({error}): run `pip install triton`, or use --device cpu")
