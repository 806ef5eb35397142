# SPDX-License-Identifier: MIT
"""What a failure says, and docs/errors.md."""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import crafted
import pytest

import gguf_splitq
from gguf_splitq import errors

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"


def test_the_documentation_has_every_exit_code_and_no_other():
    documented = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", DOCS.read_text(), re.MULTILINE))
    classes = errors.SplitqError.__subclasses__()
    assert documented == {str(kind.exit_code): kind.__name__ for kind in classes} and len(classes) == 5
    assert not any(kind.__subclasses__() for kind in classes)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\nb\r", r"a\nb\r"),
        ("\u202eb", r"\u202eb"),
        ("\udcff", r"\udcff"),
        ("ä €", "ä €"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(name, shown):
    assert errors.printable(name) == shown
    assert str(errors.InputError(f"{name}: why: next")) == f"{shown}: why: next"


@pytest.mark.parametrize("command", [["inspect"], ["convert", "--type", "sq4", "--dry-run"], ["dequantize"]])
def test_a_path_that_is_no_text_is_shown_escaped(tmp_path, command):
    path = os.fsencode(crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())).replace(
        b"m.gguf", b"\xff\x1b[2J.gguf"
    )
    try:
        os.rename(tmp_path / "m.gguf", path)
    except OSError:
        pytest.skip("this file system has names of UTF-8 alone")
    name, *options = command
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(DOCS.parents[1])}
    arguments = [sys.executable, "-m", "gguf_splitq", name, path, *options]
    done = subprocess.run(arguments, capture_output=True, env=environment, cwd=tmp_path)
    assert (
        done.returncode == 0
        and b"\\udcff\\x1b[2J" in done.stdout + done.stderr
        and b"\x1b" not in done.stdout + done.stderr
    )


def test_what_is_public_says_what_it_is():
    """Or overrides something that does."""
    silent = []
    for module in pkgutil.walk_packages(gguf_splitq.__path__, "gguf_splitq."):
        if module.name == "gguf_splitq.__main__" or (
            module.name.endswith("_triton") and not importlib.util.find_spec("triton")
        ):
            continue
        loaded = importlib.import_module(module.name)
        own = [o for o in vars(loaded).values() if getattr(o, "__module__", None) == module.name]
        classes = [o for o in own if inspect.isclass(o)]
        functions = [o for o in own if inspect.isfunction(o)] + [
            getattr(c, name)
            for c in classes
            for name, member in vars(c).items()
            if inspect.isfunction(member) or isinstance(member, property)
        ]
        for item in (*classes, *functions):
            name = item.fget.__qualname__ if isinstance(item, property) else item.__qualname__
            public = not any(part.startswith("_") for part in name.split("."))
            if public and "<lambda>" not in name and not inspect.getdoc(item):
                silent.append(f"{module.name}: {name}")
    assert silent == []
