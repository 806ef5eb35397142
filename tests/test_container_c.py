# SPDX-License-Identifier: MIT
"""llama.cpp opens containers: tensors of our types as rows of bytes, names and types in two keys (docs/format.md).

Containers are made here by hand from files with the types' own ids.
"""

import math
import os
import random
import re
import struct
import subprocess
import time

import crafted
import pytest

from gguf_splitq import types
from gguf_splitq.convert import convert
from gguf_splitq.files.gguf_file import Value, header, padded, read

SECONDS = float(os.environ.get("SPLITQ_FUZZ_SECONDS", 2))
VERSION, TENSORS, TYPES = (f"gguf_splitq.container.{name}" for name in ("version", "tensors", "types"))
I8, U16, I32, ARRAY = 24, 2, 5, 9
OURS = range(100, 120)
TYPES_OF_OURS = [t.name for t in types.all_types() if t.gguf_id in OURS]
AS_IS = {"OLLAMA_LLAMA_CPP_COMPAT": "0"}  # as Ollama asks for a copy


def strings(items) -> Value:
    data = b"".join(struct.pack("<Q", len(s)) + s for s in (item.encode() for item in items))
    return Value(ARRAY, struct.pack("<IQ", 8, len(items)) + data)


def numbers(items) -> Value:
    return Value(ARRAY, struct.pack(f"<IQ{len(items)}I", 4, len(items), *items))


