"""What a failure says, and docs/errors.md."""

import re
from pathlib import Path

import pytest

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
    assert str(errors.InputError(f"{name}: why: next")) == f"{shown}: why: next"
