# SPDX-License-Identifier: MIT
"""The reader against upstream's writer and against crafted headers; the writer against upstream's reader."""

import os
import resource
import struct
from pathlib import Path

import crafted
import numpy as np
import pytest

from gguf_splitq.errors import EnvironmentFailed, InputError, UnsupportedError
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Value

F32, F16, Q4_0 = 0, 1, 2


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def kv(key, kind, raw):
    return string(key) + struct.pack("<I", kind) + raw


def info(name, shape, type_id=F32, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


def file_of(path, kvs=(), infos=(), data=0, magic=b"GGUF", version=3, n_tensors=None, n_kv=None):
    counts = (len(infos) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(kvs) + b"".join(infos)
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data))
    return path


HUGE = 1 << 62
DAMAGED = {
    "empty": (dict(magic=b""), "GGUF"),
    "magic": (dict(magic=b"GGML"), "first four bytes"),
    "tensor count": (dict(n_tensors=HUGE), "do not fit"),
    "metadata count": (dict(n_kv=HUGE), "do not fit"),
    "2^20 + 1 keys": (dict(n_kv=(1 << 20) + 1, data=1 << 24), "do not fit"),
    "key length": (dict(kvs=[struct.pack("<Q", HUGE) + b"general.architecture"]), "metadata key"),
    "array of 2^62 bytes": (dict(kvs=[kv("a", 9, struct.pack("<IQ", 0, HUGE))]), "'a'"),
    "array of 2^62 strings": (dict(kvs=[kv("a", 9, struct.pack("<IQ", 8, HUGE))]), "'a' claims"),
    "array of arrays": (dict(kvs=[kv("a", 9, struct.pack("<IQ", 9, 1) + bytes(12))]), "array of the unknown type 9"),
    "value type": (dict(kvs=[kv("a", 13, bytes(64))]), "unknown type 13"),
    "key twice": (dict(kvs=[kv("a", 4, bytes(4))] * 2), "'a' is there twice"),
    "key not UTF-8": (dict(kvs=[kv(b"\xff\xfe", 4, bytes(4))]), "UTF-8"),
    "alignment 0": (dict(kvs=[kv("general.alignment", 4, struct.pack("<I", 0))]), "alignment"),
    "alignment 48": (dict(kvs=[kv("general.alignment", 4, struct.pack("<I", 48))]), "alignment"),
    "alignment type": (dict(kvs=[kv("general.alignment", 10, struct.pack("<Q", 32))]), "alignment"),
    "escape in a key": (dict(kvs=[kv("\x1b[2J", 4, bytes(4))]), "not printable"),
    "escape in a name": (dict(infos=[info("\x1b[2J", [32])], data=128), "not printable"),
    "no name": (dict(infos=[info("", [32])], data=128), "0 bytes"),
    "long name": (dict(infos=[info("x" * 64, [32])], data=128), "64 bytes"),
    "five dimensions": (dict(infos=[info("t", [1] * 5)], data=128), "'t' has 5 dimensions"),
    "2^32 dimensions": (dict(infos=[string("t") + struct.pack("<I", 2**32 - 1)], data=128), "'t'"),
    "dimension 0": (dict(infos=[info("t", [0, 4])], data=128), "'t' has the impossible shape"),
    "product overflows": (dict(infos=[info("t", [1 << 32, 1 << 32])], data=128), "'t' has the impossible shape"),
    "product wraps to 32": (dict(infos=[info("t", [32, (1 << 59) + 1, 32])], data=4096), "'t' has the impossible"),
    "a number in blocks": (dict(infos=[info("t", [], Q4_0)], data=128), "'t' has rows of 1 that do not divide"),
    "row of half a block": (dict(infos=[info("t", [48, 2], Q4_0)], data=128), "'t' has rows of 48"),
    "past the end": (dict(infos=[info("t", [64])], data=128), "'t' reaches 128 bytes past the end"),
    "far past the end": (dict(infos=[info("t", [1 << 40])], data=128), "'t' reaches"),
    "misaligned": (dict(infos=[info("t", [32], offset=4)], data=256), "'t' starts at 4 where 0 is due"),
    "overlapping": (dict(infos=[info("a", [32]), info("b", [32])], data=256), "'b' starts at 0 where 128 is due"),
    "huge offset": (dict(infos=[info("t", [32], offset=2**64 - 32)], data=256), "'t' starts at"),
    "tensor twice": (dict(infos=[info("t", [32]), info("t", [32], offset=128)], data=256), "'t' is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_crafted_header_is_refused_by_name(tmp_path, case):
    parts, words = DAMAGED[case]
    path = file_of(tmp_path / "crafted.gguf", **parts)
    with pytest.raises(InputError, match="crafted.gguf") as error:
        gguf_file.read(path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (dict(version=1), "version 1"),
        (dict(version=4), "version 4"),
        (dict(version=3 << 24), "big-endian"),
        (dict(infos=[info("t", [32], 4096)], data=128), "'t' has type 4096"),
    ],
)
def test_what_is_sound_but_unknown_is_called_unsupported(tmp_path, parts, words):
    with pytest.raises(UnsupportedError, match=words):
        gguf_file.read(file_of(tmp_path / "m.gguf", **parts))


def test_every_truncation_of_a_sound_file_is_refused(tmp_path):
    whole = file_of(tmp_path / "whole.gguf", [kv("a", 8, string("text"))], [info("t", [32])], 128)
    data = whole.read_bytes()
    assert [t.name for t in gguf_file.read(whole).tensors] == ["t"]
    for length in range(len(data)):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InputError):
            gguf_file.read(tmp_path / "cut.gguf")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            gguf_file.read(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = file_of(tmp_path / "m.gguf", infos=[info("t", [32])], data=128)
    with gguf_file.read(path) as file:
        os.truncate(path, 100)
        with pytest.raises(InputError, match="ends inside tensor 't'"):
            file.read_rows(file.tensors[0], 0, 1)


def test_reading_a_growing_file_waits_for_what_is_missing(tmp_path):
    path = crafted.write_gguf(tmp_path / "whole.gguf", {"a.weight": np.arange(4096, dtype=np.float32).reshape(64, 64)})
    with gguf_file.read(path) as file:
        expected = file.read_rows(file.tensors[0], 0, 64).tobytes()
    whole, part = path.read_bytes(), tmp_path / "part.gguf"
    part.write_bytes(whole[:4000])
    steps = iter([whole[:6000], whole[:6000], whole])
    with gguf_file.read(part, data=False) as file:
        file.growing = lambda: part.write_bytes(data) > 0 if (data := next(steps, None)) else False
        assert file.read_rows(file.tensors[0], 0, 64).tobytes() == expected
    part.write_bytes(whole[:4000])
    with gguf_file.read(part, data=False) as file, pytest.raises(InputError, match="ends inside"):
        file.read_rows(file.tensors[0], 0, 64)


@pytest.mark.parametrize("alignment", [None, 64])
def test_reading_agrees_with_upstreams_reader(tmp_path, alignment):
    path = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(), alignment=alignment)
    fields, tensors = crafted.read_gguf(path)
    with gguf_file.read(path) as file:
        assert {k: v.python for k, v in file.kv.items()} == {k: v for k, v in fields.items() if "GGUF." not in k}
        assert [t.name for t in file.tensors] == list(tensors)
        for tensor in file.tensors:
            raw = file.read_rows(tensor, 0, tensor.n_rows)
            assert raw.tobytes() == tensors[tensor.name][1].tobytes()
            half = file.read_rows(tensor, tensor.n_rows // 2, 1)
            assert half.tobytes() == raw[tensor.n_rows // 2].tobytes()


def test_writing_agrees_with_upstreams_reader(tmp_path):
    data = {"a.weight": crafted.weights(3, 5), "b.weight": crafted.weights(7, seed=1)}
    kvs = {"general.architecture": Value.of("llama"), "general.file_type": Value.of(7), "empty": Value.of("")}
    head = gguf_file.header(kvs, [(name, array.shape, F32) for name, array in data.items()])
    body = [array.tobytes().ljust(gguf_file.padded(array.nbytes), b"\0") for array in data.values()]
    with gguf_file.atomic(tmp_path / "m.gguf", 0) as file:
        file.write(head + b"".join(body))
    fields, tensors = crafted.read_gguf(tmp_path / "m.gguf")
    assert (fields["general.architecture"], fields["general.file_type"], fields["empty"]) == ("llama", 7, "")
    for name, array in data.items():
        np.testing.assert_array_equal(tensors[name][1], array)


def test_metadata_is_copied_byte_for_byte(tmp_path):
    file = gguf_file.read(crafted.write_gguf(tmp_path / "m.gguf", {"a.weight": crafted.weights(2, 32)}))
    head = gguf_file.header(file.kv, [(t.name, t.shape, t.type_id) for t in file.tensors])
    assert (tmp_path / "m.gguf").read_bytes().startswith(head)


def test_shards_are_read_as_one_file(tmp_path):
    tensors = crafted.llama_tensors()
    writer = crafted.gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=5)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) > 2
    with gguf_file.read(shards[0]) as file:
        assert sorted(t.name for t in file.tensors) == sorted(tensors) and file.files == shards
        assert not any(key.startswith("split.") for key in file.kv)
        for tensor in file.tensors:
            assert file.read_rows(tensor, 0, tensor.n_rows).tobytes() == tensors[tensor.name].tobytes()
    with pytest.raises(InputError, match="give the first"):
        gguf_file.read(shards[1])
    shards[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(InputError, match="one of .* shards"):
        gguf_file.read(tmp_path / "alone.gguf")
    (tmp_path / "alone.gguf").rename(shards[0])
    shards[-1].unlink()
    with pytest.raises(InputError, match=shards[-1].name):
        gguf_file.read(shards[0])


def shard(path, number, count, names, total=None, **split):
    keys = {"no": number, "count": count, "tensors.count": total or len(names)} | split
    kvs = [kv(f"split.{key}", 4, struct.pack("<I", value)) for key, value in keys.items()]
    return file_of(path, kvs, [info(name, [32], F32, 128 * i) for i, name in enumerate(names)], 128 * len(names))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (dict(number=0), "'split.no' is 0 where 1 is due for shard 2 of 2"),
        (dict(count=3), "'split.count' is 3 where 2 is due"),
        (dict(total=9), "'split.tensors.count' is 9 where 3 is due"),
        (dict(names=["a"]), "tensor 'a' is there twice"),
        (dict(names=["c", "d"]), "'split.tensors.count' is 3 where 4 is due"),
    ],
)
def test_shards_that_disagree_are_refused(tmp_path, second, words):
    first, other = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    shard(first, 0, 2, ["a", "b"], total=3)
    with pytest.raises(InputError, match="m-00002-of-00002.gguf: shard 2 of 2 is missing"):
        gguf_file.read(first)
    shard(other, **dict(number=1, count=2, names=["c"], total=3))
    with gguf_file.read(first) as file:
        assert [t.name for t in file.tensors] == ["a", "b", "c"]
    shard(other, **dict(number=1, count=2, names=["c"], total=3) | second)
    with pytest.raises(InputError, match=words):
        gguf_file.read(first)


