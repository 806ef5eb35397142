# SPDX-License-Identifier: MIT
"""Calibration: streamed layers against whole models, Hessians against brute force, many architectures, bad input."""

import contextlib
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import crafted
import numpy as np
import pytest
import torch
import transformers

from gguf_splitq import cli, convert, display, errors, plan, types
from gguf_splitq.calibration import fisher, memory, moments, pieces, solve
from gguf_splitq.calibration.model import Model
from gguf_splitq.coding import formats, solver
from gguf_splitq.files import checkpoint as checkpoint_files
from gguf_splitq.files import gguf_file

torch.set_num_threads(1)  # the models are too small to share

COMMON = dict(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING = dict(head_dim=32, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
KINDS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": ("Gemma3", SLIDING),
    "phi3": ("Phi3", dict(sliding_window=64)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2moe": ("Qwen2Moe", EXPERTS | dict(shared_expert_intermediate_size=64)),
    "qwen3moe": ("Qwen3Moe", EXPERTS | dict(head_dim=32)),
}
TEXT = crafted.DEMO / "calib.txt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(kind) -> a random two-layer checkpoint with the demo's tokenizer."""
    made = {}

    def make(kind):
        if kind not in made:
            name, options = KINDS[kind]
            config = getattr(transformers, name + ("TextConfig" if kind == "gemma3" else "Config"))
            torch.manual_seed(0)
            model = getattr(transformers, name + "ForCausalLM")(config(**COMMON | options))
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms that are not all 0 or 1
                    torch.nn.init.normal_(parameter, 0.5, 0.1)
            made[kind] = tmp_path_factory.mktemp("model") / kind
            model.to(torch.bfloat16).save_pretrained(made[kind], max_shard_size="300KB")
            for file in crafted.TOKENIZER:
                shutil.copy(crafted.DEMO / file, made[kind])
        return made[kind]

    return make


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint to be damaged."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "damaged")


def tokens(sequences, seed=0):
    return torch.randint(3, 4096, (sequences, 512), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def changed(folder):
    """name -> tensor of a checkpoint in one file, written back afterwards."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    yield tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# The model, streamed


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layer_by_layer_is_the_whole_model(checkpoint, kind):
    folder, text = checkpoint(kind), tokens(10)  # a second, smaller batch
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    expected = whole(text, output_hidden_states=True, use_cache=False)
    model = Model(folder)
    states = model.inputs(text)
    assert [len(state) for state in states] == [8, 2]
    for index in range(len(model)):
        # Another number of tokens, as experts have it here, may be added up in another order.
        torch.testing.assert_close(torch.cat(states), expected.hidden_states[index], rtol=1e-5, atol=1e-6)
        with model.layer(index) as layer:
            states = [model.forward(layer, index, state) for state in states]
    logits = torch.cat([model.head(state) for state in states])
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_one_layer_is_in_memory_at_a_time(checkpoint, kind):
    model = Model(checkpoint(kind))

    def real():
        return sum(p.nbytes for p in model.layers.parameters() if not p.is_meta)

    assert real() == 0
    for index in range(len(model)):
        with model.layer(index) as layer:
            size = sum(p.nbytes for p in layer.parameters())
            assert real() == size > 0
        assert real() == 0
    assert not any(p.is_meta for p in model.module.get_input_embeddings().parameters())


def another_name(folder, tensors, where):
    """A shard that is not called model..."""
    where |= {name: "extra.safetensors" for name in where if ".layers.1." in name}
    return {}


def a_stale_file(folder, tensors, where):
    """One that the index does not name, with the name of a checkpoint in one file."""
    from safetensors.torch import save_file

    save_file({name: t + 1 for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return {}


def a_tensor_twice(folder, tensors, where):
    """In the last shard as well, where the index does not have it."""
    where |= {name: "model-2.safetensors" for name in where if ".layers.1." in name}
    return {name: t + 1 for name, t in tensors.items() if ".layers.0." in name}


def one_file(folder, tensors, where):
    """And no index."""
    where |= dict.fromkeys(where, "model.safetensors")
    return {}


@pytest.mark.parametrize("kind", [another_name, a_stale_file, a_tensor_twice, one_file])
def test_runs_the_weights_that_are_written(checkpoint, tmp_path, monkeypatch, kind):
    from safetensors.torch import load_file, save_file

    folder, tensors = shutil.copytree(checkpoint("llama"), tmp_path / "model"), {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    where = dict.fromkeys(tensors, "model-1.safetensors")
    others = kind(folder, tensors, where)
    for shard in set(where.values()):
        held = {name: t for name, t in tensors.items() if where[name] == shard}
        save_file((others if shard == "model-2.safetensors" else {}) | held, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if kind is one_file:
        (folder / "model.safetensors.index.json").unlink()
    model = Model(folder)
    monkeypatch.chdir(tmp_path)  # a relative path serves as well
    written = convert.convert("model", "bf16", tmp_path / "out.gguf", threads=1)
    with gguf_file.read(written) as file:
        by_name = {t.name: t for t in file.tensors}
        for index in (0, 1):
            with model.layer(index) as layer:
                tensor = by_name[f"blk.{index}.ffn_down.weight"]
                rows = file.read_rows(tensor, 0, tensor.n_rows)
                expected = tensors[f"model.layers.{index}.mlp.down_proj.weight"]
                assert torch.equal(layer.mlp.down_proj.weight, expected.float())
                assert np.array_equal(rows.view(np.int16), expected.view(torch.int16).numpy())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_may_be_in_a_file(checkpoint, tmp_path, dtype):
    model, text = Model(checkpoint("llama"), dtype=dtype), tokens(11)
    results = []
    for states in (model.inputs(text), model.inputs(text, tmp_path)):
        with model.layer(0) as layer:
            for i, state in enumerate(states):
                states[i] = model.forward(layer, 0, state)
        results.append(torch.cat(list(states)))
    assert torch.equal(*results) and results[0].shape == (11, 512, 64)
    assert list(tmp_path.iterdir()) == []


def test_of_a_long_text_pieces_are_taken_evenly(checkpoint, tmp_path):
    model, file = Model(checkpoint("llama")), tmp_path / "text.txt"

    def read(text):
        file.write_text(text)
        return model.read_tokens(file, 2048)[:, 10:]

    early, late, both = read("early " * 3000), read("late " * 3000), read("early " * 40_000 + "late " * 40_000)
    assert both.shape == (4, 502)
    assert set(both[0].tolist()) == set(early[0].tolist()) != set(late[0].tolist()) == set(both[-1].tolist())


def test_computes_in_bfloat16_too(checkpoint, tmp_path):
    model = Model(checkpoint("llama"), dtype=torch.bfloat16)
    (state,) = model.inputs(tokens(4))
    with model.layer(0) as layer:
        assert model.forward(layer, 0, state).dtype == torch.bfloat16
    assert model.head(state).dtype == torch.float32
    rough, fine = (
        {(i, part.name): part.hessian for i, layers in moments.run(m, tokens(4), tmp_path) for part in layers}
        for m in (model, Model(checkpoint("llama")))
    )
    for key, hessian in fine.items():
        assert hessian.dtype == rough[key].dtype == torch.float64
        assert torch.corrcoef(torch.stack([hessian.flatten(), rough[key].flatten()]))[0, 1] > 0.99


def test_gradients_pass_through_layers_and_head(checkpoint):
    model = Model(checkpoint("gemma3"))
    (state,) = model.inputs(tokens(2))
    with model.layer(0) as layer:
        weight = layer.mlp.down_proj.weight.requires_grad_()
        model.head(model.forward(layer, 0, state)).square().mean().backward()
        assert weight.grad.abs().sum() > 0


# Hessians


def test_hessians_are_the_second_moments_of_the_inputs_weighted_by_gradients(checkpoint, tmp_path):
    model, text = Model(checkpoint("qwen2")), tokens(10)
    whole = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32)
    whole.requires_grad_(False).get_input_embeddings().weight.requires_grad_(True)
    linears = {n: m for n, m in whole.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    inputs, outputs = {}, {}
    for name, module in linears.items():
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
        module.register_forward_hook(lambda _, x, y, name=name: outputs.update({name: y}))
    random, expected = torch.Generator().manual_seed(0), dict.fromkeys(linears, 0)
    for sequence in text.split(1):
        logits = whole(sequence).logits[0].log_softmax(-1)
        up_to = logits.detach().exp().cumsum(-1)
        labels = torch.searchsorted(up_to, torch.rand(len(logits), 1, generator=random) * up_to[:, -1:], right=True)
        gradients = torch.autograd.grad(logits.gather(1, labels).sum(), list(outputs.values()))
        for name, g in zip(outputs, gradients, strict=True):
            x = inputs[name][0].detach().double()
            expected[name] = expected[name] + x.T @ (x * g[0].double().square().sum(1, keepdim=True))
    measured = {}
    for index, layers in moments.run(model, text, tmp_path):
        measured |= {f"{index}.{part.name.removesuffix('.weight')}": part.hessian for part in layers}
    assert measured.keys() == linears.keys()
    for name, hessian in measured.items():
        torch.testing.assert_close(hessian / hessian.norm(), expected[name] / expected[name].norm(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length, few", [(512, False), (50, True)])
def test_experts_have_their_own_hessians_or_the_pooled_one(checkpoint, tmp_path, length, few):
    model, seen = Model(checkpoint("mixtral")), {}
    text = tokens(1)[:, :length]

    def see(index, batch, taken):
        seen.update({(index, *key): call for key, [call] in taken.items()})

    with fisher.workers(1) as pool:
        for _ in fisher.backward(model, text, lambda x, g, _: (x, g), see, tmp_path, pool):
            pass
    layers = {(index, part.name): part for index, found in moments.run(model, text, tmp_path) for part in found}
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        calls = {e: call for (i, n, e), call in seen.items() if (i, n) == (0, name)}
        assert sum(len(x) for x, _ in calls.values()) == 2 * length  # each token goes to two experts
        for expert in range(4):
            chosen = calls.values() if few else [calls[expert]]
            x, g = (torch.cat(part).double() for part in zip(*chosen, strict=True))
            weights = g.square().sum(1, keepdim=True)
            part = layers[0, f"{name}[{expert}]"]
            torch.testing.assert_close(part.hessian, x.T @ (x * weights) / weights.sum(), rtol=1e-4, atol=1e-7)
            assert part.pooled == few and (part.hessian is layers[0, f"{name}[0]"].hessian) == (few or expert == 0)


def test_rows_are_matched_by_content():
    layers = [moments.Layer(name, torch.randn(16, 32), torch.eye(32)) for name in ("other", "this")]
    rows, order = layers[1].weight.numpy().copy(), np.random.default_rng(0).permutation(16)
    layers[1].weight.zero_()  # what is solved already is still found
    for chosen in (order, order[:5]):
        found, where = moments.match(rows[chosen], layers)
        assert found.name == "this" and where.tolist() == chosen.tolist()
    assert moments.match(np.zeros((16, 32), np.float32), layers) is None
    assert moments.match(rows[[0, 0]], layers) is None
    twice = moments.Layer("twice", torch.from_numpy(rows[[1, 0, 1]]), torch.eye(32))
    assert moments.match(rows[[1, 1]], [twice])[1].tolist() == [0, 2]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint whose products are large enough to be shared by threads."""
    folder = tmp_path_factory.mktemp("model") / "wide"
    config = COMMON | dict(hidden_size=256, intermediate_size=768, num_hidden_layers=1)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    for file in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / file, folder)
    return folder


@contextlib.contextmanager
def threads_of_torch(count):
    """As a conversion with so many threads sets it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hessians_are_the_same_at_any_number_of_threads(wide, tmp_path, dtype):
    model, first = Model(wide, dtype=dtype), None
    text = model.read_tokens(TEXT, 4608)  # a batch and a sequence
    for threads in (1, 2, 3, 4):
        with threads_of_torch(threads):
            [(_, layers)] = moments.run(model, text, tmp_path, threads)
        hessians = {part.name: part.hessian for part in layers}
        first = first or hessians
        assert all(torch.equal(hessian, first[name]) for name, hessian in hessians.items())
    assert {len(hessian) for hessian in first.values()} == {256, 768}


def test_blocks_of_columns_are_the_whole_product(monkeypatch):
    monkeypatch.setattr(moments, "COLUMNS", 24)
    moment, pairs = moments.Moment(), [(torch.randn(n, 64), torch.rand(n)) for n in (50, 30)]
    for block in moment.add(pairs[:1]) + moment.add(pairs[1:]):
        block()
    expected = sum(x.T.double() @ (x * g[:, None]).double() for x, g in pairs) / sum(float(g.sum()) for _, g in pairs)
    torch.testing.assert_close(moment.mean(), expected, rtol=1e-4, atol=1e-6)
    assert moment.count == 80


def test_own_text_is_the_same_at_any_number_of_threads(checkpoint):
    model, drawn = Model(checkpoint("llama")), []
    for threads in (1, 3):
        with threads_of_torch(threads):
            drawn.append(model.sample_tokens(20 * 512, threads))
    assert torch.equal(*drawn) and drawn[0].shape == (20, 512)
    assert len(drawn[0].unique(dim=0)) == 20
    assert len(drawn[0][:, 2:].unique()) > 1000  # of 4096, by a model of random weights


# Whole conversions


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_calibrated_file_is_the_same_at_any_number_of_threads(runtime_library, wide, tmp_path, dtype):
    kinds = ["ffn_down=sq2", "attn_output=sq2w"]
    first, options = None, dict(calib=str(TEXT), calib_tokens=4608, calib_dtype=dtype, tensor_type=kinds)
    for threads in (1, 2, 3, 4):
        path = convert.convert(wide, "q8_0", tmp_path / f"{threads}.gguf", threads=threads, **options)
        data = path.read_bytes()
        first = first or data
        assert data == first


def test_the_precision_is_a_setting(runtime_library, checkpoint, tmp_path):
    cache, report = tmp_path / "h.gguf", tmp_path / "report.json"
    options = dict(calib=str(TEXT), calib_tokens=2048, hessians=cache, report=report, threads=1)
    for dtype in ("f32", "bf16"):
        cache.unlink(missing_ok=True)
        path = tmp_path / f"{dtype}.gguf"
        convert.convert(checkpoint("llama"), "sq2", path, calib_dtype=dtype, **options)
        with gguf_file.read(path) as file:
            assert json.loads(file.get("gguf_splitq.options", str, ""))["calib_dtype"] == dtype
        assert json.loads(report.read_text())["calibration"]["dtype"] == dtype
    with pytest.raises(errors.UsageError, match="calib_dtype bf16 and this run has f32"):
        convert.convert(checkpoint("llama"), "sq3", tmp_path / "x.gguf", calib_dtype="f32", **options)
    parts = [crafted.read_gguf(tmp_path / f"{dtype}.gguf")[1] for dtype in ("f32", "bf16")]
    assert not np.array_equal(*(part["blk.0.ffn_up.weight"][1] for part in parts))
    assert solve.precision("auto") in ("f32", "bf16")


# Upstream knows BPE vocabularies by the hash of what they make of a text, and knows none of 4096 tokens.
ANY_VOCABULARY = """
import runpy, sys
sys.path[0:1] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
sys.path[0:2] = [""]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture
def any_vocabulary(monkeypatch, tmp_path):
    adapter = tmp_path / "hf_to_gguf.py"
    adapter.write_text(ANY_VOCABULARY.format(script=str(checkpoint_files.ADAPTER)))
    monkeypatch.setattr(checkpoint_files, "ADAPTER", adapter)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3", "phi3", "mixtral", "qwen2moe"])  # llama: test_solve.py
def test_every_linear_layer_is_solved(runtime_library, checkpoint, any_vocabulary, tmp_path, kind):
    report, name = tmp_path / "report.json", "sq4w" if kind == "mixtral" else "sq4"
    options = dict(calib=str(TEXT), calib_tokens=2048, report=report, threads=1)
    convert.convert(checkpoint(kind), name, tmp_path / "out.gguf", load=False, **options)  # such a vocabulary is none
    report = json.loads(report.read_text())
    linear = [t["name"] for t in report["tensors"] if t["type"] == name]
    assert len(linear) == 2 * {"phi3": 4, "qwen2moe": 10}.get(kind, 7)
    assert report["calibration"]["left"] == [] and sorted(report["calibration"]["errors"]) == sorted(linear)
    for stages in report["calibration"]["errors"].values():
        assert stages["polish"] < stages["nearest"]


def test_matrices_that_no_linear_layer_has_are_left_and_counted(runtime_library, any_vocabulary, tmp_path, capsys):
    folder, report = tmp_path / "gpt2", tmp_path / "report.json"
    config = transformers.GPT2Config(vocab_size=4096, n_embd=64, n_layer=1, n_head=4, n_ctx=512)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    for file in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / file, folder)
    options = dict(calib=str(TEXT), calib_tokens=2048, report=report, threads=1)
    convert.convert(folder, "sq4", tmp_path / "out.gguf", load=False, **options)
    # its Conv1D multiplies without F.linear
    parts = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    calibration = json.loads(report.read_text())["calibration"]
    assert sorted(calibration["left"]) == sorted(f"blk.0.{part}.weight" for part in parts)
    assert set(calibration["left_reasons"].values()) == {"no linear layer of the model has its rows"}
    assert calibration["held_out"] is None
    summary = " ".join(capsys.readouterr().out.split())
    assert "error feedback x4: no linear layer of the model has its rows, blk.0.attn_qkv.weight first" in summary


def test_what_is_left_has_the_reason(runtime_library, checkpoint, tmp_path):
    """Types without error feedback; what no gradient or token reached; layers nobody runs."""
    report = tmp_path / "report.json"
    rules = ["attn_k=iq4_nl", "attn_q=q8_0", "blk.0.ffn_up=f16"]
    options = dict(calib=str(TEXT), calib_tokens=2048, report=report, threads=1, tensor_type=rules)
    convert.convert(checkpoint("llama"), "sq4", tmp_path / "out.gguf", token_embedding_type="sq4", **options)
    reasons = json.loads(report.read_text())["calibration"]["left_reasons"]
    assert reasons == {f"blk.{i}.attn_q.weight": "no error feedback for q8_0" for i in (0, 1)}
    weight = torch.randn(32, 64)
    tensor = gguf_file.Tensor("blk.0.ffn_up.weight", (32, 64), 0, 0, 0, Path())
    entry = plan.Entry(tensor, types.get("sq4"), "")
    for seen, reason in [({}, "no token reached it"), ({("a", None): moments.Moment()}, "no gradient reached it")]:
        layer = moments.Layer("a", weight)
        moments.measured([layer], seen, {})
        place = layer, torch.arange(len(weight))
        with pieces.alone(1) as pool:
            found = solve._solve_all(None, [entry], lambda _, place=place: [place], [layer], moments.ALONE, pool)
            assert list(found) == [reason]
    done = solve.Solved(left={"blk.0.ffn_up.weight": reason})
    mtp = plan.Entry(replace(tensor, name="blk.9.ffn_up.weight"), types.get("sq4"), "")
    outside = "outside the decoder layers that transformers runs"
    assert solve._left([entry, mtp], done) == {entry.name: reason, mtp.name: outside}


def test_matrices_that_no_gradient_reaches_are_seen(checkpoint, tmp_path):
    """Whose outputs the model throws away."""
    model, seen = Model(checkpoint("llama")), {}
    forward = type(model.layers[1].mlp).forward

    def wasteful(self, x):
        self.up_proj(x)
        return forward(self, x).detach()

    with pytest.MonkeyPatch.context() as patch, fisher.workers(1) as pool:
        patch.setattr(type(model.layers[1].mlp), "forward", wasteful)
        for _ in fisher.backward(
            model, tokens(1), lambda *_: 1, lambda i, b, taken: seen.update({i: taken}), tmp_path, pool
        ):
            pass
    assert seen[1]["mlp.down_proj.weight", None] == [] and seen[1]["self_attn.q_proj.weight", None] == [1]
    [(_, layers), _] = moments.run(model, tokens(1), tmp_path)
    assert all(layer.hessian is not None for layer in layers)


# Whether it pays


def test_codes_are_tried_on_tokens_that_are_not_in_the_hessian():
    """Feedback to a Hessian of one direction is worse than rounding to nearest in the others."""
    weight, direction = torch.randn(64, 256) * 0.02, torch.randn(256)
    h = direction.outer(direction).double() + 1e-3 * torch.eye(256)
    tensor = gguf_file.Tensor("blk.0.ffn_up.weight", (64, 256), 0, 0, 64 * 256 * 4, Path("a.gguf"))
    entry = plan.Entry(tensor, types.get("sq2"), "--type")
    solved = solver.solve(weight, h, formats.for_type(entry.coder))
    results = []
    for x in (direction[None] + 0.01 * torch.randn(50, 256), torch.randn(50, 256)):
        layer = moments.Layer("a", weight, h, held=[(x[:30], torch.ones(30)), (x[30:], torch.ones(20))])
        whole, nearest, fed = solve._tried(weight, solved.weight, entry, layer)
        assert whole == pytest.approx(float((x @ weight.T).square().sum()), rel=1e-4)
        assert fed == pytest.approx(float((x @ (weight - solved.weight).T).square().sum()), rel=1e-3)
        results.append(fed / nearest)
    assert results[0] < 0.5 and results[1] > 1
    done = solve.Solved(tried={"a": [10, 1, 2], "b": [10, 3, 4]})
    assert done.held_out == {"nearest": 0.2, "feedback": 0.3}


def test_other_tokens_come_from_between_those_that_are_used(checkpoint, tmp_path):
    model, file = Model(checkpoint("llama")), tmp_path / "text.txt"
    used, held = model.split_text(TEXT, 64 * 512)
    assert used.shape == (64, 512) and held.shape == (4, 512)
    assert torch.equal(used, model.read_tokens(TEXT, 64 * 512))
    rows = {tuple(row) for row in used.tolist()}
    assert not any(tuple(row) in rows for row in held.tolist())
    file.write_text(TEXT.read_text()[:8000])  # all of it is used
    used, held = model.split_text(file, 64 * 512)
    assert 4 <= len(used) < 8 and held.shape == (0, 512)


@pytest.mark.parametrize("aim, key", [("half", "divergence"), ("plain", "held_out")])
@pytest.mark.parametrize("pays", [True, False])
def test_a_calibration_that_did_not_pay_says_so(
    runtime_library, checkpoint, tmp_path, capsys, monkeypatch, pays, aim, key
):
    report, divide = tmp_path / "report.json", Model.split_text

    def split(model, path, count):
        used, held = divide(model, path, count)
        return (used, held) if pays else (used[:, :1].expand_as(used).contiguous(), held)

    monkeypatch.setattr(Model, "split_text", split)
    options = dict(calib=str(TEXT), calib_tokens=2048, report=report, threads=1)
    convert.convert(checkpoint("llama"), "sq2", tmp_path / "out.gguf", aim=aim, **options)
    held, out = json.loads(report.read_text())["calibration"][key], capsys.readouterr().out
    assert (held["feedback"] < held["nearest"]) == pays == ("WARNING: the calibration did not pay" not in out)


def test_a_text_that_is_used_up_is_said_not_to_be_tried(runtime_library, checkpoint, tmp_path, capsys):
    text, report = tmp_path / "short.txt", tmp_path / "report.json"
    text.write_text(TEXT.read_text()[:9000])
    convert.convert(checkpoint("llama"), "sq4", tmp_path / "out.gguf", calib=text, report=report, threads=2)
    calibration = json.loads(report.read_text())["calibration"]
    assert calibration["held_out"] is None and calibration["divergence"] is None
    assert "not tried on other tokens" in capsys.readouterr().out


@pytest.mark.parametrize("key, what", [("held_out", "output error"), ("divergence", "KL divergence")])
@pytest.mark.parametrize(
    "nearest, feedback, said",
    [(0, 0, "no {}"), (0, 1, "WARNING.*{}.*above none"), (2, 1, "{}.* 50.0% of"), (1, 2, "WARNING.*{}.*200.0% of")],
)
def test_what_other_tokens_say(capsys, nearest, feedback, said, key, what):
    done = dict(errors={}, tokens=2048, seconds=1, dtype="f32", left_reasons={}, pooled=[], tuned=None)
    done |= {"held_out": None, "divergence": None, key: {"nearest": nearest, "feedback": feedback}}
    display._show_calibration(display.console(), done)
    assert re.search(said.format(what), " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("[...] can't allocate memory: 9 bytes")]
)
def test_memory_that_runs_out_is_not_the_checkpoints_fault(checkpoint, monkeypatch, capsys, error):
    def load(*_):
        raise error

    monkeypatch.setattr(Model, "_load", load)
    with pytest.raises(type(error)):
        Model(checkpoint("llama"))
    assert cli._out_of_memory(error)


# GGUF


@pytest.fixture(scope="module")
def gguf(checkpoint, tmp_path_factory):
    return convert.convert(checkpoint("llama"), "bf16", tmp_path_factory.mktemp("gguf") / "tiny-bf16.gguf")


@torch.no_grad()
def test_a_gguf_is_the_model_it_was_made_from(checkpoint, gguf):
    outputs = []
    for model in (Model(checkpoint("llama")), Model(gguf)):
        text = model.read_tokens(TEXT, 2048)
        states = model.inputs(text)
        for index in range(len(model)):
            with model.layer(index) as layer:
                states = [model.forward(layer, index, state) for state in states]
        outputs.append((text, model.head(states[0])))
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=1e-4, atol=1e-5)


