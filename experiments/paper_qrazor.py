# SPDX-License-Identifier: MIT
"""`make paper-qrazor`: what 4-bit weights, activations and KV caches cost as QRazor has them, and as sdr4 has them.

"QRazor" rows are the published weights (an 8-bit base with one scale per output row, a 4-bit code and a shift of 3 bits
per group; dnotitia/qllm-infer, lib/qrazor), simulated: razored, decoded and stored as F16. Rows named sdr4 run the
type: W4A16 from weights decoded to F16, W4A8 as it is, W4A4 with SPLITQ_W4A4=1, KV4 with the sdr4 cache. The same
model's Q4_0 weights and q4_0 cache stand beside them. Embeddings and output are F16 everywhere. At the end the two
caches take turns in decoding after a long context.
"""

import contextlib
import io
import json
import statistics
from pathlib import Path

import numpy as np

from gguf_splitq.dequantize import dequantize
from gguf_splitq.files import gguf_file
from gguf_splitq.inspection import linear_bpw
from gguf_splitq.measure.validate import Baseline

from .common import BUILD, chosen, convert, imatrix, judge, llama, model_and_texts, parser, quantize, run, save, show
from .paper_splitquant import simulate

FORMATS = {
    "method": "",
    "weights": ".2f",
    "cache": ".2f",
    "ppl": ".3f",
    "ppl_ratio": ".4f",
    "mean_kld": "z.5f",
    "top1": ".1%",
}
KEPT = {"token_embedding_type": "f16", "output_tensor_type": "f16"}
EMBEDDINGS = ("token_embd.weight", "output.weight")
GROUPS = (8, 16, 32)
CACHE = {"f16": 16.0, "q4_0": 4.5, "sdr4": 4.25}
W4A4 = {"SPLITQ_W4A4": "1"}
UNROTATED = {"LLAMA_ATTN_ROT_DISABLE": "1"}


def razored(w: np.ndarray, group: int) -> np.ndarray:
    """Published weights, decoded: float32 [n_rows, n_cols], groups of `group` contiguous columns."""
    scale = np.abs(w).max(1, keepdims=True) / 127
    base = np.rint(w / np.where(scale > 0, scale, 1)).reshape(len(w), -1, group)
    length = np.frexp(np.abs(base).max(2, keepdims=True))[1]  # the place of the leading one; 0 for 0
    unit = 2.0 ** np.maximum(length - 3, 0)
    return (np.clip(np.rint(base / unit), -8, 7) * unit).reshape(w.shape) * scale


def published_bits(f16: Path, group: int) -> float:
    """Stored bits per weight of that: code, shift, and a float16 scale for each row."""
    with gguf_file.read(f16) as source:
        matrices = [t for t in source.tensors if len(t.shape) > 1 and t.name not in EMBEDDINGS]
        return 4 + 3 / group + 16 * sum(t.n_rows for t in matrices) / sum(t.n_weights for t in matrices)


