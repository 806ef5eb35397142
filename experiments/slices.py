# SPDX-License-Identifier: MIT
"""`make slices`: what a calibrated conversion takes of larger models, from one and two decoder layers of their shapes.

Both are whole conversions of random checkpoints, reading and writing included. What the second layer adds is the time
of each, and the rest is taken once: embedding and output, those of the demo's vocabulary, among it. A small model goes
first, for on a GPU the first run compiles. Random weights do not change the time, only what is gained.
"""

import time
from pathlib import Path

from gguf_splitq.options import Convert

from . import models
from .common import BUILD, DEMO, TEXTS, convert, parser, run, save, show

SHAPES = {  # and decoder layers
    "1b": ({"hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8}, 16),
    "8b": ({"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}, 32),
    "70b": ({"hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8}, 80),
}
FIRST = {"hidden": 512, "ffn": 1024, "heads": 8, "kv_heads": 8}
TOKENS = 160_000


def seconds(shape: dict[str, int], layers: int, type: str, args) -> float:
    """Of one conversion."""
    name = f"slices/{shape['hidden']}-{layers}"
    checkpoint = models.random_llama(name, **shape, layers=layers)
    options = {"calib": str(args.calib), "calib_tokens": args.tokens, "threads": args.threads, "device": args.device}
    start = time.monotonic()
    convert(checkpoint, type, BUILD / f"slices/{type}.gguf", load=False, **options)
    return time.monotonic() - start


def main() -> None:
    import torch

    p = parser(__doc__)
    p.add_argument("--device", default=Convert(".").processor, help="as of convert (default: %(default)s)")
    p.add_argument("--shape", choices=SHAPES, action="append", help="default: 1b and 8b")
    p.add_argument("--type", action="append", help="default: sq4 and q4_k")
    p.add_argument("--tokens", type=int, default=TOKENS)
    p.add_argument("--calib", type=Path, default=(TEXTS if TEXTS.is_dir() else DEMO) / "calib.txt")
    args = p.parse_args()

    rows = []
    for type in args.type or ["sq4", "q4_k"]:
        seconds(FIRST, 1, type, args)
        for name in args.shape or ["1b", "8b"]:
            shape, layers = SHAPES[name]
            if on_gpu := args.device != "cpu":
                torch.cuda.reset_peak_memory_stats(args.device)
            one, two = (seconds(shape, count, type, args) for count in (1, 2))
            row = {"shape": name, "type": type, "once s": 2 * one - two, "each layer s": two - one, "layers": layers}
            row |= {"all min": (one + (layers - 1) * (two - one)) / 60}
            row |= {"GPU GiB": torch.cuda.max_memory_allocated(args.device) / 2**30 if on_gpu else None}
            rows.append(row)
    formats = {"shape": "", "type": "", "once s": ".1f", "each layer s": ".1f", "layers": "", "all min": ".1f"}
    where = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu"
    show(f"{args.tokens} tokens on {where}", rows, formats | {"GPU GiB": ".1f"})
    save("slices", {"tokens": args.tokens, "device": where, "rows": rows}, args.keep)


if __name__ == "__main__":
    run(main)
