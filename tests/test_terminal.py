"""Progress without a terminal, closed pipes, and encodings other than UTF-8."""

import importlib.machinery
import io
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ebmkit import terminal
from ebmkit.terminal import (
    COUNT,
    CleanConsole,
    ProgressBar,
    console,
    escape_markup,
    is_live,
    progress_bar,
    replace_unencodable,
)
from ebmkit.training.callbacks import TrainingBar


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_progress_without_terminal_is_some_lines_with_the_time_left(clock):
    """An hour of seconds: the first line soon, then fewer and fewer, the last at the end."""
    file = io.StringIO()
    with ProgressBar(f"step {COUNT}", to=CleanConsole(file=file), get_time=lambda: clock[0]) as bar:
        task = bar.add_task(escape_markup("row [a]"), total=3600)
        for step in range(1, 3601):
            clock[0] = float(step)
            bar.update(task, completed=step)
    lines = file.getvalue().splitlines()
    assert len(lines) < 40
    assert lines[0].split() == ["row", "[a]", "step", "10/3,600", "0:00:10", "left", "59:50"]
    assert lines[-1].split()[2:] == ["step", "3,600/3,600", "1:00:00", "left", "00:00"]


@pytest.mark.parametrize("widgets", [True, False])
def test_notebook_has_a_bar_if_it_has_widgets_else_lines(clock, monkeypatch, widgets):
    shown = []

    class Output(list):
        """As the widget: what is displayed in its context is in it."""

        clear_output = __enter__ = __exit__ = lambda self, *args, **options: None

    attributes = {
        "IPython": {},
        "IPython.display": {"display": lambda *one, **options: shown.extend(one)},
        "ipywidgets": {"Output": Output},
    }
    for name, values in attributes.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    find = terminal.importlib.util.find_spec
    monkeypatch.setattr(
        terminal.importlib.util, "find_spec",
        lambda name: None if name == "ipywidgets" and not widgets else find(name),
    )  # fmt: skip
    notebook = CleanConsole(force_jupyter=True, file=io.StringIO())
    assert is_live(notebook) == widgets
    with ProgressBar(f"step {COUNT}", to=notebook) as bar:
        task = bar.add_task("training", total=4)
        clock[0] = 20
        bar.update(task, completed=2)
        bar.refresh()
    texts = [one.text if hasattr(one, "text") else type(one).__name__ for one in shown]
    bars = [text for text in texts if "━" in text]
    assert ("Output" in texts) == bool(bars) == widgets
    assert any("training" in text and "step 2/4" in text for text in texts)


def test_short_work_prints_no_line(clock, capsys):
    assert list(progress_bar(range(3), "reading", True)) == [0, 1, 2]
    clock[0] += 100
    assert list(progress_bar(range(3), "reading", False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_quiet_output_has_no_progress_and_verbose_output_every_logged_step(
    clock, capsys, monkeypatch
):
    def work():
        for number in range(3):
            clock[0] += 100
            yield number

    assert list(progress_bar(work(), "reading", True, total=3)) == [0, 1, 2]
    assert "reading" in capsys.readouterr().err
    monkeypatch.setattr(console, "quiet", True)
    assert list(progress_bar(work(), "reading", True, total=3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "quiet", False)
    monkeypatch.setattr(console, "verbose", True)
    bar = TrainingBar()
    bar.on_start(SimpleNamespace(config=SimpleNamespace(steps=400), step=0))
    for step in (1, 2):
        bar.report({"kind": "train", "ce": 0.5, "images_per_s": 8.0, "step": step})
    bar.on_end(None)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"step {step}/400  ce 0.5  8 images/s" for step in (1, 2)]


def test_training_shows_name_step_total_and_loss_without_terminal(clock, capsys):
    row = {"kind": "train", "ce": 0.5, "images_per_s": 8.0}
    trainer = SimpleNamespace(config=SimpleNamespace(steps=400), step=0)
    bar = TrainingBar("table1 a")
    bar.on_start(trainer)
    for step in (10, 20, 30):
        clock[0] += 8
        bar.report(row | {"step": step})
    bar.report({"kind": "validation", "step": 30, "accuracy": 0.5})
    bar.report(row | {"step": 400})
    bar.on_end(trainer)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    first = ["table1 a: training", "step 20/400", "ce 0.5", "8 images/s"]
    assert lines[0][:4] == first
    assert lines[1] == ["table1 a: step 30/400", "held-out: accuracy 0.5"]
    assert lines[2][1] == "step 400/400"
    assert len(lines) == 3


def test_output_into_a_closed_pipe_is_discarded():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        console = CleanConsole(file=pipe)
        console.say("a")
        console.say("b")
        pipe.write("c")  # flushed when the file is closed


def test_characters_that_stdout_cannot_encode_are_replaced(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    replace_unencodable()
    CleanConsole().say("é žluť")
    stdout.flush()
    assert stdout.buffer.getvalue().decode("cp1252") == "é žlu?\n"
