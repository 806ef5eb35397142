# SPDX-License-Identifier: MIT
"""What is asked before work starts: no input is written, no two outputs are one file, every output has its place."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import crafted
import pytest

from gguf_splitq import cli, options, output
from gguf_splitq.errors import EnvironmentFailed, UsageError
from gguf_splitq.files import checkpoint, gguf_file
from gguf_splitq.measure import validate
from gguf_splitq.runtime import native

HUGE = "x" * 5000
CHECKPOINT = ("config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "tokenizer.model", "notes.txt")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with one input of every kind, which is the current one; work that starts fails the test."""
    tensors = crafted.llama_tensors()
    folder = tmp_path / "place"
    folder.mkdir()
    crafted.write_gguf(folder / "model.gguf", tensors)
    for number in (1, 2):
        crafted.write_gguf(folder / f"many-{number:05}-of-00002.gguf", tensors)
    crafted.legacy_imatrix(folder / "i.dat", {"blk.0.attn_q.weight": ([1.0] * 64, 4)})
    (folder / "text.txt").write_text("a text")
    (folder / "plan.json").write_text(json.dumps({"bpw": 3.0, "types": {}, "costs": {}}))
    crafted.write_gguf(folder / "hessians.gguf", {"0 q": tensors["blk.0.attn_q.weight"]})
    (folder / "hf").mkdir()
    for name in CHECKPOINT:
        (folder / "hf" / name).write_text("{}")
    (folder / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(checkpoint, "opened", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(validate, "Baseline", lambda *_: pytest.fail("work began"))
    return folder


@pytest.fixture
def refused(place, capsys):
    """A function that runs a command and checks that exit code 2, one sentence and no other file come of it."""

    def check(*args, words=()):
        before = state(place)
        assert cli.main([*map(str, args)]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("gguf-splitq: ")
        for word in words:
            assert word in error[0]
        assert state(place) == before

    return check


def state(folder):
    """Path -> content, or None for a folder and a link's target."""
    return {p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def alias(name, way):
    """Another path to the file `name`."""
    match way:
        case "direct":
            return Path(name).absolute()
        case "relative":
            return Path("link", "..", "place", name)
        case "folder link":
            return Path("link") / name
        case "symbolic link":
            Path("symbolic.json").symlink_to(Path(name).absolute())
            return Path("symbolic.json")
        case "hard link":
            os.link(name, "hard.json")
            return Path("hard.json")


WAYS = ("direct", "relative", "folder link", "symbolic link", "hard link")
PLAIN = ("convert", "model.gguf", "--type", "sq4", "--imatrix", "i.dat")
PLANNED = ("convert", "model.gguf", "--plan", "plan.json")
CALIBRATED = ("convert", "model.gguf", "--type", "sq4", "--calib", "text.txt", "--hessians", "hessians.gguf")
BUDGET = ("convert", "model.gguf", "--bpw", "3", "--calib", "text.txt", "--hessians", "hessians.gguf")
SHARDS = ("convert", "many-00001-of-00002.gguf", "--type", "sq4")
FOLDER = ("convert", "hf", "--type", "sq4")
READ = {
    PLAIN: ("model.gguf", "i.dat"),
    PLANNED: ("model.gguf", "plan.json"),
    CALIBRATED: ("model.gguf", "text.txt", "hessians.gguf"),
    BUDGET: ("model.gguf", "text.txt", "hessians.gguf"),
    SHARDS: ("many-00001-of-00002.gguf", "many-00002-of-00002.gguf"),
    FOLDER: tuple(f"hf/{name}" for name in CHECKPOINT),
}
CONVERT = [
    (command, file, option)
    for command, files in READ.items()
    for file in files
    for option in ("--outfile", "--report", "--mmproj", *(["--save-plan"] if command == BUDGET else []))
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("command", "file", "option"), CONVERT)
def test_convert_replaces_no_input(refused, command, file, option, way):
    path = alias(file, way)
    for more in ([], ["--overwrite"], ["--overwrite", "--dry-run"]):
        refused(*command, option, path, *more, words=[str(path), *(["its own input"] if more else [])])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["model.gguf", "many-00001-of-00002.gguf", "many-00002-of-00002.gguf"])
def test_dequantize_and_repack_replace_no_input(refused, file, way):
    path = alias(file, way)
    model = "model.gguf" if file == "model.gguf" else "many-00001-of-00002.gguf"
    for command in (("dequantize",), ("repack", "--container")):
        refused(*command, model, "--outfile", path, "--overwrite", words=[str(path), "its own input"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("file", ["model.gguf", "many-00002-of-00002.gguf", "text.txt"])
def test_validate_replaces_no_input(refused, file, way):
    path = alias(file, way)
    models = ("model.gguf", "--baseline", "many-00001-of-00002.gguf")
    for file, _, baseline in (models, models[::-1]):
        args = ("validate", file, "--baseline", baseline, "--text", "text.txt", "--report", path)
        refused(*args, words=[str(path), "its own input"])


NEW = ("new.json", Path("link") / "new.json", "./hf/../new.json", "dangling.json")
OUTPUTS = ("--outfile", "--report", "--save-plan", "--hessians", "--mmproj", "--card")


@pytest.mark.parametrize("name", NEW, ids=str)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(OUTPUTS, 2)))
def test_two_outputs_are_two_files(refused, one, other, name):
    Path("dangling.json").symlink_to("new.json")
    command = ("convert", "model.gguf", "--bpw", "3", "--calib", "text.txt")
    for more in ([], ["--dry-run"]):
        refused(*command, one, "new.json", other, name, *more, words=["are one file", one, other])


@pytest.mark.parametrize("file", ["--outfile", "--report"])
def test_a_template_is_filled_in_before_it_is_compared(refused, file):
    os.link("model.gguf", "model-sq4.gguf")
    refused("convert", "model.gguf", "--type", "sq4", "--overwrite", words=["model-sq4.gguf", "its own input"])
    Path("model-sq4.gguf").unlink()
    refused("convert", "model.gguf", "--type", "sq4", "--report", "link/model-sq4.gguf", words=["are one file"])


def test_what_an_unfinished_run_left_takes_no_file(refused):
    Path(".out.gguf.unfinished").mkdir()
    kept = Path(".out.gguf.unfinished/text.txt")
    kept.write_text("a text")
    command = ("convert", "model.gguf", "--type", "sq4", "--outfile", "out.gguf", "--calib")
    refused(*command, kept, words=["text.txt", "unfinished"])
    refused(*command, "text.txt", "--report", kept.with_name("r.json"), words=["r.json", "unfinished"])
    refused(*command, "text.txt", "--hessians", kept.with_name("h.gguf"), words=["h.gguf", "unfinished"])


def test_only_an_earlier_output_is_replaced(place, refused):
    Path("other.json").write_text('{"architectures": []}')
    Path("other.txt").write_text("text")
    for name in ("other.json", "other.txt", "i.dat"):
        refused("convert", "model.gguf", "--type", "sq4", "--report", name, "--overwrite", words=[name, "no earlier"])
        command = ("validate", "model.gguf", "--baseline", "model.gguf", "--text", "text.txt")
        refused(*command, "--report", name, words=[name, "no earlier"])
        command = ("convert", "model.gguf", "--bpw", "3", "--calib", "text.txt")
        refused(*command, "--save-plan", name, "--dry-run", words=[name, "--overwrite"])
        refused(*command, "--outfile", name, words=[name, "--overwrite"])


def test_an_earlier_output_in_the_checkpoint_folder_is_replaced(place):
    for name, content in {
        "hf/out.gguf": b"GGUF...",
        "hf/r.json": b'{"file": "out.gguf", "tensors": []}',
        "empty": b"",
    }.items():
        Path(name).write_bytes(content)
    for report in ("hf/r.json", "empty"):
        options.Convert("hf", "sq4", "hf/out.gguf", report=report, overwrite=True).check()


def test_devices_and_folders(refused, monkeypatch):
    convert = ("convert", "model.gguf", "--type", "sq4", "--overwrite")
    refused(*convert, "--outfile", "/dev/null", words=["/dev/null", "device"])
    refused(*convert, "--report", "hf", words=["hf", "folder"])
    given = options.Convert("model.gguf", "sq4", report="/dev/null")
    given.check()
    assert [path.name for _, path in options.places(given.writes)] == ["model-sq4.gguf"]
    output.write_json("/dev/null", {})
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("option", OUTPUTS)
def test_folders_are_looked_for_first(refused, option):
    command = ("convert", "model.gguf", "--bpw", "3", "--calib", "text.txt")
    refused(*command, option, "nowhere/name.json", words=["nowhere"])
    refused(*command, option, "y" * 250, words=["yyy", "File name too long"])


def test_a_folder_that_takes_no_file_is_found_first(place, capsys):
    locked = Path("/proc/self") if Path("/proc/self").is_dir() else place / "closed"
    locked.is_dir() or locked.mkdir(mode=0o555)
    assert cli.main(["convert", "model.gguf", "--type", "sq4", "--report", str(locked / "r.json")]) == 6
    assert "r.json" in capsys.readouterr().err and not Path(".model-sq4.gguf.lock").exists()
    args = ["validate", "model.gguf", "--baseline", "model.gguf", "--text", "text.txt"]
    assert cli.main([*args, "--report", str(locked / "r.json")]) == 6


def test_json_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path, link = tmp_path / "r.json", tmp_path / "link.json"
    link.symlink_to(path)
    output.write_json(link, {"file": 1})
    assert json.loads(path.read_text()) == {"file": 1} and link.is_symlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailed, match="r.json: the disk filled up"):
        output.write_json(path, {"file": 2})
    assert json.loads(path.read_text()) == {"file": 1} and sorted(tmp_path.iterdir()) == [link, path]


@pytest.mark.parametrize(
    "args",
    [
        ["--type", "q4_k"],
        ["--type", "q8_0", "--tensor-type", "attn_q=iq4_nl"],
        ["--type", "sq4", "--token-embedding-type", "q6_k"],
        ["--type", "sq4", "--output-tensor-type", "q5_k"],
        ["--type", "q4_0", "--imatrix", "i.dat"],
        ["--type", "q4_0", "--calib", "text.txt"],
        ["--plan", "stock.json"],
    ],
)
def test_the_c_library_is_asked_for_before_the_model_is_read(place, monkeypatch, capsys, args):
    monkeypatch.setattr(native, "library", lambda: None)
    Path("stock.json").write_text(json.dumps({"bpw": 3.0, "types": {"blk.0.attn_q.weight": "q6_k"}, "costs": {}}))
    assert cli.main(["convert", "model.gguf", *args]) == 6
    assert "needs the C library" in capsys.readouterr().err
    needless = ("convert", "model.gguf", "--type", "q4_k", "--dry-run"), ("convert", "model.gguf", "--type", "q4_0")
    for command in needless:
        with pytest.raises(pytest.fail.Exception, match="work began"):
            cli.main([*command])


def test_a_budget_needs_no_library(tmp_path, monkeypatch):
    """All candidates are encoded in Python too."""
    from gguf_splitq.calibration import sensitivity
    from gguf_splitq.convert import convert

    def measuring(*_):
        raise InterruptedError

    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(sensitivity, "of_checkpoint", measuring)
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(256, 256))
    (tmp_path / "text.txt").write_text("a text")
    with pytest.raises(InterruptedError):
        convert(model, bpw=4.0, calib=tmp_path / "text.txt", outfile=tmp_path / "out.gguf")


@pytest.mark.parametrize("aim, one", [("plain", 4 * 256**2), ("half", 12 * 32768)])
def test_room_for_what_is_measured_and_journal_is_asked_for(tmp_path, monkeypatch, aim, one):
    from gguf_splitq.calibration import solve
    from gguf_splitq.convert import convert

    def solving(*_):
        raise InterruptedError

    free = 2 * 14 * one  # what is measured of 14 matrices, in the journal and in its file
    monkeypatch.setattr(gguf_file.os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
    monkeypatch.setattr(solve, "run", solving)
    model = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors(256, 256))
    (tmp_path / "text.txt").write_text("a text")
    given = dict(calib=tmp_path / "text.txt", outfile=tmp_path / "out.gguf", hessians=tmp_path / "h.gguf")
    given |= dict(aim=aim, calib_tokens=32768)
    with pytest.raises(EnvironmentFailed, match=f"MiB are needed and {free / 2**20:.1f} MiB are free"):
        convert(model, "sq4", **given)
    free += 2_000_000  # the output, and as many solved rows
    free += 2 * 2 * (8 * 256**2 + 4 * 32768)  # what is measured of embedding and output
    with pytest.raises(InterruptedError):
        convert(model, "sq4", **given)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "text.txt"]


