"""Plugins: the examples of CONTRIBUTING.md as plugin files, used with every command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.errors import UserError
from ebmkit.registry import check_plugins, load_plugin
from ebmkit.training import RunFolder, resolve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
PLUGINS = [f"example_{number}" for number in range(len(EXAMPLES))]
TRAIN = ["--dataset=bars", "--steps=2", "--device=cpu", "--no-evaluate"]
TRAIN += ["--backbone=two-layers", "--objective=ce+dsm+noisy-ce+margin", "--width=8"]
TRAIN += ["--head=quadratic", "--set=objective.noisy-ce.eps=4/255"]

SAMPLE = ["--count=2", "--steps=2", "--sampler=uniform-langevin"]
GUIDE = ["--guide=run", "--guidance=tempered"]

SCRIPT = """
import os
import sys

import torch

import ebmkit
from ebmkit.cli import main

plugins = sys.argv[1:]


def command(*words):
    sys.argv = ["ebmkit", *words, *(f"--plugin={{plugin}}" for plugin in plugins)]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words


if not (child := os.fork()):  # here no plugin is loaded before `load` names them
    command("train", *{train}, "--out=run")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
model = ebmkit.load("run", plugins=plugins)
assert model.denoise(torch.rand(2, 1, 8, 8), 25 / 255).shape == (2, 1, 8, 8)
command("train", "--resume=run", "--no-evaluate")
command("evaluate", "run", "--suite=score-norm", "--limit=20")
command("sample", "run", *{sample}, "--out=guided")
"""
"""In one process, because importing PyTorch takes longer than these commands."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that was trained, loaded, resumed, evaluated and sampled from.

    Each example is a separate plugin, so each must be complete.
    """
    folder = tmp_path_factory.mktemp("plugins")
    for name, text in zip(PLUGINS, EXAMPLES, strict=True):
        (folder / f"{name}.py").write_text(text)
    script = SCRIPT.format(train=TRAIN, sample=[*SAMPLE, "--label=vertical", *GUIDE])
    line = [sys.executable, "-c", script, *(f"{name}.py" for name in PLUGINS)]
    ended = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_each_example_is_shorter_than_40_lines():
    assert all(text.count("\n") < 40 for text in EXAMPLES)


@pytest.mark.slow
def test_a_run_records_its_plugins(trained):
    document = json.loads((trained / "run" / "model.json").read_text())
    assert [plugin["name"] for plugin in document["card"]["plugins"]] == PLUGINS
    assert document["model"]["backbone"] == {"kind": "two-layers", "width": 8}


@pytest.mark.slow
def test_run_with_plugins_can_be_evaluated_and_sampled_from(trained):
    assert (trained / "run" / "evaluation" / "score-norm.png").is_file()
    assert (trained / "guided" / "sampling.json").is_file()


@pytest.mark.slow
def test_run_without_its_plugins_is_refused_in_one_sentence(trained):
    with pytest.raises(UserError, match=r"needs the plugins 'example_0' .*, which are not loaded"):
        ebmkit.load(trained / "run")
    ended = ebmkit_command("sample", "run", "--out=no", cwd=trained)
    assert ended.returncode == 2
    assert "needs the plugins 'example_0'" in ended.stderr
    assert not (trained / "no").exists()
    with pytest.raises(UserError, match="needs the plugins 'example_0'"):
        resolve(RunFolder.open(trained / "run").config())


def test_changed_plugin_raises_a_warning(tmp_path):
    path = tmp_path / "harmless_parts.py"
    path.write_text("")
    plugin = load_plugin(path)
    check_plugins([plugin], "the run")
    with pytest.warns(UserWarning, match="is not the file that the run was trained with"):
        check_plugins([{"name": "harmless_parts", "sha256": "0" * 64}], "the run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def", "cannot be imported: SyntaxError"),
        ("from ebmkit.models import HEADS; HEADS['logit'] = None", "a head 'logit' already"),
    ],
)
def test_error_of_a_failing_plugin_is_one_sentence(tmp_path, text, message):
    path = tmp_path / f"failing_{abs(hash(text))}.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_plugin(path)


def test_missing_plugin_error_lists_the_accepted_forms():
    with pytest.raises(UserError, match="there is no plugin file"):
        load_plugin("nothing.py")
    with pytest.raises(UserError, match=r"entry point of the group ebmkit\.plugins"):
        load_plugin("no_such_module")
