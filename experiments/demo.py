# SPDX-License-Identifier: MIT
"""`make demo`: a checkpoint becomes F16 and low-bit GGUF files, measured side by side."""

from pathlib import Path

from gguf_splitq.measure.validate import Baseline

from .common import BUILD, DEMO, convert, parser, run, save, show, speed


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", type=Path, default=DEMO)
    p.add_argument("--type", action="append", help="tensor type; give it again for several (default: sq4)")
    p.add_argument("--text", type=Path, default=DEMO / "eval.txt")
    p.add_argument("--chunks", type=int, default=20, help="chunks of 512 tokens to measure on")
    args = p.parse_args()

    name = args.model.name.removesuffix(".gguf")
    files = {
        type: convert(args.model, type, BUILD / "demo" / f"{name}-{type}.gguf", threads=args.threads)
        for type in ["f16", *(args.type or ["sq4"])]
    }
    with Baseline(files["f16"], args.text, chunks=args.chunks, threads=args.threads) as base:
        rows = [{"type": type, **base.compare(file)} for type, file in files.items()]
    rates = speed(list(files.values()), args.threads, generate=64)
    for row, file in zip(rows, files.values(), strict=True):
        row |= {"file": file.name, "MB": row["size"] / 1e6, "tokens/s": rates[file]["tg"]}

    show(
        f"{args.model} on {args.chunks} chunks of {args.text}",
        rows,
        {
            "file": "",
            "type": "",
            "bpw": ".2f",
            "MB": ".2f",
            "ppl": ".3f",
            "ppl_ratio": ".4f",
            "mean_kld": "z.5f",
            "top1": ".1%",
            "tokens/s": ".0f",
        },
    )
    save("demo", {"rows": rows}, args.keep)


if __name__ == "__main__":
    run(main)
