# SPDX-License-Identifier: MIT
"""What the command line tells a newcomer."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_splitq import cli

ROOT = Path(__file__).parents[1]


def parsers(parser=None, name="gguf-splitq"):
    """Every parser: the program's, its commands', their actions'."""
    parser = parser or cli._parser()
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, sub in action.choices.items():
                yield from parsers(sub, f"{name} {command}")


PARSERS = dict(parsers())


def options(parser):
    return [action for action in parser._actions if action.option_strings and action.dest not in ("help", "version")]


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal(monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = PARSERS[name].format_help().splitlines()
    assert max(map(len, lines)) <= min(columns, 110)


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_says_what_it_does_and_what_happens_without(name):
    for action in options(PARSERS[name]):
        assert action.help, action.option_strings
        if action.nargs != 0 and not action.required:
            assert "default" in action.help or action.dest == "type", action.option_strings


def test_the_options_of_convert_are_in_groups():
    groups = [group for group in PARSERS["gguf-splitq convert"]._action_groups if group._group_actions]
    assert {"to which type", "calibration", "output", "memory and speed"} <= {group.title for group in groups}
    loose = [action.dest for group in groups if group.title == "options" for action in group._group_actions]
    assert loose == ["help"]


def test_the_program_alone_shows_the_journeys(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.JOURNEYS + "\n"
    words = [line for line in cli.JOURNEYS.splitlines() if not line.startswith("gguf-splitq convert")]
    assert max(map(len, words)) <= 80  # commands may be longer: a terminal wraps them, and they are copied whole


@pytest.mark.parametrize("text", "JOURNEYS CONVERT DEQUANTIZE REPACK INSPECT VALIDATE SERVE RUN OLLAMA RUNTIME".split())
def test_the_examples_are_commands_that_exist(text):
    joined = getattr(cli, text).replace("\\\n", " ").splitlines()
    found = [line.split("#")[0].split("|")[0].split() for line in joined if line.strip().startswith("gguf-splitq ")]
    assert found
    for words in found:
        args = vars(cli._parser().parse_args(words[1:]))  # ends the test where it cannot
        assert "run" in args


def test_completion_as_the_docs_give_it(tmp_path):
    pytest.importorskip("shtab")
    command = next(line for line in (ROOT / "docs" / "run.md").read_text().splitlines() if line.startswith("shtab "))
    words = command.split(">")[0].split()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)
    assert "--calib-tokens" in done.stdout and "dequantize" in done.stdout, done.stderr
