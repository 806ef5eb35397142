# SPDX-License-Identifier: MIT
"""What is found around the package: the folder `patches/` that travels with it, and the CPUs."""

import os
from pathlib import Path

from .errors import EnvironmentFailed


def folder(name: str) -> Path:
    """The folder `name`, inside an installed wheel or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "data" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise EnvironmentFailed(f"The data folder {name!r} is missing from this installation; install gguf-splitq again.")


def cores() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
