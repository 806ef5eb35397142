# SPDX-License-Identifier: MIT
"""Calibration: the Hessian of every matrix, and which matrix a GGUF tensor is.

The Hessian is the second moment of a matrix's inputs, each token counted by its Fisher information |g|^2 (fisher.py):
what an error at this token costs the model's output. Products are float32 per batch, their sum is float64. It is
summed in blocks of columns, a block by one thread and always the same blocks, so that the number of threads does not
show. The huge activations of a sequence's first token stay in: without, the result measured worse. An expert that saw
fewer tokens than it has columns takes the moments of all experts together.

GGUF tensors are found by content, not by name: the rows of a GGUF matrix are rows of one matrix here, in any order
(llama.cpp reorders those of Q and K), and perhaps not all of them (it splits what transformers fuses). What no matrix
has is left to nearest rounding and is counted.

Besides the tokens for the Hessians, a few others are run, for the last layers alone: what these matrices saw of them is
kept, to tell whether the codes are better than nearest rounding's there too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import fisher
from .model import BATCH, Model
from .ranks import ALONE, Alone
from .watch import matrices

COLUMNS = 512  # of a Hessian that are one thread's work
ON_GPU = 2048  # of them at a time there: half of the matrix is left out, and products are large enough
CHECKED = 2  # layers, the first that are solved, whose codes are tried on other tokens

Key = tuple[str, int | None]  # a matrix's name, and the expert
Taken = Sequence[torch.Tensor]  # of a sequence: x [tokens, in] and float32 |g|^2 [tokens], maybe e [tokens, out]


@dataclass
class Layer:
    """One matrix, ready to be solved. weight: [out, in], the model's own; hessian: float64 [in, in], None if unknown.

    pull: float64 [out, in], the mean of |g|^2 e x^T, None for a plain aim (aims.py). drift: float64 [in, in], for the
    output, that pull as a product, `weight` @ drift. pooled: the Hessian is that of all experts, because this one saw
    too few tokens. unknown: why there is no Hessian. held: what it saw of tokens that are
    not in the Hessian. stored, nearest: alike `weight`, what the file has instead, and nearest rounding. keys: row
    content -> row numbers.
    """

    name: str
    weight: torch.Tensor
    hessian: torch.Tensor | None = None
    pull: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    pooled: bool = False
    unknown: str = "no token reached it"
    held: Sequence[Taken] = ()
    stored: torch.Tensor | None = None
    nearest: torch.Tensor | None = None
    keys: dict[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.keys = defaultdict(list)
        for row, key in enumerate(_row_keys(self.weight)):
            self.keys[key].append(row)

    @property
    def key(self) -> Key:
        """The parameter's name, and the expert."""
        name, _, number = self.name.rstrip("]").partition("[")
        return name, int(number) if number else None


def run(
    model: Model,
    tokens: torch.Tensor,
    scratch: Path,
    threads: int = 1,
    skip: Collection[int] = (),
    held: torch.Tensor | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Alone = ALONE,
    ends: fisher.Ends | None = None,
) -> Iterator[tuple[int, list[Layer]]]:
    """Yields (decoder layer, its matrices with their Hessians), the last layer first; those in `skip` are left out.

    tokens: int64 [sequences, CONTEXT]. held: others, at most as many and at most BATCH, to be tried afterwards.
    ranks: the processes that share the tokens, all of which get the sums. Other arguments and errors as of
    `fisher.backward`. The same tokens give the same bits at any number of threads.
    """
    begin, batches = ranks.share(tokens.split(BATCH))
    moments: dict[Key, Moment] = {}
    tried: fisher.Seen = {}

    def see(index: int, batch: int, taken: fisher.Seen) -> None:
        nonlocal tried
        if index in skip:
            return
        if batch == len(batches):
            tried = taken if index >= len(model) - CHECKED else {}
            return
        blocks = []
        for key, parts in taken.items():
            blocks += moments.setdefault(key, Moment()).add(parts)
        add_up(blocks, pool, model)

    with fisher.workers(threads) as pool:
        every = batches if held is None or not len(held) else [*batches, held]
        others = len(tokens) - sum(map(len, batches))  # of other processes; those that are held come last
        before = {0: begin * BATCH, len(batches): others - begin * BATCH}
        for index, module in fisher.backward(model, every, _take, see, scratch, pool, progress, before, ends):
            if index not in skip:
                layers, sums = layers_of(module), joined(moments, model.device, ranks)
                measured(layers, sums, tried)
                moments.clear()
                tried = {}
                yield index, layers


