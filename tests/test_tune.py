# SPDX-License-Identifier: MIT
"""Training scales, norms and codes: it helps on other tokens, stores what it trained, and refuses what harms."""

import json
import math

import crafted
import numpy as np
import pytest
import torch

from gguf_splitq import convert, types
from gguf_splitq.calibration import training, tune
from gguf_splitq.coding import formats, windows
from gguf_splitq.files import gguf_file
from gguf_splitq.rewrite import to_float32

TRAINED = ["sq3", "sdr4", "sq5w", "sq4w", "sq3w", "sq2w", "q4_0", "q4_k", "iq4_xs", "q3_k", "q2_k"]


def run(folder, text, outfile, type="sq2", **options):
    report = outfile.with_suffix(".json")
    convert.convert(
        folder, type, outfile=outfile, calib=str(text), calib_tokens=4096, threads=1, report=report, **options
    )
    return json.loads(report.read_text())["calibration"]


def values(path):
    with gguf_file.read(path) as file:
        return {t.name: to_float32(file.read_rows(t, 0, t.n_rows), t.type_id) for t in file.tensors}


def bundle(name, n_rows=4):
    """Rounded to nearest, and the weights."""
    weights = np.random.default_rng(0).normal(size=(n_rows, 256)).astype(np.float32)
    kind = types.get(name)
    found = training.Bundle.of(formats.for_type(kind), [kind.encode(weights)])
    return found, torch.from_numpy(weights).view(found.codes.shape)


def test_what_is_trained_is_stored(runtime_library, tiny_llama, tmp_path):
    folder, text = tiny_llama
    plain = run(folder, text, tmp_path / "plain.gguf", "q4_0")
    tuned = run(folder, text, tmp_path / "tuned.gguf", "q4_0", tune="scales", tune_steps=4)["tuned"]
    assert plain["tuned"] is None and tuned["after"] < tuned["before"] and tuned["steps"] == 4
    before, after = values(tmp_path / "plain.gguf"), values(tmp_path / "tuned.gguf")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name != "token_embd.weight"}


def test_codes_are_trained(runtime_library, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "BATCH", 2)
    monkeypatch.setattr(tune, "CODE_RATES", {4.0: 0.01, math.inf: 1e-3})  # few steps are to change something
    options = {"tune": "codes", "tune_steps": 12, "hessians": tmp_path / "weights.gguf"}
    tuned = run(crafted.DEMO, crafted.DEMO / "calib.txt", tmp_path / "tuned.gguf", "sq2w", **options)["tuned"]
    assert tuned["after"] < tuned["before"] and 0.001 < tuned["changed"] < 0.1
    del options["tune"], options["tune_steps"]
    run(crafted.DEMO, crafted.DEMO / "calib.txt", tmp_path / "plain.gguf", "sq2w", **options)
    before, after = values(tmp_path / "plain.gguf"), values(tmp_path / "tuned.gguf")
    assert all(np.array_equal(before[n], after[n]) == (n == "token_embd.weight") for n in before)


