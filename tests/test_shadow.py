# SPDX-License-Identifier: MIT
"""Ollama in a shadow: a program that looks for its runner as Ollama does, beside its own executable, links resolved."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gguf_splitq import cli
from gguf_splitq.convert import convert
from gguf_splitq.errors import EnvironmentFailed, UsageError
from gguf_splitq.runtime import building
from gguf_splitq.serving import service, shadow

ROOT = Path(__file__).parents[1]
KEY = b"GGUF...gguf_splitq.container.version..."
# `ollama serve ARGUMENTS` runs its llama-server with them, its libraries first; `serve` alone waits to be ended.
OLLAMA = r"""
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif
int main(int argc, char ** argv) {
    char own[PATH_MAX] = "/proc/self/exe", exe[PATH_MAX], folder[2*PATH_MAX], path[3*PATH_MAX];
#ifdef __APPLE__
    uint32_t size = sizeof(own);
    _NSGetExecutablePath(own, &size);
#endif
    if (!realpath(own, exe)) { return 9; }
    *strrchr(exe, '/') = 0;
    snprintf(folder, sizeof(folder), "%s/../lib/ollama", exe);
    snprintf(path, sizeof(path), "%s/llama-server", folder);
    if (argc < 2 || strcmp(argv[1], "serve")) { return 8; }
    setenv("LD_LIBRARY_PATH", folder, 1);
    setenv("DYLD_LIBRARY_PATH", folder, 1);
    setenv("GGML_BACKEND_PATH", "/nowhere/libggml-cuda.so", 1);
    if (argc == 2) { for (;;) { pause(); } }
    argv[1] = path;
    execv(path, argv + 1);
    return 7;
}
"""
THEIRS = '#!/bin/sh\necho "theirs $0 $LD_LIBRARY_PATH $GGML_BACKEND_PATH $@"\n'


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "ollama.c").write_text(OLLAMA)
    compiler = building._tools()[2]["CC"].split()
    subprocess.run([*compiler, folder / "ollama.c", "-o", folder / "ollama"], check=True)
    return folder / "ollama"


@pytest.fixture
def installed(executable, tmp_path, monkeypatch):
    """An installation as Ollama's own on Linux, in PATH through a link, with libraries that no program can load."""
    lib = tmp_path / "it's local" / "lib" / "ollama"
    lib.mkdir(parents=True)
    (lib.parents[1] / "bin").mkdir()
    shutil.copy(executable, lib.parents[1] / "bin" / "ollama")
    script(lib / "llama-server", THEIRS)
    for name in ("libllama.so.0", "libggml-base.so.0", "libllama.0.dylib"):
        (lib / name).write_text("not a library")
    (lib / "cuda_v13").mkdir()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "ollama").symlink_to(lib.parents[1] / "bin" / "ollama")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    return lib.parents[1]


@pytest.fixture
def models(tmp_path):
    """(one with the keys of a container in its first MiB, one without)."""
    (tmp_path / "ours.gguf").write_bytes(b"\0\xff" * 1000 + KEY + b"\0" * 2000)
    (tmp_path / "theirs.gguf").write_bytes(b"\0\xff" * (1 << 20) + KEY)
    return tmp_path / "ours.gguf", tmp_path / "theirs.gguf"


