# SPDX-License-Identifier: MIT
"""Training scales, norms and codes: it helps on other tokens, stores what it trained, and refuses what harms."""

import gc
import json
import math
import weakref

import crafted
import numpy as np
import pytest
import torch
import transformers

from gguf_splitq import convert, plan, types
from gguf_splitq.calibration import training, tune
from gguf_splitq.calibration.model import Model
from gguf_splitq.coding import formats, windows
from gguf_splitq.files import gguf_file
from gguf_splitq.rewrite import read_float32, to_float32

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
    found = training.Bundle.of(formats.for_type(kind), kind.encode(weights))
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
def test_a_bundle_is_the_stored_weight_and_has_gradients(runtime_library, name):
    found, weights = bundle(name)
    found.train_codes(weights, torch.Generator())
    kind, packed = types.get(name), found.packed()
    np.testing.assert_array_equal(found.weight().numpy(), kind.decode(packed))
    of_change, of_levels = found.gradients(2 * found.weight())  # of the sum of squares
    scale = found.fmt.scale(found.params).repeat_interleave(found.codes.shape[1] // found.params.shape[1], 1)
    torch.testing.assert_close(of_levels, 2 * found.weight() * scale)
    noise = torch.randn(found.units.shape, generator=torch.Generator().manual_seed(0))
    found.want(found.wanted + 2 * found.gap * noise)
    if found.change is not None:
        assert (of_change > 0).all() or name == "q4_0"  # whose level 0 is no middle
        found.change += 0.3
    before = found.codes.clone()
    for _ in range(3):
        found.choose(torch.Generator())
    stored = found.packed()
    np.testing.assert_array_equal(found.weight().numpy(), kind.decode(stored))
    assert (found.codes != before).float().mean() > 0.3


@pytest.mark.parametrize("name", TRAINED)
def test_numbers_begin_between_levels_and_weights_and_keep_the_codes(runtime_library, name):
    found, weights = bundle(name, 32)
    found.train_codes(weights, torch.Generator())
    before, units = found.codes, found.wanted
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


def test_a_pass_that_is_over_holds_no_memory():
    """What a GPU has computed of a layer is given back at once, not when Python looks for cycles."""
    module = torch.nn.Linear(4, 4)
    gc.disable()
    try:
        with training.Products(module, {}, [("weight", None)]) as seen:
            output = module(torch.ones(1, 4))
        calls, _ = seen.gradients(output.sum())
        assert [key for key, *_ in calls] == [("weight", None)]
        over = weakref.ref(seen)
        del seen
        assert over() is None
    finally:
        gc.enable()


def test_numbers_are_rounded_at_random_and_right_on_average():
    chance = torch.Generator().manual_seed(0)
    values = torch.tensor([1.001, -1.001, 3e-20, 0.0])[:, None].repeat(1, 100_000)
    found = training.rounded(values, training.noises(values, chance)[0]).float()
    torch.testing.assert_close(found.mean(1), values[:, 0], rtol=1e-4, atol=0)
    assert all(len(row.unique()) == count for row, count in zip(found, (2, 2, 2, 1), strict=True))


def test_moments_of_16_bits_lead_where_exact_ones_do():
    """Down a quadratic whose curvatures differ by 1000, with noise in the gradient."""
    chance, noise = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    curve = torch.logspace(-2, 1, 4096)
    ours, exact = torch.ones(4096), torch.ones(4096, requires_grad=True)
    adam, other = training.Adam(ours.shape, ours.device), None
    adam.begin(float(curve.square().mean()))
    for number in range(300):
        step, off = training.Step(number, 300), 0.1 * torch.randn(4096, generator=noise)
        ours -= 0.02 * step.rate * adam.change(curve * ours + off, step, training.noises(ours, chance))
        exact.grad = curve * exact.detach() + off
        other = other or torch.optim.Adam([exact], betas=training.BETAS, eps=adam.epsilon)
        other.param_groups[0]["lr"] = 0.02 * step.rate
        other.step()
    loss, wanted = (float((curve * x.square()).sum()) for x in (ours, exact.detach()))
    assert loss == pytest.approx(wanted, rel=0.03) and wanted < 0.05 * float(curve.sum())


def test_steps_smaller_than_a_unit_add_up(runtime_library):
    found, weights = bundle("sq3", 32)
    found.train_codes(weights, torch.Generator())
    before, chance = found.wanted, torch.Generator().manual_seed(0)
    adam, unit = training.Adam(found.units.shape, found.units.device), (found.reach[1] - found.reach[0]) / 65534
    for number in range(50):
        gradient, step = torch.ones(found.units.shape), training.Step(number, 50)
        found.move(adam, gradient, 0.1 * unit / found.gap, step, training.noises(gradient, chance))
    moved = (before - found.wanted)[before - found.reach[0] > 10 * unit] / unit
    assert float(moved.mean()) == pytest.approx(5, abs=0.1) and float(moved.std()) < 3


@pytest.fixture(scope="module")
def given(runtime_library, tiny_llama, tmp_path_factory):
    """(checkpoint, an open file, entries of sq2, their rows rounded to nearest, sequences)."""
    folder = tiny_llama[0]
    path = convert.convert(folder, "bf16", tmp_path_factory.mktemp("given") / "m.gguf", threads=1)
    tokens = torch.randint(3, 4000, (24, 512), generator=torch.Generator().manual_seed(0))
    with gguf_file.read(path) as file:
        entries = [e for e in plan.make(file.tensors, "sq2") if e.quantized and e.name.startswith("blk.")]
        rows = {e.name: e.coder.encode(read_float32(file, e.tensor, 0, e.tensor.n_rows)) for e in entries}
        yield folder, tune.Given(file, entries, rows), tokens


def trained(given, tmp_path, steps=4, threads=1, what="codes", **options):
    folder, stored, tokens = given
    return tune.run(lambda: Model(folder), stored, tokens[:20], tokens[20:], what, steps, tmp_path, threads, **options)


@pytest.mark.parametrize("what", ["scales", "codes"])
def test_the_number_of_threads_does_not_show(given, tmp_path, monkeypatch, what):
    monkeypatch.setattr(tune, "CODE_RATES", {math.inf: 0.05})
    monkeypatch.setattr(training, "ROWS", 40)
    one, many = (trained(given, tmp_path, threads=threads, what=what) for threads in (1, 3))
    assert one[1] == many[1] and one[1]["after"] < one[1]["before"] and (one[1]["changed"] > 0.01) == (what == "codes")
    assert all(np.array_equal(rows, many[0][name]) for name, rows in one[0].items())
    assert not list(tmp_path.iterdir())


def test_what_ends_in_no_number_is_not_stored(given, tmp_path, monkeypatch):
    found = iter([0.5, math.nan])
    monkeypatch.setattr(tune._Student, "divergence", lambda *_: next(found))
    rows, report = trained(given, tmp_path, steps=1, what="scales")
    assert rows == {} and report["before"] == report["after"] == 0.5


def test_gradients_are_those_of_the_definition(given, tmp_path, monkeypatch):
    """The mean divergence of two sequences, by autograd through the whole model."""
    (folder, stored, tokens), parts, norms = given, [], {}
    monkeypatch.setattr(training, "ROWS", 40)
    monkeypatch.setattr(training.Part, "descend", lambda *given: parts.append(given))
    monkeypatch.setattr(tune._Norm, "descend", lambda norm, slope, _: norms.update({norm.key: slope}))
    tune.run(lambda: Model(folder), stored, tokens[:2], tokens[20:], "codes", 1, tmp_path, 1)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    names = [f"model.layers.{part.tensor.split('.')[1]}.{part.key[0]}" for part, *_ in parts]
    assert len(set(names)) == 14 and len(names) > 14 and len(norms) == 5
    for name, (part, slope, _) in zip(names, parts, strict=True):
        parameters[name].data[part.order] = part.bundle.weight().view(slope.shape)
    with torch.no_grad():
        wanted = model(tokens[:2]).logits.log_softmax(-1)
    found = torch.func.functional_call(model, parameters, (tokens[:2],)).logits.log_softmax(-1)
    torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True).div(1024).backward()
    slopes = [(parameters[name].grad[part.order], slope) for name, (part, slope, _) in zip(names, parts, strict=True)]
    for exact, slope in slopes + [(parameters[key].grad, slope) for key, slope in norms.items()]:
        torch.testing.assert_close(slope, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_a_run_that_was_stopped_goes_on_with_the_same_text(runtime_library, tiny_llama, tmp_path, monkeypatch):
    folder, text = tiny_llama
    run(folder, text, tmp_path / "whole.gguf", "sq2", tune="scales", tune_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(tune._Student, "descend", lambda *_: 1 / 0)
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
