"""Conversion: plan, validate, run, report."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from . import __version__, checkpoint, display, gguf_file, mix, overlap, patching, plan, rewrite, types
from .errors import UsageError
from .gguf_file import Value
from .imatrix import load as load_imatrix
from .types import TensorType, columns

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml/include/ggml.h
PROMISED_RAM = 1_500_000_000  # bytes, beside three times the largest tensor


def convert(
    model: str | Path,
    type: str | None = None,
    outfile: str | Path = "{name}-{type}.gguf",
    bpw: float | None = None,
    plan_file: str | Path | None = None,
    save_plan: str | Path | None = None,
    tensor_type: Iterable[str] = (),
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    imatrix: str | Path | None = None,
    calib: str | Path | None = None,
    calib_tokens: int = 131_072,
    hessians: str | Path | None = None,
    tune: bool = False,
    claq_metric: str = "hessian",
    dry_run: bool = False,
    report: str | Path | None = None,
    threads: int | None = None,
    max_ram: str | int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
) -> Path:
    """Convert a checkpoint to a GGUF file of `type` and return the file's path.

    bpw, instead of `type`: types for the linear layers that cost the least divergence at that many stored bits per
    weight, measured on `calib`; save_plan writes them to a JSON file, which plan_file reads, instead of both.
    model: a Hugging Face folder, a Hub id (with `revision`), or a GGUF in F32, F16 or BF16. tensor_type: `REGEX=TYPE`
    rules. imatrix: an importance matrix of llama-imatrix, in either format. calib: a text, or "self", to calibrate
    error feedback on with `calib_tokens` tokens. hessians: a file of what was measured, read if it is there, else
    written. tune: train block scales and norms on the calibration tokens. claq_metric: what gives a column of cq2.x,
    sq2.x and so on more bits, "hessian" or "outlier". A calibrated conversion that was stopped goes
    on where it was when the same call is made again.
    dry_run: print the plan, write nothing.
    report: a JSON file for the per-tensor errors. max_ram: bytes, or text like "2G". The output appears whole or not
    at all, and is the same at any number of threads.
    Raises the errors of `gguf_splitq.errors`.
    """
    limit = parse_size(max_ram)
    threads = check_threads(threads)
    check_choice(type, bpw, plan_file, save_plan, calib)
    check_calibration(calib, calib_tokens, imatrix, hessians, tune)
    saved = mix.load(plan_file) if plan_file else None
    bpw = saved.bpw if saved else bpw
    type, label = (type, types.get(type).name) if type else (mix.base(bpw), mix.label(bpw))
    measured = bpw is not None and saved is None
    matrix = load_imatrix(imatrix) if imatrix else None
    rules = tuple(tensor_type)
    folder = Path(tempfile.gettempdir()) if dry_run else output_folder(outfile)
    display.say(f"checking {model}")
    with checkpoint.opened(model, folder, revision, dry_run and not measured) as source:
        head = source.header
        path = output_path(outfile, source.name, label)
        if not dry_run:
            check_output(path, source.files, overwrite)
            check_output(report, [*source.files, path], overwrite=True)
        importance = matrix.for_tensors(head.tensors) if matrix else {}
        architecture = head.get("general.architecture", "")
        make = functools.partial(
            plan.make, head.tensors, type, rules, token_embedding_type, output_tensor_type, architecture, importance,
            claq_metric=claq_metric,
        )  # fmt: skip
        entries = make()
        if saved:
            mix.check_names(saved, entries, plan_file, architecture)
            entries = make(saved.types)
        elif measured:
            mix.check(entries, bpw, architecture)
        solvers = calibrating = 0
        if calib:
            from .solve import memory

            whole = calib == "self" or source.child is None
            solvers = memory.solvers(entries, calib_tokens, threads, whole, tune, limit)
            calibrating = memory.peak(entries, calib_tokens, solvers, whole, tune)
        reading, encoding = peak_ram(source, entries, threads, limit, calibrating)
        both = reading + encoding <= (limit or PROMISED_RAM + 3 * max((e.tensor.n_bytes for e in entries), default=0))
        at_once = both and source.child is not None and not (calib or measured)
        peak = reading + encoding if at_once else max(reading, encoding)
        if dry_run and not measured:
            display.show_plan(path, entries)
            return path
        intermediate = source.child.total if source.child else 0
        gguf_file.require_space(folder, intermediate + (0 if dry_run else sum(e.n_bytes for e in entries)))
        display.say(f"{'measuring' if dry_run else 'writing'} {path}, in at most about {gguf_file.mib(peak)} of memory")
        kv = {key: value for key, value in head.kv.items() if not key.startswith("quantize.")}
        kv |= matrix.metadata() if matrix else {}
        chosen = options(
            bpw=bpw, plan=plan_file, tensor_type=list(rules), token_embedding_type=token_embedding_type,
            output_tensor_type=output_tensor_type, imatrix=imatrix, calib=calib, calib_tokens=calib and calib_tokens,
            hessians=bool(hessians), tune=tune, claq_metric=claq_metric if claq_metric != "hessian" else None,
        )  # fmt: skip
        if calib == "self":
            from .solve.model import SAMPLING

            chosen["sampling"] = SAMPLING
        if calib and calib != "self":
            text = Path(calib).read_text(encoding="utf-8", errors="replace")
            kv["gguf_splitq.calib_lines"] = Value.of(overlap.fingerprint(text))
        with display.Progress() as progress, source.growing() if at_once else source.data(progress.read) as file:
            solved = None
            if measured:
                from .solve import sensitivity

                step = functools.partial(progress.step, "measuring sensitivity")
                costs = sensitivity.of_checkpoint(
                    source.path, file, mix.candidates(entries), calib, calib_tokens, threads, folder, step
                )
                saved = mix.choose(entries, costs, bpw, architecture)
                entries = make(saved.types)
                display.say(mix.summary(saved, entries, architecture))
                if save_plan:
                    mix.save(saved, save_plan)
                if dry_run:
                    display.show_plan(path, entries)
                    return path
            kv = metadata(kv, mix.most_used(entries, architecture) if bpw else types.get(type), chosen, label)
            job = contextlib.nullcontext()
            if calib:
                from .solve.journal import Journal

                job = Journal(
                    path.with_name(f".{path.name}.unfinished"),
                    settings(source, entries, calib, calib_tokens, hessians, tune),
                )
            with job as journal:
                if calib:
                    from . import solve

                    solved = solve.run(
                        source.path, file, entries, calib, calib_tokens, journal, threads, solvers, progress.step,
                        hessians, tune,
                    )  # fmt: skip
                progress.start(entries)
                entries, stats = rewrite.rewrite(
                    file, entries, kv, path, importance, threads, limit, solved and solved.rows, progress.done
                )
    result = {
        "file": path.name,
        "size": path.stat().st_size,
        "bpw": plan.bpw(entries),
        **{key: kv[f"gguf_splitq.{key}"].python for key in ("version", "type", "llama_cpp")},
        "options": json.loads(kv["gguf_splitq.options"].python),
        "fallbacks": plan.fallbacks(entries),
        "without_importance": [e.name for e in entries if e.quantized and e.name not in importance] if matrix else None,
        "calibration": calibration_report(solved),
        "budget": saved and {"bpw": saved.bpw, "costs": saved.costs},
        "tensors": [tensor_report(e, s, e.name in importance) for e, s in zip(entries, stats, strict=True)],
    }
    display.show_summary(path, entries, stats, result)
    write_report(report, result)
    return path


def output_folder(outfile: str | Path) -> Path:
    """The folder an output goes to; UsageError when there is none."""
    folder = Path(outfile) if Path(outfile).is_dir() else Path(outfile).parent
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder: make it or choose another --outfile")
    return folder


def output_path(outfile: str | Path, name: str, type: str) -> Path:
    """The template filled in; a folder takes the default name. A precision at the end of the input's name goes."""
    template = str(Path(outfile) / "{name}-{type}.gguf") if Path(outfile).is_dir() else str(outfile)
    name = re.sub(r"[-.](f32|f16|bf16)$", "", name, flags=re.IGNORECASE)
    return Path(template.replace("{name}", name).replace("{type}", type))


