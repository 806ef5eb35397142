# SPDX-License-Identifier: MIT
"""`ollama create` against a stand-in of the server's API that checks digests, order and fields, and a real Ollama."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import crafted
import ollama
import pytest

from gguf_splitq import cli, display
from gguf_splitq.convert import convert
from gguf_splitq.errors import EnvironmentFailed, InputError, UnsupportedError, UsageError
from gguf_splitq.files import gguf_file
from gguf_splitq.repack import repack
from gguf_splitq.runtime import cache
from gguf_splitq.serving import creating, modelfile
from gguf_splitq.serving.creating import create

REAL = os.environ.get("GGUF_SPLITQ_OLLAMA")  # an installed Ollama's executable


class Ollama(ThreadingHTTPServer):
    """The endpoints that `create` uses. fail: path's beginning -> what to do instead of answering."""

    daemon_threads = True

    def __init__(self, version="0.30.1"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.version, self.blobs, self.models, self.asked, self.fail = version, {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, content=None):
        body = b"" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        server, path = self.server, self.path
        server.asked.append((self.command, path.partition("sha256")[0]))
        for start, action in server.fail.items():
            if f"{self.command} {path}".startswith(start):
                return action(self)
        if path == "/api/version":
            return self.answer(200, {"version": server.version})
        if path.startswith("/api/blobs/sha256:"):
            digest = path.rpartition("/")[2]
            if self.command == "HEAD":
                return self.answer(200 if digest in server.blobs else 404)
            data = self.body()
            found = f"sha256:{hashlib.sha256(data).hexdigest()}"
            if found != digest:
                return self.answer(400, {"error": f"digest mismatch, expected {digest!r}, got {found!r}"})
            server.blobs[digest] = data
            return self.answer(201)
        asked = json.loads(self.body())
        if path == "/api/show":
            if "!" in asked["model"]:
                return self.answer(400, {"error": "invalid model name"})
            found = server.models.get(asked["model"])
            return self.answer(200, found) if found else self.answer(404, {"error": "model not found"})
        assert path == "/api/create"
        ((name, digest),) = asked["files"].items()
        if not name.endswith(".gguf") or digest not in server.blobs:
            return self.answer(400, {"error": "blob not found"})
        try:
            ollama.Header(server.blobs[digest])
        except ollama.Refused as error:
            return self.answer(500, {"error": str(error)})
        if "{{ bad" in asked.get("template", ""):
            return self.answer(400, {"error": "template error:\n unclosed action"})
        server.models[asked["model"]] = asked
        return self.answer(200, {"status": "success"})

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    do_GET = do_POST = do_HEAD = handle_one

    def log_message(self, *_):
        pass


@contextmanager
def running(**more):
    with Ollama(**more) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(creating, "WORKING", 5)
    with running() as found:
        monkeypatch.setenv("OLLAMA_HOST", found.url)
        yield found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file in sq4 and cq3, with its types' own ids."""
    folder = tmp_path_factory.mktemp("model")
    floats = crafted.write_gguf(folder / "f.gguf", crafted.llama_tensors(hidden=128, ffn=128))
    return convert(floats, "sq4", folder / "m-sq4.gguf", tensor_type=["ffn_up=cq3"], container=False, threads=2)


ORDER = [("GET", "/api/version"), ("POST", "/api/show"), ("HEAD", "/api/blobs/"), ("POST", "/api/blobs/")]
ORDER += [("POST", "/api/create")]


def test_a_file_becomes_a_model(server, model, tmp_path):
    digest = create("mine", model)
    assert server.asked == ORDER
    packed = repack(model, True, tmp_path / "packed.gguf").read_bytes()
    assert server.blobs == {digest: packed} and digest == f"sha256:{hashlib.sha256(packed).hexdigest()}"
    with gguf_file.read(model) as file:
        weights = sum(t.n_weights for t in file.tensors if not t.name.endswith(".columns"))
    made = server.models["mine"]
    assert made["info"] == {"parameter_size": display.parameters(weights), "quantization_level": "SQ4"}
    assert made["files"] == {"model.gguf": digest} and made.keys() == {"model", "files", "info", "stream"}


def test_the_command(server, model, capsys):
    assert cli.main(["ollama", "create", "mine", str(model)]) == 0
    assert cli.main(["ollama", "create", "mine", str(model)]) == 2
    assert cli.main(["ollama", "create", "mine", str(model), "--overwrite", "--host", server.url]) == 0
    assert cli.main(["ollama", "create", "mine", "none.gguf"]) == 3
    assert cli.main(["ollama", "create", "mine", str(model), "--modelfile", "none"]) == 3
    assert cli.main(["ollama", "create", "mine", str(model), "--host", "127.0.0.1:1"]) == 6
    assert capsys.readouterr().err.count("gguf-splitq: ") == 4


def test_data_that_are_there_are_not_sent_again(server, model, tmp_path):
    digest = create("mine", model)
    server.asked.clear()
    packed = repack(model, True, tmp_path / "packed.gguf")
    assert create("other", packed) == digest and create("mine", model, overwrite=True) == digest
    assert server.asked == 2 * (ORDER[:3] + ORDER[4:])


def test_a_file_of_stock_types_is_sent_as_it_is(server, tmp_path):
    floats = crafted.write_gguf(tmp_path / "f.gguf", crafted.llama_tensors())
    digest = create("floats", floats)
    assert server.blobs[digest] == floats.read_bytes() and "info" not in server.models["floats"]


def test_a_modelfile(server, model, tmp_path):
    path = tmp_path / "Modelfile"
    path.write_bytes(
        b'\xef\xbb\xbf# a comment\r\nFROM ./other.gguf\nTEMPLATE """{{ .Prompt }}\n  two  """\nsystem You are\tbrief.  '
        b'\nPARAMETER temperature 0.5\nPARAMETER num_ctx 4096\nparameter use_mmap False\nPARAMETER stop "<|end|> "\n'
        b'PARAMETER stop  User:\nMESSAGE user "Hello\nthere"\nMESSAGE assistant Hi: you\nLICENSE """MIT\n"""\n'
        b"LICENSE CC0\n  # another\nREQUIRES 0.31.0\nRENDERER x\nPARSER y"
    )
    create("mine", model, path)
    assert {k: v for k, v in server.models["mine"].items() if k not in ("model", "files", "info", "stream")} == {
        "template": "{{ .Prompt }}\n  two  ",
        "system": "You are\tbrief.",
        "parameters": {"temperature": 0.5, "num_ctx": 4096, "use_mmap": False, "stop": ["<|end|> ", "User:"]},
        "messages": [{"role": "user", "content": "Hello\nthere"}, {"role": "assistant", "content": "Hi: you"}],
        "license": ["MIT\n", "CC0"],
        "requires": "0.31.0",
        "renderer": "x",
        "parser": "y",
    }


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("FROM a\nTEMPLATE \"\"\"x\n\ny", InputError, "line 2: the quotes are not closed"),
        ("FROM a\n\nFOO bar", InputError, "line 3: 'foo' is none of FROM, TEMPLATE"),
        ("SYSTEM", InputError, "line 1: SYSTEM has no value"),
        ("PARAMETER num_ctx", InputError, "line 1: PARAMETER has no value"),
        ("PARAMETER num_ctx many", InputError, "'many' is no value of 'num_ctx'"),
        ("PARAMETER num_ctx ٣", InputError, "no value of"),
        ("MESSAGE tool x", InputError, "a message is of system, user, assistant, not of 'tool'"),
        ("ADAPTER ./lora.gguf", UnsupportedError, "ADAPTER brings another file"),
        ("SYSTEM \xe9", InputError, "not UTF-8 at byte 7"),
    ],
)  # fmt: skip
def test_what_is_no_modelfile_is_refused_before_anything_is_asked(server, model, tmp_path, text, kind, words):
    path = tmp_path / "Modelfile"
    path.write_bytes(text.encode("latin-1") if "\xe9" in text else text.encode())
    with pytest.raises(kind, match=f"Modelfile: .*{words}"):
        create("mine", model, path)
    assert server.asked == []


