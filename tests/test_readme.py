# SPDX-License-Identifier: MIT
"""README.md's commands work as they stand there: run in order, on the demo model under the public model's name."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import crafted
import pytest

from gguf_splitq import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZE = "3M"  # of the demo model, with types of ours in it


def commands() -> list[str]:
    section = README.split("## Three ways")[1].split("\n## ")[0]
    return [line for block in re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]


def lessened(line: str) -> str:
    """The same command with less work, on a model that is here."""
    line = line.replace(HUB_ID, f"./{HUB_ID.split('/')[1]}").replace(
        "--calib self", "--calib self --calib-tokens 2048 --hessians h.gguf"
    )
    return line.replace("100M", SIZE).replace("--chunks 20", "--chunks 1").replace(" -st", " -st -n 4")


@pytest.fixture
def place(tmp_path, runtime_programs):
    """A folder with the model and README's texts in it, and the environment in which `gguf-splitq` is this checkout."""
    shutil.copytree(crafted.DEMO, tmp_path / HUB_ID.split("/")[1])
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gguf-splitq"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m gguf_splitq "$@"\n')
    program.chmod(0o755)
    return tmp_path, os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_the_three_ways(place):
    folder, env = place
    lines = commands()
    assert len(lines) >= 5
    for line in lines:
        if "llama-server" in line:
            serve(lessened(line), folder, env)
        else:
            shell = ["bash", "-c", lessened(line)]
            done = subprocess.run(
                shell, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    made = {path.name for path in folder.glob("*.gguf")}
    model = HUB_ID.split("/")[1]
    assert made == {f"{model}-q4_k.gguf", f"{model}-{SIZE}.gguf", f"{model}-f16.gguf", "quick.gguf", "h.gguf"}


def serve(line: str, folder: Path, env: dict[str, str]) -> None:
    """Start a server, ask it for three tokens by the API that README names, end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {line} --port {port}"], cwd=folder, env=env, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        question = {"prompt": "It was a dark", "max_tokens": 3}
        url, data = f"http://127.0.0.1:{port}/v1/completions", json.dumps(question).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        server.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_the_program_alone_shows_the_same_commands():
    shown = [line for line in cli.JOURNEYS.splitlines() if re.match(r'gguf-splitq convert|"\$\(', line)]
    assert shown and set(shown) <= set(commands())


def test_readme_is_one_page():
    assert len(README.splitlines()) < 150
