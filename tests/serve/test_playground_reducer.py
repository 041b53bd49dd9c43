"""The playground's files: the laws of its event reducer (in Node), and what a strict content policy asks of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import unmask

STATIC = Path(unmask.__file__).parent / "serve" / "static"
LAWS = Path(__file__).parent / "events.test.mjs"
FOREIGN = re.compile(r"https?://|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(")


def test_reducer() -> None:
    """Replaying equals the state then, any cut of the bytes gives the same events, states are values."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node")
    environment = {**os.environ, "UNMASK_EVENTS": (STATIC / "events.js").as_uri()}
    command = [node, "--test", str(LAWS)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    passed = re.search(r"^# pass (\d+)$", ran.stdout, re.MULTILINE)
    assert passed and int(passed[1]) >= 10, ran.stdout[-1000:]


def test_page_loads_nothing_from_elsewhere() -> None:
    """No script or style in the page itself, no address of another host, no HTML made of text."""
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
            file.name
        )
    for name in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert (STATIC / name).is_file(), name


def test_files_stay_small() -> None:
    """The whole page is less than a picture, and no file of it is longer than one of the package."""
    files = list(STATIC.iterdir())
    assert sum(file.stat().st_size for file in files) < 60_000
    assert all(len(file.read_text().splitlines()) < 400 for file in files)
