# SPDX-License-Identifier: MIT
"""Every failure a user can cause: the right exit code, one sentence that names the thing, nothing left behind."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import crafted
import numpy as np
import pytest

from gguf_splitq import cli
from gguf_splitq.errors import InputError
from gguf_splitq.files import imatrix

# Runs the command line in a child with one thing arranged beforehand.
CHILD = """
import os, resource, signal, sys
from gguf_splitq import cli, rewrite
from gguf_splitq.files import checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with these ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
def at_tensor(name, number):
    plain = rewrite.encode
    def encode(source, job):
        if job.entry.name == name:
            os.kill(os.getpid(), number)
        return plain(source, job)
    rewrite.encode = encode
def while_reading(number):
    def running(self):
        os.kill(os.getpid(), number)
        self.process.wait()
    checkpoint._Child.running = running
def file_limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
{arrange}
sys.exit(cli.main(sys.argv[1:]))
"""


def run(arrange, *args):
    """(exit code, error output) of the command line in a child process."""
    command = [sys.executable, "-c", CHILD.format(arrange=arrange), *map(str, args)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stderr


def snapshot(*paths):
    """File -> hash, for all files below."""
    files = [f for p in paths for f in ([p] if p.is_file() else p.rglob("*")) if f.is_file()]
    return {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture
def refuses(tmp_path, capsys):
    """A function that runs `convert` on an input, and checks code, sentence, and that no file was made or changed."""

    def check(model, code, *words, extra=()):
        out = tmp_path / "target"
        out.mkdir()
        before = snapshot(Path(model))
        assert cli.main(["convert", str(model), "--type", "sq4", "--outfile", str(out), *map(str, extra)]) == code
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert last.startswith("gguf-splitq: ") and ": " in last.removeprefix("gguf-splitq: ")
        for word in words:
            assert word in last
        assert list(out.iterdir()) == [] and snapshot(Path(model)) == before

    return check


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_in_a_tensor(tmp_path, refuses, source, value):
    tensors = crafted.llama_tensors()
    tensors["blk.1.ffn_down.weight"][40, 3] = value
    path = crafted.write_gguf(tmp_path / "m.gguf", tensors, source)
    name = "NaN" if np.isnan(value) else "Inf"
    refuses(path, 3, "'blk.1.ffn_down.weight'", f"holds {name} at row 40, column 3", "get it again")


def test_nan_in_a_norm(tmp_path, refuses):
    tensors = crafted.llama_tensors()
    tensors["output_norm.weight"][7] = np.nan
    refuses(crafted.write_gguf(tmp_path / "m.gguf", tensors), 3, "'output_norm.weight' holds NaN at row 0, column 7")


def test_nan_in_a_folder(tmp_path, refuses):
    folder = crafted.copy_demo(tmp_path / "hf")
    data = bytearray((folder / "model.safetensors").read_bytes())
    size = struct.unpack_from("<Q", data)[0]
    at = json.loads(data[8 : 8 + size])["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0]
    data[8 + size + at : 10 + size + at] = b"\xc0\x7f"  # a bfloat16 NaN
    (folder / "model.safetensors").write_bytes(data)
    refuses(folder, 3, "'blk.0.ffn_up.weight' holds NaN at row 0, column 0")


def test_a_truncated_gguf(tmp_path, refuses):
    path = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    os.truncate(path, path.stat().st_size - 20000)
    refuses(path, 3, "m.gguf", "past the end of the file (truncated)")


def test_a_gguf_with_an_array_of_2_62_entries(tmp_path, refuses):
    path = tmp_path / "m.gguf"
    path.write_bytes(struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"a", 9, 4, 1 << 62))
    assert path.stat().st_size == 49
    refuses(path, 3, "m.gguf", "metadata 'a'")


def test_a_gguf_that_is_quantized_already(tmp_path, refuses):
    path = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(), "Q8_0")
    refuses(path, 4, "already quantized (q8_0)", "original")


@pytest.mark.parametrize("cut", [-1, -100000, 1000, 4])
def test_a_truncated_safetensors(tmp_path, refuses, cut):
    folder = crafted.copy_demo(tmp_path / "hf")
    path = folder / "model.safetensors"
    os.truncate(path, cut if cut > 0 else path.stat().st_size + cut)
    refuses(folder, 3, "model.safetensors", "not a sound safetensors file")


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b'{"a": 1}', b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'],
)
def test_a_crafted_safetensors_header(tmp_path, refuses, header):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refuses(folder, 3, "model.safetensors")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", "..\\x.safetensors", "C:x"]
)
def test_an_index_that_leaves_the_folder(tmp_path, refuses, shard):
    folder = crafted.split_demo(tmp_path / "hf")
    shutil.copy(folder / "model-00001-of-00001.safetensors", tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refuses(folder, 3, "index.json", "outside the folder")


def test_an_index_that_names_a_missing_shard(tmp_path, refuses):
    folder = crafted.split_demo(tmp_path / "hf")
    (folder / "model-00001-of-00001.safetensors").unlink()
    refuses(folder, 3, "index.json", "'model-00001-of-00001.safetensors' is missing")


def test_an_index_that_names_a_missing_tensor(tmp_path, refuses):
    folder = crafted.split_demo(tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.weight"] = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, 3, "index.json", "'model.layers.9.weight' is not in")


def test_a_tensor_that_the_index_leaves_out(tmp_path, refuses):
    folder = crafted.split_demo(tmp_path / "demo")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, 3, "index.json", "'model.norm.weight' of model-00001-of-00001.safetensors is not in it")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100000])
def test_an_index_that_is_no_index(tmp_path, refuses, text):
    folder = crafted.split_demo(tmp_path / "hf")
    (folder / "model.safetensors.index.json").write_text(text)
    refuses(folder, 3, "model.safetensors.index.json")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_configuration_that_is_missing_or_no_json(tmp_path, refuses, text):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refuses(folder, 3, "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_checkpoint_of_pickles_alone(tmp_path, refuses, name):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / name)
    refuses(folder, 4, "pickles", "safetensors")


def test_a_folder_without_weights(tmp_path, refuses):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    refuses(folder, 3, "there is no model.safetensors")


def test_an_unknown_architecture(tmp_path, refuses):
    folder = crafted.copy_demo(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["NobodyForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    refuses(folder, 4, "NobodyForCausalLM")


def test_a_tokenizer_that_is_missing(tmp_path, refuses):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "tokenizer.model").unlink()
    refuses(folder, 4, "llama.cpp's converter cannot convert this checkpoint", "tokenizer")


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    folder = crafted.copy_demo(tmp_path / "hf")
    (folder / "tokenizer.model").unlink()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").write_text("{}")
    assert cli.main(["convert", str(folder), "--type", "q8_0", "--outfile", str(tmp_path)]) in (3, 4)
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*.gguf"))


def damaged_imatrices(folder):
    good = {"blk.0.attn_q.weight": ([1.0] * 64, 4)}
    whole = crafted.legacy_imatrix(folder / "good.dat", good).read_bytes()
    nan = crafted.legacy_imatrix(folder / "nan.dat", {"blk.0.attn_q.weight": ([np.nan] * 64, 4)}).read_bytes()
    negative = crafted.legacy_imatrix(folder / "neg.dat", {"blk.0.attn_q.weight": ([-1.0] * 64, 4)}).read_bytes()
    modern = crafted.gguf_imatrix(folder / "good.gguf", {"blk.0.attn_q.weight": ([[1.0] * 64], [4])}).read_bytes()
    counts = crafted.gguf_imatrix(folder / "nan.gguf", {"blk.0.attn_q.weight": ([[1.0] * 64], [np.nan])}).read_bytes()
    odd = crafted.gguf_imatrix(folder / "odd.gguf", {"blk.0.attn_q.weight": ([[1.0] * 64], [1, 2, 3])}).read_bytes()
    return {
        "empty": b"",
        "no entries": struct.pack("<i", 0),
        "2^31 entries": struct.pack("<i", 2**31 - 1),
        "a negative length": struct.pack("<ii", 1, -5) + bytes(64),
        "2^31 values": struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1) + bytes(64),
        "cut in the values": whole[:100],
        "cut in the data set": whole[:-3],
        "NaN": nan,
        "negative": negative,
        "cut gguf": modern[:-40],
        "no metadata": modern.replace(b"imatrix.chunk_size", b"imatrix.chunk_sice"),
        "no counts": modern.replace(b".counts", b".cuonts"),
        "no sums": modern.replace(b".in_sum2", b".in_sum3"),
        "NaN counts": counts,
        "counts that do not divide": odd,
    }


@pytest.mark.parametrize("case", range(15))
def test_a_damaged_importance_matrix(tmp_path, refuses, case):
    path, data = list(damaged_imatrices(tmp_path).items())[case]
    (tmp_path / "i.dat").write_bytes(data)
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    refuses(model, 3, "i.dat", extra=["--imatrix", tmp_path / "i.dat"])


def test_an_importance_matrix_of_another_model(tmp_path, refuses):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    matrix = crafted.legacy_imatrix(tmp_path / "i.dat", {"blk.0.attn_q.weight": ([1.0] * 32, 4)})
    refuses(model, 3, "i.dat", "'blk.0.attn_q.weight' has 32 values where 64 are due", extra=["--imatrix", matrix])


def test_an_embedding_entry_of_another_size_is_left_out(tmp_path):
    matrix = imatrix.load(crafted.legacy_imatrix(tmp_path / "i.dat", {"token_embd.weight": ([1.0] * 32, 4)}))
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    from gguf_splitq.files import gguf_file

    assert matrix.for_tensors(gguf_file.read(model).tensors) == {}
    with pytest.raises(InputError, match="cannot be read"):
        imatrix.load(tmp_path / "none.dat")


def test_a_disk_that_fills(tmp_path):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    out, before = tmp_path / "out", snapshot(tmp_path)
    out.mkdir()
    for arrange in ("file_limit(30000)", "file_limit(100)"):
        code, error = run(arrange, "convert", model, "--type", "q8_0", "--outfile", out / "m.gguf")
        assert code == 6 and "the disk filled up" in error and "m.gguf" in error and "MiB" in error
        assert list(out.iterdir()) == [] and snapshot(tmp_path) == before


def test_a_disk_too_small_for_intermediate_and_output(refuses, monkeypatch):
    from gguf_splitq.files import gguf_file

    free = 3_000_000  # for the output, which takes less, but not for it and what upstream's converter rearranges
    monkeypatch.setattr(gguf_file.os, "statvfs", lambda _: os.statvfs_result((1, 1, free, free, free, 0, 0, 0, 0, 255)))
    refuses(crafted.DEMO, 6, "MiB are needed and 2.9 MiB are free", "make room")


def test_a_disk_that_fills_while_a_folder_is_read(tmp_path):
    code, error = run("file_limit(2_000_000)", "convert", crafted.DEMO, "--type", "q8_0", "--outfile", tmp_path)
    assert code == 6 and "the disk filled up" in error and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, refuses):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    from gguf_splitq.files import gguf_file

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gguf_file.os, "replace", denied)
    refuses(model, 6, "Permission denied")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.ffn_norm.weight", "blk.1.ffn_down.weight"])
def test_ctrl_c_or_a_kill_at_a_tensor(tmp_path, tensor, number, code):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.gguf").write_bytes(b"kept")
    before = snapshot(tmp_path)
    arrange = f"at_tensor({tensor!r}, {int(number)})"
    args = ("convert", model, "--type", "q8_0", "--outfile", out / "old.gguf", "--overwrite")
    assert run(arrange, *args)[0] == code
    assert snapshot(tmp_path) == before and [p.name for p in out.iterdir()] == ["old.gguf"]


def test_a_hangup_that_nohup_ignores_ends_nothing(tmp_path):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    arrange = f"signal.signal(signal.SIGHUP, signal.SIG_IGN); at_tensor('token_embd.weight', {int(signal.SIGHUP)})"
    assert run(arrange, "convert", model, "--type", "q8_0", "--outfile", tmp_path / "out.gguf")[0] == 0
    assert (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_or_a_kill_while_a_folder_is_read(tmp_path, number, code):
    before = snapshot(crafted.DEMO)
    arrange = f"while_reading({int(number)})"
    assert run(arrange, "convert", crafted.DEMO, "--type", "q8_0", "--outfile", tmp_path)[0] == code
    assert list(tmp_path.iterdir()) == [] and snapshot(crafted.DEMO) == before


def test_a_killed_converter_process_is_reported(tmp_path):
    arrange = """
