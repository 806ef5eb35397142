# SPDX-License-Identifier: MIT
"""`make journeys`: the conversions that README.md shows, run as they stand there, with what they take and give.

The model is the one that README names: from a hub or, without one, the package index (`experiments/public.py`). Beside
them stands a file as it is published, of the size that README gives, with an importance matrix of the demo's text.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.measure.validate import Baseline

from . import public
from .common import BUILD, DEMO, convert, imatrix, parser, quantize, run, save, show

README = Path("README.md")
STOCK = "Q4_K_M"  # what README's --size is the size of
UNIT = 1024 if sys.platform == "linux" else 1  # bytes of what the system counts a process' memory in


def commands() -> list[str]:
    """The lines of README's shell examples in "Three ways"."""
    section = README.read_text().split("## Three ways")[1].split("\n## ")[0]
    return [line for block in re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--text", type=Path, default=DEMO / "eval.txt")
    p.add_argument("--tokens", type=int, help="calibrate on fewer, for a first look (default: as README does)")
    p.add_argument("--chunks", type=int, default=20, help="chunks of 512 tokens to measure on")
    args = p.parse_args()

    model = public.smollm2()
    folder = BUILD / "journeys"
    f16 = convert(model, "f16", folder / "f16.gguf", threads=args.threads)
    matrix = imatrix(f16, DEMO / "calib.txt", folder / "imatrix.gguf", args.threads)
    rows = [{"command": f"`llama-quantize --imatrix MATRIX F16 {STOCK}`"}]
    files = [quantize(f16, STOCK, folder / "stock.gguf", args.threads, "--imatrix", matrix)]
    fewer = ["--calib-tokens", str(args.tokens)] if args.tokens else []
    made = (line for line in commands() if line.startswith("gguf-splitq convert") and "f16" not in line)
    for number, line in enumerate(made):
        words = line.split()
        words += fewer if "--calib" in words else []
        files.append(folder / f"{number}.gguf")
        used = convert_apart([str(model) if word == public.ON_HUB else word for word in words[2:]], files[-1])
        rows.append({"command": f"`{shlex.join(words).replace(public.ON_HUB, 'MODEL')}`", **used})
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:
        for row, file in zip(rows, files, strict=True):
            row |= base.compare(file) | {"MB": file.stat().st_size / 1e6}
    columns = {"command": "", "minutes": ".1f", "peak": ".0f", "MB": ".1f", "file_bpw": ".2f"}
    columns |= {"mean_kld": ".5f", "top1": ".1%"}
    show(f"{public.ON_HUB} on {args.chunks} chunks of {args.text}", rows, columns)
    save("journeys", {"rows": [{key: row.get(key) for key in columns} for row in rows]}, args.keep)


def convert_apart(options: list[str], file: Path) -> dict[str, float]:
    """A conversion in a process of its own: minutes of processor time, and the most memory it took in MB."""
    print(f"converting {' '.join(options)}", flush=True)
    command = [sys.executable, "-m", "gguf_splitq", "convert", *options, "--outfile", str(file), "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise EnvironmentFailed(f"{' '.join(command)}: failed with exit code {os.waitstatus_to_exitcode(status)}")
    return {"minutes": (used.ru_utime + used.ru_stime) / 60, "peak": used.ru_maxrss * UNIT / 1e6}


if __name__ == "__main__":
    run(main)