def layers_of(module: torch.nn.Module) -> list[Layer]:
    """All that may be a matrix of a decoder layer, experts as NAME[NUMBER], without Hessians."""
    found = []
    for name, p in matrices(module).items():
        found += [Layer(name, p.data)] if p.dim() == 2 else [Layer(f"{name}[{i}]", w) for i, w in enumerate(p.data)]
    return found


def match(gguf_rows: np.ndarray, layers: list[Layer]) -> tuple[Layer, torch.Tensor] | None:
    """The layer that has all of `gguf_rows` float32 [n_rows, n_cols], and their numbers in it, or None."""
    wanted = _row_keys(torch.from_numpy(gguf_rows))
    for layer in layers:
        if layer.weight.shape[1] != gguf_rows.shape[1] or wanted[0] not in layer.keys:
            continue
        unused = {key: iter(layer.keys[key]) for key in wanted if key in layer.keys}  # equal rows are used in turn
        rows = [next(unused.get(key, iter(())), -1) for key in wanted]
        if min(rows) >= 0:
            return layer, torch.tensor(rows)
    return None


def _row_keys(rows: torch.Tensor) -> list[int]:
    """Compared in bfloat16, so that neither the compute nor the stored precision matters."""
    rounded = rows.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return [hash(row.tobytes()) for row in rounded]


def _take(x: torch.Tensor, g: torch.Tensor, _: torch.Tensor | None) -> Taken:
    return x, g.float().square().sum(1)


@dataclass(frozen=True)
class Sizes:
    """A `Moment` without the sums: their shapes."""

    total: torch.Size | None
    pull: torch.Size | None
    information: float
    count: int


@dataclass
class Moment:
    """total: float64, the sum of |g|^2 x x^T over `count` tokens, in each block of columns down to its last row.

    pull: float64, the sum of |g|^2 e x^T, None where there is no e. information: float64 [], the sum of |g|^2, or a
    number. A GPU is not waited for when something is added.
    """

    total: torch.Tensor | None = None
    pull: torch.Tensor | None = None
    information: torch.Tensor | float = 0.0
    count: int = 0

    def add(self, taken: Sequence[Taken]) -> list[functools.partial[None]]:
        """What remains to be done, in any order, to add these."""
        if not taken:
            return []
        size = taken[0][0].shape[1]
        aimed = len(taken[0]) > 2
        if self.total is None:
            self.total = taken[0][0].new_zeros(size, size, dtype=torch.float64)
            self.pull = taken[0][0].new_zeros(taken[0][2].shape[1], size, dtype=torch.float64) if aimed else None
        elif not aimed:
            self.pull = None
        self.information = sum((information.sum().double() for _, information, *_ in taken), self.information)
        self.count += sum(len(x) for x, *_ in taken)
        width = ON_GPU if self.total.is_cuda else COLUMNS
        starts = range(0, size, width)
        blocks = [functools.partial(_add_block, taken, start, self.total, width) for start in starts]
        if self.pull is not None:
            blocks += [functools.partial(_add_pull, taken, start, self.pull, width) for start in starts]
        return blocks

    def sizes(self) -> Sizes:
        """What other processes are told of it."""
        total, pull = (None if of is None else of.shape for of in (self.total, self.pull))
        return Sizes(total, pull, float(self.information), self.count)

    def mean(self) -> torch.Tensor | None:
        """The Hessian, float64 [in, in]; None where there was nothing to add."""
        return None if self.total is None or not self.information else whole(self.total) / self.information


def joined(moments: Mapping[Key, Moment], device: torch.device, ranks: Alone) -> Mapping[Key, Moment]:
    """The sums of all processes, by matrix."""
    if ranks.count == 1:
        return moments
    parts = ranks.gathered({key: moment.sizes() for key, moment in moments.items()})
    sums = {}
    for key, size in ranks.first(lambda: _all_sizes(parts)).items():
        own = moments.get(key, Moment())
        sums[key] = Moment(information=size.information, count=size.count)
        for name in ("total", "pull"):
            if shape := getattr(size, name):
                part = getattr(own, name)
                part = torch.zeros(shape, dtype=torch.float64, device=device) if part is None else part
                setattr(sums[key], name, ranks.summed(part))
    return sums