def parts_of(path):
    """(metadata without the container's keys, [(name, shape, type id, bytes)]) of a file in either form."""
    with read(path) as file:
        listed = dict(zip(file.get(TENSORS, list[str], []), file.get(TYPES, list[int], []), strict=True))
        kv = {key: value for key, value in file.kv.items() if not key.startswith("gguf_splitq.container.")}
        tensors = []
        for t in file.tensors:
            data = file.read_rows(t, 0, t.n_rows).tobytes()
            shape, type_id = t.shape, listed.get(t.name, t.type_id)
            if t.type_id == I8 and type_id in OURS:
                found = next(one for one in types.all_types() if one.gguf_id == type_id)
                shape = (*shape[:-1], shape[-1] // found.block_bytes * found.block_size)
            tensors.append((t.name, shape, type_id, data))
    return kv, tensors


def write(path, kv, tensors):
    """A file of tensors as `parts_of` gives them."""
    with open(path, "wb") as file:
        file.write(header(kv, [tensor[:3] for tensor in tensors]))
        for *_, data in tensors:
            file.write(data.ljust(padded(len(data)), b"\0"))
    return path


def as_bytes(tensors):
    """The tensors as a container has them."""

    def of_bytes(name, shape, type_id, data):
        n_rows = math.prod(shape[:-1])
        return (name, (*shape[:-1], len(data) // n_rows), I8, data) if type_id in OURS else (name, shape, type_id, data)

    return [of_bytes(*tensor) for tensor in tensors]


def keys(tensors):
    ours = [(name, type_id) for name, _, type_id, _ in tensors if type_id in OURS]
    return {VERSION: Value.of(1), TENSORS: strings([n for n, _ in ours]), TYPES: numbers([t for _, t in ours])}


def both_forms(path, folder):
    """(the file with the types' ids, as a container)."""
    kv, tensors = parts_of(path)
    assert any(type_id in OURS for _, _, type_id, _ in tensors)
    first = {key: value for key, value in kv.items() if key.startswith("general.")}
    native = write(folder / "native.gguf", kv, tensors)
    return native, write(folder / "container.gguf", first | keys(tensors) | kv, as_bytes(tensors))


def in_two(path, folder):
    """The same file in two parts, of which the first has the metadata; its name."""
    kv, tensors = parts_of(path)
    container = "container" in path.name
    half = len(tensors) // 2
    for i, part in enumerate((tensors[:half], tensors[half:])):
        split = {"split.no": Value(U16, struct.pack("<H", i)), "split.count": Value(U16, struct.pack("<H", 2))}
        split["split.tensors.count"] = Value(I32, struct.pack("<i", len(tensors)))
        own = kv | (keys(tensors) if container else {}) if i == 0 else {}
        name = folder / f"{path.stem}-0000{i + 1}-of-00002.gguf"
        write(name, own | split, as_bytes(part) if container else part)
    return folder / f"{path.stem}-00001-of-00002.gguf"


def run(program, *args, env=None):
    """(exit code, all it said); a signal is a failure."""
    done = subprocess.run([program, *map(str, args)], stdout=-1, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
    text = done.stdout.decode(errors="replace")
    assert done.returncode >= 0, text[-2000:]
    return done.returncode, text


def logits(programs, path, *options):
    """What llama-perplexity keeps of every token's probabilities, and its estimate."""
    base = path.with_suffix(".logits")
    text = ["-f", crafted.DEMO / "eval.txt", "-c", "64", "-b", "64", "--chunks", "2", "-t", "2"]
    code, output = run(programs / "llama-perplexity", "-m", path, *text, "--kl-divergence-base", base, *options)
    assert code == 0, output[-2000:]
    estimate = re.search(r"\[2\](\d+\.\d+)", output)
    return base.read_bytes(), estimate and estimate[1]


@pytest.fixture(scope="module")
def forms(demo_f16, tmp_path_factory):
    """Both forms of the demo in a type, by the type's name."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = both_forms(convert(demo_f16, name, folder / "out.gguf"), folder)
        return made[name]

    return make


@pytest.mark.parametrize("name", TYPES_OF_OURS)
def test_logits_are_those_of_the_file_with_ids(runtime_programs, forms, name):
    native, container = forms(name)
    assert native.read_bytes() != container.read_bytes()
    assert logits(runtime_programs, native) == logits(runtime_programs, container)


@pytest.mark.parametrize("options", [(), ("--load-mode", "none"), ("--no-repack",), ("--check-tensors",)])
@pytest.mark.parametrize("name", ["sq4", "cq3"])
def test_parts_and_ways_to_load(runtime_programs, forms, tmp_path, name, options):
    native, container = forms(name)
    wanted = logits(runtime_programs, native, *options)
    assert logits(runtime_programs, container, *options) == wanted
    assert logits(runtime_programs, in_two(container, tmp_path), *options) == wanted


@pytest.mark.parametrize("name", ["sq4", "cq3", "sq3c"])
def test_experts(runtime_programs, tmp_path, name):
    folder = crafted.hf_folder(tmp_path / "mixtral", "mixtral", hidden_size=128, intermediate_size=128)
    native, container = both_forms(convert(folder, name, tmp_path / "out.gguf"), tmp_path)
    assert any(len(shape) == 3 and type_id in OURS for _, shape, type_id, _ in parts_of(native)[1])
    assert logits(runtime_programs, native) == logits(runtime_programs, container)


@pytest.mark.parametrize("name", ["sq4", "cq3"])
def test_copy(runtime_programs, forms, tmp_path, name):
    native, container = forms(name)
    quantize, wanted = runtime_programs / "llama-quantize", logits(runtime_programs, native)

    for source in (native, container):  # llama-quantize's own copy has the ids, and no keys
        copy = tmp_path / f"{source.stem}-copy.gguf"
        assert run(quantize, source, copy, "COPY")[0] == 0
        assert logits(runtime_programs, copy) == wanted
        with read(copy) as file:
            assert VERSION not in file.kv and any(t.type_id in OURS for t in file.tensors)
    assert (tmp_path / "native-copy.gguf").read_bytes() == (tmp_path / "container-copy.gguf").read_bytes()

    copy = tmp_path / "as-is.gguf"  # rows of bytes stay rows of bytes, in another order
    assert run(quantize, container, copy, "COPY", env=AS_IS)[0] == 0
    assert logits(runtime_programs, copy) == wanted
    kv, tensors = parts_of(copy)
    assert sorted(tensors) == sorted(parts_of(native)[1])
    assert [t[0] for t in tensors] != [t[0] for t in parts_of(native)[1]]
    assert b"gguf_splitq.container.version" in copy.read_bytes()[: 1 << 20]

    kv, tensors = parts_of(native)  # keys beside the types' own ids
    assert logits(runtime_programs, write(tmp_path / "named.gguf", kv | keys(tensors), tensors)) == wanted


def test_quantized_anew(runtime_programs, forms, tmp_path):
    made = []
    for source in forms("sq4"):
        out = tmp_path / f"{source.stem}-q8_0.gguf"
        code, output = run(runtime_programs / "llama-quantize", "--allow-requantize", source, out, "Q8_0")
        assert code == 0, output[-2000:]
        made.append(out.read_bytes())
        with read(out) as file:
            assert VERSION not in file.kv and not any(t.type_id in OURS for t in file.tensors)
    assert made[0] == made[1]
    without = [forms("cq3")[1], tmp_path / "no.gguf"]  # a decoder in C
    code, output = run(runtime_programs / "llama-quantize", "--allow-requantize", *without, "Q8_0")
    assert code != 0 and "cq3" in output


def test_what_knows_no_containers_refuses_them(runtime_programs, forms):
    """With OLLAMA_LLAMA_CPP_COMPAT=0 the loader is upstream's."""
    text = ["-f", crafted.DEMO / "eval.txt"]
    code, output = run(runtime_programs / "llama-perplexity", "-m", forms("sq4")[1], *text, env=AS_IS)
    assert code != 0 and re.search("has wrong shape; expected +256, +256.*, got +136, +256", output), output[-2000:]


NAME = "blk.0.attn_q.weight"
HOSTILE = {
    "lengths": (lambda names, ids: {TYPES: numbers(ids[:-1])}, "not of the same length"),
    "no names": (lambda names, ids: {TENSORS: None}, f"key {TENSORS} is missing"),
    "no types": (lambda names, ids: {TYPES: None}, f"key {TYPES} is missing"),
    "types of strings": (lambda names, ids: {TYPES: strings(names)}, f"key {TYPES} is missing or not an array"),
    "names of numbers": (lambda names, ids: {TENSORS: numbers(ids)}, f"key {TENSORS} is missing or not an array"),
    "a name alone": (lambda names, ids: {TENSORS: Value.of("x")}, f"key {TENSORS} is missing or not an array"),
    "no version": (lambda names, ids: {VERSION: None}, f"key {VERSION} is not 1"),
    "version 2": (lambda names, ids: {VERSION: Value.of(2)}, f"key {VERSION} is not 1"),
    "version of text": (lambda names, ids: {VERSION: Value.of("1")}, f"key {VERSION} is not 1"),
    "a stock type": (lambda names, ids: {TYPES: numbers([8] * len(ids))}, "given a type that is none of gguf-splitq's"),
    "no type": (lambda names, ids: {TYPES: numbers([2**32 - 1] * len(ids))}, "with type 4294967295, is given a type"),
    "120": (lambda names, ids: {TYPES: numbers([120] * len(ids))}, "with type 120, is given a type"),
    "an unknown name": (lambda names, ids: {TENSORS: strings(["x\nü", *names[1:]])}, "is not there"),
    "an empty name": (lambda names, ids: {TENSORS: strings(["", *names[1:]])}, "tensor ''"),
    "twice": (lambda names, ids: {TENSORS: strings(names + [NAME]), TYPES: numbers(ids + [100])}, f"'{NAME}', which"),
    "not of bytes": (
        lambda names, ids: {TENSORS: strings(["token_embd.weight", *names[1:]])}, "'token_embd.weight', which key",
    ),
    "another block": (lambda names, ids: {TYPES: numbers([103] * len(ids))}, "no whole number of blocks"),
    "another shape": (lambda names, ids: {TYPES: numbers([105] * len(ids))}, "no whole number of blocks"),
    "one left out": (lambda names, ids: {TENSORS: strings(names[1:]), TYPES: numbers(ids[1:])}, "has wrong shape"),
}  # fmt: skip


def altered(container, folder, change):
    """The container with other keys; None removes one."""
    kv, tensors = parts_of(container)
    values = keys(tensors)
    values |= change(values[TENSORS].python, values[TYPES].python)
    values = {key: value for key, value in values.items() if value is not None}
    return write(folder / "hostile.gguf", kv | values, as_bytes(tensors))


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_keys_are_refused(runtime_programs, forms, tmp_path, change, message):
    hostile = altered(forms("sq4")[1], tmp_path, change)
    code, output = run(runtime_programs / "llama-perplexity", "-m", hostile, "-f", crafted.DEMO / "eval.txt")
    assert code != 0 and message in output, output[-2000:]


def test_any_keys_and_shapes_end_in_a_message(runtime_programs, forms, tmp_path):
    kv, tensors = parts_of(forms("sq3c")[0])
    tensors = as_bytes(tensors)[:30]
    kv["llama.block_count"] = Value.of(1)
    names = [tensor[0] for tensor in tensors]
    pool = [*3 * names, "", "x", "\0", names[0] + "\0", "blk.0.columns"]
    rng, until, taken = random.Random(1), time.monotonic() + SECONDS, 0
    while taken < 20 or time.monotonic() < until:
        listed = rng.choices(pool, k=rng.choice([0, 1, 2, 5, 30, 1000]))
        listed = listed if rng.random() < 0.5 else list(dict.fromkeys(listed))
        ids = rng.choices([*OURS, *OURS, 0, 8, 24, 99, 120, 2**31, 2**32 - 1], k=len(listed))
        shaped = []
        for name, shape, type_id, data in tensors:
            others = [(*shape, 1)[:4], (1, *shape)[-4:], (*shape[:-1], 1), (1,), (1, 1, 1, len(data))]
            sizes = rng.choice([shape, shape, *others])
            fits = type_id != I8 or math.prod(sizes) > len(data)
            shaped.append((name, shape, type_id, data) if fits else (name, sizes, type_id, data[: math.prod(sizes)]))
        values = {VERSION: Value.of(1), TENSORS: strings(listed), TYPES: numbers(ids)}
        hostile = write(tmp_path / "hostile.gguf", kv | values, shaped)
        run(runtime_programs / "llama-quantize", "--dry-run", hostile, tmp_path / "out.gguf", "COPY")
        taken += 1
