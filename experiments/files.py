# SPDX-License-Identifier: MIT
"""`make quality ARGS="--files"`: KL divergence over the bits of whole files, ours beside what llama-quantize ships.

Theirs: `llama-quantize` with an importance matrix of the calibration text, its own choice of types for every tensor,
embedding and output included. Ours: `gguf-splitq convert --calib` of as many tokens of that text, with `--file-bpw` and
the bits of all tensors of theirs. The claim: at each size at most half of their divergence.

  python -m experiments.quality --files --only ours          # kinds: imatrix, ours
  python -m experiments.quality --files --only Q4_K_M,Q2_K/ours
"""

from dataclasses import dataclass
from pathlib import Path

from gguf_splitq.inspection import both_bpw

from .common import convert, quantize, speed
from .quality import Run, hessian_key

SIZES = ["Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M"]
AT_MOST = 0.5  # of their divergence
GENERATED = 64  # tokens, to measure how fast a file decodes
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


def runs() -> list[File]:
    return [File(size, data) for size in SIZES for data in ("imatrix", "ours")]


def make(source: File, f16: Path, matrix: Path, args) -> Path:
    """The file of a row, in the one scratch place."""
    theirs = quantize(f16, source.type, args.folder / "theirs.gguf", args.threads, "--imatrix", matrix)
    if source.data == "imatrix":
        return theirs
    options = {"calib": str(args.calib), "calib_tokens": args.tokens, "threads": args.threads}
    options["hessians"] = args.folder / f"weights-{hessian_key(args)}.gguf"
    return convert(args.model, None, args.folder / "candidate.gguf", file_bpw=both_bpw(theirs)[0], **options)


def more(file: Path, args) -> dict:
    """What is measured of a file besides its divergence. tg: tokens a second."""
    return {"tg": speed([file], args.threads, GENERATED)[file]["tg"]}


def claims_of(rows: list[dict]) -> list[dict]:
    """What has to be shown, as far as it was measured."""
    at = {(row["type"], row["data"]): row for row in rows}
    claims = []
    for number, size in enumerate(SIZES):
        theirs, ours = at.get((size, "imatrix")), at.get((size, "ours"))
        if not (theirs and ours):
            continue
        claim = f"KLD at the size of {size}, {theirs['file_bpw']:.2f} bits per weight"
        claims.append({"claim": claim, "measured": ours["mean_kld"] / theirs["mean_kld"], "at_most": AT_MOST})
        claim = f"bits per weight of the file, ours / {size}"
        claims.append({"claim": claim, "measured": ours["file_bpw"] / theirs["file_bpw"], "at_most": 1.0})
        claim = f"tokens a second, ours / {size}"
        claims.append({"claim": claim, "measured": ours["tg"] / theirs["tg"]})
        for smaller in SIZES[number + 1 :][:1]:
            if next_ours := at.get((smaller, "ours")):
                claim = f"KLD of ours at the next smaller size, {smaller}, / {size}"
                claims.append({"claim": claim, "measured": next_ours["mean_kld"] / theirs["mean_kld"]})
    return claims


def series(rows: list[dict]) -> list[tuple[str, str, str, list[dict]]]:
    """(label, marker, color, rows) for `quality.draw`."""
    styles = {
        "imatrix": ("llama-quantize, importance matrix", "o", "#3b82c4"),
        "ours": ("--file-bpw at the same size", "*", "#33a047"),
    }
    return [(*style, [row for row in rows if row["data"] == data]) for data, style in styles.items()]
