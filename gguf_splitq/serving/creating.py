# SPDX-License-Identifier: MIT
"""`ollama create`: a file becomes a model of a running Ollama, near or far, through its HTTP API.

Ollama's own `create` reads parameter count and quantization from the file, where rows of bytes count as weights; the
API takes them as `info`. What a server does is in its server/routes.go and server/create.go: data are kept under their
SHA-256 (`/api/blobs`), then a manifest names them (`/api/create`). No request takes data back: those that no manifest
names go when the server is started, if they are an hour old.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import urllib.parse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import display, options, output
from ..errors import EnvironmentFailed, UsageError
from ..files import container, gguf_file
from ..types import columns
from . import modelfile as modelfiles

LEAST = (0, 30)  # the first Ollama whose models run in llama-server
PORT = 11434
ASKING, WORKING = 10, 3600  # seconds to wait for an answer: to a question, and while the server hashes or copies
MOST = 1 << 24  # bytes of an answer
LONGEST = 300  # characters of a server's words


def create(
    name: str, file: str | Path, modelfile: str | Path | None = None, overwrite: bool = False, host: str | None = None
) -> str:
    """Make `file` the model `name` of the server at `host` and return the SHA-256 of the data.

    A file with the types' own ids is sent as a container, and shards as one file. modelfile: template, system prompt,
    parameters and so on. host: as in OLLAMA_HOST, which is asked when there is none. Raises UsageError for a name that
    is taken or none, EnvironmentFailed for a server that is not there, too old, or refuses, and the errors of both
    files.
    """
    given = options.OllamaCreate(name, file, modelfile, overwrite, host)
    given.check()
    more = modelfiles.fields(Path(modelfile)) if modelfile else {}
    server = Server(os.environ.get("OLLAMA_HOST", "") if host is None else host)
    with gguf_file.read(file) as source:
        server.require_version()
        server.require_name(name, overwrite)
        with display.Progress() as progress:
            size, pieces = gguf_file.stream(source, contained=True)
            sha = hashlib.sha256()
            for piece in progress.through("hashing", size, pieces):
                sha.update(piece)
            digest = f"sha256:{sha.hexdigest()}"
            if not server.has(digest):
                size, pieces = gguf_file.stream(source, contained=True)
                server.send(digest, size, progress.through(f"sending to {server.url}", size, pieces))
        about = info(source)
        server.create({"model": name, "files": {"model.gguf": digest}} | ({"info": about} if about else {}) | more)
    display.say(f"{name}: created on {server.url}" + (": `gguf-splitq ollama serve` is what runs it" if about else ""))
    return digest


def info(source: gguf_file.Gguf) -> dict[str, str]:
    """What `ollama show` shows of a file with our types, and nothing of others: Ollama knows these itself."""
    if not (ours := container.ours(source.infos)):
        return {}
    sides = columns.owners(source.tensors)
    largest = max((t for t in source.tensors if t.name in {name for name, *_ in ours}), key=lambda t: t.n_weights)
    label = source.get("gguf_splitq.type", str, "") or gguf_file.type_name(largest.type_id)
    weights = sum(t.n_weights for t in source.tensors if t.name not in sides)
    return {"parameter_size": display.parameters(weights), "quantization_level": label.upper()}


def address(text: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of what OLLAMA_HOST may hold, read as Ollama reads it (envconfig/config.go).

    An address that a server listens on everywhere stands for this machine. UsageError for another scheme.
    """
    text = text.strip().strip("\"'")
    scheme, given, rest = text.partition("://")
    default = {"http": 80, "https": 443}.get(scheme, PORT) if given else PORT
    if not given:
        scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
    if scheme not in ("http", "https"):
        raise UsageError(f"{text[:60]!r} has a scheme that Ollama has none of: give http://HOST:PORT")
    place, _, path = rest.partition("/")
    found = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([^:\[\]]*)", place)
    host, port = (found[1] or found[2], found[3]) if found else (place.strip("[]"), "")
    number = int(port) if re.fullmatch(r"\d{1,5}", port, re.ASCII) and int(port) < 1 << 16 else default
    with contextlib.suppress(ValueError):
        if (ip := ipaddress.ip_address(host)).is_unspecified:
            host = "127.0.0.1" if ip.version == 4 else "::1"
    if not re.fullmatch(r"[\w.:%-]*", host, re.ASCII) or not re.fullmatch(r"[\x21-\x7e]*", path):
        raise UsageError(f"{text[:60]!r} is no address of an Ollama: give http://HOST:PORT")
    return scheme, host or "127.0.0.1", number, path.strip("/")


