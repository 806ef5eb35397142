"""`make feedback`: what error feedback gains over an importance matrix from the same text, at the same stored bits.

Embeddings and output are F16 everywhere. "imatrix" files of stock types are llama-quantize's own (`--pure --imatrix`);
"feedback" files are made by `gguf-splitq convert --calib`, from the same calibration text.
"""

from gguf_splitq.validate import Baseline

from .common import BUILD, convert, imatrix, judge, model_and_texts, parser, run, save, show
from .quality import FORMATS, OURS, make

TYPES = ["sq4", "sq3", "sq2", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_0"]
COLUMNS = {"data" if key == "imatrix" else key: spec for key, spec in FORMATS.items()}
KEPT = {"token_embedding_type": "f16", "output_tensor_type": "f16"}


def main() -> None:
    p = parser(__doc__)
    model_and_texts(p)
    p.add_argument("--tokens", type=int, default=131_072, help="tokens of the calibration text to use")
    p.add_argument("--type", action="append", default=[], help="only these types; may be repeated")
    args = p.parse_args()

    folder = BUILD / "feedback"
    f16 = convert(args.model, "f16", folder / "f16.gguf", threads=args.threads)
    matrix = imatrix(f16, args.calib, folder / "imatrix.gguf", args.threads, chunks=args.tokens // 512)
    rows, claims = [], []
    with Baseline(f16, args.text, chunks=args.chunks, threads=args.threads) as base:
        for type in args.type or TYPES:
            weighted = base.compare(make(f16, type, matrix, args.threads))
            options = {"calib": args.calib, "calib_tokens": args.tokens, "threads": args.threads}
            fed = base.compare(convert(args.model, type.lower(), folder / "fed.gguf", **options, **KEPT))
            rows += [{"type": type, "data": "imatrix", **weighted}, {"type": type, "data": "feedback", **fed}]
            ratio = fed["mean_kld"] / weighted["mean_kld"]
            claims.append({"claim": f"KLD of {type}: feedback / imatrix", "measured": ratio, "at_most": 1.0})
            print(f"{type:8} imatrix {weighted['mean_kld']:.5f}  feedback {fed['mean_kld']:.5f}", flush=True)
    show(f"{args.model} on {base.chunks} chunks of {args.text}, F16 perplexity {base.ppl:.3f}", rows, COLUMNS)
    kld = {row["type"]: row["mean_kld"] for row in rows if row["data"] == "feedback"}
    stock = {row["type"]: row["mean_kld"] for row in rows if row["data"] == "imatrix" and row["type"] not in OURS}
    for peer in ("IQ4_XS", "Q4_K"):
        if "sq4" in kld and peer in stock:
            claim = f"KLD of sq4 with feedback / {peer} with imatrix"
            claims.append({"claim": claim, "measured": kld["sq4"] / stock[peer]})
    save("feedback", {"model": str(args.model), "tokens": args.tokens, "rows": rows, "claims": claims})
    judge(claims)


if __name__ == "__main__":
    run(main)
