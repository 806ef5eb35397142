# SPDX-License-Identifier: MIT
"""validate: the parser on recorded output, every error path, and the whole way on the demo model."""

import json
import shutil
import signal
import struct
from types import SimpleNamespace

import crafted
import pytest

from gguf_splitq.convert import convert
from gguf_splitq.errors import EnvironmentFailed, InputError, UsageError, ValidationFailed
from gguf_splitq.files import gguf_file
from gguf_splitq.files.gguf_file import Value
from gguf_splitq.measure import validate
from gguf_splitq.runtime import building

SQ4_KLD_CEILING = 0.09  # nats, demo model, embeddings at their default type, 4 chunks of 512 tokens; iq4_xs has 0.0915
DEMO_F16_PPL = 33.30  # the same 4 chunks, stock llama.cpp

BASE_OUTPUT = """
[1]25.5103,[2]32.0944,[3]30.9283,[4]33.3043,
0.01.633.394 I Final estimate: PPL = 33.3043 +/- 2.92619
"""
COMPARISON_OUTPUT = """
chunk             PPL          ln(PPL(Q)/PPL(base))     KL Divergence         Δp RMS            Same top p
   4      35.0002 ±  3.0696    0.05149 ±    0.02103     0.15261 ±    0.00575  7.610 ±  0.438 %  74.902 ±  1.358 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  35.000209 ±   3.069583
Mean PPL(base)                :  33.243517 ±   2.911497

====== KL divergence statistics ======
Mean    KLD:   0.152608 ±   0.005755
99.9%   KLD:   1.286611
99.0%   KLD:   1.016036
Minimum KLD:  -0.000002

====== Token probability statistics ======
99.0%   Δp: 23.712%
Same top p: 74.902 ± 1.358 %
"""


@pytest.fixture
def files(tmp_path):
    """Two files that exist, for the paths on which no program runs."""
    text = tmp_path / "text.txt"
    text.write_text("a text")
    return empty_model(tmp_path / "model.gguf", 4096), text


def empty_model(path, vocabulary: int):
    """A GGUF without tensors; bytes stand in for the vocabulary's strings."""
    tokens = Value(9, struct.pack("<IQ", 8, vocabulary) + bytes(8 * vocabulary))  # empty strings
    path.write_bytes(gguf_file.header({"tokenizer.ggml.tokens": tokens}, []))
    return path


def test_reads_a_base_run():
    assert validate.parse_base(BASE_OUTPUT) == 33.3043


def test_reads_a_comparison():
    assert validate.parse_comparison(COMPARISON_OUTPUT) == {
        "ppl": 35.000209,
        "mean_kld": 0.152608,
        "p99_kld": 1.016036,
        "top1": pytest.approx(0.74902),
    }


def test_reads_not_a_number():
    assert validate.parse_comparison(COMPARISON_OUTPUT.replace("0.152608", "nan"))["mean_kld"] != 0


@pytest.mark.parametrize("missing", ["Mean PPL(Q)", "Mean    KLD", "99.0%   KLD", "Same top p:"])
def test_unknown_output_shows_its_last_lines(missing):
    with pytest.raises(EnvironmentFailed, match="the last words"):
        validate.parse_comparison(COMPARISON_OUTPUT.replace(missing, "?") + "the last words\n")


@pytest.mark.parametrize(
    "returncode, output, error, words",
    [
        (0, "the data file you provided tokenizes to only 37 tokens", InputError, "t.txt: only 37 tokens"),
        (1, "llama_perplexity: unable to load model", InputError, "m.gguf: llama.cpp does not load"),
        (1, "some\nlast line", EnvironmentFailed, "exit code 1.*last line"),
        (-signal.SIGILL, "", EnvironmentFailed, "m.gguf: .*SIGILL: rebuild"),
        (-signal.SIGKILL, "", EnvironmentFailed, "SIGKILL.*memory"),
        (-signal.SIGABRT, "assert failed", EnvironmentFailed, "SIGABRT.*assert failed"),
    ],
)
def test_a_failed_run_says_what_and_why(returncode, output, error, words):
    with pytest.raises(error, match=words):
        validate.check(returncode, output, "m.gguf", "t.txt")


@pytest.mark.parametrize("options", [{"ctx": 8}, {"chunks": 0}, {"threads": 0}])
def test_refuses_senseless_numbers(files, options):
    with pytest.raises(UsageError):
        validate.Baseline(*files, **options)


def test_names_a_missing_file(files, tmp_path):
    with pytest.raises(InputError, match="nowhere.txt"):
        validate.Baseline(files[0], tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="nowhere"):
        validate.validate(files[0], *files, report=tmp_path / "nowhere" / "report.json")


