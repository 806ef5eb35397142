# SPDX-License-Identifier: MIT
"""What the measuring scripts share: llama.cpp's programs, options, tables."""

import argparse
import contextlib
import datetime
import io
import json
import platform
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rich.table import Table

from gguf_splitq import convert as converter
from gguf_splitq import display, resources
from gguf_splitq.errors import SplitqError
from gguf_splitq.runtime import building

BUILD = Path("build")
DEMO = Path("examples/demo")
RESULTS = Path("docs/results")  # what the tables of the docs are made of
REF_A = Path("../shared/models/ref-a")
TEXTS = Path("../shared/text")
HEADINGS = {"ppl": "perplexity", "ppl_ratio": "/ F16", "mean_kld": "mean KLD", "p99_kld": "99 % KLD", "top1": "top-1"}


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every script has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--keep", action="store_true", help=f"also write to {RESULTS}/, for `make tables`")
    p.add_argument("--threads", type=int, default=resources.cores())
    return p


def run(main) -> None:
    """Calls `main`; an expected failure ends in its one sentence and exit code."""
    try:
        main()
    except SplitqError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def model_and_texts(p: argparse.ArgumentParser, model: str | None = None) -> None:
    """Adds --model, --text, --calib and --chunks; `chosen` tells the model.

    model: the default; without one ref-a where it is, else the demo. Texts that are longer and of more kinds than the
    demo's are taken where they are.
    """
    texts = TEXTS if TEXTS.is_dir() else DEMO
    model = model or str(REF_A if REF_A.is_dir() else DEMO)
    p.add_argument("--model", default=model, help=f"a path, a Hub id, or smollm2, a public model (default: {model})")
    p.add_argument("--text", type=Path, default=texts / "eval.txt")
    p.add_argument("--calib", type=Path, default=texts / "calib.txt")
    p.add_argument("--chunks", type=int, default=60, help="chunks of 512 tokens to measure on")


def chosen(args: argparse.Namespace) -> Path:
    """The model of --model, fetched first if it is a public one."""
    from . import public

    return public.model(args.model)


def llama(program: str, *args) -> str:
    """Runs one of the built programs quietly and returns its standard output; its messages are shown if it fails."""
    command = [str(building.program(program)), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}\nfailed with exit code {done.returncode}")
    return done.stdout


def convert(model, type: str | None, outfile: Path, **options) -> Path:
    """`gguf_splitq.convert.convert` into build/, over what an earlier run left there."""
    print(
        f"converting {model} to {type or format(options.get('bpw') or options['file_bpw'], 'g') + ' bpw'}", flush=True
    )
    outfile.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return converter.convert(model, type, outfile=outfile, overwrite=True, **options)


def quantize(f16: Path, type: str, outfile: Path, threads: int, *options) -> Path:
    """The peer of `convert`: llama-quantize."""
    llama("llama-quantize", *options, f16, outfile, type, threads)
    return outfile


def imatrix(f16: Path, text: Path, outfile: Path, threads: int, chunks: int = 100) -> Path:
    """An importance matrix from `chunks` chunks of 512 tokens."""
    llama("llama-imatrix", "-m", f16, "-f", text, "-o", outfile, "-c", 512, "--chunks", chunks, "-t", threads)
    return outfile


def speed(files: list[Path], threads: int, generate: int, prompt: int = 0, repetitions: int = 3) -> dict[Path, dict]:
    """Median tokens per second of each file in one llama-bench run: {file: {"tg": decode, "pp": prompt}}."""
    models = [arg for file in files for arg in ("-m", file)]
    runs = json.loads(
        llama("llama-bench", *models, "-p", prompt, "-n", generate, "-r", repetitions, "-t", threads, "-o", "json")
    )
    found: dict[Path, dict] = {file: {} for file in files}
    for run in runs:
        found[Path(run["model_filename"])]["tg" if run["n_gen"] else "pp"] = statistics.median(run["samples_ts"])
    return found


def show(title: str, rows: list[dict], formats: dict[str, str]) -> None:
    """Prints `rows`; `formats` maps each column's key to its format, a missing or None value prints as a dash."""
    table = Table()
    for key, spec in formats.items():
        table.add_column(HEADINGS.get(key, key), justify="right" if spec else "left")
    for row in rows:
        cells = [(row.get(key), spec) for key, spec in formats.items()]
        table.add_row(*("-" if value is None else format(value, spec) for value, spec in cells))
    print(f"\n{title}")
    display.console().print(table)


def save(name: str, content: dict, keep: bool = False) -> None:
    """Writes build/NAME.json, and docs/results/NAME.json if it is to be kept, which says where it comes from."""
    BUILD.mkdir(exist_ok=True)
    for folder in [BUILD, RESULTS] if keep else [BUILD]:
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"measured": provenance()} | content, indent=1) + "\n")
        print(f"written: {path}")


def provenance() -> dict[str, str]:
    """What a result belongs to: commit (a + behind it: with changes), machine, date and command."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "gguf_splitq", "experiments", "patches")
    module = getattr(sys.modules["__main__"].__spec__, "name", "")
    options = [option for option in sys.argv[1:] if option != "--keep"]
    return {
        "commit": git("rev-parse", "--short=9", "HEAD") + ("+" if changed else ""),
        "machine": f"{processor()}, {resources.cores()} cores",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *options]),
    }


def processor() -> str:
    """The processor's name as the system has it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def judge(claims: list[dict]) -> None:
    """Prints each claim {"claim", "measured", "at_most" or "at_least" or neither} and exits with 1 if one is missed."""
    missed = False
    for c in claims:
        low, high = c.get("at_least", 0), c.get("at_most", float("inf"))
        kept = low <= c["measured"] <= high
        missed |= not kept
        words = {"at_least": f"at least {low}", "at_most": f"at most {high}"}
        limit = ", ".join(word for key, word in words.items() if key in c)
        verdict = ("kept" if kept else "MISSED") if limit else "reported"
        print(f"{c['claim']}: {c['measured']:.3f}  {limit}  {verdict}")
    if missed:
        raise SystemExit(1)
