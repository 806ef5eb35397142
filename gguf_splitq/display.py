# SPDX-License-Identifier: MIT
"""What a conversion shows: the plan, a progress bar on a terminal or plain lines elsewhere, and the summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from . import plan
from .errors import printable
from .files import gguf_file
from .rewrite import Stats

T = TypeVar("T", bound=Sized)


def console(stderr: bool = False) -> Console:
    """A console that does not cut lines when nobody looks at it."""
    found = Console(stderr=stderr, highlight=False, markup=False)
    return found if found.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=160)


def say(line: str) -> None:
    """A line for the person who waits; results go to standard output, this does not."""
    console(stderr=True).print(printable(line), soft_wrap=True)


def parameters(count: int) -> str:
    """A number of parameters as Ollama writes it: 4.23M, 7.6B."""
    for unit, size, digits in (("B", 10**9, 1), ("M", 10**6, 2), ("K", 10**3, 0)):
        if count >= size:
            return f"{count // size if count % size == 0 else format(count / size, f'.{digits}f')}{unit}"
    return str(count)


def show_plan(path: Path, entries: Sequence[plan.Entry]) -> None:
    """Print the plan, and where the file would go."""
    console().print(f"{printable(str(path))}\n{plan.text(entries)}", end="", soft_wrap=True)


def show_summary(path: Path, entries: Sequence[plan.Entry], stats: Sequence[Stats], result: dict) -> None:
    """The size, one row per type, then what did not go as asked."""
    bits = f"{result['bpw']:.3f} bpw, linear layers {result['linear_bpw']:.3f} bpw"
    out, table = console(), Table()
    out.print(f"{printable(str(path))}: {gguf_file.mib(result['size'])}, {bits}", soft_wrap=True)
    table.add_column("type")
    for column in ("tensors", "weights", "size", "bpw", "SQNR dB", "largest error"):
        table.add_column(column, justify="right")
    for name in dict.fromkeys(e.target_name for e in entries):
        chosen = [(e, s) for e, s in zip(entries, stats, strict=True) if e.target_name == name]
        total = Stats()
        for _, s in chosen:
            total.add(s)
        size = sum(e.n_bytes for e, _ in chosen)
        noise = "exact" if total.sqnr_db is None else f"{total.sqnr_db:.2f}"
        row = [len(chosen), f"{total.weights:,}", gguf_file.mib(size), f"{plan.bpw(e for e, _ in chosen):.3f}", noise]
        table.add_row(name, *map(str, row), f"{total.largest:.3g}")
    out.print(table)
    for note in result["notes"]:
        out.print(printable(note), soft_wrap=True)
    for cause, count in result["fallbacks"].items():
        out.print(f"fallback x{count}: {cause}")
    if result["without_importance"]:
        count = len(result["without_importance"])
        out.print(f"no importance data for {count} quantized tensors, {result['without_importance'][0]} first")
    if result["calibration"]:
        _show_calibration(out, result["calibration"])


def _tuned(done: dict) -> str:
    """What training brought."""
    if done["what"] == "layers":
        if not done["layers"]:
            return "tuning: no layer has a type that can be trained"
        gained = f"{done['gained']} of {done['layers']} layers gained, held-out error {done['error']:.1%} of before"
        return f"tuning: {gained}; {done['changed']:.1%} of the codes changed"
    if done["after"] == done["before"]:
        return f"tuning: held-out KL divergence {done['before']:.5f}; training gained nothing, and its result was left"
    codes = f"; {done['changed']:.1%} of the codes changed" if done["changed"] else ""
    return f"tuning: held-out KL divergence {done['before']:.5f} before, {done['after']:.5f} after{codes}"


def _show_calibration(out: Console, done: dict) -> None:
    """What it cost and brought, what it left, and whether it holds on other tokens."""
    total = {stage: sum(e[stage] for e in done["errors"].values()) for stage in ("nearest", "polish")}
    share = total["polish"] / total["nearest"] if total["nearest"] else 1
    cost = f"{done['tokens']:,} tokens in {done['seconds'] / 60:.1f} minutes, in {done['dtype']}"
    out.print(
        f"error feedback: output error {share:.1%} of nearest rounding's on {len(done['errors'])} tensors, {cost}"
    )
    for reason in dict.fromkeys(done["left_reasons"].values()):
        names = [name for name, why in done["left_reasons"].items() if why == reason]
        out.print(f"rounded to nearest without error feedback x{len(names)}: {reason}, {names[0]} first")
    if pooled := done["pooled"]:
        out.print(f"{len(pooled)} experts saw too few tokens and took the Hessian of all, {pooled[0]} first")
    if tuned := done["tuned"]:
        out.print(_tuned(tuned))
    measure = done.get("measure", "KL divergence")
    what, held = (measure, done["divergence"]) if done.get("divergence") else ("output error", done["held_out"])
    if not held:
        out.print("not tried on other tokens: the text has no more of them, or the Hessians are a file's")
        return
    compared = f"{held['feedback'] / held['nearest']:.1%} of nearest rounding's" if held["nearest"] else "above none"
    if held["feedback"] == 0:
        out.print(f"on other tokens: no {what}")
    elif held["feedback"] < held["nearest"]:
        value = f" {held['feedback']:.5f}," if what == measure else ""
        out.print(f"on other tokens: {what}{value} {compared}")
    else:
        out.print(
            f"WARNING: the calibration did not pay. On tokens that it has not seen, of the same text, the {what} "
            f"is {compared}: give a longer and more varied --calib text and more --calib-tokens, or convert without "
            "--calib",
            style="bold red",
        )


class Progress:
    """A context: `read` while the checkpoint is being read, `start`, then `done` after each tensor."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task: TaskID | None = None
        self.finished, self.total = 0, 0

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def read(self, done: int, total: int) -> None:
        """Bytes of the checkpoint read so far."""
        if self.task is None:
            self.task = self.bar.add_task("reading", total=total)
            self._plain(f"reading {gguf_file.mib(total)} with llama.cpp's converter")
        self.bar.update(self.task, completed=done)

    def step(self, what: str, done: int, total: int) -> None:
        """Steps done of one part of a calibration; a new `what` begins a new bar, an old one goes on with its own."""
        known = {task.description: task.id for task in self.bar.tasks}
        self.task = known[what] if what in known else self.bar.add_task(what, total=total)
        self.bar.update(self.task, completed=done)
        self._plain(f"{what}: {done} of {total}")

    def through(self, what: str, total: int, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces as they are, shown as done when the next one is asked for. total: bytes."""
        self._plain(f"{what}: {gguf_file.mib(total)}")
        task = self.bar.add_task(what, total=total)
        for piece in pieces:
            yield piece
            self.bar.update(task, advance=len(piece))

    def start(self, entries: Sequence[plan.Entry]) -> None:
        """The tensors that will be written, for the bar."""
        self.total = len(entries)
        self.task = self.bar.add_task("encoding", total=sum(e.tensor.n_weights for e in entries))

    def done(self, entry: plan.Entry, stats: Stats) -> None:
        """A tensor is written."""
        assert self.task is not None  # `start` was called
        self.finished += 1
        self.bar.update(self.task, advance=entry.tensor.n_weights)
        noise = "" if stats.sqnr_db is None else f"  {stats.sqnr_db:.2f} dB"
        shape = "x".join(map(str, entry.tensor.shape))
        counter = f"[{self.finished:>{len(str(self.total))}}/{self.total}]"
        self._plain(f"{counter} {entry.name}  {shape}  {entry.source_name} -> {entry.target_name}{noise}")

    def _plain(self, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(line, soft_wrap=True)
