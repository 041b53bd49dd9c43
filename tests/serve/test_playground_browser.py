"""The playground in a real headless Chromium, served by the real server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow
SCENES = Path(__file__).parent / "browser.test.mjs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _node() -> str:
    """Node with a WebSocket, or a skip."""
    node = shutil.which("node")
    if node is None or CHROMIUM is None:
        pytest.skip("needs Node and Chromium")
    asked = [node, "--experimental-websocket", "-p", "typeof WebSocket"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    if found.stdout.strip() != "function":
        pytest.skip("needs a Node with WebSocket (20.10 or later)")
    return node


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "unmask", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"unmask serves .* at (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
                yield found[1]
                break
        else:
            pytest.fail("the server ended: " + "".join(lines))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_page(url: str, tmp_path: Path) -> None:
    """Runs, replays, inspects, resumes, edits and refuses; a picture is kept where UNMASK_SCREENSHOT says."""
    node, picture = _node(), Path(os.environ.get("UNMASK_SCREENSHOT", tmp_path / "playground.png")).absolute()
    told = {"UNMASK_URL": url, "UNMASK_CHROMIUM": str(CHROMIUM), "UNMASK_SCREENSHOT": str(picture)}
    environment = {**os.environ, **told}
    command = [node, "--experimental-websocket", "--test", str(SCENES)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-1000:]
    passed = re.search(r"^# pass (\d+)$", ran.stdout, re.MULTILINE)
    assert passed and int(passed[1]) >= 6, ran.stdout[-1000:]
    assert picture.read_bytes().startswith(b"\x89PNG")
