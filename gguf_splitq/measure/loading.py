# SPDX-License-Identifier: MIT
"""Whether llama.cpp loads a file: asked of the built runtime, before the long job and again before the final name.

Only a header is needed for that, so the file that a plan would make is tried as a sparse one, in milliseconds and
without memory. Where nothing is built, only what contradicts itself in the header is found.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import plan, rewrite
from ..errors import EnvironmentFailed, InputError
from ..files import checkpoint, gguf_file
from ..files.checkpoint import Source
from ..files.gguf_file import Value
from ..runtime import building

PROBE = Path(__file__).with_name("load_gguf.py")
TIMEOUT = 300  # seconds; the largest vocabularies take about one


def check_plan(
    source: Source, entries: Sequence[plan.Entry], kv: Mapping[str, Value], scratch: Path, contained: bool = False
) -> bool:
    """InputError when llama.cpp would refuse what these entries become, naming key and numbers where they are known.

    False when the finished file is not to be checked: a GGUF without a tokenizer is not what llama.cpp loads, and one
    that it does not load as it is given is converted with a word (`Source.notes`).
    """
    if "tokenizer.ggml.model" not in kv:
        return False
    if _library() is None:
        if source.child and (cause := mismatch(source)):
            raise _refusal(source, cause)
        return True
    with checkpoint.temporary_folder(scratch, source.name) as folder:
        why = reason(_sparse(folder / "plan.gguf", entries, kv, contained))
    if why is None:
        return True
    if source.child is None and reason(source.path) is not None:
        source.notes.append(f"llama.cpp does not load {source.path.name} as it is given ({why}), nor this file")
        return False
    raise _refusal(source, (source.child and mismatch(source)) or why)


def check_file(path: Path, source: Source) -> None:
    """InputError when llama.cpp refuses the finished file; nothing happens where it is not built."""
    if _library() is not None and (why := reason(path)) is not None:
        raise _refusal(source, why)


def reason(path: Path) -> str | None:
    """Why llama.cpp does not load the file, None when it does. The file may be sparse: its data are not read.

    Raises EnvironmentFailed when the runtime does not start, or is stopped from outside.
    """
    library = str(_library())
    env = os.environ | {"GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(PROBE), library, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise _unanswered(path, f"within {TIMEOUT} s") from None
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode == 0 and last.startswith('{"error": '):
        return json.loads(last)["error"]
    said = done.stderr.strip().splitlines()
    if -done.returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        raise _unanswered(path, f"before it was killed by {signal.Signals(-done.returncode).name}")
    if done.returncode < 0:  # a failed assertion, or worse
        return next((line for line in said if "GGML_ASSERT" in line), f"the process ended by signal {-done.returncode}")
    raise EnvironmentFailed(
        f"{library}: the patched llama.cpp does not start ({(said or ['no message'])[-1]}): build it again with "
        "`gguf-splitq runtime build`, or pass --no-check"
    )


def _unanswered(path: Path, when: str) -> EnvironmentFailed:
    return EnvironmentFailed(
        f"{path}: llama.cpp did not say {when} whether it loads the file: free some memory, or pass --no-check"
    )


def mismatch(source: Source) -> str | None:
    """What the configuration or the metadata of a checkpoint's header say against its tensors: key and both numbers."""
    head, text = source.header, source.config
    if isinstance(text.get("text_config"), dict):
        text = text["text_config"]
    architecture = head.get("general.architecture", str, "")
    shapes = {t.name: t.shape for t in head.tensors}
    blocks = 1 + max((int(m[1]) for name in shapes if (m := re.search(r"\bblk\.(\d+)\.", name))), default=-1)
    declared = head.get(f"{architecture}.block_count", int, blocks)
    if blocks and declared != blocks:
        layers, mtp = (
            next((key for key in keys if isinstance(text.get(key), int)), None)
            for keys in (checkpoint.LAYERS, checkpoint.MTP_LAYERS)
        )
        if layers and mtp and text[layers] <= blocks:
            found = blocks - text[layers]
            return f"{mtp} is {text[mtp]} and the checkpoint has {found} such layers"
        key, value = (layers, text[layers]) if layers else (f"{architecture}.block_count", declared)
        return f"{key} is {value} and the checkpoint has {blocks} layers"
    embedding = shapes.get("token_embd.weight", ())
    tokens = head.get("tokenizer.ggml.tokens", list[str], [])
    if len(embedding) == 2 and len(tokens) != embedding[0]:
        if isinstance(text.get("vocab_size"), int) and text["vocab_size"] != embedding[0]:
            return f"vocab_size is {text['vocab_size']} and the embedding has {embedding[0]} rows"
        return f"the tokenizer has {len(tokens)} tokens (vocab_size) and the embedding {embedding[0]} rows"
    width = head.get(f"{architecture}.embedding_length", int, 0)
    if len(embedding) == 2 and width and width != embedding[1]:
        return f"hidden_size is {width} and the embedding has rows of {embedding[1]}"
    return None


def _library() -> Path | None:
    """The folder of llama.cpp's libraries, None when they are not built."""
    try:
        return building.path()
    except EnvironmentFailed:
        return None


def _sparse(path: Path, entries: Sequence[plan.Entry], kv: Mapping[str, Value], contained: bool) -> Path:
    """The file that the plan makes, with a hole for its data."""
    head = rewrite.header(kv, entries, contained)
    size = len(head) + rewrite.data_size(entries)
    try:
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(size)
    except OSError as error:
        raise gguf_file.disk_error(error, path.parent.parent, size) from error
    return path


def _refusal(source: Source, cause: str) -> InputError:
    where = source.path / "config.json" if source.child else source.path
    return InputError(
        f"{where}: llama.cpp would not load what this becomes ({cause}): correct the checkpoint or get it again "
        "(--no-check writes it all the same)"
    )