def cache_rates(file: Path, threads: int, depth: int = 2048, rounds: int = 3) -> dict[str, float]:
    """Median decoded tokens per second after `depth` tokens, {cache type: rate}."""
    rates: dict[str, list[float]] = {"sdr4": [], "q4_0": []}
    options = ("-p", 0, "-n", 32, "-d", depth, "-r", 1, "-fa", 1, "-t", threads, "-o", "json")
    for _ in range(rounds):
        for cache, found in rates.items():
            [result] = json.loads(llama("llama-bench", "-m", file, "-ctk", cache, "-ctv", cache, *options))
            found += result["samples_ts"]
    return {cache: statistics.median(found) for cache, found in rates.items()}


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    args = p.parse_args()
    model = chosen(args)

    folder = BUILD / "qrazor"
    f16 = convert(model, "f16", folder / "f16.gguf", threads=args.threads)
    matrix = imatrix(f16, args.calib, folder / "imatrix.gguf", args.threads)
    sdr4 = convert(f16, "sdr4", folder / "sdr4.gguf", threads=args.threads, **KEPT)
    decoded = folder / "sdr4-decoded.gguf"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dequantize(sdr4, decoded, threads=args.threads, overwrite=True)

    rows = {}
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:

        def measure(name: str, file: Path, cache="f16", weights: float | None = None, environment=None) -> None:
            options = ["--cache-type-k", cache, "--cache-type-v", cache]
            row = {"method": name, "cache": CACHE[cache], **base.compare(file, None, options, environment)}
            rows[name] = row | {"weights": row["bpw"] if weights is None else weights}
            print(f"{name}: mean KLD {row['mean_kld']:.5f}", flush=True)

        measure("F16", f16)
        for group in GROUPS:
            file = simulate(f16, folder / "simulated.gguf", razored, group, EMBEDDINGS)
            measure(f"QRazor W4A16 g{group}", file, weights=published_bits(f16, group))
        file.unlink()
        measure("sdr4 W4A16", decoded, weights=linear_bpw(sdr4))
        measure("sdr4 W4A8", sdr4)
        measure("sdr4 W4A4", sdr4, environment=W4A4)
        measure("sdr4 W4A16 KV4", decoded, "sdr4", weights=linear_bpw(sdr4))
        measure("sdr4 W4A8 KV4", sdr4, "sdr4")
        measure("sdr4 W4A4 KV4", sdr4, "sdr4", environment=W4A4)
        weighted = convert(f16, "sdr4", folder / "weighted.gguf", threads=args.threads, imatrix=str(matrix), **KEPT)
        measure("sdr4 W4A8, imatrix", weighted)
        fed = convert(model, "sdr4", weighted, calib=str(args.calib), threads=args.threads, **KEPT)
        measure("sdr4 W4A8, feedback", fed)
        given = ["--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16"]
        measure("Q4_0 weights", quantize(f16, "Q4_0", weighted, args.threads, *given))
        measure("Q4_0 weights, imatrix", quantize(f16, "Q4_0", weighted, args.threads, *given, "--imatrix", matrix))
        for cache in ("sdr4", "q4_0"):
            measure(f"{cache} cache", f16, cache)
            measure(f"{cache} cache, not rotated", f16, cache, environment=UNROTATED)

    show(f"{args.model} on {base.chunks} chunks of {args.text}", list(rows.values()), FORMATS)
    claims = [
        ratio(rows, "QRazor W4A16 g8", "QRazor W4A16 g16"),
        ratio(rows, "QRazor W4A16 g16", "QRazor W4A16 g32"),
        ratio(rows, "sdr4 W4A16", "QRazor W4A16 g16"),
        ratio(rows, "sdr4 W4A8", "sdr4 W4A4"),
        ratio(rows, "sdr4 W4A16 KV4", "sdr4 W4A4"),
        ratio(rows, "sdr4 W4A4", "sdr4 W4A4 KV4"),
        ratio(rows, "sdr4 W4A8, feedback", "Q4_0 weights, imatrix"),
        ratio(rows, "sdr4 cache", "q4_0 cache"),
        ratio(rows, "sdr4 cache, not rotated", "q4_0 cache, not rotated"),
    ]
    rates = cache_rates(f16, args.threads)
    faster = {"claim": "decoding after 2048 tokens: sdr4 cache / q4_0 cache", "at_least": 1}
    claims.append(faster | {"measured": rates["sdr4"] / rates["q4_0"]})
    save(
        "paper-qrazor", {"model": args.model, "rows": list(rows.values()), "rates": rates, "claims": claims}, args.keep
    )
    judge(claims)


def ratio(rows: dict[str, dict], less: str, more: str) -> dict:
    """The claim that the first is not above the second."""
    measured = rows[less]["mean_kld"] / rows[more]["mean_kld"]
    return {"claim": f"KLD: {less} / {more}", "measured": measured, "at_most": 1}


if __name__ == "__main__":
    run(main)
