# SPDX-License-Identifier: MIT
"""Whole conversions of tiny models, read back with upstream's reader."""

import json
import subprocess
import sys

import crafted
import gguf
import numpy as np
import pytest

from gguf_splitq import types
from gguf_splitq.convert import convert
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.files import checkpoint, gguf_file
from gguf_splitq.inspection import inspect, linear_bpw
from gguf_splitq.options import parse_size
from gguf_splitq.runtime import fetching


@pytest.fixture
def llama(tmp_path):
    return crafted.write_gguf(tmp_path / "tiny-f16.gguf", crafted.llama_tensors())


@pytest.fixture(scope="module")
def hf_llama(tmp_path_factory):
    return crafted.hf_folder(tmp_path_factory.mktemp("hf") / "Tiny-Llama")


@pytest.fixture(scope="module")
def hf_moe(tmp_path_factory):
    return crafted.hf_folder(tmp_path_factory.mktemp("hf") / "Tiny-MoE", "mixtral", "float16")


def decoded(path):
    """name -> float32 weights of a file, decoded by the types' own decoders."""
    with gguf_file.read(path) as file:
        return {
            t.name: types.by_id(t.type_id).decode(file.read_rows(t, 0, t.n_rows)).reshape(t.shape) for t in file.tensors
        }


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "sq4", "sq2"])
def test_every_tensor_is_what_its_type_makes_of_the_source(tmp_path, source, name):
    path = crafted.write_gguf(tmp_path / "tiny.gguf", crafted.llama_tensors(), source)
    _, before = crafted.read_gguf(path)
    _, after = crafted.read_gguf(convert(path, name, tmp_path / "out.gguf"))
    assert list(after) == list(before)
    for tensor, (kind, data) in before.items():
        rows = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        is_large = tensor in ("token_embd.weight", "output.weight")
        wanted = types.get("f32" if rows.ndim == 1 else "q8_0" if is_large and name[0] in "sq" else name)
        expected = wanted.encode(rows.reshape(-1, rows.shape[-1]))
        assert after[tensor][0].lower().removeprefix("splitq_") == wanted.name
        assert after[tensor][1].tobytes() == expected.tobytes(), tensor