def _all_sizes(parts: Sequence[Mapping[Key, Sizes]]) -> dict[Key, Sizes]:
    """Of the sums; there is no pull where a process with a total has none."""
    found = {}
    for key in dict.fromkeys(itertools.chain(*parts)):
        own = [part[key] for part in parts if key in part]
        seen = [sizes for sizes in own if sizes.total]
        pull = seen[0].pull if seen and all(sizes.pull for sizes in seen) else None
        found[key] = Sizes(
            seen[0].total if seen else None, pull, sum(s.information for s in own), sum(s.count for s in own)
        )
    return found


def spread(layers: Sequence[Layer], ranks: Alone) -> None:
    """Give the layers of all processes the Hessians that those of the first one have."""
    if ranks.count == 1:
        return
    known = ranks.first(lambda: [layer.hessian is not None for layer in layers])
    for layer, has in zip(layers, known, strict=True):
        if has:
            size = layer.weight.shape[1]
            hessian = layer.hessian if layer.hessian is not None else layer.weight.new_empty(size, size).double()
            layer.hessian = ranks.same(hessian)


def _add_block(taken: Sequence[Taken], start: int, total: torch.Tensor, width: int) -> None:
    end = min(start + width, len(total))
    product = total.new_zeros(end, end - start, dtype=torch.float32)
    for x, information, *_ in taken:
        x = x[:, :end].float() * information.sqrt()[:, None]  # both factors alike: no rounding makes it indefinite
        product.addmm_(x.T, x[:, start:])
    total[:end, start:end] += product


def _add_pull(taken: Sequence[Taken], start: int, total: torch.Tensor, width: int) -> None:
    columns = slice(start, start + width)
    product = torch.zeros_like(total[:, columns], dtype=torch.float32)
    for x, information, off in taken:
        product.addmm_(off.T, x[:, columns].float() * information[:, None])
    total[:, columns] += product


def whole(total: torch.Tensor) -> torch.Tensor:
    """The same tensor, what is missing below blocks of columns filled in from above them."""
    for start in range(0, len(total), COLUMNS):
        total[start : start + COLUMNS, :start] = total[:start, start : start + COLUMNS].T
    return total


def add_up(blocks: Iterable[functools.partial[None]], pool: Executor, model: Model) -> None:
    """Do what `Moment.add` has left to be done."""
    with tensor_cores(model.device, model.dtype):
        for _ in pool.map(lambda block: block(), sorted(blocks, key=_work, reverse=True)):
            pass


@contextlib.contextmanager
def tensor_cores(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Float32 products on a GPU in TF32, which rounds factors to 11 bits, where inputs are bfloat16 and have 8.

    Sums are float32.
    """
    with tf32(device) if dtype == torch.bfloat16 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Float32 products in TF32 if `device` is a GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _work(block: functools.partial[None]) -> int:
    """Larger for what takes longer: such blocks begin first."""
    return block.args[1] * sum(len(x) for x, *_ in block.args[0])


def measured(layers: Iterable[Layer], moments: Mapping[Key, Moment], tried: fisher.Seen) -> None:
    """Gives layers their Hessians, pooled experts one in common, and what they saw of tokens that are not in them."""
    pools: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
    for layer in layers:
        name, number = layer.key
        layer.held, own = tried.get(layer.key, ()), moments.get(layer.key)
        layer.pooled = number is not None and (own is None or own.count < layer.weight.shape[1])
        seen = [own] if own else []
        if layer.pooled:
            seen = [moment for (n, expert), moment in moments.items() if n == name and expert is not None]
            pools[name] = pools.get(name) or _means(seen)
        layer.hessian, layer.pull = pools[name] if layer.pooled else _means(seen)
        if layer.hessian is None and seen:
            layer.unknown = "no gradient reached it"


def _means(moments: Sequence[Moment]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The Hessian and the pull of all these together."""
    information = sum(moment.information for moment in moments)
    totals = [moment.total for moment in moments if moment.total is not None]
    pulls = [moment.pull for moment in moments if moment.pull is not None]
    if not (totals and information):
        return None, None
    hessian = Moment(sum(totals[1:], totals[0]), information=information).mean()
    return hessian, sum(pulls[1:], pulls[0]) / information if len(pulls) == len(totals) else None
