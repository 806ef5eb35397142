# SPDX-License-Identifier: MIT
"""The container: the same data behind a header that others take, read as what it stands for, and hostile keys."""

import struct

import crafted
import gguf
import numpy as np
import ollama
import pytest
from test_claq import random_side

from gguf_splitq import cli, inspection, types
from gguf_splitq.convert import convert
from gguf_splitq.dequantize import dequantize
from gguf_splitq.errors import InputError, UnsupportedError, UsageError
from gguf_splitq.files import container, gguf_file
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.repack import repack
from gguf_splitq.types import columns

OURS = [*types.CUSTOM, *types.COLUMNS]


def encoded(kind, stack):
    """A weight of that type, [*stack, 20, 256], and its side tensor: (name, shape, type id, bytes) of each."""
    rng, shape = np.random.default_rng(1), (*stack, 20, 256)
    name = f"blk.0.{kind.name}{'_exps' if stack else ''}.weight"
    if kind in types.CUSTOM:
        return [(name, shape, kind.gguf_id, kind.encode_numpy(crafted.weights(*shape).reshape(-1, 256)).tobytes())]
    is_cq = kind.name.startswith("cq")
    layout = columns.Layout(int(kind.code_bits < kind.wide_bits), 9 if is_cq else 0)
    pairs = []
    for _ in range(int(np.prod(stack))):
        d = None if is_cq else rng.integers(0, 64, (20, 8)).astype(np.uint8)
        codes = rng.integers(0, 4, (20, 256)).astype(np.uint8)
        pairs.append(kind.pack(codes, random_side(kind, layout, rng, 20, 256), layout, d))
    rows, sides = (b"".join(part.tobytes() for part in parts) for parts in zip(*pairs, strict=True))
    side = (columns.side_name(name), (*stack, len(pairs[0][1])), columns.SIDE_TYPE, sides)
    return [(name, shape, kind.gguf_id, rows), side]


def write(path, kv, tensors, contained=False):
    head = gguf_file.header(kv, [tensor[:3] for tensor in tensors], contained)
    path.write_bytes(head + b"".join(data.ljust(gguf_file.padded(len(data)), b"\0") for *_, data in tensors))
    return path


KV = {
    "general.architecture": Value.of("llama"),
    "general.name": Value.of("All types"),
    "llama.block_count": Value.of(1),
    "tokenizer.ggml.tokens": Value.of(["<unk>", "ä", "b\n" * 50] * 10_000),
    "general.file_type": Value.of(100),
    "gguf_splitq.type": Value.of("sq4"),
}


@pytest.fixture(scope="module", params=["matrices", "experts"])
def pair(request, tmp_path_factory):
    """(a file with every type's own id, the same as a container)."""
    folder, stack = tmp_path_factory.mktemp("pair"), (2,) if request.param == "experts" else ()
    norm = ("output_norm.weight", (5,), 0, crafted.weights(5).tobytes())
    tensors = [norm, *(tensor for kind in OURS for tensor in encoded(kind, stack))]
    native = write(folder / "native.gguf", KV, tensors)
    return native, repack(native, True, folder / "container.gguf")


def test_others_take_the_container_and_refuse_native_ids(pair):
    native, packed = pair
    with pytest.raises(ollama.Refused, match="blk.0.sq4.*size overflow"):
        ollama.Header(native.read_bytes())
    found = ollama.Header(packed.read_bytes())
    assert max(found.position[key] for key in container.KEYS) < 1 << 20 < len(packed.read_bytes())
    assert {type_id for *_, type_id in found.tensors} == {0, 24}
    reader = gguf.GGUFReader(packed)
    assert [t.name for t in reader.tensors] == [name for name, *_ in found.tensors]
    named = reader.fields["gguf_splitq.container.tensors"].contents()
    assert len(named) == len(OURS) and not any(name.endswith("columns") for name in named)
    assert reader.fields["gguf_splitq.container.types"].contents() == [kind.gguf_id for kind in OURS]
    assert reader.fields["gguf_splitq.container.version"].contents() == 1


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.name)
def test_each_type_alone_is_taken(tmp_path, kind):
    for number, stack in enumerate(((), (2,))):
        tensors = encoded(kind, stack)
        native = write(tmp_path / f"native{number}.gguf", KV, tensors)
        with pytest.raises(ollama.Refused, match="size overflow"):
            ollama.Header(native.read_bytes())
        (name, ne, type_id), *_ = ollama.Header(repack(native, True, tmp_path / f"{number}.gguf").read_bytes()).tensors
        assert (name, type_id) == (tensors[0][0], 24) and np.prod(ne) == len(tensors[0][3])


