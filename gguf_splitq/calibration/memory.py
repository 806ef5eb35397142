# SPDX-License-Identifier: MIT
"""How much memory a calibration takes, stated before it starts. Pure: tensors' shapes and options in, bytes out.

Bounds for the CPU; on a GPU the layer being run is in the GPU's memory, and `on_gpu` and what follows it estimate that.
Tests hold conversions to the bounds.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

from ..coding import families, formats, solver
from ..plan import ENDS, Entry
from .ends import WEIGHTS
from .model import BATCH, CONTEXT, SAMPLED, SAMPLED_ON_GPU, TOGETHER

BASE = 704 << 20  # Python with PyTorch and transformers, and what the allocator does not give back
TEXT = 1024  # bytes per token while the text is taken apart
FLOAT = 4  # bytes of a weight or a hidden state
KEY = 256  # bytes a row while rows of a matrix are looked for
TRAINED = {"scales": 2, "codes": 8}  # bytes that stay for a weight of which that is trained, its block's share included
ON_THE_WAY = 3  # floats besides for each weight of the layer that is trained: itself, its gradient, and what it was
MOVED = 40  # bytes that a GPU takes for each weight of a matrix while it takes a step
SOLVED = 48, 64  # bytes that a GPU takes for each weight of a Hessian, and of a matrix, while that is solved


def peak(
    entries: Sequence[Entry],
    tokens: int,
    threads: int,
    whole: bool = False,
    tune: str | None = None,
    several: bool = False,
) -> int:
    """Bytes at most, of a process. whole: the model is all in memory once (to sample text, or read from a GGUF). tune:
    what is trained, as of `solve.run`. several: processes share the work.
    """
    outside, layers = _by_layer(entries)
    inside = [entry for layer in layers for entry in layer]
    reading = _floats(inside) + FLOAT * SAMPLED * TOGETHER * CONTEXT * _heads(inside) if whole else TEXT * tokens
    ends = [e for e in outside if e.name in ENDS and len(e.tensor.shape) > 1]
    by_layer = tune == "layers"
    calibrating = max((_layer(layer, threads) + by_layer * _by_layer_trained(layer) for layer in layers), default=0)
    calibrating += _logits(outside)
    calibrating += sum(2 * _hessian(e) + 2 * FLOAT * 2 * e.tensor.n_rows for e in ends)  # of what each is used for
    # Rows go from the first process to others: as they are, pickled, and padded for each.
    calibrating += 3 * max(map(_floats, layers), default=0) if several else 0
    stages = [reading, calibrating + sum(_end(e, threads) for e in ends)]
    if tune and not by_layer:
        stages.append(
            training(entries, tune, keeps=True) - _floats(outside) + sum(e.n_bytes for e in inside)
        )  # as it was stored
    return BASE + _floats(outside) + max(stages)


def training(entries: Sequence[Entry], tune: str, sequences: int = BATCH, keeps: bool = False) -> int:
    """Bytes at most of `tune.run`, on a GPU by estimate, when that runs so many sequences at a time.

    keeps: as a CPU does, all layers' weights, and what they have computed of a batch, until the way back.

    The ends, what is trained, and what else a layer has. Besides, while the original is run, its ends and a layer; and
    then a batch's hidden states between the layers, and a layer's weights, gradients, inputs and outputs.
    """
    outside, layers = _by_layer(entries)
    kept = _floats(outside) + sum(_kept(entry, tune) for layer in layers for entry in layer)
    states = FLOAT * BATCH * CONTEXT * (len(layers) + 2) * max((e.tensor.n_cols for e in outside), default=0)
    most = 0
    for layer in layers:
        batch = 2 * _outputs(layer) * sequences // BATCH
        matrix = max((e.tensor.shape[-2] * e.tensor.n_cols for e in layer if len(e.tensor.shape) > 1), default=0)
        passing = ON_THE_WAY * _floats(layer) + MOVED * matrix + _outputs(layer)
        most = max(most, batch + max(_floats(outside) + 2 * _floats(layer), states + passing))
    if keeps:
        most += sum(_floats(layer) + 2 * _outputs(layer) for layer in layers)
    return kept + most + 2 * _logits(outside)


def solvers(
    entries: Sequence[Entry],
    tokens: int,
    threads: int,
    whole: bool,
    tune: str | None,
    limit: int | None,
    several: bool = False,
) -> int:
    """How many matrices may be solved at a time: one to a thread, or what `limit` bytes allow, but at least one."""
    while limit is not None and threads > 1 and peak(entries, tokens, threads, whole, tune, several) > limit:
        threads -= 1
    return threads


def on_gpu(entries: Sequence[Entry], bits: int, sequences: int = BATCH, tune: str | None = None) -> int:
    """Bytes of a GPU's memory, by estimate, without hidden states between the layers. bits: of a weight there.

    One decoder layer: its matrices as they are, as they are stored and rounded to nearest; its Hessians, what moves its
    aims, so many sequences with gradients, and the matrix being solved; or, with tune "layers", all of them trained.
    """
    outside, layers = _by_layer(entries)
    share = bits / 8 / FLOAT
    most = 0
    for layer in layers:
        matrices = [e for e in layer if len(e.tensor.shape) > 1]
        hessians = sum(8 * e.tensor.n_cols * (e.tensor.n_cols * _count(e) + e.tensor.n_rows) for e in matrices)
        of_hessian, of_matrix = SOLVED
        pieces = (min(e.tensor.shape[-2] * e.tensor.n_cols, solver.ON_GPU * solver.WEIGHTS) for e in matrices)
        sizes = zip(matrices, pieces, strict=True)
        solving = max((of_hessian * e.tensor.n_cols**2 + of_matrix * piece for e, piece in sizes), default=0)
        batch = 2 * _outputs(layer) * sequences // BATCH
        training = _by_layer_trained(layer) + batch if tune == "layers" else 0
        most = max(most, int(share * (4 * _floats(layer) + batch)) + max(hessians + solving, training))
    at_ends = [e for e in outside if e.name in ENDS]
    # What each is used for, and it as it is stored and as it would be nearest.
    ends = 2 * sum(map(_hessian, at_ends)) + int(2 * share * _floats(at_ends))
    return int(share * _floats(outside)) + _logits(outside) + ends + most


def measuring(entries: Sequence[Entry], sequences: int = BATCH) -> int:
    """The same while it is measured what types cost (sensitivity.py), in float32.

    One decoder layer and what loads it, so many sequences with gradients, and what is made of one sequence and matrix.
    """
    outside, layers = _by_layer(entries)
    most = 0
    for layer in layers:
        largest = max((e.tensor.shape[-2] * e.tensor.n_cols for e in layer if len(e.tensor.shape) > 1), default=0)
        batch = 2 * _outputs(layer) * sequences // BATCH
        most = max(most, 2 * _floats(layer) + batch + 2 * FLOAT * largest)
    return _floats(outside) + _logits(outside) + most


def drawing(entries: Sequence[Entry], bits: int, sequences: int = SAMPLED_ON_GPU) -> int:
    """The same while the model, whole in memory, draws so many sequences at a time."""
    outside, layers = _by_layer(entries)
    cache = int(bits / 8 * CONTEXT * sum(map(_heads, layers)))
    return int(bits / 8 / FLOAT * _floats(entries)) + sequences * (cache + _logits(outside) // CONTEXT)


def _by_layer(entries: Sequence[Entry]) -> tuple[list[Entry], list[list[Entry]]]:
    """Those outside of decoder layers, and those of each."""
    layers = defaultdict(list)
    for entry in entries:
        number = re.match(r"blk\.(\d+)\.", entry.name)
        layers[int(number[1]) if number else None].append(entry)
    return layers.pop(None, []), list(layers.values())


def _count(entry: Entry) -> int:
    """Matrices in a tensor."""
    return entry.tensor.n_rows // entry.tensor.shape[-2]


def _heads(inside: Sequence[Entry]) -> int:
    """Numbers that a token leaves in the KV cache."""
    return sum(e.tensor.n_rows for e in inside if re.search(r"attn_(k|v|qkv)\.weight", e.name))


def _logits(outside: Sequence[Entry]) -> int:
    """Those of one sequence: themselves, their softmax, gradients."""
    return 4 * FLOAT * CONTEXT * max((e.tensor.n_rows for e in outside), default=0)


def _floats(entries: Sequence[Entry]) -> int:
    return FLOAT * sum(e.tensor.n_weights for e in entries)


def _outputs(layer: Sequence[Entry]) -> int:
    """What a batch leaves behind while it runs through a layer; experts take a share of it each."""
    return 2 * FLOAT * BATCH * CONTEXT * sum(e.tensor.shape[-2] for e in layer if len(e.tensor.shape) > 1)


def _layer(layer: Sequence[Entry], threads: int) -> int:
    """One decoder layer: loading it (which copies it), or a batch with gradients and then `threads` of its matrices.

    Those add up, because the allocator keeps most of what a batch took. With half-way aims there are the layer as it is
    stored, as it would be nearest, and what moves the aims.
    """
    matrices = [e for e in layer if len(e.tensor.shape) > 1]
    hessians = sum(8 * e.tensor.n_cols**2 * _count(e) for e in matrices)
    each = itertools.chain.from_iterable([_solving(e)] * min(_count(e), threads) for e in matrices)
    solving = sum(sorted(each, reverse=True)[:threads])
    coding = threads * max((families.coding_bytes(e.target, *e.tensor.shape[-2:]) for e in matrices), default=0)
    aims = 4 * _floats(layer)
    return _floats(layer) + max(_floats(layer), hessians + 2 * _outputs(layer) + aims + solving + coding)


def _kept(entry: Entry, tune: str) -> int:
    """Bytes that stay of a tensor of a layer while it is trained, with its codes or without."""
    fmt = formats.for_type(entry.target) if entry.target else None
    trained = fmt and (tune == "codes" or fmt.own_scale)
    return (TRAINED[tune] if trained else FLOAT) * entry.tensor.n_weights


def _by_layer_trained(layer: Sequence[Entry]) -> int:
    """What it takes to train a layer alone, besides what its calibration takes."""
    weights = sum(e.tensor.n_weights for e in layer)
    return (TRAINED["codes"] + ON_THE_WAY * FLOAT) * weights


def _hessian(entry: Entry) -> int:
    return 8 * entry.tensor.n_cols**2


def _end(entry: Entry, threads: int) -> int:
    """The embedding or the output where it is solved: it once more as it is stored, and as it would be nearest, what
    its rows are found by, and some rows at a time.
    """
    if not (entry.quantized and families.coder(entry.coder, entry.layout)):
        return 0
    weights = min(WEIGHTS, entry.tensor.n_weights)
    solving = 56 * entry.tensor.n_cols**2 + 24 * weights  # these rows as floats: read, moved, stored and nearest
    coding = threads * families.coding_bytes(entry.target, weights // entry.tensor.n_cols, entry.tensor.n_cols)
    return 2 * FLOAT * entry.tensor.n_weights + KEY * entry.tensor.n_rows + solving + coding


def _solving(entry: Entry) -> int:
    """One matrix: its Hessian with factors, in double and single precision; its rows, before and after."""
    rows, columns = entry.tensor.shape[-2:]
    return columns * (40 * columns + 16 * rows)
