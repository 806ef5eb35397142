# SPDX-License-Identifier: MIT
"""A calibration text as documents: UTF-8, or what its byte order mark says; or JSON lines of texts or chats.

Anything else is refused by its first bad place: a tokenizer makes tokens of any bytes, and a model calibrated on those
of a compressed file is worse than one that was not calibrated.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from ..errors import InputError

Chat = list[dict[str, Any]]  # messages: role, content, and what else a chat template may look at

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_PARQUET = (
    "turn it into JSON lines first: python -c \"import pandas; pandas.read_parquet('{name}')"
    ".to_json('{stem}.jsonl', orient='records', lines=True, force_ascii=False)\""
)
_UNPACK = "unpack it first"
_FORMATS = {  # first bytes: what it is, what to do
    b"PAR1": ("a Parquet file", _PARQUET),
    b"\x1f\x8b": ("compressed by gzip", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"\xfd7zXZ\0": ("compressed by xz", _UNPACK),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"PK\3\4": ("a zip archive, as office documents are too", _UNPACK + " or save it as plain text"),
    b"%PDF-": ("a PDF", "turn it into text first: pdftotext -enc UTF-8 {name} {stem}.txt"),
    b"GGUF": ("a GGUF file", "give a text"),
    b"\x89PNG": ("a PNG image", "give a text"),
    b"\xff\xd8\xff": ("a JPEG image", "give a text"),
    b"\x93NUMPY": ("a NumPy array", "give a text"),
    b"ARROW1": ("an Arrow file", _PARQUET.replace("parquet", "feather")),
    b"SQLite format 3": ("an SQLite database", "give a text"),
}


def read(path: Path) -> dict[int, str | Chat]:
    """The documents by the line they begin at: a text is one; of a .jsonl file each line is one, a string or a chat.

    Raises InputError with the byte and line of what is no text, or the line that is no document.
    """
    text = _decoded(path, path.read_bytes())
    return _lines(path, text) if path.suffix.lower() in (".jsonl", ".ndjson") else {1: text}


def plain(document: str | Chat) -> str:
    """What a document says, without the form of a chat."""
    return document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)


def whole(path: Path) -> str:
    """What all documents say. Raises as `read` does."""
    return "\n".join(map(plain, read(path).values()))


def _decoded(path: Path, data: bytes) -> str:
    for start, (what, remedy) in _FORMATS.items():
        if data.startswith(start):
            remedy = remedy.format(name=path.name, stem=path.stem)
            raise InputError(f"{path}: not text but {what} (its first bytes, line 1): {remedy}")
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        before = data[len(mark) : at].decode(encoding, "ignore").count("\n")
        if mark:
            what, remedy = f"not the {encoding.upper()} that its byte order mark says", "save it again as UTF-8"
        else:
            what = "not UTF-8"
            remedy = (
                f"if it is a text in another encoding, such as LATIN1, SHIFT-JIS or UTF-16LE, name that: iconv -f "
                f"LATIN1 -t UTF-8 {path.name} > {path.stem}.utf8.txt"
            )
        raise InputError(f"{path}: {what} at byte {at:,} (line {before + 1:,}): {remedy}") from error
    if (at := text.find("\0")) >= 0:
        order = "LE" if len(text[:at].encode(encoding)) % 2 else "BE"
        raise InputError(
            f"{path}: no text, there is a zero byte at byte {len(mark) + len(text[:at].encode(encoding)):,} (line "
            f"{text.count(chr(10), 0, at) + 1:,}): if it is UTF-16 without a byte order mark: iconv -f UTF-16{order} "
            f"-t UTF-8 {path.name} > {path.stem}.utf8.txt"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _lines(path: Path, text: str) -> dict[int, str | Chat]:
    documents = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents[number] = _document(json.loads(line))
                plain(documents[number]).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                cause = str(error) if type(error) is ValueError else f"not JSON ({error})"
                raise InputError(
                    f"{path}: line {number:,}: {cause}: each line must be an object with a `text`, or with `messages` "
                    "of `role` and `content`"
                ) from error
    return documents


def _document(value: object) -> str | Chat:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if "messages" in value:
        if not isinstance(value["messages"], list):
            raise ValueError("`messages` is not a list")
        return [_turn(turn) for turn in value["messages"]]
    if "text" not in value:
        raise ValueError("it has neither `text` nor `messages`")
    if not isinstance(value["text"], str):
        raise ValueError("`text` is not a string")
    return value["text"]


def _turn(turn: object) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise ValueError("a message without a `role`")
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError("a message whose `content` is not a string")
    return {**turn, "content": content}