def test_both_forms_are_one_file(pair, tmp_path):
    native, packed = pair
    with gguf_file.read(native) as one, gguf_file.read(packed) as other:
        assert one.infos == other.infos and one.kv == other.kv and list(one.kv) == list(other.kv)
        assert (one.contained, other.contained) == (False, True)
        for a, b in zip(one.tensors, other.tensors, strict=True):
            assert one.read_rows(a, 0, a.n_rows).tobytes() == other.read_rows(b, 0, b.n_rows).tobytes()
    keys = list(ollama.Header(packed.read_bytes()).keys)
    assert keys[:5] == ["general.architecture", "general.name", *container.KEYS]
    assert repack(packed, False, tmp_path / "again.gguf").read_bytes() == native.read_bytes()
    assert repack(packed, True, tmp_path / "same.gguf").read_bytes() == packed.read_bytes()


def test_the_data_section_is_the_same(pair):
    native, packed = pair
    with gguf_file.read(native) as one, gguf_file.read(packed) as other:
        starts = one.tensors[0].offset, other.tensors[0].offset
    assert native.read_bytes()[starts[0] :] == packed.read_bytes()[starts[1] :]


def test_inspect_and_dequantize_see_the_types(pair, tmp_path, capsys):
    found = [inspection.inspect(path) for path in pair]
    assert found[0]["types"] == found[1]["types"] and found[0]["metadata"] == found[1]["metadata"]
    assert [result["container"] for result in found] == [False, True]
    assert capsys.readouterr().out.count("any GGUF reader takes it") == 1
    back = [dequantize(path, tmp_path / f"{path.name}-f16.gguf", threads=1) for path in pair]
    assert back[0].read_bytes() == back[1].read_bytes()


def test_convert_writes_either_form(tmp_path):
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(experts=2))
    rules = ["ffn_up=sdr4", "attn_k=sq3"]
    made = [
        convert(model, "sq4", tmp_path / f"{form}.gguf", tensor_type=rules, container=form, threads=2)
        for form in (False, True)
    ]
    assert repack(made[0], True, tmp_path / "packed.gguf").read_bytes() == made[1].read_bytes()
    assert repack(made[1], False, tmp_path / "unpacked.gguf").read_bytes() == made[0].read_bytes()
    stock = [convert(model, "q8_0", tmp_path / f"q-{form}.gguf", container=form, threads=2) for form in (False, True)]
    assert stock[0].read_bytes() == stock[1].read_bytes()
    assert not any(key.startswith("gguf_splitq.container") for key in crafted.read_gguf(stock[1])[0])


def test_convert_copies_what_is_in_a_container(tmp_path):
    tensors = crafted.llama_tensors()
    rules = ["ffn=f16", "attn_[qv]=f16", "output=f16"]
    model = crafted.write_gguf(tmp_path / "m.gguf", tensors)
    part = convert(model, "sq4", tmp_path / "part.gguf", tensor_type=rules, container=True, threads=2)
    again = convert(part, "q8_0", tmp_path / "again.gguf", container=True, threads=2)
    with gguf_file.read(part) as one, gguf_file.read(again) as other:
        kinds = [{t.name: gguf_file.type_name(t.type_id) for t in file.tensors} for file in (one, other)]
        assert kinds[0]["blk.0.attn_k.weight"] == kinds[1]["blk.0.attn_k.weight"] == "sq4"
        assert (kinds[0]["blk.0.ffn_up.weight"], kinds[1]["blk.0.ffn_up.weight"]) == ("f16", "q8_0")
        assert other.contained


