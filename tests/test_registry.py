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
from ebmkit.models import HEADS
from ebmkit.models.base import NetworkConfig
from ebmkit.registry import check_plugins, load_plugin
from ebmkit.training import RunFolder, resolve

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
PLUGINS = [f"example_{number}" for number in range(len(EXAMPLES))]
TRAIN = ["--dataset=bars", "--steps=2", "--device=cpu", "--no-evaluate"]
TRAIN += ["--backbone=two-layers", "--objective=ce+dsm+noisy-ce+margin", "--width=8"]
TRAIN += ["--head=quadratic", "--set=model.head.directions=3"]
TRAIN += ["--set=objective.noisy-ce.eps=4/255"]

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
    assert document["model"]["head"] == {"kind": "quadratic", "bias": False, "directions": 3}


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


# --- registrations -------------------------------------------------------------------------------

HALF = """
from typing import Literal

from ebmkit.models import HEADS, BackboneConfig, HeadConfig, HeadEntry, LogitHead


class HalfConfig(BackboneConfig):
    kind: Literal["half"] = "half"

    def build(self, in_channels):
        raise NotImplementedError


HEADS["half"] = HeadEntry("of a plugin", HeadConfig, LogitHead)
"""


@pytest.fixture
def isolated(tmp_path, monkeypatch):
    """A folder on ``sys.path``; modules, plugins and heads of the test are forgotten after it."""
    monkeypatch.setattr("ebmkit.registry._LOADED", {})
    monkeypatch.syspath_prepend(tmp_path)
    heads, kinds, modules = set(HEADS), set(NetworkConfig._classes), set(sys.modules)
    yield tmp_path
    for table, names in ((HEADS, heads), (NetworkConfig._classes, kinds), (sys.modules, modules)):
        for name in table.keys() - names:
            del table[name]


def write_distribution(folder, entry_point, text):
    """Write a module and the metadata of an installed distribution with an entry point."""
    (folder / "toy_parts.py").write_text(text)
    info = folder / "toy_parts-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ebmkit.plugins]\ntoy = {entry_point}\n")


REGISTER = """
from ebmkit.models import HEADS, HeadConfig, HeadEntry, LogitHead

def register():
    HEADS["of-a-function"] = HeadEntry("of a plugin", HeadConfig, LogitHead)

not_callable = 3
"""


def test_name_of_a_file_that_cannot_be_recorded_is_one_sentence(tmp_path):
    (tmp_path / "my parts.py").write_text("")
    ended = ebmkit_command("list", "heads", "--plugin=my parts.py", cwd=tmp_path)
    assert ended.returncode == 2
    assert "plugin 'my parts.py' cannot be recorded by this name" in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    ("entry_point", "head"), [("toy_parts", "half"), ("toy_parts:register", "of-a-function")]
)
def test_entry_point_is_a_module_or_a_function(isolated, entry_point, head):
    write_distribution(isolated, entry_point, HALF if head == "half" else REGISTER)
    plugin = load_plugin("toy")
    assert head in HEADS
    assert (plugin.name, len(plugin.sha256)) == ("toy", 64)
    assert load_plugin("toy") == plugin


def test_entry_point_that_is_no_function_is_refused(isolated):
    write_distribution(isolated, "toy_parts:not_callable", REGISTER)
    with pytest.raises(UserError, match=r"'toy_parts:not_callable', which is no function"):
        load_plugin("toy")


def test_registrations_of_a_failing_plugin_are_undone(isolated):
    """So the same plugin can be loaded after it is repaired."""
    path = isolated / "half.py"
    path.write_text(f"{HALF}\n1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_plugin(path)
    assert "half" not in HEADS
    assert "half" not in NetworkConfig._classes
    path.write_text(HALF)
    load_plugin(path)
    assert "half" in HEADS
    assert "half" in NetworkConfig._classes


def test_registrations_of_a_failing_function_are_undone(isolated):
    """Also those of its module, which is executed again."""
    write_distribution(isolated, "toy_parts:register", f"{HALF}\ndef register():\n    1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_plugin("toy")
    assert "half" not in HEADS
    assert "toy_parts" not in sys.modules
