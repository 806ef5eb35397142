# SPDX-License-Identifier: MIT
"""`make bench` from parts to verdict, with programs that answer at once."""

import json
import sys

import pytest

from experiments import bench, common

RATES = {"sq4": 100.0, "sq3": 120.0, "sq2": 140.0, "sdr4": 90.0, "cq3": 110.0, "cq2": 130.0, "Q4_K_S": 50.0}
RATES |= {"sq3.5": 110.0, "sq2.5": 130.0}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with options; returns its exit code, its output and what it saved."""

    def llama(program, *args):
        pairs = [arg for arg in args if arg != "--no-warmup"]
        options = dict(zip(pairs[::2], pairs[1::2], strict=True))
        rate = RATES.get(options["-m"].stem, 40.0) * (2 if options.get("-ctk") == "sdr4" else 1)
        tests = [(n, prompt) for n in map(int, options["-t"].split(",")) for prompt in (0, options["-p"])]
        tests = [(n, prompt) for n, prompt in tests if prompt or options["-n"]]
        return json.dumps([{"n_threads": n, "n_gen": 0 if p else 8, "samples_ts": [rate * n]} for n, p in tests])

    def make_files(size, threads, wanted):
        files = {type: tmp_path / size / f"{type}.gguf" for type in wanted}
        for file in files.values():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"x" * (600 if size == "0.6B" else 3000))
        return files

    def random_llama(name, **shape):
        (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
        return tmp_path

    def timed(command, outfile):
        outfile.parent.mkdir(exist_ok=True)
        outfile.touch()
        if "Q4_K_S" in command:
            return 10.0, 1e8
        return (0.004 * command[-1].stat().st_size if command[-1].is_file() else 5.0), 1e8

    for module in (common, bench):
        monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "llama", llama)
    monkeypatch.setattr(bench, "make_files", make_files)
    monkeypatch.setattr(bench.models, "random_llama", random_llama)
    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "read_rates", lambda threads: {"plain": 10.0 * threads, "large pages": 20.0 * threads})
    monkeypatch.setattr(bench, "decoded_bytes", lambda file: 9e7)
    monkeypatch.setattr(bench, "linear_bpw", lambda file: 4.25)
    monkeypatch.setattr(bench.runtime, "program", lambda name: name)

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["bench", "--threads", "2", "--rounds", "2", *options])
        try:
            bench.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())

    return main


def test_every_claim_is_printed_with_its_limit_and_verdict(run):
    code, out, saved = run()
    assert list(saved) == bench.PARTS and code == 0 and "MISSED" not in out
    claims = [claim for part in saved.values() for claim in part["claims"]]
    assert len(claims) == 6 + 2 * (19 + 2) + 2 * (8 + 2) + 2
    for claim in claims:
        assert f"{claim['claim']}: {claim['measured']:.3f}  " in out
    assert "0.6B, 1 thread: decode of sq4 / Q4_K_S: 2.000  at least 1.4  kept" in out
    assert "conversion: seconds of sq4 / Q4_K_S, 0.6B: 0.240  at most 0.3  kept" in out
    assert "conversion: seconds per weight, 3B / 0.6B: 1.000  at most 1.15  kept" in out


def test_a_part_that_misses_is_told_and_the_others_are_kept(run, monkeypatch):
    run("--only", "3B", "--only", "conversion")
    monkeypatch.setitem(RATES, "sq3", 59.0)
    code, out, saved = run("--only", "0.6B")
    assert list(saved) == ["conversion", "0.6B", "3B"]
    assert code == 1 and "0.6B, 2 threads: decode of sq3 / IQ3_XXS: 1.475  at least 2.5  MISSED" in out
    assert "3B, 2 threads: decode of sq3 / IQ3_XXS: 3.000  at least 2.5  kept" in out
