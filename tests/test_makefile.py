# SPDX-License-Identifier: MIT
"""What `make` does to the machine."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def commands(*targets):
    """What make would run, the virtual environment being there."""
    stamps = [f"-o.venv/{name}.stamp" for name in ("run", "test", "plot", "docs")]
    return subprocess.run(
        ["make", "-n", *stamps, *targets], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_only_cross_tools_installs_system_packages():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z-]*):.*##", makefile, re.MULTILINE)
    assert {"demo", "test", "cross-tools"} <= set(targets)
    for target in targets:
        installs = re.search(r"sudo|apt-get install", commands(target)) is not None
        assert installs == (target == "cross-tools"), target


def test_ci_runs_the_readmes_tests_and_the_quick_checks():
    script = (ROOT / ".ci" / "run").read_text()
    for target in ("test", "lint", "types", "docs", "patches-check"):
        assert re.search(rf"^(exec )?make\b.*\b{target}\b", script, re.MULTILINE)
        assert commands(target)