def test_the_bytes_do_not_depend_on_threads_or_memory(tmp_path):
    path = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(256, 1536, blocks=1, experts=2))
    outputs, reports = [], []
    for threads, ram in ((1, None), (3, None), (2, "262M")):
        report = tmp_path / f"{threads}.json"
        out = convert(path, "sq3", tmp_path / f"{threads}.gguf", threads=threads, max_ram=ram, report=report)
        outputs.append(out.read_bytes())
        rows = json.loads(report.read_text())["tensors"]
        reports.append([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    assert outputs[0] == outputs[1] == outputs[2]
    assert reports[0] == reports[1] == reports[2]


def test_the_report_has_the_true_errors(tmp_path, llama):
    report = tmp_path / "r.json"
    out = convert(llama, "sq4", tmp_path / "out.gguf", report=report)
    before, after, result = decoded(llama), decoded(out), json.loads(report.read_text())
    assert result["size"] == out.stat().st_size and result["type"] == "sq4"
    for row in result["tensors"]:
        x = before[row["name"]].astype(np.float64)
        error = after[row["name"]] - x
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-5)
        assert row["largest_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
        if row["sqnr_db"] is not None:
            assert row["sqnr_db"] == pytest.approx(10 * np.log10((x**2).sum() / (error**2).sum()), abs=1e-3)
    assert {r["name"]: r["sqnr_db"] is None for r in result["tensors"]}["output_norm.weight"]


def test_metadata_is_kept_and_completed(tmp_path, llama):
    before, _ = crafted.read_gguf(llama)
    options = dict(tensor_type=["attn_q=q8_0"], token_embedding_type="f16")
    after, _ = crafted.read_gguf(convert(llama, "sq4", tmp_path / "out.gguf", **options))
    for key in before:
        if not key.startswith("GGUF."):
            assert after[key] == before[key], key
    assert after["general.file_type"] == types.get("sq4").file_type
    assert after["general.quantization_version"] == 2
    assert after["gguf_splitq.type"] == "sq4" and after["gguf_splitq.llama_cpp"].startswith("0c1e57098")
    assert json.loads(after["gguf_splitq.options"]) == options
    assert "tmp" not in after["gguf_splitq.options"]


def test_an_alignment_of_64_becomes_32(tmp_path):
    path = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(), alignment=64)
    fields, tensors = crafted.read_gguf(convert(path, "q8_0", tmp_path / "out.gguf"))
    assert "general.alignment" not in fields and len(tensors) == len(crafted.llama_tensors())


def test_experts_are_encoded_matrix_by_matrix(tmp_path):
    tensors = crafted.llama_tensors(experts=4)
    path = crafted.write_gguf(tmp_path / "moe.gguf", tensors, "F32")
    out = decoded(convert(path, "sq4", tmp_path / "out.gguf"))
    name = "blk.0.ffn_up_exps.weight"
    sq4 = types.get("sq4")
    for expert in range(4):
        np.testing.assert_array_equal(out[name][expert], sq4.decode(sq4.encode(tensors[name][expert])))
    np.testing.assert_array_equal(out["blk.0.ffn_gate_inp.weight"], tensors["blk.0.ffn_gate_inp.weight"])


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_a_weight_beyond_a_stock_types_reach_does_not_become_infinite(tmp_path, name):
    """The largest weight counts, wherever in the tensor it is: what fits all the smaller ones is not enough."""
    tensors = crafted.llama_tensors(hidden=256, ffn=512, blocks=1)
    tensors["blk.0.ffn_down.weight"][0, 0], tensors["blk.0.ffn_down.weight"][-1, -1] = 1e6, 1e30
    source = crafted.write_gguf(tmp_path / "m.gguf", tensors, "F32")
    result = crafted.read_gguf(convert(source, name, tmp_path / "out.gguf"))[1]
    kind, data = result["blk.0.ffn_down.weight"]
    assert kind == "F32" and np.array_equal(data, tensors["blk.0.ffn_down.weight"])
    assert result["blk.0.ffn_up.weight"][0] == name.upper()


def test_a_weight_beyond_the_types_reach_falls_back(tmp_path, capsys):
    tensors = crafted.llama_tensors()
    tensors["blk.0.attn_k.weight"][5, 7] = 60000  # sq4 cannot hold it
    tensors["blk.1.attn_k.weight"][-1, -1] = 1e6  # f16 cannot either
    wider = {"sq4": "q8_0", "f16": "bf16"}
    path = crafted.write_gguf(tmp_path / "m.gguf", tensors, "F32")
    report = tmp_path / "r.json"
    for name, changed in (("sq4", {0, 1}), ("f16", {1})):
        limit = types.get(name).max_abs
        changed = {i for i in (0, 1) if np.abs(tensors[f"blk.{i}.attn_k.weight"]).max() > limit}
        assert changed
        convert(path, name, tmp_path / f"{name}.gguf", report=report)
        result = json.loads(report.read_text())
        by_name = {row["name"]: row for row in result["tensors"]}
        for i in (0, 1):
            assert by_name[f"blk.{i}.attn_k.weight"]["type"] == (wider[name] if i in changed else name)
        assert sum(result["fallbacks"].values()) == len(changed)
        assert capsys.readouterr().out.count("is beyond") == len(result["fallbacks"])
        fresh = decoded(tmp_path / f"{name}.gguf")
        held = types.get(wider[name])
        np.testing.assert_array_equal(
            fresh["blk.1.attn_k.weight"], held.decode(held.encode(tensors["blk.1.attn_k.weight"]))
        )
        assert by_name["output_norm.weight"]["type"] == "f32"


@pytest.mark.parametrize("form", ["legacy", "gguf"])
def test_an_imatrix_reaches_the_encoder(tmp_path, form):
    tensors = crafted.llama_tensors(experts=2)
    path = crafted.write_gguf(tmp_path / "moe.gguf", tensors, "F32")
    q, up = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
    sums_q, sums_up = (np.abs(crafted.weights(n, seed=n)) for n in (64, 128))
    if form == "legacy":
        entries = {q: (sums_q, 4), up: (sums_up, 4)}
        matrix = crafted.legacy_imatrix(tmp_path / "i.dat", entries)
        weight_q, weight_up = sums_q / np.float32(4), (sums_up / np.float32(4)).reshape(2, 64)
    else:
        entries = {q: (sums_q[None], [10]), up: (sums_up.reshape(2, 64), [3, 0])}
        matrix = crafted.gguf_imatrix(tmp_path / "i.gguf", entries)
        weight_q = sums_q / np.float32(10)
        weight_up = np.stack([sums_up[:64] / np.float32(3), np.ones(64, np.float32)])
    report = tmp_path / "r.json"
    out = convert(path, "sq3", tmp_path / "out.gguf", imatrix=matrix, report=report)
    fields, after = crafted.read_gguf(out)
    sq3 = types.get("sq3")
    assert after[q][1].tobytes() == sq3.encode(tensors[q], weight_q).tobytes()
    assert after[q][1].tobytes() != sq3.encode(tensors[q]).tobytes()
    expected = b"".join(sq3.encode(tensors[up][e], weight_up[e]).tobytes() for e in range(2))
    assert after[up][1].tobytes() == expected
    assert fields["quantize.imatrix.file"] == matrix.name
    assert fields["quantize.imatrix.dataset"] == "calib.txt"
    assert (fields["quantize.imatrix.entries_count"], fields["quantize.imatrix.chunks_count"]) == (2, 3)
    missing = json.loads(report.read_text())["without_importance"]
    assert "blk.1.attn_q.weight" in missing and q not in missing and "output_norm.weight" not in missing
    assert not {"token_embd.weight", "output.weight"} & set(missing)  # q8_0 has no use for a matrix


@pytest.mark.parametrize("form", ["legacy", "gguf"])
@pytest.mark.parametrize(("name", "theirs"), [("q4_k", "Q4_K_S"), ("iq2_xs", "IQ2_XS"), ("sq3", "SQ3")])
def test_the_bytes_are_llama_quantizes(tmp_path, demo_f16, runtime_programs, runtime_library, form, name, theirs):
    with gguf_file.read(demo_f16) as file:
        linear = [t for t in file.tensors if t.name.endswith("weight") and ("attn_" in t.name or "ffn_" in t.name)]
        sums = {t.name: np.abs(crafted.weights(t.n_cols, seed=i)) for i, t in enumerate(linear) if len(t.shape) == 2}
    if form == "legacy":
        matrix = crafted.legacy_imatrix(tmp_path / "i.dat", {n: (s, 7) for n, s in sums.items()})
    else:
        matrix = crafted.gguf_imatrix(tmp_path / "i.gguf", {n: (s[None], [3000]) for n, s in sums.items()})
    unmixed = [] if theirs == "SQ3" else ["--pure", "--token-embedding-type", "q6_k"]  # ours are not mixed anyway
    command = [runtime_programs / "llama-quantize", *unmixed, "--imatrix", matrix]
    subprocess.run(
        [*command, demo_f16, tmp_path / "theirs.gguf", theirs], check=True, capture_output=True, cwd=tmp_path
    )
    fields, tensors = crafted.read_gguf(convert(demo_f16, name, tmp_path / "ours.gguf", imatrix=matrix))
    their_fields, their_tensors = crafted.read_gguf(tmp_path / "theirs.gguf")
    for tensor, (kind, data) in their_tensors.items():
        assert tensors[tensor][0] == kind and tensors[tensor][1].tobytes() == data.tobytes(), tensor
    for key in ("general.file_type", "quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"):
        assert fields[key] == their_fields[key]


def test_outputs_are_protected(tmp_path, llama):
    out = convert(llama, "q8_0", tmp_path / "{name}-{type}.gguf")
    assert out.name == "tiny-q8_0.gguf"  # the input's own precision is not part of its name
    before = out.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        convert(llama, "q8_0", out)
    assert out.read_bytes() == before
    convert(llama, "f16", out, overwrite=True)
    assert out.read_bytes() != before
    link = tmp_path / "link.gguf"
    link.symlink_to(llama)
    for same in (llama, link):
        with pytest.raises(UsageError, match="its own input"):
            convert(llama, "sq4", same, overwrite=True)
        with pytest.raises(UsageError, match="its own input"):
            convert(llama, "sq4", tmp_path / "new.gguf", report=same)
    with pytest.raises(UsageError, match="no such folder"):
        convert(llama, "sq4", tmp_path / "none" / "out.gguf")
    assert not (tmp_path / "new.gguf").exists()
    assert convert(llama, "sq4", tmp_path).name == "tiny-sq4.gguf"


@pytest.mark.parametrize("length", [1, 40, 120])
def test_the_summary_has_the_size_on_one_line(tmp_path, llama, capsys, length):
    found = inspect(convert(llama, "q8_0", tmp_path / f"{'x' * length}.gguf", threads=1))
    assert f" MiB, {found['bpw']:.3f} bpw, linear layers {found['linear_bpw']:.3f} bpw\n" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, llama, capsys):
    before = sorted(tmp_path.iterdir())
    convert(llama, "sq4", dry_run=True)
    out = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in out and "bpw" in out and "-> sq4" in out
    assert sorted(tmp_path.iterdir()) == before


