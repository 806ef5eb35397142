# SPDX-License-Identifier: MIT
"""`make quality`: KL divergence over stored bits of every type, beside llama.cpp's own: no data, imatrix, feedback.

Only the linear layers differ: embeddings and output are F16 everywhere. "imatrix" files of stock types are made by
`llama-quantize --pure`, all from the same F16 file and one importance matrix of the calibration text; "feedback" files,
ours and stock types, by `gguf-splitq convert --calib` from as many tokens of that text, "plain" with `--aim plain`
besides, "self" from text that the model wrote, "tuned" with `--tune scales`, "trained" with `--tune codes` and "layers"
with `--tune layers` (both on a GPU alone), and "3.5 bpw" by `--bpw 3.5`; "plain" files share one file of Hessians, all
others but "self" one of token weights. Finished rows are kept in build/quality/MODEL/: a run that was stopped goes on,
and what the source of solver or types, the texts or the options have changed is measured again. Several processes may
each measure a part with --only; the same command without it then joins the rows.

  python -m experiments.quality --only feedback,bpw        # kinds: none, imatrix, plain, feedback, ...
  python -m experiments.quality --only sq4,Q4_K/imatrix    # types, or one row
  python -m experiments.quality --model ../shared/models/ref-a
  python -m experiments.quality --files                    # whole files, as llama-quantize ships them: files.py
  python -m experiments.quality --ends                     # types of embedding and output: ends.py
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import gguf_splitq
from gguf_splitq.errors import EnvironmentFailed
from gguf_splitq.measure.validate import Baseline, check_overlap
from gguf_splitq.runtime import building, patching

from .common import BUILD, chosen, convert, imatrix, judge, model_and_texts, parser, quantize, run, save, show

WINDOWS = ["sq4w", "sq3w", "sq2w"]
WITH_SCALES = ["sq4wc", "sq3wc", "sq2wc", "sq3wo", "sq2wo"]
COLUMNS = ["cq4", "cq3", "cq2", "cq3.5", "cq2.5", "sq3c", "sq2c", "sq3.5", "sq2.5", *WITH_SCALES]
LARGE = ["sq6w", "sq5w"]
OURS = [*LARGE, *WINDOWS, "sq4", "sq3", "sq2", "sdr4", "sq4x", *COLUMNS]
PEERS = ["Q5_K", "Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_XS"]
NEEDS_IMATRIX = {"IQ3_XXS", "IQ2_XS"}  # llama-quantize refuses them without
USES_NO_DATA = {"sq4x", *COLUMNS}  # or next to none without its covariances
FED = [*LARGE, *WINDOWS, "sq4", "sq3", "sq2", "sdr4", *COLUMNS]
FED += ["Q4_K", "IQ4_XS", "Q5_K", "Q3_K", "Q2_K", "IQ4_NL", "Q4_0"]
TUNED = [*WINDOWS, "sq4", "sq3", "sq2"]  # with --tune
TRAINED = {  # with --tune codes: in so many steps
    **dict.fromkeys(["sq4w", "sq3w", "sq2", "Q2_K"], 2560),
    **dict.fromkeys(["sq2w"], 1280),
    **dict.fromkeys(["sq4", "sq3", "Q4_K", "IQ4_XS", "Q3_K"], 640),
}
TRAINING = {"tuned": "scales", "trained": "codes", "layers": "layers"}
UNPATCHED = ["Q4_K", "IQ4_XS"]  # of those, run by llama.cpp as upstream has it
BUDGETS = [2.5, 3.0, 3.5, 4.0]
NEAR = 0.1  # bits per weight: what counts as the same stored size
KEPT = {"token_embedding_type": "f16", "output_tensor_type": "f16"}
FORMATS = {
    "type": "",
    "data": "",
    "bpw": ".2f",
    "ppl_ratio": ".4f",
    "mean_kld": "z.5f",
    "p99_kld": ".4f",
    "top1": ".1%",
    "minutes": ".1f",
}


@dataclass(frozen=True)
class Run:
    """One row: `data` is none, imatrix, plain (feedback with plain aims), feedback, self, bpw, or of `TRAINING`.

    Of "bpw", `type` is "3.5 bpw".
    """

    type: str
    data: str

    @property
    def solved(self) -> bool:
        return self.data in ("plain", "feedback", "self", *TRAINING, "bpw")


def runs() -> list[Run]:
    plain = [Run(t, "none") for t in OURS + PEERS if t not in NEEDS_IMATRIX]
    weighted = [Run(t, "imatrix") for t in OURS + PEERS if t not in USES_NO_DATA]
    on_gpu = [Run(t, data) for data in ("trained", "layers") for t in TRAINED if torch.cuda.is_available()]
    tuned = [Run(t, "tuned") for t in TUNED] + on_gpu
    budgets = [Run(f"{bpw} bpw", "bpw") for bpw in BUDGETS]
    fed = [Run(t, data) for data in ("plain", "feedback") for t in FED]
    return [*plain, *weighted, *fed, Run("sq4", "self"), *budgets, *tuned]


def make(source: Run, f16: Path, matrix: Path | None, outfile: Path, args) -> None:
    """The file of a row."""
    options = {"threads": args.threads} | KEPT
    if source.solved:
        options |= {"tune": TRAINING.get(source.data)}
        options |= {"tune_steps": TRAINED[source.type]} if source.data == "trained" else {}
        if source.data == "bpw":
            calibrate(None, outfile, args, bpw=float(source.type.split()[0]), **options)
        elif source.data == "self":
            convert(args.model, source.type.lower(), outfile, calib="self", calib_tokens=args.tokens, **options)
        else:
            calibrate(source.type.lower(), outfile, args, aim="plain" if source.data == "plain" else "half", **options)
        return
    weights = matrix if source.data == "imatrix" else None
    if source.type in OURS:
        convert(f16, source.type, outfile, imatrix=weights and str(weights), **options)
        return
    given = ["--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    quantize(f16, source.type, outfile, args.threads, *given, *(["--imatrix", weights] if weights else []))


def calibrate(type: str | None, outfile: Path, args, aim: str = "half", **options) -> None:
    """`convert` with feedback of the calibration text; what the model says of its tokens is measured once."""
    kind = "hessians" if aim == "plain" else "weights"
    measured = args.folder / f"{kind}-{hessian_key(args)}.gguf"
    options |= {"calib": str(args.calib), "calib_tokens": args.tokens, "aim": aim}
    with shared(measured, outfile.with_suffix(f".{kind}.gguf")) as path:
        convert(args.model, type, outfile, hessians=path, **options)


@contextlib.contextmanager
def shared(path: Path, own: Path) -> Iterator[Path]:
    """`path` where it is there; else `own`, to be made and then renamed to `path`: other processes may make it too."""
    if path.exists():
        yield path
        return
    yield own
    own.replace(path)


def hessian_key(args) -> str:
    """Of what the calibration's second moments depend on."""
    source = [path.read_bytes() for path in sorted((Path(gguf_splitq.__file__).parent / "calibration").glob("*.py"))]
    return digest(b"".join([args.calib.read_bytes(), str((args.model.resolve(), args.tokens)).encode(), *source]))


