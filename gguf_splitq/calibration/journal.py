# SPDX-License-Identifier: MIT
"""What a calibration has finished, kept beside its output so that the same command can go on after a kill.

    .OUT.gguf.unfinished/
        settings.json             what decides the result, by name
        tokens.safetensors        the calibration tokens
        layer-00000.safetensors   packed rows of the layer's tensors; their errors as JSON in the metadata
        hessians-00000.safetensors   with --hessians
        ends.safetensors          what was measured of embedding and output, whose rows have parts by their names
        drawn.safetensors, tuned.safetensors   with --tune: text of the model itself, and the result

Each file appears whole or not at all. The folder is gone when the output is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import InputError, UsageError
from ..files.gguf_file import disk_error
from ..output import json_object, write_whole
from ..rewrite import Rows


class Array(Rows, Protocol):
    """An array of a part, read from disk when it is sliced."""

    def get_shape(self) -> list[int]:
        """As NumPy has it."""
        ...

    def get_dtype(self) -> str:
        """As safetensors names it, "F32" for one."""
        ...


Part = tuple[dict[str, Array], Any]  # arrays by name, and the metadata, whatever JSON holds


class Journal:
    """Finished parts by name. Raises UsageError when the folder is of a run with other settings, naming them."""

    def __init__(self, folder: Path, settings: Mapping[str, object]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.exists():
            before = json_object(path.read_bytes())
            changed = sorted(k for k in {*before, *self.settings} if before.get(k) != self.settings.get(k))
            if changed:
                pairs = [(k, _short(before.get(k)), _short(self.settings.get(k))) for k in changed]
                what = ", ".join(f"{name} was {old} and is {new}" for name, old, new in pairs)
                raise UsageError(f"{folder}: an unfinished run with other settings is kept there ({what}): delete it")
        else:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise disk_error(error, folder, 0) from error
            self._write(path, json.dumps(self.settings, indent=1).encode())

    def keep(self, name: str, arrays: Mapping[str, np.ndarray], metadata: object = None) -> None:
        """Store a part. metadata: anything JSON can hold."""
        self._write(self.folder / f"{name}.safetensors", save(dict(arrays), {"json": json.dumps(metadata)}))

    def find(self, name: str) -> Part | None:
        """A part, None when it is not there. InputError when it is damaged."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            file = safe_open(path, framework="numpy")
            return {key: file.get_slice(key) for key in file.keys()}, json.loads(file.metadata()["json"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}): delete its folder and start again") from error

    def part(self, name: str) -> Part:
        """`find` of a part that was kept."""
        found = self.find(name)
        assert found is not None, f"{name} was not kept"
        return found

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove the folder when all went well, or when nothing in it is worth keeping."""
        if kind is None or not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_whole(path, data)
        except OSError as error:
            raise disk_error(error, self.folder, len(data)) from error


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
