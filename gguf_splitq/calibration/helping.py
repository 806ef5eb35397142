# SPDX-License-Identifier: MIT
"""What the processes after the first do: run their share of the tokens, and solve their share of the rows.

They go through the same loops as solve.py, and meet the first process where these share something.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files.gguf_file import require_space
from . import aims, fisher, moments, pieces
from .model import Model, Room
from .ranks import Alone


@dataclass(frozen=True)
class Job:
    """A calibration that all processes know.

    folder: of the checkpoint, under this name on every machine. tokens: int64 [sequences, CONTEXT], None where nothing
    is run. scratch: a folder for hidden states, where there is one of that name. known: decoder layers whose Hessians
    or weights of tokens are measured already; solved: those that are finished.
    """

    folder: Path
    dtype: torch.dtype
    aim: str
    tokens: torch.Tensor | None
    scratch: Path
    known: frozenset[int]
    solved: frozenset[int]


def run(ranks: Alone, threads: int, device: Callable[[], str], vram: int | None = None) -> None:
    """Help until the first process has nothing more to do. Errors as of solve.py, for what this process takes.

    device: asked for when there is work. vram: as of `Room`.
    """
    while (job := ranks.first(_nothing)) is not None:
        torch.set_num_threads(threads)
        name = device()
        ranks.use(name)
        model = Model(job.folder, name, job.dtype, Room(vram))
        measured = _half_way if job.aim == "half" else _plain
        with pieces.alone(threads) as pool, pieces.alone(threads) as rows:
            for index, layers in measured(model, job, ranks, threads):
                if index not in job.solved:
                    pieces.help_out(layers, ranks, pool, rows.map)


def _nothing() -> Job | None:
    return None


def _scratch(model: Model, job: Job) -> Path:
    """A folder with room for the hidden states."""
    assert job.tokens is not None
    folder = job.scratch if job.scratch.is_dir() else Path(tempfile.gettempdir())
    width = model.module.get_input_embeddings().embedding_dim
    require_space(folder, fisher.scratch_bytes(len(model), job.tokens.numel(), width, model.dtype))
    return folder


def _half_way(model: Model, job: Job, ranks: Alone, threads: int) -> Iterator[tuple[int, list[moments.Layer]]]:
    """(decoder layer, a stage of its matrices)."""
    assert job.tokens is not None
    scratch = _scratch(model, job)
    if len(job.known) < len(model):
        aims.information(model, job.tokens, scratch, threads, lambda *_: None, ranks=ranks)
    none = job.tokens[:0]
    for stage in aims.run(
        model, job.tokens, none, lambda _: {}, lambda *_: (), scratch, threads, job.solved, ranks=ranks
    ):
        yield stage.index, stage.layers


def _plain(model: Model, job: Job, ranks: Alone, threads: int) -> Iterator[tuple[int, list[moments.Layer]]]:
    """(decoder layer, its matrices), in the order of solve.py."""
    if len(job.known) < len(model):
        assert job.tokens is not None
        yield from moments.run(model, job.tokens, _scratch(model, job), threads, job.known, ranks=ranks)
    for index in sorted(job.known - job.solved):
        with model.layer(index) as module:
            layers = moments.layers_of(module)
            moments.spread(layers, ranks)
            yield index, layers
