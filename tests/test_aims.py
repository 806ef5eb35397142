# SPDX-License-Identifier: MIT
"""Half-way aims against the definition, computed from whole models; stages, routes, and what is fallen back to."""

import copy
import json
import re

import pytest
import torch
import transformers
from test_calibrate import TEXT, checkpoint, threads_of_torch, tokens  # noqa: F401 (a fixture)

from gguf_splitq import convert
from gguf_splitq.calibration import aims, moments
from gguf_splitq.calibration.model import Model
from gguf_splitq.errors import InputError


def run(model, text, tmp_path, stored, threads=1, done=(), held=None, wanted=None, at_once=(None, None)):
    """Name -> its layer with what was measured, and the stages; `stored` makes of a weight what is put in its place.

    at_once: sequences that are run at a time, on the way backward and then forward.
    """
    weights, found, stages = {}, {}, []
    model.at_once = at_once[0]
    aims.information(model, text, tmp_path, threads, weights.__setitem__)
    model.at_once = at_once[1]
    every = wanted or (lambda index, layers: {layer.name for layer in layers if layer.weight.dim() == 2})
    held = text[:0] if held is None else held
    passing = aims.run(model, text, held, weights.__getitem__, every, tmp_path, threads, done)
    while True:
        try:
            stage = next(passing)
        except StopIteration as end:
            return found, stages, end.value
        stages.append((stage.index, {layer.name for layer in stage.layers}, stage.last))
        for layer in stage.layers:
            found[stage.index, layer.name] = copy.copy(layer)
            layer.stored, layer.nearest = stored(layer.weight), layer.weight.clone()


def coarse(weight):
    return (weight * 20).round() / 20


def inputs_and_outputs(model, text):
    """Of each linear layer: x [tokens, in] and y, the sum of both where it goes into the residual stream."""
    seen = {}
    for name, module in model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: [x[0], y]}))
    residual = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, x, index=index: residual.update({f"{index}.self_attn.o_proj": x[0]}))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, x, index=index: residual.update({f"{index}.mlp.down_proj": x[0]})
        )
    with torch.no_grad():
        model(text)
    return {
        name: (x.flatten(0, 1).double(), (y + residual.get(name, 0)).flatten(0, 1).double())
        for name, (x, y) in seen.items()
    }


def test_hessians_and_pulls_are_those_of_the_definition(checkpoint, tmp_path):  # noqa: F811
    folder, text = checkpoint("llama"), tokens(9)
    model, weights = Model(folder), {}
    aims.information(model, text, tmp_path, 1, weights.__setitem__)
    found, stages, _ = run(model, text, tmp_path, coarse)
    parts = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    assert [{re.findall(r"(\w+)_proj", n)[0] for n in names} for _, names, _ in stages] == [set(p) for p in parts] * 2
    assert [(index, last) for index, _, last in stages] == [(i, n == 3) for i in range(2) for n in range(4)]

    load = transformers.AutoModelForCausalLM.from_pretrained
    exact, stored = (load(folder, dtype=torch.float32).eval() for _ in range(2))
    wanted = inputs_and_outputs(exact, text)
    for index in range(2):
        for _, names, _ in stages[4 * index : 4 * index + 4]:
            behind = inputs_and_outputs(stored, text)  # before this stage is stored
            for name in names:
                layer, module = found[index, name], f"{index}.{name.removesuffix('.weight')}"
                (_, y), (x, other) = wanted[module], behind[module]
                w = torch.cat(list(weights[index][name, None].values()), 1)[0].double()[:, None]
                torch.testing.assert_close(layer.hessian, x.T @ (w * x) / w.sum(), rtol=1e-3, atol=1e-6)
                torch.testing.assert_close(layer.pull, (w * (y - other)).T @ x / w.sum(), rtol=1e-2, atol=1e-5)
            with torch.no_grad():
                for name in names:
                    weight = stored.model.layers[index].get_parameter(name)
                    weight.copy_(coarse(weight))


def test_the_aim_solves_half_of_the_least_squares_problem():
    torch.manual_seed(0)
    x, e, weight = torch.randn(400, 24), torch.randn(400, 8), torch.randn(8, 24)
    layer = moments.Layer("a", weight, (x.T @ x).double() / 400, (e.T @ x).double() / 400)
    best = torch.linalg.lstsq(x, e).solution.T
    torch.testing.assert_close(aims.moved(weight, layer, torch.arange(8)) - weight, best / 2, rtol=1e-2, atol=1e-3)
    assert torch.equal(
        aims.moved(weight[[3]], layer, torch.tensor([3])), aims.moved(weight, layer, torch.arange(8))[[3]]
    )
    layer.pull = None
    assert aims.moved(weight, layer, torch.arange(8)) is weight


