# SPDX-License-Identifier: MIT
"""Training layer by layer: gradients of the definition, gains on other tokens, the same bytes again, refusals."""

import contextlib
import json
import re
from pathlib import Path

import crafted
import numpy as np
import pytest
import torch
from test_calibrate import entries
from test_tune import values

from gguf_splitq import convert, display, errors, options, plan
from gguf_splitq.calibration import aims, fisher, layerwise, memory, moments, pieces, training
from gguf_splitq.calibration.model import CONTEXT, Model
from gguf_splitq.files import gguf_file
from gguf_splitq.types import get

STEPS = 12


def run(folder, text, outfile, type="q4_0", **options):
    report = outfile.with_suffix(".json")
    options = {"calib_tokens": 4096, "threads": 1, "tune": "layers", "tune_steps": STEPS} | options
    convert.convert(folder, type, outfile=outfile, calib=str(text), report=report, **options)
    return json.loads(report.read_text())["calibration"]


@pytest.fixture(scope="module")
def whole(runtime_library, tiny_llama, tmp_path_factory):
    """(checkpoint, text, the report of an uninterrupted run, its file)."""
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    return *tiny_llama, run(*tiny_llama, out), out


class Given:
    """A layer of the tiny model with what goes through it, its matrices rounded to nearest."""

    def __init__(self, folder, tmp_path, stack, type="sq2", batches=2, held=True):
        torch.manual_seed(0)
        self.model = Model(folder)
        module = stack.enter_context(self.model.layer(0))
        tokens = torch.randint(3, 4000, (8 * batches, CONTEXT))
        exact, stored = (self.model.inputs(tokens, tmp_path) for _ in range(2))
        for i, hidden in enumerate(stored):
            stored[i] = hidden + 0.1 * hidden.std() * torch.randn_like(hidden)
        held = (exact[0][:2].flip(1), stored[0][:2].flip(1)) if held else None
        weights = [torch.rand(8, CONTEXT) for _ in range(batches)]
        pool = stack.enter_context(fisher.workers(2))
        self.passing = aims.Passing(self.model, module, 0, pool, exact, stored, held, weights)
        kind, self.pieces, self.stored = get(type), [], {}
        for layer in moments.layers_of(module):
            weight = layer.weight.float().numpy()
            packed = kind.encode(weight)
            self.stored[layer.key] = torch.from_numpy(kind.decode(packed))
            entry = type_entry(layer.name, kind, weight.shape)
            self.pieces.append(training.Piece(entry, layer, torch.arange(len(weight)), packed, weight))


def type_entry(name, kind, shape):
    return plan.Entry(gguf_file.Tensor(name, shape, 0, 0, 0, Path()), kind, "")


@pytest.fixture
def given(runtime_library, tiny_llama, tmp_path):
    with contextlib.ExitStack() as stack:
        yield lambda **options: Given(tiny_llama[0], tmp_path, stack, **options)


def quantized(case):
    parts = training.parts_of(case.pieces, True, case.model.device)
    return training.Quantized(parts, lambda bundle: (0.003, 0.05), 0)


