# SPDX-License-Identifier: MIT
"""Runs llama.cpp's own converter on a Hugging Face folder, with the tree's own gguf-py, in bounded memory.

usage: hf_to_gguf.py TREE FOLDER OUTFILE OUTTYPE NAME [--header-only | --mmproj]

Prints the line `header` once everything before the tensor data is on disk, then writes the data; before it lines
`note TEXT`, with TEXT in JSON, `aside N 0|1`, the number of tensors of a vision or audio part that are left out and
whether --mmproj can write them, and `at JSON`, [name, [[file, offset, bytes], ...]] of each tensor that is in the
checkpoint as it would be written: it is not written, OUTFILE has a hole in its place. With --mmproj all is written. On
failure the last line is a JSON object with `kind` (unsupported, environment, disk or input) and `message`. Six things
of upstream's are changed from outside:

- Tensors that are stored as they should be are not copied.
- Tensors are read into memory that is given back, not mapped: pages of a mapped checkpoint stay resident.
- A tensor is evaluated, rounded and written in pieces. Upstream widens bf16 to f32 and keeps every intermediate step,
  ten bytes per weight; here a stack of experts is taken one expert at a time and the widening happens on a few rows.
- A tensor that two shards hold is taken from the one that the index names, not from the last.
- Layers for multi-token prediction that are declared and not there are no longer declared.
- Python code that comes with a checkpoint is never run.
"""

import errno
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

WEIGHTS_AT_ONCE = 1 << 20  # per rounded piece
LAYERS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")
MTP_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
ASIDE = r"vis|vit\.|vpm|image|audio|speech|sound|patch_|projector|merger|resampler|siglip|conformer|connector|talker"
PACKED = (".qweight", ".qzeros", "_packed", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax", ".quant_map")


def main(known: dict, tree: str, folder: str, outfile: str, outtype: str, name: str, *flags: str) -> None:
    """known: gets what `explain` can use."""
    sys.path[0:1] = [tree, str(Path(tree) / "gguf-py")]
    never_run_foreign_code()
    import torch

    torch.set_num_threads(1)
    import conversion
    import gguf

    read_instead_of_mapping(gguf)
    take_what_the_index_names(gguf, Path(folder))
    write_in_pieces(gguf, conversion.LazyTorchTensor, torch)

    def write_tensors(writer: Any, progress: bool = False) -> None:
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        out.flush()
        tensors = [] if "--header-only" in flags else list(writer.tensors[0].items())
        places = {} if "--mmproj" in flags else {name: place(info.tensor) for name, info in tensors}
        for found in places.items():
            if found[1]:
                print("at", json.dumps(found))
        print("header", flush=True)
        for name, info in tensors:
            if places.get(name):
                out.seek(info.nbytes, os.SEEK_CUR)
            else:
                info.tensor.tofile(out)
            writer.write_padding(out, info.nbytes)
            info.tensor = None
        out.truncate()  # a hole may be the last

    gguf.GGUFWriter.write_tensors_to_file = write_tensors
    known["names"] = tensor_names(gguf, Path(folder))
    with torch.inference_mode():
        known["config"] = config = conversion.ModelBase.load_hparams(Path(folder), False)
        mmproj = "--mmproj" in flags
        kind = conversion.ModelType.MMPROJ if mmproj else conversion.ModelType.TEXT
        architecture = conversion.get_model_architecture(config, kind)
        if mmproj and architecture not in conversion.MMPROJ_MODEL_MAP:
            raise NotImplementedError(f"it makes no mmproj file for {architecture}: leave --mmproj out")
        model_class = conversion.get_model_class(architecture, mmproj)
        changed = {} if mmproj else declare_no_lost_mtp(model_class, config, known["names"])
        dropped = record_dropped(model_class)
        file_type = gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[outtype]]
        model = model_class(Path(folder), file_type, Path(outfile), model_name=name or None, **changed)
        known["model"] = model
        if aside := [] if mmproj else [n for n in dropped if re.search(ASIDE, n)]:
            able = (config.get("architectures") or [""])[0] in conversion.MMPROJ_MODEL_MAP
            print(f"aside {len(aside)} {int(able)}", flush=True)
        model.write()


