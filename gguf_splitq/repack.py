# SPDX-License-Identifier: MIT
"""From a container to the types' own ids and back: another header before the same data."""

from __future__ import annotations

from pathlib import Path

from . import display, options
from .errors import UsageError
from .files import gguf_file
from .files.container import ours


def repack(file: str | Path, container: bool, outfile: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write `file` as a container, or with the types' own ids, and return the new file's path.

    outfile: may hold {name} and {type}; by default {name}-container.gguf or {name}-native.gguf in the current folder.
    Shards become one file. Raises UsageError, InputError, UnsupportedError, EnvironmentFailed.
    """
    given = options.Repack(file, container, outfile, overwrite)
    given.check()
    with given.writing(), gguf_file.read(file) as source:
        require_ours(source)
        size, pieces = gguf_file.stream(source, container)
        with display.Progress() as progress, gguf_file.atomic(given.path, size) as out:
            for piece in progress.through("writing", size, pieces):
                out.write(piece)
    display.say(f"{given.path}: {gguf_file.mib(size)}")
    return given.path


def require_ours(source: gguf_file.Gguf) -> None:
    """UsageError when the file has no tensor that the two forms store differently."""
    if not ours(source.infos):
        raise UsageError(f"{source.path}: no tensor has a type of this project: every program takes it as it is")
