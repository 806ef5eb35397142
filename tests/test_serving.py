# SPDX-License-Identifier: MIT
"""`serve`, `run` and the server that Ollama starts: the built programs on the demo's sq4 file."""

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import crafted
import pytest

from gguf_splitq.convert import convert
from gguf_splitq.errors import InputError, UsageError
from gguf_splitq.runtime import building, cache, patching
from gguf_splitq.serving import programs

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# As Ollama 0.30 to 0.34 starts the runner, first to see what it is, then for a model.
PROBE = "--port {port} --host 127.0.0.1 --no-webui --offline --verbose"
MODEL = (
    "--model {model} --port {port} --host 127.0.0.1 --no-webui --offline -c 512 -np 1 --log-verbosity 4 "
    "--no-log-prefix --no-log-timestamps --load-mode none --flash-attn auto -b 512 -ub 512 --context-shift --keep 4"
)


@pytest.fixture(scope="module")
def model(runtime_programs, tmp_path_factory):
    return convert(crafted.DEMO, "sq4", tmp_path_factory.mktemp("model") / "demo-sq4.gguf")


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command, log, ready, port=None):
    """A process whose output went to `log`, from the time that it has the line `ready` or, with a port, is healthy."""
    with open(log, "w") as out, subprocess.Popen(list(map(str, command)), stdout=out, stderr=out) as process:
        try:
            while not re.search(ready, log.read_text(errors="replace")) or (port and not healthy(port)):
                assert process.poll() is None, log.read_text(errors="replace")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()


def healthy(port):
    try:
        return ask(port, "/health") == {"status": "ok"}
    except (urllib.error.URLError, ConnectionError):
        return False


def ask(port, path, body=None):
    data = body and json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def gguf_splitq(*words):
    return [sys.executable, "-m", "gguf_splitq", *map(str, words)]


def test_serve_answers_as_openai_does_and_sends_its_page(model, port, tmp_path):
    with running(gguf_splitq("serve", model, "--port", port), tmp_path / "log", "", port):
        messages = [{"role": "user", "content": "Once upon a time"}]
        answer = ask(port, "/v1/chat/completions", {"messages": messages, "max_tokens": 8})
        assert answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 8
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert page.read() == (programs.PAGE / "index.html").read_bytes()
        made_for = json.loads((crafted.DEMO / "config.json").read_text())["max_position_embeddings"]
        assert ask(port, "/props")["default_generation_settings"]["n_ctx"] == made_for


