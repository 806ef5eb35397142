# SPDX-License-Identifier: MIT
"""`serve` and `run`: llama-server and llama-cli of the build on one file, in place of this process.

What llama.cpp chooses well by itself (threads, the chat template of the file, 127.0.0.1) is left to it. Chosen here: a
context that a model for long texts does not fill the memory with, and a page, which a build without npm has none of.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import UsageError
from ..files import gguf_file
from ..runtime import building

CONTEXT = 8192  # tokens, if the model was made for as many
PAGE = Path(__file__).with_name("page")


def serve(file: str, options: Sequence[str]) -> NoReturn:
    """Become llama-server with `file` and `options`."""
    _become("llama-server", command(file, options, os.environ, {("--path", "LLAMA_ARG_STATIC_PATH"): str(PAGE)}))


def run(file: str, options: Sequence[str]) -> NoReturn:
    """Become llama-cli, a chat in the terminal, with `file` and `options`."""
    _become("llama-cli", command(file, options, os.environ))


def command(
    file: str, options: Sequence[str], environ: Mapping[str, str], defaults: Mapping[tuple[str, ...], str] | None = None
) -> list[str]:
    """The arguments of a program of llama.cpp: `file`, and defaults that neither options nor environment set.

    A default's names are the options that set it, the first of which is given, and llama.cpp's variable.
    Raises UsageError for a folder and when the options name a model, InputError and UnsupportedError for no sound GGUF.
    """
    if own := next((option for option in options if option in ("-m", "--model")), None):
        raise UsageError(f"{own} among the options of llama.cpp: the model is {file}: leave one of them out")
    if os.path.isdir(file):
        raise UsageError(f"{file}: a folder, not a GGUF file: make one with `gguf-splitq convert {file} --type sq4`")
    with gguf_file.read(file) as source:
        architecture = source.get("general.architecture", str, "")
        trained = source.get(f"{architecture}.context_length", int, CONTEXT)
    defaults = {("--ctx-size", "-c", "LLAMA_ARG_CTX_SIZE"): str(min(trained, CONTEXT))} | dict(defaults or {})
    chosen = [
        word
        for names, value in defaults.items()
        if not any(name in options or name in environ for name in names)
        for word in (names[0], value)
    ]
    return ["--model", os.path.abspath(file), *chosen, *options]


def _become(name: str, arguments: Sequence[str]) -> NoReturn:
    program = building.program(name)
    sys.stdout.flush()
    os.execv(program, [str(program), *arguments])