def check_output(path: str | Path | None, inputs: Sequence[Path], overwrite: bool) -> None:
    """UsageError when `path` is an input, is a folder, or exists without `overwrite`."""
    if path is None or not (path := Path(path)).exists():
        return
    if any(file.exists() and path.samefile(file) for file in inputs):
        raise UsageError(f"{path}: the output would replace its own input: choose another name")
    if path.is_dir() or not overwrite:
        what = "folder" if path.is_dir() else "file"
        raise UsageError(f"{path}: there is already a {what}: pass --overwrite or another name")


def check_threads(threads: int | None) -> int:
    """The number of worker threads, by default the CPUs this process may use."""
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} leaves nobody to work: give 1 or more")
    return threads or rewrite.default_threads()


def parse_size(size: str | int | None) -> int | None:
    """Bytes from text such as "1500M" or "2G" (powers of 1024)."""
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", size.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"--max-ram {size!r} is not a size: write e.g. 1500M or 2G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def check_choice(
    type: str | None, bpw: float | None, plan_file: str | Path | None, save_plan: str | Path | None, calib
) -> None:
    """UsageError unless exactly one of type, budget and plan is given, and with a budget a text to measure on."""
    if sum(given is not None for given in (type, bpw, plan_file)) != 1:
        raise UsageError("what the tensors become is not clear: give one of --type, --bpw and --plan")
    if bpw is not None and not 0 < bpw < 32:
        raise UsageError(f"--bpw {bpw:g} is no number of bits for a weight: give for example 3.5")
    if bpw is not None and not calib:
        raise UsageError("--bpw measures on a text what each type costs: give --calib TEXT, or --calib self")
    if save_plan is not None and bpw is None:
        raise UsageError(f"--save-plan {save_plan}: only --bpw makes a plan: give that")
    if save_plan is not None and not Path(save_plan).absolute().parent.is_dir():
        raise UsageError(f"--save-plan {save_plan}: its folder does not exist: create it first")