@pytest.mark.parametrize(
    "name", ["m-00001-of-00000.gguf", "m-00000-of-00001.gguf", "m-٠٠٠٠١-of-٠٠٠٠٢.gguf", "-1-of-2.gguf"]
)
def test_a_name_that_is_not_of_a_set_is_a_file_of_its_own(tmp_path, name):
    with gguf_file.read(file_of(tmp_path / name, infos=[info("t", [32])], data=128)) as file:
        assert [t.name for t in file.tensors] == ["t"]


def test_a_set_of_99999_shards_of_which_one_is_there(tmp_path):
    path = shard(tmp_path / "m-00001-of-99999.gguf", 0, 99999, ["a"])
    with pytest.raises(InputError, match="m-00002-of-99999.gguf: shard 2 of 99999 is missing"):
        gguf_file.read(path)


def test_more_shards_than_files_may_be_open(tmp_path):
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = [f"m-{i + 1:05}-of-00064.gguf" for i in range(64)]
    for i, name in enumerate(names):
        shard(tmp_path / name, i, 64, [f"t{i}"], total=64)
    inside = len(os.listdir("/dev/fd")) + 30
    resource.setrlimit(resource.RLIMIT_NOFILE, (inside, hard))
    try:
        with pytest.raises(EnvironmentFailed, match="cannot be opened beside .* other shards .*ulimit -n"):
            gguf_file.read(tmp_path / names[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "pipe.gguf", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            gguf_file.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        gguf_file.read(tmp_path / ("x" * 5000))
    with pytest.raises(InputError, match="cannot be read"):
        gguf_file.read("a\0b")


def test_a_file_that_shrinks_while_its_header_is_read_is_refused(tmp_path, monkeypatch):
    path = file_of(tmp_path / "m.gguf", [kv("a", 8, string("text"))])
    stat = os.stat(path)
    os.truncate(path, 47)
    monkeypatch.setattr(gguf_file.os, "fstat", lambda _: stat)
    with pytest.raises(InputError, match="became shorter inside metadata 'a'"):
        gguf_file.read(path)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1), (1, 5), (7, 1)])