@pytest.mark.parametrize("name", TRAINED)
def test_a_bundle_is_the_stored_weight_and_has_a_gradient(runtime_library, name):
    found, weights = bundle(name)
    found.train_codes(weights, torch.Generator())
    kind, packed = types.get(name), found.packed()
    np.testing.assert_array_equal(found.weight().detach().numpy(), kind.decode(packed))
    found.weight().square().sum().backward()
    scale = found.fmt.scale(found.params).repeat_interleave(found.codes.shape[1] // found.params.shape[1], 1)
    torch.testing.assert_close(found.units.grad, 2 * found.weight().detach() * scale)
    with torch.no_grad():
        found.units += 2 * found.gap * torch.randn(found.units.shape, generator=torch.Generator().manual_seed(0))
    if found.change is not None:
        assert (found.change.grad > 0).all() or name == "q4_0"  # whose level 0 is no middle
        found.change.data += 0.3
    before = found.codes.clone()
    for _ in range(3):
        found.choose(torch.Generator())
    stored = found.packed()
    np.testing.assert_array_equal(found.weight().detach().numpy(), kind.decode(stored))
    assert (found.codes != before).float().mean() > 0.3


@pytest.mark.parametrize("name", TRAINED)
def test_numbers_begin_between_levels_and_weights_and_keep_the_codes(runtime_library, name):
    found, weights = bundle(name, 32)
    found.train_codes(weights, torch.Generator())
    before, units = found.codes, found.units.detach()
    found.choose(torch.Generator().manual_seed(7))
    assert (found.codes == before).float().mean() > 0.999  # a path that begins elsewhere may be nearer
    scale = found.fmt.scale(found.params).repeat_interleave(found.codes.shape[1] // found.params.shape[1], 1)
    offset = found.fmt.offset(found.params).repeat_interleave(found.codes.shape[1] // found.params.shape[1], 1)
    levels = found.fmt.levels[before.int()]
    kept = (weights - units * scale - offset).square().sum()
    assert kept < 0.6 * (weights - levels * scale - offset).square().sum()


@pytest.mark.parametrize("name", ["sq6w", "sq5w", "sq4w", "sq3w", "sq2w"])
def test_the_nearest_path_is_found_from_any_other(runtime_library, name):
    fmt = formats.for_type(types.get(name))
    chance = torch.Generator().manual_seed(0)
    wanted, other = (bundle(name)[0].codes.roll(turn, 0) for turn in (0, 1))
    aims = fmt.levels[wanted.int()]
    errors = []
    for _ in range(20):
        errors.append(float((fmt.levels[other.int()] - aims).square().sum()))
        other = windows.nearest(aims, other, fmt, chance)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]
    same = windows.nearest(aims, wanted, fmt, chance)  # of two windows with one level either may be taken
    assert torch.equal(fmt.levels[same.int()], aims)


def test_a_run_that_was_stopped_goes_on_with_the_same_text(runtime_library, tiny_llama, tmp_path, monkeypatch):
    folder, text = tiny_llama
    run(folder, text, tmp_path / "whole.gguf", "sq2", tune="scales", tune_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(folder, text, tmp_path / "again.gguf", "sq2", tune="scales", tune_steps=3)
    assert (tmp_path / ".again.gguf.unfinished" / "drawn.safetensors").exists()
    monkeypatch.setattr("gguf_splitq.calibration.model.Model.sample_tokens", None)
    run(folder, text, tmp_path / "again.gguf", "sq2", tune="scales", tune_steps=3)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_training_that_does_not_help_is_thrown_away(runtime_library, tiny_llama, tmp_path, monkeypatch):
    folder, text = tiny_llama
    run(folder, text, tmp_path / "plain.gguf")
    monkeypatch.setattr(tune, "RATES", dict.fromkeys(tune.RATES, 3.0))
    tuned = run(folder, text, tmp_path / "tuned.gguf", tune="scales", tune_steps=2)["tuned"]
    assert tuned["after"] == tuned["before"]
    for name, value in values(tmp_path / "plain.gguf").items():
        np.testing.assert_array_equal(value, values(tmp_path / "tuned.gguf")[name])


def test_text_is_drawn_when_the_calibration_text_would_be_seen_too_often():
    assert tune.drawn(64, 131_072) == 0
    assert tune.drawn(100, 131_072) == 100 * 4096 - 2 * 131_072
    assert tune.drawn(10_000, 131_072) == 1 << 20


@pytest.mark.parametrize(("name", "steps", "slower"), [("sq2w", 1280, 0.5), ("sq2w", 64, 1), ("sq3w", 1280, 1)])
def test_long_runs_of_short_windows_have_lower_rates(runtime_library, name, steps, slower):
    assert tune._slower([bundle(name)[0], bundle("sq2")[0]], 640, steps) == slower
