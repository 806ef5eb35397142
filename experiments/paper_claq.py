"""`make paper-claq`: CLAQ's claims: k-means by column beats linear grids, more bits for some columns and weights pay.

All rows are files of the cq types that llama.cpp runs. Those named "grid" have 2^b even levels from a column's least to
its largest weight in the place of k-means; neither they nor those named "CLAQ" have the scales of rows and the polish
that are ours (coding/codebooks.py), which those named cq have. AP spends all that a file has beyond the plain
type on wide columns, OR all on outliers. Then the same for the model with outlier channels: in about 1 % of the
channels the norms' gains are multiplied by 20 to 50 and what follows is divided by it, which changes nothing in F16.
sq2 and sq3 are there to compare with, and sq2c, sq3c, sq2.x and sq3.x, blocks that spend bits on columns as AP does.
All but "nearest" have error feedback from one calibration. Embeddings and output are F16.
"""

import contextlib
import functools
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from gguf_splitq.coding import codebooks as coder
from gguf_splitq.coding import free
from gguf_splitq.coding.kmeans import kmeans
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Gguf
from gguf_splitq.measure.validate import Baseline
from gguf_splitq.types import claq

from .common import BUILD, convert, judge, model_and_texts, parser, run, save, show

FORMATS = {"method": "", "bpw": ".3f", "ppl": ".3f", "ppl_ratio": ".4f", "mean_kld": "z.5f", "top1": ".1%"}
KEPT = {"token_embedding_type": "f16", "output_tensor_type": "f16"}
BEYOND = 0.3  # bits per weight that AP and OR get
SHARE = 0.01  # of the channels
FACTORS = 20, 50
FOLLOWED = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}


def grid(values: np.ndarray, weights: np.ndarray, k: int, centres=None, rounds: int = 0) -> np.ndarray:
    """Even levels between the extremes, in the place of `kmeans`."""
    return np.linspace(values.min(), values.max(), k)