def test_tensors_of_odd_shapes_are_read(tmp_path, shape):
    path = file_of(tmp_path / "m.gguf", infos=[info("t", shape[::-1])], data=128)
    with gguf_file.read(path) as file:
        (tensor,) = file.tensors
        assert (tensor.shape, tensor.n_rows * tensor.n_cols) == (shape, tensor.n_weights)
        assert file.read_rows(tensor, 0, tensor.n_rows).size == 4 * tensor.n_weights


def test_metadata_is_given_as_the_kind_that_is_due_or_not_at_all(tmp_path):
    values = {
        "s": Value.of("text"),
        "n": Value.of(7),
        "ns": Value.of(np.arange(3)),
        "none": Value(9, struct.pack("<IQ", 6, 0)),
    }
    (tmp_path / "m.gguf").write_bytes(gguf_file.header(values, []))
    with gguf_file.read(tmp_path / "m.gguf") as file:
        assert (
            file.get("s", str, "") == "text"
            and file.get("n", int, 0) == 7
            and file.get("ns", list[int], []) == [0, 1, 2]
        )
        assert file.get("none", list[str], ["x"]) == [] and file.get("absent", int, 5) == 5
        for key, kind, words in (
            ("n", str, "'n' is of type u32 where a string is due"),
            ("s", int, "'s' is of type string where a whole number is due"),
            ("ns", list[str], "'ns' is an array of 3 of type u32 where an array of strings is due"),
            ("s", list[int], "'s' is of type string where an array of whole numbers is due"),
        ):
            with pytest.raises(InputError, match=f"m.gguf: metadata {words}"):
                file.get(key, kind, None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_an_atomic_file_leaves_nothing_behind_when_its_block_fails(tmp_path, error):
    with pytest.raises(error):
        with gguf_file.atomic(tmp_path / "m.gguf", 0) as file:
            file.write(b"GGUF")
            file.flush()
            assert len(list(tmp_path.iterdir())) == 1
            raise error
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_file_that_does_not_read_back_is_not_kept(tmp_path):
    head = gguf_file.header({}, [("t", (32,), F32)])
    for wrong in (b"GGUF", head + bytes(96), head + bytes(160)):
        with pytest.raises(EnvironmentFailed, match="does not read back"):
            with gguf_file.atomic(tmp_path / "m.gguf", 0) as file:
                file.write(wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_beforehand(tmp_path):
    with pytest.raises(EnvironmentFailed, match="are needed and .* are free"):
        with gguf_file.atomic(tmp_path / "m.gguf", 1 << 62):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_read_from_its_parts(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(files):
        path.write_bytes(bytes(range(100 * number, 100 * number + 100)))
    parts = tuple(gguf_file.Part(path, at, 24) for path, at in ((files[0], 10), (files[1], 0), (files[0], 70)))
    rows = [[*range(10, 34)], [*range(100, 124)], [*range(70, 94)]]
    path = file_of(tmp_path / "m.gguf", infos=[info("t", [12, 3], F16)], data=0)  # with a hole for the tensor
    with gguf_file.read(path, data=False) as file:
        tensor = gguf_file.replace(file.tensors[0], parts=parts)
        with gguf_file.replace(file, tensors=[tensor], growing=lambda: True) as placed:
            assert placed.read_rows(tensor, 0, 3).tolist() == rows
            assert placed.read_rows(tensor, 1, 2).tolist() == rows[1:]
            assert placed._read(tensor, 20, 10).tolist() == sum(rows, [])[20:30]
            assert b"".join(placed.pieces(tensor)) == bytes(sum(rows, []))
            os.truncate(files[1], 10)  # and nobody writes the rest
            with pytest.raises(InputError, match="b: the file ends inside tensor 't'"):
                placed.read_rows(tensor, 1, 1)