def tensor_names(gguf: Any, folder: Path) -> set[str]:
    """The tensors of the checkpoint's own files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_bytes())["weight_map"])
    return {name for part in folder.glob("model*.safetensors") for name in gguf.utility.SafetensorsLocal(part).tensors}


def record_dropped(model_class: Any) -> list[str]:
    """A list that the names of the tensors which the class does not take are put into."""
    plain, dropped = model_class.filter_tensors, []

    def filter_tensors(item: Any) -> Any:
        result = plain(item)
        if result is None:
            dropped.append(item[0])
        return result

    model_class.filter_tensors = staticmethod(filter_tensors)
    return dropped


def declare_no_lost_mtp(model_class: Any, config: dict, names: set[str]) -> dict:
    """Options with which the class asks for no layers of multi-token prediction where the checkpoint has none."""
    text = text_part(config)
    layers = number_of(text, LAYERS)[1] or 0
    if any(re.search(r"(^|[._])(mtp|nextn)[._]", name) for name in names) or n_layers(names) > layers:
        return {}
    if model_class.supports_mtp_export:
        model_class.no_mtp = True
    declared = {key: text[key] for key in MTP_LAYERS if isinstance(text.get(key), int) and text[key] > 0}
    for key, count in declared.items():
        text[key] = 0
        what = f"{count} MTP layer{'s' if count > 1 else ''}"
        print("note", json.dumps(f"{key} declares {what}, not in the checkpoint: left out of the file"), flush=True)
    return {"hparams": config} if declared else {}


def text_part(config: dict) -> dict:
    """The configuration of the language model."""
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def number_of(config: dict, keys: Any) -> tuple[str, int | None]:
    """The first of the keys that is there, and its value."""
    return next(((key, config[key]) for key in keys if isinstance(config.get(key), int)), (keys[0], None))


def n_layers(names: Any) -> int:
    """Layers of the language model that have tensors."""
    own = [name for name in names if not re.search(ASIDE, name)]
    return 1 + max((int(m[1]) for n in own if (m := re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", n))), default=-1)


def read_instead_of_mapping(gguf: Any) -> None:
    """Read a tensor's bytes into memory that is given back."""
    import numpy as np

    def read(self: Any) -> Any:
        where = self.data_range
        return np.fromfile(where.filename, np.uint8, count=where.size, offset=where.offset)

    gguf.utility.LocalTensor.mmap_bytes = read


def take_what_the_index_names(gguf: Any, folder: Path) -> None:
    """A tensor that two shards hold is taken from the one that the index names."""
    index, local = folder / "model.safetensors.index.json", gguf.utility.SafetensorsLocal
    where = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}
    enter = local.__init__

    def __init__(self: Any, filename: Any) -> None:
        enter(self, filename)
        mine = Path(filename)
        self.tensors = {n: t for n, t in self.tensors.items() if n not in where or folder / where[n] == mine}

    local.__init__ = __init__


