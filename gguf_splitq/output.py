# SPDX-License-Identifier: MIT
"""What a command writes: its name, its metadata, JSON that appears whole, and a lock against a second run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .errors import UsageError
from .files.gguf_file import Value, disk_error
from .runtime import patching
from .types import TensorType

TEMPLATE = "{name}-{type}.gguf"
CARD = "README.md"
NUMBERS = "<!-- numbers of gguf-splitq validate -->"  # in a card, where they begin
MMPROJ = "mmproj-{name}.gguf"
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml/include/ggml.h


def folder(outfile: str | Path) -> Path:
    """The folder an output goes to; UsageError when there is none."""
    found = Path(outfile) if Path(outfile).is_dir() else Path(outfile).parent
    if not found.is_dir():
        raise UsageError(f"{found}: there is no such folder: make it or choose another --outfile")
    return found


def path(outfile: str | Path, name: str, type: str) -> Path:
    """The template filled in; a folder takes the default name. A precision at the end of the input's name goes."""
    template = str(Path(outfile) / TEMPLATE) if Path(outfile).is_dir() else str(outfile)
    name = re.sub(r"[-.](f32|f16|bf16)$", "", name, flags=re.IGNORECASE)
    return Path(template.replace("{name}", name).replace("{type}", type))


def metadata(kv: Mapping[str, Value], target: TensorType, options: dict, label: str | None = None) -> dict[str, Value]:
    """The input's metadata with what describes this file put in."""
    return {key: value for key, value in kv.items() if key != "general.alignment"} | {
        "general.file_type": Value.of(target.file_type),
        "general.quantization_version": Value.of(QUANTIZATION_VERSION),
        "gguf_splitq.version": Value.of(__version__),
        "gguf_splitq.type": Value.of(label or target.name),
        "gguf_splitq.llama_cpp": Value.of(patching.pin()["commit"]),
        "gguf_splitq.options": Value.of(json.dumps(options, sort_keys=True)),
    }


def write_json(path: str | Path, content: object) -> None:
    """A JSON file that appears whole or not at all, behind a link too; EnvironmentFailed when it cannot be written."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def json_object(data: str | bytes) -> dict[str, Any]:
    """What an object of JSON holds; {} for all else that somebody may have written there."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def write_text(path: str | Path, data: str) -> None:
    """A text that appears whole or not at all, behind a link too; EnvironmentFailed when it cannot be written."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device takes what it is given
            path.write_text(data)
            return
        path = Path(os.path.realpath(path))
        write_whole(path, data.encode())
    except OSError as error:
        raise disk_error(error, path, len(data)) from error


def write_whole(path: Path, data: bytes) -> None:
    """A small file that appears, synced, whole or not at all. Raises OSError, and then leaves nothing behind."""
    temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temp, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(written: Iterable[tuple[str, Path]]) -> Iterator[None]:
    """Keep other runs from writing these files; UsageError when one of them is being written already.

    written: (what messages call it, path). EnvironmentFailed when its folder takes no file.
    The lock is on `.NAME.lock` beside each file, which is gone afterwards; what a killed run leaves holds nobody up.
    """
    with contextlib.ExitStack() as stack:
        for _, path in written:
            stack.enter_context(_lock(path))
        yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    name = path.with_name(f".{path.name}.lock")
    try:
        file = _held(name)
    except BlockingIOError:
        raise UsageError(f"{path}: another run is writing it: wait for that one or choose another name") from None
    except OSError as error:
        raise disk_error(error, name, 0) from error
    try:
        yield
    finally:
        if os.fstat(file).st_size == 0:  # not somebody's file of that name
            with contextlib.suppress(OSError):
                name.unlink()  # before the lock is given up: _held then sees that the file has gone
        os.close(file)


def _held(name: Path) -> int:
    """A descriptor of the file `name`, locked; BlockingIOError when another process has the lock."""
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _flock(file)
            if os.path.samestat(os.fstat(file), os.lstat(name)):
                return file
        except FileNotFoundError:
            pass  # the run that had it has ended in between
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system that has no locks