def test_a_gguf_converts_to_the_bytes_of_its_checkpoint(runtime_library, checkpoint, gguf, tmp_path):
    options = dict(calib=str(TEXT), calib_tokens=2048, threads=1)
    one = convert.convert(gguf, "sq4", tmp_path / "one.gguf", **options)
    other = convert.convert(checkpoint("llama"), "sq4", tmp_path / "other.gguf", **options)
    (one, left), (other, right) = crafted.read_gguf(one), crafted.read_gguf(other)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name][1], right[name][1]) for name in left)


def test_a_gguf_that_transformers_cannot_load_is_refused(tmp_path):
    tensors = crafted.llama_tensors()
    for name, cause in [("a-00001-of-00002.gguf", "split GGUF"), ("a.gguf", "convert its Hugging Face folder")]:
        refuses(errors.UnsupportedError, cause, Model, crafted.write_gguf(tmp_path / name, tensors))


# Bad input


def walk(folder, at_once=None):
    """The whole calibration without a solver. at_once: 8 as on a GPU."""
    model = Model(folder)
    model.at_once = at_once
    with tempfile.TemporaryDirectory() as scratch:
        for _ in moments.run(model, tokens(4), Path(scratch)):
            pass


def refuses(error, cause, call, *args):
    with pytest.raises(error, match=cause) as caught:
        call(*args)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("at_once", [None, 8])
