# SPDX-License-Identifier: MIT
"""Conversion: prepare (check and plan), calibrate, write, report."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__, card, display, options, output, plan, rewrite, types
from .calibration import ranks, text
from .errors import UsageError
from .files import checkpoint, gguf_file
from .files.gguf_file import Gguf, Value
from .files.imatrix import Imatrix
from .files.imatrix import load as load_imatrix
from .measure import loading, overlap
from .plan import mix

if TYPE_CHECKING:
    from .calibration.journal import Journal
    from .calibration.solve import Solved

LESS = ", or --tune layers, which has one layer in memory"
PROMISED_RAM = 1_500_000_000  # bytes, beside three times the largest tensor


@dataclass(frozen=True)
class Job:
    """A conversion that is decided.

    make: tensor -> type, to the plan's entries. budget: what types are still to be chosen for. mix: those that a plan
    or a budget chose. importance: tensor -> float32 [experts * n_cols]. kv: the metadata without what `metadata` adds.
    solvers: matrices solved at a time. spare: bytes of memory that --max-ram leaves to hidden states. at_once: encode
    while the checkpoint is being read. loads: whether the finished file is to be loaded.
    """

    given: options.Convert
    source: checkpoint.Source
    make: Callable[[Mapping[str, str] | None], list[plan.Entry]]
    entries: list[plan.Entry]
    budget: mix.Budget | None
    mix: mix.Mix | None
    importance: Mapping[str, np.ndarray]
    kv: dict[str, Value]
    solvers: int
    spare: int
    at_once: bool
    loads: bool

    @property
    def architecture(self) -> str:
        """As `general.architecture` says it."""
        return self.source.header.get("general.architecture", str, "")

    def data(self, progress: display.Progress) -> Gguf:
        """The checkpoint's tensors."""
        return self.source.growing() if self.at_once else self.source.data(progress.read)

    def metadata(self) -> dict[str, Value]:
        """The output's."""
        given = self.given
        target = mix.most_used(self.entries, self.architecture) if given.mixed else types.get(given.base)
        return output.metadata(self.kv, target, deciding(given), given.label)


