"""What a person sees: the TensorBoard page of a real run, in a real browser."""

import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@contextmanager
def tensorboard(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in server.stderr:
            if "Press CTRL+C" in line:
                break
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")
def test_the_page_draws_learning_and_forgetting(suite_run):
    from playwright.sync_api import sync_playwright

    with tensorboard(suite_run) as address, sync_playwright() as playwright:
        assert urllib.request.urlopen(address, timeout=30).status == 200
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        tags = "learn/accuracy|half_review_guard|trainable_parameters"
        page.goto(f"{address}/?tagFilter={tags}#timeseries")
        page.wait_for_selector("line-chart", timeout=90_000)
        page.wait_for_timeout(3000)  # let the lines finish drawing
        page.screenshot(path=suite_run / "tensorboard.png")
        text = re.sub(r"\s", "", page.inner_text("body"))  # the page breaks a tag's name into parts
        charts = page.locator("line-chart").count()
        browser.close()
    for tag in ("forgetting/half_review_guard", "retained/half_review_guard", "learn/accuracy"):
        assert tag in text
    assert re.search(r"(adapter|schedule)/trainable_parameters", text)
    assert charts >= 5
