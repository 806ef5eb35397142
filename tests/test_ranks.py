# SPDX-License-Identifier: MIT
"""Several processes under torchrun: the result of one, its journal, a process that dies; rows dealt out and joined."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crafted
import numpy as np
import pytest
import torch

from gguf_splitq import convert, errors, plan, rewrite
from gguf_splitq.calibration import moments, pieces, ranks, solve
from gguf_splitq.coding import solver
from gguf_splitq.files import gguf_file
from gguf_splitq.types.columns import PLAIN

TOKENS = 24 * 512  # three batches: two for the first process, one for the other
ROOT = Path(__file__).parents[1]


def launched(folder, *options, count=2, **started):
    """`convert` in so many processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"]
    command += ["gguf_splitq", "convert", folder, "--threads", count, *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=env, **started)


def ended(child):
    """What it said, when it has ended well."""
    said = child.communicate()[1]
    assert child.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(runtime_library, tmp_path_factory):
    """(checkpoint, options, {aim: what one process writes and reports})."""
    folder = tmp_path_factory.mktemp("ranks")
    model = crafted.hf_folder(folder / "tiny", "mixtral", max_position_embeddings=512, bos_token_id=1)
    options, made = dict(calib=str(crafted.DEMO / "calib.txt"), calib_tokens=TOKENS, threads=1, calib_dtype="f32"), {}
    for aim in ("half", "plain"):
        out = convert.convert(model, "sq4", folder / f"{aim}.gguf", aim=aim, report=folder / aim, **options)
        made[aim] = crafted.read_gguf(out)[1], json.loads((folder / aim).read_text())["calibration"]
    return model, options, made


def given(options, outfile, aim="half"):
    chosen = ["--type", "sq4", "--calib", options["calib"], "--calib-tokens", TOKENS, "--calib-dtype", "f32"]
    return [*chosen, "--aim", aim, "--outfile", outfile, "--report", outfile.with_suffix(".json")]


def nearly(found, expected, kind="SQ4"):
    """Tensors of two files: at least 98 % of a quantized one's bytes, all of others."""
    assert found.keys() == expected.keys()
    for name, (type, data) in expected.items():
        assert found[name][0] == type
        same = np.mean(np.asarray(found[name][1]) == np.asarray(data))
        assert same == 1 or kind in type and same > 0.98, (name, same)


@pytest.mark.parametrize("aim", ["half", "plain"])
def test_two_processes_give_what_one_does(whole, tmp_path, aim):
    model, options, made = whole
    tensors, report = made[aim]
    said = ended(launched(model, *given(options, tmp_path / "out.gguf", aim)))
    assert len(re.findall("^writing ", said, re.MULTILINE)) == 1  # one of them speaks
    nearly(crafted.read_gguf(tmp_path / "out.gguf")[1], tensors)
    found = json.loads((tmp_path / "out.json").read_text())["calibration"]
    assert found["left"] == report["left"] == [] and found["pooled"] == report["pooled"]
    for name, stages in report["errors"].items():
        assert found["errors"][name] == pytest.approx(stages, rel=0.01)
    what = "divergence" if aim == "half" else "held_out"
    assert found[what] == pytest.approx(report[what], rel=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "out.json"}


def test_kept_hessians_are_solved_by_all(whole, tmp_path):
    model, options, made = whole
    hessians = tmp_path / "hessians.gguf"
    convert.convert(model, "sq3", tmp_path / "one.gguf", aim="plain", hessians=hessians, **options)
    ended(launched(model, *given(options, tmp_path / "out.gguf", "plain"), "--hessians", hessians))
    nearly(crafted.read_gguf(tmp_path / "out.gguf")[1], made["plain"][0])


def test_two_processes_draw_and_train_as_one(tmp_path):
    """Text of the model itself, to calibrate on and to train on."""
    model = crafted.hf_folder(tmp_path / "tiny", max_position_embeddings=512, bos_token_id=1)
    chosen = ["--calib", "self", "--calib-tokens", 4096, "--calib-dtype", "f32", "--tune", "codes", "--tune-steps", 5]
    reports = []
    for count in (1, 2):
        out = tmp_path / f"{count}.gguf"
        given = ["--type", "sq2", *chosen, "--outfile", out, "--report", out.with_suffix(".json")]
        said = ended(launched(model, *given, count=count))
        assert len(re.findall("^tuning: 5 of 5", said, re.MULTILINE)) == 1
        reports.append(json.loads(out.with_suffix(".json").read_text())["calibration"]["tuned"])
    one, two = reports
    assert one["tokens"] == two["tokens"] > 4096 and one["after"] < one["before"]
    assert two["after"] == pytest.approx(one["after"], rel=0.01)
    nearly(*(crafted.read_gguf(tmp_path / f"{count}.gguf")[1] for count in (2, 1)), kind="SQ2")


