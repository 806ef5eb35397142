# SPDX-License-Identifier: MIT
"""Hostile input: whatever a file holds, a command ends well or with one sentence, in little time and memory.

Every metadata key that is read has been of every kind; sound files are damaged at random, always in the same way
unless SPLITQ_FUZZ_SECONDS says for how long; the C loader's checks run under sanitizers. What was found this way is in
the tests of the module that was at fault.
"""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import crafted
import numpy as np
import pytest
import torch
from test_claq import random_side

from gguf_splitq import inspection, plan, types
from gguf_splitq.calibration.hessians import Hessians
from gguf_splitq.calibration.journal import Journal
from gguf_splitq.calibration.moments import Layer
from gguf_splitq.convert import convert
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import InputError, SplitqError, UsageError
from gguf_splitq.files import gguf_file, imatrix
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.measure import overlap, validate
from gguf_splitq.plan import mix
from gguf_splitq.repack import repack
from gguf_splitq.types import columns

SECONDS = float(os.environ.get("SPLITQ_FUZZ_SECONDS", 0))  # for each kind of file; 0: as many mutants as below
MUTANTS = 100
MEMORY = 64 << 20  # bytes, for files of a few kilobytes
CALIBRATION = {"model": "m", "calib": "c", "calib_tokens": 4096, "calib_dtype": "f32", "aim": "plain", "weights": None}


def model(folder):
    """A model in F16, calibrated, with every key that any command asks for."""
    tensors = crafted.llama_tensors(hidden=32, ffn=32, blocks=1, vocab=8)
    path = crafted.write_gguf(folder / "model.gguf", tensors)
    with gguf_file.read(path) as file:
        kv = file.kv | {
            "general.alignment": Value.of(32),
            "gguf_splitq.calib_lines": Value.of(overlap.fingerprint("one line that is long enough to count")),
            "gguf_splitq.type": Value.of("sq4"),
            "quantize.imatrix.dataset": Value.of("calib.txt"),
            "split.count": Value.of(1),
        }
        rows = [file.read_rows(t, 0, t.n_rows).tobytes() for t in file.tensors]
        stored = [(t.name, t.shape, t.type_id) for t in file.tensors]
    return write(path, kv, stored, rows)


def quantized(folder):
    """Tensors of all block types of this project, random bytes, and of all with side tensors."""
    rng, stored, rows = np.random.default_rng(1), [], []
    for kind in types.CUSTOM:
        stored.append((f"blk.0.{kind.name}.weight", (2, 256), kind.gguf_id))
        rows.append(kind.encode_numpy(crafted.weights(2, 256)).tobytes())
    for kind in types.COLUMNS:
        layout = columns.Layout(int(kind.wide_bits > kind.code_bits), 9 if kind.name.startswith("cq") else 0)
        codes = rng.integers(0, 4, (20, 64)).astype(np.uint8)
        d = None if kind.name.startswith("cq") else rng.integers(0, 64, (20, 2)).astype(np.uint8)
        packed, side = kind.pack(codes, random_side(kind, layout, rng, 20, 64), layout, d)
        name = f"blk.0.{kind.name}.weight"
        stored += [(name, (20, 64), kind.gguf_id), (columns.side_name(name), (len(side),), columns.SIDE_TYPE)]
        rows += [packed.tobytes(), side.tobytes()]
    kv = {"general.architecture": Value.of("llama"), "gguf_splitq.type": Value.of("cq3")}
    return write(folder / "quantized.gguf", kv, stored, rows)


def write(path, kv, stored, rows, contained=False):
    data = [row.ljust(gguf_file.padded(len(row)), b"\0") for row in rows]
    path.write_bytes(gguf_file.header(kv, stored, contained) + b"".join(data))
    return path


def contained(folder):
    """The same as a container."""
    with gguf_file.read(quantized(folder)) as file:
        rows = [file.read_rows(t, 0, t.n_rows).tobytes() for t in file.tensors]
        return write(folder / "container.gguf", file.kv, file.infos, rows, contained=True)


def hessians(folder):
    kv = {
        "gguf_splitq.calibration": Value.of(json.dumps(CALIBRATION)),
        "gguf_splitq.pooled": Value.of(json.dumps(["0 b"])),
    }
    matrix = np.eye(8, dtype=np.float32).tobytes()
    return write(folder / "hessians.gguf", kv, [(f"0 {name}", (8, 8), 0) for name in "ab"], [matrix, matrix])


