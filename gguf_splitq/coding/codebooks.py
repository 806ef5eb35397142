# SPDX-License-Identifier: MIT
"""Coding a matrix for a CLAQ type: k-means of every column on the weights that the other columns' errors call for.

1. Feedback, as in solver.py: columns in the order of falling Hessian diagonal, each clustered where it is best given
   the columns already coded; what it misses is pushed into the later ones.
2. Then, beyond the paper, passes of: least-squares scales of the rows; every column clustered again, from its
   codebook, at what is best given all others (coordinate descent over codes and codebooks); and a few random columns
   at a time coded again with their codebooks as they are, where a row keeps what lowers its error.

Which columns are wide and which weights are kept apart is chosen beforehand, by what an error costs when the columns
coded later may repair it: 1 / (H^-1)_cc; or, for the wide ones, by the paper's Outlier Order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from ..types.claq import Claq
from ..types.columns import PLAIN, Layout, Side
from . import solver, sweeps
from .kmeans import kmeans
from .solver import Solution

PASSES = 5
COLUMNS = 128  # coded again at a time
PIECE = 1 << 20  # weights that temporary values are kept of
ROUNDS = 2  # of k-means that starts from a codebook
BYTES = 110  # of memory per weight, all rows together; twice that for the FIRST ones; measured
FIRST = 1 << 22
OUTLIER = 13  # times the mean |weight|: what the paper's order counts

_NO_TABLE = np.zeros(0, np.float32)

Code = Callable[[int, np.ndarray], np.ndarray]


class Cluster(Protocol):
    """What `kmeans` does: the centres of weighted values."""

    def __call__(
        self, values: np.ndarray, weights: np.ndarray, k: int, centres: np.ndarray | None, rounds: int, /
    ) -> np.ndarray: ...


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    kind: Claq,
    layout: Layout = PLAIN,
    passes: int = PASSES,
    cluster: Cluster = kmeans,
    row_scales: bool = True,
    each: solver.Each = map,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols].

    passes: of step 2. cluster: what finds the values of a column's codebook. row_scales: whether each row has a scale
    of its own. each: not used, since the rows of a matrix share its codebooks. With no passes and one scale it is CLAQ
    as published. `errors` has the stages "nearest" (k-means of every column alone), "feedback" and "polish". It runs on
    the CPU. Raises InputError as `solver.solve` does.
    """
    weight, hessian = weight.cpu(), hessian.cpu()
    # Codebooks take any size of a column; damping that is relative to it makes the result the same for all sizes.
    size = weight.double().square().mean(0).sqrt()
    size = size.clamp_min(1e-6 * float(size.max())) if size.any() else torch.ones_like(size)
    h, order, push, damping = solver.prepare(hessian, solver.DAMPING, size)
    matrix, chance = _Matrix(weight, h, kind, layout, cluster, row_scales), torch.Generator().manual_seed(0)
    nearest = matrix.error()
    matrix.feedback(order, push)
    fed = matrix.error()
    for left in reversed(range(passes)):
        matrix.refit_rows()
        matrix.cluster_again()
        if left:
            matrix.search(chance)
    packed, side = matrix.pack()
    errors = {"nearest": nearest, "feedback": fed, "polish": matrix.error()}
    errors = {stage: error / len(weight) for stage, error in errors.items()}
    return Solution(torch.from_numpy(packed), matrix.value.T.contiguous(), errors, damping, side)


def coding_bytes(n_rows: int, n_cols: int) -> int:
    """Bytes of memory that `solve` takes beside the Hessian and the rows."""
    return BYTES * (n_rows * n_cols + min(n_rows * n_cols, FIRST))


