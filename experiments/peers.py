# SPDX-License-Identifier: MIT
"""AutoRound's files of llama.cpp's types beside ours with feedback: KL divergence and time.

Both calibrate on the same tokens, in sequences of the same length. Embedding and output are Q8_0 in all files, and each
linear layer of ours has the type that AutoRound gave it: a q4_k_s has some in Q5_K, as that of llama-quantize has.
AutoRound's file is measured as it was exported: without training ("0", what it advises for GGUF), with it, and with its
extension for GGUF. Ours are with feedback and, on a GPU alone, with `--tune codes`, which draws more text from the
model. Seconds are those of a whole process; the first one of a kind compiles kernels that others find. AutoRound is no
dependency:

  pip install auto-round==0.16.1
  python -m experiments.peers --model ../shared/models/ref-a --device cuda
  python -m experiments.peers --type q2_k_s --only extended,trained     # of the methods, and always AutoRound's "0"
  python -m experiments.peers --iters 1000                               # as many as its recipe "best"

Finished rows are kept in build/peers/MODEL: a run that was stopped goes on, and parts are joined by the whole command.
"""

import argparse
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gguf_splitq import plan
from gguf_splitq.calibration.model import Model
from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.files import gguf_file
from gguf_splitq.measure.validate import Baseline, check_overlap
from gguf_splitq.runtime import patching

from .common import BUILD, chosen, convert, judge, model_and_texts, parser, run, save, show
from .quality import Rows, Run, digest, source_hash

VERSION = "0.16.1"
AUTOROUND = "AutoRound"  # how the names of its methods begin
TYPES = ["q4_k_s", "q3_k_s", "q2_k_s"]
ENDS = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
FORMATS = {"type": "", "method": "", "bpw": ".3f", "seconds": ".0f"}
FORMATS |= {"mean_kld": "z.5f", "ppl_ratio": ".4f", "top1": ".1%"}


def installed() -> str:
    """AutoRound's version; EnvironmentFailed where there is none."""
    try:
        return importlib.metadata.version("auto-round")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFailed(f"AutoRound is not installed: pip install auto-round=={VERSION}") from None


def timed(*command: object) -> float:
    """Seconds that a Python process takes; its messages are shown if it fails."""
    given, start = [sys.executable, *map(str, command)], time.monotonic()
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(given, capture_output=True, text=True, errors="replace", env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(given)}\n{done.stderr[-3000:]}\nfailed with exit code {done.returncode}")
    return time.monotonic() - start


def methods(iters: int, device: str, only: str | None) -> dict[str, list[str]]:
    """Name -> options, AutoRound's first: its file without training, which is always made, says what types ours get."""
    first, trained = f"{AUTOROUND}, 0", f"{AUTOROUND}, {iters}"
    found = {
        first: ["0"],
        trained: [str(iters)],
        f"{trained}, extended": [str(iters), "--extended"],
        "ours, feedback": [],
    }
    if device != "cpu":
        found["ours, codes trained"] = ["--tune", "codes"]
    words = only.split(",") if only else [""]
    return {name: options for name, options in found.items() if name == first or any(word in name for word in words)}