def weights(folder):
    kv = {"gguf_splitq.calibration": Value.of(json.dumps(CALIBRATION))}
    matrix = np.float32([[1, 2, 3], [0, 0, 1], [5, 4, 0]]).tobytes()
    return write(folder / "weights.gguf", kv, [(f"0 {name}", (3, 3), 0) for name in ("a", "b[1]")], [matrix, matrix])


def saved_plan(folder):
    names = [t.name for t in gguf_file.read(model(folder)).tensors]
    linear = {name: "sq3" for name in names if name.startswith("blk.") and "norm" not in name}
    mix.save(mix.Mix(3.5, linear, {name: {"sq3": 0.25, "sq4": 0.0} for name in linear}), folder / "plan.json")
    return folder / "plan.json"


def use_hessians(path):
    known = Hessians(path, SimpleNamespace(settings=CALIBRATION), 1)
    known.fill(0, [Layer(name, torch.zeros(4, 8)) for name in "abc"])


def use_weights(path):
    Hessians(path, SimpleNamespace(settings=CALIBRATION), 1).weights(0)


def use_imatrix(path):
    found = imatrix.load(path)
    found.for_tensors(gguf_file.read(path.with_name("model.gguf")).tensors)
    gguf_file.header(found.metadata(), [])


def use_plan(path):
    tensors = gguf_file.read(path.with_name("model.gguf")).tensors
    found, entries = mix.load(path), plan.make(tensors, "sq4")
    mix.check_names(found, entries, path)
    mix.summary(found, plan.make(tensors, "sq4", chosen=found.types))


def use_validate(path):
    validate._vocabulary(gguf_file.read(path))
    validate.check_overlap(path, path.with_name("text.txt"))


def legacy(folder):
    return crafted.legacy_imatrix(folder / "i.dat", {"blk.0.attn_q.weight": ([1.0] * 32, 4), "b": ([2.0] * 3, 1)})


def modern(folder):
    return crafted.gguf_imatrix(folder / "i.gguf", {"blk.0.attn_q.weight": ([[1.0] * 32], [4])})


def dequantize_to(path):
    dequantize(path, path.with_name("out.gguf"), threads=1, overwrite=True)


USES = {  # command -> (a sound file, what is done with it)
    "inspect": (model, inspection.inspect),
    "inspect json": (model, functools.partial(inspection.inspect, json=True)),
    "convert": (model, lambda path: convert(path, "sq4", path.with_name("out.gguf"), dry_run=True, threads=1)),
    "dequantize": (quantized, dequantize_to),
    "repack": (contained, lambda path: repack(path, False, path.with_name("out.gguf"), overwrite=True)),
    "validate": (model, use_validate),
    "imatrix": (modern, use_imatrix),
    "imatrix, legacy": (legacy, use_imatrix),
    "hessians": (hessians, use_hessians),
    "weights": (weights, use_weights),
    "plan": (saved_plan, use_plan),
}
WITH_METADATA = [name for name, (make, _) in USES.items() if make not in (legacy, saved_plan, contained)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path)
    (tmp_path / "text.txt").write_text("a text\n")
    (tmp_path / "calib.txt").write_text("another text\n")
    return tmp_path


def outcome(use, path):
    """The refusal, None when there was none; all else that is raised is a fault, as is what a terminal would obey."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()), np.errstate(all="ignore"):
            use(path)
        error = None
    except SplitqError as found:
        error = found
        assert str(error).isprintable() and ": " in str(error), repr(str(error))
    assert all(line.isprintable() for line in shown.getvalue().splitlines()), repr(shown.getvalue())
    return error


def scalar(kind, raw):
    return struct.pack("<Q", len(raw)) + raw if kind == 8 else raw


def every_value():
    """A value of every kind: scalars and strings of several contents, arrays of these, and what is not allowed."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    raws = {kind: [b"\xff" * size, b"\1".ljust(size, b"\0")] for kind, size in sizes.items()}
    raws[8] = [b"", b"llama", b"\x1b[2J\n", b"\xff\xfe\xed\xa0\x80", b"../" * 2000, b"[" * 20000, b'{"model": []}']
    for kind, contents in raws.items():
        yield from (Value(kind, scalar(kind, raw)) for raw in contents)
        for count in (0, 3):
            items = b"".join(scalar(kind, contents[i % len(contents)]) for i in range(count))
            yield Value(9, struct.pack("<IQ", kind, count) + items)
    yield Value(9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1) + bytes(4))
    yield Value(9, struct.pack("<IQ", 4, 1 << 62))
    yield Value(9, struct.pack("<IQ", 8, 1 << 40) + bytes(8))
    yield Value(8, struct.pack("<Q", 1 << 63) + b"text")
    yield Value(13, bytes(8))


