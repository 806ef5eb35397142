# SPDX-License-Identifier: MIT
"""`make quality ARGS="--files"`: KL divergence over the bits of whole files, ours beside what llama-quantize ships.

Theirs: `llama-quantize` with an importance matrix of the calibration text, its own choice of types for every tensor,
embedding and output included. Ours: `gguf-splitq convert --calib` of as many tokens of that text, with `--file-bpw` and
the bits of all tensors of theirs. The claim: at each size at most half of their divergence, or no more of it at the
next smaller size. Files stay beside their rows, so that --speed can let those of a size decode in turns.

  python -m experiments.quality --files --only Q4_K_M            # a process may measure a part, others the rest
  python -m experiments.quality --files --only Q2_K/ours,imatrix
  python -m experiments.quality --files --speed --keep           # joins all rows, and measures what is missing
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from gguf_splitq.inspection import both_bpw

from . import quality
from .common import quantize, speed
from .quality import Run

SIZES = ["Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M"]
AT_MOST = 0.5  # of their divergence
GENERATED = 64  # tokens, to measure how fast a file decodes
ROUNDS = 5
FORMATS = {
    "type": "",
    "data": "",
    "file_bpw": ".2f",
    "bpw": ".2f",
    "mean_kld": "z.5f",
    "p99_kld": ".4f",
    "top1": ".1%",
    "tg": ".1f",
    "minutes": ".1f",
}


@dataclass(frozen=True)
class File(Run):
    """One row: theirs (imatrix) or ours at the size of theirs. type: as llama-quantize names it."""

    @property
    def solved(self) -> bool:
        return self.data == "ours"


def runs(_: Path) -> list[File]:
    """Of any model."""
    return [File(size, data) for size in SIZES for data in ("imatrix", "ours")]


def make(source: Run, f16: Path, matrix: Path, outfile: Path, args) -> None:
    """The file of a row; for one of ours also theirs, beside it."""
    theirs = outfile if source.data == "imatrix" else beside(outfile)
    quantize(f16, source.type, theirs, args.threads, "--imatrix", matrix)
    if source.data == "ours":
        quality.calibrate(None, outfile, args, file_bpw=both_bpw(theirs)[0], threads=args.threads)


def beside(outfile: Path) -> Path:
    """Theirs that a file of ours is as large as."""
    return outfile.with_suffix(".theirs.gguf")


def add_speed(rows: list[dict], places: dict[Run, Path], threads: int) -> None:
    """Give rows tg, tokens a second: medians of rounds in which both files of a size take turns."""
    at = {(row["type"], row["data"]): row for row in rows}
    for source, place in places.items():
        ours = place.with_suffix(".gguf")
        pair = {"imatrix": beside(ours), "ours": ours}
        if source.data != "ours" or not all(file.exists() for file in pair.values()):
            continue
        rounds = [speed(list(pair.values()), threads, GENERATED, repetitions=1) for _ in range(ROUNDS)]
        for data, file in pair.items():
            if row := at.get((source.type, data)):
                row["tg"] = statistics.median(found[file]["tg"] for found in rounds)


def claims_of(rows: list[dict]) -> list[dict]:
    """What has to be shown, as far as it was measured."""
    at = {(row["type"], row["data"]): row for row in rows}
    claims = []
    for size in SIZES:
        theirs, ours = at.get((size, "imatrix")), at.get((size, "ours"))
        if not (theirs and ours):
            continue
        below = next_smaller(size, at)
        kept_below = below is not None and below["mean_kld"] <= theirs["mean_kld"]
        claim = f"KLD at the size of {size}, {theirs['file_bpw']:.2f} bits per weight"
        claims.append({"claim": claim, "measured": ours["mean_kld"] / theirs["mean_kld"]})
        if not kept_below:
            claims[-1]["at_most"] = AT_MOST
        if below:
            claim = f"KLD of ours at the next smaller size, {below['type']}, / {size}"
            claims.append({"claim": claim, "measured": below["mean_kld"] / theirs["mean_kld"]})
            if kept_below:
                claims[-1]["at_most"] = 1.0
        claim = f"bits per weight of the file, ours / {size}"
        claims.append({"claim": claim, "measured": ours["file_bpw"] / theirs["file_bpw"], "at_most": 1.0})
        if "tg" in ours and "tg" in theirs:
            claims.append({"claim": f"tokens a second, ours / {size}", "measured": ours["tg"] / theirs["tg"]})
    return claims


def next_smaller(size: str, at: dict[tuple[str, str], dict]) -> dict | None:
    """Our row at the next smaller size of llama-quantize's files; None where that was not measured."""
    bits = {name: at[name, "imatrix"]["file_bpw"] for name in SIZES if (name, "imatrix") in at}
    smaller = [name for name in bits if bits[name] < bits[size]]
    return at.get((max(smaller, key=bits.__getitem__), "ours")) if smaller else None


def series(rows: list[dict]) -> list[tuple[str, str, str, list[dict]]]:
    """(label, marker, color, rows) for `quality.draw`."""
    styles = {
        "imatrix": ("llama-quantize, importance matrix", "o", "#3b82c4"),
        "ours": ("--file-bpw at the same size", "*", "#33a047"),
    }
    return [(*style, [row for row in rows if row["data"] == data]) for data, style in styles.items()]


def plot(rows: list[dict], title: str, path: Path) -> None:
    """KLD over the bits of whole files."""
    quality.draw(series(rows), "file_bpw", "whole file", title, path)
