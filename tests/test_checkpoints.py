# SPDX-License-Identifier: MIT
"""What a checkpoint is, what it is not, and whether llama.cpp loads what becomes of it: folders as people have them."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import crafted
import gguf
import numpy as np
import pytest
import torch

from gguf_splitq import cli, types
from gguf_splitq.convert import convert
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import EnvironmentFailed, InputError, UnsupportedError, UsageError
from gguf_splitq.files import checkpoint, gguf_file, hf_to_gguf
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.measure import load_gguf, loading
from gguf_splitq.runtime import fetching


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama of two layers in one file, to be copied and damaged."""
    return crafted.hf_folder(tmp_path_factory.mktemp("tiny") / "Tiny", shard="1GB")


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def configure(folder, **changes):
    """Change keys of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder, change):
    """Change the tensors in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def split(folder, name, keep=lambda tensor: True):
    """Copy the tensors that `keep` likes to another file."""
    from safetensors.torch import load_file, save_file

    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if keep(k)}
    save_file(tensors, folder / name, {"format": "pt"})


def test_a_folder_by_any_name(tiny, tmp_path, monkeypatch):
    """Relative, with a slash behind it, with spaces, and of links as in the Hub's cache."""
    (tmp_path / "a modèl").mkdir()
    for number, path in enumerate(tiny.iterdir()):
        (tmp_path / "a modèl" / path.name).symlink_to(shutil.copy(path, tmp_path / f"blob{number}"))
    monkeypatch.chdir(tmp_path)
    for model in ("a modèl", "a modèl/"):
        assert len(crafted.read_gguf(convert(model, "f16", "out.gguf", overwrite=True))[1]) == 21


# --- what is no checkpoint -------------------------------------------------------------------------------------------


def adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    return folder


def adapter_with_configuration(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    return folder


def mistral(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    (folder / "config.json").rename(folder / "params.json")
    return folder


def another_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    (folder / "training_args.bin").write_bytes(b"")
    return folder


def pipeline(folder):
    (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").rename(folder / "model_index.json")
    return folder


def of_ggufs(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "Tiny-F16.gguf").write_bytes(b"GGUF")
    return folder


def nested(folder):
    return Path(shutil.move(folder, folder.parent / "outer" / "inner")).parent


def no_architectures(folder):
    configure(folder, architectures=None)
    return folder


def architectures_of_another_kind(folder):
    configure(folder, architectures="LlamaForCausalLM")
    return folder


def no_weights_in_a_tensor(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:0]}))
    return folder


def twice(folder):
    split(folder, "model.fp16.safetensors")
    return folder