# Trains what the first process has, a file and rows, on the same text as any number of processes, and stores it there.
TRAINER = """
import sys
from pathlib import Path
import numpy as np
import torch
from gguf_splitq import plan
from gguf_splitq.calibration import ranks, tune
from gguf_splitq.calibration.model import Model
from gguf_splitq.files import gguf_file
from gguf_splitq.rewrite import read_float32
folder, path, out = map(Path, sys.argv[1:])
tune.CODE_RATES = {99.0: 0.05}
tokens = torch.randint(3, 4000, (21, 512), generator=torch.Generator().manual_seed(0))
with ranks.together() as processes, gguf_file.read(path) as file:
    entries = [e for e in plan.make(file.tensors, "sq2") if e.quantized and e.name.startswith("blk.")]
    entries = [e for e in entries if e.name != "blk.1.ffn_up.weight"]
    given = {e.name: e.coder.encode(read_float32(file, e.tensor, 0, e.tensor.n_rows)) for e in entries[1:]}
    given = None if processes.rank else tune.Given(file, entries, given)
    text = tokens[:18], tokens[18:]
    rows, report = tune.run(lambda: Model(folder), given, *text, "codes", 5, out.parent, 1, ranks=processes)
    if not processes.rank:
        np.savez(out, before=report["before"], after=report["after"], changed=report["changed"], **rows)
    else:
        assert rows == {} and processes.first(int) is None
"""


def test_steps_are_those_of_one_process_but_for_rounding(runtime_library, tmp_path):
    """Three batches, of which two processes have four places each, or three have 3, 3 and 2; one is not full."""
    model = crafted.hf_folder(tmp_path / "tiny", max_position_embeddings=512, bos_token_id=1)
    file = convert.convert(model, "bf16", tmp_path / "tiny.gguf", threads=1)
    script, found = tmp_path / "trainer.py", []
    script.write_text(TRAINER)
    for count in (1, 2, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += map(str, (script, model, file, tmp_path / f"{count}.npz"))
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        found.append(dict(np.load(tmp_path / f"{count}.npz")))
    one, *others = found
    assert one["after"] < one["before"] and one["changed"] > 0.01 and len(one) > 15
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            if "." not in name:
                assert other[name] == pytest.approx(value, rel=1e-4)
            elif "norm" in name:
                np.testing.assert_allclose(other[name].view(np.float32), value.view(np.float32), rtol=1e-4)
            else:
                assert np.mean(other[name] == value) > 0.999


def test_without_a_calibration_the_first_does_all(tmp_path):
    model = crafted.hf_folder(tmp_path / "tiny")
    said = ended(launched(model, "--type", "q4_0", "--outfile", tmp_path / "two.gguf"))
    assert len(re.findall("^writing ", said, re.MULTILINE)) == 1
    convert.convert(model, "q4_0", tmp_path / "one.gguf", threads=1)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_wrong_options_are_told_once(tmp_path):
    child = launched(tmp_path, "--type", "sq5", "--outfile", tmp_path / "out.gguf")
    said = child.communicate()[1]
    assert child.returncode and len(re.findall("^gguf-splitq: ", said, re.MULTILINE)) == 1 and "sq5" in said


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in Linux's /proc")
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_process_that_dies_ends_the_run_and_it_goes_on(whole, tmp_path, victim):
    model, options, made = whole
    child = launched(model, *given(options, tmp_path / "out.gguf"), start_new_session=True)
    kept = tmp_path / ".out.gguf.unfinished"
    while child.poll() is None and not (kept / "layer-00000.safetensors").exists():
        time.sleep(0.01)
    [number] = [n for n in children(child.pid) if f"RANK={victim}" in environment(n)]
    os.kill(number, signal.SIGKILL)
    said = child.communicate(timeout=60)[1]
    assert child.returncode > 0 and not (tmp_path / "out.gguf").exists()
    spoken = re.findall("^gguf-splitq: .*", said, re.MULTILINE)
    assert len(spoken) == int(victim) and f'File "{ROOT}/gguf_splitq' not in said, said
    if victim == "1":
        ended(launched(model, *given(options, tmp_path / "out.gguf")))
    else:  # one process goes on with what two have left
        convert.convert(model, "sq4", tmp_path / "out.gguf", **options)
    nearly(crafted.read_gguf(tmp_path / "out.gguf")[1], made["half"][0])
    assert not kept.exists()


def children(process):
    return map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())


def environment(process):
    return Path(f"/proc/{process}/environ").read_text().split("\0")


