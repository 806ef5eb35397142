# SPDX-License-Identifier: MIT
"""The built llama.cpp elsewhere: in a folder of this machine, or packed for others.

Programs look for the libraries beside themselves (`$ORIGIN`, `@loader_path`), so the folder of a build may be copied to
anywhere. An archive has code for every processor of its kind; what is copied is for the processor it was built on.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import platform
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from ..errors import EnvironmentFailed, UsageError
from . import building, cache, fetching

LIBRARIES = ("*.so", "*.so.*", "*.dylib")  # most of them under three names, two of which are links
TOP = "build"  # the folder in an archive; Jan looks for build/bin


def install(prefix: str | Path, overwrite: bool = False) -> Path:
    """Copy programs and libraries of the build to `prefix`/bin, which is returned, and the licences to `prefix`.

    The folder appears whole or not at all. Raises UsageError when it is there already, unless `overwrite` is set and it
    holds an earlier copy; EnvironmentFailed when nothing is built or it cannot be written.
    """
    bin, target = building.path(), Path(prefix).expanduser().absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: not a folder: give another one")
    if target.exists() and any(target.iterdir()) and not (target / "bin" / "llama-server").exists():
        raise UsageError(f"{target}: there is something else in this folder: give one for llama.cpp alone")
    if (target / "bin").exists() and not overwrite:
        raise UsageError(f"{target}: there is already a llama.cpp: pass --overwrite or another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            _fill(new, bin)
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target / "bin"


def archive(file: str | Path | None = None, overwrite: bool = False) -> Path:
    """Build llama.cpp for every processor of this kind and pack it into `file`, or one with a telling name here.

    The same build gives the same bytes. Raises UsageError when the file exists, unless `overwrite` is set, and
    EnvironmentFailed when it cannot be built or written.
    """
    target = Path(file or f"{name()}.tar.gz").expanduser().absolute()
    if target.is_dir():
        target /= f"{name()}.tar.gz"
    if target.exists() and not overwrite:
        raise UsageError(f"{target}: there is already a file: pass --overwrite or another name")
    bin = building.build_portable()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            tree, packed = Path(scratch) / TOP, Path(scratch) / "packed"
            _fill(tree, bin)
            pack(tree, packed)
            packed.rename(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    return target


def name() -> str:
    """What an archive is called: the pin and the platform, such as gguf-splitq-llama.cpp-0c1e57098-linux-x86_64."""
    system = {"darwin": "macos"}.get(sys.platform, sys.platform)
    return f"gguf-splitq-llama.cpp-{cache.pin9()}-{system}-{platform.machine()}"


def pack(tree: Path, file: Path) -> None:
    """A tar.gz of the folder `tree` without what differs between two runs: times, owners, the order on the disk."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    with open(file, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(tree, tree.name, filter=plain)  # in the order of names


def _fill(top: Path, bin: Path) -> None:
    """Put programs and libraries from `bin`, and the licences, into the new folder `top`."""
    (top / "bin").mkdir(parents=True)
    for path in [*(bin / program for program in building.PROGRAMS), *(p for kind in LIBRARIES for p in bin.glob(kind))]:
        shutil.copy2(path, top / "bin", follow_symlinks=False)
    source = fetching.tree()
    shutil.copy(source / "LICENSE", top / "LICENSE-llama.cpp")
    for licence in (source / "licenses").iterdir():
        shutil.copy(licence, top)
    (top / "LICENSE").write_text(importlib.metadata.distribution("gguf-splitq").read_text("licenses/LICENSE") or "")


def _unwritable(target: Path, error: OSError) -> EnvironmentFailed:
    return EnvironmentFailed(f"{target}: cannot be written ({error.strerror}): check the path, its rights and the disk")