HOLDER = """
import sys
from pathlib import Path
from gguf_splitq import output
with output.locked([("--outfile", Path(sys.argv[1]))]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A function that starts a process which writes to a file, and waits until it does."""
    started = []

    def start(path):
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", HOLDER, str(path)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.stdin.close()
        child.stdout.close()
        child.wait()


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_a_second_run_to_one_output_is_refused(tmp_path, capsys, holder, number):
    model, out = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors()), tmp_path / "out.gguf"
    child = holder(out)
    (tmp_path / "link").symlink_to(tmp_path)
    for command in (["convert", model, "--type", "sq4"], ["dequantize", model]):
        for path in (out, tmp_path / "link" / "out.gguf"):
            assert cli.main([*map(str, command), "--outfile", str(path)]) == 2
            assert "another run is writing it" in capsys.readouterr().err
    assert cli.main(["convert", str(model), "--type", "sq4", "--outfile", str(tmp_path / "other.gguf")]) == 0
    child.send_signal(number) if number else child.stdin.close()
    child.wait()
    assert cli.main(["convert", str(model), "--type", "sq4", "--outfile", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "m.gguf", "other.gguf", "out.gguf"]


def test_the_lock_of_a_run_that_ends_just_now_is_not_taken(tmp_path, monkeypatch):
    name, plain, taken = tmp_path / ".out.gguf.lock", output._flock, []

    def flock(file):
        if not taken:
            name.unlink()  # what the run that had it does last
        taken.append(file)
        plain(file)

    monkeypatch.setattr(output, "_flock", flock)
    with output.locked([("--outfile", tmp_path / "out.gguf")]):
        assert len(taken) == 2 and name.exists()
        with pytest.raises(UsageError, match="another run"), output.locked([("--outfile", tmp_path / "out.gguf")]):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_run_has_just_made_is_kept(place):
    given = options.Convert("model.gguf", "sq4")
    given.check()
    Path("model-sq4.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="--overwrite"), given.writing():
        pass
    assert not Path(".model-sq4.gguf.lock").exists()


PATHS = [
    ("convert", "{}", "--type", "sq4"),
    ("convert", "model.gguf", "--plan", "{}"),
    *(
        ("convert", "model.gguf", "--type", "sq4", option, "{}")
        for option in ("--outfile", "--imatrix", "--report", "--mmproj")
    ),
    ("convert", "model.gguf", "--type", "sq4", "--calib", "{}"),
    ("convert", "model.gguf", "--type", "sq4", "--calib", "text.txt", "--hessians", "{}"),
    ("convert", "model.gguf", "--bpw", "3", "--calib", "text.txt", "--save-plan", "{}"),
    ("dequantize", "{}"),
    ("dequantize", "model.gguf", "--outfile", "{}"),
    ("inspect", "{}"),
    ("validate", "{}", "--baseline", "model.gguf", "--text", "text.txt"),
    ("validate", "model.gguf", "--baseline", "{}", "--text", "text.txt"),
    ("validate", "model.gguf", "--baseline", "model.gguf", "--text", "{}"),
    ("validate", "model.gguf", "--baseline", "model.gguf", "--text", "text.txt", "--report", "{}"),
]


@pytest.mark.parametrize("path", [HUGE, "a\0b", "", f"{HUGE}/out.gguf"], ids=["long", "zero", "empty", "long folder"])
@pytest.mark.parametrize("args", PATHS, ids=" ".join)
def test_a_path_that_is_none(refused, args, path):
    refused(*(path if arg == "{}" else arg for arg in args), words=["no path that can be used"])


@pytest.mark.parametrize("size", ["99999999999999999999", "9" * 400, "1e9", "-5", "0", "9" * 25 + "T", "٣"])
def test_sizes_that_no_machine_has(refused, size):
    refused("convert", "model.gguf", "--type", "sq4", f"--max-ram={size}", words=["--max-ram", "not a size"])


def test_an_empty_type(refused):
    refused("convert", "model.gguf", "--type", "", words=["type '' is not known"])


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", "", "cuda:999"])
def test_devices_that_nothing_runs_on(refused, device):
    refused("convert", "model.gguf", "--type", "sq4", f"--device={device}", words=[f"--device {device}"])


@pytest.mark.parametrize("threads", ["-1", "0", "99999999999999999999"])
def test_numbers_of_threads_that_nothing_runs(refused, threads):
    refused("convert", "model.gguf", "--type", "sq4", f"--threads={threads}", words=[f"--threads {threads}"])
    refused("dequantize", "model.gguf", f"--threads={threads}", words=[f"--threads {threads}"])


def test_validate_closes_what_it_reads(tmp_path, monkeypatch):
    path, opened = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors()), []
    (tmp_path / "text.txt").write_text("a text")
    plain = gguf_file.read
    monkeypatch.setattr(gguf_file, "read", lambda *args: opened.append(plain(*args)) or opened[-1])
    base = validate.Baseline(path, tmp_path / "text.txt")
    base._logits = tmp_path / "logits"
    monkeypatch.setattr(base, "_run", lambda *_, **__: "Mean PPL(Q) : 1\nMean KLD: 0\n99.0% KLD: 0\nSame top p: 1")
    base.ppl = 1.0
    base.compare(path)
    assert len(opened) == 3 and all(file.closed for found in opened for file in found._open.values())


def test_a_json_file_that_is_no_report_is_kept(place, refused):
    (place / "notes.json").write_text('{"file": "my notes"}')
    options = ("--type", "sq4", "--outfile", "o.gguf", "--report", "notes.json")
    refused("convert", "model.gguf", *options, words=["no earlier report"])


def test_a_report_goes_to_a_pipe_as_it_is(tmp_path):
    model = crafted.write_gguf(tmp_path / "model.gguf", crafted.llama_tensors())
    read, write = os.pipe()
    with os.fdopen(read) as out:
        given = ["convert", str(model), "--type", "q8_0", "--outfile", str(tmp_path / "o.gguf"), "--report"]
        assert cli.main([*given, f"/dev/fd/{write}"]) == 0
        os.close(write)
        assert json.load(out)["type"] == "q8_0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "o.gguf"]


def test_a_shard_behind_a_linked_folder_is_an_input(place, refused):
    (place / "elsewhere").mkdir()
    shard = place / "elsewhere" / "part.safetensors"
    shard.write_text("weights")
    (place / "hf" / "sub").symlink_to(place / "elsewhere")
    index = place / "hf" / checkpoint.INDEX
    index.write_text(json.dumps({"weight_map": {"a": "sub/part.safetensors"}}))
    refused("convert", "hf", "--type", "sq4", "--outfile", shard, "--overwrite", words=["its own input"])


@pytest.mark.parametrize("name", [".o.gguf.lock", ".o.gguf.unfinished"])
def test_names_that_are_used_beside_outputs_are_none_for_outputs(refused, name):
    refused("convert", "model.gguf", "--type", "sq4", "--outfile", "o.gguf", "--report", name, words=["used beside"])


@pytest.mark.parametrize(
    "option, value", [("--max-kld", "nan"), ("--max-ppl-ratio", "-1"), ("--ctx", 1 << 40), ("--threads", 1 << 40)]
)
def test_validate_refuses_numbers_that_mean_nothing(refused, option, value):
    refused("validate", "model.gguf", "--baseline", "model.gguf", "--text", "text.txt", option, value, words=[option])


def test_a_text_that_is_no_file_is_told_from_one_that_is_missing(refused):
    for path, cause in (("hf", "not a regular file"), ("/dev/zero", "not a regular file"), ("no", "no such text")):
        refused("convert", "model.gguf", "--type", "sq4", "--calib", path, words=[path, cause])
