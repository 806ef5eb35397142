# SPDX-License-Identifier: MIT
"""Training block scales and norms: it helps on held-out tokens, stores what it trained, and refuses what harms."""

import json

import numpy as np
import pytest
import torch

from gguf_splitq import convert, types
from gguf_splitq.calibration import tune
from gguf_splitq.coding import formats
from gguf_splitq.files import gguf_file
from gguf_splitq.rewrite import to_float32


def run(folder, text, outfile, type="sq2", **options):
    report = outfile.with_suffix(".json")
    convert.convert(
        folder, type, outfile=outfile, calib=str(text), calib_tokens=4096, threads=1, report=report, **options
    )
    return json.loads(report.read_text())["calibration"]


def values(path):
    with gguf_file.read(path) as file:
        return {t.name: to_float32(file.read_rows(t, 0, t.n_rows), t.type_id) for t in file.tensors}


def test_what_is_trained_is_stored(runtime_library, tiny_llama, tmp_path):
    folder, text = tiny_llama
    # Plain aims: half-way ones leave q and k of a random model a gradient that moves no scale to the next float16.
    plain = run(folder, text, tmp_path / "plain.gguf", "q4_0", aim="plain")
    tuned = run(folder, text, tmp_path / "tuned.gguf", "q4_0", tune=True, aim="plain")
    assert plain["tuned"] is None and tuned["tuned"]["after"] < tuned["tuned"]["before"]
    before, after = values(tmp_path / "plain.gguf"), values(tmp_path / "tuned.gguf")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name != "token_embd.weight"}


@pytest.mark.parametrize("name", ["sq3", "sq4w", "sq3w", "sq2w"])
def test_a_piece_is_the_stored_weight_and_has_a_gradient(runtime_library, name):
    kind = types.get(name)
    fmt = formats.for_type(kind)
    rows = kind.encode(np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32))
    piece = tune.piece_of(None, fmt, rows)
    np.testing.assert_array_equal(piece.weight().detach().numpy(), kind.decode(rows))
    piece.weight().square().sum().backward()
    assert (piece.change.grad > 0).all()
    with torch.no_grad():
        piece.change += 0.3
    stored = fmt.pack(piece.codes, piece.stored()).numpy()
    np.testing.assert_array_equal(piece.weight().detach().numpy(), kind.decode(stored))
    assert (stored != rows).any()


def test_training_that_does_not_help_is_thrown_away(runtime_library, tiny_llama, tmp_path, monkeypatch):
    folder, text = tiny_llama
    run(folder, text, tmp_path / "plain.gguf")
    monkeypatch.setattr(tune, "RATE", 3.0)
    tuned = run(folder, text, tmp_path / "tuned.gguf", tune=True)["tuned"]
    assert tuned["after"] == tuned["before"]
    for name, value in values(tmp_path / "plain.gguf").items():
        np.testing.assert_array_equal(value, values(tmp_path / "tuned.gguf")[name])
