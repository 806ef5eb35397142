# SPDX-License-Identifier: MIT
"""Whole files: the ends of a model are measured and solved, and a file keeps to its size."""

import json
import shutil

import crafted
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_sensitivity import costs, entries

from gguf_splitq import cli, convert, inspection, plan, rewrite, types
from gguf_splitq.calibration import aims, ends, sensitivity
from gguf_splitq.calibration.model import Model
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.plan import mix

torch.set_num_threads(1)

TEXT = str(crafted.DEMO / "calib.txt")
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


def untie(folder):
    """The same checkpoint with an output of its own, which has the same numbers."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """The demo checkpoint, tied as it is, and untied; of both a BF16 GGUF, whose rows are the checkpoint's."""
    folder = tmp_path_factory.mktemp("demo")
    found = {"tied": crafted.DEMO, "untied": untie(crafted.copy_demo(folder / "untied"))}
    for kind in ("tied", "untied"):
        found[f"{kind}.gguf"] = convert.convert(found[kind], "bf16", folder / f"{kind}.gguf", threads=1)
    return found


@pytest.fixture(scope="module")
def small(tiny_llama, tmp_path_factory):
    """A random two-layer Llama with an output of its own."""
    return untie(shutil.copytree(tiny_llama[0], tmp_path_factory.mktemp("small") / "untied"))


@torch.no_grad()
def divergence(model, tokens, instead):
    """Mean KL divergence of the model with other ends, nats a token."""
    found = []
    for standing in ({}, instead):
        with model.standing(standing):
            [hidden] = model.inputs(tokens)
            for index in range(len(model)):
                with model.layer(index) as layer:
                    hidden = model.forward(layer, index, hidden)
            found.append(model.head(hidden).log_softmax(-1))
    return float((found[0].exp() * (found[0] - found[1])).sum(-1).mean())


@pytest.mark.parametrize(("kind", "name"), [("tied", EMBEDDING), ("untied", EMBEDDING), ("untied", OUTPUT)])
def test_predicts_what_rounding_an_end_costs(runtime_library, demos, tmp_path, kind, name):
    model = Model(demos[kind])
    tokens = model.read_tokens(crafted.DEMO / "calib.txt", 4096)
    kinds = [types.get(type) for type in ("sq3w", "sq4w", "q6_k", "q8_0")]
    with gguf_file.read(demos[f"{kind}.gguf"]) as file:
        found = sensitivity.measure(model, tokens[:5], file, {name: kinds}, tmp_path)[name]
        [weight] = rewrite.each_matrix(file, next(t for t in file.tensors if t.name == name))
    assert found["sq3w"] > 2 * found["sq4w"] > 4 * found["q6_k"] > 8 * found["q8_0"] > 0
    for type in ("sq3w", "sq4w"):
        stored = torch.from_numpy(types.get(type).decode(types.get(type).encode(weight)))
        uses = ["embedding", "output"] if kind == "tied" else [ends.END_OF[name]]
        measured = divergence(model, tokens[5:], dict.fromkeys(uses, stored))
        assert 0.5 < found[type] / sensitivity.FEEDBACK / measured < 2


def test_hessians_of_the_ends_are_those_of_the_definition(tiny_llama, tmp_path):
    model, seen = Model(tiny_llama[0]), None
    tokens = torch.randint(4096, (3, 512), generator=torch.Generator().manual_seed(0))
    seen = ends.Ends(model, tokens)
    aims.information(model, tokens, tmp_path, 2, lambda *_: None, ends=seen)
    arrays = {name: torch.from_numpy(array) for name, array in seen.arrays().items()}
    import transformers

    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama[0], dtype=torch.float32)
    got = []
    whole.lm_head.register_forward_pre_hook(lambda module, args: got.append(args[0].flatten(0, 1)))
    logits = whole(tokens).logits.flatten(0, 1)
    [x], [w] = got, arrays["weights"]
    p = logits.softmax(-1)
    # |g|^2 is (1 - p)^2 of the label drawn, and p^2 of all others; labels are drawn from p
    assert ((1 - p.max(1).values) ** 2 <= w + 1e-6).all() and (w <= 1 + p.square().sum(1)).all()
    assert float(w.detach().mean()) == pytest.approx(float(1 - p.square().sum(1).mean()), rel=0.02)
    x = x.detach()
    torch.testing.assert_close(arrays["output"], x.T @ (w[:, None] * x) / tokens.numel(), rtol=1e-3, atol=1e-5)
    assert seen.scale == pytest.approx(1, abs=1e-3)
    rows, hessian = seen.uses(EMBEDDING, tied=False)[0]
    assert float(rows.sum()) == pytest.approx(float(hessian.trace()), rel=1e-4)
    assert (rows > 0).sum() <= len(tokens.unique()) and not rows[~torch.isin(torch.arange(4096), tokens)].any()
    both = seen.uses(EMBEDDING, tied=True)
    total = sum(hessian for _, hessian in both) / tokens.numel()
    torch.testing.assert_close(ends.hessian(arrays, EMBEDDING, True), total, rtol=1e-4, atol=1e-6)
    assert ends.hessian({}, OUTPUT, False) is None