def asked(monkeypatch, use, path):
    """Keys that a command asks for, with the kinds it wants."""
    keys, plain = {}, gguf_file.typed

    def spy(path, kv, key, kind, default):
        keys[key] = kind
        return plain(path, kv, key, kind, default)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "typed", spy)
        assert outcome(use, path) is None
    return keys


@pytest.mark.parametrize("command", WITH_METADATA)
def test_every_key_that_is_read_may_be_of_any_kind(folder, monkeypatch, command):
    make, use = USES[command]
    path = make(folder)
    keys = asked(monkeypatch, use, path)
    with gguf_file.read(path) as file:
        kv, stored = file.kv, [(t.name, t.shape, t.type_id) for t in file.tensors]
        rows = [file.read_rows(t, 0, t.n_rows).tobytes() for t in file.tensors]
    shown = {"inspect": ["general.name"], "inspect json": [k for k in kv if k.startswith(inspection._KEYS)]}
    for key in {*keys, *shown.get(command, ())}:
        for value in every_value():
            write(path, kv | {key: value}, stored, rows)
            error = outcome(use, path)
            if key in keys and value.type <= 9 and len(value.raw) > 12 and not value.serves(keys[key]):
                assert isinstance(error, InputError) and key in str(error), (key, value)
    assert len(keys) > 4


@pytest.mark.parametrize("key", ["general.architecture", "general.alignment"])
def test_a_value_may_end_anywhere(folder, key):
    with gguf_file.read(folder / "model.gguf") as file:
        kv = file.kv
    for value in every_value():
        whole = gguf_file.header({name: kv[name] for name in kv if name != key} | {key: value}, [])
        end = whole.index(key.encode()) + len(key) + 4 + len(value.raw)
        for cut in {1, 4, len(value.raw) // 2 or 1, len(value.raw)}:
            (folder / "cut.gguf").write_bytes(whole[: max(end - cut, 0)])
            assert isinstance(outcome(inspection.inspect, folder / "cut.gguf"), InputError)


@pytest.mark.parametrize(
    ("kv", "matrix", "words"),
    [
        ({"gguf_splitq.pooled": "{}"}, None, "'gguf_splitq.pooled' is not a JSON list"),
        ({"gguf_splitq.pooled": "["}, None, "'gguf_splitq.pooled' is not a JSON list"),
        ({"gguf_splitq.pooled": "[" * 100000}, None, "'gguf_splitq.pooled' is not a JSON list"),
        ({"gguf_splitq.calibration": "[1]"}, None, "'gguf_splitq.calibration' is not a JSON dict"),
        ({"gguf_splitq.calibration": 3}, None, "'gguf_splitq.calibration' is of type u32 where a string is due"),
        ({"gguf_splitq.calibration": "{}"}, None, "measured with model None"),
        ({}, np.eye(8, dtype=np.float16), r"'0 a' is f16 \[8, 8\] where f32 \[8, 8\] is due"),
        ({}, np.eye(4, dtype=np.float32), r"'0 a' is f32 \[4, 4\] where"),
        ({}, np.full((8, 8), np.nan, np.float32), "'0 a' holds NaN"),
    ],
)
def test_what_are_no_hessians(folder, kv, matrix, words):
    matrix = np.eye(8, dtype=np.float32) if matrix is None else matrix
    kv = {"gguf_splitq.calibration": json.dumps(CALIBRATION)} | kv
    kind = {np.float32: 0, np.float16: 1}[matrix.dtype.type]
    stored = [("0 a", matrix.shape, kind)]
    path = write(folder / "h.gguf", {k: Value.of(v) for k, v in kv.items()}, stored, [matrix.tobytes()])
    with pytest.raises(SplitqError, match=words):
        use_hessians(path)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ([[1, 2], [0, 0]], r"'0 a' is f32 \[2, 2\] where f32 \[3, 'any'\] is due"),
        ([[1, 2], [0, 0], [0, 4096]], "'0 a' has tokens that no batch has"),
        ([[1, 2], [0, 0], [-1, 0]], "'0 a' has tokens that no batch has"),
    ],
)
def test_what_are_no_weights_of_tokens(folder, matrix, words):
    kv = {"gguf_splitq.calibration": Value.of(json.dumps(CALIBRATION))}
    path = write(folder / "w.gguf", kv, [("0 a", np.shape(matrix), 0)], [np.float32(matrix).tobytes()])
    with pytest.raises(InputError, match=words):
        use_weights(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"[" * 100000, b"\xff", b'{"a": 1}'])
