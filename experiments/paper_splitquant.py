# SPDX-License-Identifier: MIT
"""`make paper-splitquant`: SplitQuantV2's claim that split INT4 stays close to floating point and plain INT4 does not.

Every linear layer and the output matrix are quantized, as the authors do; embeddings and norms are not
(arXiv 2503.07657; jaewoosong/splitquant, splitquant.py). All rows but sq4x are simulated: the weights are quantized,
decoded and stored as F16. Linear quantization is the paper's: 2^b even steps between a minimum and a maximum.
"""

from pathlib import Path

import numpy as np

from gguf_splitq.coding.kmeans import kmeans
from gguf_splitq.files import gguf_file
from gguf_splitq.measure.validate import Baseline

from .common import BUILD, chosen, convert, judge, model_and_texts, parser, run, save, show

CLOSE = 1.05  # the perplexity ratio up to which a model counts as close to F16
CLUSTER_BITS = 2  # which of the three clusters a weight is in
FORMATS = {"method": "", "bpw": ".2f", "ppl": ".3f", "ppl_ratio": ".4f", "mean_kld": "z.5f", "top1": ".1%"}


def linear(w: np.ndarray, bits: int) -> np.ndarray:
    """Quantizes and decodes with 2^bits even steps from min(w) to max(w); zero is in range and is one of the levels."""
    low, high = min(w.min(), 0), max(w.max(), 0)
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(w / step) + zero, 0, 2**bits - 1) - zero) * step


def linear_tight(w: np.ndarray, bits: int) -> np.ndarray:
    """The same without zero in range: what a format can do that stores each weight's cluster."""
    step = (w.max() - w.min()) / (2**bits - 1)
    return w.min() + np.rint((w - w.min()) / step) * step


def boundaries(w: np.ndarray) -> np.ndarray:
    """Midpoints between the centres of one-dimensional k-means (k = 3) on all weights."""
    centres = kmeans(w.ravel(), np.ones(w.size), 3, rounds=1000)
    return (centres[1:] + centres[:-1]) / 2


def split(w: np.ndarray, bits: int, quantizer=linear) -> np.ndarray:
    """SplitQuantV2: the three clusters of a tensor are quantized on their own."""
    out, cluster = np.empty_like(w), np.searchsorted(boundaries(w), w)
    for i in range(3):
        out[cluster == i] = quantizer(w[cluster == i], bits)
    return out


def split_tight(w: np.ndarray, bits: int) -> np.ndarray:
    return split(w, bits, linear_tight)


METHODS = {  # name -> (function, stored bits per weight beside the code's own)
    "per tensor": (linear, 0),
    "SplitQuantV2": (split, CLUSTER_BITS),
    "SplitQuantV2, tight ranges": (split_tight, CLUSTER_BITS),
}


def simulate(f16: Path, outfile: Path, method, bits: int, kept=("token_embd.weight",)) -> Path:
    """A copy of an F16 GGUF whose matrices, but those named in `kept`, went through `method(weights, bits)`."""
    with gguf_file.read(f16) as source, outfile.open("wb") as out:
        out.write(gguf_file.header(source.kv, [(t.name, t.shape, t.type_id) for t in source.tensors]))
        for tensor in source.tensors:
            data = source.read_rows(tensor, 0, tensor.n_rows)
            if len(tensor.shape) > 1 and tensor.name not in kept:
                data = method(data.view(np.float16).astype(np.float32), bits).astype(np.float16)
            raw = data.tobytes()
            out.write(raw.ljust(gguf_file.padded(len(raw)), b"\0"))
    return outfile


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    args = p.parse_args()
    model = chosen(args)

    folder = BUILD / "paper"
    f16 = convert(model, "f16", folder / "f16.gguf", threads=args.threads)
    rows = []
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:
        rows.append({"method": "F16", **base.compare(f16)})
        for bits in (4, 2):
            for name, (method, extra_bits) in METHODS.items():
                result = base.compare(simulate(f16, folder / "simulated.gguf", method, bits))
                rows.append({"method": f"INT{bits} {name}", **result, "bpw": bits + extra_bits})
                print(f"INT{bits} {name}: mean KLD {result['mean_kld']:.5f}", flush=True)
        types = {"token_embedding_type": "f16", "output_tensor_type": "sq4x"}
        sq4x = convert(f16, "sq4x", folder / "sq4x.gguf", threads=args.threads, **types)
        rows.append({"method": "sq4x (per group, real type)", **base.compare(sq4x)})

    show(f"{args.model} on {base.chunks} chunks of {args.text}", rows, FORMATS)
    print("bpw of SplitQuantV2 is packed: cluster + code; the published three dense layers take 12 at INT4, 6 at INT2.")
    _, plain, split4, *_, group = rows  # as they stand above: F16, the methods at 4 and at 2 bits, sq4x
    claims = [
        {"claim": "perplexity of plain INT4 / F16", "measured": plain["ppl_ratio"], "at_least": CLOSE},
        {"claim": "perplexity of split INT4 / F16", "measured": split4["ppl_ratio"], "at_most": CLOSE},
        {"claim": "perplexity of sq4x / F16", "measured": group["ppl_ratio"], "at_most": CLOSE},
        {"claim": "KLD of split / plain INT4", "measured": split4["mean_kld"] / plain["mean_kld"]},
        {"claim": "KLD of sq4x / plain INT4", "measured": group["mean_kld"] / plain["mean_kld"]},
    ]
    save("paper-splitquant", {"model": args.model, "rows": rows, "claims": claims}, args.keep)
    judge(claims)


if __name__ == "__main__":
    run(main)