def check_calibration(
    calib: str | Path | None,
    tokens: int,
    imatrix: str | Path | None,
    hessians: str | Path | None = None,
    tune: bool = False,
) -> None:
    """UsageError unless the options of a calibration fit together."""
    if calib and imatrix:
        raise UsageError("--calib and --imatrix exclude each other: the calibration measures the whole Hessian itself")
    if (hessians or tune) and not calib:
        option = f"--hessians {hessians}" if hessians else "--tune"
        raise UsageError(f"{option} needs a text to run the model on: give --calib TEXT, or --calib self")
    if hessians and (Path(hessians).is_dir() or not Path(hessians).absolute().parent.is_dir()):
        raise UsageError(f"--hessians {hessians}: not a file in a folder that exists: name another")
    if calib and calib != "self" and not Path(calib).is_file():
        raise UsageError(f"{calib}: there is no such text: give a file, or `self`")
    if tokens < 2048:
        raise UsageError(f"--calib-tokens {tokens} is too few to tell anything: give 2048 or more")


def calibration_report(solved) -> dict | None:
    """What the calibration did: tokens, seconds, output error of every solved tensor by stage, tensors left out ..."""
    return solved and {key: getattr(solved, key) for key in ("tokens", "seconds", "errors", "left", "pooled", "tuned")}


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


def options(**given) -> dict:
    """What of the command line decides the output's bytes, defaults left out; files by name, not by path."""
    files = {key: Path(given[key]).name for key in ("plan", "imatrix", "calib") if given[key]}
    return {key: value for key, value in (given | files).items() if value}


def settings(
    source: checkpoint.Source,
    entries: Sequence[plan.Entry],
    calib: str | Path,
    calib_tokens: int,
    hessians: str | Path | None,
    tune: bool,
) -> dict:
    """All that decides what a calibration stores, by name: a run goes on only with what the same settings left."""
    stored = {e.name: str(e.target) if isinstance(e.target, columns.ColumnType) else e.target_name for e in entries}
    return {
        "model": checkpoint.fingerprint(source.files),
        "types": hashlib.sha256(json.dumps(stored).encode()).hexdigest()[:16],
        "calib": "self" if calib == "self" else hashlib.sha256(Path(calib).read_bytes()).hexdigest()[:16],
        "calib_tokens": calib_tokens,
        "hessians": hessians is not None,
        "tune": tune,
        "version": __version__,
    }


def metadata(kv: Mapping[str, Value], target: TensorType, options: dict, label: str | None = None) -> dict[str, Value]:
    """The input's metadata with what describes this file put in."""
    return {key: value for key, value in kv.items() if key != "general.alignment"} | {
        "general.file_type": Value.of(target.file_type),
        "general.quantization_version": Value.of(QUANTIZATION_VERSION),
        "gguf_splitq.version": Value.of(__version__),
        "gguf_splitq.type": Value.of(label or target.name),
        "gguf_splitq.llama_cpp": Value.of(patching.pin()["commit"]),
        "gguf_splitq.options": Value.of(json.dumps(options, sort_keys=True)),
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


def write_report(path: str | Path | None, result: dict) -> None:
    if path is not None:
        try:
            Path(path).write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise gguf_file.disk_error(error, Path(path), 0) from error
