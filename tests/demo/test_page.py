"""The demo page: its parts as HTML, its errors, and the whole page in a browser."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from ebmkit_tests.support.sampling_runs import save_run
from PIL import Image

from ebmkit.cli import demo as command
from ebmkit.demo import page
from ebmkit.demo.compute import Classes

CHROMIUM = Path("/usr/bin/chromium")
QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-component-update",
         "disable-background-networking", "disable-sync")  # fmt: skip


def test_class_table_is_sorted_and_escapes_names():
    found = Classes(torch.tensor([0.1, 0.7, 0.2]).log(), -3.0)
    html = page.class_table(found, ["cat", "<script>", "dog"])
    assert re.findall(r"<td>([^<%]+)</td><td><div", html) == ["&lt;script&gt;", "dog", "cat"]
    assert "70.0 %" in html
    assert "-0.36" in html  # log 0.7
    assert "<script>" not in html


def test_picture_is_the_image():
    x = torch.rand(3, 5, 4)
    html = page.picture(x, "a & b", "<i>")
    assert "a &amp; b" in html
    assert "&lt;i&gt;" in html
    import base64
    import io

    data = base64.b64decode(re.search(r'base64,([^"]+)"', html)[1])
    assert Image.open(io.BytesIO(data)).size == (4, 5)


def test_gray_of_a_gradient_is_zero():
    gradient = torch.tensor([-2.0, 0.0, 1.0])
    assert page.signed(gradient).tolist() == [0.0, 0.5, 0.75]


def test_without_gradio_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    ended = ebmkit_command("demo", tmp_path, cwd=tmp_path)
    assert ended.returncode == 2
    assert "uv sync --extra demo" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_port_in_use(tmp_path, monkeypatch):
    """The error comes before a model is loaded."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = ebmkit_command("demo", "digits-joint", "--port", port, cwd=tmp_path)
    assert ended.returncode == 2
    assert f"cannot serve port {port}" in ended.stderr
    assert ended.stderr.count("\n") == 1


@contextlib.contextmanager
def served(run):
    """Address of ``ebmkit demo`` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "ebmkit", "demo", str(run), "--port", str(port)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert "http" in line
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 380])
def test_in_a_browser(tmp_path, width):
    """Upload an image, move the noise, attack and sample; nothing is loaded from elsewhere."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    Image.new("L", (20, 20), 200).save(tmp_path / "bright.png")
    faults, elsewhere = [], []
    with served(save_run(tmp_path / "run")) as address, api.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=str(CHROMIUM), args=[f"--{name}" for name in QUIET]
        )
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.set_default_timeout(120_000)
        tab.on("console", lambda one: faults.append(one.text) if one.type == "error" else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda one: elsewhere.append(one.url))
        tab.goto(address)
        tab.wait_for_selector("#classes table")
        assert tab.locator("#classes tr").count() == 1 + 3  # the heads and three classes
        before = tab.locator("#denoised img").first.get_attribute("src")
        tab.locator("#image input[type=file]").first.set_input_files(tmp_path / "bright.png")
        tab.wait_for_function(
            "old => document.querySelector('#denoised img').src != old", arg=before
        )
        tab.locator("#noise input[type=range]").fill("80")
        tab.wait_for_selector("#denoised >> text=sigma 80/255")
        assert tab.locator("#denoised figure").count() == 3
        tab.get_by_role("tab", name="Attack").click()
        tab.wait_for_selector("#attacked >> text=Adversarial gradient")
        tab.get_by_role("tab", name="Sample").click()
        tab.locator("#draw").click()
        tab.wait_for_selector("#samples figure")
        assert tab.locator("#samples figure").count() == 8
        overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        browser.close()
    assert not faults
    assert overflow <= 0
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
