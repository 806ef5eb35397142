# SPDX-License-Identifier: MIT
"""A file of what was measured, so that one backward pass serves any number of types.

A GGUF file with one F32 tensor for every matrix of the float model, named "LAYER NAME". For half-way aims it is
[3, tokens]: the tokens' Fisher information, the batch that each was in, and its number there. For plain ones it is the
Hessian [in, in]; those of experts that saw too few tokens are the layer's pooled one and are listed in
`gguf_splitq.pooled`.
Those of the ends, as `Ends.arrays` gives them, are named "ends NAME". `gguf_splitq.calibration` holds what they were
measured on, as JSON. Layers are kept in the journal until all are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ..errors import InputError, UsageError
from ..files import gguf_file
from ..files.gguf_file import Tensor, Value
from .aims import Key, Weights
from .journal import Array, Journal
from .model import BATCH, CONTEXT
from .moments import Layer

T = TypeVar("T")
MEASURED = ("model", "calib", "calib_tokens", "calib_dtype", "aim", "weights")  # the settings that it depends on


class Hessians:
    """path: None for the journal alone. complete: the file is there, and of this kind.

    Raises UsageError when it was measured on something else, naming it.
    """

    def __init__(self, path: str | Path | None, journal: Journal, count: int):
        self.path = Path(path) if path else None
        self.journal, self.count = journal, count
        self.calibration = {key: journal.settings[key] for key in MEASURED}
        self.complete = bool(self.path and self.path.exists())
        if self.path and self.complete:
            self.file = gguf_file.read(self.path)
            self.tensors = {tensor.name: tensor for tensor in self.file.tensors}
            self.pooled = self._json("gguf_splitq.pooled", list)
            before = self._json("gguf_splitq.calibration", dict)
            for key, value in self.calibration.items():
                if before.get(key) != value:
                    raise UsageError(
                        f"{path}: it was measured with {key} {before.get(key)} and this run has {value}: "
                        "name another file for --hessians"
                    )

    def _json(self, key: str, kind: type[T]) -> T:
        """What the file's metadata holds as JSON, an empty `kind` where it has no such key."""
        try:
            found = json.loads(self.file.get(key, str, json.dumps(kind())))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, kind):
            raise self._damaged(f"its {key!r} is not a JSON {kind.__name__}")
        return found

    def has(self, index: int) -> bool:
        """Whether this decoder layer's are known."""
        return self.complete or self.journal.find(_part(index)) is not None

    def keep(self, index: int, layers: list[Layer]) -> None:
        """Store the Hessians of a decoder layer's matrices."""
        arrays = {
            f"{index} {layer.name}": layer.hessian.float().cpu().numpy()
            for layer in layers
            if layer.hessian is not None
        }
        self.journal.keep(_part(index), arrays, [f"{index} {layer.name}" for layer in layers if layer.pooled])

    def keep_weights(self, index: int, weights: Weights) -> None:
        """Store the weights of the tokens that a decoder layer's matrices saw."""
        arrays = {}
        for (name, expert), batches in weights.items():
            if batches:
                parts = [torch.stack([w, torch.full_like(w, batch), n]) for batch, (w, n) in batches.items()]
                key = f"{index} {name}" if expert is None else f"{index} {name}[{expert}]"
                arrays[key] = torch.cat(parts, 1).numpy()
        self.journal.keep(_part(index), arrays, [])

    def weights(self, index: int) -> Weights:
        """What `keep_weights` stored. InputError when a tensor's kind or shape is wrong."""
        found: dict[Key, dict[int, torch.Tensor]] = {}
        arrays, _ = self._kept(index)
        for name, array in arrays.items():
            number, _, matrix = name.partition(" ")
            if number == str(index):
                part, _, expert = matrix.rstrip("]").partition("[")
                if expert and not expert.isdecimal():
                    raise self._damaged(f"{name!r} is no name of a matrix")
                values, batches, numbers = torch.from_numpy(self._read(name, array, (3, None)))
                if not ((numbers >= 0) & (numbers < BATCH * CONTEXT)).all():
                    raise self._damaged(f"{name!r} has tokens that no batch has")
                sizes = batches.unique_consecutive(return_counts=True)
                split = torch.stack([values, numbers]).split(sizes[1].tolist(), 1)
                found[part, int(expert) if expert else None] = dict(zip(map(int, sizes[0]), split, strict=True))
        return found

    def has_ends(self) -> bool:
        """Whether what was measured of the model's ends is known, or cannot be any more."""
        return self.complete or self.journal.find("ends") is not None

    def keep_ends(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Store what `Ends.arrays` gives."""
        self.journal.keep("ends", {f"ends {name}": array for name, array in arrays.items()})

    def ends(self) -> dict[str, torch.Tensor]:
        """What `keep_ends` stored, by name; {} from a file that lacks it. InputError when a shape is wrong."""
        arrays: Mapping[str, Tensor | Array] = self.tensors if self.complete else self.journal.part("ends")[0]
        found = {name.removeprefix("ends "): array for name, array in arrays.items() if name.startswith("ends ")}
        return {
            name: torch.from_numpy(self._read(f"ends {name}", array, (None, None))) for name, array in found.items()
        }

    def _kept(self, index: int) -> tuple[Mapping[str, Tensor | Array], list[str]]:
        """Arrays by name, those of a decoder layer among them, and the names of pooled ones."""
        return (self.tensors, self.pooled) if self.complete else self.journal.part(_part(index))

    def fill(self, index: int, layers: list[Layer]) -> None:
        """Give matrices without a Hessian theirs. InputError when the file lacks it or its shape is wrong."""
        arrays, pooled = self._kept(index)
        for layer in layers:
            found = arrays.get(f"{index} {layer.name}")
            if found is None:
                layer.unknown = "no token or no gradient reached it when the Hessians were measured"
                continue
            rows = self._read(f"{index} {layer.name}", found, (layer.weight.shape[1],) * 2)
            layer.hessian = torch.from_numpy(rows).double().to(layer.weight.device)
            layer.pooled = f"{index} {layer.name}" in pooled

    def _read(self, name: str, found: Tensor | Array, due: tuple[int | None, ...]) -> np.ndarray:
        """float32 of a shape, None being any size, from a tensor of the file or a part of the journal."""
        if isinstance(found, Tensor):
            kind, shape = gguf_file.type_name(found.type_id), list(found.shape)
        else:
            kind, shape = found.get_dtype().lower(), list(found.get_shape())
        right = len(shape) == len(due) and all(size in (None, has) for size, has in zip(due, shape, strict=True))
        if kind != "f32" or not right:
            raise self._damaged(f"{name!r} is {kind} {shape} where f32 {[size or 'any' for size in due]} is due")
        if isinstance(found, Tensor):
            rows = self.file.read_rows(found, 0, found.n_rows).view(np.float32)
        else:
            rows = found[:]
        if not np.isfinite(rows).all():
            raise self._damaged(f"{name!r} holds NaN or Inf")
        return rows

    def _damaged(self, cause: str) -> InputError:
        return InputError(f"{self.path}: {cause}: name another file for --hessians")

    def finish(self) -> None:
        """Join the layers into the file."""
        if self.complete or self.path is None:
            return
        parts = [self.journal.part(name) for name in ("ends", *map(_part, range(self.count)))]
        shapes = [(name, tuple(part.get_shape())) for arrays, _ in parts for name, part in arrays.items()]
        kv = {
            "general.architecture": Value.of("hessians"),
            "gguf_splitq.calibration": Value.of(json.dumps(self.calibration)),
            "gguf_splitq.pooled": Value.of(json.dumps([name for _, pooled in parts for name in pooled or ()])),
        }
        header = gguf_file.header(kv, [(name, shape, 0) for name, shape in shapes])
        size = len(header) + sum(gguf_file.padded(4 * rows * columns) for _, (rows, columns) in shapes)
        gguf_file.require_space(self.path.absolute().parent, size)
        with gguf_file.atomic(self.path, size) as out:
            out.write(header)
            for arrays, _ in parts:
                for part in arrays.values():
                    data = np.ascontiguousarray(part[:])
                    out.write(data.data)
                    out.write(b"\0" * (gguf_file.padded(data.nbytes) - data.nbytes))


def _part(index: int) -> str:
    return f"hessians-{index:05}"