@pytest.fixture
def made(installed, runtime_programs, tmp_path):
    shadow.make(shadow.find(), runtime_programs, tmp_path / "shadow")
    return tmp_path / "shadow"


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def content(folder):
    """All that is in a folder: name -> bytes, or where a link leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def serve(made, *words):
    command = [str(word) for word in (made / "bin" / "ollama", "serve", *words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_each_model_gets_the_server_that_knows_it(made, installed, models):
    ours, theirs = models
    done = serve(made, "--model", ours, "--version")
    assert building.cache.pin9() in done.stdout + done.stderr and done.returncode == 0
    lib = installed / "lib" / "ollama"
    said = serve(made, "--model", theirs, "--port", "1").stdout
    assert said.startswith(f"theirs {lib}/llama-server {lib}:")
    assert said.endswith(f" /nowhere/libggml-cuda.so --model {theirs} --port 1\n")
    for words in (["--list-devices"], ["--port", "1"], ["--port", "--model"], ["--model", "/absent"]):
        assert serve(made, *words).stdout.startswith("theirs ")


def test_libraries_of_the_installation_would_break_our_server(made, models, runtime_programs):
    """What the dispatcher is for: as Ollama starts a runner, its own libraries come first."""
    lib = str(made / "lib" / "ollama")
    env = {"LD_LIBRARY_PATH": lib, "DYLD_LIBRARY_PATH": lib}
    assert subprocess.run([runtime_programs / "llama-server", "--version"], env=env, capture_output=True).returncode
    done = subprocess.run([made / "lib" / "ollama" / "llama-server", "-m", models[0], "--version"], env=env)
    assert done.returncode == 0


def test_the_process_that_ollama_ends_is_the_server(made, models, installed):
    server = script(installed / "lib" / "ollama" / "llama-server", "#!/bin/sh\necho $$\n")
    with subprocess.Popen([made / "lib/ollama/llama-server", "--model", models[1]], stdout=subprocess.PIPE) as process:
        assert int(process.communicate()[0]) == process.pid
    assert server.exists()


def test_the_installation_is_not_touched_and_an_upgrade_is_followed(installed, made, runtime_programs, models):
    before = content(installed)
    assert {path.name for path in (made / "lib" / "ollama").iterdir()} == {
        path.name for path in (installed / "lib" / "ollama").iterdir()
    }
    (installed / "bin" / "ollama").write_bytes((installed / "bin" / "ollama").read_bytes() + b"newer")
    (installed / "lib" / "ollama" / "libnew.so").touch()
    (installed / "lib" / "ollama" / "libllama.so.0").unlink()
    shadow.make(shadow.find(), runtime_programs, made)
    assert (made / "bin" / "ollama").read_bytes().endswith(b"newer")
    names = {path.name for path in (made / "lib" / "ollama").iterdir()}
    assert "libnew.so" in names and "libllama.so.0" not in names
    assert serve(made, "--model", models[1]).stdout.startswith("theirs ")
    assert {path.name for path in made.parent.iterdir() if path.name.startswith("shadow")} == {"shadow"}
    changed = {name for name, data in content(installed).items() if before.get(name) != data}
    assert changed == {"bin/ollama", "lib/ollama/libnew.so"}  # by this test alone


def gguf_splitq(*words):
    return [sys.executable, "-m", "gguf_splitq", "ollama", *words]


def test_serve_stop_and_remove(installed, runtime_programs, tmp_path, monkeypatch):
    cache = building.cache.home()
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / cache.name).symlink_to(cache)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    before = content(installed)
    with subprocess.Popen(gguf_splitq("serve"), stderr=subprocess.PIPE, text=True) as server:
        said = server.stderr.readline()
        assert said.startswith(str(installed / "bin" / "ollama")) and "on the CPU, all others as before" in said
        while not shadow._runs(tmp_path / "cache" / "ollama" / f"{started(tmp_path)}.{server.pid}"):
            assert server.poll() is None
        assert server.poll() is None
        assert cli.main(["ollama", "stop"]) == 0
        assert server.wait() == -signal.SIGTERM
    assert cli.main(["ollama", "stop"]) == 0
    assert (tmp_path / "cache" / "ollama" / started(tmp_path) / "bin" / "ollama").exists()
    assert cli.main(["ollama", "remove"]) == 0
    assert not (tmp_path / "cache" / "ollama").exists()
    assert content(installed) == before


def started(tmp_path):
    return next(path.name for path in (tmp_path / "cache" / "ollama").iterdir() if path.is_dir())


def test_a_process_that_has_the_number_of_an_ended_server_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUF_SPLITQ_CACHE", str(tmp_path))
    (tmp_path / "ollama").mkdir()
    (tmp_path / "ollama" / f"abc.{os.getpid()}").touch()
    shadow.stop()
    assert not list((tmp_path / "ollama").iterdir())


def test_a_server_that_runs_already_is_named(installed, runtime_programs, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{other.getsockname()[1]}")
        assert cli.main(["ollama", "serve"]) == 6
    assert re.search(r"A server is running at 127.0.0.1:\d+; end it", capsys.readouterr().err)


def test_no_ollama_and_an_old_one(tmp_path, monkeypatch, installed):
    (installed / "lib" / "ollama" / "llama-server").unlink()
    with pytest.raises(EnvironmentFailed, match="there is no lib/ollama/llama-server beside it.*since 0.30: upgrade"):
        shadow.find()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(shadow, "PLACES", ())
    with pytest.raises(EnvironmentFailed, match="Ollama is not installed; get it"):
        shadow.find()


def test_homebrew_has_it_in_libexec(installed, tmp_path, monkeypatch):
    cellar = tmp_path / "Cellar" / "ollama" / "1"
    (cellar / "libexec" / "lib").mkdir(parents=True)
    (cellar / "bin").mkdir()
    shutil.copy(installed / "bin" / "ollama", cellar / "libexec" / "ollama")
    shutil.copytree(installed / "lib" / "ollama", cellar / "libexec" / "lib" / "ollama")
    script(cellar / "bin" / "ollama", f'#!/bin/sh\nexec {cellar}/libexec/ollama "$@"\n')
    monkeypatch.setenv("PATH", str(cellar / "bin"))
    assert shadow.find() == (cellar / "libexec" / "ollama", cellar / "libexec" / "lib" / "ollama")


@pytest.fixture
def system(executable, tmp_path, monkeypatch, runtime_programs):
    """A system in a folder with Ollama and its service, taken for the running one; its systemctl notes its calls."""
    top = tmp_path / "system"
    for folder in ("usr/local/bin", "usr/local/lib/ollama", "etc/systemd/system"):
        (top / folder).mkdir(parents=True)
    shutil.copy(executable, top / "usr/local/bin/ollama")
    script(top / "usr/local/lib/ollama/llama-server", THEIRS)
    (top / "etc/systemd/system/ollama.service").write_text("[Service]\nExecStart=/usr/local/bin/ollama serve\n")
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin/systemctl", f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ ! -e {tmp_path}/fails ]\n')
    (tmp_path / "bin/ollama").symlink_to(top / "usr/local/bin/ollama")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(service, "LIVE", top)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return top


def test_the_service_is_set_up_and_left_as_it_was(system, tmp_path, models):
    before = content(system)
    service.install(system)
    drop_in = (system / service.DROP_IN).read_text()
    pre, clear, start = re.findall(r"^Exec.*$", drop_in, re.MULTILINE)
    assert clear == "ExecStart="
    words = re.findall(r'"([^"]*)"|(\S+)', pre.replace("ExecStartPre=+", ""))
    subprocess.run([a or b for a, b in words], check=True)  # as systemd does, before each start
    program = re.fullmatch(r'ExecStart="(.*)" serve', start)[1]
    ours = subprocess.run([program, "serve", "--model", models[0], "--version"], capture_output=True, text=True)
    assert ours.returncode == 0 and building.cache.pin9() in ours.stdout + ours.stderr
    said = subprocess.run([program, "serve", "--model", models[1]], capture_output=True, text=True).stdout
    assert said.startswith("theirs ")
    assert (tmp_path / "calls").read_text() == "daemon-reload\ntry-restart ollama.service\n"
    with pytest.raises(UsageError, match="already installed"):
        service.install(system)
    service.uninstall(system)
    assert content(system) == before
    assert (tmp_path / "calls").read_text() == "daemon-reload\ntry-restart ollama.service\n" * 2
    with pytest.raises(UsageError, match="not installed"):
        service.uninstall(system)


def test_a_folder_of_drop_ins_stays(system):
    (system / service.DROP_IN).parent.mkdir()
    before = content(system)
    service.install(system)
    service.uninstall(system)
    assert content(system) == before


def test_a_service_that_cannot_be_set_up_is_left_as_it_was(system, tmp_path):
    before = content(system)
    (tmp_path / "fails").touch()
    with pytest.raises(EnvironmentFailed, match="systemctl daemon-reload"):
        service.install(system)
    assert content(system) == before
    (system / "etc/systemd/system/ollama.service").unlink()
    with pytest.raises(EnvironmentFailed, match="there is no ollama.service of systemd: use `gguf"):
        service.install(system)


def test_an_image_is_set_up_without_systemctl(system, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "LIVE", Path("/"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    service.install(system)
    assert '"/usr/local/bin/ollama" "/usr/local/lib/ollama"' in (system / service.DROP_IN).read_text()
    assert not (tmp_path / "calls").exists()


def test_only_root_sets_up_the_service(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["ollama", "install", "--system"]) == 6
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(r"only root may write it: run `sudo GGUF_SPLITQ_CACHE=.* ollama install --system`", said)


def test_the_container_image_is_a_shadow(executable, runtime_programs, models, tmp_path):
    """The last stage of the Dockerfile, in a folder in place of an image."""
    lines = (ROOT / "examples" / "ollama" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    last = lines[lines.index("FROM ollama/ollama") :]
    image = tmp_path / "image"
    for folder in ("usr/bin", "usr/lib/ollama", "opt/gguf-splitq/llama.cpp"):
        (image / folder).mkdir(parents=True)
    shutil.copy(executable, image / "usr/bin/ollama")
    script(image / "usr/lib/ollama/llama-server", THEIRS)
    _, archive, scripts = (line.split() for line in lines if line.startswith("COPY"))
    assert archive[2:] == ["/llama.cpp/build", "/opt/gguf-splitq/llama.cpp"]
    (image / "opt/gguf-splitq/llama.cpp/bin").symlink_to(runtime_programs)
    shutil.copytree(ROOT / scripts[1], f"{image}{scripts[2]}", dirs_exist_ok=True)
    command = next(line for line in last if line.startswith("RUN ")).split()[1:]
    subprocess.run([command[0], *(f"{image}{path}" for path in command[1:])], check=True)
    entry = re.search(r'^ENTRYPOINT \["(.*)"\]$', "\n".join(last), re.MULTILINE)[1]
    for model, said in zip(models, (building.cache.pin9(), "theirs "), strict=True):
        words = [f"{image}{entry}", "serve", "--model", model, "--version"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert said in done.stdout + done.stderr


@pytest.mark.skipif("GGUF_SPLITQ_OLLAMA" not in os.environ, reason="GGUF_SPLITQ_OLLAMA names no Ollama")
def test_a_real_ollama_runs_both(runtime_programs, demo_f16, tmp_path, monkeypatch):
    """Created, shown and run in one server: a container of ours in our llama.cpp, a q8_0 file in Ollama's own."""
    executable = Path(os.environ["GGUF_SPLITQ_OLLAMA"])
    monkeypatch.setattr(shadow, "PLACES", ())
    monkeypatch.setenv("PATH", f"{executable.parent}:{os.environ['PATH']}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    places = {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(tmp_path / "models"), "HOME": str(tmp_path)}
    places |= {"GGUF_SPLITQ_CACHE": str(building.cache.folder())}
    for name, value in places.items():
        monkeypatch.setenv(name, value)

    def ask(path, body=None):
        with urllib.request.urlopen(f"http://{host}{path}", body and json.dumps(body).encode(), timeout=300) as answer:
            return json.load(answer)

    def answers():
        try:
            return ask("/api/version")
        except urllib.error.URLError:
            return None

    theirs = shadow.find().libraries
    log = tmp_path / "log"
    with open(log, "w") as out, subprocess.Popen(gguf_splitq("serve"), stdout=out, stderr=out) as server:
        try:
            while not answers():
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            for kind, folder in (("sq4", runtime_programs), ("q8_0", theirs)):
                file = convert(demo_f16, kind, tmp_path / f"{kind}.gguf")
                assert cli.main(["ollama", "create", kind, str(file)]) == 0
                assert ask("/api/show", {"model": kind})["details"]["quantization_level"] == kind.upper()
                few = {"num_predict": 8, "temperature": 0}
                body = {"model": kind, "prompt": "Once upon a time", "stream": False, "options": few}
                said = ask("/api/generate", body)
                assert said["eval_count"] == 8 and said["response"].strip(), log.read_text()
                body = {
                    "model": kind,
                    "messages": [{"role": "user", "content": "Hello"}],
                    "stream": False,
                    "options": few,
                }
                assert ask("/api/chat", body)["message"]["content"]
                running = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
                runner = rf"^{re.escape(str(folder))}/llama-server --model {re.escape(str(tmp_path))}/models/blobs/"
                assert re.search(runner, running, re.MULTILINE), running
        finally:
            server.terminate()