def convert(model: str | Path, type: str | None = None, outfile: str | Path = output.TEMPLATE, **more: Any) -> Path:
    """Convert a checkpoint to a GGUF file of `type` and return the file's path. more: see `options.Convert`.

    The output appears whole or not at all. Its bytes do not depend on the number of threads; with `calib` they depend
    on the machine. A calibrated conversion that was stopped goes on where it was when the same call
    is made again. Raises the errors of `gguf_splitq.errors`.
    """
    given = options.Convert(model, type, outfile, **more)
    with ranks.together() as processes:
        if processes.rank:
            from .calibration import helping

            threads = max(1, given.workers // ranks.local())
            helping.run(processes, threads, lambda: given.processor, given.vram)
        else:
            _convert(given, processes)
    return given.path


def _convert(given: options.Convert, processes: ranks.Alone) -> None:
    given.check()
    importance = load_imatrix(given.imatrix) if given.imatrix else None
    display.say(f"checking {given.model}")
    with given.writing():
        mmproj = given.mmproj is not None and not given.dry_run
        with checkpoint.opened(given.model, given.scratch, given.revision, given.plans_only, mmproj) as source:
            job = prepare(given, source, importance)
            if given.plans_only:
                display.show_plan(given.path, job.entries)
                return
            with display.Progress() as progress, job.data(progress) as file:
                if given.measures:
                    job = choose(job, file, progress)
                if given.dry_run:
                    display.show_plan(given.path, job.entries)
                    return
                with journal(job) as kept:
                    solved = calibrate(job, file, kept, progress, processes)
                    entries, stats = write(job, file, solved, progress)
            if source.mmproj and given.mmproj_path:
                checkpoint.keep_mmproj(source.mmproj, given.mmproj_path)
        report(job, entries, stats, solved)
        if given.card_path:
            card.write(given.card_path, given.path, given.hub_id)


def prepare(given: options.Convert, source: checkpoint.Source, matrix: Imatrix | None) -> Job:
    """Decide every tensor's type, and refuse what memory, disk and build do not allow."""
    given.check_files(source.path)  # a Hub id's are known now
    head = source.header
    importance = matrix.for_tensors(head.tensors) if matrix else None
    architecture = head.get("general.architecture", str, "")
    base = given.base
    if given.room is not None:
        base = mix.base(8 * given.room / max(1, sum(t.n_weights for t in head.tensors)))
    make = functools.partial(
        plan.make,
        head.tensors,
        base,
        given.tensor_type,
        given.token_embedding_type,
        given.output_tensor_type,
        architecture,
        importance,
        claq_metric=given.claq_metric,
    )
    entries = likely = make()
    kv = {key: value for key, value in head.kv.items() if not key.startswith("quantize.")}
    kv |= matrix.metadata() if matrix else {}
    if given.calib and given.calib != "self" and not given.plans_only:
        kv["gguf_splitq.calib_lines"] = Value.of(overlap.fingerprint(text.whole(Path(given.calib))))
    budget = given.budget
    if given.plan and given.plan_file:
        mix.check_names(given.plan, entries, given.plan_file, architecture)
        entries = likely = make(given.plan.types)
    elif given.measures:
        free = mix.candidates(entries, whole=given.bpw is None)
        likely = make(mix.largest(free, base))  # what memory is stated for
        if given.room is not None:
            said = output.metadata(kv, types.get(base), deciding(given), given.label)
            budget = mix.Budget.of_size(given.room, len(rewrite.header(said, likely, given.container)), entries)
        assert budget
        mix.check(entries, budget, architecture)
    solvers, spare, peak, at_once = memory_needs(given, source, likely)
    vram = gpu_needs(given, likely)
    loads = given.load and loading.check_plan(source, entries, kv, given.scratch, given.container)
    if not given.plans_only:
        require_space(given, source, entries)
        what = "measuring" if given.dry_run else "writing"
        fewer = ", or fewer sequences at a time" if given.vram is not None and vram > given.vram else ""
        gpu = f", and of a GPU's by estimate {gguf_file.mib(vram)} and hidden states{fewer}" if vram else ""
        display.say(f"{what} {given.path}, in at most about {gguf_file.mib(peak)} of memory{gpu}")
    return Job(given, source, make, entries, budget, given.plan, importance or {}, kv, solvers, spare, at_once, loads)


def choose(job: Job, file: Gguf, progress: display.Progress) -> Job:
    """The job with the types that cost the least divergence under its budget, measured on the text."""
    from .calibration import model, sensitivity

    given, budget = job.given, job.budget
    assert given.calib and budget  # Convert.check
    wanted = mix.candidates(job.entries, budget.whole)
    step = functools.partial(progress.step, "measuring sensitivity")
    costs = sensitivity.of_checkpoint(
        job.source.path,
        file,
        wanted,
        given.calib,
        given.calib_tokens,
        given.workers,
        given.scratch,
        step,
        given.processor,
        model.Room(given.vram, job.spare, display.say),
    )
    chosen = mix.choose(job.entries, costs, budget, job.architecture)
    entries = job.make(chosen.types)
    display.say(mix.summary(chosen, entries, job.architecture))
    if given.save_plan:
        mix.save(chosen, given.save_plan)
    return replace(job, entries=entries, mix=chosen)


def journal(job: Job) -> contextlib.AbstractContextManager:
    """Where a calibration keeps what it has finished, until the block ends well; None without a calibration."""
    if not job.given.calib:
        return contextlib.nullcontext()
    from .calibration.journal import Journal

    return Journal(job.given.journal, settings(job, job.given.calib))


def calibrate(
    job: Job, file: Gguf, kept: Journal | None, progress: display.Progress, processes: ranks.Alone
) -> Solved | None:
    """Tensors coded by error feedback, those that `kept` holds included; None without --calib."""
    given = job.given
    if kept is None or given.calib is None:
        return None
    from .calibration import model, solve

    return solve.run(
        job.source.path,
        file,
        job.entries,
        given.calib,
        given.calib_tokens,
        kept,
        max(1, given.workers // ranks.local()),
        job.solvers,
        progress.step,
        given.hessians,
        given.trains_whole,
        given.tune == "layers",
        given.steps,
        given.precision,
        given.aim,
        given.processor,
        processes,
        model.Room(given.vram, job.spare, display.say),
    )


def write(
    job: Job, file: Gguf, solved: Solved | None, progress: display.Progress
) -> tuple[list[plan.Entry], list[rewrite.Stats]]:
    """Write the output; returns the entries as they came out, and their errors."""
    given, rows = job.given, solved.rows if solved else None
    progress.start(job.entries)

    def check(written: Path) -> None:
        if given.room is not None and written.stat().st_size > given.room:
            cause = "a tensor has weights that its type cannot hold and took a larger one"
            raise UsageError(f"--size {given.size} is missed, {cause}: give a little more than is needed")
        if job.loads:
            loading.check_file(written, job.source)

    return rewrite.rewrite(
        file,
        job.entries,
        job.metadata(),
        given.path,
        job.importance,
        given.workers,
        given.limit,
        rows,
        progress.done,
        check,
        given.container,
    )


def report(job: Job, entries: Sequence[plan.Entry], stats: Sequence[rewrite.Stats], solved: Solved | None) -> None:
    """Show the summary, and write it with every tensor's error to --report."""
    given, kv = job.given, job.metadata()
    weighted = [e.name for e in entries if e.target and e.quantized and e.target.uses_importance]
    result = {
        "file": given.path.name,
        "size": given.path.stat().st_size,
        "bpw": plan.bpw(entries),
        "linear_bpw": plan.bpw(e for e in entries if plan.is_linear(e.tensor, job.architecture)),
        **{key: kv[f"gguf_splitq.{key}"].python for key in ("version", "type", "llama_cpp")},
        "options": deciding(given),
        "fallbacks": plan.fallbacks(entries),
        "notes": job.source.notes,
        "without_importance": [n for n in weighted if n not in job.importance] if given.imatrix else None,
        "calibration": solved and solved.report(),
        "budget": job.mix and {"bpw": job.mix.bpw, "whole": job.mix.whole, "costs": job.mix.costs},
        "tensors": [tensor_report(e, s, e.name in job.importance) for e, s in zip(entries, stats, strict=True)],
    }
    display.show_summary(given.path, entries, stats, result)
    if given.report is not None:
        output.write_json(given.report, result)


def memory_needs(
    given: options.Convert, source: checkpoint.Source, entries: Sequence[plan.Entry]
) -> tuple[int, int, int, bool]:
    """(matrices solved at a time, bytes that this leaves to hidden states, bytes of memory at most, whether reading and
    encoding may go on at once).
    """
    solvers = spare = calibrating = 0
    if given.calib:
        from .calibration import memory

        whole = given.calib == "self" or source.child is None or given.trains_whole is not None
        here = ranks.local()  # processes that share this machine's memory and processors
        each, threads = given.limit and given.limit // here, max(1, given.workers // here)
        several = ranks.launched()
        solvers = memory.solvers(entries, given.calib_tokens, threads, whole, given.tune, each, several)
        peak = memory.peak(entries, given.calib_tokens, solvers, whole, given.tune, several)
        spare, calibrating = max(0, (each or 0) - peak), here * peak
        if given.trains_whole and given.limit is not None and calibrating > given.limit:
            raise UsageError(
                f"--max-ram {gguf_file.mib(given.limit)} is too small: --tune {given.trains_whole} needs about "
                f"{gguf_file.mib(calibrating)}: give that{LESS}"
            )
    reading, encoding = peak_ram(source, entries, given.workers, given.limit, calibrating)
    allowed = given.limit or PROMISED_RAM + 3 * max((e.tensor.n_bytes for e in entries), default=0)
    at_once = reading + encoding <= allowed and source.child is not None and not given.calib
    return solvers, spare, reading + encoding if at_once else max(reading, encoding), at_once


def gpu_needs(given: options.Convert, entries: Sequence[plan.Entry]) -> int:
    """Bytes of a GPU's memory, by estimate, 0 where none is used.

    UsageError when --max-vram is less than one sequence at a time needs.
    """
    if not given.calib or given.plans_only or given.processor == "cpu":
        return 0
    from .calibration import memory, tune

    bits = 16 if given.precision == "bf16" else 32
    needs: dict[str, Callable[..., int]] = {}
    if given.measures:
        needs["measuring what types cost"] = functools.partial(memory.measuring, entries)
    if not given.dry_run:
        needs["calibrating this"] = functools.partial(memory.on_gpu, entries, bits, tune=given.tune)
    drawn = tune.drawn(given.steps, given.calib_tokens) if given.trains_whole else 0
    if given.calib == "self" or drawn:  # to measure and to train on in float32
        precise = given.measures or drawn
        needs["drawing text"] = functools.partial(memory.drawing, entries, 32 if precise else bits)
    if given.trains_whole and not given.dry_run:
        needs["--tune"] = functools.partial(memory.training, entries, given.trains_whole)
    least, what = max((needed(sequences=1), what) for what, needed in needs.items())
    if given.vram is not None and least > given.vram:
        raise UsageError(
            f"--max-vram {gguf_file.mib(given.vram)} is too small: {what} needs about {gguf_file.mib(least)}, one "
            f"sequence at a time: give that or --device cpu{LESS if what == '--tune' else ''}"
        )
    if "--tune" in needs and (least := needs["--tune"](sequences=1)) > (size := _gpu_memory(given.processor)):
        raise UsageError(
            f"--tune needs about {gguf_file.mib(least)} of a GPU's memory, and {given.processor} has "
            f"{gguf_file.mib(size)}: take --device cpu{LESS}"
        )
    return max(needed() for needed in needs.values())


def _gpu_memory(device: str) -> int:
    """Bytes of it in all."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory


def peak_ram(
    source: checkpoint.Source, entries: Sequence[plan.Entry], threads: int, limit: int | None, calibrating: int = 0
) -> tuple[int, int]:
    """Bytes of memory at most, before the encoding and for it; UsageError when one of them is above `limit`.

    Before: the converter process, and `calibrating`, what the calibration needs.
    """
    largest = max((e.tensor.n_bytes for e in entries), default=0)
    child = max(checkpoint.ADAPTER_RAM + 3 * largest if source.child else 0, calibrating)
    if limit is not None and child > limit:
        raise UsageError(f"--max-ram {gguf_file.mib(limit)} is too small: reading this needs {gguf_file.mib(child)}")
    return child, rewrite.peak_ram(entries, threads, rewrite.window_size(entries, threads, limit))


def require_space(given: options.Convert, source: checkpoint.Source, entries: Sequence[plan.Entry]) -> None:
    """EnvironmentFailed when a disk is too small for the intermediate file, the output and what a calibration keeps.

    Hidden states are not counted: `solve` asks for their room when it knows how many tokens the text has.
    """
    folder, needed = given.scratch, source.child.total if source.child else 0
    if not given.dry_run:
        needed += sum(e.n_bytes for e in entries) + (source.mmproj.stat().st_size if source.mmproj else 0)
    if given.calib and not given.dry_run:
        inside = [e for e in entries if e.quantized and (e.name.startswith("blk.") or e.name in plan.ENDS)]
        kept = sum(e.n_bytes for e in inside)
        joined, hessians = dict(given.writes).get("--hessians"), sum(_measured(e, given) for e in inside)
        if joined or given.aim == "half":
            kept += hessians  # layer by layer, before they are joined
        if joined:
            other = joined.absolute().parent
            if other.stat().st_dev == folder.stat().st_dev:
                needed += hessians
            else:
                gguf_file.require_space(other, hessians)
        before = sum(path.stat().st_size for path in given.journal.glob("*"))
        needed += max(kept - before, 0)
    gguf_file.require_space(folder, needed)


def _measured(entry: plan.Entry, given: options.Convert) -> int:
    """Bytes of what is measured of a tensor: the weights of tokens, of which few experts see each, or Hessians."""
    count = entry.tensor.n_rows // entry.tensor.shape[-2]
    if entry.name in plan.ENDS:
        return 8 * entry.tensor.n_cols**2 + 4 * given.calib_tokens
    if given.aim == "plain":
        return 4 * entry.tensor.n_cols**2 * count
    return 12 * given.calib_tokens * min(count, 8)


def deciding(given: options.Convert) -> dict:
    """What of the command line decides the output's bytes, defaults left out; files by name, not by path."""
    found: dict[str, Any] = {
        "file_bpw" if given.budget and given.budget.whole else "bpw": given.budget and given.budget.bpw,
        "size": given.room,
        "plan": given.plan_file and Path(given.plan_file).name,
        "tensor_type": list(given.tensor_type),
        "token_embedding_type": given.token_embedding_type,
        "output_tensor_type": given.output_tensor_type,
        "imatrix": given.imatrix and Path(given.imatrix).name,
        "calib": given.calib and Path(given.calib).name,
        "calib_tokens": given.calib and given.calib_tokens,
        "calib_dtype": given.calib and given.precision,
        "aim": given.aim if given.calib and given.aim != "half" else None,
        "hessians": given.hessians is not None,
        "tune": given.tune,
        "tune_steps": given.tune_steps,
        "claq_metric": given.claq_metric if given.claq_metric != "hessian" else None,
    }
    if given.calib == "self":
        from .calibration.model import SAMPLING

        found["sampling"] = SAMPLING
    return {key: value for key, value in found.items() if value}


def settings(job: Job, calib: str | Path) -> dict:
    """All that decides what a calibration stores, by name: a run goes on only with what the same settings left."""
    stored = {e.name: f"{e.columns} {e.layout}" if e.columns else e.target_name for e in job.entries}
    return {
        "model": checkpoint.fingerprint(job.source.files),
        "types": hashlib.sha256(json.dumps(stored).encode()).hexdigest()[:16],
        "calib": "self" if calib == "self" else hashlib.sha256(Path(calib).read_bytes()).hexdigest()[:16],
        "calib_tokens": job.given.calib_tokens,
        "calib_dtype": job.given.precision,
        "aim": job.given.aim,
        "weights": "by token" if job.given.aim == "half" else None,  # which an earlier version kept by batch
        "hessians": job.given.hessians is not None,
        "tune": job.given.tune and [job.given.tune, job.given.steps],
        "version": __version__,
    }


def tensor_report(entry: plan.Entry, stats: rewrite.Stats, weighted: bool) -> dict:
    """One tensor's row of the JSON report; errors are relative to the input's values, seconds are of all threads."""
    return {
        "name": entry.name,
        "shape": list(entry.tensor.shape),
        "source": entry.source_name,
        "type": entry.target_name,
        "reason": entry.fallback or entry.reason,
        "bytes": entry.n_bytes,
        "bpw": entry.bpw,
        "importance": weighted,
        "rmse": stats.rmse,
        "sqnr_db": stats.sqnr_db,
        "largest_error": stats.largest,
        "seconds": round(stats.seconds, 4),
    }
