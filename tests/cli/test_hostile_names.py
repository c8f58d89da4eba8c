"""Names that speak to the terminal, through the real commands; and a reading process that dies."""

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

pytestmark = pytest.mark.usefixtures("counted_once", "few_resamples")

SPEAKS = ("\x1b]0;owned\x07cat", "dog\n\x1b[2Jdone", "$\\frac{bird$", "[red]\u202egnp")


def pictures(place, count, seed):
    place.mkdir(parents=True)
    g = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(g.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / f"{i}.png")


def command(*arguments, cwd):
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # shown, as the command line does
        return ebmkit_command(*arguments, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of classes whose names speak, and a run that was trained on it."""
    home = tmp_path_factory.mktemp("names")
    for part in ("train", "test"):
        for number, name in enumerate(SPEAKS):
            pictures(home / "set" / part / name, 8, number)
        (home / "set" / part / SPEAKS[0] / "bad\x1b[2J\n.png").write_bytes(b"no picture")
    small = ["--backbone", "gradresnet10", "--set", "model.backbone.width=8"]
    small += ["--steps", "2", "--device", "cpu"]
    data = ["--dataset", "folder", "--data-dir", "set", "--set", "dataset.unreadable=skip"]
    small += ["--set", "streams.classify.batch_size=8", "--set", "streams.denoise.batch_size=8"]
    ended = command("train", *data, *small, "--out", "run", cwd=home)
    assert ended.returncode == 0, ended.stderr
    return home, ended


def harmless(text):
    return all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.slow
def test_training_and_evaluating_show_names_and_nothing_more(trained):
    home, ended = trained
    assert harmless(ended.stdout + ended.stderr)
    assert "training images cannot be read and were skipped: " in ended.stdout
    assert r"bad\x1b[2J\n.png" in ended.stdout
    assert (home / "run" / "evaluation" / "confusion.png").is_file()  # dollar signs and all
    evaluated = json.loads((home / "run" / "evaluation" / "classify.json").read_text())
    assert evaluated["images"] == 32
    assert evaluated["unreadable"]["count"] == 1
    assert r"bad\x1b[2J" in evaluated["unreadable"]["reasons"][0]


@pytest.mark.slow
def test_classify_shows_names_and_nothing_more(trained):
    home, _ = trained
    picture = home / "x\x1b]0;owned\x07\ny.png"
    (home / "set" / "test" / SPEAKS[1] / "0.png").rename(picture)
    ended = command("classify", "run", picture.name, "--top", 4, cwd=home)
    assert ended.returncode == 0, ended.stderr
    assert harmless(ended.stdout + ended.stderr)
    assert r"\x1b]0;owned\x07" in ended.stdout
    assert r"dog\n\x1b[2Jdone" in ended.stdout


@pytest.mark.slow
def test_errors_show_names_and_nothing_more(trained):
    home, _ = trained
    ended = command("classify", "run", "no\x1b[2J\rsuch.png", cwd=home)
    assert ended.returncode == 2
    assert harmless(ended.stdout + ended.stderr)
    ended = command("evaluate", "run", "--set", "dataset.unreadable=error", cwd=home)
    assert ended.returncode == 2
    assert harmless(ended.stdout + ended.stderr)
    assert "dataset.unreadable=skip skips such images" in ended.stderr


@pytest.mark.parametrize("shown", [str, Text, lambda name: Text.assemble((name, "red"))])
def test_no_way_to_the_screen_lets_commands_through(shown):
    for name in SPEAKS:
        out = io.StringIO()
        console = CleanConsole(file=out, force_terminal=True, color_system=None, width=200)
        table = Table(title=shown(name))
        table.add_column(shown(name))
        table.add_row(shown(name))
        console.print(shown(name))
        console.print(table)
        assert not set("\x1b\x07\u202e") & set(out.getvalue())


def test_a_bar_takes_any_name():
    for name in (*SPEAKS, "[/]", "[/bold]"):
        out = io.StringIO()
        console = CleanConsole(file=out, force_terminal=True, color_system=None, width=200)
        with Progress(console=console) as bar:
            bar.add_task(escape_markup(name))
        assert "\x1b]0;" not in out.getvalue()
    assert list(progress_bar([1, 2], "[/]", True)) == [1, 2]


def test_what_is_spelled_out():
    assert clean("plain é 猫 \n") == "plain é 猫 \n"
    assert clean("\udcff\x9b2J\u2028") == r"\udcff\x9b2J\u2028"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert len(shown_name("x" * 10**6)) <= 60


@pytest.mark.slow
def test_a_killed_reading_process_ends_the_command_in_one_sentence(tmp_path):
    for part in ("train", "val"):
        for number in range(2):
            pictures(tmp_path / "set" / part / str(number), 12, number)
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
    told = err.strip().splitlines()[-1]
    what = "a worker process that reads images was killed by a signal, Killed;"
    assert told.startswith(f"ebmkit: {what}")
    assert "the last checkpoint is checkpoints/step-" in told
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def cmdline(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_for(found, process, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.1)
