# SPDX-License-Identifier: MIT
"""What is in a GGUF file: types, bits per weight and size, by type and by kind of tensor."""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from . import display, options, plan
from .errors import printable
from .files import gguf_file
from .files.gguf_file import Tensor
from .types import columns

_TOO_LONG = "gguf_splitq.calib_lines"
MOST_SHOWN = 1000  # characters of a value
_KEYS = ("general.architecture", "general.name", "general.size_label", "general.file_type", "gguf_splitq.", "quantize.")


def inspect(file: str | Path, json: bool = False) -> dict:
    """Print (a table, or JSON) and return what `file` holds; reads the header only.

    Keys: file, size (bytes), container (whether our types are stored as bytes), tensors, weights, bpw, linear_bpw (see
    `linear_bpw`), metadata, types and kinds; the last two are lists of rows with tensors, weights, bytes and bpw.
    A side tensor counts to its weight's type, with bytes and without weights. Raises InputError and UnsupportedError.
    """
    options.Inspect(file).check()
    with gguf_file.read(file) as source:
        result = describe(source)
    if json:
        print(json_module.dumps(result, indent=1))
    else:
        _show(result)
    return result


def describe(source: gguf_file.Gguf) -> dict:
    """What `inspect` prints of a file."""
    owners = columns.owners(source.tensors)
    everything = _row(source.tensors, owners)

    def type_of(tensor: Tensor) -> str:
        return gguf_file.type_name(owners.get(tensor.name, tensor).type_id)

    return {
        "file": str(source.path),
        "size": source.size,
        "container": source.contained,
        "tensors": everything["tensors"],
        "weights": everything["weights"],
        "bpw": everything["bpw"],
        "linear_bpw": _linear_bpw(source),
        "metadata": {k: v.python for k, v in source.kv.items() if k.startswith(_KEYS) and k != _TOO_LONG},
        "types": _groups(source.tensors, owners, lambda t: {"type": type_of(t)}),
        "kinds": _groups(source.tensors, owners, lambda t: {"kind": kind(t.name), "type": type_of(t)}),
    }


def linear_bpw(file: str | Path) -> float:
    """Stored bits per weight over the weights of linear layers: no embeddings, no output, no norms. 0 if none."""
    return both_bpw(file)[1]


def both_bpw(file: str | Path) -> tuple[float, float]:
    """Stored bits per weight of all tensors, and `linear_bpw`."""
    with gguf_file.read(file) as source:
        return _row(source.tensors, columns.owners(source.tensors))["bpw"], _linear_bpw(source)


def kind(name: str) -> str:
    """A tensor's role: its name without the number of its block, e.g. blk.*.attn_q.weight."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _linear_bpw(source: gguf_file.Gguf) -> float:
    architecture = source.get("general.architecture", str, "")
    owners = columns.owners(source.tensors)
    return _row([t for t in source.tensors if plan.is_linear(t, architecture) or t.name in owners], owners)["bpw"]


def _groups(tensors: Iterable[Tensor], sides: Collection[str], key: Callable[[Tensor], Any]) -> list[dict]:
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tuple(key(tensor).items()), []).append(tensor)
    return [dict(names) | _row(group, sides) for names, group in groups.items()]


def _row(tensors: list[Tensor], sides: Collection[str]) -> dict:
    """sides: names of the tensors that are no weights."""
    size, weights = sum(t.n_bytes for t in tensors), sum(t.n_weights for t in tensors if t.name not in sides)
    return {"tensors": len(tensors), "weights": weights, "bytes": size, "bpw": 8 * size / weights if weights else 0.0}


def _show(result: dict) -> None:
    out = display.console()
    out.print(
        f"{printable(result['file'])}: {gguf_file.mib(result['size'])}, {result['weights']:,} weights, "
        f"{result['bpw']:.3f} bpw, linear layers {result['linear_bpw']:.3f} bpw",
        soft_wrap=True,
    )
    if result["container"]:
        out.print("  a container: any GGUF reader takes it, and the patched llama.cpp runs it")
    for key, value in result["metadata"].items():
        shown = repr(value)  # which escapes what a terminal would obey
        out.print(f"  {key} = {shown if len(shown) <= MOST_SHOWN else shown[:MOST_SHOWN] + '...'}", soft_wrap=True)
    for title, rows in (("by type", result["types"]), ("by kind", result["kinds"])):
        table = Table(title=title)
        for column in rows[0] if rows else ():
            table.add_column(column, justify="left" if column in ("kind", "type") else "right")
        for row in rows:
            size, rate = gguf_file.mib(row["bytes"]), f"{row['bpw']:.3f}"
            table.add_row(*map(str, (row | {"weights": f"{row['weights']:,}", "bytes": size, "bpw": rate}).values()))
        out.print(table)
