"""Coding a matrix for a CLAQ type: k-means of every column on the weights that the other columns' errors call for.

1. Feedback, as in solver.py: columns in the order of falling Hessian diagonal, each clustered where it is best given
   the columns already coded; what it misses is pushed into the later ones.
2. Then, beyond the paper, passes of: least-squares scales of the rows; every column clustered again, from its
   codebook, at what is best given all others (coordinate descent over codes and codebooks); and a few random columns
   at a time coded again with their codebooks as they are, where a row keeps what lowers its error.

Without a Hessian columns do not see each other, and importance only tells which of them get more bits.
Which columns are wide and which weights are kept apart is chosen beforehand, by what an error costs when the columns
coded later may repair it: 1 / (H^-1)_cc; or, for the wide ones, by the paper's Outlier Order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..kmeans import kmeans
from ..types.claq import Claq
from ..types.columns import Side
from . import solver
from .solver import Solution

PASSES = 5
FREE_PASSES = 2  # without a Hessian, where there is little to gain
COLUMNS = 128  # coded again at a time
PIECE = 1 << 20  # weights that temporary values are kept of
ROUNDS = 2  # of k-means that starts from a codebook
OUTLIER = 13  # times the mean |weight|: what the paper's order counts

Code = Callable[[int, np.ndarray], np.ndarray]


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    kind: Claq,
    importance: torch.Tensor | None = None,
    passes: int | None = None,
) -> Solution:
    """Code `weight` float32 [n_rows, n_cols] against `hessian` [n_cols, n_cols], or each column for itself.

    importance: float32 [n_cols], not negative, in the place of a Hessian. passes: of step 2, by default PASSES or,
    without a Hessian, FREE_PASSES. `errors` has the stages "nearest" (k-means of every column alone), "feedback" and
    "polish". Raises InputError as `solver.solve` does.
    """
    passes = passes if passes is not None else PASSES if hessian is not None else FREE_PASSES
    if hessian is None:
        importance = torch.ones(weight.shape[1]) if importance is None else importance
        importance = importance.clamp_min(1e-6 * float(importance.max())) if importance.any() else importance + 1
        matrix, damping = _Matrix(weight, None, importance, importance, kind), 0.0
        nearest = fed = matrix.error()
    else:
        # Codebooks take any size of a column; damping that is relative to it makes the result the same for all sizes.
        size = weight.double().square().mean(0).sqrt()
        size = size.clamp_min(1e-6 * float(size.max())) if size.any() else 1.0
        h, order, push, damping = solver._prepare(hessian, solver.DAMPING, size)
        matrix, chance = _Matrix(weight, h, h.diagonal(), prices(h), kind), torch.Generator().manual_seed(0)
        nearest = matrix.error()
        matrix.feedback(order, push)
        fed = matrix.error()
    for left in reversed(range(passes)):
        matrix.refit_rows()
        matrix.cluster_again()
        if hessian is not None and left:
            matrix.search(chance)
    packed, side = matrix.pack()
    errors = {"nearest": nearest, "feedback": fed, "polish": matrix.error()}
    errors = {stage: error / len(weight) for stage, error in errors.items()}
    return Solution(torch.from_numpy(packed), matrix.value.T.contiguous(), errors, damping, side)


class _Matrix:
    """A matrix being coded, transposed, so that a column of the weight is contiguous.

    weight, value: float32 [n_cols, n_rows], what is wanted and what is stored. h: float32 [n_cols, n_cols], or None
    and then `diagonal` float32 [n_cols] is all there is. price: float32 [n_cols], of an error in a column. row: float32
    [n_rows]; scale, levels: of each column. kept: int [n_cols], how many weights of a column are outliers, and
    outlier: bool [n_cols, n_rows], which.
    """

    def __init__(
        self, weight: torch.Tensor, h: torch.Tensor | None, diagonal: torch.Tensor, price: torch.Tensor, kind: Claq
    ):
        """Every column clustered alone."""
        self.weight, self.h, self.diagonal, self.kind = weight.T.contiguous(), h, diagonal, kind
        n_cols, n_rows = self.weight.shape
        self._set_row(torch.cat([row_sizes(self.weight[:, rows].square(), diagonal) for rows in self._pieces()]))
        wide = ranked(self.weight, price, kind.metric)[: 32 * kind.wide].numpy()
        rest = np.setdiff1d(np.arange(n_cols), wide)
        self.order = np.concatenate([np.sort(wide), rest])
        self.sizes = np.empty(n_cols, np.int64)
        self.sizes[self.order] = 1 << kind.bits(n_cols)
        self.scale, self.levels = np.zeros(n_cols, np.float32), [np.zeros(0, np.int8)] * n_cols
        self.table: list[np.ndarray | None] = [None] * n_cols
        self.kept, self.outlier = np.zeros(n_cols, np.int64), None
        self.value = self._sweep(self.weight, None, self._cluster)
        if kind.outliers:
            self.outlier = np.zeros((n_cols, n_rows), bool)
            self.kept = _counts((self.weight - self.value).square_().mul_(price[:, None]).numpy(), kind.outliers)
            self.value = self._sweep(self.weight, None, self._cluster)

    def error(self) -> float:
        """Summed over the rows."""
        total = 0.0
        for rows in self._pieces():
            missed = self.weight[:, rows] - self.value[:, rows]
            total += float((self._times(missed) * missed).sum(dtype=torch.float64))
        return total

    def feedback(self, order: torch.Tensor, push: torch.Tensor) -> None:
        """Code all columns anew in this order. push: as `solver._push` gives it."""
        self.table = [None] * len(self.table)
        weight = self.weight[order]
        self.value[order] = self._sweep(weight.clone(), push, self._cluster, order.tolist(), weight)

    def refit_rows(self) -> None:
        """Least squares for the scale of each row."""
        new = self.row.clone()
        for rows in self._pieces():
            value = self.value[:, rows]
            unit = value if self.outlier is None else value.masked_fill(torch.from_numpy(self.outlier[:, rows]), 0)
            pull, against = self._times(self.weight[:, rows] - value), (self._times(unit) * unit).sum(0)
            step = torch.where(against > 0, (pull * unit).sum(0) / against, 0).clamp_(-0.5, 1)
            new[rows] = _stored(self.row[rows] * (1 + step))
            value += unit * torch.where(self.row[rows] > 0, new[rows] / self.row[rows] - 1, 0)
        self._set_row(new)

    def cluster_again(self) -> None:
        """Cluster each column at what is best for it, given all others."""
        aims = torch.empty_like(self.value)
        for rows in self._pieces():
            pull = self._times(self.weight[:, rows] - self.value[:, rows])
            torch.addcdiv(self.value[:, rows], pull, self.diagonal[:, None], out=aims[:, rows])
        push = None if self.h is None else -self.h / self.diagonal
        self.value = self._sweep(aims, push, self._cluster, base=self.value)

    def search(self, chance: torch.Generator) -> None:
        """Code the columns again, a few random ones at a time, with their codebooks as they are."""
        pull = self._times(self.weight - self.value)
        for columns in torch.randperm(len(self.value), generator=chance).split(COLUMNS):
            columns = columns[self.diagonal[columns].argsort(descending=True, stable=True)]
            h, base, here = self.h[columns][:, columns], self.value[columns], pull[columns]
            factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1).double())
            if failed:  # positive definite, but not in float32
                continue
            aims = torch.addmm(base, torch.cholesky_inverse(factor).flip(0, 1).float(), here)
            found = self._sweep(aims.clone(), solver._push(factor), self._nearest, columns.tolist(), aims)
            ratio = h / h.diagonal()
            aims = torch.addmm(found, ratio.T, aims - found)
            change = self._sweep(aims, -ratio, self._nearest, columns.tolist(), found) - base
            change *= solver._gain(h, here, change) > 0
            self.value[columns] += change
            pull.addmm_(self.h[columns].T, change, alpha=-1)

    def pack(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [n_rows, row_bytes], uint8 [size]); `value` becomes exactly what they stand for."""
        n_cols, n_rows = self.weight.shape
        codes, levels = np.empty((n_rows, n_cols), np.uint8), np.zeros((n_cols, 16), np.int8)
        value = self.value.numpy()
        places = []
        for stored, c in enumerate(self.order):
            codes[:, stored] = code = self._codes(c, value[c])
            levels[stored, : len(self.levels[c])] = self.levels[c]
            exact = self.table[c][code] * self.row_numpy
            if self.kept[c]:
                rows = np.flatnonzero(self.outlier[c])
                rest = _half(value[c][rows] - exact[rows])
                exact[rows] += rest.astype(np.float32)
                places.append((rows, np.full(len(rows), stored), rest))
            value[c] = exact
        side = Side(self.order, self.scale[self.order], self.row_numpy, levels)
        if places:
            rows, columns, rest = (np.concatenate(part) for part in zip(*places, strict=True))
            by_row = np.lexsort((columns, rows))
            start = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))])
            side = Side(side.order, side.scale, side.row, levels, start, columns[by_row], rest[by_row])
        return self.kind.pack(codes, side)

    def _pieces(self) -> list[slice]:
        """Of the rows, so that what is computed on the way stays small."""
        n_cols, n_rows = self.weight.shape
        step = max(1, PIECE // n_cols)
        return [slice(first, first + step) for first in range(0, n_rows, step)]

    def _times(self, x: torch.Tensor) -> torch.Tensor:
        return self.diagonal[:, None] * x if self.h is None else self.h @ x

    def _set_row(self, row: torch.Tensor) -> None:
        self.row = _stored(row)
        self.row_numpy = self.row.numpy()
        self.inverse = np.divide(1, self.row_numpy, out=np.zeros_like(self.row_numpy), where=self.row_numpy > 0)
        self.heavy = self.row_numpy.astype(np.float64) ** 2

    def _sweep(
        self,
        aims: torch.Tensor,
        push: torch.Tensor | None,
        code: Code,
        columns: list[int] | None = None,
        base: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Code column after column at its aim; what it changes from `base` moves the aims of the later ones.

        aims: float32 [n, n_rows], of these columns, by default of all; overwritten. push: as `solver._sweep` has it, or
        None: then nothing moves and `base` [n, n_rows] is not needed. Returns the values, float32 [n, n_rows].
        """
        columns = range(len(aims)) if columns is None else columns
        found = torch.empty_like(aims)
        changes = found if push is None else torch.empty_like(aims)
        parts = [part.numpy() for part in (aims, aims if base is None else base, found, changes)]

        def run(start: int, end: int) -> None:
            if end - start > solver.LEAF:  # half by half, so that most changes are pushed on in large groups
                half = (start + end) // 2
                run(start, half)
                if push is not None:
                    aims[half:end].addmm_(push[start:half, half:end].T, changes[start:half])
                run(half, end)
                return
            for i in range(start, end):
                aim, old, new, change = (part[i] for part in parts)
                new[:] = code(columns[i], aim)
                if push is None:
                    continue
                np.subtract(new, old, out=change)
                if i + 1 < end:
                    aims[i + 1 : end].addr_(push[i, i + 1 : end], changes[i])

        run(0, len(aims))
        return found

    def _cluster(self, c: int, aim: np.ndarray) -> np.ndarray:
        """The column's values near float32 `aim` [n_rows], with a new codebook, and new outliers if it has some."""
        unit, heavy, table, kept = aim * self.inverse, self.heavy, self.table[c], self.kept[c]
        if kept:
            far = np.abs(aim) if table is None else np.abs(aim - self._nearest(c, aim, plain=True))
            outlier = np.argpartition(far, -kept)[-kept:]
            self.outlier[c] = False
            self.outlier[c, outlier] = True
            inside = ~self.outlier[c]
            unit, heavy = unit[inside], heavy[inside]
        if len(unit):
            centres = kmeans(unit, heavy, self.sizes[c], table, 16 if table is None else ROUNDS)
        else:
            centres = np.zeros(self.sizes[c])
        scale = np.float32(_half(np.abs(centres).max() / 127))
        self.scale[c] = scale
        levels = np.rint(centres / scale).clip(-127, 127) if scale else np.zeros(len(centres))
        self.levels[c] = levels.astype(np.int8)
        self.table[c] = scale * levels.astype(np.float32)
        return self._nearest(c, aim)

    def _nearest(self, c: int, aim: np.ndarray, plain: bool = False) -> np.ndarray:
        """The column's values nearest to `aim`, its outliers at it unless `plain`."""
        found = self.table[c][self._codes(c, aim)] * self.row_numpy
        if self.kept[c] and not plain:
            np.copyto(found, aim, where=self.outlier[c])
        return found

    def _codes(self, c: int, aim: np.ndarray) -> np.ndarray:
        table = self.table[c]
        return np.searchsorted((table[1:] + table[:-1]) / 2, aim * self.inverse)


def prices(h: torch.Tensor) -> torch.Tensor:
    """float32 [n_cols]: what an error in a column costs when the columns coded later may repair it. h: damped."""
    return 1 / torch.cholesky_inverse(torch.linalg.cholesky(h.double())).diagonal().float()


def ranked(weight: torch.Tensor, price: torch.Tensor, metric: str) -> torch.Tensor:
    """int64 [n_cols]: the columns, those first that most ought to be wide. weight: float32 [n_cols, n_rows]."""
    cost = price * torch.linalg.vector_norm(weight, dim=1).square()
    rank = cost.double() / max(float(cost.max()), 1e-300)
    if metric == "outlier":
        size = weight.abs()
        rank = (size > OUTLIER * size.mean()).sum(1) + rank / 2  # the cost decides among equal counts
    return rank.argsort(descending=True, stable=True)


def row_sizes(square: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    """float32 [n_rows]: the size of each row's weights, of which `square` float32 [n_cols, n_rows] has the squares."""
    return (torch.mv(square.T, diagonal) / diagonal.sum()).sqrt()


def _counts(cost: np.ndarray, count: int) -> np.ndarray:
    """int [n_cols]: how many of the `count` largest of `cost` [n_cols, n_rows] lie in each column."""
    least = np.partition(cost, -count, None)[-count]
    counts = (cost > least).sum(1)
    equal = np.flatnonzero(cost == least)[: count - counts.sum()] // cost.shape[1]
    return counts + np.bincount(equal, minlength=len(cost))


def _stored(row: torch.Tensor) -> torch.Tensor:
    """The nearest float16 values, as float32."""
    return torch.from_numpy(_half(row.numpy()).astype(np.float32))


def _half(values: np.ndarray) -> np.ndarray:
    """float16, never infinite."""
    return np.clip(values, -65504, 65504).astype(np.float16)