class Rows:
    """The measured rows on disk, each in a file that is named after everything that decides its numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.found: dict[Run, Path] = {}  # where the rows are that were asked for
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, source: Run, settings: dict) -> Path:
        """Of a row; what is made for it lies beside it."""
        if source.solved or source.type in OURS:
            settings = settings | {"source": source_hash()}
        key = digest(json.dumps(settings, sort_keys=True).encode())
        return self.folder / f"{source.type}-{source.data}-{key}.json".replace(" ", "-")

    def get(self, source: Run, settings: dict, measure: Callable[[Path], dict]) -> dict:
        """The row, measured if it is not there. measure: is given the place for its GGUF file."""
        path = self.found[source] = self.path(source, settings)
        if not path.exists():
            row = {"type": source.type, "data": source.data} | measure(path.with_suffix(".gguf"))
            part = path.with_suffix(".part")
            part.write_text(json.dumps(row, indent=1) + "\n")
            part.replace(path)
        row = json.loads(path.read_text())
        print(f"{source.type:8} {source.data:8} mean KLD {row['mean_kld']:.5f}", flush=True)
        return row


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def source_hash() -> str:
    """Of the code that decides the bytes of a file."""
    folder = Path(gguf_splitq.__file__).parent
    files = [p for room in ("types", "coding", "calibration", "plan") for p in sorted((folder / room).glob("*.py"))]
    return digest(b"".join(p.read_bytes() for p in files))


def measure(wanted: list[Run], f16: Path, rows: Rows, args, make=make) -> list[dict]:
    """The rows of `wanted`, from disk where they are there."""
    common = {"f16": digest(f16.read_bytes()), "text": digest(args.text.read_bytes()), "chunks": args.chunks}
    common["pin"] = patching.pin()["commit"]
    data = {"calib": digest(args.calib.read_bytes()), "tokens": args.tokens}

    @functools.cache
    def matrix() -> Path:
        path = args.folder / f"imatrix-{digest(json.dumps(common | data).encode())}.gguf"
        with shared(path, path.with_suffix(f".{os.getpid()}.gguf")) as made:
            if made != path:
                print(f"importance matrix of {args.calib}", flush=True)
                imatrix(f16, args.calib, made, args.threads, chunks=args.tokens // 512)
        return path

    with contextlib.ExitStack() as stack:

        @functools.cache
        def base() -> Baseline:
            return stack.enter_context(Baseline(f16, args.text, chunks=args.chunks, threads=args.threads))

        def one(source: Run, file: Path) -> dict:
            start = time.monotonic()
            make(source, f16, matrix() if source.data in ("imatrix", "ours") else None, file, args)
            minutes = (time.monotonic() - start) / 60
            check_overlap(file, args.text)
            result = base().compare(file) | {"minutes": minutes}
            if args.unpatched is not None and source.data == "feedback" and source.type in UNPATCHED:
                result["unpatched_kld"] = by_upstream(base(), file, unpatched(args))
            if source.data != "ours":  # those are timed later
                file.unlink()
            return result

        settings = {"none": common, "self": common | {"tokens": args.tokens}}
        return [rows.get(s, settings.get(s.data, common | data), functools.partial(one, s)) for s in wanted]


def unpatched(args) -> Path:
    """llama-perplexity as upstream has it."""
    folder = Path(args.unpatched) if args.unpatched else building.build_unpatched("llama-perplexity")
    return folder / "llama-perplexity"


def by_upstream(base: Baseline, file: Path, program: Path, attempts: int = 10) -> float:
    """Mean KLD of `file`; on a busy machine upstream's program may end before its last lines are out (patch 0006)."""
    for attempt in range(attempts):
        try:
            return base.compare(file, program)["mean_kld"]
        except EnvironmentFailed:
            if attempt == attempts - 1:
                raise


