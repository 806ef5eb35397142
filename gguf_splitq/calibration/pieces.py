# SPDX-License-Identifier: MIT
"""Solving the rows of matrices where their Hessians are, and dealing them out to several processes.

Rows are independent, so a matrix may be cut between any two that the solver does not take together; one with a side
tensor is solved whole. A process gets about as many weights as any other.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from .. import types
from ..coding import families, solver
from ..coding.solver import Solution
from ..errors import InputError
from ..plan import Entry
from ..types.columns import Layout
from . import aims
from .moments import Layer
from .ranks import Alone

_ON_GPU = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor's matrix that one process solves.

    number: of the matrix in the tensor; first: of the first row there. n_cols: of each. kind, layout: the type. layer:
    the name of the layer that has the rows; order: their numbers in it. rows: float32 [n_rows, n_cols], None where they
    are to be read, or are the layer's own.
    """

    tensor: str
    number: int
    first: int
    n_cols: int
    kind: str
    layout: Layout
    layer: str
    order: torch.Tensor
    rows: np.ndarray | None = None

    @property
    def whole(self) -> bool:
        """Whether its rows have something in common."""
        return types.get(self.kind).columns is not None

    def cut(self, start: int, end: int) -> Piece:
        """Some of the rows, before they are read."""
        return replace(self, first=self.first + start, order=self.order[start:end])


class Found(NamedTuple):
    """packed: uint8 [n_rows, row_bytes]; side: uint8 [size] of a side tensor; errors: by stage, the mean of a row."""

    packed: np.ndarray
    side: np.ndarray | None
    errors: dict[str, float]


def alone(count: int) -> ThreadPoolExecutor:
    """Threads that compute alone."""
    return ThreadPoolExecutor(count, "solve", lambda: torch.set_num_threads(1))


def of_matrix(entry: Entry, number: int, layer: Layer, order: torch.Tensor) -> Piece:
    """All rows of matrix `number` of a tensor."""
    first, n_cols = number * len(order), entry.tensor.n_cols
    return Piece(entry.name, number, first, n_cols, entry.coder.name, entry.layout, layer.name, order)


def to_send(piece: Piece, rows: np.ndarray, layer: Layer) -> Piece:
    """The same with its rows, unless they are those that the layer has elsewhere too."""
    own = torch.equal(_own(piece, layer).cpu(), torch.from_numpy(rows))
    return piece if own else replace(piece, rows=rows)


def _own(piece: Piece, layer: Layer) -> torch.Tensor:
    return layer.weight[piece.order.to(layer.weight.device)].float()


def deal(pieces: Iterable[Piece], count: int) -> list[list[Piece]]:
    """The same, cut and in order, for each of `count` processes."""
    pieces = list(pieces)
    hands: list[list[Piece]] = [[] for _ in range(count)]
    total, before = sum(len(piece.order) * piece.n_cols for piece in pieces), 0
    for piece in pieces:
        n_rows = len(piece.order)
        step = n_rows if piece.whole else solver.rows_together(n_rows, piece.n_cols)
        owners = [(count * (before + start * piece.n_cols) // total, start) for start in range(0, n_rows, step)]
        for owner, starts in itertools.groupby(owners, lambda pair: pair[0]):
            mine = [start for _, start in starts]
            hands[owner].append(piece.cut(mine[0], mine[-1] + step))
        before += n_rows * piece.n_cols
    return hands


def solve(
    pieces: Sequence[Piece],
    layers: Sequence[Layer],
    pool: Executor,
    each: solver.Each = map,
    read: Callable[[Piece], np.ndarray] | None = None,
) -> Iterator[Found]:
    """What becomes of each piece, in order. pool: threads for pieces, each: what takes rows of one.

    read: gives the rows.
    """
    named = {layer.name: layer for layer in layers}

    def one(piece: Piece) -> Found:
        layer = named[piece.layer]
        rows = read(piece) if read else _own(piece, layer) if piece.rows is None else piece.rows
        kind = types.get(piece.kind)
        with turn(kind, layer):
            at = piece.tensor, kind, piece.layout
            solved = of_rows(*at, torch.as_tensor(rows), layer, piece.order, each)[1]
            return Found(solved.packed.cpu().numpy(), solved.side, solved.errors)

    return pool.map(one, pieces)


def turn(kind: types.TensorType, layer: Layer) -> contextlib.AbstractContextManager:
    """On a GPU one matrix is solved at a time, so that its memory is bounded."""
    cuda = layer.hessian is not None and layer.hessian.is_cuda and families.on_gpu(kind)
    return _ON_GPU if cuda else contextlib.nullcontext()


def of_rows(
    tensor: str,
    kind: types.TensorType,
    layout: Layout,
    weight: torch.Tensor,
    layer: Layer,
    order: torch.Tensor,
    each: solver.Each = map,
) -> tuple[torch.Tensor, Solution]:
    """Rows float32 [n_rows, n_cols] of a tensor where they are solved, and what becomes of them. order: as of `Piece`.

    layer: has a Hessian. Raises InputError, naming the tensor, when that is not positive definite.
    """
    code = families.coder(kind, layout)
    assert code and layer.hessian is not None
    hessian = layer.hessian if families.on_gpu(kind) else layer.hessian.cpu()
    weight = weight.to(hessian.device)
    try:
        return weight, code(aims.moved(weight, layer, order), hessian, each=each)
    except InputError as error:
        raise InputError(f"tensor {tensor!r}: {error}") from error


def help_out(layers: Sequence[Layer], ranks: Alone, pool: Executor, each: solver.Each = map) -> None:
    """Solve what the first process deals to this one."""
    mine: list[Piece] = ranks.dealt(list)
    ranks.gathered(list(solve(mine, layers, pool, each)))
