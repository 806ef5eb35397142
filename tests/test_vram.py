# SPDX-License-Identifier: MIT
"""What a calibration takes of a GPU's memory, on a CPU that passes for one."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_calibrate import TEXT, checkpoint, entries, tokens  # noqa: F401 (a fixture)

from gguf_splitq import convert, errors, options, plan, types
from gguf_splitq.calibration import fisher, memory, model, moments, sensitivity, tune
from gguf_splitq.calibration.model import Model, OnDisk, Room
from gguf_splitq.files import gguf_file
from gguf_splitq.rewrite import read_float32


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

    def called(*args, **options):
        calls.append(len(args[at]))
        if len(args[at]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*args, **options)

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


def test_costs_are_those_of_smaller_parts_and_keep_to_the_room(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    folder, said, costs = checkpoint("mixtral"), [], []
    path = convert.convert(folder, "bf16", tmp_path / "m.gguf", threads=1)
    for most in (8, 3):
        room = Room(say=said.append)

        def model_on_gpu(*given, room, room_given=room):
            assert room is room_given
            found = Model(*given, room=room)
            found.at_once = 8
            return found

        with monkeypatch.context() as patch, gguf_file.read(path) as file:
            patch.setattr(sensitivity, "Model", model_on_gpu)
            patch.setattr(fisher, "_through", limited(fisher._through, most, [], 4))
            wanted = {t.name: [types.get("q8_0")] for t in file.tensors if t.name.startswith("blk.1.")}
            wanted = {name: kinds for name, kinds in wanted.items() if "norm" not in name}
            given = (folder, file, wanted, TEXT, 4096, 1, tmp_path, lambda *_: None)
            costs.append(sensitivity.of_checkpoint(*given, room=room))
    assert len(said) == 1 and costs[0].keys() == costs[1].keys() and costs[0]
    for name, cost in costs[0].items():
        assert costs[1][name] == pytest.approx(cost, rel=0.05)  # of experts, tokens are taken in other groups


@pytest.mark.parametrize("what", ["scales", "codes"])
def test_training_is_that_of_smaller_parts(tiny_llama, tmp_path, monkeypatch, what):
    folder, text = tiny_llama
    said, calls, reports = [], [], []
    sample = Model(folder).read_tokens(text, 12 * 512)

    def model_on_gpu():
        found = Model(folder, room=Room(say=said.append))
        found.at_once = 8
        return found

    with gguf_file.read(convert.convert(folder, "bf16", tmp_path / "m.gguf", threads=1)) as file:
        chosen = [e for e in plan.make(file.tensors, "sq2") if e.quantized and e.name.startswith("blk.")]
        rows = {e.name: e.coder.encode(read_float32(file, e.tensor, 0, e.tensor.n_rows)) for e in chosen}
        for most in (8, 3):
            with monkeypatch.context() as patch:
                patch.setattr(tune._Student, "_backward", limited(tune._Student._backward, most, calls, 3))
                given = tune.Given(file, chosen, rows), sample[:10], sample[10:], what, 3, tmp_path, 1
                reports.append(tune.run(model_on_gpu, *given)[1])
    first, second = [8, 8, 2, 2, 8, 8], [8, 4, 2, 2, 2, 2, *[2] * 4, *[2, 2], *[2] * 8]
    assert calls == first + second and len(said) == 1
    assert reports[0]["after"] < reports[0]["before"]
    for name in ("before", "after"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=0.01)


def test_fewer_sequences_are_drawn_at_a_time(checkpoint, monkeypatch):  # noqa: F811
    said, calls = [], []
    monkeypatch.setattr(model, "SAMPLED", 4)
    tiny = Model(checkpoint("llama"), room=Room(say=said.append))
    tiny.module.generate = limited(lambda prompt, **_: prompt[:, :1].expand(-1, 512), 1, calls)
    drawn = tiny.sample_tokens(4 * 512)
    assert drawn.shape == (4, 512) and calls[:2] == [4, 2] and calls[-4:] == [1] * 4 and len(said) == 1
    tiny.module.generate = limited(None, 0, calls)
    with pytest.raises(torch.OutOfMemoryError):
        tiny.sample_tokens(4 * 512)


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


def test_what_is_run_before_and_after_is_stated_too():
    some = entries((), ())
    for needed in (memory.measuring, functools.partial(memory.training, tune="codes")):
        assert needed(some, sequences=1) < needed(some) < needed(entries((), (), ()), sequences=64)
    weights = 4 * sum(e.tensor.n_weights for e in some)
    assert weights < memory.drawing(some, 32) < 2 * memory.drawing(some, 16) + 1
    assert memory.training(some, "codes") <= memory.peak(some, 2048, 1, tune="codes")


def test_training_takes_8_bytes_a_weight_and_8_b_fits_into_80_gb(runtime_library):
    shapes = {"token_embd.weight": (128256, 4096), "output.weight": (128256, 4096)}
    rows = {"q": 4096, "k": 1024, "v": 1024, "output": 4096, "gate": 14336, "up": 14336, "down": 4096}
    for name, count in rows.items():
        full = f"{'ffn' if name in ('gate', 'up', 'down') else 'attn'}_{name}.weight"
        shapes |= {f"blk.{i}.{full}": (count, 14336 if name == "down" else 4096) for i in range(32)}
    tensors = [gguf_file.Tensor(name, shape, 1, 0, 0, Path()) for name, shape in shapes.items()]
    weights = sum(t.n_weights for t in tensors[2:])
    of = {kind: plan.make(tensors, kind) for kind in ("sq2w", "q2_k", "sq2.9")}
    codes, scales = (memory.training(of["sq2w"], what) for what in ("codes", "scales"))
    assert codes - scales == 6 * weights and 8 * weights < codes < 80e9
    assert memory.training(of["q2_k"], "codes") == codes
    assert (
        memory.training(of["q2_k"], "scales") - scales == 2 * weights
    )  # which are not trained, and stand there as floats
    assert memory.training(of["sq2.9"], "codes") - codes == -4 * weights


@pytest.mark.parametrize(
    ("more", "max_vram", "what"),
    [
        (dict(type="sq4"), "20M", "calibrating this"),
        (dict(file_bpw=5, dry_run=True), "20M", "measuring what types cost"),
        (dict(type="sq2", tune="scales"), "60M", "--tune"),
    ],
)
def test_less_than_one_sequence_needs_is_refused(
    runtime_library,
    checkpoint,  # noqa: F811
    tmp_path,
    monkeypatch,
    more,
    max_vram,
    what,
):
    monkeypatch.setattr(options, "check_device", lambda device: "cuda")
    given = dict(calib=str(TEXT), outfile=tmp_path / "out.gguf", max_vram=max_vram) | more
    words = f"--max-vram .* is too small: {what} needs about [0-9.]+ MiB, one sequence at a time: give that or --device"
    with pytest.raises(errors.UsageError, match=words):
        convert.convert(checkpoint("llama"), **given)


def test_where_training_does_not_fit_layers_are_named(runtime_library, checkpoint, tmp_path, monkeypatch):  # noqa: F811
    given = dict(type="sq2", tune="codes", calib=str(TEXT), outfile=tmp_path / "out.gguf")
    words = "--max-ram 700.0 MiB is too small: --tune codes needs about [0-9.]+ MiB: give that, or --tune layers"
    with pytest.raises(errors.UsageError, match=words):
        convert.convert(checkpoint("llama"), **given, device="cpu", max_ram="700M")
    monkeypatch.setattr(options, "check_device", lambda device: "cuda")
    monkeypatch.setattr(convert, "_gpu_memory", lambda device: 20 << 20)
    words = "--tune needs about [0-9.]+ MiB of a GPU's memory, and cuda has 20.0 MiB: .*--device cpu, or --tune layers"
    with pytest.raises(errors.UsageError, match=words):
        convert.convert(checkpoint("llama"), **given)
    assert list(tmp_path.iterdir()) == []


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
