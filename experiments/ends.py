# SPDX-License-Identifier: MIT
"""`make quality ARGS="--ends"`: what other types of embedding and output do to size and divergence of `--type` files.

Linear layers of one type, with feedback, and each candidate for the ends: one type for both, or EMBEDDING+OUTPUT in a
model that has two matrices. What is chosen by default is in `plan.make`.
"""

from dataclasses import dataclass
from pathlib import Path

from gguf_splitq.calibration.ends import tied
from gguf_splitq.files import gguf_file

from . import quality
from .quality import Run

OURS = ["sq4w", "sq3w", "sq2w"]
STOCK = ["q4_k", "q3_k", "q2_k"]
BOTH = {"ours": ["q8_0", "q6_k", "q5_1", "sq4w"], "stock": ["q8_0", "q6_k"]}
APART = {"ours": ["sq4w+q8_0", "sq4w+q6_k"], "stock": ["same+q6_k"]}  # same: as the layers, which llama-quantize does
FORMATS = {"type": "", "data": "", "file_bpw": ".3f", "bpw": ".2f", "mean_kld": "z.5f", "minutes": ".1f"}


@dataclass(frozen=True)
class Ends(Run):
    """One row. type: of the linear layers. data: of the ends."""

    @property
    def solved(self) -> bool:
        return True


def runs(f16: Path) -> list[Ends]:
    """Of this model."""
    with gguf_file.read(f16) as file:
        apart = not tied(file)
    found = []
    for whose, types in (("ours", OURS), ("stock", STOCK)):
        kinds = BOTH[whose] + APART[whose] * apart
        found += [Ends(type, kind) for type in types for kind in kinds]
    return found


def make(source: Run, f16: Path, matrix: Path | None, outfile: Path, args) -> None:
    """The file of a row."""
    embedding, _, output = source.data.replace("same", source.type).partition("+")
    ends = {"token_embedding_type": embedding, "output_tensor_type": output or embedding}
    quality.calibrate(source.type, outfile, args, threads=args.threads, **ends)


def claims_of(rows: list[dict]) -> list[dict]:
    """What was measured, beside Q8_0."""
    at = {(row["type"], row["data"]): row for row in rows}
    claims = []
    for (type, data), row in at.items():
        if data != "q8_0" and (base := at.get((type, "q8_0"))):
            for key, what in (("mean_kld", "KLD"), ("file_bpw", "bits per weight of the file")):
                claim = f"{what} of {type}, ends {data} / q8_0"
                claims.append({"claim": claim, "measured": row[key] / base[key]})
    return claims


def plot(rows: list[dict], title: str, path: Path) -> None:
    """KLD over the bits of whole files, a color for each type of the ends."""
    colors = {"q8_0": "#8a8a8a", "q6_k": "#3b82c4", "q5_1": "#12a5b8", "sq4w": "#33a047"}
    colors |= {"sq4w+q8_0": "#e07b00", "sq4w+q6_k": "#d9343f", "same+q6_k": "#a06bd0"}
    parts = [(data, "o", color, [row for row in rows if row["data"] == data]) for data, color in colors.items()]
    quality.draw(parts, "file_bpw", "whole file", title, path)