def a_part_is_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (adapter, UnsupportedError, "merge it first with `python -c .*AutoPeftModelForCausalLM"),
        (adapter_with_configuration, UnsupportedError, "LoRA adapter"),
        (mistral, UnsupportedError, "Mistral's own format.*--mistral-format"),
        (another_name, InputError, "pytorch_model.safetensors is not named .*rename"),
        (pipeline, UnsupportedError, "diffusers"),
        (of_ggufs, InputError, "give .*Tiny-F16.gguf"),
        (nested, InputError, "outer/inner has one: give that folder"),
        (no_architectures, InputError, r'config.json: there is no `architectures`.*\["LlamaForCausalLM"\]'),
        (architectures_of_another_kind, InputError, "`architectures` is not a list"),
        (no_weights_in_a_tensor, InputError, "'model.norm.weight' has no weights.*gathered"),
        (twice, InputError, "is in model.fp16.safetensors and in model.safetensors, and no index"),
        (a_part_is_missing, InputError, "model-00001-of-00002.safetensors is missing: complete"),
        (lambda folder: folder / "model.safetensors", UsageError, "give its folder"),
        (lambda folder: folder / "config.json", UsageError, "give its folder"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(folder, tmp_path, make, error, words):
    (tmp_path / "outer").mkdir()
    with pytest.raises(error, match=words):
        convert(make(folder), "sq4", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_a_pickle_in_place_of_a_folder(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedError, match="pickle"):
        convert(tmp_path / "model.pt", "sq4", tmp_path / "out.gguf")


def test_the_index_alone_decides(folder):
    names = set(checkpoint.weight_files(folder))
    split(folder, "first.safetensors", lambda name: ".layers.0." in name)
    split(folder, "model-2.safetensors", lambda name: ".layers.0." not in name)
    where = {name: "first.safetensors" if ".layers.0." in name else "model-2.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    split(folder, "consolidated.safetensors")
    assert checkpoint.weight_files(folder) == {name: folder / file for name, file in where.items()}
    assert [path.name for path in checkpoint.check_folder(folder)[0]] == ["first.safetensors", "model-2.safetensors"]


def test_an_index_that_names_another_shard(folder):
    names = set(checkpoint.weight_files(folder))
    split(folder, "model-2.safetensors", lambda name: ".layers.0." in name)
    where = dict.fromkeys(names, "model.safetensors") | {"model.norm.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match="'model.norm.weight' is not in model-2.safetensors as the index says"):
        checkpoint.check_folder(folder)


def test_codes_of_quantized_weights_do_not_decide_the_precision(folder):
    import torch

    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.qweight": torch.zeros(1 << 20, dtype=torch.int32)}))
    assert checkpoint.check_folder(folder)[1] == "bf16"
    rewrite(folder, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items() if v.is_floating_point()}))
    assert checkpoint.check_folder(folder)[1] == "f16"


@pytest.mark.parametrize("indexed", [False, True])
def test_the_same_weights_in_other_formats_are_not_downloaded(monkeypatch, folder, indexed):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "pytorch_model.bin"]
    weights = ["extra.safetensors", "model-1.safetensors"] if indexed else ["model.safetensors"]
    if indexed:
        where = {"a": "extra.safetensors", "b": "model-1.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        others.append("model.safetensors")
    asked, held = [], ["config.json", "tokenizer.model", *weights, *others]

    def download(model, revision, allow_patterns):
        assert revision == (folder.name if asked else "main")  # the folder of a snapshot is its commit
        asked.extend(filter_repo_objects(held, allow_patterns=allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.resolve("owner/name", "main") == (folder, "name")
    assert asked == ["config.json", "tokenizer.model", *weights]


# --- what llama.cpp would not load -----------------------------------------------------------------------------------


def grown(folder):
    import torch

    matrices = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda t: t.update({name: torch.cat([t[name], t[name][:4]]) for name in matrices}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: configure(f, num_hidden_layers=6), "num_hidden_layers is 6 and the checkpoint has 2 layers"),
        (lambda f: configure(f, num_hidden_layers=1), "num_hidden_layers is 1 and the checkpoint has 2 layers"),
        (lambda f: configure(f, vocab_size=4100), "vocab_size is 4100 and the embedding has 4096 rows"),
        (grown, "vocab_size is 4096 and the embedding has 4100 rows"),
        (lambda f: rewrite(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "'blk.1.ffn_up.weight' not found"),
    ],
)
def test_a_checkpoint_that_llama_cpp_would_not_load(runtime_programs, folder, tmp_path, capsys, damage, words):
    damage(folder)
    out = tmp_path / "out"
    out.mkdir()
    assert cli.main(["convert", str(folder), "--type", "sq4", "--outfile", str(out)]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in last and ("--no-check" in last or "correct config.json" in last)
    assert list(out.iterdir()) == []


def test_contradictions_are_found_without_a_runtime_too(folder, tmp_path, monkeypatch):
    configure(folder, vocab_size=4100)
    monkeypatch.setattr(loading, "_library", lambda: None)
    with pytest.raises(InputError, match="vocab_size is 4100 and the embedding has 4096 rows"):
        convert(folder, "q8_0", tmp_path / "out.gguf")


def test_the_check_can_be_left_out(runtime_programs, folder, tmp_path):
    configure(folder, vocab_size=4100)
    out = tmp_path / "out.gguf"
    assert cli.main(["convert", str(folder), "--type", "sq4", "--outfile", str(out), "--no-check"]) == 0
    assert "token_embd.weight" in loading.reason(out)


def test_a_written_file_that_does_not_load_gets_no_name(runtime_programs, folder, tmp_path, monkeypatch):
    plain = loading.reason
    monkeypatch.setattr(loading, "reason", lambda path: plain(path) if path.name == "plan.gguf" else "it is Monday")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="it is Monday"):
        convert(folder, "q8_0", out / "out.gguf")
    assert list(out.iterdir()) == []


def with_metadata(source, path, **changes):
    """A copy of a GGUF with other metadata."""
    with gguf_file.read(source) as file:
        kv = file.kv | {key.replace("__", "."): value for key, value in changes.items()}
        head = gguf_file.header(kv, [(t.name, t.shape, t.type_id) for t in file.tensors])
        path.write_bytes(head + source.read_bytes()[file.tensors[0].offset :])
    return path


def test_a_gguf_that_does_not_load_is_converted_with_a_word(runtime_programs, demo_f16, tmp_path, capsys):
    given = with_metadata(demo_f16, tmp_path / "given.gguf", llama__block_count=Value.of(9))
    convert(given, "q8_0", tmp_path / "out.gguf")
    said = " ".join(capsys.readouterr().out.split())
    assert "llama.cpp does not load given.gguf as it is given" in said and "blk.4.attn_norm.weight" in said


@pytest.mark.parametrize("name", ["q8_0", "sq4", "cq3", "sq2.5"])
def test_only_the_header_is_read(runtime_programs, demo_f16, tmp_path, name):
    path = convert(demo_f16, name, tmp_path / "out.gguf")
    with gguf_file.read(path) as file:
        start, size = file.tensors[0].offset, path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(start)
        file.truncate(size)
    assert loading.reason(path) is None
    with open(path, "r+b") as file:
        file.truncate(start)
    assert "not within the file bounds" in loading.reason(path)


def test_a_failed_assertion_of_llama_cpp_is_a_reason(runtime_programs, demo_f16, tmp_path, monkeypatch):
    script = [
        "import os, sys",
        "print('x.cpp:1: GGML_ASSERT(n > 0) failed', 'more', sep='\\n', file=sys.stderr, flush=True)",
        "os.abort()",
    ]
    probe = tmp_path / "load_gguf.py"
    probe.write_text("\n".join(script))
    monkeypatch.setattr(loading, "PROBE", probe)
    assert loading.reason(demo_f16) == "x.cpp:1: GGML_ASSERT(n > 0) failed"


@pytest.mark.parametrize("way", ["slow", "killed"])
def test_a_loader_that_gives_no_answer_is_not_the_files_fault(runtime_programs, demo_f16, monkeypatch, way):
    def run(command, **_):
        if way == "slow":
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", "")

    monkeypatch.setattr(loading.subprocess, "run", run)
    with pytest.raises(EnvironmentFailed, match="did not say .*--no-check"):
        loading.reason(demo_f16)


def test_layers_of_encoders_and_decoders_are_counted():
    tensors = [
        SimpleNamespace(name=f"{part}.blk.{i}.attn_q.weight", shape=(8, 8)) for part in ("enc", "dec") for i in (0, 1)
    ]
    values = {"general.architecture": "t5", "t5.block_count": 2}
    head = SimpleNamespace(tensors=tensors, get=lambda key, kind, default: values.get(key, default))
    assert loading.mismatch(SimpleNamespace(header=head, config={"num_layers": 2})) is None
    values["t5.block_count"] = 3
    assert "2 layers" in loading.mismatch(SimpleNamespace(header=head, config={"num_layers": 3}))


def test_a_runtime_that_does_not_start_is_not_the_files_fault(runtime_programs, demo_f16, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_library", lambda: tmp_path)
    with pytest.raises(EnvironmentFailed, match="does not start.*--no-check"):
        loading.reason(demo_f16)


def test_the_structures_are_those_of_the_library(runtime_programs):
    """The defaults come out as llama.cpp's source has them, from the first field to the last."""
    import ctypes

    suffix = ".dylib" if (runtime_programs / "libllama.dylib").exists() else ".so"
    lib = ctypes.CDLL(str(runtime_programs / f"libllama{suffix}"))
    source = (fetching.tree() / "include" / "llama.h").read_text()
    for name, structure in (("model", load_gguf.ModelParams), ("context", load_gguf.ContextParams)):
        body = source.split(f"struct llama_{name}_params {{")[1].split("\n    };")[0]
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        fields = [line.rstrip(";").split()[-1].lstrip("*") for line in lines if line.endswith(";")]
        assert [field for field, _ in structure._fields_] == fields
        default = getattr(lib, f"llama_{name}_default_params")
        default.restype = structure
        values = default()
        expected = {"n_gpu_layers": -1, "load_mode": -1, "use_extra_bufts": True, "no_alloc": False}
        if name == "context":
            expected = {"n_ctx": 512, "n_batch": 2048, "type_k": 1, "type_v": 1, "offload_kqv": True, "ctx_other": None}
        assert {field: getattr(values, field) for field in expected} == expected


# --- layers for multi-token prediction -------------------------------------------------------------------------------


class Upstream:
    """Stands for a class of upstream's converter."""

    supports_mtp_export, no_mtp = True, False


@pytest.mark.parametrize("key", ["mtp_num_hidden_layers", "num_nextn_predict_layers"])
@pytest.mark.parametrize("nested", [False, True])
def test_mtp_layers_that_are_declared_and_not_there(key, nested, capsys):
    text = {"num_hidden_layers": 2, key: 1}
    config = {"text_config": text} if nested else text
    names = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "visual.blocks.7.proj.weight"}
    kind = type("Kind", (Upstream,), {})
    assert hf_to_gguf.declare_no_lost_mtp(kind, config, names) == {"hparams": config}
    assert kind.no_mtp and text[key] == 0 and f"{key} declares 1 MTP layer" in capsys.readouterr().out
    kind = type("Kind", (Upstream,), {})
    assert hf_to_gguf.declare_no_lost_mtp(kind, config, names) == {} and kind.no_mtp  # nothing declared


@pytest.mark.parametrize("name", ["mtp.fc.weight", "model.mtp.layers.0.norm.weight", "model.layers.2.eh_proj.weight"])
def test_mtp_layers_that_are_there_are_kept(name, capsys):
    config = {"num_hidden_layers": 2, "mtp_num_hidden_layers": 1}
    kind = type("Kind", (Upstream,), {})
    assert hf_to_gguf.declare_no_lost_mtp(kind, config, {"model.layers.1.norm.weight", name}) == {}
    assert not kind.no_mtp and config["mtp_num_hidden_layers"] == 1 and capsys.readouterr().out == ""


def test_mtp_layers_of_which_some_are_missing(demo_f16, tmp_path):
    """The number of layers is right; it is that of the others that is not."""
    given = with_metadata(demo_f16, tmp_path / "m.gguf", llama__block_count=Value.of(6))
    config = {"num_hidden_layers": 3, "mtp_num_hidden_layers": 3}
    with gguf_file.read(given) as file:
        source = checkpoint.Source("m", given, file, [given], config=config)
        assert loading.mismatch(source) == "mtp_num_hidden_layers is 3 and the checkpoint has 1 such layers"


# --- quantized checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "hqq"])
def test_a_quantized_checkpoint_that_cannot_be_read(method):
    error = NotImplementedError(f"Quant method is not yet supported: {method!r}")
    said = hf_to_gguf.explain(error, config={"quantization_config": {"quant_method": method}})
    assert said["kind"] == "unsupported" and f"quantized with {method}" in said["message"]
    assert "get the BF16 or F16 original" in said["message"]


def test_a_quantized_checkpoint_whose_configuration_does_not_say_so():
    error = ValueError("Can not map tensor 'model.layers.0.mlp.up_proj.qweight'")
    said = hf_to_gguf.explain(error, {"model.layers.0.mlp.up_proj.qweight"}, {"num_hidden_layers": 1})
    assert said["kind"] == "unsupported" and "original" in said["message"]


def test_an_assertion_without_words_is_told_by_its_line():
    try:
        assert not [Upstream.supports_mtp_export]
    except AssertionError as error:
        plain = AssertionError().with_traceback(error.__traceback__)
    assert "not [Upstream.supports_mtp_export]" in hf_to_gguf.explain(plain)["message"]


def test_a_token_beyond_the_vocabulary_is_named(tmp_path):
    content = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = type("Model", (), {"dir_model": tmp_path, "model_tensors": {}})
    said = hf_to_gguf.explain(AssertionError("a"), config={"vocab_size": 7}, model=model)
    assert "vocab_size is 7 and the tokenizer has a token 7" in said["message"] and said["kind"] == "input"


def test_fp8_is_read(runtime_programs, folder, tmp_path):
    import torch

    expected = {}

    def quantize(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            codes, scale = tensors[name].float().mul(100).to(torch.float8_e4m3fn), torch.tensor([[0.01]])
            tensors[name], tensors[name.replace("weight", "weight_scale_inv")] = codes, scale
            expected[name] = (codes.float() * scale).to(torch.bfloat16)

    rewrite(folder, quantize)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    _, tensors = crafted.read_gguf(convert(folder, "bf16", tmp_path / "out.gguf"))
    kind, data = tensors["blk.1.ffn_down.weight"]
    assert kind == "BF16"
    wanted = expected["model.layers.1.mlp.down_proj.weight"].view(torch.int16).numpy()
    np.testing.assert_array_equal(data.reshape(wanted.shape[0], -1).view(np.int16), wanted)


def mxfp4_gguf(path):
    """Experts in MXFP4 and the rest in BF16, as of gpt-oss."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, data in crafted.llama_tensors(experts=2).items():
        kept = data.ndim < 2 or "gate_inp" in name
        kind = gguf.GGMLQuantizationType["F32" if kept else "MXFP4" if "exps" in name else "BF16"]
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def test_mxfp4_is_copied_and_the_rest_converted(tmp_path, capsys):
    path = mxfp4_gguf(tmp_path / "m.gguf")
    _, before = crafted.read_gguf(path)
    _, after = crafted.read_gguf(convert(path, "sq4", tmp_path / "out.gguf"))
    assert "fallback x6: quantized already (mxfp4): copied as stored" in capsys.readouterr().out
    for name, (kind, data) in after.items():
        if "exps" in name:
            assert kind == "MXFP4" and data.tobytes() == before[name][1].tobytes()
    assert after["blk.0.attn_q.weight"][0] == "SPLITQ_SQ4"


def test_a_rule_applies_to_mxfp4(tmp_path):
    path = mxfp4_gguf(tmp_path / "m.gguf")
    _, before = crafted.read_gguf(path)
    _, after = crafted.read_gguf(convert(path, "sq4", tmp_path / "out.gguf", tensor_type=["down_exps=sq3"]))
    name = "blk.1.ffn_down_exps.weight"
    rows = gguf.quants.dequantize(before[name][1], gguf.GGMLQuantizationType.MXFP4).reshape(-1, 96)
    assert after[name][0] == "SPLITQ_SQ3"
    assert after[name][1].tobytes() == types.get("sq3").encode(rows).tobytes()
    assert after["blk.1.ffn_up_exps.weight"][0] == "MXFP4"


@pytest.mark.parametrize(("largest", "wanted"), [(6e4, "F16"), (7e4, "BF16"), (1e30, "BF16")])
def test_bf16_beyond_f16_stays_bf16(tmp_path, largest, wanted):
    tensors = crafted.llama_tensors()
    tensors["blk.0.attn_k.weight"][5, 7] = largest
    path = crafted.write_gguf(tmp_path / "m.gguf", tensors, "BF16")
    _, before = crafted.read_gguf(path)
    _, after = crafted.read_gguf(convert(path, "f16", tmp_path / "out.gguf"))
    kind, data = after["blk.0.attn_k.weight"]
    assert kind == wanted and after["blk.1.attn_k.weight"][0] == "F16"
    assert kind == "F16" or data.tobytes() == before["blk.0.attn_k.weight"][1].tobytes()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_1"])
def test_stock_types_hold_no_weight_that_their_scales_cannot(tmp_path, name):
    tensors = crafted.llama_tensors()
    tensors["blk.0.attn_k.weight"][5, 7] = -1e20
    path = crafted.write_gguf(tmp_path / "m.gguf", tensors, "BF16")
    _, after = crafted.read_gguf(convert(path, name, tmp_path / "out.gguf"))
    assert after["blk.0.attn_k.weight"][0] == "BF16" and after["blk.1.attn_k.weight"][0] == name.upper()


# --- the vision part -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny Idefics3, of which llama.cpp runs a Llama and an image encoder."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("multimodal") / "Tiny-VL"
    torch.manual_seed(0)
    common = dict(intermediate_size=64, num_attention_heads=2)
    text = dict(model_type="llama", vocab_size=4096, hidden_size=64, num_hidden_layers=2, **common)
    vision = dict(hidden_size=32, num_hidden_layers=3, image_size=32, patch_size=8, **common)
    config = transformers.Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, image_token_id=5)
    transformers.Idefics3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    for name in crafted.TOKENIZER:
        shutil.copy(crafted.DEMO / name, folder)
    configure(folder, text_config=config.text_config.to_dict() | {"architectures": ["VLlama3ForCausalLM"]})
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_the_vision_part_is_said_to_be_left_out(multimodal, tmp_path, capsys):
    assert cli.main(["convert", str(multimodal), "--type", "sq4", "--outfile", str(tmp_path)]) == 0
    assert "54 tensors of the vision or audio part are left out: --mmproj writes them" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["Tiny-VL-sq4.gguf"]


def test_the_vision_part_in_a_file_of_its_own(multimodal, tmp_path):
    import torch
    from safetensors.torch import load_file

    report = tmp_path / "r.json"
    args = ["--type", "sq4", "--outfile", str(tmp_path), "--report", str(report), "--mmproj"]
    assert cli.main(["convert", str(multimodal), *args]) == 0
    kv, tensors = crafted.read_gguf(tmp_path / "mmproj-Tiny-VL.gguf")
    assert kv["general.architecture"] == "clip" and kv["general.type"] == "mmproj" and kv["clip.has_vision_encoder"]
    name = "model.vision_model.encoder.layers.2.mlp.fc2.weight"
    wanted = load_file(multimodal / "model.safetensors")[name]
    assert tensors["v.blk.2.ffn_down.weight"][1].tobytes() == wanted.view(torch.int16).numpy().tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"mmproj-Tiny-VL.gguf", "Tiny-VL-sq4.gguf", "r.json"}


def test_an_mmproj_file_that_cannot_be(folder, demo_f16, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    args = ["--type", "sq4", "--outfile", str(out), "--mmproj"]
    assert cli.main(["convert", str(folder), *args]) == 4
    assert "no mmproj file for LlamaForCausalLM: leave --mmproj out" in capsys.readouterr().err
    assert cli.main(["convert", str(demo_f16), *args]) == 2
    assert "--mmproj takes the vision part of a Hugging Face folder" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_an_output_matrix_that_is_not_there_is_said(folder, tmp_path, capsys):
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    configure(folder, tie_word_embeddings=False)
    convert(folder, "q8_0", tmp_path / "out.gguf")
    assert "tie_word_embeddings is false and there is no output matrix" in " ".join(capsys.readouterr().out.split())


def test_a_file_with_copied_mxfp4_can_be_dequantized(tmp_path):
    model = convert(mxfp4_gguf(tmp_path / "m.gguf"), "sq4", tmp_path / "out.gguf")
    _, tensors = crafted.read_gguf(dequantize(model, tmp_path / "f32.gguf", "f32"))
    _, before = crafted.read_gguf(model)
    name = next(name for name, (kind, _) in before.items() if kind == "MXFP4")
    kind = gguf.GGMLQuantizationType.MXFP4
    np.testing.assert_array_equal(
        tensors[name][1], gguf.quants.dequantize(before[name][1], kind).reshape(tensors[name][1].shape)
    )


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool"])
def test_integers_that_nothing_declares_are_no_weights(folder, dtype):
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(getattr(torch, dtype))}))
    with pytest.raises(UnsupportedError, match=f"{name}.*holds integers"):
        checkpoint.check_folder(folder)


def test_a_pointer_of_git_lfs_is_told(folder):
    (folder / "model.safetensors").write_text("version https://lfs/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match="git lfs pull"):
        checkpoint.check_folder(folder)


def test_metas_own_format_is_pickles(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    for name in ("params.json", "consolidated.00.pth"):
        (folder / name).write_text("{}")
    with pytest.raises(UnsupportedError, match="pickles"):
        checkpoint.check_folder(folder)