@pytest.mark.parametrize(
    ("kind", "given", "most"),
    [
        ("tied", {"token_embedding_type": "sq3w"}, 0.9),
        ("untied", {"output_tensor_type": "sq3w"}, 0.9),
        ("untied", {"token_embedding_type": "sq3w"}, 0.99),  # of so few tokens
    ],
)
def test_feedback_lowers_what_the_ends_cost(runtime_library, demos, tmp_path, kind, given, most):
    report = tmp_path / "report.json"
    options = {"calib": TEXT, "calib_tokens": 2048, "report": report, "threads": 2} | given
    convert.convert(demos[kind], "q8_0", tmp_path / "out.gguf", **options)
    found = json.loads(report.read_text())["calibration"]
    assert found["errors"].keys() == {EMBEDDING if "token_embedding_type" in given else OUTPUT}
    assert found["divergence"]["feedback"] < most * found["divergence"]["nearest"]


def test_the_ends_are_the_same_bytes_after_a_kill_and_with_more_threads(runtime_library, small, tmp_path, monkeypatch):
    options = {"calib": TEXT, "calib_tokens": 2048, "token_embedding_type": "sq4w", "output_tensor_type": "sq3w"}

    def run(name, **more):
        return convert.convert(small, "sq2w", tmp_path / name, **options, **more).read_bytes()

    expected = run("whole.gguf", threads=1)
    assert run("two.gguf", threads=2) == expected
    for end in (("calibrating", 4), ("solving", 1)):

        def stop(self, what, done, total, end=end):
            if (what, done) == end:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("gguf_splitq.display.Progress.step", stop)
            with pytest.raises(KeyboardInterrupt):
                run("out.gguf", threads=1)
        assert run("out.gguf", threads=2) == expected
        (tmp_path / "out.gguf").unlink()
    first = run("first.gguf", threads=2, hessians=tmp_path / "h.gguf")
    monkeypatch.setattr("gguf_splitq.calibration.fisher.backward", lambda *_: 1 / 0)  # nothing is measured again
    assert run("second.gguf", threads=1, hessians=tmp_path / "h.gguf") == first


def test_plain_aims_solve_the_ends_too(runtime_library, tiny_llama, tmp_path):
    options = {"calib": TEXT, "calib_tokens": 2048, "aim": "plain", "report": tmp_path / "report.json", "threads": 2}
    convert.convert(tiny_llama[0], "sq3w", tmp_path / "out.gguf", token_embedding_type="sq4w", **options)
    found = json.loads((tmp_path / "report.json").read_text())["calibration"]
    assert found["errors"][EMBEDDING]["polish"] < 0.9 * found["errors"][EMBEDDING]["nearest"] and not found["left"]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_file_keeps_to_its_size(runtime_library, demos, tmp_path, capsys, kind):
    command = ["convert", str(demos[kind]), "--calib", TEXT, "--calib-tokens", "2048", "--threads", "2"]
    out, size = tmp_path / "{type}.gguf", 3 << 20 if kind == "tied" else 7 << 19
    assert cli.main([*command, "--size", str(size), "--outfile", str(out)]) == 0
    shown, path = capsys.readouterr().out, tmp_path / f"{size}.gguf"
    assert size - (8 << 10) < path.stat().st_size <= size
    file = inspection.inspect(path)
    assert f"{file['bpw']:.3f} bpw, linear layers {file['linear_bpw']:.3f} bpw" in shown
    assert json.loads(file["metadata"]["gguf_splitq.options"])["size"] == size
    saved = tmp_path / "plan.json"
    assert cli.main([*command, "--file-bpw", "4", "--dry-run", "--save-plan", str(saved)]) == 0
    said = capsys.readouterr()
    assert "expected KL divergence" in said.err and not (tmp_path / "4bpw-file.gguf").exists()
    assert [line for line in said.out.splitlines() if line.startswith(EMBEDDING)][0].endswith("bit budget")
    kept = json.loads(saved.read_text())
    assert kept["whole"] and kept["types"].keys() == kept["costs"].keys()
    assert (OUTPUT in kept["types"]) == (kind == "untied") and EMBEDDING in kept["types"]
    assert cli.main(["convert", str(demos[kind]), "--plan", str(saved), "--outfile", str(out)]) == 0
    assert 3.95 < inspection.inspect(tmp_path / "4bpw-file.gguf")["bpw"] <= 4


