"""A file of Hessians, so that one calibration serves any number of types.

A GGUF file of one F32 matrix [in, in] for every matrix of the float model, named "LAYER NAME"; those of experts that
saw too few tokens are the layer's pooled one and are listed in `gguf_splitq.pooled`. `gguf_splitq.calibration` holds
what they were measured on, as JSON. Layers are kept in the journal until all are there.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from .. import gguf_file
from ..errors import InputError, UsageError
from ..gguf_file import Value
from .calibrate import Layer
from .journal import Journal

MEASURED = ("model", "calib", "calib_tokens")  # the settings that Hessians depend on


class Hessians:
    """complete: the file is there. Raises UsageError when it was measured on something else, naming it."""

    def __init__(self, path: Path, journal: Journal, count: int):
        self.path, self.journal, self.count = Path(path), journal, count
        self.calibration = {key: journal.settings[key] for key in MEASURED}
        self.complete = self.path.exists()
        if self.complete:
            self.file = gguf_file.read(self.path)
            self.tensors = {tensor.name: tensor for tensor in self.file.tensors}
            self.pooled = set(json.loads(self.file.get("gguf_splitq.pooled", "[]")))
            before = json.loads(self.file.get("gguf_splitq.calibration", "{}"))
            for key, value in self.calibration.items():
                if before.get(key) != value:
                    raise UsageError(
                        f"{path}: its Hessians were measured with {key} {before.get(key)} and this run has {value}: "
                        "name another file for --hessians"
                    )

    def has(self, index: int) -> bool:
        return self.complete or self.journal.find(_part(index)) is not None

    def keep(self, index: int, layers: list[Layer]) -> None:
        """Store the Hessians of a decoder layer's matrices."""
        known = [layer for layer in layers if layer.hessian is not None]
        arrays = {f"{index} {layer.name}": layer.hessian.float().cpu().numpy() for layer in known}
        self.journal.keep(_part(index), arrays, [f"{index} {layer.name}" for layer in layers if layer.pooled])

    def fill(self, index: int, layers: list[Layer]) -> None:
        """Give matrices without a Hessian theirs. InputError when the file lacks it or its shape is wrong."""
        if self.complete:
            arrays, pooled = self.tensors, self.pooled
        else:
            arrays, pooled = self.journal.find(_part(index))
        for layer in layers:
            found = arrays.get(f"{index} {layer.name}")
            if found is None:
                continue  # nothing went through it when they were measured
            rows = self.file.read_rows(found, 0, found.n_rows).view(np.float32) if self.complete else found[:]
            if rows.shape != (layer.weight.shape[1],) * 2:
                raise InputError(f"{self.path}: the Hessian of {layer.name!r} is {rows.shape}: delete the file")
            layer.hessian = torch.from_numpy(rows).double().to(layer.weight.device)
            layer.pooled = f"{index} {layer.name}" in pooled

    def finish(self) -> None:
        """Join the layers into the file."""
        if self.complete:
            return
        parts = [self.journal.find(_part(index)) for index in range(self.count)]
        shapes = [(name, tuple(part.get_shape())) for arrays, _ in parts for name, part in arrays.items()]
        kv = {
            "general.architecture": Value.of("hessians"),
            "gguf_splitq.calibration": Value.of(json.dumps(self.calibration)),
            "gguf_splitq.pooled": Value.of(json.dumps([name for _, pooled in parts for name in pooled])),
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
