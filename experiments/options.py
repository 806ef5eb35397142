# SPDX-License-Identifier: MIT
"""What each way to calibrate takes and what it gains: time, memory and KL divergence, on one model.

Each file is made by a process of its own, from the checkpoint and with the same text. Training is for types of 2 and 3
bits, that of codes for a GPU. Memory and time grow with the model; `make slices` has what larger ones take.

  python -m experiments.options --model examples/demo
"""

from gguf_splitq import types
from gguf_splitq.measure.validate import Baseline

from .common import BUILD, chosen, convert, model_and_texts, parser, run, save, show
from .journeys import convert_apart

TYPES = ["sq4w", "sq2w"]
WAYS = [None, ["--aim", "plain"], [], ["--tune", "scales"], ["--tune", "layers"]]  # None: without a text
ON_GPU = [["--tune", "codes"]]
LARGEST = 4  # bits a weight, from which training gains little
FORMATS = {"type": "", "options": "", "minutes": ".2f", "peak": ".0f", "mean_kld": ".5f", "of_none": ".2f"}


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    p.add_argument("--type", action="append", help=f"default: {', '.join(TYPES)}")
    p.add_argument("--tokens", type=int, default=131_072, help="tokens of the calibration text to use")
    p.add_argument("--device", default="cpu", help="as of convert (default: %(default)s)")
    args = p.parse_args()
    name, model = args.model.removesuffix("/").rpartition("/")[2], chosen(args)
    folder = BUILD / "options" / name
    f16 = convert(model, "f16", folder / "f16.gguf", threads=args.threads)
    text = ["--calib", str(args.calib), "--calib-tokens", str(args.tokens)]
    where = ["--device", args.device, "--threads", str(args.threads)]
    rows, file = [], folder / "made.gguf"
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:
        for type in args.type or TYPES:
            for way in WAYS + (ON_GPU if args.device != "cpu" else []):
                if "--tune" in (way or []) and types.get(type).bpw >= LARGEST:
                    continue
                used = convert_apart([str(model), "--type", type, *where, *([] if way is None else text + way)], file)
                row = {"type": type, "options": "none" if way is None else f"`{' '.join(['--calib TEXT', *way])}`"}
                rows.append(row | used | base.compare(file))
                rows[-1]["of_none"] = rows[-1]["mean_kld"] / next(r for r in rows if r["type"] == type)["mean_kld"]
    show(f"{name} on {args.chunks} chunks of {args.text.name}, {args.tokens} tokens", rows, FORMATS)
    kept = [{key: row[key] for key in FORMATS} for row in rows]
    save("options", {"model": name, "chunks": args.chunks, "tokens": args.tokens, "rows": kept}, args.keep)


if __name__ == "__main__":
    run(main)
