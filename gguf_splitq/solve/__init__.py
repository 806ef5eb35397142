"""Error feedback for a whole model: calibrate layer by layer, solve every matrix, keep the bytes for the writer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..gguf_file import Gguf
from ..plan import Entry
from ..rewrite import each_matrix
from . import calibrate, fisher, formats, memory, solver
from . import tune as tuning
from .hessians import Hessians
from .journal import Journal
from .model import Model


@dataclass
class Solved:
    """rows: tensor name -> uint8 [n_rows, row_bytes], read when sliced. errors: tensor name -> the solver's, by stage.

    left: tensors of a type the solver handles that no linear layer of the model matches; they are rounded to nearest.
    pooled: matrices solved with the Hessian of all experts of the layer, because this expert saw too few tokens.
    tuned: the held-out divergence before and after training, in nats a token.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    pooled: list[str] = field(default_factory=list)
    tokens: int = 0
    tuned: dict[str, float] | None = None

    def add(self, rows: Mapping[str, np.ndarray], report: dict) -> None:
        """Take in a finished layer."""
        self.rows |= rows
        self.errors |= report["errors"]
        self.left += report["left"]
        self.pooled += report["pooled"]


def peak_ram(
    entries: Sequence[Entry],
    tokens: int,
    threads: int = 1,
    whole: bool = False,
    tune: bool = False,
    limit: int | None = None,
) -> int:
    """Bytes that `run` needs at most. whole: for `self`, or a GGUF. limit: beyond it the hidden states go to a file."""
    peak = memory.peak(entries, tokens, threads, whole, tune)
    return peak if limit is None or peak <= limit else memory.peak(entries, tokens, threads, whole, tune, on_disk=True)


def run(
    folder: Path,
    file: Gguf,
    entries: Sequence[Entry],
    calib: str | Path,
    tokens: int,
    journal: Journal,
    threads: int,
    progress: Callable[[str, int, int], None],
    hessians: str | Path | None = None,
    tune: bool = False,
    limit: int | None = None,
) -> Solved:
    """Solve every tensor that has a format, on a GPU when there is one.

    folder: the checkpoint that `file` was made from, or `file` itself. calib: a text file, or "self" for text sampled
    from the model. journal: where finished layers are kept, and found again. progress: what is being done, steps done
    and in all. hessians: a file of Hessians, read when it is there and else written; they are then those of the float
    model, where otherwise each layer is calibrated behind the layers quantized before it. tune: train scales and norms.
    limit: bytes of memory; where they do not suffice the hidden states are kept in a file.
    Raises InputError (too little text, damaged activations) and UnsupportedError (transformers cannot load it).
    """
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(folder, device)
    cache = Hessians(hessians, journal, len(model)) if hessians else None
    measuring = not (cache and cache.complete)
    sample = _sample(model, calib, tokens, journal) if measuring or tune else None
    weights = _weights(folder, device, sample, journal, progress) if measuring else {}
    whole = calib == "self" or Path(folder).is_file()
    on_disk = limit is not None and memory.peak(entries, tokens, threads, whole, tune) > limit
    states = model.inputs(sample, journal.folder if on_disk else None) if measuring else []
    solved = Solved(tokens=tokens if sample is None else sample.numel())
    # The solver's operations are too small to share: one matrix to a thread, and one thread to a matrix.
    with ThreadPoolExecutor(threads, "solve", lambda: torch.set_num_threads(1)) as pool, torch.no_grad():
        for index in range(len(model)):
            wanted = [e for e in entries if e.quantized and e.name.startswith(f"blk.{index}.")]
            part = journal.find(f"layer-{index:05}")
            with model.layer(index) as module:
                if measuring and (part is None or (cache and not cache.has(index))):
                    layers = calibrate.layers_of(model, module, index, states, weights)
                    if cache:
                        cache.keep(index, layers)
                else:
                    layers = calibrate.bare_layers_of(module)
                    if cache and part is None:
                        cache.fill(index, layers)
                if cache and measuring:
                    _advance(model, module, index, states)
                if part is None:
                    _solve_layer(file, wanted, layers, pool, journal, index, device)
                    part = journal.find(f"layer-{index:05}")
                elif not cache:
                    for entry in wanted:
                        _put(file, entry, layers, part[0].get(entry.name))
                if not cache:
                    _advance(model, module, index, states)
            solved.add(*part)
            progress("calibrating", index + 1, len(model))
    if cache:
        cache.finish()
    if tune:
        if journal.find("tuned") is None:
            again = functools.partial(Model, folder, device)
            changed = tuning.run(again, file, entries, solved.rows, sample, functools.partial(progress, "tuning"))
            journal.keep("tuned", *changed)
        rows, solved.tuned = journal.find("tuned")
        solved.rows |= rows
    return solved