def theirs(type: str, options: list[str], tokens: Path, file: Path, args: argparse.Namespace) -> float:
    """AutoRound's file of a type; returns the seconds."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = timed("-m", "experiments.autoround", args.model, tokens, type, folder, args.device, *options)
        (made,) = Path(folder).rglob("*.gguf")
        made.replace(file)
    return seconds


def ours(type: str, options: list[str], rules: list[str], file: Path, args: argparse.Namespace) -> float:
    """Our file with other types as `rules` say; returns the seconds."""
    types = ["--type", base(type), *(f"--tensor-type={rule}" for rule in rules), *ENDS]
    text = ["--calib", args.calib, "--calib-tokens", args.tokens]
    where = ["--device", args.device, "--threads", args.threads, "--outfile", file, "--overwrite"]
    return timed("-m", "gguf_splitq", "convert", args.model, *types, *text, *where, *options)


def base(type: str) -> str:
    """What most linear layers of such a file have."""
    return type.removesuffix("_s")


def mixed(file: Path, type: str) -> list[str]:
    """`--tensor-type` rules for the linear layers of a file that have not this type."""
    with gguf_file.read(file) as found:
        architecture = found.get("general.architecture", str, "")
        linear = [t for t in found.tensors if plan.is_linear(t, architecture)]
    named = {t.name: gguf_file.type_name(t.type_id) for t in linear}
    return [f"^{re.escape(name)}$={other}" for name, other in named.items() if other != type]


def claims_of(rows: list[dict]) -> list[dict]:
    """Our divergence and time over those of AutoRound's closest file of a type."""
    claims = []
    for type in dict.fromkeys(row["type"] for row in rows):
        both: dict[bool, list[dict]] = {True: [], False: []}
        for row in rows:
            if row["type"] == type:
                both[row["method"].startswith(AUTOROUND)].append(row)
        best = min(both[True], key=lambda row: row["mean_kld"])
        for row in both[False]:
            for key, what in (("mean_kld", "KLD"), ("seconds", "seconds")):
                claim = f"{what} of {type}, {row['method']} / {best['method']}"
                claims.append({"claim": claim, "measured": row[key] / best[key]})
    return claims


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    p.add_argument("--type", action="append", choices=TYPES, help=f"default: {', '.join(TYPES)}")
    p.add_argument("--only", help="methods with one of these words, separated by commas (default: all)")
    p.add_argument("--iters", type=int, default=200, help="AutoRound's for each decoder layer (default: 200)")
    p.add_argument("--tokens", type=int, default=131_072, help="tokens of the calibration text to use")
    p.add_argument("--device", default="cpu", help="cpu or cuda, for both")
    args = p.parse_args()
    version = installed()
    name, args.model = args.model.removesuffix("/").rpartition("/")[2], chosen(args)
    args.folder = BUILD / "peers" / name
    f16 = convert(args.model, "f16", args.folder / "f16.gguf", threads=args.threads)
    tokens = args.folder / "tokens.pt"
    sequences = Model(args.model).read_tokens(args.calib, args.tokens)
    torch.save(sequences, tokens)
    common = {"f16": digest(f16.read_bytes()), "text": digest(args.text.read_bytes()), "chunks": args.chunks}
    common |= {"tokens": digest(tokens.read_bytes()), "device": args.device, "pin": patching.pin()["commit"]}

    def measure(source: Run, make: Callable[..., float], file: Path) -> dict:
        seconds = make(file=file, args=args)
        check_overlap(file, args.text)
        row = against.compare(file) | {"method": source.data, "seconds": seconds}
        row["mixed"] = mixed(file, base(source.type))
        file.unlink()
        return row

    kept, rows = Rows(args.folder / "rows"), []
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as against:
        for type in args.type or TYPES:
            rules: list[str] = []
            for method, options in methods(args.iters, args.device, args.only).items():
                source = Run(type, method)
                if method.startswith(AUTOROUND):
                    made, settings = functools.partial(theirs, type, options, tokens), {"version": version}
                else:
                    made = functools.partial(ours, type, options, rules)
                    settings = {"mixed": rules, "source": source_hash()}
                rows.append(kept.get(source, common | settings, functools.partial(measure, source, made)))
                rules = rows[-1]["mixed"]
    show(f"{name} on {args.chunks} chunks of {args.text.name}, {sequences.numel()} tokens", rows, FORMATS)
    found = {"model": name, "text": args.text.name, "chunks": args.chunks, "tokens": sequences.numel()}
    claims = claims_of(rows)
    save(f"peers.{name}", found | {"autoround": version, "rows": rows, "claims": claims}, args.keep)
    judge(claims)


if __name__ == "__main__":
    run(main)
