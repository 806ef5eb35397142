# SPDX-License-Identifier: MIT
"""How far a quantized file is from its F16 baseline: perplexity and KL divergence by the patched llama-perplexity.

The baseline's log-probabilities go to a temporary file (two bytes per vocabulary entry for every second token of the
text) which each comparison reads back; the file lives as long as the `Baseline` object that made it.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.table import Table

from .. import card, display, output
from ..calibration import text as texts
from ..errors import EnvironmentFailed, InputError, UsageError, ValidationFailed
from ..files import gguf_file
from ..files.gguf_file import mib
from ..inspection import both_bpw
from ..options import Validate
from ..runtime import building
from . import overlap

MIN_CTX = 256  # below this a one-chunk text gives fewer than the 100 values llama-perplexity wants for statistics
BYTES_PER_TOKEN = 4  # of English text; only for saying beforehand how large the log-probabilities will be

NUMBER = r" *[:=] *(-?(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf))"
FIELDS = {  # key -> what llama-perplexity prints before the number (tools/perplexity/perplexity.cpp at the pin)
    "ppl": r"Mean PPL\(Q\)" + NUMBER,
    "mean_kld": r"Mean\s+KLD" + NUMBER,
    "p99_kld": r"99\.0%\s+KLD" + NUMBER,
    "top1": r"Same top p" + NUMBER,
}


def parse_base(output: str) -> float:
    """Perplexity from the output of a run with --kl-divergence-base alone; EnvironmentFailed if it is not there."""
    return _find(r"Final estimate: PPL" + NUMBER, output)


def parse_comparison(output: str) -> dict:
    """ppl, mean_kld, p99_kld (nats) and top1 (0..1) from a --kl-divergence run; EnvironmentFailed if one is missing."""
    found = {key: _find(pattern, output) for key, pattern in FIELDS.items()}
    return found | {"top1": found["top1"] / 100}


class Baseline:
    """The F16 model's log-probabilities on a text, measured on entry and thrown away on exit.

    with Baseline(f16, text) as base:
        base.compare(quantized)["mean_kld"]

    Raises InputError (a file that does not load, a text shorter than two chunks), UsageError (a bad number),
    EnvironmentFailed (no runtime, too little disk, a program that dies).
    """

    def __init__(
        self,
        file: str | Path,
        text: str | Path,
        ctx: int = 512,
        chunks: int | None = None,
        threads: int | None = None,
    ):
        self.file, self.text, self.ctx, self.chunks, self.threads = Path(file), Path(text), ctx, chunks, threads
        if ctx < MIN_CTX:
            raise UsageError(f"--ctx {ctx}: too short to measure on: give {MIN_CTX} or more")
        for name, value in (("chunks", chunks), ("threads", threads)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: nothing would run: give 1 or more")
        with gguf_file.read(self.file) as header:
            self.vocabulary = _vocabulary(header)
        gguf_file.require_file(self.text)
        self.decoded = texts.read(self.text)

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="gguf-splitq-")
        try:
            self._measure()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _measure(self) -> None:
        self._logits = Path(self._folder.name) / "base.logits"
        self._check_space()
        options = ["-f", self._plain()] + ([] if self.chunks is None else ["--chunks", self.chunks])
        self.ppl = parse_base(self._run(self.file, *options))
        with self._logits.open("rb") as f:
            _, ctx, vocab, self.chunks = struct.unpack("<8sIii", f.read(20).ljust(20, b"\0"))
        # One row per scored position: 16-bit codes padded to an even count, then two floats that scale them.
        row_bytes = 2 * (2 * ((vocab + 1) // 2) + 4)
        expected = 20 + self.chunks * (4 * ctx + (ctx - 1 - ctx // 2) * row_bytes)
        if self._logits.stat().st_size != expected:  # the program does not notice a failed write
            raise EnvironmentFailed(
                f"{self._folder.name}: the disk filled up while {mib(expected)} of log-probabilities were written: "
                "give fewer --chunks or set TMPDIR to a larger disk"
            )

    def _plain(self) -> Path:
        """The text as llama-perplexity reads it: the file itself, or what a mark or JSON lines make of it."""
        with open(self.text, encoding="utf-8", errors="replace") as file:  # all kinds of line ends are read alike
            if self.decoded == {1: file.read()}:
                return self.text
        path = Path(self._folder.name) / "text.txt"
        path.write_text("\n".join(map(texts.plain, self.decoded.values())), encoding="utf-8")
        return path

    def _check_space(self) -> None:
        chunks = min(self.chunks or math.inf, max(self.text.stat().st_size // (BYTES_PER_TOKEN * self.ctx), 1))
        needed = chunks * self.ctx * self.vocabulary
        free = shutil.disk_usage(self._folder.name).free
        if needed > free:
            raise EnvironmentFailed(
                f"{self._folder.name}: about {mib(needed)} of log-probabilities are to come and {mib(free)} are free: "
                "give fewer --chunks or set TMPDIR to a larger disk"
            )
        display.say(f"measuring {self.file}: about {mib(needed)} go to {self._folder.name}, {mib(free)} are free")

    def compare(
        self, file: str | Path, program: Path | None = None, options: Sequence = (), environment: dict | None = None
    ) -> dict:
        """Measures `file` against the baseline, by another llama-perplexity than the patched one when given.

        options: more of its command-line options. environment: variables added to this process's.

        Returns ppl, ppl_base, ppl_ratio, mean_kld and p99_kld (nats), top1 (0..1), chunks, ctx, file_bpw (stored bits
        per weight), bpw (of the linear layers), size (bytes). A result that is not a number raises ValidationFailed.
        """
        with gguf_file.read(file) as header:
            vocabulary, size = _vocabulary(header), header.size
        if vocabulary != self.vocabulary:
            raise InputError(
                f"{file}: its vocabulary has {vocabulary} tokens and the baseline's {self.vocabulary}: "
                "give files of one model"
            )
        found = parse_comparison(self._run(file, "--kl-divergence", *options, program=program, environment=environment))
        if not all(map(math.isfinite, found.values())):
            raise ValidationFailed(f"{file}: computes NaN or Inf on {self.text}: check its checkpoint, convert again")
        # The base perplexity that this run prints comes from log-probabilities clamped at 16 nats; self.ppl is exact.
        return found | {
            "ppl_base": self.ppl,
            "ppl_ratio": found["ppl"] / self.ppl,
            "chunks": self.chunks,
            "ctx": self.ctx,
            **dict(zip(("file_bpw", "bpw"), both_bpw(file), strict=True)),
            "size": size,
        }

    def _run(
        self, file: str | Path, *options: object, program: Path | None = None, environment: dict | None = None
    ) -> str:
        """Runs llama-perplexity on `file`; returns all it printed."""
        command = ["-m", file, "-c", self.ctx, "--kl-divergence-base", self._logits, *options]
        command += [] if self.threads is None else ["-t", self.threads]
        program = program or building.program("llama-perplexity")
        env = os.environ | (environment or {})
        done = subprocess.run([program, *map(str, command)], capture_output=True, text=True, errors="replace", env=env)
        return check(done.returncode, f"{done.stdout}\n{done.stderr}", file, self.text)


def check(returncode: int, output: str, file: str | Path, text: str | Path) -> str:
    """Returns `output` of a llama-perplexity run on `file` and `text`, or raises what went wrong in it."""
    if short := re.search(r"tokenizes to only (\d+) tokens", output):
        raise InputError(f"{text}: only {short[1]} tokens, not two contexts: give more text or a smaller --ctx")
    if "unable to load model" in output:
        raise InputError(f"{file}: llama.cpp does not load it ({_tail(output)}): convert it again")
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = {
            "SIGILL": "rebuild for this machine with `gguf-splitq runtime build`",
            "SIGKILL": "it probably ran out of memory, use a smaller model or machine with more",
        }.get(name, f"its last words were {_tail(output)!r}")
        raise EnvironmentFailed(f"{file}: llama-perplexity was killed by {name}: {hint}")
    if returncode:
        raise EnvironmentFailed(f"{file}: llama-perplexity failed with exit code {returncode}: {_tail(output)}")
    return output


def validate(file: str | Path, baseline: str | Path, text: str | Path, **more: Any) -> dict:
    """Measures `file` against `baseline` on `text`, prints a table, and returns the dict of `Baseline.compare`.

    more: see `options.Validate`. UsageError refuses text that `file` was calibrated on, unless forced. Raises
    ValidationFailed when the mean KL divergence is above max_kld or the perplexity ratio above max_ppl_ratio, after
    table and report are written; otherwise as Baseline.
    """
    given = Validate(file, baseline, text, **more)
    given.check()
    with given.writing():
        prepared = Baseline(baseline, text, given.ctx, given.chunks, given.threads)
        if not given.force:
            check_overlap(file, text)
        with prepared as base:
            result = {"file": str(file), "baseline": str(baseline), "text": str(text)} | base.compare(file)
        print_table([result])
        if given.report is not None:
            output.write_json(given.report, result)
        if given.card is not None:
            card.add(Path(given.card), result)
    limits = {"mean_kld": ("mean KL divergence", given.max_kld), "ppl_ratio": ("perplexity ratio", given.max_ppl_ratio)}
    for key, (what, limit) in limits.items():
        if limit is not None and result[key] > limit:
            raise ValidationFailed(f"{file}: its {what} of {result[key]:.5f} is above {limit}: choose a larger type")
    return result


def check_overlap(file: str | Path, text: str | Path) -> None:
    """UsageError when `file` was made with a calibration text, or an importance matrix of one, that `text` overlaps.

    What it was made with is in its metadata: the text's fingerprint, or the path of the matrix's text, which is read
    if it is in the current folder or beside `text`.
    """
    with gguf_file.read(file) as header:
        known = header.get("gguf_splitq.calib_lines", list[int], [])
        dataset = header.get("quantize.imatrix.dataset", str, "")
    words = overlap.words(Path(text))
    count = overlap.shared(known, words)
    if not count:
        count = overlap.shared(overlap.fingerprint(overlap.named(dataset, text)), words)
    if count:
        raise UsageError(
            f"{text}: {count} of its lines are in the text that {file} was calibrated on, so that the result would "
            "flatter: give another text, or --force"
        )


def print_table(results: list[dict]) -> None:
    """One row per result of `validate` on standard output."""
    table = Table("file", "bpw", "linear layers", "size", "perplexity", "ratio", "mean KLD", "99 % KLD", "top-1")
    for r in results:
        table.add_row(
            Path(r["file"]).name,
            f"{r['file_bpw']:.2f}",
            f"{r['bpw']:.2f}",
            mib(r["size"]),
            f"{r['ppl']:.3f}",
            f"{r['ppl_ratio']:.4f}",
            f"{r['mean_kld']:z.5f}",
            f"{r['p99_kld']:.4f}",
            f"{r['top1']:.1%}",
        )
    display.console().print(table)


def _vocabulary(header: gguf_file.Gguf) -> int:
    return len(header.get("tokenizer.ggml.tokens", list[str], []))


def _find(pattern: str, output: str) -> float:
    if match := re.search(pattern, output):
        return float(match[1])
    raise EnvironmentFailed(
        f"llama-perplexity printed no result ({_tail(output)}): rebuild it with `gguf-splitq runtime build` if it is "
        "another version"
    )


def _tail(output: str, lines: int = 3) -> str:
    return " | ".join([line.strip() for line in output.splitlines() if line.strip()][-lines:]) or "nothing"