def test_an_infinite_activation_is_named(copy, at_once):
    with changed(copy) as tensors:
        tensors["model.layers.1.post_attention_layernorm.weight"].fill_(3e38)
    refuses(errors.InputError, "decoder layer 1, mlp.gate_proj: an activation is NaN or Inf", walk, copy, at_once)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_a_number_is_named(copy, name):
    with changed(copy) as tensors:
        tensors[name][3, 5] = torch.nan
    refuses(errors.InputError, f"{name}' holds NaN", walk, copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(copy, name):
    with changed(copy) as tensors:
        del tensors[name]
    refuses(errors.InputError, f"{name}' is missing", walk, copy)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_named(copy, name):
    with changed(copy) as tensors:
        tensors[name] = tensors[name][:32].clone()
    refuses(errors.InputError, f"{name}' is .32", walk, copy)


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"model_type": "no-such-thing"}, "transformers cannot load it"),
        ({"num_hidden_layers": 0}, "no list of decoder layers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized already"),
        ({"hidden_act": "no-such-thing"}, "transformers cannot load it"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(copy, change, cause):
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refuses(errors.UnsupportedError, cause, Model, copy)


def test_layers_that_see_the_tokens_are_refused(tmp_path):
    options = dict(global_head_dim=32, vocab_size_per_layer_input=4096, hidden_size_per_layer_input=32)
    config = COMMON | SLIDING | options
    transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**config)).save_pretrained(tmp_path)
    refuses(errors.UnsupportedError, "more than one another's hidden states", Model(tmp_path).inputs, tokens(16))


