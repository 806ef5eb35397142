# SPDX-License-Identifier: MIT
"""A model card: README.md for a hub, made of what a file says of itself; `validate` adds what it measures.

Metadata come from whoever made the checkpoint: both Markdown and YAML get them escaped.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from . import display, inspection, output
from .errors import InputError, printable
from .files import container, gguf_file
from .files.gguf_file import Gguf, mib

START, END = output.NUMBERS, "<!-- end of numbers -->"
HEAD = "| file | text | perplexity | / baseline | mean KLD | 99 % KLD | top-1 | chunks |\n" + "|---" * 8 + "|\n"
FLAGS = {  # keys of `gguf_splitq.options` -> options of `convert`; what is not here decides no more than the texts do
    "tensor_type": "--tensor-type", "token_embedding_type": "--token-embedding-type", "imatrix": "--imatrix",
    "output_tensor_type": "--output-tensor-type", "calib": "--calib", "calib_tokens": "--calib-tokens",
    "calib_dtype": "--calib-dtype", "tune": "--tune", "tune_steps": "--tune-steps", "aim": "--aim",
    "claq_metric": "--claq-metric",
}  # fmt: skip


def write(path: Path, file: Path, base: str | None) -> None:
    """Write the card of a GGUF file. base: the Hub id of the checkpoint, where it is known."""
    with gguf_file.read(file) as source:
        output.write_text(path, text(source, base))


def text(source: Gguf, base: str | None = None) -> str:
    """The card of a file."""
    found = inspection.describe(source)
    said = {key: source.get(f"general.{key}", str, "") for key in ("name", "license", "license.name", "license.link")}
    name = said["name"] or base or source.path.stem
    ours = bool(container.ours(source.infos))
    kind = source.get("gguf_splitq.type", str, "unknown")
    front = {
        "license": said["license"],
        "license_name": said["license.name"],
        "license_link": said["license.link"],
        "base_model": base or "",
        "base_model_relation": "quantized" if base else "",
        "library_name": "gguf",
    }
    rows = {
        "base model": f"`{base}`" if base else plain(name),
        "architecture": plain(source.get("general.architecture", str, "")),
        "parameters": display.parameters(found["weights"]),
        "type": plain(kind),
        "stored bits per weight": f"{found['bpw']:.2f} in all, {found['linear_bpw']:.2f} in linear layers",
        "size": mib(found["size"]),
        "calibration": calibration(decided(source)),
        "license": plain(" ".join(filter(None, (said["license"], said["license.name"], said["license.link"])))),
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {quoted(value)}" for key, value in front.items() if value),
            f"tags: [{', '.join(map(quoted, ['gguf', kind, *(['gguf-splitq'] if ours else [])]))}]",
            "---",
            "",
            f"# {plain(name)}, {plain(kind)}",
            "",
            "| | |\n|---|---|",
            *(f"| {key} | {value or 'not said in the file: see the base model'} |" for key, value in rows.items()),
            "",
            "## How it was made",
            "",
            f"By gguf-splitq {plain(source.get('gguf_splitq.version', str, 'of an unknown version'))}:",
            "",
            f"```\n{command(source, base)}\n```",
            "",
            "## Numbers",
            "",
            f"{START}\nNot measured yet.\n{END}",
            "",
            "## How to run it",
            "",
            usage(source.path.name, ours),
        ]
    )


def decided(source: Gguf) -> dict[str, Any]:
    """What of `convert`'s command line decided the file's bytes; {} where the file does not say it well."""
    return output.json_object(source.get("gguf_splitq.options", str, "{}"))


def command(source: Gguf, base: str | None) -> str:
    """The command that made the file, with names in place of paths."""
    given, kind = decided(source), source.get("gguf_splitq.type", str, "")
    words = ["gguf-splitq", "convert", base or "MODEL"]
    for key in ("plan", "bpw", "file_bpw", "size", "type"):
        if value := kind if key == "type" else given.get(key):
            words += ["--" + key.replace("_", "-"), value]
            break
    for key, flag in FLAGS.items():
        for value in given[key] if isinstance(given.get(key), list) else [given[key]] if key in given else []:
            words += [flag] if value is True else [flag, value]
    return " ".join(shlex.quote(printable(str(word))) for word in words).replace("```", "'''")


def calibration(given: dict[str, Any]) -> str:
    """In words."""
    if "imatrix" in given:
        return f"importance matrix {plain(str(given['imatrix']))}"
    if "calib" not in given:
        return "none"
    what = "text that the model wrote" if given["calib"] == "self" else plain(str(given["calib"]))
    return f"error feedback on {plain(str(given.get('calib_tokens', '?')))} tokens of {what}"


def usage(file: str, ours: bool) -> str:
    """Commands for each program."""
    file = shlex.quote(printable(file)).replace("```", "'''")
    name = re.sub(r"[^\w.-]|^\W+", "", Path(file).stem, flags=re.ASCII).lower()[:80] or "model"
    if not ours:
        return (
            "llama.cpp, Ollama, LM Studio and all else that reads GGUF run it:\n\n"
            f"```\nllama-server -m {file}\n```\n\n"
            f"```\necho FROM ./{file} > Modelfile\nollama create {name} -f Modelfile\nollama run {name}\n```\n"
        )
    return (
        "It needs the llama.cpp that gguf-splitq patches; `gguf-splitq runtime build` builds it, once.\n\n"
        f"A server with a page to chat on and OpenAI's API, or a chat in the terminal:\n\n"
        f"```\ngguf-splitq serve {file}\ngguf-splitq run {file}\n```\n\n"
        "llama.cpp's own programs:\n\n"
        f'```\n"$(gguf-splitq runtime path)/llama-server" -m {file}\n```\n\n'
        "Ollama 0.30 or later, in place of `ollama serve`; then from another terminal:\n\n"
        f"```\ngguf-splitq ollama serve\n```\n\n"
        f"```\ngguf-splitq ollama create {name} {file}\nollama run {name}\n```\n\n"
        "Any other program, at the size of F16:\n\n"
        f"```\ngguf-splitq dequantize {file}\n```\n"
    )


def add(path: Path, result: dict[str, Any]) -> None:
    """Put a result of `validate` into a card, in place of an earlier one of the same file and text.

    Raises InputError for a file that is no card.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            before, start, rest = file.read().partition(START)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a card ({error}): make it with `convert --card`") from error
    block, end, after = rest.partition(END)
    if not (start and end):
        raise InputError(f"{path}: the place for numbers has no end ({END}): make it with `convert --card`")
    key = f"| {plain(Path(result['file']).name)} | {plain(Path(result['text']).name)} |"
    row = (
        f"{key} {result['ppl']:.3f} | {result['ppl_ratio']:.4f} | {result['mean_kld']:z.5f} | {result['p99_kld']:.4f} "
        f"| {result['top1']:.1%} | {result['chunks']} of {result['ctx']} tokens |"
    )
    kept = [line for line in block.splitlines() if line.startswith("| ") and not line.startswith((key, "| file |"))]
    output.write_text(path, before + START + "\n" + HEAD + "\n".join([*kept, row]) + "\n" + END + after)


def quoted(words: str) -> str:
    """A string of YAML."""
    return json.dumps(printable(words), ensure_ascii=False)


def plain(words: str) -> str:
    """Words that Markdown shows as they are."""
    return re.sub(r"([\\`*_\[\]<>|#&~$!])", r"\\\1", printable(" ".join(words.split())))
