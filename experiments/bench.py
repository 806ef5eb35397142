# SPDX-License-Identifier: MIT
"""`make bench`: speed of conversion and of running beside llama.cpp's own types, on random models.

Running: the files take turns in llama-bench, and the median of the rounds counts; embeddings and output are Q8_0
everywhere, so only the linear layers differ. Beside them stand the rates at which the same number of threads reads
memory (stream_read.c) and multiplies (multiply.c) and does nothing else, measured in every round: the roofline.
Conversion: whole processes, in turns, from files in the page cache, beside `cp` of what they read, both until the disk
has it. Every part's results are kept in build/bench.json, so that `--only PART` goes on where a run stopped.
"""

import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gguf_splitq.convert import PROMISED_RAM
from gguf_splitq.files import gguf_file
from gguf_splitq.inspection import linear_bpw
from gguf_splitq.runtime import building

from . import models
from .common import BUILD, DEMO, convert, imatrix, judge, llama, parser, quantize, run, save, show

PURE = ["--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
# Claimed ratios of tokens per second: ours, theirs, the least ratio; *_SMALL for the 0.6 B model only.
DECODE = [
    ("sq4", "Q4_K_S", 1.4),
    ("sq3", "Q3_K_S", 1.5),
    ("sq3", "IQ3_XXS", 2.5),
    ("sq2", "Q2_K_S", 1.5),
    ("sq2", "IQ2_XS", 2.5),
]
DECODE_SMALL = [
    ("sdr4", "Q4_0", 1.0),
    ("cq3", "IQ3_XXS", 2.0),
    ("cq2", "IQ2_XS", 2.0),
    ("cq3", "sq3", 0.8),
    ("cq2", "sq2", 0.8),
    ("sq3.5", "sq3", 0.8),
    ("sq2.5", "sq2", 0.8),
    ("sq4w", "sq4", 0.95),
    ("sq3w", "sq3", 0.95),
    ("sq2w", "sq2", 0.95),
]
LEAST = {"4": 1.5, "3": 1.3, "2": 1.3}  # by bits: of either stock type of 4 bits, the ones whose prompts are fastest
PROMPT, PROMPT_WINDOWS = (
    [(f"sq{bits}{kind}", theirs, least) for bits, least in LEAST.items() for theirs in ("Q4_K_S", "Q4_0")]
    for kind in ("", "w")
)
PROMPT_SMALL = [
    ("sdr4", "Q4_0", 1.0),
    ("cq3", "IQ3_XXS", 1.0),
    ("cq2", "IQ3_XXS", 1.0),
    ("sq2.5", "IQ3_XXS", 1.0),
    *PROMPT_WINDOWS,
]
PROMPTS = [512, 2048]  # tokens; all but the first with the 0.6 B model and these types only, as they take long
READ_FRACTION = 0.8  # of the memory's plain read rate, reached by sq4's decode
CONVERSION = 0.3  # of the time that llama-quantize Q4_K_S takes
COPY = 2.0  # times what `cp` of the input takes
COPIED = ("sq4", "q8_0", "f16")  # of a checkpoint: types for which that is claimed
ONE_BILLION = 60.0  # seconds for a checkpoint of 1 B parameters; SplitQuantV2 reports 126 on an Apple M4
WINDOWS = ("sq4w", "sq3w", "sq2w")
STOCK_TILES = ("Q4_0", "Q4_K_S")  # with AMX; ours all have tiles of bfloat16
LINEAR = 1.15  # seconds per weight, of 3 B to those of 0.6 B
PARTS = ["conversion", "0.6B", "3B", "cache"]
RESULTS = BUILD / "bench.json"


def make_files(size: str, threads: int, wanted: list[str]) -> dict[str, Path]:
    """The random model in F16 and each type, in build/bench/SIZE; files of an earlier run are used again.

    One layer is made, converted and repeated: quantizing to the small stock types would take most of an hour.
    """
    folder, shape = BUILD / "bench" / size, models.SIZES[size]
    one = {type: folder / "one-layer" / f"{type}.gguf" for type in ["f16", "sq4", *wanted]}
    importance = folder / "one-layer" / "imatrix.gguf"
    checkpoint = models.random_llama(f"bench/{size}/one-layer/checkpoint", **shape | {"layers": 1})
    for type, file in one.items():
        if file.exists():
            continue
        if type == "f16" or type.islower():
            convert(checkpoint if type == "f16" else one["f16"], type, file, threads=threads)
            continue
        if not importance.exists():  # the smallest types are refused without
            imatrix(one["sq4"], DEMO / "calib.txt", importance, threads, chunks=2)
        partial = file.with_suffix(".partial")
        quantize(one["f16"], type, partial, threads, "--imatrix", importance, *PURE).rename(file)
    files = {type: folder / f"{type}.gguf" for type in wanted}
    for type, file in files.items():
        if not file.exists():
            models.repeat_layer(one[type], file, shape["layers"])
    return files


def read_rates(threads: int) -> dict[str, float]:
    """GB/s at which `threads` threads read memory: in the system's ordinary pages, and in large ones."""
    return {"plain": float(native("stream_read", threads, 0)), "large pages": float(native("stream_read", threads, 1))}


def multiply_rates(threads: int) -> dict[str, float]:
    """Instruction -> billions of multiply-adds a second of `threads` threads; best for all types first, then tiles."""
    lines = native("multiply", threads).splitlines()
    return {name: float(rate) for name, rate in (line.split("\t") for line in lines)}


def native(name: str, *args) -> str:
    """What a C program of this folder prints, compiled for this processor."""
    program, source = BUILD / name, Path(__file__).with_name(f"{name}.c")
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")))
    subprocess.run([compiler, "-O3", "-march=native", "-w", source, "-o", program, "-pthread"], check=True)
    return subprocess.run([program, *map(str, args)], check=True, capture_output=True, text=True).stdout


def decoded_bytes(file: Path) -> int:
    """Bytes that one token's decoding reads: everything but the embeddings, of which it takes a row."""
    with gguf_file.read(file) as source:
        return sum(t.n_bytes for t in source.tensors if t.name != "token_embd.weight")


def multiplied(file: Path) -> int:
    """Multiply-adds of a prompt's token: the weights of the layers, for the output matrix meets only the last token."""
    with gguf_file.read(file) as source:
        layers = [t for t in source.tensors if t.name.startswith("blk.") and t.name.endswith(".weight")]
        return sum(t.n_weights for t in layers if len(t.shape) > 1)


def instruction(type: str, peaks: dict[str, float]) -> str | None:
    """The one of `peaks` that a prompt of this type is multiplied with; None where none is known."""
    wanted = "tdpbf16ps" if type.islower() else "tdpbssd" if type in STOCK_TILES else None
    return wanted if wanted in peaks else next(iter(peaks), None)


def claimed(size: str, prompts: list[int]) -> tuple[list[tuple], dict[int, list[tuple]]]:
    """The ratios claimed for a model, of decoding and of prompts of so many tokens."""
    if size != "0.6B":
        return DECODE, {prompts[0]: PROMPT}
    longer = dict.fromkeys(prompts, PROMPT + PROMPT_WINDOWS)
    return DECODE + DECODE_SMALL, longer | {prompts[0]: PROMPT + PROMPT_SMALL}


def llama_bench(file: Path, *options) -> dict[tuple[int, int], float]:
    """One run: (threads, tokens of the prompt, 0 for decoding) -> tokens per second."""
    results = json.loads(llama("llama-bench", "-m", file, *options, "-r", 1, "-o", "json"))
    return {(r["n_threads"], r["n_prompt"]): r["samples_ts"][0] for r in results}


def medians(samples: list[dict]) -> dict:
    """Key -> median over dictionaries with the same keys."""
    return {key: statistics.median(s[key] for s in samples) for key in samples[0]}


def counts(threads: int) -> list[int]:
    return sorted({1, threads})


def running(size: str, args) -> dict:
    """Decoding and prompts of one model."""
    decode, prompts = claimed(size, args.prompt or PROMPTS)
    wanted = list(dict.fromkeys(type for claim in sum(prompts.values(), decode) for type in claim[:2]))
    prompted = {n: {type for claim in ratios for type in claim[:2]} for n, ratios in prompts.items()}
    files = make_files(size, args.threads, wanted)
    samples: dict[str, list[dict]] = {type: [] for type in wanted}
    reads: dict[int, list[dict]] = {n: [] for n in counts(args.threads)}
    peaks: dict[int, list[dict]] = {n: [] for n in reads}
    for done in range(args.rounds):
        print(f"{size}: round {done + 1} of {args.rounds}", flush=True)
        for n in reads:
            reads[n].append(read_rates(n))
            peaks[n].append(multiply_rates(n))
        for type, file in files.items():
            tokens = args.generate if size == "0.6B" else args.generate // 2
            tokens = tokens // 2 if type.startswith("IQ") else tokens  # several times as slow
            # a prompt is warm-up enough, and its own warm-up would be all of it again
            lengths = ",".join(str(n) for n, types in prompted.items() if type in types)
            prompt_options = ("-p", lengths, "--no-warmup") if lengths else ("-p", 0)
            samples[type].append(llama_bench(file, *prompt_options, "-n", tokens, "-t", ",".join(map(str, reads))))
    rates = {type: medians(found) for type, found in samples.items()}
    rows, claims = [], []
    for n in reads:
        found, judged = compare(size, n, rates, medians(reads[n]), medians(peaks[n]), files, decode, prompts)
        rows += found
        claims += judged
    return {"rows": rows, "claims": claims}


def compare(
    size: str, n: int, rates: dict, reads: dict, peaks: dict, files: dict, decode: list, prompts: dict[int, list]
) -> tuple[list, list]:
    """The table's rows, which are shown, and the claims of one size and `n` threads; prompts: claims by length."""
    first, *longer = prompts
    where = f"{size}, {n} thread{'s' * (n > 1)}"
    rows = []
    for type, rate in rates.items():
        gigabytes = decoded_bytes(files[type]) * rate[n, 0] / 1e9
        row = {"size": size, "threads": n, "type": type, "bpw": linear_bpw(files[type])}
        row |= {"decode t/s": rate[n, 0], "prompt t/s": rate.get((n, first)), "decode GB/s": gigabytes}
        row |= {f"prompt {length} t/s": rate.get((n, length)) for length in longer}
        row |= {f"/ read, {kind}": gigabytes / read for kind, read in reads.items()}
        row |= {"decode / Q4_K_S": rate[n, 0] / rates["Q4_K_S"][n, 0]}
        row |= {"prompt / Q4_K_S": rate[n, first] / rates["Q4_K_S"][n, first] if (n, first) in rate else None}
        products, by = multiplied(files[type]) * rate.get((n, first), 0) / 1e9, instruction(type, peaks)
        row |= {"prompt GMAC/s": products or None, "/ peak": products / peaks[by] if products and by else None}
        rows.append(row | {"instruction": by if products else None})
    texts = ("type", "instruction")
    formats = {key: "" if key in texts else ".2f" for key in rows[0] if key not in ("size", "threads")}
    limits = [f"plain read {reads['plain']:.1f} GB/s, in large pages {reads['large pages']:.1f}"]
    limits += [f"{name} {rate:.0f} GMAC/s" for name, rate in peaks.items()]
    show("; ".join([where, *limits]), rows, formats)
    claims = [
        {
            "claim": f"{where}: {name} of {ours} / {theirs}",
            "measured": rates[ours][n, length] / rates[theirs][n, length],
            "at_least": least,
        }
        for length, ratios in ({0: decode} | prompts).items()
        for name in (f"prompt ({length})" if length else "decode",)
        for ours, theirs, least in ratios
    ]
    sq4 = next(row for row in rows if row["type"] == "sq4")
    claims += [
        {"claim": f"{where}: decode of sq4 / plain read", "measured": sq4["/ read, plain"], "at_least": READ_FRACTION},
        {"claim": f"{where}: decode of sq4 / read in large pages", "measured": sq4["/ read, large pages"]},
    ]
    return rows, claims


def cache(args) -> dict:
    """Decoding behind a long context in caches of sdr4 and of q4_0, with one of the 0.6 B model's 24 layers."""
    make_files("0.6B", args.threads, [])
    file = BUILD / "bench/0.6B/one-layer/sq4.gguf"
    threads = ",".join(map(str, reversed(counts(args.threads))))  # the first of them fills the cache
    samples: dict[str, list[dict]] = {"sdr4": [], "q4_0": []}
    for done in range(args.rounds):
        print(f"cache: round {done + 1} of {args.rounds}", flush=True)
        for type, found in samples.items():
            options = ("-ctk", type, "-ctv", type, "-fa", 1, "-d", args.depth, "-p", 0, "-n", args.generate)
            found.append(llama_bench(file, *options, "-t", threads))
    rates = {type: medians(found) for type, found in samples.items()}
    return {
        "rows": [{"cache": type, "threads": n, "t/s": rate} for type in rates for (n, _), rate in rates[type].items()],
        "claims": [
            {
                "claim": f"{args.depth} tokens in the cache, {n} thread{'s' * (n > 1)}: decode with sdr4 / with q4_0",
                "measured": rates["sdr4"][n, 0] / rates["q4_0"][n, 0],
                "at_least": 1.0,
            }
            for n in counts(args.threads)
        ],
    }


def timed(command: list, outfile: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and peak resident bytes of a conversion, from a written-back disk, without an
    old output."""
    outfile.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def conversion(args) -> dict:
    """Data-free sq4 beside llama-quantize Q4_K_S and cp, from 0.6 B to 3 B parameters, and from a checkpoint of 1 B."""
    outfile = BUILD / "bench/timed.gguf"
    small, large = (make_files(size, args.threads, ["f16"])["f16"] for size in ("0.6B", "3B"))
    checkpoint = models.random_llama("bench/1B/checkpoint", **models.SIZES["1B"])
    ours = [sys.executable, "-m", "gguf_splitq", "convert", "--threads", args.threads, "--outfile", outfile, "--type"]
    jobs = {  # name: file to read, command
        "Q4_K_S, 0.6B": (small, [building.program("llama-quantize"), small, outfile, "Q4_K_S", args.threads]),
        "sq4, 0.6B": (small, [*ours, "sq4", small]),
        "sq4, 3B": (large, [*ours, "sq4", large]),
    }
    weights = checkpoint / "model.safetensors"
    for type in (*COPIED, *WINDOWS):
        jobs[f"{type}, 1B"] = (weights, [*ours, type, checkpoint])
    for size, file in (("0.6B", small), ("1B", weights), ("3B", large)):
        jobs[f"cp, {size}"] = (file, ["sh", "-c", 'cp "$0" "$1" && sync "$1"', file, outfile])
    sizes: dict[str, int] = {}
    samples: dict[str, list[tuple]] = {name: [] for name in jobs}
    for done in range(args.rounds):
        print(f"conversion: round {done + 1} of {args.rounds}", flush=True)
        for name, (file, command) in jobs.items():
            subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
            samples[name].append(timed(command, outfile))
            sizes[name] = file.stat().st_size + outfile.stat().st_size
    outfile.unlink()
    seconds, busy = ({name: statistics.median(f[i] for f in found) for name, found in samples.items()} for i in (0, 1))
    peaks = {name: max(peak for *_, peak in found) for name, found in samples.items()}
    rows = []
    for name, s in seconds.items():
        copy = seconds[f"cp, {name.split(', ')[1]}"]
        rows.append({"conversion": name, "seconds": s, "processor seconds": busy[name], "/ cp": s / copy})
        rows[-1] |= {"read + written MB/s": sizes[name] / s / 1e6, "peak MB": peaks[name] / 1e6}
    formats = {key: "" if key == "conversion" else ".0f" if "MB" in key else ".2f" for key in rows[0]}
    show(f"conversion, {args.threads} threads", rows, formats)
    per_byte = {name: seconds[name] / jobs[name][0].stat().st_size for name in seconds}
    claims = [
        {
            "claim": "conversion: seconds of sq4 / Q4_K_S, 0.6B",
            "measured": seconds["sq4, 0.6B"] / seconds["Q4_K_S, 0.6B"],
            "at_most": CONVERSION,
        },
        {
            "claim": "conversion: seconds per weight, 3B / 0.6B",
            "measured": per_byte["sq4, 3B"] / per_byte["sq4, 0.6B"],
            "at_most": LINEAR,
        },
    ]
    for row in rows:
        type, size = row["conversion"].split(", ")
        if type in COPIED:
            claim = {"claim": f"conversion: seconds of {row['conversion']} / cp", "measured": row["/ cp"]}
            claims.append(claim | {"at_most": COPY})
    for type in ("sq4", *WINDOWS):
        measured = seconds[f"{type}, 1B"]
        claims.append({"claim": f"conversion: seconds of {type}, 1B", "measured": measured, "at_most": ONE_BILLION})
    for size in ("0.6B", "1B", "3B"):
        largest = 2 * max(map(math.prod, models.tensor_shapes(**models.SIZES[size], vocab=1).values()))
        claim = f"conversion: peak memory of {size} / what is promised"
        measured = peaks[f"sq4, {size}"] / (PROMISED_RAM + 3 * largest)
        claims.append({"claim": claim, "measured": measured, "at_most": 1.0})
    return {"rows": rows, "claims": claims}


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
        for axis, key in zip(line, ("decode t/s", "prompt t/s"), strict=True):
            chosen = [row for row in rows if (row["size"], row["threads"]) == (size, threads) and row[key]]
            colors = ["tab:red" if row["type"].islower() else "tab:gray" for row in chosen]
            axis.bar([row["type"] for row in chosen], [row[key] for row in chosen], color=colors)
            axis.set_title(f"{size}, {threads} threads: {key}", fontsize=9)
            axis.tick_params(axis="x", rotation=60, labelsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"written: {path}")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--only", action="append", choices=PARTS, help="may be repeated; default: all, in this order")
    p.add_argument(
        "--prompt", action="append", type=int, help=f"tokens of a prompt, may be repeated; default: {PROMPTS}"
    )
    p.add_argument("--generate", type=int, default=32, help="tokens of the decode test; half as many on larger models")
    p.add_argument("--depth", type=int, default=8192, help="tokens in the cache when its types are compared")
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()

    done = json.loads(RESULTS.read_text()) if args.only and RESULTS.exists() else {}
    for part in args.only or PARTS:
        found = {"conversion": conversion, "cache": cache}.get(part, functools.partial(running, part))(args)
        done = {name: {**done, part: found}[name] for name in PARTS if name in {*done, part}}
        save(RESULTS.stem, done, args.keep)
    rows = [row for part in done.values() for row in part["rows"] if "type" in row]
    if rows:
        plot(rows, BUILD / "bench.png")
    judge([claim for part in done.values() for claim in part["claims"]])


if __name__ == "__main__":
    run(main)