def test_a_memory_limit_that_cannot_be_kept_is_refused(tmp_path, llama):
    with pytest.raises(UsageError, match="too small"):
        convert(llama, "sq4", tmp_path / "out.gguf", max_ram="10M")
    with pytest.raises(UsageError, match="not a size"):
        convert(llama, "sq4", tmp_path / "out.gguf", max_ram="much")
    assert [parse_size(s) for s in ("1", "2k", "1.5G", "3MiB", None)] == [1, 2048, 3 << 29, 3 << 20, None]


def test_dequantizing_gives_the_decoded_values(tmp_path, llama):
    packed = convert(llama, "sq4", tmp_path / "m-sq4.gguf", tensor_type=["attn_k=sq4", "ffn_up=sq2"])
    out = dequantize(packed, tmp_path / "m-f32.gguf", "f32")
    for name, data in decoded(packed).items():
        np.testing.assert_array_equal(decoded(out)[name], data)
    fields, tensors = crafted.read_gguf(dequantize(packed, tmp_path / "{name}-{type}.gguf"))
    assert {kind for kind, _ in tensors.values()} == {"F16", "F32"}
    assert fields["tokenizer.ggml.tokens"] == ["<unk>", "ä", "b\n"] and fields["general.file_type"] == 1
    with pytest.raises(UsageError, match="not a float type"):
        dequantize(packed, tmp_path / "x.gguf", "q8_0")
    with pytest.raises(UsageError, match="its own input"):
        dequantize(packed, packed, overwrite=True)