def test_says_when_the_disk_is_too_small(files, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(EnvironmentFailed, match="1.0 MiB are free"), validate.Baseline(*files, chunks=100):
        pass


def fake_runtime(monkeypatch, tmp_path, script: str):
    """Puts a shell script in the place of llama-perplexity."""
    program = tmp_path / "llama-perplexity"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(building, "program", lambda _: program)


def test_notices_truncated_log_probabilities(files, tmp_path, monkeypatch):
    # 8 bytes magic, context 512, vocabulary 4096, 4 chunks, and then nothing: what a full disk leaves behind.
    header = r"_logits_\000\002\000\000\000\020\000\000\004\000\000\000"
    fake_runtime(monkeypatch, tmp_path, f"printf '{header}' > \"$6\"; echo 'Final estimate: PPL = 33.3 +/- 2'")
    with pytest.raises(EnvironmentFailed, match="filled up"), validate.Baseline(*files):
        pass


def test_names_the_signal_that_killed_the_program(files, tmp_path, monkeypatch):
    fake_runtime(monkeypatch, tmp_path, "kill -ILL $$")
    with pytest.raises(EnvironmentFailed, match="SIGILL"), validate.Baseline(*files):
        pass


@pytest.fixture(scope="module")
def demo(tmp_path_factory, runtime_programs, demo_f16):
    """F16 and sq4 files of the demo model, and its text."""
    sq4 = convert(demo_f16, "sq4", tmp_path_factory.mktemp("demo") / "sq4.gguf")
    return demo_f16, sq4, crafted.DEMO / "eval.txt"


def test_demo_end_to_end(demo, tmp_path):
    f16, sq4, text = demo
    report = tmp_path / "report.json"
    result = validate.validate(sq4, f16, text, chunks=4, report=report)
    assert result["ppl_base"] == pytest.approx(DEMO_F16_PPL, rel=2e-3)
    assert 0 < result["mean_kld"] < SQ4_KLD_CEILING
    assert result["mean_kld"] < result["p99_kld"]
    assert result["ppl_ratio"] == pytest.approx(1, abs=0.05)
    assert 0.75 < result["top1"] < 1
    assert (result["chunks"], result["ctx"], result["bpw"]) == (4, 512, pytest.approx(4.25))
    assert json.loads(report.read_text()) == result


def test_a_file_does_not_differ_from_itself(demo):
    f16, _, text = demo
    with validate.Baseline(f16, text, chunks=2) as base:
        result = base.compare(f16)
    assert result["mean_kld"] < 1e-4
    assert result["top1"] > 0.99


def test_command_line_exits_5_past_a_limit(demo, capsys):
    from gguf_splitq import cli

    f16, sq4, text = map(str, demo)
    arguments = ["validate", sq4, "--baseline", f16, "--text", text, "--chunks", "1", "--max-kld", "1e-6"]
    assert cli.main(arguments) == ValidationFailed.exit_code
    assert "above 1e-06" in capsys.readouterr().err


def test_a_file_of_another_model_is_bad_input(demo, tmp_path):
    f16, _, text = demo
    other = empty_model(tmp_path / "other.gguf", 100)
    with validate.Baseline(f16, text, chunks=1) as base, pytest.raises(InputError, match="100 tokens and .* 4096"):
        base.compare(other)


def test_a_short_text_is_bad_input(demo, tmp_path):
    f16, _, _ = demo
    text = tmp_path / "short.txt"
    text.write_text("Too short for a context.")
    with pytest.raises(InputError, match="short.txt: only"), validate.Baseline(f16, text):
        pass


def test_a_file_that_is_no_model_is_bad_input(demo, tmp_path):
    f16, _, text = demo
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(f16.read_bytes()[:100_000])
    with validate.Baseline(f16, text, chunks=1) as base, pytest.raises(InputError, match="broken.gguf"):
        base.compare(broken)


def test_a_text_is_checked_and_decoded(files, tmp_path):
    plain, marked, parquet = (tmp_path / name for name in ("plain.txt", "marked.txt", "p.parquet"))
    plain.write_bytes(b"one\r\ntwo\n")
    marked.write_bytes("one\ntwo\n".encode("utf-16"))
    parquet.write_bytes(b"PAR1\0")
    with pytest.raises(InputError, match="a Parquet file"):
        validate.Baseline(files[0], parquet)
    for path, given in ((plain, plain), (marked, tmp_path / "text.txt")):
        base = validate.Baseline(files[0], path)
        base._folder = SimpleNamespace(name=str(tmp_path))
        assert base._plain() == given and given.read_text().splitlines() == ["one", "two"]
