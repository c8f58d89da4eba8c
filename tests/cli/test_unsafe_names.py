"""Commands with names that contain escape sequences; and a killed worker process."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from ebmkit_tests.support.command_line import ebmkit_command
from PIL import Image
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ebmkit.terminal import CleanConsole, clean, escape_markup, one_line, progress_bar, shown_name

pytestmark = pytest.mark.usefixtures("count_cost_roughly", "few_resamples")

UNSAFE_NAMES = ("\x1b]0;owned\x07cat", "dog\n\x1b[2Jdone", "$\\frac{bird$", "[red]\u202egnp")


def write_images(folder, count, seed):
    folder.mkdir(parents=True)
    g = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(g.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")


def command(*arguments, cwd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # the command line shows warnings
        return ebmkit_command(*arguments, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run trained on classes with unsafe names, and the result of the command."""
    home = tmp_path_factory.mktemp("names")
    for part in ("train", "test"):
        for number, name in enumerate(UNSAFE_NAMES):
            write_images(home / "set" / part / name, 8, number)
        (home / "set" / part / UNSAFE_NAMES[0] / "bad\x1b[2J\n.png").write_bytes(b"no image")
    small = ["--backbone", "gradresnet10", "--set", "model.backbone.width=8"]
    small += ["--steps", "2", "--device", "cpu"]
    data = ["--dataset", "folder", "--data-dir", "set", "--set", "dataset.unreadable=skip"]
    small += ["--set", "streams.classify.batch_size=8", "--set", "streams.denoise.batch_size=8"]
    result = command("train", *data, *small, "--out", "run", cwd=home)
    assert result.returncode == 0, result.stderr
    return home, result


def is_printable(text):
    return all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.slow
def test_train_and_evaluate_escape_names_in_their_output(trained):
    home, result = trained
    assert is_printable(result.stdout + result.stderr)
    assert "training images cannot be read and were skipped: " in result.stdout
    assert r"bad\x1b[2J\n.png" in result.stdout
    assert (home / "run" / "evaluation" / "confusion.png").is_file()  # despite the dollar signs
    evaluated = json.loads((home / "run" / "evaluation" / "classify.json").read_text())
    assert evaluated["images"] == 32
    assert evaluated["unreadable"]["count"] == 1
    assert r"bad\x1b[2J" in evaluated["unreadable"]["reasons"][0]


@pytest.mark.slow
def test_classify_escapes_names_in_its_output(trained):
    home, _ = trained
    image = home / "x\x1b]0;owned\x07\ny.png"
    (home / "set" / "test" / UNSAFE_NAMES[1] / "0.png").rename(image)
    result = command("classify", "run", image.name, "--top", 4, cwd=home)
    assert result.returncode == 0, result.stderr
    assert is_printable(result.stdout + result.stderr)
    assert r"\x1b]0;owned\x07" in result.stdout
    assert r"dog\n\x1b[2Jdone" in result.stdout


@pytest.mark.slow
def test_errors_escape_names(trained):
    home, _ = trained
    result = command("classify", "run", "no\x1b[2J\rsuch.png", cwd=home)
    assert result.returncode == 2
    assert is_printable(result.stdout + result.stderr)
    result = command("evaluate", "run", "--set", "dataset.unreadable=error", cwd=home)
    assert result.returncode == 2
    assert is_printable(result.stdout + result.stderr)
    assert "dataset.unreadable=skip skips such images" in result.stderr


@pytest.mark.parametrize("shown", [str, Text, lambda name: Text.assemble((name, "red"))])
def test_console_prints_no_control_characters(shown):
    for name in UNSAFE_NAMES:
        out = io.StringIO()
        console = CleanConsole(file=out, force_terminal=True, color_system=None, width=200)
        table = Table(title=shown(name))
        table.add_column(shown(name))
        table.add_row(shown(name))
        console.print(shown(name))
        console.print(table)
        assert not set("\x1b\x07\u202e") & set(out.getvalue())


def test_progress_bar_accepts_any_name():
    for name in (*UNSAFE_NAMES, "[/]", "[/bold]"):
        out = io.StringIO()
        console = CleanConsole(file=out, force_terminal=True, color_system=None, width=200)
        with Progress(console=console) as bar:
            bar.add_task(escape_markup(name))
        assert "\x1b]0;" not in out.getvalue()
    assert list(progress_bar([1, 2], "[/]", True)) == [1, 2]


def test_escapes_and_maximum_length_of_names():
    assert clean("plain é 猫 \n") == "plain é 猫 \n"
    assert clean("\udcff\x9b2J\u2028") == r"\udcff\x9b2J\u2028"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert len(shown_name("x" * 10**6)) <= 60


@pytest.mark.slow
def test_killed_worker_process_ends_the_command_in_one_sentence(tmp_path):
    for part in ("train", "val"):
        for number in range(2):
            write_images(tmp_path / "set" / part / str(number), 12, number)
    line = [sys.executable, "-m", "ebmkit", "train", "--dataset", "imagenet", "--out", "run"]
    line += ["--data-dir", "set", "--image-size", "8", "--steps", "100000", "--device", "cpu"]
    line += ["--objective", "ce", "--backbone", "gradresnet18", "--no-evaluate"]
    for setting in (
        *("dataset.workers=2", "model.backbone.width=8", "checkpoint_every=5"),
        *("streams.classify.batch_size=8", "streams.classify.augmentation.crop_size=8"),
        *("streams.classify.phases=[]", "validation_images=0", "log_every=1"),
    ):
        line += ["--set", setting]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("*.pt")), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"ebmkit" in cmdline(pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    last_line = err.strip().splitlines()[-1]
    what = "a worker process that reads images was killed by a signal, Killed;"
    assert last_line.startswith(f"ebmkit: {what}")
    assert "the last checkpoint is checkpoints/step-" in last_line
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for(found, process, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
