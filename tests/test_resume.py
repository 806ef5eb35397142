# SPDX-License-Identifier: MIT
"""Long calibrations: going on after a kill, refusing changed settings, Hessians kept for another type."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gguf_splitq import convert, errors
from gguf_splitq.calibration.journal import Journal
from gguf_splitq.files import checkpoint

TOKENS = 2048


def run(folder, text, outfile, **options):
    return convert.convert(folder, "sq4", outfile=outfile, calib=str(text), calib_tokens=TOKENS, threads=1, **options)


@pytest.fixture(scope="module")
def whole(runtime_library, tiny_llama, tmp_path_factory):
    """(checkpoint, text, what an uninterrupted run writes)."""
    folder, text = tiny_llama
    return folder, text, run(folder, text, tmp_path_factory.mktemp("whole") / "out.gguf").read_bytes()


@pytest.mark.parametrize("step", [("calibrating", 3), ("solving", 1), ("solving", 2)])
def test_an_interrupted_run_goes_on_to_the_same_bytes(whole, tmp_path, monkeypatch, step):
    folder, text, expected = whole

    def stop(self, what, done, total):
        if (what, done) == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gguf_splitq.display.Progress.step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, text, tmp_path / "out.gguf")
    kept = tmp_path / ".out.gguf.unfinished"
    layers = step[1] if step[0] == "solving" else 0
    assert len(list(kept.glob("layer-*.safetensors"))) == layers
    solved = []
    monkeypatch.setattr("gguf_splitq.calibration.pieces.of_rows", spy(solved))
    assert run(folder, text, tmp_path / "out.gguf").read_bytes() == expected
    assert len(solved) == 14 - 7 * layers
    assert not kept.exists()


def spy(calls):
    from gguf_splitq.calibration import pieces

    original = pieces.of_rows

    def called(*args):
        calls.append(args)
        return original(*args)

    return called


def test_a_killed_run_goes_on_to_the_same_bytes(whole, tmp_path):
    folder, text, expected = whole
    options = ["--type", "sq4", "--calib", text, "--calib-tokens", TOKENS, "--outfile", tmp_path / "out.gguf"]
    command = [sys.executable, "-m", "gguf_splitq", "convert", folder, "--threads", 1, *options]
    child = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, start_new_session=True)
    kept = tmp_path / ".out.gguf.unfinished"
    while child.poll() is None and not (kept / "layer-00001.safetensors").exists():
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "out.gguf").exists()
    assert run(folder, text, tmp_path / "out.gguf").read_bytes() == expected


def test_changed_settings_are_refused_by_name(whole, tmp_path, monkeypatch):
    folder, text, _ = whole
    monkeypatch.setattr("gguf_splitq.rewrite.rewrite", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, text, tmp_path / "out.gguf")
    for changed in ({"calib_tokens": 4096}, {"type": "sq3"}):
        options = {"type": "sq4", "calib": str(text), "calib_tokens": TOKENS, "threads": 1} | changed
        with pytest.raises(errors.UsageError, match=r"calib_tokens was 2048 and is 4096|types was "):
            convert.convert(folder, outfile=tmp_path / "out.gguf", **options)


def test_one_calibration_serves_two_types(whole, tmp_path, monkeypatch):
    folder, text, _ = whole
    cache = tmp_path / "hessians.gguf"
    first = run(folder, text, tmp_path / "first.gguf", hessians=cache).read_bytes()
    monkeypatch.setattr("gguf_splitq.calibration.fisher.backward", lambda *_: 1 / 0)  # nothing is measured again
    assert run(folder, text, tmp_path / "again.gguf", hessians=cache).read_bytes() == first
    options = {"calib": str(text), "calib_tokens": TOKENS, "hessians": cache, "report": tmp_path / "report.json"}
    convert.convert(folder, "sq3w", outfile=tmp_path / "sq3w.gguf", **options)
    report = json.loads((tmp_path / "report.json").read_text())["calibration"]
    assert report["left"] == [] and all(e["polish"] < e["nearest"] for e in report["errors"].values())
    with pytest.raises(errors.UsageError, match="calib_tokens 2048 and this run has 4096"):
        convert.convert(folder, "sq3", outfile=tmp_path / "x.gguf", **(options | {"calib_tokens": 4096}))
    names = {"first.gguf", "again.gguf", "sq3w.gguf", "hessians.gguf", "report.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_weights_that_an_earlier_version_kept_by_batch_are_refused(whole, tmp_path):
    folder, text, _ = whole
    cache = tmp_path / "hessians.gguf"
    run(folder, text, tmp_path / "first.gguf", hessians=cache)
    cache.write_bytes(cache.read_bytes().replace(b'"weights"', b'"unknown"'))
    with pytest.raises(errors.UsageError, match="hessians.gguf: it was measured with weights None and this run has by"):
        run(folder, text, tmp_path / "other.gguf", hessians=cache)


def test_hessians_serve_a_copy_of_the_checkpoint_and_no_other_one(whole, tmp_path, monkeypatch):
    folder, text, _ = whole
    cache, copy = tmp_path / "hessians.gguf", tmp_path / "elsewhere" / folder.name
    first = run(folder, text, tmp_path / "first.gguf", hessians=cache).read_bytes()
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # with another time of modification
    monkeypatch.setattr("gguf_splitq.calibration.fisher.backward", lambda *_: 1 / 0)
    assert run(copy, text, tmp_path / "again.gguf", hessians=cache).read_bytes() == first
    times = os.stat(copy / "model.safetensors")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x11")
    os.utime(copy / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(errors.UsageError, match="measured with model [0-9a-f]{16} and this run has [0-9a-f]{16}"):
        run(copy, text, tmp_path / "other.gguf", hessians=cache)


def test_of_a_large_file_the_front_and_samples_are_compared(tmp_path, monkeypatch):
    for name, value in {"HEAD": 64, "SAMPLE": 16, "SAMPLES": 8}.items():
        monkeypatch.setattr(checkpoint, name, value)
    path, data = tmp_path / "large", bytes(range(250)) * 4

    def changed(at):
        path.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
        return checkpoint.fingerprint([path]) != before

    path.write_bytes(data)
    before = checkpoint.fingerprint([path])
    step = (1000 - 64) // 8
    assert all(changed(at) for at in (0, 63, 64, 79, 64 + 5 * step, 64 + 7 * step + 15))
    assert not changed(80) and not changed(64 + 7 * step + 16)  # what lies between is not read
    for other in (data[:-1], data + b"\0"):
        path.write_bytes(other)
        assert checkpoint.fingerprint([path]) != before
    small = tmp_path / "small"
    small.write_bytes(data[:190])
    whole = checkpoint.fingerprint([small])
    small.write_bytes(data[:189] + b"\0")
    assert checkpoint.fingerprint([small]) != whole


def test_a_damaged_part_is_named(tmp_path):
    journal = Journal(tmp_path / "kept", {"a": 1})
    journal.keep("layer-00000", {})
    (tmp_path / "kept" / "layer-00000.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(errors.InputError, match="layer-00000.safetensors: damaged"):
        journal.find("layer-00000")
