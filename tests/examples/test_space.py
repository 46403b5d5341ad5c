# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The page of examples/space in a headless browser: pip install gradio playwright, and Debian's chromium."""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


SPACE = Path(__file__).parents[2] / "examples" / "space"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# from the move of the slider to the picture, as the browser sees it
MEASURE = """
async (value) => {
  const slider = document.querySelector('#viscosity input[type=range]');
  const image = () => document.querySelector('#field img').src;
  const before = image(), start = performance.now();
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, value);
  slider.dispatchEvent(new Event('input', {bubbles: true}));
  while (image() === before) {
    if (performance.now() - start > 60000) return -1;
    await new Promise(requestAnimationFrame);
  }
  return performance.now() - start;
}
"""


@pytest.fixture(scope="module")
def address():
    """The page, started as a Space starts it."""
    pytest.importorskip("gradio")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=env)
    try:
        for _ in range(400):
            assert process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20).read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def page(address):
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(180_000)
        page.goto(address)
        page.wait_for_selector("#residual img")
        page.wait_for_selector("#viscosity input[type=range]")
        yield page
        browser.close()


@pytest.mark.slow
def test_the_slider_changes_the_picture_and_a_step_the_numbers(page, tmp_path):
    numbers = page.locator("#numbers")
    first = {name: page.locator(f"#{name} img").get_attribute("src") for name in ("field", "residual")}
    milliseconds = [page.evaluate(MEASURE, str(0.02 + 0.004 * step)) for step in range(1, 20)]
    assert min(milliseconds) > 0
    print("slider to picture, ms: median", round(statistics.median(milliseconds)), [round(m) for m in milliseconds])
    second = {name: page.locator(f"#{name} img").get_attribute("src") for name in first}
    assert first["field"] != second["field"] and first["residual"] != second["residual"]
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('nu = 0.0960')")
    predicted = float(re.search(r"mean square ([\d.e-]+\d)", numbers.inner_text())[1])
    page.locator("#refine").click()
    page.wait_for_function("document.querySelector('#numbers').innerText.includes('refined by one step')")
    refined = float(re.search(r"mean square ([\d.e-]+\d)", numbers.inner_text())[1])
    assert refined < 2 * predicted  # the points of the picture are not those of the fit
    path = Path(os.environ.get("PEFT_LOTRA_SCREENSHOT", tmp_path / "space.png"))
    page.screenshot(path=str(path))
    assert path.stat().st_size > 10_000


def test_the_folder_is_a_space():
    """What the Hub reads of README.md, and that the files of a Space are there."""
    header = (SPACE / "README.md").read_text().split("---")[1]
    for entry in ("sdk: gradio", "app_file: app.py", "license: apache-2.0"):
        assert entry in header
    assert {path.name for path in SPACE.iterdir()} >= {"app.py", "requirements.txt", "burgers.py", "family"}
    assert "peft-lotra" in (SPACE / "requirements.txt").read_text()
