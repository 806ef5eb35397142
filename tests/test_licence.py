# SPDX-License-Identifier: MIT
"""Who may use what: every source file of ours names its licence where tools look for it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "gguf_splitq", "convert", "experiments", "tests", "patches"
PYTHON = "gguf_splitq/**/*.py", "convert/*.py", "experiments/*.py", "tests/*.py"
PATTERNS = *PYTHON, "experiments/*.[ch]", "tests/c/*.c*", "patches/files/**/*.*"
SOURCES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern)) if path.stat().st_size]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_source_file_names_its_licence(folder):
    ours = [path for path in SOURCES if path.is_relative_to(ROOT / folder)]
    assert ours
    for path in ours:
        assert "SPDX-License-Identifier: MIT\n" in "".join(path.open().readlines()[:2]), path


def test_weights_and_texts_of_the_demo_have_theirs():
    card = (ROOT / "examples" / "demo" / "MODEL_CARD.md").read_text()
    assert card.startswith("---\n") and "\nlicense: cc0-1.0\n" in card.split("---")[1]
