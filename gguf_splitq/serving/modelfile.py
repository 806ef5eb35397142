# SPDX-License-Identifier: MIT
"""Ollama's Modelfile: the fields of `POST /api/create` that it stands for (parser/parser.go of Ollama)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import InputError, UnsupportedError
from ..files import gguf_file

MOST = 1 << 24  # bytes
FIELDS = ("template", "system", "renderer", "parser", "requires")  # the last one counts
ELSEWHERE = ("adapter", "draft")  # more files
ROLES = ("system", "user", "assistant")
COMMANDS = ("from", *FIELDS, *ELSEWHERE, "license", "parameter", "message")


def fields(path: Path) -> dict[str, Any]:
    """Template, system prompt, parameters, licences, messages and so on, in JSON's types. FROM is not looked at.

    Raises InputError for what Ollama does not take either, by line, and UnsupportedError for more files.
    """
    gguf_file.require_file(path)
    try:
        if path.stat().st_size > MOST:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are no Modelfile: give another")
        lines = re.split("\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    found: dict[str, Any] = {}
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        words = re.match(r"[ \t]*([^\s#]+)[ \t]*(.*)", line)
        if words is None:  # empty, or a comment
            continue
        command, name, value = words[1].lower(), "", words[2]
        if command in ("parameter", "message"):
            name, _, value = re.sub("[ \t]+", " ", value, count=1).partition(" ")
        while (text := _unquoted(value.strip(" \t"))) is None and (further := next(numbered, None)):
            value += "\n" + further[1]
        try:
            _put(found, command, name, text)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {error}: correct it") from error
        if command in ELSEWHERE:
            raise UnsupportedError(f"{path}: {command.upper()} brings another file: add it with `ollama create` itself")
    return found


def _put(found: dict[str, Any], command: str, name: str, text: str | None) -> None:
    """Add what one command says; ValueError says what is wrong with it."""
    if command not in COMMANDS:
        raise ValueError(f"{command[:40]!r} is none of {', '.join(COMMANDS).upper()}")
    if text is None:
        raise ValueError("the quotes are not closed")
    if not text:
        raise ValueError(f"{command.upper()} has no value")
    if command in FIELDS:
        found[command] = text
    elif command == "license":
        found.setdefault("license", []).append(text)
    elif command == "message":
        if name not in ROLES:
            raise ValueError(f"a message is of {', '.join(ROLES)}, not of {name[:40]!r}")
        found.setdefault("messages", []).append({"role": name, "content": text})
    elif command == "parameter":
        parameters = found.setdefault("parameters", {})
        if name == "stop":
            parameters.setdefault("stop", []).append(text)
        else:
            parameters[name] = _number(name, text)


def _number(name: str, text: str) -> bool | int | float:
    """A parameter's value: all but `stop` are numbers or truth values."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?\d{1,18}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?", text, re.ASCII | re.IGNORECASE):
        return float(text)
    raise ValueError(f"{text[:40]!r} is no value of {name[:40]!r}, which takes a number, true or false")


def _unquoted(text: str) -> str | None:
    """Without quotes of one or three marks; None when they are not closed yet."""
    for mark in ('"""', '"'):
        if text.startswith(mark):
            closed = len(text) >= 2 * len(mark) and text.endswith(mark)
            return text[len(mark) : -len(mark)] if closed else None
    return text