class Codebooks:
    """What the columns and rows of a matrix have in common while it is coded.

    order: int [n_cols], as they are stored, the wide columns first. row: float32 [n_rows]. Of each column: table, the
    values of its codebook, empty at first, and what it is stored as, scale and levels; kept, how many of its weights
    are outliers.
    """

    def __init__(self, kind: Claq, layout: Layout, order: np.ndarray, row: torch.Tensor, cluster: Cluster = kmeans):
        n_cols = len(order)
        self.kind, self.layout, self.order, self.centres = kind, layout, order, cluster
        self.sizes = np.empty(n_cols, np.int64)
        self.sizes[order] = 1 << kind.bits(n_cols, layout)
        self.scale, self.levels = np.zeros(n_cols, np.float32), np.zeros((n_cols, 16), np.int8)
        self.table = [_NO_TABLE] * n_cols
        self.kept = np.zeros(n_cols, np.int64)
        self.set_row(row)

    def set_row(self, row: torch.Tensor) -> None:
        """Scales of rows; what is nearest to them in float16 is taken."""
        self.row = torch.from_numpy(half(row.numpy()).astype(np.float32))
        self.row_numpy = self.row.numpy()
        self.inverse = np.divide(1, self.row_numpy, out=np.zeros_like(self.row_numpy), where=self.row_numpy > 0)
        self.heavy = self.row_numpy.astype(np.float64) ** 2

    def cluster(self, c: int, aim: np.ndarray) -> np.ndarray:
        """Give the column a new codebook, for values near `aim` float32 [n_rows]; int [kept], its new outliers."""
        unit, heavy, table, outliers = aim * self.inverse, self.heavy, self.table[c], np.zeros(0, np.int64)
        if kept := self.kept[c]:
            far = np.abs(aim - self.nearest(c, aim) if len(table) else aim)
            outliers = np.argpartition(far, -kept)[-kept:]
            inside = np.ones(len(unit), bool)
            inside[outliers] = False
            unit, heavy = unit[inside], heavy[inside]
        if len(unit):
            start, rounds = (table, ROUNDS) if len(table) else (None, 16)
            centres = self.centres(unit, heavy, self.sizes[c], start, rounds)
        else:
            centres = np.zeros(self.sizes[c])
        scale = np.float32(half(np.abs(centres).max() / 127))
        self.scale[c] = scale
        levels = np.rint(centres / scale).clip(-127, 127) if scale else np.zeros(len(centres))
        self.levels[c, : len(levels)] = levels
        self.table[c] = scale * levels.astype(np.float32)
        return outliers

    def codes(self, c: int, aim: np.ndarray) -> np.ndarray:
        """int [n_rows]: of the column's values nearest to `aim`."""
        table = self.table[c]
        return np.searchsorted((table[1:] + table[:-1]) / 2, aim * self.inverse)

    def nearest(self, c: int, aim: np.ndarray) -> np.ndarray:
        """float32 [n_rows]: the column's values nearest to `aim`."""
        return self.table[c][self.codes(c, aim)] * self.row_numpy

    def refit(self, rows: slice, pull: torch.Tensor, unit: torch.Tensor, against: torch.Tensor) -> torch.Tensor:
        """float32 [n]: least-squares scales of some rows, as they are stored.

        unit: float32 [n_cols, n], their values without outliers. pull: what is missed, times the Hessian. against:
        `unit`, the same.
        """
        against = (against * unit).sum(0)
        step = torch.where(against > 0, (pull * unit).sum(0) / against, 0).clamp_(-0.5, 1)
        return torch.from_numpy(half((self.row[rows] * (1 + step)).numpy()).astype(np.float32))

    def pack(
        self, codes: np.ndarray, rows: np.ndarray, columns: np.ndarray, missed: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n_rows, row_bytes], uint8 [size]) of codes uint8 [n_rows, n_cols] in stored order.

        rows, columns, missed: of each outlier, rows rising, stored columns rising in a row, and what its code misses.
        """
        start = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(codes)))])
        side = Side(self.order, self.scale[self.order], self.row_numpy, self.levels[self.order])
        return self.kind.pack(codes, replace(side, start=start, column=columns, value=half(missed)), self.layout)


class _Matrix:
    """A matrix being coded, transposed, so that a column of the weight is contiguous.

    weight, value: float32 [n_cols, n_rows], what is wanted and what is stored. h: float32 [n_cols, n_cols]. outlier:
    bool [n_cols, n_rows], None where the type has none.
    """

    def __init__(
        self, weight: torch.Tensor, h: torch.Tensor, kind: Claq, layout: Layout, cluster: Cluster, row_scales: bool
    ):
        """Every column clustered alone."""
        self.weight, self.h, self.diagonal = weight.T.contiguous(), h, h.diagonal()
        row = row_sizes((self.weight[:, rows] for rows in self._pieces()), self.diagonal, row_scales)
        price = prices(h)
        self.books, self.outlier = Codebooks(kind, layout, order(layout, [self.weight], price), row, cluster), None
        self.value = self._alone()
        if layout.outliers:
            self.outlier = np.zeros(self.weight.shape, bool)
            cost = (self.weight - self.value).square_().mul_(price[:, None])
            self.books.kept = counts([cost.numpy()], layout.outliers)
            self.value = self._alone()

    def error(self) -> float:
        """Summed over the rows."""
        total = 0.0
        for rows in self._pieces():
            missed = self.weight[:, rows] - self.value[:, rows]
            total += float((self.h @ missed * missed).sum(dtype=torch.float64))
        return total

    def feedback(self, order: torch.Tensor, push: torch.Tensor) -> None:
        """Code all columns anew in this order. push: as `solver.pushes` gives it."""
        self.books.table = [_NO_TABLE] * len(order)
        weight = self.weight[order]
        self.value[order] = self._sweep(weight.clone(), weight, push, self._cluster, order.tolist())

    def refit_rows(self) -> None:
        """Least squares for the scale of each row."""
        new = self.books.row.clone()
        for rows in self._pieces():
            value, old = self.value[:, rows], self.books.row[rows]
            unit = value if self.outlier is None else value.masked_fill(torch.from_numpy(self.outlier[:, rows]), 0)
            new[rows] = self.books.refit(rows, self.h @ (self.weight[:, rows] - value), unit, self.h @ unit)
            value += unit * torch.where(old > 0, new[rows] / old - 1, 0)
        self.books.set_row(new)

    def cluster_again(self) -> None:
        """Cluster each column at what is best for it, given all others."""
        aims = torch.empty_like(self.value)
        for rows in self._pieces():
            pull = self.h @ (self.weight[:, rows] - self.value[:, rows])
            torch.addcdiv(self.value[:, rows], pull, self.diagonal[:, None], out=aims[:, rows])
        self.value = self._sweep(aims, self.value, -self.h / self.diagonal, self._cluster, range(len(aims)))

    def search(self, chance: torch.Generator) -> None:
        """Code the columns again, a few random ones at a time, with their codebooks as they are."""
        pull = self.h @ (self.weight - self.value)
        for columns in torch.randperm(len(self.value), generator=chance).split(COLUMNS):
            columns = columns[self.diagonal[columns].argsort(descending=True, stable=True)]
            h, base, here = self.h[columns][:, columns], self.value[columns], pull[columns]
            factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1).double())
            if failed:  # positive definite, but not in float32
                continue
            aims = torch.addmm(base, torch.cholesky_inverse(factor).flip(0, 1).float(), here)
            found = self._sweep(aims.clone(), aims, solver.pushes(factor), self._nearest, columns.tolist())
            ratio = h / h.diagonal()
            aims = torch.addmm(found, ratio.T, aims - found)
            change = self._sweep(aims, found, -ratio, self._nearest, columns.tolist()) - base
            change *= sweeps.gains(h, here, change) > 0
            self.value[columns] += change
            pull.addmm_(self.h[columns].T, change, alpha=-1)

    def pack(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n_rows, row_bytes], uint8 [size]); `value` becomes exactly what they stand for."""
        books, value, codes = self.books, self.value.numpy(), np.empty(self.weight.shape[::-1], np.uint8)
        outliers = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float16))]
        for stored, c in enumerate(books.order):
            codes[:, stored] = code = books.codes(c, value[c])
            exact = books.table[c][code] * books.row_numpy
            if self.outlier is not None and books.kept[c]:
                rows = np.flatnonzero(self.outlier[c])
                rest = half(value[c][rows] - exact[rows])
                exact[rows] += rest.astype(np.float32)
                outliers.append((rows, np.full(len(rows), stored), rest))
            value[c] = exact
        rows, columns, rest = (np.concatenate(part) for part in zip(*outliers, strict=True))
        by_row = np.lexsort((columns, rows))
        return books.pack(codes, rows[by_row], columns[by_row], rest[by_row])

    def _pieces(self) -> list[slice]:
        """Of the rows, so that what is computed on the way stays small."""
        n_cols, n_rows = self.weight.shape
        step = max(1, PIECE // n_cols)
        return [slice(first, first + step) for first in range(0, n_rows, step)]

    def _alone(self) -> torch.Tensor:
        """float32 [n_cols, n_rows]: every column clustered at what is wanted."""
        return torch.from_numpy(np.stack([self._cluster(c, aim) for c, aim in enumerate(self.weight.numpy())]))

    def _sweep(
        self, aims: torch.Tensor, base: torch.Tensor, push: torch.Tensor, code: Code, columns: Sequence[int]
    ) -> torch.Tensor:
        """Code column after column at its aim; what it changes from `base` moves the aims of the later ones.

        aims, base: float32 [n, n_rows], of these columns; aims is overwritten. push: as `sweeps.Sweeps.sweep` takes it.
        Returns the values, float32 [n, n_rows].
        """
        found, changes = torch.empty_like(aims), torch.empty_like(aims)
        parts = [part.numpy() for part in (aims, base, found, changes)]

        def leaf(start: int, end: int) -> None:
            for i in range(start, end):
                aim, old, new, change = (part[i] for part in parts)
                new[:] = code(columns[i], aim)
                np.subtract(new, old, out=change)
                if i + 1 < end:
                    aims[i + 1 : end].addr_(push[i, i + 1 : end], changes[i])

        sweeps.in_halves(leaf, aims, push, changes, 0, len(aims))
        return found

    def _cluster(self, c: int, aim: np.ndarray) -> np.ndarray:
        """The column's values near float32 `aim` [n_rows], with a new codebook, and new outliers if it has some."""
        outliers = self.books.cluster(c, aim)
        if self.outlier is not None:
            self.outlier[c] = False
            self.outlier[c, outliers] = True
        return self._nearest(c, aim)

    def _nearest(self, c: int, aim: np.ndarray) -> np.ndarray:
        """The column's values nearest to `aim`, its outliers at it."""
        found = self.books.nearest(c, aim)
        if self.outlier is not None:
            np.copyto(found, aim, where=self.outlier[c])
        return found


def prices(h: torch.Tensor) -> torch.Tensor:
    """float32 [n_cols]: what an error in a column costs when the columns coded later may repair it. h: damped."""
    return 1 / torch.cholesky_inverse(torch.linalg.cholesky(h.double())).diagonal().float()


def order(layout: Layout, parts: Iterable[torch.Tensor], price: torch.Tensor) -> np.ndarray:
    """int [n_cols]: the columns, the wide ones first, neighbours together: heads have their own sizes.

    parts: float32 [some columns, n_rows], which together are the weight, each time they are iterated over. price:
    float32 [n_cols], of an error.
    """
    columns = torch.arange(len(price))
    if not layout.wide:
        return columns.numpy()
    cost = price * torch.cat([torch.linalg.vector_norm(part, dim=1) for part in parts]).square()
    rank = cost.double() / max(float(cost.max()), 1e-300)
    if layout.metric == "outlier":
        sums, sizes = zip(*((float(part.abs().sum(dtype=torch.float64)), part.numel()) for part in parts), strict=True)
        least = OUTLIER * sum(sums) / sum(sizes)
        rank = torch.cat([(part.abs() > least).sum(1) for part in parts]) + rank / 2  # which decides among equal counts
    wide = torch.zeros(len(price), dtype=torch.bool)
    wide[rank.argsort(descending=True, stable=True)[: 32 * layout.wide]] = True
    return torch.cat([columns[wide], columns[~wide]]).numpy()


def row_sizes(parts: Iterable[torch.Tensor], price: torch.Tensor, each: bool = True) -> torch.Tensor:
    """float32 [n_rows]: the size of each row's weights, errors weighted by `price` [n_cols], or one size for all rows.

    parts: float32 [n_cols, some rows], which together are the weight.
    """
    sizes, means = [], []
    for part in parts:
        square = part.square()
        sizes.append((torch.mv(square.T, price) / price.sum()).sqrt())
        means.append(square.mean())
    row = torch.cat(sizes)
    return row if each else torch.full_like(row, float(torch.stack(means).mean().sqrt()))


def counts(costs: Iterable[np.ndarray], count: int) -> np.ndarray:
    """int [n_cols]: how many of the `count` largest of float32 [n_cols, n_rows], given in parts, lie in each column."""
    largest, column, n_cols = np.zeros(0, np.float32), np.zeros(0, np.int64), 0
    for cost in costs:
        largest = np.concatenate([largest, cost.ravel()])
        column = np.concatenate([column, np.repeat(np.arange(n_cols, n_cols + len(cost)), cost.shape[1])])
        n_cols += len(cost)
        if len(largest) > count:
            least = np.partition(largest, -count)[-count]
            kept = largest > least
            kept[np.flatnonzero(largest == least)[: count - kept.sum()]] = True
            largest, column = largest[kept], column[kept]
    return np.bincount(column, minlength=n_cols)


def half(values: np.ndarray) -> np.ndarray:
    """float16, never infinite."""
    return np.clip(values, -65504, 65504).astype(np.float16)