def test_a_modelfile_that_is_none(tmp_path):
    with pytest.raises(InputError, match="not a regular file"):
        modelfile.fields(tmp_path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(InputError, match="no Modelfile"):
        modelfile.fields(tmp_path / "large")


def test_a_name_that_is_taken_needs_overwrite(server, model):
    create("mine", model)
    server.asked.clear()
    with pytest.raises(UsageError, match="mine: .* has a model of this name: pass --overwrite"):
        create("mine", model)
    with pytest.raises(UsageError, match=r"mine!: .* \(invalid model name\): give another"):
        create("mine!", model, overwrite=True)
    assert server.asked == 2 * ORDER[:2]
    create("mine", model, overwrite=True)


@pytest.mark.parametrize("version", ["0.29.9", "0.1.0"])
def test_a_server_that_is_too_old(monkeypatch, model, version):
    with running(version=version) as server:
        with pytest.raises(EnvironmentFailed, match=f"Ollama {version} cannot run these files: install 0.30 or later"):
            create("mine", model, host=server.url)
        assert server.asked == ORDER[:1]


@pytest.mark.parametrize("version", ["0.30.0-rc1", "0.34.1", "1.0.0", "0.0.0"])
def test_servers_that_are_new_enough(model, version):
    with running(version=version) as server:
        create("mine", model, host=f" '{server.url}/' ")
        assert "mine" in server.models


def close(handler):
    handler.close_connection = True


def cut(handler):
    """The connection ends in the middle of the data."""
    handler.rfile.read(1000)
    handler.close_connection = True


def full(handler):
    """A disk that is full: the answer comes before the data are read."""
    handler.answer(500, {"error": "write /blobs: no space left on device"})
    handler.close_connection = True


def told(status, content):
    def action(handler):
        handler.body() if handler.command == "POST" else None
        handler.answer(status, content)

    return action


FAILURES = {
    "no Ollama": ("GET /api/version", told(200, {"hello": 1}), "what answers there is no Ollama"),
    "a page": ("GET /api/version", told(200, b"<html>"), "what answers there is no Ollama"),
    "a list": ("GET /api/version", told(200, [1]), "what answers there is no Ollama"),
    "no right": ("GET /api/version", told(401, {"error": "x"}), "what answers there is no Ollama"),
    "silence": ("GET /api/version", close, "no Ollama answers"),
    "show": ("POST /api/show", told(500, {"error": "a\nb\x1b[2J"}), r"refuses to look for mine \(a b\\x1b\[2J\)"),
    "show, closed": ("POST /api/show", close, "no Ollama answers"),
    "head, closed": ("HEAD", close, "no Ollama answers"),
    "data, cut": ("POST /api/blobs", cut, "the connection broke"),
    "disk": ("POST /api/blobs", full, "refuses the data, .*no space left|the connection broke"),
    "data": ("POST /api/blobs", told(500, {"error": "x" * 5000}), r"keeps none of them \(x{300}\.\.\.\)"),
    "create": ("POST /api/create", told(500, {"error": "no"}), r"refuses to create mine, and drops the data .* \(no\)"),
    "create, no word": ("POST /api/create", told(500, b"["), r"\(status 500\)"),
    "create, not done": ("POST /api/create", told(200, {"status": "writing manifest"}), "refuses to create mine"),
    "create, closed": ("POST /api/create", close, "the connection broke"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence_and_no_model(server, model, case):
    at, action, said = FAILURES[case]
    server.fail[at] = action
    with pytest.raises(EnvironmentFailed, match=said) as error:
        create("mine", model)
    assert str(error.value).startswith(server.url) and len(str(error.value)) < 600
    assert not server.models
    server.fail.clear()
    create("mine", model)
    assert list(server.models) == ["mine"]


def test_a_template_that_is_refused(server, model, tmp_path):
    (tmp_path / "Modelfile").write_text("TEMPLATE {{ bad")
    with pytest.raises(EnvironmentFailed, match=r"refuses to create mine, .* \(template error: unclosed action\)"):
        create("mine", model, tmp_path / "Modelfile")


def test_a_file_that_changes_while_it_is_read(server, model, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(model.read_bytes())

    def changed(handler):
        with open(path, "r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(os.urandom(32))
        handler.answer(404)

    server.fail["HEAD"] = changed
    with pytest.raises(EnvironmentFailed, match=r"refuses the data, and keeps none of them \(digest mismatch"):
        create("mine", path)
    assert not server.blobs


def test_a_server_that_is_not_there(model):
    with running() as server:
        url = server.url
    with pytest.raises(EnvironmentFailed, match=f"{url}: no Ollama answers .*: start it"):
        create("mine", model, host=url)
    with pytest.raises(EnvironmentFailed, match="no Ollama answers"):
        create("mine", model, host="host..invalid")


def test_a_damaged_file_is_refused_before_anything_is_asked(server, model, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut.gguf"):
        create("mine", tmp_path / "cut.gguf")
    assert server.asked == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ("http", "127.0.0.1", 11434, "")),
        ("  'localhost' ", ("http", "localhost", 11434, "")),
        ("1.2.3.4", ("http", "1.2.3.4", 11434, "")),
        (":56789", ("http", "127.0.0.1", 56789, "")),
        ("example.com:56789", ("http", "example.com", 56789, "")),
        ("example.com:56789/", ("http", "example.com", 56789, "")),
        ("http://1.2.3.4", ("http", "1.2.3.4", 80, "")),
        ("https://1.2.3.4", ("https", "1.2.3.4", 443, "")),
        ("https://1.2.3.4:8000/a/b", ("https", "1.2.3.4", 8000, "a/b")),
        ("example.com:66000", ("http", "example.com", 11434, "")),
        ("example.com:x", ("http", "example.com", 11434, "")),
        ("0.0.0.0:99", ("http", "127.0.0.1", 99, "")),
        ("0.0.0.0", ("http", "127.0.0.1", 11434, "")),
        ("[::1]", ("http", "::1", 11434, "")),
        ("::1", ("http", "::1", 11434, "")),
        ("[::]:1337", ("http", "::1", 1337, "")),
        ("[::1]:1337", ("http", "::1", 1337, "")),
        ("ollama.com", ("https", "ollama.com", 443, "")),
    ],
)
def test_addresses_are_read_as_ollama_reads_them(text, found):
    assert creating.address(text) == found


@pytest.mark.parametrize("text", ["ftp://a", "http://a b", "http://a/\r\nHost: b", "http://ä", "a\x1b[2J"])
def test_what_is_no_address(text):
    with pytest.raises(UsageError):
        creating.address(text)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0"), (4230, "4K"), (4_226_304, "4.23M"), (7_000_000, "7M"), (7_615_616_512, "7.6B"), (2 * 10**9, "2B")],
)  # fmt: skip
def test_parameters_are_written_as_ollama_writes_them(count, words):
    assert display.parameters(count) == words


@pytest.mark.skipif(REAL is None, reason="GGUF_SPLITQ_OLLAMA names no Ollama")
def test_a_real_ollama_makes_shows_runs_and_deletes_a_model(runtime_programs, demo_f16, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    places = {"OLLAMA_HOST": host, "OLLAMA_MODELS": tmp_path / "models", "HOME": tmp_path}
    places |= {"GGUF_SPLITQ_CACHE": cache.folder(), "PATH": f"{Path(REAL).parent}:{os.environ['PATH']}"}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))

    def ask(method, path, **body):
        status, answer = creating.Server(host).ask(method, path, body, wait=300)
        return answer | {"http": status}

    def answers():
        try:
            return ask("GET", "/api/version")
        except EnvironmentFailed:
            return None

    name, command = "gguf-splitq-test", [sys.executable, "-m", "gguf_splitq", "ollama", "serve"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while not answers():
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
            (tmp_path / "Modelfile").write_text('TEMPLATE "{{ .Prompt }}"\nPARAMETER num_ctx 512\n')
            file = convert(demo_f16, "sq4", tmp_path / "demo-sq4.gguf")
            create(name, file, tmp_path / "Modelfile")
            with pytest.raises(UsageError, match="has a model of this name"):
                create(name, file)
            shown = ask("POST", "/api/show", model=name)
            assert shown["details"]["quantization_level"] == "SQ4" and shown["details"]["parameter_size"] == "4.20M"
            assert shown["template"] == "{{ .Prompt }}" and "num_ctx" in shown["parameters"]
            said = ask("POST", "/api/generate", model=name, prompt="It was", stream=False, options={"num_predict": 8})
            assert said["response"].strip(), (tmp_path / "log").read_text()
            assert ask("DELETE", "/api/delete", model=name)["http"] == 200
            assert ask("POST", "/api/show", model=name)["http"] == 404
        finally:
            server.terminate()