def test_a_tensor_that_is_widened_is_not_listed(tmp_path, monkeypatch):
    """Its name goes from the header, so all the data move."""
    monkeypatch.setattr(gguf_file, "PIECE", 1000)
    tensors = crafted.llama_tensors()
    for number in range(2):
        tensors[f"blk.{number}.attn_v.weight"][3, 7] = 100  # beyond sq4's reach
    model = crafted.write_gguf(tmp_path / "m.gguf", tensors, "F32")
    made = [convert(model, "sq4", tmp_path / f"{form}.gguf", container=form, threads=2) for form in (False, True)]
    named = ollama.Header(made[1].read_bytes()).keys["gguf_splitq.container.tensors"]
    assert "blk.0.attn_v.weight" not in named and "blk.0.attn_q.weight" in named
    assert repack(made[0], True, tmp_path / "packed.gguf").read_bytes() == made[1].read_bytes()


def test_a_listed_tensor_may_have_its_own_type(tmp_path):
    tensors = encoded(types.get("sq4"), ()) + encoded(types.get("sq3"), ())
    infos = [tensor[:3] for tensor in tensors]
    kv, packed = container.pack(KV, infos)
    mixed = [infos[0], packed[1]]  # one tensor has its own id
    for tensors_now in (infos, mixed):
        rows = [(*info, data) for info, (*_, data) in zip(tensors_now, tensors, strict=True)]
        with gguf_file.read(write(tmp_path / "copy.gguf", kv, rows)) as file:
            assert file.infos == infos and file.kv == KV


