"""`make bench`: speed of conversion and of running beside llama.cpp's own types, on random models of 0.6 B and 3 B.

Conversion: `gguf-splitq convert --type sq4` and `llama-quantize Q4_K_S` take turns on one F16 GGUF that is in the page
cache, with the same threads; the median counts. Running: the files take turns in llama-bench, and the median of the
rounds counts; embeddings and output are Q8_0 everywhere, so only the linear layers differ. Beside them stands the rate
at which the same number of threads reads memory and does nothing else (stream_read.c), measured in every round.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gguf_splitq import gguf_file, runtime
from gguf_splitq.inspection import linear_bpw

from . import models
from .common import BUILD, DEMO, convert, imatrix, judge, llama, parser, quantize, run, save, show

OURS = ["sq4", "sq3", "sq2", "sdr4", "sq4x"]
PEERS = ["Q4_K_S", "Q4_0", "IQ4_XS", "Q3_K_S", "IQ3_XXS", "Q2_K_S", "IQ2_XS"]
PURE = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
# claimed ratios of tokens per second
DECODE = [
    ("sq4", "Q4_K_S", 1.4),
    ("sq3", "Q3_K_S", 1.5),
    ("sq3", "IQ3_XXS", 2.5),
    ("sq2", "Q2_K_S", 1.5),
    ("sq2", "IQ2_XS", 2.5),
    ("sdr4", "Q4_0", 1.0),
]
PROMPT = [("sq4", "Q4_K_S", 1.1), ("sq3", "Q4_K_S", 1.1), ("sq2", "Q4_K_S", 1.1), ("sdr4", "Q4_0", 1.0)]
READ_FRACTION = 0.8  # of the memory's read rate that sq4's decode reaches


def seconds(command: list, outfile: Path) -> float:
    """Wall-clock time of one conversion, from a written-back disk and without an output in the way."""
    outfile.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return time.perf_counter() - start


def conversion(f16: Path, threads: int, repetitions: int = 3) -> dict[str, float]:
    """Median seconds of our converter and of llama-quantize."""
    outfile = f16.parent / "timed.gguf"
    commands = {
        "gguf-splitq convert --type sq4": [
            *(sys.executable, "-m", "gguf_splitq", "convert", f16, "--type", "sq4"),
            *("--outfile", outfile, "--threads", threads),
        ],
        "llama-quantize Q4_K_S": [runtime.program("llama-quantize"), f16, outfile, "Q4_K_S", threads],
    }
    subprocess.run(["cat", f16], check=True, stdout=subprocess.DEVNULL)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            times[name].append(seconds(command, outfile))
    outfile.unlink()
    return {name: statistics.median(values) for name, values in times.items()}


def make_files(size: str, threads: int) -> dict[str, Path]:
    """The random model in F16 and every type, in build/bench/SIZE; files of an earlier run are used again."""
    folder = BUILD / "bench" / size
    checkpoint = models.random_llama(f"bench-{size}", **models.SIZES[size])
    files = {type: folder / f"{type}.gguf" for type in ["f16", *OURS, *PEERS]}
    importance = folder / "imatrix.gguf"
    for type, file in files.items():
        if file.exists():
            continue
        if type == "f16" or type in OURS:
            convert(checkpoint if type == "f16" else files["f16"], type, file, threads=threads)
            continue
        if not importance.exists():  # the smallest types are refused without
            imatrix(files["sq4"], DEMO / "calib.txt", importance, threads, chunks=2)
        partial = file.with_suffix(".partial")
        quantize(files["f16"], type, partial, threads, "--imatrix", importance, *PURE).rename(file)
    return files


def read_rates(threads: int) -> dict[str, float]:
    """GB/s at which `threads` threads read memory: in the system's ordinary pages, and in large ones."""
    program = BUILD / "stream_read"
    source = Path(__file__).with_name("stream_read.c")
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")))
    subprocess.run([compiler, "-O3", "-march=native", "-w", source, "-o", program, "-pthread"], check=True)

    def rate(large: int) -> float:
        return float(subprocess.run([program, str(threads), str(large)], check=True, capture_output=True).stdout)

    return {"plain": rate(0), "large pages": rate(1)}


def decoded_bytes(file: Path) -> int:
    """Bytes that one token's decoding reads: everything but the embeddings, of which it takes a row."""
    with gguf_file.read(file) as source:
        return sum(t.n_bytes for t in source.tensors if t.name != "token_embd.weight")


