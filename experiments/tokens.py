# SPDX-License-Identifier: MIT
"""KL divergence against calibration tokens: how many are enough.

Files with feedback, as of `quality`, from 8 k to 262 k tokens taken evenly from the calibration text. Of so many tokens
the first type's minutes are those of the backward pass too, which the others share. Finished rows are kept in
build/quality/MODEL/tokens.

  python -m experiments.tokens --model ../shared/models/ref-a
  python -m experiments.tokens --model smollm2
"""

import argparse

from .common import BUILD, chosen, convert, model_and_texts, parser, run, save, show
from .quality import FORMATS, Rows, Run, measure

TYPES = ["sq4", "sq3", "Q4_K"]
TOKENS = [8192 << step for step in range(6)]


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p, "smollm2")
    p.add_argument("--type", action="append", help=f"default: {', '.join(TYPES)}")
    p.add_argument("--tokens", type=int, action="append", help=f"default: {', '.join(map(str, TOKENS))}")
    args = p.parse_args()
    name, args.model = args.model.removesuffix("/").rpartition("/")[2].removesuffix(".gguf"), chosen(args)
    args.folder, args.unpatched = BUILD / "quality" / name, None
    f16 = convert(args.model, "f16", args.folder / "f16.gguf", threads=args.threads)
    kept, wanted, found = Rows(args.folder / "tokens"), [Run(t, "feedback") for t in args.type or TYPES], []
    for count in args.tokens or TOKENS:
        given = argparse.Namespace(**vars(args) | {"tokens": count})
        rows = measure(wanted, f16, kept, given)
        found += [{"tokens": count} | row for row in rows]
    found.sort(key=lambda row: ([run.type for run in wanted].index(row["type"]), row["tokens"]))
    show(f"{name} on {args.chunks} chunks of {args.text.name}", found, {"tokens": ",", **FORMATS})
    save(f"tokens.{name}", {"model": name, "text": args.text.name, "chunks": args.chunks, "rows": found}, args.keep)


if __name__ == "__main__":
    run(main)
