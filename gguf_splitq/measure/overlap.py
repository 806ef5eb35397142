# SPDX-License-Identifier: MIT
"""Whether a file is measured on the text it was calibrated on: that text's fingerprint travels in the metadata.

Documents of one kind share the lines that their template prescribes without being the same text. So what counts as
shared is `LINES` lines in a row, or as many lines anywhere that are too long for a template. Lines of fewer than
`SHORT` characters say nothing (a brace, a heading) and are left out.

The fingerprint holds checksums of every `LINES` lines in a row, of the long lines and of the whole text: four to eight
bytes a line, about 60 kB for a megabyte, and no way back to the text. All of them are kept, since a sample of them
could not tell a few shared lines.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..calibration.text import whole
from ..errors import InputError

LINES = 8
SHORT, LONG = 20, 80  # characters
MOST_BYTES = 1 << 26  # of a text that metadata names


def fingerprint(text: str) -> np.ndarray:
    """uint32, sorted and distinct."""
    lines = _lines(text)
    return np.unique(np.array([*_rows(lines), *_long(lines), _checksum(lines)], np.uint32))


def named(path: str, text: str | Path) -> str:
    """The text that a file says it was made with, if it is in the current folder or that of `text`; "" otherwise.

    The name comes from a file that may be hostile and could be any: nothing outside of these is touched, and nothing
    that is no regular file of at most `MOST_BYTES`.
    """
    folders = [os.path.realpath(folder) for folder in (".", os.path.dirname(os.path.abspath(text)))]
    try:
        for find in (os.path.abspath, os.path.realpath):  # by name, then with links followed
            if not any(Path(find(path)).is_relative_to(folder) for folder in folders):
                return ""
        found = os.stat(path)
        return words(Path(path)) if stat.S_ISREG(found.st_mode) and found.st_size <= MOST_BYTES else ""
    except (OSError, ValueError):
        return ""


def words(path: Path) -> str:
    """What a text says, as a calibration reads it; of what that refuses, the bytes as UTF-8."""
    try:
        return whole(path)
    except InputError:
        return path.read_text(encoding="utf-8", errors="replace")


def shared(known: Iterable[int], text: str) -> int:
    """How many lines of `text` are also in the text whose fingerprint is `known`; 0 where they are too few to count."""
    known, lines = set(map(int, known)), _lines(text)
    if lines and _checksum(lines) in known:
        return len(lines)
    rows, long = len(known & _rows(lines)), len(known & _long(lines))
    return max(rows + LINES - 1 if rows else 0, long if long >= LINES else 0)


def _lines(text: str) -> list[str]:
    return [line for line in (" ".join(line.split()) for line in text.splitlines()) if len(line) >= SHORT]


def _rows(lines: list[str]) -> set[int]:
    return {_checksum(lines[i : i + LINES]) for i in range(len(lines) - LINES + 1)}


def _long(lines: list[str]) -> set[int]:
    return {_checksum([line]) for line in lines if len(line) >= LONG}


def _checksum(lines: list[str]) -> int:
    return zlib.crc32("\n".join(lines).encode("utf-8", "replace"))