def _sample(model: Model, calib: str | Path, tokens: int, journal: Journal) -> torch.Tensor:
    """int64 [sequences, CONTEXT] of the text, or drawn from the model."""
    if (kept := journal.find("tokens")) is None:
        sample = model.sample_tokens(tokens) if calib == "self" else model.read_tokens(Path(calib), tokens)
        journal.keep("tokens", {"tokens": sample.numpy()})
        return sample
    return torch.from_numpy(kept[0]["tokens"][:])


def _weights(
    folder: Path, device: str, sample: torch.Tensor, journal: Journal, progress: Callable[[str, int, int], None]
) -> dict[tuple[int, str], torch.Tensor]:
    """What `fisher.token_weights` gives."""
    if (kept := journal.find("weights")) is None:
        model = Model(folder, device, _rough(device))
        weights = fisher.token_weights(model, sample, functools.partial(progress, "weighing tokens"))
        journal.keep("weights", {f"{index} {name}": w.numpy() for (index, name), w in weights.items()})
        return weights
    split = {tuple(key.split(" ", 1)): torch.from_numpy(part[:]) for key, part in kept[0].items()}
    return {(int(index), name): w for (index, name), w in split.items()}


def _advance(model: Model, module: torch.nn.Module, index: int, states: list[torch.Tensor]) -> None:
    for i, state in enumerate(states):
        states[i] = model.forward(module, index, state).to(state.device)


def _rough(device: str) -> torch.dtype:
    """The precision in which tokens are weighed: bfloat16 where the processor multiplies it fast."""
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
    device: str,
) -> None:
    """Solve the layer's tensors, put what is stored into the model, and keep the rows."""
    rows, errors, left, pooled = {}, {}, [], []

    def solve(entry: Entry) -> None:
        if formats.for_type(entry.target) is None:
            _put(file, entry, layers, None)
        elif found := _solve_tensor(file, entry, layers, device):
            rows[entry.name], errors[entry.name], poor = found
            pooled.extend(poor)
        else:
            left.append(entry.name)

    for _ in pool.map(solve, wanted):
        pass
    journal.keep(f"layer-{index:05}", rows, {"errors": errors, "left": sorted(left), "pooled": sorted(pooled)})


def _solve_tensor(
    file: Gguf, entry: Entry, layers: list[calibrate.Layer], device: str
) -> tuple[np.ndarray, dict[str, float], list[str]] | None:
    """(uint8 [n_rows, row_bytes], errors by stage, the experts that took the pooled Hessian), None when unmatched."""
    fmt, matrices, errors, pooled = formats.for_type(entry.target, device), [], [], []
    for rows in each_matrix(file, entry.tensor):
        found = calibrate.match(rows, layers)
        if found is None or found[0].hessian is None:
            return None
        layer, order = found
        if layer.pooled:
            pooled.append(f"{entry.name}[{len(matrices)}]")
        try:
            solution = solver.solve(torch.from_numpy(rows).to(device), layer.hessian, fmt)
        except InputError as error:
            raise InputError(f"tensor {entry.name!r}: {error}") from error
        layer.weight[order.to(device)] = solution.weight.to(layer.weight)
        matrices.append(solution.packed.cpu().numpy())
        errors.append(solution.errors)
    return np.concatenate(matrices), {s: float(np.mean([e[s] for e in errors])) for s in errors[0]}, pooled


def _put(file: Gguf, entry: Entry, layers: list[calibrate.Layer], stored) -> None:
    """Put into the model what is stored of a tensor: `stored` rows, or its values rounded to nearest."""
    first = 0
    for rows in each_matrix(file, entry.tensor):
        if found := calibrate.match(rows, layers):
            layer, order = found
            packed = entry.target.encode(rows) if stored is None else stored[first : first + len(rows)]
            layer.weight[order.to(layer.weight.device)] = torch.from_numpy(entry.target.decode(packed)).to(layer.weight)
        first += len(rows)