def test_tokenizers_that_do_not_fit_are_refused(copy, tmp_path):
    model, short = Model(copy), tmp_path / "short.txt"
    short.write_text("too short")
    refuses(errors.InputError, "too few to calibrate on", model.read_tokens, short, 2048)
    (copy / "tokenizer.model").write_bytes(b"no tokenizer")
    refuses(errors.UnsupportedError, "cannot load a tokenizer.*--calib self", model.read_tokens, TEXT, 2048)
    for file in crafted.TOKENIZER:
        (copy / file).unlink()
    refuses(errors.UnsupportedError, "cannot load a tokenizer.*--calib self", model.read_tokens, TEXT, 2048)


def test_a_tokenizer_larger_than_the_embedding_is_refused(copy):
    with changed(copy) as tensors:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:1000].clone()
    config = copy / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 1000}))
    refuses(errors.InputError, "gives token .* has 1000 rows", Model(copy).read_tokens, TEXT, 2048)


# Memory


def entries(*layers):
    """A plan of a Llama with hidden 1024, feed-forward 2816 and the given kinds of layers."""
    shapes = {"token_embd.weight": (4096, 1024)}
    for i, experts in enumerate(layers):
        shapes |= {f"blk.{i}.attn_{part}.weight": (1024, 1024) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_{part}.weight": (*experts, 2816, 1024) for part in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (*experts, 1024, 2816)
    return [plan.Entry(gguf_file.Tensor(name, shape, 0, 0, 0, Path()), None, "") for name, shape in shapes.items()]


def test_the_estimate_of_memory_follows_what_is_in_memory():
    base = memory.peak(entries((), ()), 1 << 14, 1)
    assert memory.peak(entries((), (), ()), 1 << 14, 1) - base < 0.1 * base  # more layers, the same layer at a time
    assert memory.peak(entries((), ()), 1 << 14, 8) > base
    assert memory.peak(entries((), (8,)), 1 << 14, 1) - base > 8 * 8 * (2 * 1024**2 + 2816**2) - 16 * 2816**2
    many = entries(*[()] * 100)
    weights = 4 * sum(e.tensor.n_weights for e in many)
    assert memory.peak(many, 2048, 1) < weights < memory.peak(many, 2048, 1, whole=True)
    assert memory.peak(many, 2048, 1, tune="codes") > weights


CHILD = """
import re, sys
from gguf_splitq import cli
code = cli.main(sys.argv[1:])
print("PEAK", int(re.search(r"VmHWM:[^0-9]*([0-9]+) kB", open("/proc/self/status").read())[1]) * 1024)
sys.exit(code)
"""


def test_a_model_is_gone_with_the_last_reference(checkpoint):
    """Not when Python looks for cycles: the next one needs the memory."""
    gc.disable()
    try:
        tiny = Model(checkpoint("llama"))
        [hidden] = tiny.inputs(torch.ones(1, 512, dtype=torch.long))
        with tiny.layer(0) as layer, torch.no_grad():
            hidden = tiny.forward(layer, 0, hidden)
        with tiny.heads() as head, torch.no_grad():
            head(hidden)
        embedding = weakref.ref(tiny.matrix("embedding"))
        del tiny, layer, head
        assert embedding() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("more", [[], ["--tune", "codes", "--tune-steps", "2"]])
def test_memory_stays_below_what_was_stated(tmp_path, more):
    folder = tmp_path / "wide"
    config = COMMON | dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, max_position_embeddings=512)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(torch.bfloat16).save_pretrained(folder)
    for file in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / file, folder)
    command = ["convert", folder, "--type", "sq4", "--calib", TEXT, "--calib-tokens", "4096", "--threads", "2"]
    command += ["--outfile", tmp_path, *more]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    stated = float(re.search(r"in at most about ([0-9,.]+) MiB", done.stderr)[1].replace(",", "")) * 2**20
    peak = int(done.stdout.split("PEAK")[1])
    print(f"stated {stated / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    assert stated / 2 < peak < stated


def test_less_memory_than_a_calibration_needs_is_refused(gguf, tmp_path):
    options = dict(calib=str(TEXT), calib_tokens=2048)
    with pytest.raises(errors.UsageError, match="--max-ram 200.0 MiB is too small"):
        convert.convert(gguf, "sq4", tmp_path / "none.gguf", max_ram="200M", **options)
    assert list(tmp_path.iterdir()) == []