def test_a_hessian_that_rounding_made_indefinite_takes_a_larger_ridge():
    """As float32 sums of few tokens with nearly all of the weight can be."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 24).double(), torch.randn(8, 24)
    hessian = x.T @ x / 6
    hessian -= 1e-3 * hessian.diagonal().mean() * torch.eye(24)
    layer = moments.Layer("a", weight, hessian, (torch.randn(6, 8).double().T @ x) / 6)
    change = aims.moved(weight, layer, torch.arange(8)) - weight
    assert torch.isfinite(change).all() and 0 < change.norm() < 10 * weight.norm()
    layer.hessian = (5 - 4 * torch.eye(24)).double()
    with pytest.raises(InputError, match="not positive definite"):
        aims.moved(weight, layer, torch.arange(8))


def test_where_nothing_is_changed_there_is_no_pull(checkpoint, tmp_path):  # noqa: F811
    for kind in ("gemma3", "phi3", "qwen2moe"):
        found, _, divergence = run(Model(checkpoint(kind)), tokens(2), tmp_path, torch.clone, held=tokens(2, seed=1))
        assert all(layer.hessian is not None for layer in found.values())
        assert all(not layer.pull.any() for layer in found.values())
        assert divergence == {"nearest": 0, "feedback": 0}


def test_held_out_tokens_tell_the_divergence(checkpoint, tmp_path):  # noqa: F811
    folder, held = checkpoint("llama"), tokens(3, seed=1)
    _, _, divergence = run(Model(folder), tokens(2), tmp_path, coarse, held=held)
    load = transformers.AutoModelForCausalLM.from_pretrained
    exact, stored = (load(folder, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for module in stored.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(coarse(module.weight))
        p, q = (each(held).logits.log_softmax(-1) for each in (exact, stored))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence["feedback"] == pytest.approx(expected, rel=1e-3) and abs(divergence["nearest"]) < 1e-6


def test_experts_see_the_same_tokens_in_both_models(checkpoint, tmp_path):  # noqa: F811
    """Whatever is stored: else inputs would be paired with another token's."""
    model, text = Model(checkpoint("mixtral")), tokens(9)

    def wanted(index, layers):
        return {layer.name for layer in layers if "gate.weight" not in layer.name}

    found, stages, _ = run(model, text, tmp_path, lambda w: torch.randn(w.shape) * w.std(), wanted=wanted)
    names = [{name.split("[")[0].rsplit(".", 1)[-1] for name in members if "[" in name} for _, members, _ in stages[:4]]
    assert {"gate_up_proj"} in names and {"down_proj"} in names
    experts = [layer for (_, name), layer in found.items() if "[" in name]
    assert len(experts) == 2 * 2 * 4 and all(layer.pull is not None for layer in experts)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3moe"])
def test_weights_are_of_their_tokens_however_a_batch_is_divided(checkpoint, tmp_path, kind):  # noqa: F811
    """An expert has its tokens in an order that depends on the batch."""

    def wanted(index, layers):
        return {layer.name for layer in layers if "gate.weight" not in layer.name}

    text, first = tokens(9), None
    for at_once in ((8, 8), (None, None), (8, None), (None, 8), (4, 1)):
        found, _, _ = run(Model(checkpoint(kind)), text, tmp_path, coarse, wanted=wanted, at_once=at_once)
        first = first or found
        assert sum(layer.key[1] is not None for layer in found.values()) == 2 * 2 * 4
        for key, layer in found.items():
            for one, other in ((layer.hessian, first[key].hessian), (layer.pull, first[key].pull)):
                assert float((one - other).norm()) <= 1e-3 * float(other.norm())


def test_tokens_that_only_one_pass_gave_to_an_expert_get_the_mean():
    known = torch.tensor([[2.0, 4.0, 6.0], [7, 1, 5]])
    pairs = [aims._Pair(torch.zeros(len(rows), 1), None, torch.tensor(rows)) for rows in ([1, 5], [6, 7])]
    assert [w.tolist() for _, w in aims._weighted(pairs, known)] == [[4, 6], [4, 2]]
    [(_, w)] = aims._weighted([aims._Pair(torch.zeros(3, 1), None, None)], known)
    assert w.tolist() == [4, 4, 4]


def test_the_same_at_any_number_of_threads_and_from_finished_layers(checkpoint, tmp_path):  # noqa: F811
    model, text, first = Model(checkpoint("llama")), tokens(10), None
    for threads, done in ((1, ()), (3, ()), (2, (0,))):
        with threads_of_torch(threads):
            found, stages, _ = run(model, text, tmp_path, coarse, threads, done)
        assert len(stages) == 8 - 3 * len(done)
        first = first or found
        for (index, name), layer in found.items():
            if index not in done:
                assert torch.equal(layer.hessian, first[index, name].hessian)
                assert torch.equal(layer.pull, first[index, name].pull)


def test_a_matrix_whose_output_is_written_over_has_a_plain_aim(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    model = Model(checkpoint("llama"))
    kind = type(model.layers[0].mlp)

    def forward(self, x):
        up = self.up_proj(x).mul_(0.5)
        return self.down_proj(up * self.act_fn(self.gate_proj(x)))

    monkeypatch.setattr(kind, "forward", forward)
    found, _, _ = run(model, tokens(2), tmp_path, coarse)
    assert {name for (_, name), layer in found.items() if layer.pull is None} == {"mlp.up_proj.weight"}
    assert all(layer.hessian is not None for layer in found.values())


@pytest.mark.parametrize("name", ["sq2", "q2_k", "sq2w", "sq2c"])
def test_aims_pay_on_other_tokens(runtime_library, checkpoint, tmp_path, name):  # noqa: F811
    """Of a model of random weights, whose first layers' errors run through the others."""
    report = tmp_path / "report.json"
    options = dict(calib=str(TEXT), calib_tokens=16 * 512, report=report, threads=1)
    convert.convert(checkpoint("llama"), name, tmp_path / "half.gguf", **options)
    found = json.loads(report.read_text())["calibration"]
    assert found["held_out"] is None and found["divergence"]["feedback"] < found["divergence"]["nearest"]
