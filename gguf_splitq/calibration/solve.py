# SPDX-License-Identifier: MIT
"""Error feedback for a whole model: calibrate layer by layer, solve every matrix, keep the bytes for the writer.

With half-way aims (aims.py) the model runs backward for the tokens' weights, then forward, and matrices are solved in
the order in which they run. With plain ones their Hessians come from the backward pass, the last layer first. The ends
of the model, where they have a type with error feedback, are solved too: the embedding, or what is both, before the
layers, on the float model; the output behind them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..coding import families, formats, solver
from ..coding.solver import Solution
from ..errors import UnsupportedError
from ..files.gguf_file import Gguf, require_space
from ..plan import ENDS, Entry, is_linear
from ..rewrite import Rows, each_matrix, read_float32
from ..types.columns import side_name
from . import aims, ends, fisher, layerwise, moments, pieces, training
from . import tune as tuning
from .helping import Drawing, Job, Training
from .hessians import Hessians
from .journal import Journal
from .model import CONTEXT, SEED, Model, Room, held_out
from .pieces import alone
from .ranks import ALONE, Alone
from .stored import decoded, rounded

Progress = Callable[[str, int, int], None]
Place = tuple[moments.Layer, torch.Tensor]  # of a GGUF matrix: the layer that has its rows, and their numbers in it
Result = tuple[dict[str, np.ndarray], dict[str, float], list[str], list[float]] | str  # of `_joined`, or why not
NOWHERE = "no linear layer of the model has its rows"
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Solved:
    """rows: tensor name -> uint8 [n_rows, row_bytes] or, of a side tensor, [matrices, size]; read when sliced.

    errors: tensor name -> the solver's, by stage.
    left: what was quantized without error feedback, rounded to nearest: tensor name -> why.
    pooled: matrices solved with the Hessian of all experts of the layer, because this expert saw too few tokens.
    tried: tensor name -> on tokens that are not in the Hessians, the outputs' square, that of the error that nearest
    rounding makes and of the one of these rows; of the layers solved first, with plain aims. divergence: with half-way
    ones, of the whole model on such tokens, "nearest" and "feedback", in nats a token or as `measure` says.
    seconds: of the whole run. tuned: the held-out divergence before and after training, in nats a token. trained: the
    reports of layers that were trained one by one, as of `layerwise.run`.
    """

    rows: dict[str, Rows] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    pooled: list[str] = field(default_factory=list)
    tried: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    dtype: str = ""
    seconds: float = 0.0
    tuned: dict[str, Any] | None = None
    trained: list[dict[str, float]] = field(default_factory=list)
    divergence: dict[str, float] | None = None
    measure: str = "KL divergence"

    def add(self, rows: Mapping[str, Rows], report: dict) -> None:
        """Take in a finished layer."""
        self.rows |= rows
        self.errors |= report["errors"]
        self.left |= report["left"]
        self.pooled += report["pooled"]
        self.tried |= report["tried"]
        self.trained += report.get("trained", [])

    @property
    def held_out(self) -> dict[str, float] | None:
        """Relative output error on other tokens, of nearest rounding and of these rows; None where none was tried."""
        if not self.tried:
            return None
        whole, nearest, fed = np.sum(list(self.tried.values()), axis=0).tolist()
        return {"nearest": nearest / whole, "feedback": fed / whole}

    def report(self) -> dict:
        """For the JSON report."""
        same = ("tokens", "dtype", "seconds", "errors", "pooled", "tuned", "held_out", "divergence", "measure")
        return {key: getattr(self, key) for key in same} | {"left": list(self.left), "left_reasons": self.left}


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
    tune: str | None = None,
    by_layer: bool = False,
    steps: int = 0,
    dtype: str = "auto",
    aim: str = "half",
    device: str = "cpu",
    ranks: Alone = ALONE,
    room: Room | None = None,
) -> Solved:
    """Solve every tensor that has a format, on the device that the model runs on.

    folder: the checkpoint that `file` was made from, or `file` itself. calib: a text file, or "self" for text sampled
    from the model. journal: where finished layers are kept, and found again. solvers: matrices solved at a time.
    progress: what is being done, steps done and in all. hessians: a file of what was measured, read when it is there
    and else written. tune: what to train of the model as a whole, as of `tune.run`, in so many steps; by_layer: train
    layers one by one, each in so many, for which `aim` is "half" and there is one process. dtype: as of `precision`.
    aim: "half" or "plain". device: as PyTorch names it. ranks: the processes that share the work, of which this is the
    first. room: what it may take of the GPU's memory, and hidden states of memory.
    Raises InputError (too little text, damaged activations) and UnsupportedError (transformers cannot load it).
    """
    start = time.monotonic()
    torch.set_num_threads(threads)
    dtype = precision(dtype, device)
    model = Model(folder, device, DTYPES[dtype], room)
    if (tune or by_layer) and model.encoder:
        raise UnsupportedError(f"{folder}: --tune trains what a model writes, and this is an encoder: leave it out")
    known = Hessians(hessians, journal, len(model))
    cache = known if hessians or aim == "half" else None
    sample = None
    if not (cache and cache.complete) or tune or aim == "half":
        sample = _sample(model, calib, tokens, journal, threads, ranks)
    if (model.encoder or ranks.count > 1) and not known.has_ends():
        known.keep_ends({})  # nobody measures them
    solved = Solved(tokens=sample[0].numel() if sample else tokens, dtype=dtype)
    if model.encoder:
        solved.measure = "1 - cosine"
    job = _job(model, aim, sample, journal, cache)
    ranks.first(lambda: job)
    ranks.use(device)
    if aim == "half":
        assert cache and sample
        solved.divergence = _half_way(
            model, sample, file, entries, threads, solvers, journal, cache, progress, ranks, steps if by_layer else 0
        )
    else:
        # The solver's operations are too small for threads to share: a matrix to a thread, and a thread to a matrix.
        with alone(solvers) as pool:
            for index, layers in _calibrated(model, sample, threads, journal, known, cache, progress, ranks):
                if journal.find(_part(index)) is None:
                    wanted = [e for e in entries if e.quantized and e.name.startswith(f"blk.{index}.")]
                    _solve_layer(file, wanted, layers, pool, journal, index, ranks)
        with alone(1) as pool, alone(solvers) as parts:
            at_ends = _at_ends(entries)
            measured = known.ends() if at_ends else {}
            for entry in at_ends:
                layer = _end(model, file, entry, measured)
                pool.submit(_solve_end, file, entry, layer, journal, parts.map).result()
    for name in [*map(_part, range(len(model))), *(entry.name for entry in _at_ends(entries))]:
        solved.add(*journal.part(name))
    solved.left = _left(entries, solved)
    if cache:
        cache.finish()
    del model  # the memory is needed
    if by_layer:
        solved.tuned = _of_layers(solved.trained, steps)
    if tune:
        assert sample
        if journal.find("tuned") is None:
            again = functools.partial(Model, folder, device, room=room)
            own = _drawn(again, tuning.drawn(steps, sample[0].numel()), journal, threads, ranks)
            text, held = torch.cat([sample[0], own]), sample[1]
            scratch, given = journal.folder.absolute(), tuning.Given(file, entries, solved.rows)
            ranks.first(lambda: Training(folder.absolute(), text, held, tune, steps, scratch))
            changed = tuning.run(again, given, text, held, tune, steps, scratch, threads, progress, ranks)
            journal.keep("tuned", *changed)
        rows, solved.tuned = journal.part("tuned")
        solved.rows |= rows
    solved.seconds = round(time.monotonic() - start, 1)
    return solved


def precision(choice: str, device: str = "cpu") -> str:
    """What calibration computes in, "f32" or "bf16"; of "auto" the latter where the device multiplies it fast."""
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device != "cpu" or any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return choice if choice in DTYPES else "bf16" if fast else "f32"


def _sample(
    model: Model, calib: str | Path, tokens: int, journal: Journal, threads: int, ranks: Alone
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [sequences, CONTEXT] of the text, or drawn from the model; and others to try the codes on, maybe none."""
    if (kept := journal.find("tokens")) is None:
        if calib == "self":
            held = held_out(tokens // CONTEXT)
            drawn = _draw(model, tokens + held * CONTEXT, threads, SEED, ranks)
            parts = drawn[:-held].contiguous(), drawn[-held:].contiguous()
        else:
            parts = model.split_text(Path(calib), tokens)
        journal.keep("tokens", {name: part.numpy() for name, part in zip(("tokens", "held"), parts, strict=True)})
        return parts
    arrays, _ = kept
    return torch.from_numpy(arrays["tokens"][:]), torch.from_numpy(arrays["held"][:])


def _draw(model: Model, tokens: int, threads: int, seed: int, ranks: Alone) -> torch.Tensor:
    """As of `Model.sample_tokens`, by all processes."""
    ranks.first(lambda: Drawing(model.path.absolute(), model.dtype, tokens, seed))
    ranks.use(str(model.device))
    return model.sample_tokens(tokens, threads, seed, ranks)


def _drawn(model: Callable[[], Model], tokens: int, journal: Journal, threads: int, ranks: Alone) -> torch.Tensor:
    """int64 [sequences, CONTEXT] drawn from the model to train on; other ones than are calibrated on."""
    if not tokens:
        return torch.empty(0, CONTEXT, dtype=torch.long)
    if (kept := journal.find("drawn")) is None:
        journal.keep("drawn", {"tokens": _draw(model(), tokens, threads, SEED + 1, ranks).numpy()})
        kept = journal.part("drawn")
    return torch.from_numpy(kept[0]["tokens"][:])


def _calibrated(
    model: Model,
    sample: tuple[torch.Tensor, torch.Tensor] | None,
    threads: int,
    journal: Journal,
    outside: Hessians,
    cache: Hessians | None,
    progress: Progress,
    ranks: Alone,
) -> Iterator[tuple[int, list[moments.Layer]]]:
    """(decoder layer, its matrices with their Hessians) for all that are to be measured or solved.

    outside: where what is measured of the ends is kept.
    sample: as `_sample` gives it; None where the Hessians are all known.
    """
    every, solved = range(len(model)), _finished(model, journal)
    known = _known(model, journal, cache)
    if len(known) < len(every) or not outside.has_ends():
        assert sample
        tokens, held = sample
        seen = None if outside.has_ends() else ends.Ends(model, tokens)
        width, count = model.module.get_input_embeddings().embedding_dim, tokens.numel() + held.numel()
        require_space(journal.folder, fisher.scratch_bytes(len(model), count, width, model.dtype))
        shown = functools.partial(progress, "calibrating")
        for index, layers in moments.run(model, tokens, journal.folder, threads, known, held, shown, ranks, seen):
            if cache:
                cache.keep(index, layers)
            yield index, layers
        if seen:
            outside.keep_ends(seen.arrays())
    if cache is None:
        return
    for done, index in enumerate(sorted(known - solved)):
        with model.layer(index) as module:
            layers = moments.layers_of(module)
            cache.fill(index, layers)
            moments.spread(layers, ranks)
            yield index, layers
        progress("solving", done + 1, len(known - solved))


def _finished(model: Model, journal: Journal) -> frozenset[int]:
    """The decoder layers that are solved."""
    return frozenset(index for index in range(len(model)) if journal.find(_part(index)) is not None)


def _known(model: Model, journal: Journal, cache: Hessians | None) -> frozenset[int]:
    """The decoder layers that need not be measured."""
    return frozenset(filter(cache.has, range(len(model)))) if cache else _finished(model, journal)


def _job(
    model: Model, aim: str, sample: tuple[torch.Tensor, torch.Tensor] | None, journal: Journal, cache: Hessians | None
) -> Job:
    """What other processes are told."""
    known, solved = _known(model, journal, cache), _finished(model, journal)
    tokens = sample[0] if sample else None
    return Job(model.path.absolute(), model.dtype, aim, tokens, journal.folder.absolute(), known, solved)


def _half_way(
    model: Model,
    sample: tuple[torch.Tensor, torch.Tensor],
    file: Gguf,
    entries: Sequence[Entry],
    threads: int,
    solvers: int,
    journal: Journal,
    cache: Hessians,
    progress: Progress,
    ranks: Alone,
    steps: int = 0,
) -> dict[str, float] | None:
    """Solve every layer behind the layers before it, and train it in so many steps; returns the held-out divergences,
    as `aims.run`.
    """
    tokens, held = sample
    layers = range(len(model))
    if not (all(map(cache.has, layers)) and cache.has_ends()):
        seen = None if cache.has_ends() else ends.Ends(model, tokens)
        width = model.module.get_input_embeddings().embedding_dim
        require_space(journal.folder, fisher.scratch_bytes(len(model), tokens.numel(), width, model.dtype))
        shown = functools.partial(progress, "calibrating")
        aims.information(model, tokens, journal.folder, threads, cache.keep_weights, shown, ranks, seen)
        if seen:
            cache.keep_ends(seen.arrays())
    chosen = {index: [e for e in entries if e.quantized and e.name.startswith(f"blk.{index}.")] for index in layers}
    solved = _finished(model, journal)

    def wanted(index: int, layers: list[moments.Layer]) -> set[str]:
        return work.begin(chosen[index], layers)

    standing, last, at_ends = ends.Standing(), None, _at_ends(entries)
    measured = cache.ends() if at_ends else {}
    with alone(solvers) as parts, alone(solvers) as pool, alone(solvers) as beside:
        tried = beside.map if len(held) else None
        work = _Decoder(file, parts.map, tried)
        for entry in at_ends:
            layer = _end(model, file, entry, measured)
            if entry.name == "output.weight" and "weights" in measured:
                last, standing.output, standing.weights = entry, layer, measured["weights"][0]
                solved |= {len(model)} if journal.find(entry.name) else set()
                continue
            pool.submit(_solve_end, file, entry, layer, journal, parts.map, tried).result()
            for end in (ends.END_OF[entry.name], *(["output"] if ends.tied(file) else [])):
                standing.put(end, layer)
        passing = aims.run(
            model, tokens, held, cache.weights, wanted, journal.folder, threads, solved,
            functools.partial(progress, "solving"), ranks, standing,
        )  # fmt: skip
        while True:
            try:
                stage = next(passing)
            except StopIteration as end:
                return end.value
            if last and stage.index == len(model):
                pool.submit(_solve_end, file, last, stage.layers[0], journal, parts.map, tried).result()
                continue
            if stage.index in solved:
                work.put_back(journal.part(_part(stage.index))[0])
                continue
            work.solve(stage, pool, ranks)
            if stage.passing and steps:
                shown = functools.partial(progress, f"training layer {stage.index}")
                pool.submit(work.train, stage, stage.passing(), steps, shown).result()
            if stage.last:
                journal.keep(_part(stage.index), *work.finished())


class _Decoder:
    """A decoder layer being solved, stage by stage.

    each: does pieces of rows. tried: where nearest rounding is wanted beside, what does pieces of that.
    """

    def __init__(self, file: Gguf, each: solver.Each, tried: solver.Each | None):
        self.file, self.each, self.tried = file, each, tried

    def begin(self, entries: list[Entry], layers: list[moments.Layer]) -> set[str]:
        """The names of the layers that are not stored as they are."""
        self.report = _empty()
        self.rows: dict[str, np.ndarray] = {}
        self.places: dict[str, list[Place]] = {}
        self.entries = {entry.name: entry for entry in entries}
        for entry in entries:
            found = [moments.match(rows, layers) for rows in each_matrix(self.file, entry.tensor)]
            places = [place for place in found if place]
            if len(places) == len(found):
                self.places[entry.name] = places
            elif _coder(entry):
                self.report["left"][entry.name] = NOWHERE
        return {layer.name for places in self.places.values() for layer, _ in places}

    def solve(self, stage: aims.Stage, pool: ThreadPoolExecutor, ranks: Alone) -> None:
        """Solve the tensors of a stage, and put into its layers what is stored."""
        names = {layer.name for layer in stage.layers}
        due = [self.entries[name] for name, places in self.places.items() if places[0][0].name in names]
        coded = [entry for entry in due if _coder(entry)]
        found = _solve_all(self.file, coded, lambda e: self.places[e.name], stage.layers, ranks, pool, self.each)
        with ThreadPoolExecutor(1, "round") as aside:
            early = any(layer.weight.is_cuda for layer in stage.layers)  # while a GPU solves, processors are free
            rounding = aside.submit(self._round, due) if early else None
            rows = {entry.name: self._taken(entry, next(found)) if _coder(entry) else {} for entry in due}
            rounding.result() if rounding else self._round(due)
        for entry in due:
            self._put(entry, rows[entry.name])

    def _taken(self, entry: Entry, found: Result) -> dict[str, np.ndarray]:
        """What is stored of a tensor; the report learns of it."""
        if isinstance(found, str):
            self.report["left"][entry.name] = found
            return {}
        rows, self.report["errors"][entry.name], pooled, _ = found
        self.report["pooled"] += pooled
        self.rows |= rows
        return rows

    def train(self, stage: aims.Stage, passing: aims.Passing, steps: int, progress: Callable[[int, int], None]) -> None:
        """Train what is stored of the layer, whose last stage is solved, and put that into its layers."""
        for layer in stage.layers:
            layer.hessian = layer.pull = None  # the memory is needed
        found, stored = [], {}
        for name, places in self.places.items():
            entry, first = self.entries[name], 0
            trains = name in self.rows and formats.for_type(entry.coder)
            for layer, order in places:
                if layer.stored is not None:
                    stored[layer.key] = layer.stored
                if trains:
                    matrix = read_float32(self.file, entry.tensor, first, len(order))
                    packed = self.rows[name][first : first + len(order)]
                    found.append(training.Piece(entry, layer, order, packed, matrix))
                first += len(order)
        if whole := training.whole(found):
            rows, report = layerwise.run(passing, whole, stored, steps, progress)
            self.report["trained"] = [report]
            self.rows |= rows
            for name in rows:
                self._put(self.entries[name], rows)

    def put_back(self, rows: Mapping[str, Rows]) -> None:
        """The same from a finished layer."""
        due = [self.entries[name] for name in self.places]
        self._round(due)
        for entry in due:
            self._put(entry, rows)

    def finished(self) -> tuple[dict[str, np.ndarray], dict]:
        """Rows by name, and the report of the layer, in the order of the entries."""
        order = list(self.entries)
        self.report["errors"] = dict(sorted(self.report["errors"].items(), key=lambda item: order.index(item[0])))
        self.report["pooled"].sort()
        return self.rows, self.report

    def _round(self, entries: Iterable[Entry]) -> None:
        """Put nearest rounding into the layers of these, where it is wanted beside."""
        for entry in entries if self.tried else ():
            for _, layer, order, here in self._matrices(entry):
                _fill(layer, "nearest", order, self._nearest(entry, here))

    def _put(self, entry: Entry, rows: Mapping[str, Rows]) -> None:
        """Put what is stored of a tensor into its layers: these rows, nearest rounding where there are none."""
        for number, layer, order, here in self._matrices(entry):
            if entry.name in rows:
                value = decoded(entry, rows, number, here)
            elif layer.nearest is not None:
                value = layer.nearest[order.to(layer.nearest.device)]
            else:
                value = self._nearest(entry, here)
            _fill(layer, "stored", order, value)

    def _matrices(self, entry: Entry) -> Iterator[tuple[int, moments.Layer, torch.Tensor, slice]]:
        """Number, layer, order in that and rows in the tensor of each matrix."""
        first = 0
        for number, (layer, order) in enumerate(self.places[entry.name]):
            yield number, layer, order, slice(first, first := first + len(order))

    def _nearest(self, entry: Entry, here: slice) -> torch.Tensor:
        matrix = read_float32(self.file, entry.tensor, here.start, here.stop - here.start)
        return rounded(torch.from_numpy(matrix), entry, self.tried or self.each)


def _fill(layer: moments.Layer, name: str, order: torch.Tensor, value: torch.Tensor) -> None:
    """Rows of what a layer has under this name, which begins as the layer's weight."""
    if getattr(layer, name) is None:
        setattr(layer, name, layer.weight.clone())
    getattr(layer, name)[order.to(layer.weight.device)] = value.to(layer.weight)


def _empty() -> dict[str, Any]:
    """The report of a layer of which nothing is solved yet."""
    return {"errors": {}, "left": {}, "pooled": [], "tried": {}}


def _of_layers(trained: Sequence[Mapping[str, float]], steps: int) -> dict[str, Any]:
    """What became of layers that were trained one by one: how many, how many gained, and means over them."""
    ratios = [layer["after"] / layer["before"] if layer["before"] else 1.0 for layer in trained]
    means = {"error": ratios, "changed": [layer["changed"] for layer in trained]}
    found: dict[str, Any] = {"what": "layers", "steps": steps, "layers": len(trained)}
    found["gained"] = sum(layer["after"] < layer["before"] for layer in trained)
    return found | {name: float(np.mean(values)) if values else None for name, values in means.items()}


def _part(index: int) -> str:
    return f"layer-{index:05}"


def _solve_layer(
    file: Gguf,
    wanted: list[Entry],
    layers: list[moments.Layer],
    pool: ThreadPoolExecutor,
    journal: Journal,
    index: int,
    ranks: Alone,
) -> None:
    """Solve the layer's tensors and keep the rows."""
    wanted = [entry for entry in wanted if _coder(entry)]
    rows: dict[str, np.ndarray] = {}
    report = _empty()

    def find(entry: Entry) -> Iterator[Place | None]:
        return (moments.match(rows, layers) for rows in each_matrix(file, entry.tensor))

    results = _solve_all(file, wanted, find, layers, ranks, pool)
    for entry, found in zip(wanted, results, strict=True):
        if isinstance(found, str):
            report["left"][entry.name] = found
            continue
        stored, errors, pooled, tried = found
        rows |= stored
        report["errors"][entry.name] = errors
        report["pooled"] += pooled
        report["tried"] |= {entry.name: tried} if any(tried) else {}
    journal.keep(_part(index), rows, report)


def _at_ends(entries: Sequence[Entry]) -> list[Entry]:
    """The embedding and the output, where they are solved, in the order of `ENDS`."""
    found = {e.name: e for e in entries if e.name in ENDS and e.quantized and not e.copied and _coder(e)}
    return [found[name] for name in ENDS if name in found]


def _end(model: Model, file: Gguf, entry: Entry, measured: Mapping[str, torch.Tensor]) -> moments.Layer:
    """The matrix of an end, with the Hessian of the float model."""
    end = ends.END_OF[entry.name]
    hessian = ends.hessian(measured, entry.name, ends.tied(file))
    if hessian is not None:
        hessian = hessian.to(model.device)  # where it is solved
    layer = moments.Layer(end, model.matrix(end).detach(), hessian)
    layer.unknown = "not measured: of an encoder, by several processes, or by another version"
    return layer


def _solve_end(
    file: Gguf,
    entry: Entry,
    layer: moments.Layer,
    journal: Journal,
    each: solver.Each,
    tried: solver.Each | None = None,
) -> None:
    """Solve the embedding or the output, some rows at a time, and keep it in the journal, or take it from there.

    Gives `layer` what is stored, and nearest rounding, of which `tried` does pieces; nothing where it cannot be solved.
    """
    found = journal.find(entry.name)
    rows: dict[str, Rows] = dict(found[0]) if found else {}
    report, packed, first = _empty(), [], 0
    stored, nearest = layer.weight.clone(), layer.weight.clone() if tried else None
    on_gpu = layer.hessian is not None and layer.hessian.is_cuda
    with ThreadPoolExecutor(1, "round") as aside:
        for part in each_matrix(file, entry.tensor, ends.step(entry.tensor, on_gpu)):
            place = moments.match(part, [layer])
            if place is None or layer.hessian is None and not rows:
                report["left"][entry.name] = NOWHERE if place is None else layer.unknown
                break
            weight, order = torch.from_numpy(part), place[1]
            nearby = functools.partial(rounded, weight, entry, tried or each)
            early = aside.submit(nearby) if nearest is not None and on_gpu else None
            if rows:
                value = decoded(entry, rows, 0, slice(first, first + len(part)))
            else:
                _, solution = pieces.of_rows(entry.name, entry.coder, entry.layout, weight, layer, order, each)
                value = solution.weight
                packed.append(solution.packed.cpu().numpy())
                for name, error in solution.errors.items():
                    errors = report["errors"].setdefault(entry.name, dict.fromkeys(solution.errors, 0.0))
                    errors[name] += error * len(part) / entry.tensor.n_rows
            stored[order.to(stored.device)] = value.to(stored)
            if nearest is not None:
                nearest[order.to(stored.device)] = (early.result() if early else nearby()).to(nearest)
            first += len(part)
        else:
            layer.stored, layer.nearest = stored, nearest
    layer.hessian = layer.drift = None
    if found is None:
        whole = layer.stored is not None
        report["errors"] = report["errors"] if whole else {}
        journal.keep(entry.name, {entry.name: np.concatenate(packed)} if whole else {}, report)


def _coder(entry: Entry) -> Callable[..., Solution] | None:
    """What codes a matrix, given its Hessian, in the entry's type; None without error feedback for that."""
    return families.coder(entry.target, entry.layout) if entry.target else None


def _left(entries: Sequence[Entry], solved: Solved) -> dict[str, str]:
    """Why each linear layer, or whatever has such a type, was not solved; by tensor."""
    left = {}
    for entry in entries:
        if not entry.quantized or entry.copied or entry.name in solved.errors:
            continue
        if _coder(entry):
            left[entry.name] = solved.left.get(entry.name, "outside the decoder layers that transformers runs")
        elif is_linear(entry.tensor):
            left[entry.name] = f"no error feedback for {entry.target_name}"
    return left


def _solve_all(
    file: Gguf,
    entries: list[Entry],
    find: Callable[[Entry], Iterable[Place | None]],
    layers: list[moments.Layer],
    ranks: Alone,
    pool: ThreadPoolExecutor,
    each: solver.Each = map,
) -> Iterator[Result]:
    """What becomes of each tensor, in order, by all processes. find: where each of its matrices is, in `layers`."""
    reasons: dict[str, str] = {}
    due: list[pieces.Piece] = []
    for entry in entries:
        mine = []
        for number, place in enumerate(find(entry)):
            if place is None or place[0].hessian is None:
                reasons[entry.name] = place[0].unknown if place else NOWHERE
                break
            mine.append(pieces.of_matrix(entry, number, *place))
        due += [] if entry.name in reasons else mine
    named, tensors = {layer.name: layer for layer in layers}, {entry.name: entry.tensor for entry in entries}

    def read(piece: pieces.Piece) -> np.ndarray:
        return read_float32(file, tensors[piece.tensor], piece.first, len(piece.order))

    def dealt() -> list[list[pieces.Piece]]:
        own, *others = hands
        return [own, *([pieces.to_send(p, read(p), named[p.layer]) for p in hand] for hand in others)]

    hands = pieces.deal(due, ranks.count)
    own = pieces.solve(ranks.dealt(dealt), layers, pool, each, read)
    # One process takes over what is stored of a tensor while others are solved.
    found = ranks.gathered(list(own)) if ranks.count > 1 else [own]
    every = itertools.chain.from_iterable(map(zip, hands, found))  # in the order of the entries
    counts = Counter(piece.tensor for hand in hands for piece in hand)

    def joined(entry: Entry) -> Result:
        return reasons.get(entry.name) or _joined(file, entry, list(itertools.islice(every, counts[entry.name])), named)

    return map(joined, entries)


def _joined(
    file: Gguf, entry: Entry, parts: list[tuple[pieces.Piece, pieces.Found]], layers: Mapping[str, moments.Layer]
) -> Result:
    """From what became of all rows of a tensor, in order.

    What is stored, name -> uint8 [n_rows, row_bytes], and [matrices, size] of a side tensor; errors by stage; the
    experts that took the pooled Hessian; and as `Solved.tried`.
    """
    stored: dict[str, np.ndarray] = {entry.name: np.concatenate([done.packed for _, done in parts])}
    if parts[0][1].side is not None:
        stored[side_name(entry.name)] = np.stack([done.side for _, done in parts if done.side is not None])
    weights = [len(piece.order) for piece, _ in parts]  # matrices of a tensor have equally many rows
    errors = {s: float(np.average([done.errors[s] for _, done in parts], weights=weights)) for s in parts[0][1].errors}
    pooled, tried, n_rows = [], np.zeros(3), entry.tensor.shape[-2]
    for number, name in dict.fromkeys((piece.number, piece.layer) for piece, _ in parts):
        layer, first = layers[name], number * n_rows
        pooled += [f"{entry.name}[{number}]"] if layer.pooled else []
        if layer.held:
            rows = torch.from_numpy(read_float32(file, entry.tensor, first, n_rows))
            fed = decoded(entry, stored, number, slice(first, first + n_rows)).to(layer.weight.device)
            tried += _tried(rows.to(fed.device), fed, entry, layer)
    return stored, errors, pooled, tried.tolist()


def _tried(weight: torch.Tensor, fed: torch.Tensor, entry: Entry, layer: moments.Layer) -> np.ndarray:
    """float64 [3], as `Solved.tried`, of one matrix."""
    if not layer.held:
        return np.zeros(3)
    sums = np.zeros(3)
    nearest = rounded(weight.cpu(), entry).to(weight.device)
    for i, change in enumerate((weight, nearest.sub_(weight), fed - weight)):
        for x, information in layer.held:
            outputs = (x.to(change.device).float() @ change.T).square_().sum(1, dtype=torch.float64)
            sums[i] += float(outputs @ information.to(change.device).double())
    return sums