def between(points: list[tuple[float, float]], bpw: float) -> float:
    """The least KLD at `bpw` on a line between two points (bpw, KLD), log KLD being linear in bits; inf without any.

    Stricter than a mix of two types without regard to sensitivity, where KLD itself is about linear in bits.
    """
    found = [math.inf]
    for (left, high), (right, low) in itertools.product(points, points):
        if left <= bpw <= right:
            share = (bpw - left) / (right - left) if right > left else 0
            found.append(math.exp((1 - share) * math.log(high) + share * math.log(low)))
    return min(found)


def claims_of(rows: list[dict]) -> list[dict]:
    """What has to be shown, as far as it was measured."""
    at = {(row["type"], row["data"]): row for row in rows}
    claims = []

    def ratio(ours: tuple[str, str], peer: tuple[str, str], **limits) -> None:
        if ours in at and peer in at:
            claim = f"KLD of {ours[0]} ({ours[1]}) / {peer[0]} ({peer[1]})"
            claims.append({"claim": claim, "measured": at[ours]["mean_kld"] / at[peer]["mean_kld"], **limits})

    ratio(("sq4", "none"), ("IQ4_XS", "none"), at_most=1.0)
    ratio(("sq4", "imatrix"), ("IQ4_XS", "imatrix"), at_most=1.0)
    ratio(("sq3", "imatrix"), ("Q3_K", "imatrix"), at_most=1.25)
    ratio(("sq2", "imatrix"), ("Q2_K", "imatrix"))
    ratio(("sq2", "imatrix"), ("IQ2_XS", "imatrix"))
    limits = {("sq4", "IQ4_XS"): 0.65, ("sq4", "Q4_K"): 0.75, ("sq3", "IQ3_S"): 0.8, ("sq2", "IQ2_XS"): 0.85}
    limits["sdr4", "Q4_0"] = limits["cq3", "IQ3_XXS"] = limits["cq2", "IQ2_XS"] = 1.0
    for (ours, peer), limit in limits.items():
        ratio((ours, "feedback"), (peer, "imatrix"), at_most=limit)
    for bits, limit in {4: 0.78, 3: 0.73, 2: 0.68}.items():
        ratio((f"sq{bits}w", "feedback"), (f"sq{bits}", "feedback"), at_most=limit)
    ratio(("sq4w", "feedback"), ("Q4_K", "feedback"), at_most=1.0)
    for type, peer in {"sq3w": "IQ3_S", "sq2w": "IQ2_XS"}.items():
        ratio((type, "feedback"), (peer, "imatrix"), at_most=0.5)
    for type, peer in {"sq4w": "IQ4_XS", "sq3w": "Q3_K", "sq2w": "IQ2_XS"}.items():
        ratio((type, "none"), (peer, "imatrix"), at_most=1.0)
    for type in FED:
        ratio((type, "feedback"), (type, "imatrix"), at_most=0.8 if type in UNPATCHED else 1.0)
    for bpw in (3.5, 2.5):
        ratio((f"sq{bpw}", "feedback"), (f"cq{bpw}", "feedback"), at_most=1.0)
    ratio(("sq4", "self"), ("sq4", "feedback"), at_most=1.1)
    for type in TUNED:
        ratio((type, "tuned"), (type, "feedback"), at_most=1.0)
    for type, kind in itertools.product(TRAINED, ("trained", "layers")):
        ratio((type, kind), (type, "feedback"), at_most=1.0)
    halves = {"sq4": 0.85, "sq3": 0.83, "sq2": 0.8, "Q4_K": 0.87, "IQ4_XS": 0.87, "Q3_K": 0.87, "Q2_K": 0.87}
    trained, layers = {"sq4": 0.78, "sq3": 0.65, "sq2": 0.53}, {"sq3": 0.78, "sq2": 0.7}
    for kind, limits in (("feedback", halves), ("trained", trained), ("layers", layers)):
        for type, limit in limits.items():
            ratio((type, kind), (type, "plain"), at_most=limit)

    for row in rows:
        if "unpatched_kld" in row:
            name = f"KLD of {row['type']} (feedback) by unpatched llama.cpp / by ours"
            measured = row["unpatched_kld"] / row["mean_kld"]
            claims.append({"claim": name, "measured": measured, "at_least": 0.99, "at_most": 1.01})
    single = [row for row in rows if row["data"] != "bpw"]
    for row in rows:
        if row["data"] != "bpw":
            continue
        mine = (row["type"], "bpw")
        for peer in single:
            if abs(peer["bpw"] - row["bpw"]) <= NEAR:
                ratio(mine, (peer["type"], peer["data"]), at_most=1.0)
        larger = [peer for peer in single if peer["bpw"] > row["bpw"] and peer["data"] == "imatrix"]
        for peer in sorted(larger, key=lambda peer: (peer["bpw"], peer["mean_kld"]))[:1]:
            ratio(mine, (peer["type"], peer["data"]))
        line = between([(peer["bpw"], peer["mean_kld"]) for peer in single], row["bpw"])
        if math.isfinite(line):
            claim = f"KLD of {row['type']} / line between the best single types of any kind"
            claims.append({"claim": claim, "measured": row["mean_kld"] / line, "at_most": 1.0})
        claims.append({"claim": f"stored bits per weight of {row['type']}", "measured": row["bpw"]})
        claims[-1]["at_most"] = float(row["type"].split()[0])
    return claims


