# SPDX-License-Identifier: MIT
"""`make slices`: what error feedback costs on larger models, from one decoder layer of their shapes.

Random weights, random tokens: the time depends on neither. Backward is the layer forward, then forward and backward;
forward is the half-way pass of both models with its second moments. They grow linearly with the tokens and are scaled
to 160 k when fewer are run; solving does not depend on them. Head and embedding are run with a small vocabulary and
are counted with the layer.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .common import parser, run, save, show

SHAPES = {  # hidden, feed-forward, heads, KV heads, layers
    "1b": (2048, 8192, 32, 8, 16),
    "8b": (4096, 14336, 32, 8, 32),
}
TOKENS = 160_000
VOCABULARY = 4096


def checkpoint(folder: Path, shape: str) -> Path:
    """A Llama of one layer."""
    import torch
    import transformers

    hidden, ffn, heads, kv_heads, _ = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(folder: Path, type: str, tokens: int, device: str, dtype: str, threads: int) -> dict[str, float]:
    """Seconds of each step, and the peak of the GPU's memory."""
    import torch

    from gguf_splitq import types
    from gguf_splitq.calibration import aims, moments
    from gguf_splitq.calibration.model import CONTEXT, Model
    from gguf_splitq.coding import families
    from gguf_splitq.types.columns import PLAIN

    torch.set_num_threads(threads)
    model, kind = Model(folder, device, getattr(torch, dtype)), types.get(type)
    code, on_gpu = families.coder(kind, PLAIN), device != "cpu" and families.on_gpu(kind)
    text = torch.randint(VOCABULARY, (max(1, tokens // CONTEXT), CONTEXT))
    seconds, start = dict.fromkeys(("backward s", "forward s", "solve s"), 0.0), time.perf_counter()

    def lap(step: str) -> None:
        nonlocal start
        if device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[f"{step} s"] += now - start
        start = now

    def solve(layer: moments.Layer) -> None:
        at = layer.hessian.device if on_gpu else torch.device("cpu")
        weight, every = layer.weight.float().to(at), torch.arange(len(layer.weight))
        found = code(aims.moved(weight, layer, every), layer.hessian.to(at), each=each)
        layer.stored = found.weight.to(layer.weight)

    weights: dict = {}
    aims.information(model, text, folder, threads, weights.__setitem__)
    lap("backward")

    def wanted(_: int, layers: list[moments.Layer]) -> set[str]:
        return {layer.name for layer in layers}

    alone = {"initializer": lambda: torch.set_num_threads(1)}
    with ThreadPoolExecutor(1 if on_gpu else threads, **alone) as pool, ThreadPoolExecutor(threads, **alone) as pieces:
        each = map if on_gpu else pieces.map
        for stage in aims.run(model, text, text[:0], weights.__getitem__, wanted, folder, threads):
            lap("forward")
            with torch.no_grad():
                list(pool.map(solve, stage.layers))
            lap("solve")
    lap("forward")
    seconds["GPU GiB"] = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else 0
    return seconds


def main() -> None:
    import torch

    p = parser(__doc__)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    p.add_argument("--type", default="sq4")
    p.add_argument("--tokens", type=int, default=TOKENS, help="to run; times are scaled to 160 k")
    args = p.parse_args()

    rows = []
    for shape in args.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(
                checkpoint(Path(folder), shape), args.type, args.tokens, args.device, args.dtype, args.threads
            )
        for step in ("backward s", "forward s"):
            seconds[step] *= TOKENS / args.tokens
        total = sum(seconds[step] for step in ("backward s", "forward s", "solve s")) * SHAPES[shape][-1]
        rows.append({"shape": shape, "layers": SHAPES[shape][-1], "all layers min": total / 60} | seconds)
    note = "" if args.tokens == TOKENS else f" ({args.tokens} were run, the rest is scaled up)"
    columns = {
        "shape": "",
        "backward s": ".1f",
        "forward s": ".1f",
        "solve s": ".1f",
        "layers": "",
        "all layers min": ".1f",
    }
    columns |= {"GPU GiB": ".1f"} if args.device == "cuda" else {}
    show(f"One decoder layer on {args.device} in {args.dtype}, {args.type}, {TOKENS} tokens{note}", rows, columns)
    save("slices", {"options": vars(args), "rows": rows}, args.keep)


if __name__ == "__main__":
    run(main)