def write_in_pieces(gguf: Any, lazy: Any, torch: Any) -> None:
    """Make each lazy tensor that goes to the file a `Pieces`, and let lazy tensors remember what they were made of.

    `origin` is a list of lazy tensors which, one after another and widened to float32, are the tensor: the narrow
    tensor of a widening, the parts of a stack or concatenation. Any other operation makes a lazy tensor without an
    origin, which is then evaluated whole.
    """
    quantize, torch_function = gguf.quants.quantize, lazy.__torch_function__
    to, numpy = (lambda self: lazy.__getattr__(self, "to")), lazy.numpy
    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

    def remember_widening(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = to(self)(*args, **kwargs)
        if args == (torch.float32,) and not kwargs and self.dtype in stored:
            result.origin = [self]
        return result

    def remember_stack(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = torch_function(func, types, args, kwargs)
        first_dimension = [*args[1:], *(kwargs or {}).items()] in ([], [0], [("dim", 0)])
        if func in (torch.stack, torch.cat) and first_dimension and all(type(part) is cls for part in args[0]):
            result.origin = list(args[0])
        return result

    def remember_torch(self: Any) -> Any:
        result = numpy(self)
        result.torch = self
        return result

    def quantize_later(data: Any, qtype: Any) -> Any:
        result = quantize(data, qtype)
        known = isinstance(data, gguf.LazyNumpyTensor) and "torch" in data.__dict__
        return Pieces(data.torch, qtype, result) if known else result

    class Pieces:
        """What gguf's writer needs of a tensor; evaluated and rounded while it is written."""

        def __init__(self, source: Any, qtype: Any, like: Any) -> None:
            self.source, self.qtype = source, qtype
            self.shape, self.dtype, self.nbytes = like.shape, like.dtype, like.nbytes

        def stored_parts(self) -> list[Any]:
            """The tensors of the checkpoint whose bytes, one after another, are this tensor's; none if it is made."""
            leaves = origins(self.source)
            read = all(leaf._data is None and len(leaf._args) == 1 for leaf in leaves)
            parts = [leaf._args[0] for leaf in leaves if read and stored.get(leaf.dtype) == self.qtype.name]
            local = len(parts) == len(leaves) and all(isinstance(p, gguf.utility.LocalTensor) for p in parts)
            return parts if local else []

        def tofile(self, out: Any) -> None:
            start = out.tell()
            for part in evaluated(origins(self.source)):
                rows = part.reshape(-1, part.shape[-1] if part.dim() else 1)
                step = max(1, WEIGHTS_AT_ONCE // rows.shape[1])
                for at in range(0, rows.shape[0], step):
                    piece = rows[at : at + step].contiguous()
                    if stored.get(piece.dtype) == self.qtype.name:
                        out.write(piece.view(torch.uint8).numpy())
                    else:
                        out.write(quantize(piece.to(torch.float32).numpy(), self.qtype))
                del part, rows, piece
            assert out.tell() - start == self.nbytes

    def origins(tensor: Any) -> Any:
        parts = tensor.__dict__.get("origin")
        return [tensor] if parts is None else [leaf for part in parts for leaf in origins(part)]

    def evaluated(roots: Any) -> Any:
        """The values of lazy tensors, one at a time; a value is dropped when the last one that needs it is done."""
        uses: dict[int, int] = {}
        kept: dict = {}

        def count(node: Any) -> None:
            uses[id(node)] = uses.get(id(node), 0) + 1
            if uses[id(node)] == 1 and node._data is None:
                lazy._recurse_apply(node._args, count)

        def evaluate(node: Any) -> Any:
            uses[id(node)] -= 1
            value = kept.pop(id(node), node._data)
            if value is None:
                value = node._func(*lazy._recurse_apply(node._args, evaluate), **node._kwargs)
            if uses[id(node)]:
                kept[id(node)] = value
            return value

        for root in roots:
            count(root)
        for root in roots:
            yield evaluate(root)

    lazy.to, lazy.numpy, lazy.__torch_function__ = remember_widening, remember_torch, classmethod(remember_stack)
    gguf.quants.quantize = quantize_later


def place(tensor: Any) -> list[tuple[str, int, int]]:
    """(file, offset, bytes) of the parts of the checkpoint that a tensor of the writer's is; none if it is made."""
    parts = tensor.stored_parts() if hasattr(tensor, "stored_parts") else []
    ranges = [(str(p.data_range.filename), p.data_range.offset, p.data_range.size) for p in parts]
    return ranges if sum(size for _, _, size in ranges) == tensor.nbytes else []


def never_run_foreign_code() -> None:
    """Python code that comes with a checkpoint is not run, whoever asks for it.

    To be called before transformers' auto classes are imported, which takes seconds: they ask this function.
    """
    from transformers import dynamic_module_utils

    plain = dynamic_module_utils.resolve_trust_remote_code

    def resolve(trust_remote_code: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(False, *args, **kwargs)

    dynamic_module_utils.resolve_trust_remote_code = resolve


def explain(error: BaseException, names: Any = frozenset(), config: Any = None, model: Any = None) -> dict:
    """The kind and one line of an upstream failure, with what the checkpoint itself says about the cause."""
    text = " ".join(str(error).split())
    if not text:  # an assertion without words
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = frame.line or type(error).__name__
    if isinstance(error, (ImportError, MemoryError)):
        return {"kind": "environment", "message": f"{type(error).__name__}: {text}"}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return {"kind": "disk", "message": text}
    if config and (method := quantization(config, names)):
        return {
            "kind": "unsupported",
            "message": f"it is quantized with {method} ({text}): get the BF16 or F16 original, or save it dequantized",
        }
    if isinstance(error, NotImplementedError) or "trust_remote_code" in text or "execute the" in text:
        return {"kind": "unsupported", "message": text}
    if isinstance(error, json.JSONDecodeError) and model and (broken := broken_json(model.dir_model)):
        return {"kind": "input", "message": f"{broken} is not valid JSON: get it again"}
    if getattr(model, "preprocessor_config", None) == {}:
        return {
            "kind": "input",
            "message": f"it has no preprocessor_config.json ({text}): get it, or leave --mmproj out",
        }
    if config and (cause := contradiction(config, names, model)):
        return {"kind": "input", "message": f"{cause}: correct config.json or get the checkpoint again"}
    return {"kind": "input", "message": f"{type(error).__name__}: {text}"}


def quantization(config: dict, names: Any) -> str | None:
    """What the weights are quantized with, as the configuration or their names tell."""
    for part in (config, text_part(config)):
        if isinstance(part.get("quantization_config"), dict):
            return part["quantization_config"].get("quant_method") or "an unknown method"
    return "an unknown method" if any(name.endswith(PACKED) for name in names) else None


def contradiction(config: dict, names: Any, model: Any) -> str | None:
    """A number of the configuration that the tensors or the tokenizer do not bear out."""
    text = text_part(config)
    key, layers = number_of(text, LAYERS)
    found, mtp = n_layers(names), number_of(text, MTP_LAYERS)[1] or 0
    if layers is not None and found and not layers <= found <= layers + mtp:
        return f"{key} is {layers} and the checkpoint has {found} layers"
    vocabulary = text.get("vocab_size")
    if not isinstance(vocabulary, int):
        return None
    for name, tensor in getattr(model, "model_tensors", {}).items():
        if re.search(r"(embed_tokens|wte|word_embeddings|tok_embeddings)\.weight$", name):
            rows = tensor().shape[0]
            if rows != vocabulary:
                return f"vocab_size is {vocabulary} and the embedding has {rows} rows"
    largest = largest_token(model.dir_model) if model else -1
    return f"vocab_size is {vocabulary} and the tokenizer has a token {largest}" if largest >= vocabulary else None


def broken_json(folder: Path) -> str | None:
    """The name of a file that upstream could not read."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return path.name
    return None


def largest_token(folder: Path) -> int:
    """The largest id in tokenizer.json, -1 where that cannot be told."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        return max(ids + [token["id"] for token in content.get("added_tokens", [])])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


if __name__ == "__main__":
    known: dict = {}
    try:
        main(known, *sys.argv[1:])
    except Exception as error:
        if "SPLITQ_DEBUG" in os.environ:
            traceback.print_exc()
        print(json.dumps(explain(error, **known)), flush=True)
        sys.exit(1)