def series(rows: list[dict]) -> list[tuple[str, str, str, list[dict]]]:
    """(label, marker, color, rows) of each kind of type and data."""
    kinds = {
        "llama.cpp's types, no data": ("none", False, "v", "#8a8a8a"),
        "llama.cpp's types, importance matrix": ("imatrix", False, "o", "#3b82c4"),
        "llama.cpp's types, our feedback": ("feedback", False, "s", "#12a5b8"),
        "our types, no data": ("none", True, "v", "#b08f00"),
        "our types, importance matrix": ("imatrix", True, "o", "#e07b00"),
        "our types, feedback": ("feedback", True, "s", "#d9343f"),
        "our types, feedback on own text": ("self", True, "x", "#a06bd0"),
        "our types, scales trained": ("tuned", True, "P", "#a8715a"),
        "our types, codes trained": ("trained", True, "P", "#7a1f3d"),
        "our types, trained layer by layer": ("layers", True, "P", "#c77d98"),
        "llama.cpp's types, codes trained": ("trained", False, "P", "#0b6b78"),
        "llama.cpp's types, trained layer by layer": ("layers", False, "P", "#7fb6bf"),
        "mixed by --bpw": ("bpw", False, "*", "#33a047"),
    }
    return [
        (label, marker, color, [r for r in rows if r["data"] == data and (r["type"] in OURS) == ours and r["bpw"] < 6])
        for label, (data, ours, marker, color) in kinds.items()
    ]


