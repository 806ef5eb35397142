# SPDX-License-Identifier: MIT
"""The command line: what each subcommand passes on, and how failures end."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import crafted
import pytest

from gguf_splitq import __version__, cli, errors

SOURCES = sorted((Path(__file__).parents[1] / "gguf_splitq").rglob("*.py"))


def test_convert_inspect_and_dequantize(tmp_path, capsys):
    model = crafted.write_gguf(tmp_path / "tiny.gguf", crafted.llama_tensors())
    packed, report = tmp_path / "packed.gguf", tmp_path / "r.json"
    rules = ["--tensor-type", "attn_q=q8_0", "--tensor-type", "ffn_up=sq2", "--output-tensor-type", "f16"]
    args = ["convert", str(model), "--type", "SQ4", "--outfile", str(packed), "--report", str(report), *rules]
    assert cli.main([*args, "--threads", "2", "--max-ram", "1G", "--token-embedding-type", "bf16"]) == 0
    chosen = {row["name"]: row["type"] for row in json.loads(report.read_text())["tensors"]}
    names = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.attn_k.weight", "output.weight", "token_embd.weight")
    assert [chosen[name] for name in names] == ["q8_0", "sq2", "sq4", "f16", "bf16"]
    capsys.readouterr()
    assert cli.main(["inspect", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["gguf_splitq.type"] == "sq4"
    assert cli.main(["dequantize", str(packed), "--outfile", str(tmp_path / "back.gguf")]) == 0
    assert crafted.read_gguf(tmp_path / "back.gguf")[0]["general.file_type"] == 1
    assert cli.main(["convert", str(model), "--type", "q8_0", "--threads", "0"]) == 2
    assert "--threads 0" in capsys.readouterr().err


def test_types_lists_every_type(capsys):
    from gguf_splitq import types

    assert cli.main(["types"]) == 0
    out = capsys.readouterr().out
    for t in types.all_types():
        assert t.name in out


def test_validate_gets_its_options(monkeypatch):
    from gguf_splitq.measure import validate

    given = {}
    monkeypatch.setattr(validate, "validate", lambda **options: given.update(options))
    args = "validate a.gguf --baseline b.gguf --text t.txt --ctx 256 --chunks 2 --max-kld 0.1 --max-ppl-ratio 1.5"
    assert cli.main(args.split()) == 0
    assert given == dict(file="a.gguf", baseline="b.gguf", text="t.txt", ctx=256, chunks=2, threads=None) | dict(
        max_kld=0.1, max_ppl_ratio=1.5, report=None, card=None, force=False
    )


def test_runtime_actions(monkeypatch, capsys):
    from gguf_splitq.runtime import building, fetching, installing

    monkeypatch.setattr(fetching, "fetch", lambda: Path("/tree"))
    monkeypatch.setattr(building, "build", lambda tests=False: Path(f"/bin-{tests}"))
    monkeypatch.setattr(building, "path", lambda: Path("/bin"))
    monkeypatch.setattr(fetching, "patches_check", lambda: {"one.patch": 3})
    monkeypatch.setattr(installing, "install", lambda prefix, overwrite: Path(f"/{prefix}-{overwrite}"))
    monkeypatch.setattr(installing, "archive", lambda file, overwrite: Path(f"/{file}-{overwrite}"))
    lines = {"fetch": "/tree", "build --tests": "/bin-True", "path": "/bin", "check": "one.patch"}
    lines |= {"install here": "/here-False", "archive": "/None-False", "archive a.tar.gz --overwrite": "/a.tar.gz-True"}
    for args, line in lines.items():
        assert cli.main(["runtime", *args.split()]) == 0
        assert capsys.readouterr().out.startswith(line)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x: why: next"), 2),
        (errors.InputError("x: why: next"), 3),
        (errors.UnsupportedError("x: why: next"), 4),
        (errors.ValidationFailed("x: why: next"), 5),
        (errors.EnvironmentFailed("x: why: next"), 6),
        (MemoryError(), 6),
        (OSError(28, "No space left on device", "/some/file"), 6),
        (PermissionError("denied"), 6),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 6),
        (RuntimeError("MPS backend out of memory"), 6),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    from gguf_splitq import inspection

    def fail(**options):
        raise error

    monkeypatch.setattr(inspection, "inspect", fail)
    assert cli.main(["inspect", "m.gguf"]) == code
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    if isinstance(error, errors.SplitqError):
        assert str(error) in printed
    if isinstance(error, OSError):
        assert (error.strerror or str(error)) in printed and (error.filename or "") in printed
    if isinstance(error, (errors.SplitqError, OSError, RuntimeError)):
        with pytest.raises(type(error)):
            cli.main(["--debug", "inspect", "m.gguf"])


def test_a_gpu_that_is_too_small_is_no_traceback(monkeypatch, capsys):
    from gguf_splitq import inspection

    class OutOfMemoryError(RuntimeError):
        pass

    def fail(error):
        raise error

    monkeypatch.setattr(inspection, "inspect", lambda file, json: fail(OutOfMemoryError("CUDA has no room")))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(OutOfMemoryError=OutOfMemoryError)))
    assert cli.main(["inspect", "m.gguf"]) == 6
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and "--max-vram" in printed and "--device cpu" in printed
    for error in (RuntimeError("another"), OutOfMemoryError("CUDA has no room")):
        monkeypatch.setattr(inspection, "inspect", lambda file, json, error=error: fail(error))
        if isinstance(error, OutOfMemoryError):
            monkeypatch.delitem(sys.modules, "torch")
        with pytest.raises(RuntimeError):
            cli.main(["inspect", "m.gguf"])


@pytest.mark.parametrize("command", ["types", "inspect m.gguf", "convert m.gguf --type sq4", "runtime path"])
def test_windows_is_refused_by_name(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(signal, "SIGHUP")
    assert cli.main(command.split()) == 6
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and all(name in printed for name in ("Linux", "macOS", "WSL"))


def test_the_module_runs_and_a_closed_pipe_is_quiet():
    command = [sys.executable, "-m", "gguf_splitq"]
    folder = Path(__file__).parents[1]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=folder)
    assert done.stdout == f"gguf-splitq {__version__}\n"
    assert subprocess.run(command, capture_output=True, cwd=folder).returncode == 2
    piped = subprocess.Popen([*command, "types"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder)
    piped.stdout.close()
    assert piped.stderr.read() == b"" and piped.wait() in (1, 141)  # rich ends with 1


def test_starting_is_light():
    heavy = "torch", "transformers", "gguf", "numpy", "huggingface_hub", "rich"
    code = f"import sys, gguf_splitq.cli; gguf_splitq.cli._parser(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"


def test_only_the_command_line_ends_the_process():
    for path in SOURCES:
        if path.name not in ("cli.py", "__main__.py", "hf_to_gguf.py", "load_gguf.py"):  # the latter two are processes
            assert "sys.exit" not in path.read_text() and "os._exit" not in path.read_text(), path


def test_the_script_with_upstreams_name_takes_upstreams_options(tmp_path):
    script = Path(__file__).parents[1] / "convert" / "convert_hf_to_gguf.py"
    out = ["--outfile", str(tmp_path / "demo-{ftype}.gguf"), "--token-embedding-type", "f16"]
    command = [sys.executable, script, "examples/demo", "--outtype", "SQ3", *out, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[1])
    assert done.returncode == 0 and "demo-sq3.gguf" in done.stdout + done.stderr
    assert "--token-embedding-type" in done.stdout
