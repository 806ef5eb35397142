"""`make bench`: speed of conversion and of running beside llama.cpp's own types, on a random 0.6 B model.

Conversion: `gguf-splitq convert --type sq4` and `llama-quantize Q4_K_S` take turns on one F16 GGUF that is in the page
cache, with the same threads; the median counts. Running: all files in one llama-bench run; embeddings and output are
Q8_0 everywhere, so only the linear layers differ.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gguf_splitq import runtime
from gguf_splitq.inspection import linear_bpw

from . import models
from .common import BUILD, convert, judge, parser, quantize, run, save, show, speed

OURS = ["sq4", "sq3", "sq2", "sq4x"]
PEERS = ["IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q3_K_S", "Q2_K"]
PURE = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]


def seconds(command: list, outfile: Path) -> float:
    """Wall-clock time of one conversion, from a written-back disk and without an output in the way."""
    outfile.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return time.perf_counter() - start


def conversion(f16: Path, threads: int, repetitions: int = 3) -> dict[str, float]:
    """Median seconds of our converter and of llama-quantize."""
    outfile = BUILD / "bench" / "timed.gguf"
    commands = {
        "gguf-splitq convert --type sq4": [
            *(sys.executable, "-m", "gguf_splitq", "convert", f16, "--type", "sq4"),
            *("--outfile", outfile, "--threads", threads),
        ],
        "llama-quantize Q4_K_S": [runtime.program("llama-quantize"), f16, outfile, "Q4_K_S", threads],
    }
    f16.read_bytes()
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            times[name].append(seconds(command, outfile))
    outfile.unlink()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=128, help="tokens of the prompt test")
    p.add_argument("--generate", type=int, default=64, help="tokens of the decode test")
    p.add_argument("--repetitions", type=int, default=5)
    args = p.parse_args()

    checkpoint = models.random_llama("bench-model", **models.BENCH)
    folder = BUILD / "bench"
    f16 = convert(checkpoint, "f16", folder / "f16.gguf", threads=args.threads)
    times = conversion(f16, args.threads)
    show(
        f"conversion of {f16.stat().st_size / 1e9:.2f} GB, {args.threads} threads",
        [{"command": name, "seconds": value} for name, value in times.items()],
        {"command": "", "seconds": ".2f"},
    )

    files = {type: convert(f16, type, folder / f"{type}.gguf", threads=args.threads) for type in OURS}
    files |= {type: quantize(f16, type, folder / f"{type}.gguf", args.threads, *PURE) for type in PEERS}
    rates = speed(list(files.values()), args.threads, args.generate, args.prompt, args.repetitions)
    by_type = {type: rates[file] for type, file in files.items()}
    rows = [
        {
            "type": type,
            "bpw": linear_bpw(file),
            "decode t/s": by_type[type]["tg"],
            "prompt t/s": by_type[type]["pp"],
            **{f"decode / {peer}": by_type[type]["tg"] / by_type[peer]["tg"] for peer in ("IQ4_XS", "Q4_K_S")},
        }
        for type, file in files.items()
    ]
    formats = {"type": "", "bpw": ".2f", "decode t/s": ".2f", "prompt t/s": ".1f"}
    show("llama-bench", rows, formats | {"decode / IQ4_XS": ".2f", "decode / Q4_K_S": ".2f"})

    ours, theirs = times.values()
    claims = [
        {"claim": "conversion time of sq4 / Q4_K_S", "measured": ours / theirs, "at_most": 1.0},
        {"claim": "decode speed of sq4 / IQ4_XS", "measured": rows[0]["decode / IQ4_XS"], "at_least": 1.0},
    ]
    save("bench", {"seconds": times, "rows": rows, "claims": claims})
    judge(claims)


if __name__ == "__main__":
    run(main)
