# SPDX-License-Identifier: MIT
"""Llama checkpoints with random weights and the demo's tokenizer: for speed and for row lengths, not for quality."""

import json
import math
import shutil
from pathlib import Path

import numpy as np

from gguf_splitq.files import gguf_file

from .common import BUILD, DEMO

# Sizes by parameters; every row is a multiple of 256, so that stock K-quants need no fallback.
SIZES = {
    "0.6B": {"hidden": 1536, "ffn": 4096, "layers": 24, "heads": 24, "kv_heads": 8},
    "1B": {"hidden": 2048, "ffn": 8192, "layers": 17, "heads": 32, "kv_heads": 8},
    "3B": {"hidden": 3072, "ffn": 8192, "layers": 30, "heads": 24, "kv_heads": 8},
}
# 576-wide rows, as in several small models: multiples of 32 and not of 256. Only ffn_down's rows (1536) are.
NARROW = {"hidden": 576, "ffn": 1536, "layers": 4, "heads": 9, "kv_heads": 3}


def tensor_shapes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, tuple]:
    """Hugging Face tensor name -> shape, in file order."""
    kv = hidden // heads * kv_heads
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def random_llama(name: str, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, seed: int = 0) -> Path:
    """Writes an F16 checkpoint to build/NAME, tensor by tensor, and returns the folder; an existing one is reused.

    Matrices are Gaussian with a variance of 1/fan-in, which keeps activations near 1; norms are 1.
    """
    folder = BUILD / name
    weights = folder / "model.safetensors"
    if weights.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copy(DEMO / file, folder)
    config = json.loads((DEMO / "config.json").read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    header, end = {}, 0
    for tensor, shape in (shapes := tensor_shapes(hidden, ffn, layers, heads, kv_heads, config["vocab_size"])).items():
        start, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(seed)
    partial = weights.with_suffix(".partial")
    with partial.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for shape in shapes.values():
            if len(shape) == 1:
                values = np.ones(shape, np.float32)
            else:
                values = rng.standard_normal(shape, np.float32) / math.sqrt(shape[1])
            f.write(values.astype(np.float16).tobytes())
    partial.rename(weights)
    return folder


def repeat_layer(one: Path, outfile: Path, layers: int) -> Path:
    """Writes the GGUF `one`, a model of one layer, again with that layer `layers` times: as fast, sooner made."""
    with gguf_file.read(one) as source:
        count = f"{source.get('general.architecture', str, '')}.block_count"
        kv = source.kv | {count: gguf_file.Value.of(layers)}
        layer = [t for t in source.tensors if t.name.startswith("blk.0.")]
        rest = [t for t in source.tensors if t not in layer]
        names = [(t.name, t) for t in rest]
        names += [(f"blk.{i}." + t.name.removeprefix("blk.0."), t) for i in range(layers) for t in layer]
        with gguf_file.atomic(outfile, layers * source.size) as out:
            out.write(gguf_file.header(kv, [(name, t.shape, t.type_id) for name, t in names]))
            for _, tensor in names:
                out.write(source.read_rows(tensor, 0, tensor.n_rows))
                out.write(b"\0" * (gguf_file.padded(tensor.n_bytes) - tensor.n_bytes))
    return outfile