def draw(series: list[tuple[str, str, str, list[dict]]], bits: str, where: str, title: str, path: Path) -> None:
    """KLD over stored bits, those of `bits` in a row and `where` in words; the same rows give the same bytes."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed: pip install 'gguf-splitq[plot]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Grey letters on nothing are read on white and on black pages; letters stay letters.
    grey = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#808080")
    with matplotlib.rc_context({"svg.hashsalt": "", "svg.fonttype": "none", "grid.color": "#808080"} | grey):
        figure, axes = pyplot.subplots(figsize=(9, 6.5))
        for label, marker, color, points in series:
            x, y = [row[bits] for row in points], [row["mean_kld"] for row in points]
            if points:
                axes.scatter(x, y, label=label, marker=marker, color=color)
            for row in points:
                if row["data"] in ("imatrix", "feedback", *TRAINING, "bpw", "ours"):
                    near = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7, "color": color}
                    axes.annotate(row["type"], (row[bits], row["mean_kld"]), **near)
        axes.set(yscale="log", xlabel=f"stored bits per weight, {where}", ylabel="mean KL divergence to F16, nats")
        axes.set_title(title, fontsize=9)
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(fontsize=8, framealpha=0)
        figure.savefig(path, bbox_inches="tight", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    print(f"written: {path}")


def plot(rows: list[dict], title: str, path: Path) -> None:
    """`draw` the rows of all types."""
    draw(series(rows), "bpw", "linear layers", title, path)


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p, "smollm2")
    p.add_argument("--tokens", type=int, default=131_072, help="tokens of the calibration text to use")
    p.add_argument("--files", action="store_true", help="whole files instead, ours at the sizes of llama-quantize's")
    p.add_argument("--speed", action="store_true", help="with --files: also how fast those of a size decode, in turns")
    p.add_argument("--ends", action="store_true", help="types of embedding and output instead, by --type")
    p.add_argument("--only", help="kinds of data, types, or TYPE/KIND, separated by commas")
    upstream = f"run the {' and '.join(UNPATCHED)} files with feedback by llama.cpp as upstream has it, too"
    p.add_argument("--unpatched", nargs="?", const="", metavar="DIR", help=f"{upstream}; built unless DIR has it")
    args = p.parse_args()
    name, args.model = args.model.removesuffix("/").rpartition("/")[2].removesuffix(".gguf"), chosen(args)
    args.folder = BUILD / "quality" / name
    only = set(args.only.lower().split(",")) if args.only else None
    from . import ends, files  # which take what they share from here

    what, module = ("files", files) if args.files else ("ends", ends) if args.ends else ("quality", None)
    f16, own = args.folder / "f16.gguf", args.folder / f"f16.{os.getpid()}.gguf"
    convert(args.model, "f16", own, threads=args.threads).replace(f16)
    every = module.runs(f16) if module else runs()
    wanted = [r for r in every if only is None or {r.type.lower(), r.data, f"{r.type.lower()}/{r.data}"} & only]
    rows = Rows(args.folder / what)
    found = measure(wanted, f16, rows, args, *([module.make] if module else []))
    if args.speed:
        files.add_speed(found, rows.found, args.threads)
    title = f"{name} on {args.chunks} chunks of {args.text.name}"
    show(title, found, module.FORMATS if module else FORMATS)
    claims = (module.claims_of if module else claims_of)(found)
    settings = {"model": name, "text": args.text.name, "chunks": args.chunks, "tokens": args.tokens}
    save(f"{what}.{name}", settings | {"rows": found, "claims": claims}, args.keep)
    draw_all = module.plot if module else plot
    draw_all(found, title, BUILD / f"{what}.{name}.svg")
    judge(claims)


if __name__ == "__main__":
    run(main)
