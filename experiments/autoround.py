# SPDX-License-Identifier: MIT
"""AutoRound in a process of its own: a model and tokens in, the GGUF file that it exports out. `peers` starts it.

AutoRound is a package of others and no dependency (Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent
for the Quantization of LLMs", arXiv 2309.05516). Its defaults stay but for these. It is given the tokens, so that it
fetches no text. A step takes as many of them as by default, in sequences of another length. Embedding and output are
Q8_0: layers that it tunes behind a smaller embedding belong to that one.
"""

import argparse
from pathlib import Path

STEP = 8 * 2048  # tokens, by default
ENDS = "GGUF:Q8_0"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path, help="a Hugging Face folder")
    p.add_argument("tokens", type=Path, help="int64 [sequences, length], as torch.save writes them")
    p.add_argument("type", help="as q4_k_s")
    p.add_argument("folder", type=Path, help="where the file goes")
    p.add_argument("device")
    p.add_argument("iters", type=int, help="0: scales by an importance matrix, no training")
    p.add_argument("--extended", action="store_true", help="enable_alg_ext")
    args = p.parse_args()

    import torch
    from auto_round import AutoRound
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tokens = torch.load(args.tokens)
    count, length = tokens.shape
    AutoRound(
        str(args.model),
        scheme=f"GGUF:{args.type.upper()}",
        layer_config={name: ENDS for name, module in model.named_modules() if module in ends},
        dataset=list(tokens.split(8)),
        nsamples=count,
        seqlen=length,
        batch_size=STEP // length,
        iters=args.iters,
        device_map=args.device,
        **({"enable_alg_ext": True} if args.extended else {}),
    ).quantize_and_save(str(args.folder), format=f"gguf:{args.type}")


if __name__ == "__main__":
    main()
