"""Error feedback for a whole model: calibrate layer by layer, solve every matrix, keep the bytes for the writer."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..gguf_file import Gguf, require_space
from ..plan import Entry
from ..rewrite import each_matrix
from ..types.columns import ColumnType, side_name
from . import calibrate, columns, fisher, formats, solver
from . import tune as tuning
from .hessians import Hessians
from .journal import Journal
from .model import Model

Progress = Callable[[str, int, int], None]


@dataclass
class Solved:
    """rows: tensor name -> uint8 [n_rows, row_bytes] or, of a side tensor, [matrices, size]; read when sliced.

    errors: tensor name -> the solver's, by stage.
    left: tensors of a type the solver handles that no linear layer of the model matches; they are rounded to nearest.
    pooled: matrices solved with the Hessian of all experts of the layer, because this expert saw too few tokens.
    seconds: of the whole run. tuned: the held-out divergence before and after training, in nats a token.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    pooled: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    tuned: dict[str, float] | None = None

    def add(self, rows: Mapping[str, np.ndarray], report: dict) -> None:
        """Take in a finished layer."""
        self.rows |= rows
        self.errors |= report["errors"]
        self.left += report["left"]
        self.pooled += report["pooled"]


def run(
    folder: Path,
    file: Gguf,
    entries: Sequence[Entry],
    calib: str | Path,
    tokens: int,
    journal: Journal,
    threads: int,
    solvers: int,
    progress: Progress,
    hessians: str | Path | None = None,
    tune: bool = False,
) -> Solved:
    """Solve every tensor that has a format; the model runs on a GPU when there is one.

    folder: the checkpoint that `file` was made from, or `file` itself. calib: a text file, or "self" for text sampled
    from the model. journal: where finished layers are kept, and found again. solvers: matrices solved at a time.
    progress: what is being done, steps done and in all. hessians: a file of Hessians, read when it is there and else
    written. tune: train scales and norms.
    Raises InputError (too little text, damaged activations) and UnsupportedError (transformers cannot load it).
    """
    start = time.monotonic()
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(folder, device, _fast(device))
    cache = Hessians(hessians, journal, len(model)) if hessians else None
    sample = None if cache and cache.complete and not tune else _sample(model, calib, tokens, journal)
    solved = Solved(tokens=tokens if sample is None else sample.numel())
    # The solver's operations are too small to share, or for a GPU: a matrix to a thread, and a thread to a matrix.
    with ThreadPoolExecutor(solvers, "solve", lambda: torch.set_num_threads(1)) as pool:
        for index, layers in _calibrated(model, sample, journal, cache, progress):
            if journal.find(_part(index)) is None:
                wanted = [e for e in entries if e.quantized and e.name.startswith(f"blk.{index}.")]
                _solve_layer(file, wanted, layers, pool, journal, index)
    for index in range(len(model)):
        solved.add(*journal.find(_part(index)))
    if cache:
        cache.finish()
    if tune:
        if journal.find("tuned") is None:
            again = functools.partial(Model, folder, device)
            changed = tuning.run(again, file, entries, solved.rows, sample, functools.partial(progress, "tuning"))
            journal.keep("tuned", *changed)
        rows, solved.tuned = journal.find("tuned")
        solved.rows |= rows
    solved.seconds = round(time.monotonic() - start, 1)
    return solved


def _sample(model: Model, calib: str | Path, tokens: int, journal: Journal) -> torch.Tensor:
    """int64 [sequences, CONTEXT] of the text, or drawn from the model."""
    if (kept := journal.find("tokens")) is None:
        sample = model.sample_tokens(tokens) if calib == "self" else model.read_tokens(Path(calib), tokens)
        journal.keep("tokens", {"tokens": sample.numpy()})
        return sample
    return torch.from_numpy(kept[0]["tokens"][:])


def _calibrated(
    model: Model, sample: torch.Tensor | None, journal: Journal, cache: Hessians | None, progress: Progress
) -> Iterator[tuple[int, list[calibrate.Layer]]]:
    """(decoder layer, its matrices with their Hessians) for all that are to be measured or solved."""
    every, solved = range(len(model)), {index for index in range(len(model)) if journal.find(_part(index))}
    known = {index for index in every if cache.has(index)} if cache else solved
    if len(known) < len(every):
        width = model.module.get_input_embeddings().embedding_dim
        require_space(journal.folder, fisher.scratch_bytes(len(model), sample.numel(), width, model.dtype))
        step = functools.partial(progress, "calibrating")
        for index, layers in calibrate.run(model, sample, journal.folder, known, step):
            if cache:
                cache.keep(index, layers)
            yield index, layers
    for done, index in enumerate(sorted(known - solved)):
        with model.layer(index) as module:
            layers = calibrate.layers_of(module)
            cache.fill(index, layers)
            yield index, layers
        progress("solving", done + 1, len(known - solved))


def _part(index: int) -> str:
    return f"layer-{index:05}"


def _fast(device: str) -> torch.dtype:
    """What calibration computes in: bfloat16 where the processor multiplies it fast."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device == "cuda" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def _solve_layer(
    file: Gguf,
    wanted: list[Entry],
    layers: list[calibrate.Layer],
    pool: ThreadPoolExecutor,
    journal: Journal,
    index: int,
) -> None:
    """Solve the layer's tensors and keep the rows."""
    rows, errors, left, pooled = {}, {}, [], []

    def solve(entry: Entry) -> None:
        if formats.for_type(entry.target) is None and not isinstance(entry.target, ColumnType):
            return
        if found := _solve_tensor(file, entry, layers):
            stored, errors[entry.name], poor = found
            rows.update(stored)
            pooled.extend(poor)
        else:
            left.append(entry.name)

    for _ in pool.map(solve, wanted):
        pass
    journal.keep(_part(index), rows, {"errors": errors, "left": sorted(left), "pooled": sorted(pooled)})


def _solve_tensor(
    file: Gguf, entry: Entry, layers: list[calibrate.Layer]
) -> tuple[dict[str, np.ndarray], dict[str, float], list[str]] | None:
    """What is stored, errors by stage, the experts that took the pooled Hessian; None when unmatched.

    Stored: name -> uint8 [n_rows, row_bytes], and [matrices, size] of a side tensor.
    """
    target, solutions, pooled = entry.target, [], []
    fmt = formats.for_type(target)
    for rows in each_matrix(file, entry.tensor):
        found = calibrate.match(rows, layers)
        if found is None or found[0].hessian is None:
            return None
        layer, _ = found
        if layer.pooled:
            pooled.append(f"{entry.name}[{len(solutions)}]")
        weight, hessian = torch.from_numpy(rows), layer.hessian.cpu()
        try:
            solved = solver.solve(weight, hessian, fmt) if fmt else columns.solve(weight, hessian, target)
        except InputError as error:
            raise InputError(f"tensor {entry.name!r}: {error}") from error
        solutions.append((solved.packed.cpu().numpy(), solved.side, solved.errors))
    matrices, sides, errors = zip(*solutions, strict=True)
    stored = {entry.name: np.concatenate(matrices)}
    if sides[0] is not None:
        stored[side_name(entry.name)] = np.stack(sides)
    return stored, {s: float(np.mean([e[s] for e in errors])) for s in errors[0]}, pooled