def test_the_mix_of_a_whole_file(tmp_path):
    found = entries("sq2w")
    kinds = mix.candidates(found, whole=True)
    assert [t.name for t in kinds["blk.0.ffn_down.weight"]] == [*mix.CANDIDATES, *mix.SCALED]
    assert kinds.keys() - mix.candidates(found).keys() == {EMBEDDING, OUTPUT}
    every = costs(found) | {name: {t.name: 9 * 4**-t.bpw for t in kinds[name]} for name in (EMBEDDING, OUTPUT)}
    mixed = mix.choose(found, every, mix.Budget(4.5, True))
    made = plan.make([e.tensor for e in found], "sq2w", chosen=mixed.types)
    assert 4.3 < plan.bpw(made) <= 4.5 and types.get(mixed.types[OUTPUT]).bpw > 4
    assert "file: 4." in mix.summary(mixed, made)
    path = tmp_path / "plan.json"
    mix.save(mixed, path)
    assert mix.load(path) == mixed
    mix.check_names(mixed, found, path)
    with pytest.raises(InputError, match="'output.weight' is not a linear layer"):
        mix.check_names(mix.Mix(4.5, mixed.types, mixed.costs), found, path)

    size = mix.Budget.of_size(1 << 20, 5000, found)
    mixed = mix.choose(found, every, size)
    made = plan.make([e.tensor for e in found], "sq2w", chosen=mixed.types)
    assert (1 << 20) - (1 << 14) < rewrite.data_size(made) + 5000 <= 1 << 20
    with pytest.raises(UsageError, match=r"--file-bpw 1.5 cannot be met: .* the file takes 2\.\d+ bits"):
        mix.check(found, mix.Budget(1.5, True))
    with pytest.raises(UsageError, match=r"--size 0.1 MiB cannot be met: .* the file takes 1 MiB"):
        mix.check(found, mix.Budget.of_size(100_000, 5000, found))


def test_what_a_type_cannot_hold_is_no_candidate(runtime_library, tmp_path):
    total = {"q8_0": 0.0, "q4_k": 0.0}
    rows, uses = np.full((2, 256), 4e4, np.float32), [sensitivity._Sums(torch.ones(2), torch.ones(256).double())]
    rows[0, 0] = 1
    sensitivity._add_cost(total, rows, [types.get(name) for name in total], uses, torch.arange(2))
    assert sensitivity._usable(total).keys() == {"q8_0"}


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--size", "1G", "--file-bpw", "3", "--calib", "self"], "one of --type, --bpw, --file-bpw, --size and --plan"),
        (["--size", "1G"], "--size measures on a text"),
        (["--file-bpw", "3"], "--file-bpw measures on a text"),
        (["--file-bpw", "40", "--calib", "self"], "--file-bpw 40 is no number of bits"),
        (["--size", "small", "--calib", "self"], "--size 'small' is not a size"),
        (
            ["--size", "20k", "--calib", TEXT],
            "--size 0.0 MiB cannot be met: with the smallest types the file takes",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(runtime_library, capsys, options, cause):
    assert cli.main(["convert", str(crafted.DEMO), *options]) == 2
    assert cause in capsys.readouterr().err
