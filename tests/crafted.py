# SPDX-License-Identifier: MIT
"""Small models and importance matrices for the tests, made with upstream's own writers where there are any."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def weights(*shape, seed=0, scale=0.05):
    """Gaussian float32 weights."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def llama_tensors(hidden=64, ffn=96, blocks=2, vocab=128, experts=0):
    """name -> float32, with the names and shapes of a llama GGUF; experts make its feed-forward tensors 3-D."""
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}
    for i in range(blocks):
        stack, suffix = ((experts,), "_exps") if experts else ((), "")
        shapes |= {f"blk.{i}.attn_norm.weight": (hidden,), f"blk.{i}.ffn_norm.weight": (hidden,)}
        shapes |= {f"blk.{i}.attn_{n}.weight": (hidden, hidden) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{n}{suffix}.weight": (*stack, ffn, hidden) for n in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down{suffix}.weight": (*stack, hidden, ffn)}
        if experts:
            shapes[f"blk.{i}.ffn_gate_inp.weight"] = (experts, hidden)
    return {name: weights(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


def write_gguf(path, tensors, type="F16", alignment=None):
    """A GGUF by upstream's writer; 1-D tensors and the expert gate stay F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_description("a model for tests")
    writer.add_uint32("llama.block_count", 2)
    writer.add_token_list(["<unk>", "ä", "b\n"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, data in tensors.items():
        kept = data.ndim < 2 or "gate_inp" in name
        kind = gguf.GGMLQuantizationType["F32" if kept else type]
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def read_gguf(path):
    """(key -> value, tensor name -> (type name, NumPy data)) by upstream's reader, independent of ours.

    A container is read as what it stands for: its keys are left out, its tensors have their types and bytes.
    """
    from gguf_splitq import types

    types.register_with_gguf()
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    version, names, ids = (keys.pop(f"gguf_splitq.container.{key}", []) for key in ("version", "tensors", "types"))
    listed = dict(zip(names, ids, strict=True))
    keys["GGUF.kv_count"] -= 3 if version else 0
    tensors = {}
    for t in reader.tensors:
        kind, data = gguf.GGMLQuantizationType(listed.get(t.name, t.tensor_type)).name, np.array(t.data)
        tensors[t.name] = (kind, data.view(np.uint8) if t.name in listed else data)
    return keys, tensors


def hf_folder(folder, kind="llama", dtype="bfloat16", shard="100KB", **options):
    """A tiny random checkpoint with the demo's tokenizer: `kind` llama or mixtral, options of its configuration."""
    import torch
    import transformers

    torch.manual_seed(0)
    common = dict(vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    common |= dict(num_key_value_heads=1, max_position_embeddings=128) | options
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        config = transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder)
    return Path(folder)


def copy_demo(folder):
    """The demo checkpoint, to be damaged."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", *TOKENIZER):
        shutil.copy(DEMO / name, folder)
    return folder


def split_demo(folder):
    """The demo checkpoint with an index, as a sharded one has it."""
    folder = copy_demo(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    from safetensors import safe_open

    with safe_open(folder / "model-00001-of-00001.safetensors", "numpy") as file:
        names = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def legacy_imatrix(path, entries, chunks=3, dataset="calib.txt"):
    """The .dat format: name -> (sums, calls)."""
    out = struct.pack("<i", len(entries))
    for name, (sums, calls) in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(sums))
        out += np.asarray(sums, "<f4").tobytes()
    path.write_bytes(out + struct.pack("<ii", chunks, len(dataset)) + dataset.encode())
    return path


def gguf_imatrix(path, entries, chunks=3, dataset="calib.txt"):
    """The GGUF format: name -> (sums [experts, n_cols], counts [experts])."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(name + ".in_sum2", np.asarray(sums, np.float32))
        writer.add_tensor(name + ".counts", np.asarray(counts, np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
