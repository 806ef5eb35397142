# SPDX-License-Identifier: MIT
"""Which texts count as overlapping, and that `validate` refuses to measure on a calibration text."""

import json
import os

import crafted
import numpy as np
import pytest

from gguf_splitq import cli, inspection
from gguf_splitq.calibration import text
from gguf_splitq.errors import UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.measure import overlap, validate

CALIB = (crafted.DEMO / "calib.txt").read_text()
EVAL = (crafted.DEMO / "eval.txt").read_text()


def lines(n: int, word: str, length: int = 30) -> list[str]:
    return [f"{word} number {i} ".ljust(length, "x") for i in range(n)]


@pytest.mark.parametrize(
    "taken, found",
    [
        (lines(7, "a"), 0),
        (lines(8, "a"), 8),
        (lines(20, "a")[5:15], 10),
        (lines(8, "a")[::-1], 0),  # a template's lines, in another order
        (lines(7, "long", 80), 0),
        (lines(8, "long", 80)[::-1], 8),
        ([f"  {line}  " for line in lines(8, "a")], 8),
        (["}", "", "# heading"] * 10, 0),
    ],
)
def test_eight_lines_in_a_row_or_eight_long_ones(taken, found):
    known = overlap.fingerprint("\n".join([*lines(20, "a"), "}", "", "# heading", *lines(9, "long", 80)] * 2))
    assert overlap.shared(known, "\n".join([*lines(50, "other"), *taken, *lines(50, "another", 100)])) == found


def test_demo_texts_do_not_overlap():
    known = overlap.fingerprint(CALIB)
    assert overlap.shared(known, EVAL) == 0
    assert overlap.shared(known, CALIB) > 1000
    assert 4 * len(known) < 0.2 * len(CALIB) and (np.diff(known.astype(np.int64)) > 0).all()
    short = overlap.fingerprint("One line of a text that is short.")
    assert overlap.shared(short, "One line of a text that is short.\n") == 1
    assert overlap.shared([], "") == overlap.shared(overlap.fingerprint(""), "") == 0


def test_only_a_text_near_by_is_read(tmp_path, monkeypatch):
    work, texts, outside = (tmp_path / name for name in ("work", "texts", "outside"))
    for folder in (work, texts, outside):
        folder.mkdir()
        (folder / "calib.txt").write_text("a text")
    monkeypatch.chdir(work)
    text = texts / "eval.txt"
    for near in (
        "calib.txt",
        "./calib.txt",
        str(work / "calib.txt"),
        str(texts / "calib.txt"),
        "../texts/calib.txt",
    ):
        assert overlap.named(near, text) == "a text"
    (work / "link").symlink_to(outside / "calib.txt")
    (work / "folder").symlink_to(outside)
    os.mkfifo(work / "pipe")
    with open(work / "large", "wb") as file:
        file.truncate(overlap.MOST_BYTES + 1)
    far = [
        str(outside / "calib.txt"),
        "../outside/calib.txt",
        "link",
        "folder/calib.txt",
        "/proc/self/environ",
        "/dev/zero",
    ]
    for path in (*far, "pipe", "large", "none", "", ".", "a\0b", "x" * 5000):
        assert overlap.named(path, text) == ""


def calibrated(path, **kv):
    """A GGUF without tensors that names its calibration text."""
    path.write_bytes(gguf_file.header({key: Value.of(value) for key, value in kv.items()}, []))
    return path


def test_validate_refuses_the_calibration_text(tmp_path, capsys):
    text, other = tmp_path / "calib.txt", tmp_path / "eval.txt"
    text.write_text(CALIB)
    other.write_text(EVAL + "\n".join(CALIB.splitlines()[1000:1030]))
    fed = calibrated(tmp_path / "fed.gguf", **{"gguf_splitq.calib_lines": overlap.fingerprint(CALIB)})
    weighted = calibrated(tmp_path / "weighted.gguf", **{"quantize.imatrix.dataset": str(text)})
    moved = calibrated(tmp_path / "moved.gguf", **{"quantize.imatrix.dataset": str(tmp_path / "no more")})
    for file in (fed, weighted):
        for overlapping in (text, other):
            with pytest.raises(UsageError, match=f"{overlapping.name}.*{file.name}.*--force"):
                validate.check_overlap(file, overlapping)
        validate.check_overlap(file, crafted.DEMO / "eval.txt")
    validate.check_overlap(moved, text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "same.txt").write_text(CALIB)
    validate.check_overlap(weighted, elsewhere / "same.txt")
    assert "calib_lines" not in str(inspection.inspect(fed))
    capsys.readouterr()
    arguments = ["validate", str(fed), "--baseline", str(fed), "--text", str(text)]
    assert cli.main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert cli.main([*arguments, "--force", "--ctx", "512"]) != 2


@pytest.mark.parametrize("kind", ["jsonl", "utf-16"])
def test_also_texts_in_other_forms_are_recognized(tmp_path, kind):
    path = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in CALIB.split("\n\n")[:200]))
    else:
        path.write_bytes(CALIB[:50_000].encode("utf-16"))
    known = overlap.fingerprint(text.whole(path))
    assert overlap.shared(known, overlap.words(path)) > 100
    (tmp_path / "no-text").write_bytes(b"PAR1 \xff")
    assert overlap.words(tmp_path / "no-text").startswith("PAR1")