def test_what_are_no_settings_of_an_unfinished_run(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UsageError, match="an unfinished run with other settings"):
        Journal(tmp_path, CALIBRATION)


@pytest.mark.parametrize(("kind", "raw"), [(10, struct.pack("<Q", 1 << 32)), (6, bytes(4)), (8, bytes(8))])
def test_a_number_of_chunks_that_cannot_be(folder, kind, raw):
    path = modern(folder)
    with gguf_file.read(path) as file:
        kv, stored = file.kv, [(t.name, t.shape, t.type_id) for t in file.tensors]
        rows = [file.read_rows(t, 0, t.n_rows).tobytes() for t in file.tensors]
    write(path, kv | {"imatrix.chunk_count": Value(kind, raw)}, stored, rows)
    with pytest.raises(InputError, match=r"i\.gguf: "):
        use_imatrix(path)


EXTREMES = [0, 1, 2, 7, 8, 9, 31, 32, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1]


def damaged(rng: random.Random, data: bytes, text: bool) -> bytes:
    """A few bits, bytes, numbers or slices changed; of a text also words."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(out), rng.choice((64, 1024, 1 << 30)))) if out else 0
        match rng.randrange(7 if text else 6):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                size = rng.choice((1, 2, 4, 8))
                out[at : at + size] = (rng.choice(EXTREMES) & (1 << 8 * size) - 1).to_bytes(size, "little")
            case 2:
                out[at : at + 8] = rng.choice(EXTREMES).to_bytes(8, "little")
            case 3 if rng.random() < 0.3:
                del out[at:]
            case 4:
                piece = out[at : at + rng.randrange(1, 200)]
                out[at:at] = piece
            case 5:
                del out[at : at + rng.randrange(1, 40)]
            case 6:
                words = (
                    b"null",
                    b"-1e999",
                    b"NaN",
                    b"[]",
                    b"{}",
                    b"true",
                    b'"\\u001b\\ud800"',
                    b"[" * 9999,
                    b"9" * 5000,
                )
                end = min((i for i in (out.find(c, at) for c in b",:}") if i > 0), default=at)
                out[at:end] = rng.choice(words)
    return bytes(out)


@pytest.mark.parametrize("command", USES)
def test_a_damaged_file_is_read_or_refused(folder, command):
    make, use = USES[command]
    path = make(folder)
    sound, rng, refused = path.read_bytes(), random.Random(command), 0
    assert outcome(use, path) is None  # and what is loaded once is not counted below
    until = time.monotonic() + SECONDS
    tracemalloc.start()
    try:
        tried = 0
        while tried < MUTANTS or time.monotonic() < until:
            tried += 1
            mutant = damaged(rng, sound, path.suffix == ".json")
            path.write_bytes(mutant)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                refused += outcome(use, path) is not None
                assert tracemalloc.get_traced_memory()[1] - before < MEMORY
            except BaseException:
                Path(os.environ.get("SPLITQ_FUZZ_KEEP", folder), f"{command}{path.suffix}").write_bytes(mutant)
                raise
    finally:
        tracemalloc.stop()
    assert refused > tried // 10


def test_side_tensors_in_the_c_loader_under_sanitizers(patched_tree, tmp_path):
    program, ggml = tmp_path / "fuzz", patched_tree / "ggml"
    sanitized = ["gcc", "-std=gnu11", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    probe = subprocess.run([*sanitized, tmp_path / "empty.c", "-o", program], capture_output=True)
    if probe.returncode or subprocess.run([program], capture_output=True).returncode:
        pytest.skip("gcc has no sanitizers here: install libasan and libubsan")
    includes = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    subprocess.run([*sanitized, *includes, Path(__file__).parent / "c" / "fuzz.c", "-o", program, "-lm"], check=True)
    until, seed, answers = time.monotonic() + SECONDS, 1, {}
    while seed == 1 or time.monotonic() < until:
        done = subprocess.run([program, "20000", str(seed)], capture_output=True, text=True)
        reports = [line for line in done.stderr.splitlines() if not line.startswith("splitq_validate_blocks")]
        assert done.returncode == 0, f"seed {seed}: " + "\n".join(reports)
        answers |= {answer: int(count) for count, _, answer in (s.partition(" ") for s in done.stdout.splitlines())}
        seed += 1
    source = (ggml / "src" / "ggml-columns.c").read_text()
    check = source[source.index("ggml_splitq_check_columns(") : source.index("columns_decode_row(")]
    for reason in {part.partition('"')[0] for part in check.split('return "')[1:]}:
        assert answers.pop(reason) > 0  # each was met
    assert answers.keys() == {"accepted"} and answers["accepted"] > 1000