def test_inspection_counts_what_is_stored(tmp_path, llama, capsys):
    path = convert(llama, "sq4", tmp_path / "out.gguf", tensor_type=["attn_q=q8_0"])
    capsys.readouterr()
    result = inspect(path, json=True)
    assert json.loads(capsys.readouterr().out) == result
    by_type = {row["type"]: row for row in result["types"]}
    assert by_type["q8_0"]["tensors"] == 4 and by_type["sq4"]["bpw"] == 4.25
    weights_q, weights_all = 2 * 64 * 64, 2 * (4 * 64 * 64 + 3 * 96 * 64)
    assert linear_bpw(path) == pytest.approx((8.5 * weights_q + 4.25 * (weights_all - weights_q)) / weights_all)
    assert result["size"] == path.stat().st_size
    inspect(path)
    assert "blk.*.attn_q.weight" in capsys.readouterr().out


@pytest.mark.parametrize(("folder", "outtype"), [("hf_llama", "bf16"), ("hf_moe", "f16")])
def test_reading_a_folder_gives_what_upstreams_converter_gives(tmp_path, folder, outtype, request):
    folder, theirs = request.getfixturevalue(folder), tmp_path / "theirs.gguf"
    command = [sys.executable, fetching.fetch() / "convert_hf_to_gguf.py", folder, "--outtype", outtype]
    subprocess.run([*command, "--outfile", theirs], check=True, capture_output=True)
    ours = convert(folder, outtype, tmp_path / "ours.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.gguf", "theirs.gguf"]
    (fields, tensors), (their_fields, their_tensors) = crafted.read_gguf(ours), crafted.read_gguf(theirs)
    assert {k: v for k, v in fields.items() if k in their_fields and "GGUF." not in k} == {
        k: v for k, v in their_fields.items() if "GGUF." not in k
    }
    assert list(tensors) == list(their_tensors)
    for name, (kind, data) in their_tensors.items():
        assert tensors[name][0] == kind and tensors[name][1].tobytes() == data.tobytes(), name


def test_what_needs_no_change_is_read_from_the_checkpoint_itself(tmp_path, hf_moe):
    with checkpoint.opened(hf_moe, tmp_path) as source, source.data() as file:
        parts = {tensor.name: len(tensor.parts) for tensor in file.tensors if len(tensor.shape) > 1}
        assert parts.pop("blk.0.attn_q.weight") == 0  # its rows are rearranged
        assert parts["blk.0.ffn_up_exps.weight"] in (1, 4) and parts["output.weight"] == 1
        assert file.path.stat().st_size == file.size  # with holes
        assert source.child.total < sum(tensor.n_bytes for tensor in file.tensors) / 4


def test_a_folder_with_experts_is_planned_and_converted(tmp_path, hf_moe, capsys):
    out = convert(hf_moe, "sq4", tmp_path)
    assert out.name == "Tiny-MoE-sq4.gguf"
    _, tensors = crafted.read_gguf(out)
    assert tensors["blk.1.ffn_down_exps.weight"][0] == "SPLITQ_SQ4"
    assert tensors["blk.1.ffn_down_exps.weight"][1].shape[:2] == (4, 64)
    capsys.readouterr()
    convert(hf_moe, "sq4", dry_run=True)
    assert f"{sum(data.nbytes for _, data in tensors.values()):,} bytes" in capsys.readouterr().out


def test_a_hub_id_is_downloaded_at_its_revision(tmp_path, monkeypatch, llama):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def snapshot(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision))
        if repo == "no/body":
            raise RepositoryNotFoundError("404", response=type("R", (), {"headers": {}, "request": None})())
        if repo == "off/line":
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match="config.json"):
        convert("some/model", "sq4", tmp_path, revision="abc")
    assert asked == [("some/model", "abc")]
    with pytest.raises(UsageError, match="no/body"):
        convert("no/body", "sq4", tmp_path)
    from gguf_splitq.errors import EnvironmentFailed

    with pytest.raises(EnvironmentFailed, match="off/line.*no network"):
        convert("off/line", "sq4", tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        convert(tmp_path / "nothing.gguf", "sq4", tmp_path)
    with pytest.raises(UsageError, match="--revision"):
        convert(llama, "sq4", tmp_path, revision="abc")
