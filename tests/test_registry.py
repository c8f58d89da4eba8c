"""Plugins: the examples of CONTRIBUTING, as a user's file, through every command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ebmkit
from ebmkit.errors import UserError
from ebmkit.registry import check_plugins, load_plugin
from ebmkit.training import RunFolder, resolve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
TRAIN = ["--dataset=bars", "--steps=2", "--device=cpu", "--no-evaluate"]
TRAIN += ["--backbone=two-layers", "--objective=ce+dsm+noisy-ce", "--width=8"]
TRAIN += ["--set=head=quadratic", "--set=objective.noisy-ce.eps=4/255"]

SAMPLE = ["--count=2", "--steps=2", "--sampler=uniform-langevin"]
GUIDE = ["--guide=run", "--guidance=tempered"]


def command(*words, cwd, plugin="parts.py"):
    given = [*words, "--plugin", plugin] if plugin else words
    line = [sys.executable, "-m", "ebmkit", *map(str, given)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "parts.py").write_text("\n\n".join(EXAMPLES))
    ended = command("train", *TRAIN, "--out=run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_each_example_is_shorter_than_40_lines_and_stands_alone(tmp_path):
    for number, text in enumerate(EXAMPLES):
        assert text.count("\n") < 40
        (tmp_path / f"example_{number}.py").write_text(text)
    lines = "; ".join(f"import example_{number}" for number in range(len(EXAMPLES)))
    ended = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True)
    assert ended.returncode == 0, ended.stderr


def test_a_run_records_its_plugin_and_is_loaded_with_it_alone(trained):
    document = json.loads((trained / "run" / "model.json").read_text())
    assert [plugin["name"] for plugin in document["card"]["plugins"]] == ["parts"]
    assert document["model"]["backbone"] == {"kind": "two-layers", "width": 8}
    with pytest.raises(UserError, match=r"needs the plugin 'parts', which is not loaded"):
        ebmkit.load(trained / "run")
    script = (
        "import ebmkit, torch\n"
        "model = ebmkit.load('run', plugins=['parts.py'])\n"
        "print(model.denoise(torch.rand(2, 1, 8, 8), 25 / 255).shape)"
    )
    line = [sys.executable, "-c", script]
    ended = subprocess.run(line, cwd=trained, capture_output=True, text=True)
    assert "torch.Size([2, 1, 8, 8])" in ended.stdout, ended.stderr


def test_without_its_plugin_a_run_is_refused_in_one_sentence(trained):
    ended = command("sample", "run", "--out=no", cwd=trained, plugin=None)
    assert ended.returncode == 2
    assert "needs the plugin 'parts'" in ended.stderr
    assert not (trained / "no").exists()
    with pytest.raises(UserError, match="needs the plugin 'parts'"):
        resolve(RunFolder.open(trained / "run").config())


def test_with_it_a_run_resumes_evaluates_and_samples(trained):
    for words in (
        ["train", "--resume=run", "--no-evaluate"],
        ["evaluate", "run", "--suite=score-norm", "--limit=20"],
        ["sample", "run", *SAMPLE, "--label=vertical", *GUIDE, "--out=guided"],
    ):
        ended = command(*words, cwd=trained)
        assert ended.returncode == 0, ended.stderr
    assert (trained / "run" / "evaluation" / "score-norm.png").is_file()


def test_a_changed_plugin_is_warned_of(tmp_path):
    path = tmp_path / "harmless_parts.py"
    path.write_text("")
    plugin = load_plugin(path)
    check_plugins([plugin], "the run")
    with pytest.warns(UserWarning, match="is not the file that the run was trained with"):
        check_plugins([{"name": "harmless_parts", "sha256": "0" * 64}], "the run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("def", "cannot be imported: SyntaxError"),
        ("from ebmkit.models import HEADS; HEADS['logit'] = None", "a head 'logit' already"),
    ],
)
def test_a_plugin_that_fails_is_told_in_one_sentence(tmp_path, text, words):
    path = tmp_path / f"failing_{abs(hash(text))}.py"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_plugin(path)


def test_a_plugin_that_is_not_there_is_told_what_could_be_named():
    with pytest.raises(UserError, match="there is no plugin file"):
        load_plugin("nothing.py")
    with pytest.raises(UserError, match=r"entry point of the group ebmkit\.plugins"):
        load_plugin("no_such_module")
