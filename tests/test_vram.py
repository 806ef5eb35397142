# SPDX-License-Identifier: MIT
"""What a calibration takes of a GPU's memory, on a CPU that passes for one."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from test_calibrate import checkpoint, entries, tokens  # noqa: F401 (a fixture)

from gguf_splitq import convert, errors, options
from gguf_splitq.calibration import fisher, memory, model, moments
from gguf_splitq.calibration.model import Model, OnDisk, Room


@pytest.fixture
def gpu(monkeypatch):
    """Bytes of a GPU that all tensors seem to be on."""
    found = SimpleNamespace(free=1000, own=0, total=1000)
    monkeypatch.setattr(model, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(model, "_gpu_memory", lambda device: (found.free, found.own, found.total))
    monkeypatch.setattr(model, "_pinned", torch.clone)
    return found


@pytest.mark.parametrize(
    ("vram", "ram", "others", "gpu_has", "memory_has"),
    [(None, 250, 0, 4, 2), (700, 0, 0, 3, 0), (None, 0, 0, 4, 0), (700, 0, 300, 3, 0), (None, 0, 300, 1, 0)],
)
def test_hidden_states_are_where_there_is_room(gpu, tmp_path, vram, ram, others, gpu_has, memory_has):
    gpu.free -= others
    room = Room(vram, ram)
    states, given = OnDisk(tmp_path, room), [torch.randint(256, (100,), dtype=torch.uint8) for _ in range(9)]
    for tensor in given:
        states.append(tensor)
        gpu.own = 100 * sum(kept.data_ptr() == given[i].data_ptr() for i, kept in states.kept.items())
        gpu.free = 1000 - gpu.own - others
    own = [kept.data_ptr() == given[i].data_ptr() for i, kept in states.kept.items()]
    assert (own.count(True), own.count(False)) == (gpu_has, memory_has)
    assert all(map(torch.equal, states, given))
    for i in range(9):
        states[i] = given[8 - i]
    assert all(map(torch.equal, states, given[::-1]))


def test_memory_that_hidden_states_leave_is_taken_again(gpu, tmp_path):
    gpu.free, room = 0, Room(None, 150)
    for _ in range(3):
        states = OnDisk(tmp_path, room)
        states.append(torch.zeros(100, dtype=torch.uint8))
        states.append(torch.zeros(100, dtype=torch.uint8))
        assert list(states.kept) == [0]
        del states


def limited(work, most, calls, at=0):
    """The same, for so many sequences at most in its argument `at`."""

    def called(*args):
        calls.append(len(args[at]))
        if len(args[at]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args)

    return called


def test_what_a_gpu_has_no_room_for_is_run_in_smaller_parts():
    said, calls = [], []
    cuda = SimpleNamespace(at_once=8, room=Room(say=said.append))
    batch, other = torch.arange(7)[:, None], torch.arange(7)[:, None] * 10
    for _ in range(2):
        found = fisher.each_part(cuda, None, limited(torch.add, 2, calls), batch, other)
        assert torch.equal(torch.cat(found), batch + other)
    assert calls == [7, 4, *[2, 2, 2, 1] * 2] and len(said) == 1 and "fewer sequences" in said[0]
    with pytest.raises(torch.OutOfMemoryError):
        fisher.each_part(cuda, None, limited(torch.add, 0, calls), batch, other)
    assert cuda.at_once == 1 and len(said) == 1


def test_the_sums_are_those_of_smaller_parts(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    text, hessians, calls = tokens(6), [], []
    for most in (8, 2):
        tiny = Model(checkpoint("llama"))
        tiny.at_once = 8
        with monkeypatch.context() as patch:
            patch.setattr(fisher, "_through", limited(fisher._through, most, calls, 4))
            every = [(i, layer) for i, layers in moments.run(tiny, text, tmp_path) for layer in layers]
        hessians.append({(i, layer.name): layer.hessian for i, layer in every if layer.hessian is not None})
    assert calls[:2] == [6, 6] and calls[-3:] == [2, 2, 2] and hessians[0]
    for key, hessian in hessians[0].items():
        torch.testing.assert_close(hessians[1][key], hessian, rtol=1e-4, atol=1e-8)


def test_the_next_layer_is_read_while_one_runs(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model, "_pinned", torch.clone)
    text, found, read = tokens(2), [], []
    for ahead in (False, True):
        tiny = Model(checkpoint("qwen3moe"))
        with ThreadPoolExecutor(1) as reader:
            tiny.reader = reader if ahead else None
            in_memory = tiny._in_memory
            monkeypatch.setattr(tiny, "_in_memory", lambda names, do=in_memory: read.append(1) or do(names))
            every = [(i, layer) for i, layers in moments.run(tiny, text, tmp_path) for layer in layers]
        found.append({(i, layer.name): layer.hessian for i, layer in every if layer.hessian is not None})
    assert len(read) == 2  # the second of two layers on the way forward, the first on the way back
    assert found[0] and all(torch.equal(hessian, found[1][key]) for key, hessian in found[0].items())


def test_products_are_in_tf32_where_inputs_have_no_more_bits():
    before = torch.get_float32_matmul_precision()
    for device, dtype, inside in (
        ("cuda", torch.bfloat16, "high"),
        ("cuda", torch.float32, before),
        ("cpu", torch.bfloat16, before),
    ):
        with pytest.raises(ZeroDivisionError), moments.tensor_cores(torch.device(device), dtype):
            assert torch.get_float32_matmul_precision() == inside
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before


# What is stated


def test_the_estimate_follows_what_is_on_the_gpu():
    one, two = (memory.on_gpu(entries(*[()] * n), 16) for n in (1, 2))
    assert one == two < memory.on_gpu(entries(()), 32) < memory.on_gpu(entries((), (8,)), 32)
    plain, several = (memory.peak(entries(()), 2048, 1, several=several) for several in (False, True))
    assert several == plain + 3 * 4 * (4 * 1024**2 + 3 * 1024 * 2816)  # rows go to other processes
    assert one > 2 * 4 * (4 * 1024**2 + 3 * 1024 * 2816) + 8 * (6 * 1024**2 + 2816**2)


def test_what_is_needed_is_stated_and_less_is_refused(checkpoint, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(options, "check_device", lambda device: "cuda")
    monkeypatch.setattr(convert, "calibrate", lambda job, *_: 1 / 0)
    given = dict(type="sq4", calib="self", outfile=tmp_path / "out.gguf")
    with pytest.raises(ZeroDivisionError):
        convert.convert(checkpoint("llama"), **given)
    assert "and of a GPU's by estimate" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(errors.UsageError, match="--max-vram 20.0 MiB is too small: .*--device cpu"):
        convert.convert(checkpoint("llama"), **given, max_vram="20M")
    with pytest.raises(errors.UsageError, match="--max-vram 'much' is not a size"):
        convert.convert(checkpoint("llama"), **given, max_vram="much")
    assert list(tmp_path.iterdir()) == []
