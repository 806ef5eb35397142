# SPDX-License-Identifier: MIT
"""`--bpw`: predicted divergences against measured ones, the plan they make, and its file."""

import json

import crafted
import numpy as np
import pytest
import torch

from gguf_splitq import cli, convert, inspection, plan, types
from gguf_splitq.calibration import pieces, sensitivity
from gguf_splitq.calibration.model import Model
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.plan import mix

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo checkpoint as a BF16 GGUF, whose rows are the checkpoint's."""
    return convert.convert(crafted.DEMO, "bf16", tmp_path_factory.mktemp("demo") / "demo.gguf", threads=1)


@torch.no_grad()
def divergence(model: Model, tokens: torch.Tensor, changed: int, module: str, weight: torch.Tensor) -> float:
    """Mean KL divergence of the model with another matrix in one layer, nats a token."""
    states = {True: model.inputs(tokens)[0]}
    states[False] = states[True]
    for index in range(len(model)):
        with model.layer(index) as layer:
            states[True] = model.forward(layer, index, states[True])
            if index == changed:
                layer.get_submodule(module).weight.copy_(weight)
            states[False] = model.forward(layer, index, states[False])
    log_p, log_q = (model.head(states[which]).log_softmax(-1) for which in (True, False))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_predicts_what_rounding_one_matrix_costs(runtime_library, demo, tmp_path):
    model = Model(crafted.DEMO)
    tokens = model.read_tokens(crafted.DEMO / "calib.txt", 4096)
    modules = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}  # not Q and K, whose rows GGUF reorders
    modules |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    wanted = {f"blk.{i}.{name}.weight": (i, module) for i in (0, 3) for name, module in modules.items()}
    candidates = {name: [types.get("sq3"), types.get("sq4"), types.get("q8_0")] for name in wanted}
    with gguf_file.read(demo) as file:
        costs = sensitivity.measure(model, tokens[:6], file, candidates, tmp_path)
        rows = {t.name: file.read_rows(t, 0, t.n_rows) for t in file.tensors if t.name in wanted}
    assert costs.keys() == wanted.keys()
    predicted, measured = [], []
    for name, (index, module) in wanted.items():
        assert costs[name]["sq3"] > 2 * costs[name]["sq4"] > 100 * costs[name]["q8_0"] > 0
        weight = (rows[name].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        rounded = types.get("sq4").decode(types.get("sq4").encode(weight))
        predicted.append(costs[name]["sq4"] / sensitivity.FEEDBACK)
        measured.append(divergence(model, tokens[6:], index, module, torch.from_numpy(rounded)))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.85
    assert 0.5 < sum(predicted) / sum(measured) < 1.5


def test_experts_are_measured_together_and_strangers_left_out(runtime_library, tmp_path):
    folder = crafted.hf_folder(tmp_path / "moe", "mixtral")
    path = convert.convert(folder, "bf16", tmp_path / "moe.gguf", threads=1)
    model = Model(folder)
    tokens = torch.randint(4096, (2, 512), generator=torch.Generator().manual_seed(0))
    names = ["blk.0.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight", "blk.1.attn_q.weight", "token_embd.weight"]
    with gguf_file.read(path) as file:
        costs = sensitivity.measure(model, tokens, file, {name: [types.get("sq3")] for name in names}, tmp_path)
    assert costs.keys() == set(names) and all(c["sq3"] > 0 for c in costs.values())
    with gguf_file.read(crafted.write_gguf(tmp_path / "other.gguf", crafted.llama_tensors())) as file:
        stranger = {"blk.0.ffn_up.weight": [types.get("sq3")]}
        assert sensitivity.measure(model, tokens, file, stranger, tmp_path) == {}


def entries(type: str = "sq2", *rules: str, blocks: int = 2) -> list[plan.Entry]:
    shapes = {name: w.shape for name, w in crafted.llama_tensors(blocks=blocks, hidden=256, ffn=288).items()}
    tensors = [gguf_file.Tensor(name, shape, 1, 0, 0, None) for name, shape in shapes.items()]
    return plan.make(tensors, type, rules)


def costs(found: list[plan.Entry]) -> dict:
    """Of a model whose last block matters more."""
    return {
        name: {t.name: (4 if ".1." in name else 1) * 4**-t.bpw for t in kinds}
        for name, kinds in mix.candidates(found).items()
    }


@pytest.mark.parametrize(("share", "taken"), [(0.79, True), (0.81, False)])
def test_scales_of_columns_are_taken_where_they_are_worth_it(share, taken):
    found, every = entries("sq2w"), costs(entries("sq2w"))
    for of in every.values():
        of |= {type: share * of[plain] for type, plain in mix.SCALED.items()}
    mixed = mix.choose(found, every, mix.Budget(3.5))
    made = plan.make([e.tensor for e in found], "sq2w", chosen=mixed.types)
    assert {e.name: e.target_name for e in made if e.reason == "bit budget"} == mixed.types
    assert plan.bpw(e for e in made if plan.is_linear(e.tensor)) <= 3.5  # side tensors included
    assert any(type in mix.SCALED for type in mixed.types.values()) == taken


def test_costs_of_many_rows_do_not_depend_on_threads_and_know_outlier_channels():
    rows = torch.randn(600, 2048, generator=torch.Generator().manual_seed(0)).numpy()
    rows[:, ::40] *= 30
    columns = torch.where(torch.arange(2048) % 40 == 0, 1 / 900, 1.0).double()  # as a norm's gains would have it
    uses = [sensitivity._Sums(torch.ones(600).double(), columns)]
    found = []
    for threads in (1, 3):
        found.append(dict.fromkeys(("sq3w", "sq3wo"), 0.0))
        with pieces.alone(threads) as pool:
            kinds = [types.get(name) for name in found[-1]]
            sensitivity._add_cost(found[-1], rows, kinds, uses, torch.arange(600), pool.map)
    assert found[0] == found[1]
    assert found[0]["sq3wo"] < mix.WORTH * found[0]["sq3w"]


def test_the_mix_keeps_to_the_budget_and_to_the_rows(tmp_path):
    found = entries("sq2", "ffn_up=q8_0")
    kinds = mix.candidates(found)
    assert [t.name for t in kinds["blk.0.attn_q.weight"]] == [*mix.CANDIDATES, *mix.SCALED]
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.attn_q.weight"]  # rows of 288
    assert not any("ffn_up" in name or "embd" in name or "output.weight" == name for name in kinds)
    mixed = mix.choose(found, costs(found), mix.Budget(4.5))
    made = plan.make([e.tensor for e in found], "sq2", ["ffn_up=q8_0"], chosen=mixed.types)
    assert 4.4 < plan.bpw(e for e in made if plan.is_linear(e.tensor)) <= 4.5
    assert {e.name: e.target_name for e in made if e.reason == "bit budget"} == mixed.types
    bits = {name: types.get(type).bpw for name, type in mixed.types.items()}
    assert all(bits[name] <= bits[name.replace("blk.0", "blk.1")] for name in bits if "blk.0" in name)
    assert "4.5, expected" in mix.summary(mixed, made)

    unknown = {name: c for name, c in costs(found).items() if "attn_q" not in name}
    assert mix.choose(found, unknown, mix.Budget(4.5)).types["blk.1.attn_q.weight"] == "sq2"
    with pytest.raises(UsageError, match=r"--bpw 1.5 cannot be met.* 3\.\d+ bits"):
        mix.check(found, mix.Budget(1.5))
    mix.check(found, mix.Budget(4))


def test_a_plan_is_read_as_it_was_saved_and_only_for_its_model(tmp_path):
    found, path = entries(), tmp_path / "plan.json"
    mixed = mix.choose(found, costs(found), mix.Budget(3.0))
    mix.save(mixed, path)
    assert mix.load(path) == mixed
    mix.check_names(mixed, found, path)
    mix.check_names(mixed, entries("sq2", "ffn_up=q8_0"), path)
    with pytest.raises(InputError, match="plan.json: tensor 'blk.2.attn_k.weight' has no type"):
        mix.check_names(mixed, entries(blocks=3), path)
    with pytest.raises(InputError, match="plan.json: tensor 'blk.1.attn_k.weight' is not a linear layer"):
        mix.check_names(mixed, entries(blocks=1), path)


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "[" * 100000, '{"bpw": 3, "types": {"t": ["sq3"]}, "costs": {}}',
        '{"bpw": 3, "types": {"t": "sq3"}, "costs": []}',
        '{"bpw": 3, "types": {"t": "sq3"}, "costs": {"t": {"sq4": 1}}}',
        '{"bpw": 3, "types": {"t": "sq3"}, "costs": {"u": {"sq3": 1}}}', '{"bpw": 1e999, "types": {}, "costs": {}}',
        '{"bpw": true, "types": {}, "costs": {}}', '{"bpw": 1' + "0" * 400 + ', "types": {}, "costs": {}}',
        '{"bpw": 3, "types": {}, "costs": {}, "whole": 1}',
        '{"bpw": 3}', '{"bpw": "3", "types": {}, "costs": {}}', '{"bpw": 3, "types": 1, "costs": {}}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match="plan.json: cannot be read"):
        mix.load(path)
    path.write_text(content)
    with pytest.raises(InputError, match="plan.json: not a plan"):
        mix.load(path)
    with open(path, "wb") as file:
        file.truncate(mix.MOST_BYTES + 1)
    with pytest.raises(InputError, match="plan.json: not a plan"):
        mix.load(path)
    path.write_text('{"bpw": 3, "types": {"blk.0.attn_q.weight": "sq9"}, "costs": {}}')
    with pytest.raises(UsageError, match="'sq9' is not known"):
        mix.load(path)


def test_conversion_under_a_budget_and_by_its_plan(runtime_library, tmp_path, capsys):
    folder, saved, report = crafted.hf_folder(tmp_path / "tiny"), tmp_path / "plan.json", tmp_path / "report.json"
    text = str(crafted.DEMO / "calib.txt")
    arguments = ["convert", str(folder), "--calib", text, "--calib-tokens", "2048", "--threads", "1"]
    assert cli.main([*arguments, "--bpw", "3.5", "--dry-run", "--save-plan", str(saved)]) == 0
    assert "bit budget" in capsys.readouterr().out and not list(tmp_path.glob("*.gguf"))
    out = tmp_path / "{name}-{type}.gguf"
    assert cli.main([*arguments, "--bpw", "3.5", "--outfile", str(out), "--report", str(report)]) == 0
    file = inspection.inspect(tmp_path / "tiny-3.5bpw.gguf")
    assert 3.4 < file["linear_bpw"] <= 3.5
    assert file["metadata"]["gguf_splitq.type"] == "3.5bpw"
    assert file["metadata"]["general.file_type"] in (types.get(name).file_type for name in ("sq3w", "sq4w"))
    assert json.loads(file["metadata"]["gguf_splitq.options"])["bpw"] == 3.5
    chosen = json.loads(saved.read_text())
    assert json.loads(report.read_text())["budget"] == {key: chosen[key] for key in ("bpw", "whole", "costs")}
    stored = {row["name"]: row["type"] for row in json.loads(report.read_text())["tensors"]}
    assert chosen["types"].items() <= stored.items() and len(chosen["types"]) == 14

    again = tmp_path / "again.gguf"
    assert cli.main(["convert", str(folder), "--plan", str(saved), "--outfile", str(again)]) == 0
    assert inspection.inspect(again)["types"] == file["types"]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ([], "one of --type, --bpw, --file-bpw, --size and --plan"),
        (["--type", "sq4", "--bpw", "3"], "one of --type, --bpw, --file-bpw, --size and --plan"),
        (["--bpw", "3"], "give --calib TEXT"),
        (["--bpw", "nan", "--calib", "self"], "--bpw nan"),
        (["--type", "sq4", "--save-plan", "plan.json"], "only --bpw, --file-bpw and --size make a plan"),
        (["--bpw", "3", "--calib", "self", "--save-plan", "nowhere/plan.json"], "does not exist"),
        (["--plan", "nowhere.json"], "cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, options, cause):
    assert cli.main(["convert", str(crafted.DEMO), *options]) in (2, 3)
    assert cause in capsys.readouterr().err