# Devices


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    assert ranks.own("cuda:1") == "cuda:1"
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.own("cpu") == "cpu" and ranks.own("cuda") == "cuda:1" and not ranks.speaks()
    with pytest.raises(errors.UsageError, match="--device cuda:1: under torchrun"):
        ranks.own("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(errors.UsageError, match="2 processes and PyTorch sees 1 GPUs here: give --nproc-per-node 1"):
        ranks.own("cuda")


# Shares


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_of_it_in_order(count):
    shares = []
    for rank in range(count):
        each = ranks.Alone()
        each.rank, each.count = rank, count
        shares.append(each.share("abcdef"[:5]))
    assert "".join(part for _, part in shares) == "abcde" and len(shares[0][1]) == max(len(p) for _, p in shares)
    assert all(start == sum(len(p) for _, p in shares[:i]) for i, (start, p) in enumerate(shares) if p)


class Pretended(ranks.Alone):
    """The first of some processes, which does the others' work when it gathers it."""

    def __init__(self, layers, pool, count):
        self.layers, self.pool, self.count = layers, pool, count

    def dealt(self, make):
        self.hands = make()
        return self.hands[0]

    def gathered(self, value):
        return [value, *(pieces.solve(hand, self.layers, self.pool) for hand in self.hands[1:])]


@pytest.mark.parametrize("name", ["sq4", "q4_k", "sq3w", "sq3c"])
@pytest.mark.parametrize("count", [2, 5])
def test_rows_that_are_dealt_out_become_what_they_would_alone(runtime_library, tmp_path, monkeypatch, name, count):
    monkeypatch.setattr(solver, "LEAST_ROWS", 16)
    monkeypatch.setattr(solver, "WEIGHTS", 16 * 256)
    torch.manual_seed(0)
    stacked, single = torch.randn(3, 48, 256).numpy(), torch.randn(64, 256).numpy()
    tensors = {"blk.0.ffn_up_exps.weight": stacked, "blk.0.attn_q.weight": single}
    file = gguf_file.read(crafted.write_gguf(tmp_path / "m.gguf", tensors, "F32"))
    entries = plan.make(file.tensors, name)
    layers = [moments.Layer(f"up[{i}]", torch.tensor(matrix)) for i, matrix in enumerate(stacked)]
    layers.append(moments.Layer("q", torch.tensor(single).bfloat16()))  # not the rows of the file
    x = torch.randn(1000, 256).double()
    for layer in layers:
        layer.hessian = x.T @ x / 1000
        layer.held = [(x[:50].float(), torch.ones(50))]

    def find(entry):
        return (moments.match(rows, layers) for rows in rewrite.each_matrix(file, entry.tensor))

    with ThreadPoolExecutor(2) as pool:
        one, many = (
            dict(zip((e.name for e in entries), solve._solve_all(file, entries, find, layers, some, pool), strict=True))
            for some in (ranks.Alone(), Pretended(layers, pool, count))
        )
    for entry in entries:
        stored, stages, pooled, tried = one[entry.name]
        for number, (rows, (layer, order)) in enumerate(
            zip(rewrite.each_matrix(file, entry.tensor), find(entry), strict=True)
        ):
            at = entry.name, entry.coder, entry.layout, torch.from_numpy(rows), layer, order
            first = number * len(rows)
            assert np.array_equal(stored[entry.name][first : first + len(rows)], pieces.of_rows(*at)[1].packed)
        for key, rows in stored.items():
            assert np.array_equal(many[entry.name][0][key], rows)
        assert many[entry.name][1] == pytest.approx(stages, rel=1e-4) and many[entry.name][2] == pooled
        assert many[entry.name][3] == pytest.approx(tried, rel=1e-4) and all(tried)


def test_each_gets_as_many_weights_as_any_other(monkeypatch):
    monkeypatch.setattr(solver, "LEAST_ROWS", 1)
    monkeypatch.setattr(solver, "WEIGHTS", 1)
    sizes = [(40, 8), (10, 8), (10, 8), (8, 60)]
    every = [pieces.Piece("a", i, 0, c, "sq4", PLAIN, f"{i}", torch.arange(n)) for i, (n, c) in enumerate(sizes)]
    hands = pieces.deal(every, 3)
    loads = [sum(len(piece.order) * piece.n_cols for piece in hand) for hand in hands]
    assert sum(loads) == 960 and max(loads) - min(loads) <= 2 * 60
    for i, (n, _) in enumerate(sizes):
        mine = [p for hand in hands for p in hand if p.number == i]
        assert torch.equal(torch.cat([p.order for p in mine]), torch.arange(n))
        assert all(p.first == int(p.order[0]) for p in mine)
    assert pieces.deal([], 3) == [[], [], []]