def test_shards_take_the_keys_of_the_first(tmp_path):
    tensors = encoded(types.get("sq4"), ()) + encoded(types.get("cq3"), ())
    infos = [tensor[:3] for tensor in tensors]
    kv, packed = container.pack(KV, infos)
    rows = [(*info, data) for info, (*_, data) in zip(packed, tensors, strict=True)]
    split = [{f"split.{k}": Value.of(v) for k, v in {"no": i, "count": 2, "tensors.count": 3}.items()} for i in (0, 1)]
    first = write(tmp_path / "m-00001-of-00002.gguf", kv | split[0], rows[:1])
    write(tmp_path / "m-00002-of-00002.gguf", split[1], rows[1:])
    with gguf_file.read(first) as file:
        assert file.infos == infos and file.contained
    whole = write(tmp_path / "whole.gguf", KV, tensors)
    assert repack(first, False, tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_another_alignment_becomes_ours(tmp_path):
    tensors = encoded(types.get("sq4"), ())
    for alignment in (32, 64):
        kv = KV | {"general.alignment": Value.of(alignment)}
        head = gguf_file.header(kv, [tensor[:3] for tensor in tensors])
        head = head.ljust(gguf_file.padded(len(head), alignment), b"\0")
        (tmp_path / "m.gguf").write_bytes(head + tensors[0][3].ljust(gguf_file.padded(len(tensors[0][3]), 64), b"\0"))
        with gguf_file.read(repack(tmp_path / "m.gguf", True, tmp_path / "out.gguf", overwrite=True)) as file:
            assert file.kv == (KV if alignment == 64 else kv)
            assert file.read_rows(file.tensors[0], 0, 20).tobytes() == tensors[0][3]


NAME = "blk.0.sq4.weight"
INFOS = [(NAME, (4, 64), 100), ("b", (4, 64), 101), ("norm", (34,), 0)]


def hostile(path, names=(NAME, "b"), ids=(100, 101), version=1, infos=None, **more):
    """A container of two tensors with these keys instead of the right ones."""
    kv, packed = container.pack({}, INFOS)
    version = version if isinstance(version, Value) else Value.of(version)
    kv |= {container.VERSION_KEY: version, container.TENSORS_KEY: Value.of(list(names))}
    kv |= {container.TYPES_KEY: Value.of(np.array(ids))}
    kv |= {f"gguf_splitq.container.{key}": value for key, value in more.items()}
    infos = infos or packed
    data = b"".join(bytes(gguf_file.padded(gguf_file.n_bytes(shape, type_id))) for _, shape, type_id in infos)
    path.write_bytes(gguf_file.header({k: v for k, v in kv.items() if v is not None}, infos) + data)
    return path


HOSTILE = {
    "too few types": (dict(ids=(100,)), "names 2 tensors and 1 types"),
    "no types": (dict(types=None), "names 2 tensors and 0 types"),
    "no names": (dict(tensors=None), "names 0 tensors and 2 types"),
    "a stock type": (dict(ids=(100, 2)), "'b' .* is said to be of type 2, which is none of 100 to 119"),
    "an id beyond ours": (dict(ids=(120, 101)), "'blk.0.sq4.weight' .* is said to be of type 120"),
    "another type": (dict(ids=(100, 105)), "'b' .* has rows of 26 bytes, no blocks of cq4's 16"),
    "a tensor of floats": (dict(names=("norm", "b")), "'norm' .* is stored as type 0 where 24"),
    "listed twice": (dict(names=("b", "b"), ids=(101, 101)), "'b' .* is listed twice"),
    "an unknown name": (dict(names=(NAME, "c")), "'c' .* is not there"),
    "a name to obey": (dict(names=(NAME, "\x1b[2J")), r"x1b\[2J' .* is not there"),
    "names as numbers": (dict(tensors=Value.of(np.arange(2))), "container.tensors' is an array of 2 of type u32"),
    "types as strings": (dict(types=Value.of(["100", "101"])), "container.types' is an array of 2 of type string"),
    "a name alone": (dict(tensors=Value.of(NAME)), "container.tensors' is of type string where an array"),
    "a version in words": (dict(version=Value.of("1")), "container.version' is of type string"),
    "types that are negative": (
        dict(types=Value(9, struct.pack("<IQii", 5, 2, -100, 101))),
        "is said to be of type -100",
    ),
    "a stored type that is another of ours": (
        dict(infos=[(NAME, (4, 34), 24), ("b", (4, 64), 104), INFOS[2]]),
        "'b' .* is stored as type 104",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_keys_are_refused_by_name(tmp_path, case):
    parts, words = HOSTILE[case]
    path = hostile(tmp_path / "m.gguf", **parts)
    with pytest.raises(InputError, match=f"m.gguf: .*{words}"):
        gguf_file.read(path)
    with gguf_file.read(hostile(path)) as file:
        assert file.infos == INFOS


@pytest.mark.parametrize("version", [0, 2, None])
def test_rules_of_another_version_are_not_guessed(tmp_path, version):
    path = hostile(tmp_path / "m.gguf", version=1 if version is None else version)
    if version is None:  # the key is missing
        path.write_bytes(path.read_bytes().replace(b"container.version", b"container.another"))
    with pytest.raises(UnsupportedError, match="m.gguf: its container is of version"):
        gguf_file.read(path)


def test_a_container_cut_anywhere_is_refused(tmp_path):
    data = hostile(tmp_path / "whole.gguf").read_bytes()
    with gguf_file.read(tmp_path / "whole.gguf") as file:
        end = file.tensors[-1].offset + file.tensors[-1].n_bytes
    for length in range(end):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(InputError):
            gguf_file.read(tmp_path / "cut.gguf")


def test_the_command_and_its_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    native = write(tmp_path / "m-sq4.gguf", KV, encoded(types.get("sq4"), ()))
    assert cli.main(["repack", "m-sq4.gguf", "--container"]) == 0
    assert cli.main(["repack", "m-sq4-container.gguf", "--native-ids"]) == 0
    assert (tmp_path / "m-sq4-native.gguf").read_bytes() == native.read_bytes()
    for form in ("--container", "--native-ids"):
        assert cli.main(["repack", "m-sq4.gguf", form]) == 2
        assert "already a file" in capsys.readouterr().err
        assert cli.main(["repack", "m-sq4.gguf", form, "--outfile", "./m-sq4.gguf", "--overwrite"]) == 2
        assert "its own input" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["repack", "m-sq4.gguf"])
    floats = crafted.write_gguf(tmp_path / "f.gguf", {"a.weight": crafted.weights(2, 32)})
    with pytest.raises(UsageError, match="f.gguf: no tensor has a type of this project"):
        repack(floats, True, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_memory_does_not_grow_with_a_row(tmp_path, monkeypatch):
    """A side tensor is one row, whatever its size; pieces are bounded."""
    monkeypatch.setattr(gguf_file, "PIECE", 64)
    native = write(tmp_path / "m.gguf", KV, encoded(types.get("cq3"), ()))
    with gguf_file.read(native) as file:
        size, pieces = gguf_file.stream(file, False)
        head, *rest = map(bytes, pieces)
        assert max(map(len, rest)) == 64 and size == len(head) + sum(map(len, rest))
        assert head + b"".join(rest) == native.read_bytes()
