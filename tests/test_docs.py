# SPDX-License-Identifier: MIT
"""The docs: pages build, links lead somewhere, and what they name exists. Nothing is fetched."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def anchors(page: Path) -> set[str]:
    """What `page#...` may name, by GitHub's rule: small letters, no punctuation, a dash for each space."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", lines, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists() and not (done.stdout + done.stderr).strip()


def test_where_to_go_exists():
    section = (ROOT / "docs" / "architecture.md").read_text().split("## To change something")[1].split("\n## ")[0]
    named = re.findall(r"`((?:gguf_splitq|patches|tests|docs|experiments)/[\w./-]*)`", section)
    assert len(named) > 30
    for name in named:
        assert (ROOT / name).exists(), name
    makefile = (ROOT / "Makefile").read_text()
    for targets in re.findall(r"`make ([a-z -]+)`", section):
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets.split()), targets