class Server:
    """A running Ollama."""

    def __init__(self, host: str):
        self.scheme, self.host, self.port, self.path = address(host)
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.url = "/".join(filter(None, (f"{self.scheme}://{shown}:{self.port}", self.path)))

    def require_version(self) -> None:
        """EnvironmentFailed unless an Ollama answers that is new enough; one built from source says 0.0.0."""
        status, answer = self.ask("GET", "/api/version")
        version = str(answer.get("version", ""))
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if status != 200 or not numbers:
            raise EnvironmentFailed(f"{self.url}: what answers there is no Ollama: check OLLAMA_HOST or --host")
        if (0, 0) < (int(numbers[1]), int(numbers[2])) < LEAST:
            raise EnvironmentFailed(f"{self.url}: Ollama {version[:40]} cannot run these files: install 0.30 or later")

    def require_name(self, name: str, overwrite: bool) -> None:
        """UsageError for a name that cannot be, or that a model has which is not to be replaced."""
        status, answer = self.ask("POST", "/api/show", {"model": name})
        if status == 400:
            raise UsageError(f"{name}: {self.url} takes no such name ({words(answer)}): give another")
        if status == 200 and not overwrite:
            raise UsageError(f"{name}: {self.url} has a model of this name: pass --overwrite or another name")
        if status not in (200, 404) and not (overwrite and status >= 500):  # one that is damaged may be replaced
            raise self.refusal(f"to look for {name}", status, answer)

    def has(self, digest: str) -> bool:
        """Whether the data are there already."""
        return self.ask("HEAD", f"/api/blobs/{digest}")[0] == 200

    def send(self, digest: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Upload the data of a file; the server keeps nothing of what does not arrive whole."""
        status, answer = self.ask("POST", f"/api/blobs/{digest}", pieces, size, WORKING)
        if status not in (200, 201):
            raise self.refusal("the data, and keeps none of them", status, answer)

    def create(self, request: dict[str, Any]) -> None:
        """Have the manifest written."""
        status, answer = self.ask("POST", "/api/create", request | {"stream": False}, wait=WORKING)
        if status != 200 or answer.get("status") != "success":
            raise self.refusal(f"to create {request['model']}, and drops the data when it starts again", status, answer)

    def ask(
        self, method: str, path: str, body: Any = None, size: int | None = None, wait: float = ASKING
    ) -> tuple[int, dict[str, Any]]:
        """(status, JSON object) that a request is answered with; {} for another body.

        body: pieces of `size` bytes, or what becomes JSON. wait: seconds. Raises EnvironmentFailed without an answer.
        """
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=wait)
        headers = {"Content-Type": "application/json" if size is None else "application/octet-stream"}
        if size is not None:
            headers["Content-Length"] = str(size)
        elif body is not None:
            body = json.dumps(body).encode()
        target = urllib.parse.quote(f"/{self.path}{path}" if self.path else path, safe="/:%")
        try:
            with contextlib.closing(connection):
                try:
                    connection.request(method, target, body, headers)
                except (BrokenPipeError, ConnectionResetError):
                    if size is None:
                        raise  # otherwise the server has said why it takes no more
                response = connection.getresponse()
                return response.status, output.json_object(response.read(MOST))
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            cause = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if wait == ASKING:
                raise EnvironmentFailed(
                    f"{self.url}: no Ollama answers ({cause}): start it, or give its address with --host"
                ) from error
            raise EnvironmentFailed(
                f"{self.url}: the connection broke ({cause}): see Ollama's log, then run the command again"
            ) from error

    def refusal(self, what: str, status: int, answer: dict[str, Any]) -> EnvironmentFailed:
        """The one sentence for what the server says no to."""
        said = words(answer) or f"status {status}"
        return EnvironmentFailed(f"{self.url}: Ollama refuses {what} ({said}): see its log")


def words(answer: dict[str, Any]) -> str:
    """What a server says of an error, on one line."""
    said = " ".join(str(answer.get("error", "")).split())
    return said if len(said) <= LONGEST else said[:LONGEST] + "..."
