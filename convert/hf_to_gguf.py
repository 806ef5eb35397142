"""Runs llama.cpp's own converter on a Hugging Face folder, with the tree's own gguf-py, in bounded memory.

usage: hf_to_gguf.py TREE FOLDER OUTFILE OUTTYPE NAME [--header-only]

Prints the line `header` once everything before the tensor data is on disk, then writes the data. On failure the last
line is a JSON object with `kind` (unsupported, environment, disk or input) and `message`. Four things of upstream's
are changed from outside:

- Tensors are read into memory that is given back, not mapped: pages of a mapped checkpoint stay resident.
- A tensor is evaluated, rounded and written in pieces. Upstream widens bf16 to f32 and keeps every intermediate step,
  ten bytes per weight; here a stack of experts is taken one expert at a time and the widening happens on a few rows.
- A tensor that two shards hold is taken from the one that the index names, not from the last.
- Python code that comes with a checkpoint is never run.
"""

import errno
import json
import os
import sys
from pathlib import Path

WEIGHTS_AT_ONCE = 1 << 20  # per rounded piece


def main(tree: str, folder: str, outfile: str, outtype: str, name: str, *flags: str) -> None:
    sys.path[0:1] = [tree, str(Path(tree) / "gguf-py")]
    import torch

    torch.set_num_threads(1)
    import conversion
    import gguf

    read_instead_of_mapping(gguf)
    take_what_the_index_names(gguf, Path(folder))
    write_in_pieces(gguf, conversion.LazyTorchTensor, torch)
    never_run_foreign_code()

    def write_tensors(writer, progress: bool = False) -> None:
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        out.flush()
        print("header", flush=True)
        for info in [] if "--header-only" in flags else writer.tensors[0].values():
            info.tensor.tofile(out)
            writer.write_padding(out, info.nbytes)
            info.tensor = None

    gguf.GGUFWriter.write_tensors_to_file = write_tensors
    with torch.inference_mode():
        hparams = conversion.ModelBase.load_hparams(Path(folder), False)
        architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
        model_class = conversion.get_model_class(architecture)
        file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[outtype]
        model_class(Path(folder), gguf.LlamaFileType[file_type], Path(outfile), model_name=name or None).write()


def read_instead_of_mapping(gguf) -> None:
    import numpy as np

    def read(self):
        where = self.data_range
        return np.fromfile(where.filename, np.uint8, count=where.size, offset=where.offset)

    gguf.utility.LocalTensor.mmap_bytes = read


def take_what_the_index_names(gguf, folder: Path) -> None:
    index, local = folder / "model.safetensors.index.json", gguf.utility.SafetensorsLocal
    where = json.loads(index.read_bytes())["weight_map"] if index.exists() else {}
    enter = local.__init__

    def __init__(self, filename):
        enter(self, filename)
        mine = Path(filename)
        self.tensors = {n: t for n, t in self.tensors.items() if n not in where or folder / where[n] == mine}

    local.__init__ = __init__


def write_in_pieces(gguf, lazy, torch) -> None:
    """Make each lazy tensor that goes to the file a `Pieces`, and let lazy tensors remember what they were made of.

    `origin` is a list of lazy tensors which, one after another and widened to float32, are the tensor: the narrow
    tensor of a widening, the parts of a stack or concatenation. Any other operation makes a lazy tensor without an
    origin, which is then evaluated whole.
    """
    quantize, torch_function = gguf.quants.quantize, lazy.__torch_function__
    to, numpy = (lambda self: lazy.__getattr__(self, "to")), lazy.numpy
    stored = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}

    def remember_widening(self, *args, **kwargs):
        result = to(self)(*args, **kwargs)
        if args == (torch.float32,) and not kwargs and self.dtype in stored:
            result.origin = [self]
        return result

    def remember_stack(cls, func, types, args=(), kwargs=None):
        result = torch_function(func, types, args, kwargs)
        first_dimension = [*args[1:], *(kwargs or {}).items()] in ([], [0], [("dim", 0)])
        if func in (torch.stack, torch.cat) and first_dimension and all(type(part) is cls for part in args[0]):
            result.origin = list(args[0])
        return result

    def remember_torch(self):
        result = numpy(self)
        result.torch = self
        return result

    def quantize_later(data, qtype):
        result = quantize(data, qtype)
        known = isinstance(data, gguf.LazyNumpyTensor) and "torch" in data.__dict__
        return Pieces(data.torch, qtype, result) if known else result

    class Pieces:
        """What gguf's writer needs of a tensor; evaluated and rounded while it is written."""

        def __init__(self, source, qtype, like):
            self.source, self.qtype = source, qtype
            self.shape, self.dtype, self.nbytes = like.shape, like.dtype, like.nbytes

        def tofile(self, out):
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

    def origins(tensor):
        parts = tensor.__dict__.get("origin")
        return [tensor] if parts is None else [leaf for part in parts for leaf in origins(part)]

    def evaluated(roots):
        """The values of lazy tensors, one at a time; a value is dropped when the last one that needs it is done."""
        uses, kept = {}, {}

        def count(node):
            uses[id(node)] = uses.get(id(node), 0) + 1
            if uses[id(node)] == 1 and node._data is None:
                lazy._recurse_apply(node._args, count)

        def evaluate(node):
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


def never_run_foreign_code() -> None:
    import transformers

    for auto in (transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoProcessor):
        plain = auto.from_pretrained

        def from_pretrained(*args, plain=plain, **kwargs):
            return plain(*args, **{**kwargs, "trust_remote_code": False})

        auto.from_pretrained = from_pretrained


def explain(error: BaseException) -> dict:
    """The kind and one line of an upstream failure."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, NotImplementedError) or "trust_remote_code" in text or "execute the" in text:
        return {"kind": "unsupported", "message": text}
    if isinstance(error, (ImportError, MemoryError)):
        return {"kind": "environment", "message": f"{type(error).__name__}: {text}"}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return {"kind": "disk", "message": text}
    return {"kind": "input", "message": f"{type(error).__name__}: {text}"}


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        if "SPLITQ_DEBUG" in os.environ:
            import traceback

            traceback.print_exc()
        print(json.dumps(explain(error)), flush=True)
        sys.exit(1)