@contextlib.contextmanager
def as_published(cluster):
    """CLAQ's encoder without the scales of rows and the polish."""

    def same(square: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
        return torch.full_like(square[0], float(square.mean().sqrt()))

    plain = functools.partial(coder.solve, passes=0)
    with mock.patch.multiple(coder, kmeans=cluster, row_sizes=same, solve=plain), mock.patch.object(free, "PASSES", 0):
        yield


def with_outliers(source: Gguf, outfile: Path) -> Path:
    """A copy, in F32, whose norms have outlier channels; the model computes what it did."""
    rng = np.random.default_rng(0)
    tensors = {t.name: t for t in source.tensors}
    divisors = {}
    for name, tensor in tensors.items():
        role = name.split(".")[-2]
        if role in FOLLOWED:
            gain = np.ones(tensor.n_cols, np.float32)
            chosen = rng.permutation(tensor.n_cols)[: max(1, round(SHARE * tensor.n_cols))]
            gain[chosen] = rng.uniform(*FACTORS, len(chosen))
            divisors[name] = 1 / gain
            divisors |= {name.replace(role, follower): gain for follower in FOLLOWED[role]}
    assert divisors.keys() <= tensors.keys()
    with outfile.open("wb") as out:
        out.write(gguf_file.header(source.kv, [(t.name, t.shape, 0) for t in source.tensors]))
        for tensor in source.tensors:
            stored = source.read_rows(tensor, 0, tensor.n_rows)
            rows = stored.view(np.float32 if tensor.type_id == 0 else np.float16).astype(np.float32)
            raw = (rows / divisors.get(tensor.name, np.float32(1))).astype(np.float32).tobytes()
            out.write(raw.ljust(gguf_file.padded(len(raw)), b"\0"))
    return outfile


def measure(model: Path, folder: Path, args) -> dict[str, dict]:
    """Method -> its row, for one model."""
    folder.mkdir(parents=True, exist_ok=True)
    f16 = convert(model, "f16", folder / "f16.gguf", threads=args.threads)
    hessians = folder / "hessians.gguf"
    hessians.unlink(missing_ok=True)  # an earlier run's, whose model is not this file
    feedback = {"calib": str(args.calib), "calib_tokens": args.calib_tokens, "hessians": hessians}
    rows = {}
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:

        def row(method: str, type: str, options: dict = feedback) -> None:
            file = convert(model, type, folder / "candidate.gguf", threads=args.threads, **KEPT, **options)
            rows[method] = {"method": method, **base.compare(file)}
            print(f"{method}: {rows[method]['bpw']:.3f} bpw, mean KLD {rows[method]['mean_kld']:.5f}", flush=True)

        rows["F16"] = {"method": "F16", **base.compare(f16)}
        for bits in (4, 3, 2):
            with as_published(grid):
                row(f"grid {bits}, nearest", f"cq{bits}", {})
                row(f"grid {bits}, GPTQ", f"cq{bits}")
            with as_published(kmeans):
                row(f"CLAQ {bits}", f"cq{bits}")
            row(f"cq{bits}", f"cq{bits}")
        for bits in (3, 2):
            target = f"cq{np.ceil(10 * (rows[f'cq{bits}']['bpw'] + BEYOND)) / 10:.1f}"
            for method, share in {"AP": 1.0, "OR": 0.0, "AP + OR": claq.WIDE_SHARE}.items():
                with mock.patch.object(claq, "WIDE_SHARE", share):
                    row(f"cq{bits} + {method}", target)
            row(f"cq{bits} + AP + OR, Outlier Order", target, feedback | {"claq_metric": "outlier"})
            row(f"sq{bits}", f"sq{bits}")
            row(f"sq{bits}c", f"sq{bits}c")
            row(f"sq{bits} + AP", target.replace("cq", "sq"))
    return rows


def ratio(name: str, rows: dict[str, dict], less: str, more: str, **limits) -> dict:
    measured = rows[less]["mean_kld"] / rows[more]["mean_kld"]
    return {"claim": f"{name}: KLD of {less} / {more}", "measured": measured, **limits}


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    p.add_argument("--calib-tokens", type=int, default=131_072)
    args = p.parse_args()

    folder = BUILD / "paper-claq"
    plain = measure(args.model, folder / "plain", args)
    with gguf_file.read(folder / "plain" / "f16.gguf") as source:
        modified = with_outliers(source, folder / "outliers.gguf")
    outliers = measure(modified, folder / "outliers", args)

    claims = []
    for name, rows in {"plain": plain, "outlier channels": outliers}.items():
        show(f"{args.model}, {name}, {rows['F16']['chunks']} chunks of {args.text}", list(rows.values()), FORMATS)
        for bits in (4, 3, 2):
            claims.append(ratio(name, rows, f"CLAQ {bits}", f"grid {bits}, GPTQ", at_most=1))
            claims.append(ratio(name, rows, f"cq{bits}", f"CLAQ {bits}", at_most=1))
        for bits in (3, 2):
            both = f"cq{bits} + AP + OR"
            claims += [ratio(name, rows, both, f"cq{bits} + {one}") for one in ("AP", "OR")]
            claims.append(ratio(name, rows, both, f"{both}, Outlier Order"))
            claims.append(ratio(name, rows, f"cq{bits}", f"sq{bits}", **({"at_most": 1} if rows is outliers else {})))
            claims.append(ratio(name, rows, f"sq{bits}c", f"sq{bits}", **({"at_most": 1} if rows is outliers else {})))
            claims.append(ratio(name, rows, f"sq{bits} + AP", both, at_most=1))
    same = outliers["F16"]["ppl"] / plain["F16"]["ppl"]
    claims.append({"claim": "F16 with outlier channels: perplexity / plain", "measured": same, "at_most": 1.001})
    rows = {"plain": list(plain.values()), "outliers": list(outliers.values())}
    save("paper-claq", {"model": str(args.model), "rows": rows, "claims": claims})
    judge(claims)


if __name__ == "__main__":
    run(main)
