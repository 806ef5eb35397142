"""`make quality`: KL divergence of every type beside llama.cpp's own, and what really is stored of 576-wide rows.

Only the linear layers differ: embeddings and output are F16 everywhere. Peers are made by `llama-quantize --pure` from
the same F16 file, with the same importance matrix.
"""

from pathlib import Path

from gguf_splitq.validate import Baseline

from . import models
from .common import BUILD, DEMO, convert, imatrix, judge, model_and_texts, parser, quantize, run, save, show

OURS = ["sq4", "sq3", "sq2", "sq4x"]
PEERS = ["Q4_K", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XS"]
NEEDS_IMATRIX = {"IQ2_XS"}  # llama-quantize refuses it without
USES_NO_DATA = {"sq4x"}
NARROW = ["sq4", "sq3", "sq2", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K", "IQ2_XS"]
FORMATS = {
    "type": "",
    "imatrix": "",
    "bpw": ".2f",
    "ppl_ratio": ".4f",
    "mean_kld": "z.5f",
    "p99_kld": ".4f",
    "top1": ".1%",
}
NARROW_FORMATS = {"type": "", "bpw": ".2f", "mean_kld": "z.5f"}


def make(f16: Path, type: str, matrix: Path | None, threads: int) -> Path:
    """A file of `type`, ours or stock, in the one scratch place."""
    outfile = BUILD / "quality" / "candidate.gguf"
    if type in OURS:
        kept = {"token_embedding_type": "f16", "output_tensor_type": "f16"}
        return convert(f16, type, outfile, imatrix=matrix and str(matrix), threads=threads, **kept)
    options = ["--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    return quantize(f16, type, outfile, threads, *options, *(["--imatrix", matrix] if matrix else []))


def measure(f16: Path, base: Baseline, types: list[str], matrices: list[Path | None], threads: int) -> list[dict]:
    """One row per type and importance matrix."""
    rows = []
    for type in types:
        for matrix in matrices:
            if type in (USES_NO_DATA if matrix else NEEDS_IMATRIX):
                continue
            result = base.compare(make(f16, type, matrix, threads))
            rows.append({"type": type, "imatrix": "yes" if matrix else "no", **result})
            print(f"{type:8}{'with' if matrix else 'no':>5} imatrix  mean KLD {result['mean_kld']:.5f}", flush=True)
    return rows


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    args = p.parse_args()

    f16 = convert(args.model, "f16", BUILD / "quality" / "f16.gguf", threads=args.threads)
    matrix = imatrix(f16, args.calib, BUILD / "quality" / "imatrix.gguf", args.threads)
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:
        rows = measure(f16, base, OURS + PEERS, [None, matrix], args.threads)
    show(f"{args.model} on {base.chunks} chunks of {args.text}, F16 perplexity {base.ppl:.3f}", rows, FORMATS)

    narrow = convert(models.random_llama("narrow", **models.NARROW), "f16", BUILD / "quality" / "narrow-f16.gguf")
    matrix = imatrix(narrow, DEMO / "calib.txt", BUILD / "quality" / "narrow-imatrix.gguf", args.threads, chunks=4)
    with Baseline(narrow, DEMO / "eval.txt", chunks=2, threads=args.threads) as base:
        narrow_rows = measure(narrow, base, NARROW, [matrix], args.threads)
    show("576-wide rows, random weights: stored size, and that it runs", narrow_rows, NARROW_FORMATS)

    kld = {(row["type"], row["imatrix"]): row["mean_kld"] for row in rows}
    bpw = {row["type"]: row["bpw"] for row in narrow_rows}
    claims = [
        ratio("sq4", "IQ4_XS", "no", kld) | {"at_most": 1.0},
        ratio("sq4", "IQ4_XS", "yes", kld) | {"at_most": 1.0},
        ratio("sq3", "Q3_K", "yes", kld) | {"at_most": 1.25},
        ratio("sq2", "Q2_K", "yes", kld),
        ratio("sq2", "IQ2_XS", "yes", kld),
        {"claim": "bits per weight of sq3 on 576-wide rows", "measured": bpw["sq3"], "at_most": 3.25},
        {"claim": "bits per weight of sq2 on 576-wide rows", "measured": bpw["sq2"], "at_most": 2.25},
    ]
    save("quality", {"model": str(args.model), "rows": rows, "narrow": narrow_rows, "claims": claims})
    judge(claims)


def ratio(ours: str, peer: str, with_imatrix: str, kld: dict) -> dict:
    """The claim that compares two mean KL divergences."""
    measured = kld[ours, with_imatrix] / kld[peer, with_imatrix]
    return {"claim": f"KLD of {ours} / {peer}, imatrix: {with_imatrix}", "measured": measured}


if __name__ == "__main__":
    run(main)