plain = checkpoint._Child.header
def header(self):
    self.process.kill()
    return plain(self)
checkpoint._Child.header = header
"""
    code, error = run(arrange, "convert", crafted.DEMO, "--type", "q8_0", "--outfile", tmp_path)
    assert code == 6 and "ended with code -9" in error and list(tmp_path.iterdir()) == []


def test_a_converter_process_that_stops_early_is_not_waited_for(tmp_path):
    arrange = """
plain = checkpoint._Child.__init__
checkpoint._Child.__init__ = lambda self, *args: plain(self, *args[:-1], True)  # the header only
"""
    code, error = run(arrange, "convert", crafted.DEMO, "--type", "q8_0", "--outfile", tmp_path)
    assert code == 3 and "the file ends inside tensor" in error and list(tmp_path.iterdir()) == []


def test_a_converter_process_that_fails_during_the_encoding_says_why(tmp_path):
    failure = json.dumps({"kind": "unsupported", "message": "a strange layer"})
    arrange = f"""
import subprocess
def running(self):
    command = ["sh", "-c", 'echo "$0"; exit 1', {failure!r}]
    self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    self.process.wait()
    return plain(self)
plain, checkpoint._Child.running = checkpoint._Child.running, running
"""
    code, error = run(arrange, "convert", crafted.DEMO, "--type", "q8_0", "--threads", 1, "--outfile", tmp_path)
    assert code == 4 and "cannot convert this checkpoint: a strange layer" in error and list(tmp_path.iterdir()) == []
