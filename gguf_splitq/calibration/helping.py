# SPDX-License-Identifier: MIT
"""What the processes after the first do: draw, run and train on their share of the tokens, and solve their share of the
rows.

They go through the same loops as solve.py, and meet the first process where these share something.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..files.gguf_file import require_space
from . import aims, fisher, moments, pieces, tune
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

    def help(self, load: Callable[[torch.dtype], Model], ranks: Alone, threads: int) -> None:
        """See `Task`."""
        measured = _half_way if self.aim == "half" else _plain
        with pieces.alone(threads) as pool, pieces.alone(threads) as rows:
            for index, layers in measured(load(self.dtype), self, ranks, threads):
                if index not in self.solved:
                    pieces.help_out(layers, ranks, pool, rows.map)


@dataclass(frozen=True)
class Drawing:
    """As of `Model.sample_tokens`."""

    folder: Path
    dtype: torch.dtype
    count: int
    seed: int

    def help(self, load: Callable[[torch.dtype], Model], ranks: Alone, threads: int) -> None:
        """See `Task`."""
        load(self.dtype).sample_tokens(self.count, threads, self.seed, ranks)


@dataclass(frozen=True)
class Training:
    """As of `tune.run`. scratch: as of `Job`."""

    folder: Path
    tokens: torch.Tensor
    held: torch.Tensor
    what: str
    steps: int
    scratch: Path

    def help(self, load: Callable[[torch.dtype], Model], ranks: Alone, threads: int) -> None:
        """See `Task`."""
        again = functools.partial(load, torch.float32)
        text, scratch = (self.tokens, self.held), _folder(self.scratch)
        tune.run(again, None, *text, self.what, self.steps, scratch, threads, ranks=ranks)


class Task(Protocol):
    """Something that all processes do."""

    folder: Path

    def help(self, load: Callable[[torch.dtype], Model], ranks: Alone, threads: int) -> None:
        """Do this process' part of it. load: makes the model of `folder`."""


def run(ranks: Alone, threads: int, device: Callable[[], str], vram: int | None = None) -> None:
    """Help until the first process has nothing more to do. Errors as of solve.py, for what this process takes.

    device: asked for when there is work. vram: as of `Room`.
    """
    while (job := ranks.first(_nothing)) is not None:
        torch.set_num_threads(threads)
        name = device()
        ranks.use(name)
        job.help(functools.partial(Model, job.folder, name, room=Room(vram)), ranks, threads)


def _nothing() -> Task | None:
    return None


def _folder(scratch: Path) -> Path:
    """The first process' folder, where it is here as well."""
    return scratch if scratch.is_dir() else Path(tempfile.gettempdir())


def _scratch(model: Model, job: Job) -> Path:
    """A folder with room for the hidden states."""
    assert job.tokens is not None
    folder = _folder(job.scratch)
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
