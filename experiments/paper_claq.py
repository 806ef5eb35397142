# SPDX-License-Identifier: MIT
"""`make paper-claq`: CLAQ's claims: k-means by column beats linear grids, more bits for some columns and weights pay.

All rows are files of the cq types that llama.cpp runs. Those named "grid" have 2^b even levels from a column's least to
its largest weight in the place of k-means; neither they nor those named "CLAQ" have the scales of rows and the polish
that are ours (coding/codebooks.py), which those named cq have. AP spends all that a file has beyond the plain
type on wide columns, OR all on outliers. Then the same for the model with outlier channels: in about 1 % of the
channels the norms' gains are multiplied by 20 to 50 and what follows is divided by it, which changes nothing in F16.
sq2 and sq3 are there to compare with, and sq2c, sq3c, sq2.x and sq3.x, blocks that spend bits on columns as AP does,
and window codes, with scales of columns (wc, and with open chains wo) and without.
All but "nearest" have error feedback from one calibration. Embeddings and output are F16.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gguf_splitq import output, plan, types
from gguf_splitq.coding import codebooks, free
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Gguf
from gguf_splitq.measure.validate import Baseline
from gguf_splitq.rewrite import each_matrix, rewrite
from gguf_splitq.types.columns import ColumnType, side_name

from .common import BUILD, chosen, convert, judge, model_and_texts, parser, run, save, show

FORMATS = {"method": "", "bpw": ".3f", "ppl": ".3f", "ppl_ratio": ".4f", "mean_kld": "z.5f", "top1": ".1%"}
KEPT = {"token_embedding_type": "f16", "output_tensor_type": "f16"}
PUBLISHED = {"passes": 0, "row_scales": False}
BEYOND = 0.3  # bits per weight that AP and OR get
SHARE = 0.01  # of the channels
FACTORS = 20, 50
NAMES = {  # GGUF's -> transformers'
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
FOLLOWED = {"attn_norm": ("attn_q", "attn_k", "attn_v"), "ffn_norm": ("ffn_gate", "ffn_up")}


def grid(values: np.ndarray, weights: np.ndarray, k: int, centres=None, rounds: int = 0) -> np.ndarray:
    """Even levels between the extremes, in the place of `kmeans`."""
    return np.linspace(values.min(), values.max(), k)


def code(source: Gguf, kind: ColumnType, hessians: Gguf | None, outfile: Path, threads: int, **method) -> Path:
    """A GGUF whose linear layers are in a cq type: by `codebooks.solve`, or `free.with_codebooks` without Hessians.

    hessians: as `convert --aim plain --hessians` writes them. method: more arguments of those two.
    """
    given = (KEPT["token_embedding_type"], KEPT["output_tensor_type"])
    entries = plan.make(source.tensors, kind, (), *given, source.get("general.architecture", str, ""))

    def one(entry: plan.Entry) -> dict[str, np.ndarray]:
        weight, target = torch.from_numpy(np.concatenate(list(each_matrix(source, entry.tensor)))), entry.columns
        if hessians is None:
            packed, side = free.with_codebooks(weight, target, entry.layout, **method)
        else:
            found = codebooks.solve(weight, hessian(hessians, entry.name), target, entry.layout, **method)
            packed, side = found.packed.numpy(), found.side
        return {entry.name: packed, side_name(entry.name): side[None]}

    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        solved = {n: rows for found in pool.map(one, [e for e in entries if e.columns]) for n, rows in found.items()}
    rewrite(source, entries, output.metadata(source.kv, kind, {}), outfile, threads=threads, solved=solved)
    return outfile


def hessian(file: Gguf, name: str) -> torch.Tensor:
    """float64 [n_cols, n_cols]: what was measured for a matrix of a Llama, such as blk.0.attn_q.weight."""
    _, layer, role, _ = name.split(".")
    found = next(t for t in file.tensors if t.name == f"{layer} {NAMES[role]}.weight")
    return torch.from_numpy(file.read_rows(found, 0, found.n_rows).view(np.float32)).double()


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
    exact = convert(model, "f32", folder / "f32.gguf", threads=args.threads)
    hessians, candidate = folder / "hessians.gguf", folder / "candidate.gguf"
    hessians.unlink(missing_ok=True)  # an earlier run's, whose model is not this file
    feedback = {"calib": str(args.calib), "calib_tokens": args.calib_tokens, "hessians": hessians, "aim": "plain"}
    rows = {}
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:

        def row(method: str, file: Path) -> None:
            rows[method] = {"method": method, **base.compare(file)}
            print(f"{method}: {rows[method]['bpw']:.3f} bpw, mean KLD {rows[method]['mean_kld']:.5f}", flush=True)

        def converted(method: str, type: str, **more) -> None:
            row(method, convert(model, type, candidate, threads=args.threads, **KEPT, **feedback, **more))

        row("F16", f16)
        for bits in (4, 3, 2):
            converted(f"cq{bits}", f"cq{bits}")  # the first of them measures the Hessians
            kind = types.get(f"cq{bits}")
            with gguf_file.read(exact) as source, gguf_file.read(hessians) as known:
                given = candidate, args.threads
                row(f"grid {bits}, nearest", code(source, kind, None, *given, cluster=grid, **PUBLISHED))
                row(f"grid {bits}, GPTQ", code(source, kind, known, *given, cluster=grid, **PUBLISHED))
                row(f"CLAQ {bits}", code(source, kind, known, *given, **PUBLISHED))
        for bits in (3, 2):
            target = types.get(f"cq{np.ceil(10 * (rows[f'cq{bits}']['bpw'] + BEYOND)) / 10:.1f}")
            with gguf_file.read(exact) as source, gguf_file.read(hessians) as known:
                for method, share in {"AP": 1.0, "OR": 0.0}.items():
                    kind = replace(target, wide_share=share)
                    row(f"cq{bits} + {method}", code(source, kind, known, candidate, args.threads))
            converted(f"cq{bits} + AP + OR", target.name)
            converted(f"cq{bits} + AP + OR, Outlier Order", target.name, claq_metric="outlier")
            converted(f"sq{bits}", f"sq{bits}")
            converted(f"sq{bits}c", f"sq{bits}c")
            converted(f"sq{bits}w", f"sq{bits}w")
            converted(f"sq{bits}wc", f"sq{bits}wc")
            converted(f"sq{bits}wo", f"sq{bits}wo")
            converted(f"sq{bits} + AP", target.name.replace("cq", "sq"))
        converted("sq4wc", "sq4wc")
    return rows


def ratio(name: str, rows: dict[str, dict], less: str, more: str, **limits) -> dict:
    measured = rows[less]["mean_kld"] / rows[more]["mean_kld"]
    return {"claim": f"{name}: KLD of {less} / {more}", "measured": measured, **limits}


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    p.add_argument("--calib-tokens", type=int, default=131_072)
    args = p.parse_args()
    model = chosen(args)

    folder = BUILD / "paper-claq"
    plain = measure(model, folder / "plain", args)
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
            for peer in (f"cq{bits}", f"sq{bits}c", f"sq{bits}w"):
                claims.append(ratio(name, rows, f"sq{bits}wc", peer, **({"at_most": 1} if rows is outliers else {})))
            claims.append(ratio(name, rows, f"sq{bits}wo", f"sq{bits}wc", at_most=1))
        claims.append(ratio(name, rows, "sq4wc", "cq4", **({"at_most": 1} if rows is outliers else {})))
    same = outliers["F16"]["ppl"] / plain["F16"]["ppl"]
    claims.append({"claim": "F16 with outlier channels: perplexity / plain", "measured": same, "at_most": 1.001})
    rows = {"plain": list(plain.values()), "outliers": list(outliers.values())}
    name = args.model.removesuffix("/").rpartition("/")[2]
    save(f"paper-claq.{name}", {"model": args.model, "rows": rows, "claims": claims}, args.keep)
    judge(claims)


if __name__ == "__main__":
    run(main)
