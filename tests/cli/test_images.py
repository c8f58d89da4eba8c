"""The commands ``ebmkit sample`` and ``ebmkit restore``."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from ebmkit_tests.support.sampling_runs import save_run
from PIL import Image

from ebmkit.sampling.entry import ReplayBuffer
from ebmkit.sampling.jobs import restore
from ebmkit.sampling.jobs.chains import Record
from ebmkit.sampling.jobs.job import SamplingJob
from ebmkit.training import RunFolder

QUICK = ["--steps", 6, "--set", "beta=0.5", "--device", "cpu"]


def assert_refused(result, *messages):
    """Check for one sentence on stderr and exit code 2."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in messages:
        assert text in result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with runs and images."""
    folder = tmp_path_factory.mktemp("place")
    save_run(folder / "run")
    save_run(folder / "jem", sigma_range=None, objective="jem")
    (folder / "jem" / "checkpoints").mkdir()
    buffer = ReplayBuffer(torch.rand(6, 1, 8, 8), num_classes=3)
    RunFolder(folder / "jem").save_checkpoint({"step": 1}, buffer.to_bytes())
    digit = (np.eye(8) * 255).astype(np.uint8)
    Image.fromarray(digit).save(folder / "gray.png")
    Image.fromarray(digit[:4]).save(folder / "half.png")
    return folder


def samples(path):
    with h5py.File(path / "samples.h5") as file:
        return file["samples"][()], dict(file.attrs)


def test_resumed_sample_command_gives_the_same_samples(home, monkeypatch):
    command = ["sample", "run", "-n", 6, "--label", "all", "--batch-size", 4, *QUICK]
    uninterrupted = ebmkit_command(*command, "--out", "whole", cwd=home)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert "noise of 100/255 about gray" in uninterrupted.stderr
    draw = SamplingJob._generator

    def signalled(self, number, step):
        if (number, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, number, step)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingJob, "_generator", signalled)
        stopped = ebmkit_command(*command, "--out", "broken", cwd=home)
    assert stopped.returncode == 143
    assert "saved after step 9 of 12" in stopped.stdout
    assert not (home / "broken" / "samples.h5").exists()
    other = ebmkit_command(*command, "--seed", 1, "--out", "broken", cwd=home)
    assert "seed was 0 and is now 1" in other.stderr.splitlines()[-1]
    later = ebmkit_command(*command, "--out", "broken", cwd=home)
    assert later.returncode == 0, later.stderr
    (a, one), (b, two) = samples(home / "whole"), samples(home / "broken")
    assert np.array_equal(a, b)
    assert one == two
    document = json.loads((home / "broken" / "sampling.json").read_text())
    assert "holds no config.yaml" in document["diagnostics"]["energies"]["note"]
    again = ebmkit_command(*command, "--out", "broken", cwd=home)
    assert_refused(again, "finished samples")


@pytest.mark.slow
def test_sample_and_restore_show_progress_without_terminal(home, monkeypatch):
    monkeypatch.setattr("ebmkit.terminal.FIRST_LINE", 0)
    for command, line in (
        (["sample", "run", "-n", 2, "--out", "drawn"], "step 6/6"),
        (["restore", "run", "gray.png", "--out", "restored"], "gray.png  6/6"),
    ):
        result = ebmkit_command(*command, *QUICK, cwd=home)
        assert result.returncode == 0, result.stderr
        assert line in result.stdout


@pytest.mark.slow
def test_sample_compares_energies_with_the_named_data_set(home):
    result = ebmkit_command(
        "sample", "run", "-n", 2, "--dataset", "digits", "--start", "mean", *QUICK,
        "--out", "named", cwd=home,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "held-out images" in result.stdout
    document = json.loads((home / "named" / "sampling.json").read_text())
    assert document["diagnostics"]["energies"]["images"] > 10


@pytest.mark.slow
def test_sample_from_the_replay_buffer(home):
    as_is = ebmkit_command("sample", "jem", "-n", 4, "--sampler", "buffer", "--out", "b", cwd=home)
    assert as_is.returncode == 0, as_is.stderr
    x, attributes = samples(home / "b")
    assert (attributes["source"], attributes["sampler"]) == ("buffer", "buffer")
    assert x.shape == (4, 1, 8, 8)
    chains = ebmkit_command("sample", "jem", "-n", 2, "--start", "buffer", "--out", "c", cwd=home)
    assert chains.returncode == 0, chains.stderr
    assert samples(home / "c")[1]["source"] == "buffer"
    assert samples(home / "c")[1]["sampler"] == "sgld"  # JEM's default
    missing = ebmkit_command("sample", "run", "--start", "buffer", "--out", "d", cwd=home)
    assert_refused(missing, "no replay buffer")


def test_sample_fails_if_every_chain_diverges(home):
    result = ebmkit_command(
        "sample", "jem", "-n", 2, "--steps", 40, "--set", "step_size=1e38", "--set", "noise=0",
        "--out", "lost", cwd=home,
    )  # fmt: skip
    assert result.returncode == 2
    assert "every chain diverged to NaN or Inf" in result.stderr.splitlines()[-1]
    document = json.loads((home / "lost" / "sampling.json").read_text())
    assert [entry["chain"] for entry in document["lost"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "run", "-n", "0"], "0 samples"),
        (["sample", "run", "--steps", "0"], "0 steps are too few"),
        (["sample", "run", "--sampler", "langevn"], "did you mean 'langevin'"),
        (["sample", "run", "--sampler", "ks"], "is now called 'kadkhodaie_simoncelli'"),
        (["sample", "run", "--start", "seeds"], "'seeds' is now called 'class_gaussian'"),
        (["sample", "run", "--set", "largest_drift=1"], "is now called 'drift_clip'"),
        (["sample", "run", "--label", "7"], "label 7 is out of range"),
        (["sample", "run", "--set", "betta=1"], "did you mean 'beta'"),
        (["sample", "run", "--start", "class_gaussian"], "name the data by --dataset"),
        (["sample", "jem", "--sampler", "ddim"], "was not trained to denoise"),
        (["restore", "jem", "gray.png"], "was not trained to denoise"),
        (["restore", "run", "gray.png", "--task", "derain"], "unknown task"),
        (["restore", "run", "gray.png", "--mask", "half.png"], "mask"),
        (["restore", "run", "gray.png", "--steps", "0"], "0 steps are too few"),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(home, arguments, message):
    result = ebmkit_command(*arguments, "--out", "never", cwd=home)
    assert_refused(result, message)
    assert not (home / "never").exists()


def test_restore_writes_images_and_baselines(home, monkeypatch):
    shown = []  # values in gray-comparison.png
    rows = restore.image_rows
    monkeypatch.setattr(
        restore, "image_rows", lambda *a, **k: shown.extend(v for _, v in a[0][0]) or rows(*a, **k)
    )
    result = ebmkit_command(
        "restore", "run", "gray.png", "--task", "superres", "--samples", 2, *QUICK, "--out", "r",
        cwd=home,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "bicubic" in result.stdout
    first, mean = (value.removesuffix(" dB") for value in shown[-2:])
    assert re.search(rf"{first} .*{mean} .*nearest", result.stdout), (shown, result.stdout)
    kinds = ("measured", "restored-1", "restored-2", "mean", "comparison")
    assert {p.name for p in (home / "r").iterdir()} == {
        "gray.json", *(f"gray-{kind}.png" for kind in kinds)
    }  # fmt: skip
    again = ebmkit_command("restore", "run", "gray.png", "--out", "r", cwd=home)
    assert_refused(again, "exists")


def test_restore_continues_after_a_bad_image(home, monkeypatch):
    """After a file that is no image, and after an image whose chains all diverge."""
    for name in ("a", "b", "c", "d"):
        shutil.copy(home / "gray.png", home / f"{name}.png")
    (home / "b.png").write_bytes(b"no image")
    run_on = restore.RestoreJob.run_on

    def diverging(self, images, number, folder, *rest, **saving):
        if images[number].name == "c.png":
            raise restore.DivergedError("every chain of 'c.png' diverged")
        return run_on(self, images, number, folder, *rest, **saving)

    monkeypatch.setattr(restore.RestoreJob, "run_on", diverging)
    command = ["restore", "run", "[a-d].png", "--task", "superres", *QUICK]
    result = ebmkit_command(*command, "--out", "r-bad", cwd=home)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("ebmkit: ")]
    assert ["b.png" in lines[0], "c.png" in lines[1]] == [True, True]
    assert "2 of 4 images could not be restored" in lines[2]
    assert {p.name[0] for p in (home / "r-bad").iterdir()} == {"a", "d"}
    alone = ebmkit_command("restore", "run", "b.png", "--out", "r-none", cwd=home)
    assert_refused(alone, "b.png")
    (home / "e.png").write_bytes(b"no image")
    none = ebmkit_command("restore", "run", "b.png", "e.png", "--out", "r-none", cwd=home)
    assert "2 of 2 images could not be restored" in none.stderr.splitlines()[-1]
    assert not (home / "r-none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["1", "0"])
def test_class_names_are_printed_in_the_locale_of_c(tmp_path, mode):
    """Python's UTF-8 mode, its default in that locale, prints them; without it, ? are printed."""
    save_run(tmp_path / "run", class_names=["žluť", "été", "owl"])
    Image.new("L", (8, 8)).save(tmp_path / "gray.png")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONIOENCODING"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": mode, "COLUMNS": "100"}
    command = [sys.executable, "-m", "ebmkit", "classify", "run", "gray.png", "--device", "cpu"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    names = [b"?lu?", b"?t?"] if mode == "0" else ["žluť".encode(), "été".encode()]
    assert all(name in ended.stdout for name in names), ended.stdout
    assert b"Traceback" not in ended.stderr


def test_resumed_restore_command_gives_the_same_images(home, monkeypatch):
    command = ["restore", "run", "gray.png", "--task", "superres", *QUICK]
    uninterrupted = ebmkit_command(*command, "--out", "r-whole", cwd=home)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    note = Record.note

    def signalled(self, state, *rest):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        note(self, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "note", signalled)
        stopped = ebmkit_command(*command, "--out", "r-broken", cwd=home)
    assert stopped.returncode == 143
    assert "saved after step 3 of 6 of gray.png" in stopped.stdout
    other = ebmkit_command(*command, "--seed", 1, "--out", "r-broken", cwd=home)
    assert_refused(other, "unfinished restorations of other settings: seed was 0 and is now 1")
    later = ebmkit_command(*command, "--out", "r-broken", cwd=home)
    assert later.returncode == 0, later.stderr
    names = {p.name for p in (home / "r-whole").iterdir()}
    assert {p.name for p in (home / "r-broken").iterdir()} == names
    for name in names - {"gray.json"}:
        assert (home / "r-whole" / name).read_bytes() == (home / "r-broken" / name).read_bytes()