def test_gradients_are_those_of_the_definition(given, monkeypatch):
    case, slopes = given(), []
    passing, model = case.passing, case.model
    layer = layerwise._Layer(passing, quantized(case), case.stored)
    batches, _ = layer.divided()
    monkeypatch.setattr(training.Part, "descend", lambda *given: slopes.append(given))
    layer.descend(training.Step(0, 1), *batches[1]())

    weights = {key: weight.requires_grad_() for key, weight in layer.quantized.weights().items()}
    named = {name: weight for (name, _), weight in weights.items()}
    args, kwargs = model._arguments_of(torch.Size([8, CONTEXT]))[0]

    def through(hidden, parameters):
        return torch.func.functional_call(passing.module, parameters, (hidden, *args), kwargs)

    exact, stored = passing.exact[1], passing.stored[1]
    with torch.no_grad():
        target = (through(exact, {}) + through(stored, {})) / 2
    w = passing.weights[1] / torch.cat(passing.weights).mean()
    loss = ((through(stored, named) - target).square().sum(-1) * w).sum()
    loss.backward()
    assert sum(len(part.order) for part, *_ in slopes) == sum(len(weight) for weight in weights.values())
    for part, slope, _ in slopes:
        wanted = weights[part.key].grad
        torch.testing.assert_close(slope, wanted[part.order], rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert layer.error(batches[1]()) == pytest.approx(float(loss.detach() / w.sum()), rel=1e-3)


@pytest.mark.parametrize(("type", "rate", "steps"), [("sq2", 0.05, 6), ("sq2w", 0.005, 12), ("q4_0", 0.01, 12)])
def test_other_tokens_gain_and_the_rows_are_what_was_judged(given, monkeypatch, type, rate, steps):
    monkeypatch.setattr(layerwise, "_rates", lambda bundle: (0.003, rate))
    case = given(type=type)
    rows, report = layerwise.run(case.passing, case.pieces, case.stored, steps)
    assert report["after"] < report["before"] and 0 < report["changed"] < 0.5
    stored = {p.layer.key: torch.from_numpy(get(type).decode(rows[p.entry.name])) for p in case.pieces}
    again = [
        training.Piece(p.entry, p.layer, p.order, rows[p.entry.name], stored[p.layer.key].numpy()) for p in case.pieces
    ]
    _, other = layerwise.run(case.passing, again, stored, 1)
    assert other["before"] == pytest.approx(report["after"], rel=1e-6)


def test_without_other_tokens_some_are_not_trained_on(given):
    case = given(batches=1, held=False)
    layer = layerwise._Layer(case.passing, quantized(case), case.stored)
    [batch], judge = layer.divided()
    assert [len(part) for part in batch()] == [7] * 3 and [len(part) for part in judge] == [1] * 3
    assert torch.equal(judge[0], case.passing.stored[0][7:])


def test_the_number_of_threads_does_not_show(given, monkeypatch):
    monkeypatch.setattr(layerwise, "_rates", lambda bundle: (0.003, 0.05))
    case, found = given(), []
    for threads in (1, 3):
        with fisher.workers(threads) as pool, pieces.alone(1) as one:
            case.passing.pool = pool
            own = [
                training.Piece(p.entry, p.layer, p.order, p.packed, p.layer.weight.float().numpy()) for p in case.pieces
            ]
            found.append(one.submit(layerwise.run, case.passing, own, case.stored, 3).result())
    assert found[0][1] == found[1][1] and found[0][0].keys() == found[1][0].keys() != set()
    assert all(np.array_equal(rows, found[1][0][name]) for name, rows in found[0][0].items())


def test_layers_gain_in_a_file(whole, tmp_path):
    folder, text, trained, out = whole
    tuned = trained["tuned"]
    assert tuned["layers"] == 2 and tuned["gained"] > 0 and tuned["error"] < 1
    assert re.match(r"tuning: \d of 2 layers gained, held-out error \d+\.\d% of before; ", display._tuned(tuned))
    plain = run(folder, text, tmp_path / "plain.gguf", tune=None, tune_steps=None)
    before, after = values(tmp_path / "plain.gguf"), values(out)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert plain["tuned"] is None and changed and all(re.match(r"blk\.\d\.(attn|ffn)_(?!norm)", n) for n in changed)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, capsys):
    folder, text, _, out = whole
    original = layerwise.run

    def stops(given, *args):
        return original(given, *args) if given.index == 0 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "run", stops)
        with pytest.raises(ZeroDivisionError):
            run(folder, text, tmp_path / "out.gguf")
    assert (tmp_path / ".out.gguf.unfinished" / "layer-00000.safetensors").exists()
    assert f"training layer 0: {STEPS} of {STEPS}" in capsys.readouterr().err
    report = run(folder, text, tmp_path / "out.gguf", threads=2)
    said = capsys.readouterr().err
    assert f"training layer 1: {STEPS} of {STEPS}" in said and "training layer 0" not in said
    assert (tmp_path / "out.gguf").read_bytes() == out.read_bytes() and report["tuned"]["layers"] == 2


def test_a_bar_goes_on_after_another_one():
    progress = display.Progress()
    for what, done in (("solving", 1), ("training layer 1", 16), ("training layer 1", 32), ("solving", 2)):
        progress.step(what, done, 128)
    assert [(task.description, task.completed) for task in progress.bar.tasks] == [
        ("solving", 2),
        ("training layer 1", 32),
    ]


def test_a_layer_that_does_not_gain_keeps_what_it_had(whole, tmp_path, monkeypatch):
    folder, text, *_ = whole
    monkeypatch.setattr(layerwise, "_rates", lambda bundle: (0.003, 5.0))
    trained = run(folder, text, tmp_path / "trained.gguf")
    plain = run(folder, text, tmp_path / "plain.gguf", tune=None, tune_steps=None)
    assert trained["tuned"]["gained"] == trained["tuned"]["changed"] == 0 and trained["tuned"]["error"] == 1
    assert trained["divergence"] == plain["divergence"]
    before, after = values(tmp_path / "plain.gguf"), values(tmp_path / "trained.gguf")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_types_that_cannot_be_trained_are_said(runtime_library, tiny_llama, tmp_path):
    report = run(*tiny_llama, tmp_path / "out.gguf", "sq3c")
    assert report["tuned"]["layers"] == 0 and "no layer has a type" in display._tuned(report["tuned"])


def test_what_does_not_go_together_is_refused(tiny_llama, tmp_path, monkeypatch):
    with pytest.raises(errors.UsageError, match="--aim plain: --tune layers trains"):
        run(*tiny_llama, tmp_path / "out.gguf", aim="plain")
    monkeypatch.setattr("gguf_splitq.calibration.ranks.launched", lambda: True)
    with pytest.raises(errors.UsageError, match="--tune layers is for one process"):
        options.check_layers("half")


def test_memory_is_that_of_one_layer():
    one, two = (memory.peak(entries(*[()] * n), 2048, 1, tune="layers") for n in (1, 20))
    plain = memory.peak(entries(()), 2048, 1)
    weights = 4 * (4 * 1024**2 + 3 * 1024 * 2816)
    assert one == two == plain + 5 * weights
    assert memory.on_gpu(entries(()), 16, tune="layers") >= 5 * weights


def test_experts_are_trained_as_well(runtime_library, tiny_llama, tmp_path):
    folder, out = crafted.hf_folder(tmp_path / "mixtral", "mixtral"), tmp_path / "out.gguf"
    found = run(folder, tiny_llama[1], out, tune_steps=6, load=False)
    assert found["left"] == [] and found["tuned"]["layers"] == 2