class Browser:
    """A Chromium without windows, spoken to in the DevTools protocol: JSON that ends with NUL, through two pipes."""

    def __init__(self, profile):
        (reads, self.out), (self.into, writes) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}"]

        def descriptors():  # 3 and 4 by convention
            for number, copy in enumerate([fcntl.fcntl(pipe, fcntl.F_DUPFD, 10) for pipe in (reads, writes)], 3):
                os.dup2(copy, number)

        with open(profile / "said", "w") as said:
            self.process = subprocess.Popen(
                [CHROMIUM, *options], preexec_fn=descriptors, close_fds=False, stdout=said, stderr=said
            )
        os.close(reads), os.close(writes)
        self.count, self.rest = 0, b""

    def call(self, method, session=None, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert (part := os.read(self.into, 1 << 16)), "Chromium ended"
                self.rest += part
            answer, _, self.rest = self.rest.partition(b"\0")
            if (answer := json.loads(answer)).get("id") == self.count:
                return answer["result"]

    def page(self, address):
        """A function that evaluates JavaScript in the page at `address`."""
        target = self.call("Target.createTarget", url=address)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return lambda code: self.call("Runtime.evaluate", session, expression=code)["result"].get("value")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_chats_in_a_browser(model, port, tmp_path):
    with running(gguf_splitq("serve", model, "--port", port, "-n", "8"), tmp_path / "log", "", port):
        browser = Browser(tmp_path)
        try:
            page = browser.page(f"http://127.0.0.1:{port}/")
            until(lambda: page("document.getElementById('model')?.textContent") == "demo-sq4.gguf")
            for number, text in enumerate(["Once upon a time", "<b>and then</b>"], 1):
                page(f"document.getElementById('text').value = '{text}'; document.getElementById('send').click()")
                until(lambda n=number: page("document.querySelectorAll('[data-done]').length") == n)
            said = json.loads(page("JSON.stringify([...document.querySelectorAll('#chat p')].map(p => p.textContent))"))
            assert said[0::2] == ["Once upon a time", "<b>and then</b>"] and all(len(a) > 1 for a in said[1::2])
            assert page("document.querySelectorAll('.error, #chat b').length") == 0
        finally:
            browser.process.kill()
            browser.process.wait()


def until(true, limit=60):
    """Wait until something is true; it is an error when that takes minutes."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_run_is_a_chat_in_the_terminal(model):
    command = gguf_splitq("run", model, "-p", "Once upon a time", "-n", "8", "--single-turn")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"> Once upon a time\s+\S+", done.stdout)


@pytest.mark.parametrize(
    "options, environ, chosen",
    [
        ([], {}, ["--ctx-size", "8192"]),
        (["--threads", "2"], {}, ["--ctx-size", "8192", "--threads", "2"]),
        (["-c", "0"], {}, ["-c", "0"]),
        (["--ctx-size", "9"], {}, ["--ctx-size", "9"]),
        ([], {"LLAMA_ARG_CTX_SIZE": "9"}, []),
    ],
)
def test_defaults_give_way(tmp_path, options, environ, chosen):
    file = crafted.write_gguf(tmp_path / "m.gguf", crafted.llama_tensors())
    assert programs.command(str(file), options, environ) == ["--model", str(file), *chosen]


def test_what_cannot_be_served(tmp_path):
    with pytest.raises(InputError, match="absent.gguf: cannot be read .*check the path"):
        programs.serve(str(tmp_path / "absent.gguf"), [])
    with pytest.raises(UsageError, match="a folder, not a GGUF file: make one with `gguf-splitq convert"):
        programs.run(str(tmp_path), [])
    (tmp_path / "text.gguf").write_text("Once upon a time there was no GGUF file.\n")
    with pytest.raises(InputError, match="text.gguf"):
        programs.serve(str(tmp_path / "text.gguf"), [])
    with pytest.raises(UsageError, match="-m among the options of llama.cpp: the model is a.gguf"):
        programs.serve("a.gguf", ["-m", "b.gguf"])


def test_the_server_does_what_ollama_asks_of_a_runner(runtime_programs, port, tmp_path):
    server = runtime_programs / "llama-server"
    with running([server, *PROBE.format(port=port).split()], tmp_path / "log", r"system_info:.*\n"):
        pass
    done = subprocess.run([server, "--list-devices"], capture_output=True, text=True)
    assert done.returncode == 0 and "Available devices:" in done.stdout


def test_the_server_runs_a_model_as_ollama_asks_for_it(model, runtime_programs, port, tmp_path):
    words = MODEL.format(model=model, port=port).split()
    with running([runtime_programs / "llama-server", *words], tmp_path / "log", "", port):
        tokens = ask(port, "/tokenize", {"content": "Once upon a time"})["tokens"]
        assert ask(port, "/detokenize", {"tokens": tokens})["content"].strip() == "Once upon a time"
        prompt = ask(port, "/apply-template", {"messages": [{"role": "user", "content": "Once"}]})["prompt"]
        assert "Once" in prompt
        said = ask(port, "/completion", {"prompt": prompt, "n_predict": 4, "temperature": 0})
        assert said["tokens_predicted"] == 4 and said["content"]
        chat = ask(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4})
        assert chat["choices"][0]["message"]["role"] == "assistant"
    log = (tmp_path / "log").read_text()
    found = dict(re.findall(r"[a-z_]\w*: +(\S+) +(?:model|KV|compute|output) buffer size *= *([\d.]+) *MiB", log))
    assert float(found["CPU"]) > 0
    assert {"model", "KV", "compute", "output"} <= set(re.findall(r"(\w+) buffer size", log))
    if sys.platform != "darwin":  # a build without a GPU does not say `offloaded N/M layers`, so Ollama counts none
        assert "offloaded" not in log


@pytest.mark.parametrize(
    "more", ["--no-jinja --chat-template chatml", "--cache-type-k q8_0 --cache-type-v q8_0 -t 2 -ngl 0"]
)
def test_the_server_takes_what_ollama_may_add(model, runtime_programs, port, tmp_path, more):
    words = f"{MODEL} {more}".format(model=model, port=port).split()
    with running([runtime_programs / "llama-server", *words], tmp_path / "log", "", port):
        chat = ask(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 2})
        assert chat["choices"][0]["message"]["role"] == "assistant"


def test_the_server_embeds_as_ollama_asks(model, runtime_programs, port, tmp_path):
    """Embedding models say in their metadata what --pooling says here."""
    words = f"{MODEL} --embedding --pooling mean".format(model=model, port=port).split()
    with running([runtime_programs / "llama-server", *words], tmp_path / "log", "", port):
        answer = ask(port, "/v1/embeddings", {"input": ["Once upon a time"]})
        assert len(answer["data"][0]["embedding"]) == 256


@pytest.fixture(scope="module")
def llama_cpp_python():
    """The folder of llama-cpp-python of the pinned llama.cpp without its own libraries, from the package index."""
    folder = cache.folder() / "llama-cpp-python"
    if not folder.exists():
        with cache.exclusive("llama-cpp-python.lock"), cache.scratch() as scratch:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", scratch / "new"]
            env = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
            done = subprocess.run([*pip, patching.pin()["sdist"], "diskcache"], env=env, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no llama-cpp-python: {done.stderr.strip().splitlines()[-1]}")
            (scratch / "new").rename(folder)
    return folder


def test_llama_cpp_python_generates_what_our_programs_do(model, runtime_programs, llama_cpp_python, port, tmp_path):
    code = (
        "import itertools, json, sys, llama_cpp\n"
        "llama = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False)\n"
        "tokens = llama.generate(llama.tokenize(b'Once upon a time'), temp=0, repeat_penalty=1)\n"
        "print(json.dumps(list(itertools.islice(tokens, 16))))\n"
    )
    env = os.environ | {"PYTHONPATH": str(llama_cpp_python), "LLAMA_CPP_LIB_PATH": str(runtime_programs)}
    done = subprocess.run([sys.executable, "-c", code, model], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = ["-m", model, "--port", port, "-fa", "off", "-c", "256"]
    with running([runtime_programs / "llama-server", *words], tmp_path / "log", "", port):
        assert generated(port) == json.loads(done.stdout)


def generated(port):
    """The 16 tokens that a server finds most likely behind four words."""
    body = {"prompt": "Once upon a time", "n_predict": 16, "temperature": 0, "return_tokens": True}
    tokens = ask(port, "/completion", body)["tokens"]
    assert len(tokens) == 16
    return tokens


def test_a_build_can_be_moved(model, port, tmp_path):
    """Installed, moved, and without any variable or folder of ours: the programs run and find their libraries."""
    where = subprocess.run(
        gguf_splitq("runtime", "install", tmp_path / "first"), capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(where) == tmp_path / "first" / "bin"
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    assert {"LICENSE", "LICENSE-llama.cpp"} <= {path.name for path in moved.iterdir()}
    home = str(building.path().parents[1])
    assert not [path for path in (moved / "bin").iterdir() if home in str(path.resolve())]
    for program in building.PROGRAMS:
        listed = subprocess.run(["ldd", moved / "bin" / program], capture_output=True, text=True)
        if sys.platform == "linux":
            assert home not in listed.stdout and str(moved / "bin" / "libllama.so.0") in listed.stdout
    said = []
    for folder in (building.path(), moved / "bin"):
        nothing_set = ["env", "-i", folder / "llama-server", "-m", model, "--port", port]
        with running(nothing_set, tmp_path / "log", "", port):
            said.append(generated(port))
    assert said[0] == said[1]


@pytest.mark.skipif(sys.platform != "linux", reason="nm of binutils")
def test_an_archive_may_choose_its_cpu_back_end_at_run_time(runtime_programs):
    """In an archive that is a module of its own, so nothing may be linked with it but libggml, by the one function."""

    def symbols(path, which):
        command = ["nm", "-D", which, path]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {
            line.split()[-1] for line in lines if re.search(r" [TDBRU] \w*(ggml|splitq|sdr|columns|quantize)", line)
        }

    back_end = symbols(runtime_programs / "libggml-cpu.so", "--defined-only")
    assert "ggml_backend_cpu_reg" in back_end
    files = [*runtime_programs.glob("lib*.so"), *(runtime_programs / name for name in building.PROGRAMS)]
    others = [path for path in files if "ggml-cpu" not in path.name]
    shared = {path.name: symbols(path, "--undefined-only") & back_end for path in others}
    assert {name: found for name, found in shared.items() if found} == {"libggml.so": {"ggml_backend_cpu_reg"}}


def commands(title):
    """The lines of the first code block under a heading of docs/run.md."""
    section = (ROOT / "docs" / "run.md").read_text().split(f"# {title}\n")[1]
    return re.search(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def desk(model, demo_f16, tmp_path):
    """A folder as the docs assume it: both files, `gguf-splitq` in PATH, a home."""
    desk = tmp_path / "desk"
    (desk / "path").mkdir(parents=True)
    (desk / "model-sq4.gguf").symlink_to(model)
    (desk / "model-f16.gguf").symlink_to(demo_f16)
    program = desk / "path" / "gguf-splitq"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m gguf_splitq "$@"\n')
    program.chmod(0o755)
    return desk


def do(desk, lines, **env):
    env = {"PATH": f"{desk}/path:/usr/bin:/bin", "HOME": str(desk), "GGUF_SPLITQ_CACHE": str(cache.folder())} | env
    done = subprocess.run(
        ["/bin/sh", "-ec", lines],
        cwd=desk,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_docs_ways_to_run_a_file(desk, port, llama_cpp_python):
    chat, page = commands("A chat, a page, an API").splitlines()
    assert "Exiting" in do(desk, chat.split("#")[0])
    serve = f"cd {desk} && PATH={desk}/path:$PATH && exec {page.split('#')[0]} --port {port}"
    with running(["sh", "-c", serve], desk / "log", "", port):
        assert ask(port, "/v1/models")["data"]
    assert "It was a dark" in do(desk, commands("llama.cpp's programs"))
    install, run = commands("Python").splitlines()
    assert patching.pin()["sdist"] in install and "-DLLAMA_BUILD=OFF" in install
    (desk / "your_program.py").write_text("import llama_cpp; print(llama_cpp.llama_supports_mmap())\n")
    (desk / "path" / "python").symlink_to(sys.executable)
    assert do(desk, run, PYTHONPATH=str(llama_cpp_python)).strip() == "True"


def test_the_docs_way_without_python(desk, model):
    """A build that was copied, an F16 file, and a system without Python: the file is the converter's."""
    do(desk, commands("Another machine").splitlines()[0])
    (desk / "bin").symlink_to(desk / "llama.cpp" / "bin")
    (desk / "model-sq4.gguf").unlink()
    (desk / "none").mkdir()
    lines = "".join(f"command -v {python} && exit 1;" for python in ("python", "python3", "gguf-splitq"))
    said = do(desk, f"{lines} {commands('llama-quantize, without Python')}", PATH=str(desk / "none"))
    assert "Exiting" in said
    theirs, ours = (crafted.read_gguf(file)[1] for file in (desk / "model-sq4.gguf", model))
    assert {name: (kind, data.tobytes()) for name, (kind, data) in theirs.items()} == {
        name: (kind, data.tobytes()) for name, (kind, data) in ours.items()
    }
