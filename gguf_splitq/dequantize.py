# SPDX-License-Identifier: MIT
"""Back from quantized tensors to floats: a GGUF that any llama.cpp reads, so that nobody is locked in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import display, options, output, plan, rewrite, types
from .errors import UnsupportedError
from .files import gguf_file
from .files.gguf_file import Tensor
from .types import columns


def dequantize(
    file: str | Path,
    outfile: str | Path | None = None,
    type: str = "f16",
    threads: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `file` with every quantized tensor as `type` (f16, bf16 or f32) and return the new file's path.

    outfile: may hold {name} and {type}; by default {name}-{type}.gguf in the current folder. Tensors that are floats
    already stay as they are. Raises UsageError, InputError, UnsupportedError, EnvironmentFailed.
    """
    given = options.Dequantize(file, outfile, type, threads, overwrite)
    given.check()
    target, path = types.get(type), given.path
    with given.writing(), gguf_file.read(file) as source:
        entries = make_plan(source.tensors, target)
        kv = output.metadata(source.kv, target, {"dequantized_from": source.get("gguf_splitq.type", str, "a GGUF")})
        with display.Progress() as progress:
            progress.start(entries)
            rewrite.rewrite(source, entries, kv, path, threads=given.workers, done=progress.done)
    display.say(f"{path}: {gguf_file.mib(path.stat().st_size)}")
    return path


def make_plan(tensors: Sequence[Tensor], target: types.TensorType) -> list[plan.Entry]:
    """Quantized tensors to `target`, floats and integers as they are, but for side tensors, which are not kept.

    Raises UnsupportedError for a type without a decoder.
    """
    entries, sides = [], columns.owners(tensors)
    for tensor in tensors:
        name = gguf_file.type_name(tensor.type_id)
        if tensor.name in sides:
            continue
        if gguf_file.sizes()[tensor.type_id][1] == 1:
            same = types.get(name) if name in plan.FLOATS else None
            entries.append(plan.Entry(tensor, same, "not quantized"))
            continue
        if name in plan.ONE_WAY:
            raise UnsupportedError(f"tensor {tensor.name!r}: {name} cannot be decoded here: use llama-quantize")
        entries.append(plan.Entry(tensor, target, "--type"))
    return entries