def measure(files: dict[str, Path], threads: int, generate: int, prompt: int, rounds: int) -> tuple[dict, dict]:
    """Medians over the rounds: {type: {"tg", "pp"} tokens per second}, {kind of page: GB/s}."""
    samples: dict[str, dict[str, list[float]]] = {type: {"tg": [], "pp": []} for type in files}
    reads: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, rate in read_rates(threads).items():
            reads.setdefault(kind, []).append(rate)
        for type, file in files.items():
            sizes = ("-p", prompt, "-n", generate, "-r", 1, "-t", threads)
            for result in json.loads(llama("llama-bench", "-m", file, *sizes, "-o", "json")):
                samples[type]["tg" if result["n_gen"] else "pp"] += result["samples_ts"]
    medians = {type: {key: statistics.median(v) for key, v in s.items()} for type, s in samples.items()}
    return medians, {kind: statistics.median(v) for kind, v in reads.items()}


def compare(size: str, threads: int, rates: dict, reads: dict, files: dict[str, Path]) -> tuple[list, list]:
    """The table's rows and the claims of one size and number of threads."""
    where = f"{size}, {threads} thread{'s' * (threads > 1)}"
    rows = []
    for type, rate in rates.items():
        gigabytes = decoded_bytes(files[type]) * rate["tg"] / 1e9
        row = {"size": size, "threads": threads, "type": type, "bpw": linear_bpw(files[type])}
        row |= {"decode t/s": rate["tg"], "prompt t/s": rate["pp"], "decode GB/s": gigabytes}
        row |= {f"/ read, {kind}": gigabytes / read for kind, read in reads.items()}
        row |= {
            "decode / Q4_K_S": rate["tg"] / rates["Q4_K_S"]["tg"],
            "prompt / Q4_K_S": rate["pp"] / rates["Q4_K_S"]["pp"],
        }
        rows.append(row)
    claims = [
        {
            "claim": f"{where}: {name} of {ours} / {peer}",
            "measured": rates[ours][key] / rates[peer][key],
            "at_least": least,
        }
        for name, key, ratios in (("decode", "tg", DECODE), ("prompt", "pp", PROMPT))
        for ours, peer, least in ratios
    ]
    fraction = rows[0]["/ read, plain"]
    claims.append({"claim": f"{where}: decode of sq4 / plain read", "measured": fraction, "at_least": READ_FRACTION})
    claims.append(
        {"claim": f"{where}: decode of sq4 / read in large pages", "measured": rows[0]["/ read, large pages"]}
    )
    return rows, claims


def plot(rows: list[dict], path: Path) -> None:
    """Tokens per second of every type, decoding and prompt, a panel for each size and number of threads."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed: pip install 'gguf-splitq[plot]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(row["size"], row["threads"]) for row in rows})
    figure, axes = pyplot.subplots(len(panels), 2, figsize=(11, 3 * len(panels)), squeeze=False)
    for line, (size, threads) in zip(axes, panels, strict=True):
        chosen = [row for row in rows if (row["size"], row["threads"]) == (size, threads)]
        colors = ["tab:red" if row["type"] in OURS else "tab:gray" for row in chosen]
        for axis, key in zip(line, ("decode t/s", "prompt t/s"), strict=True):
            axis.bar([row["type"] for row in chosen], [row[key] for row in chosen], color=colors)
            axis.set_title(f"{size}, {threads} threads: {key}", fontsize=9)
            axis.tick_params(axis="x", rotation=60, labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path}")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", action="append", choices=models.SIZES, help="may be repeated; default: all")
    p.add_argument("--prompt", type=int, default=512, help="tokens of the prompt test")
    p.add_argument("--generate", type=int, default=32, help="tokens of the decode test")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--no-conversion", action="store_true", help="time running only")
    args = p.parse_args()

    rows, claims, times = [], [], {}
    for size in args.size or models.SIZES:
        files = make_files(size, args.threads)
        f16 = files.pop("f16")
        if not args.no_conversion and not times:  # on the first size
            times = conversion(f16, args.threads)
            title = f"conversion of {f16.stat().st_size / 1e9:.2f} GB, {args.threads} threads"
            show(title, [{"command": c, "seconds": s} for c, s in times.items()], {"command": "", "seconds": ".2f"})
            ours, theirs = times.values()
            claims.append({"claim": "conversion time of sq4 / Q4_K_S", "measured": ours / theirs, "at_most": 1.0})
        for threads in sorted({1, args.threads}):
            rates, reads = measure(files, threads, args.generate, args.prompt, args.rounds)
            found, judged = compare(size, threads, rates, reads, files)
            rows += found
            claims += judged
            formats = {key: "" if key == "type" else ".2f" for key in found[0] if key not in ("size", "threads")}
            show(f"{size}, {threads} threads; plain read {reads['plain']:.1f} GB/s", found, formats)
    save("bench", {"seconds": times, "rows": rows, "claims": claims})
    plot(rows, BUILD / "bench.png")
    judge(claims)


if __name__ == "__main__":
    run(main)
