"""``ebmkit sample --guide``: settings, files, resume and errors."""

import json
from itertools import cycle

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from ebmkit_tests.support.sampling_runs import save_run

from ebmkit import ModelCard
from ebmkit.guidance import GUIDANCE_SCHEDULES, GUIDES, make_guidance
from ebmkit.models import ModelConfig, load, save_model
from ebmkit.sampling.base import clean_level
from ebmkit.sampling.jobs.chains import JobFolder
from ebmkit.sampling.jobs.job import SamplingJob
from ebmkit.sampling.jobs.settings import default_folder, make_settings
from ebmkit.sampling.jobs.sources import VIEWS, guide_by, parse_guidance

NAMES = [str(n) for n in range(10)]
QUICK = ["-n", 4, "--sampler", "ddim", "--steps", 12, "--device", "cpu"]
AS_IN_THE_DOCS = [
    "--label", 3, "--guidance", "energy", "--scale", 4, "--schedule",
    "sigmoid:t0=500,y0=0.05,k=0.02",
]  # fmt: skip


def save_denoiser(folder, size=(8, 8), channels=1):
    """Write the run of an untrained denoiser with sigma as an input, as a diffusion model has."""
    config = ModelConfig(backbone={"kind": "drunet", "width": 4, "blocks": 1}, in_channels=channels)
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    card = ModelCard(image_size=size, channels=channels, sigma_range=(0.005, 80.0))
    save_model(folder, config.build(), config, card)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_denoiser(folder / "diffusion")
    save_run(folder / "robust", 10, class_names=NAMES, objective="ce", sigma_range=None)
    save_run(folder / "joint", 10, class_names=NAMES)
    save_run(folder / "three")
    save_run(folder / "unlabelled", 0)
    save_run(folder / "colour", 10, class_names=NAMES, channels=3)
    save_run(folder / "large", 10, class_names=NAMES, image_size=(16, 16))
    return folder


def assert_refused(result, *messages):
    """Exit code 2, and one line on stderr that contains ``messages``."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in messages:
        assert text in result.stderr


def samples(path):
    with h5py.File(path / "samples.h5") as file:
        return file["samples"][()], file["labels"][()] if "labels" in file else None


def test_command_of_the_docs(runs):
    arguments = ["sample", "diffusion", "--guide", "robust", *AS_IN_THE_DOCS, "-n", 2, "--steps", 5]
    result = ebmkit_command(*arguments, cwd=runs)
    assert result.returncode == 0, result.stderr
    (out,) = (runs / "diffusion" / "samples").iterdir()
    document = json.loads((out / "sampling.json").read_text())
    settings = document["settings"]
    assert settings["sampler"] == "heun"  # the stand-in takes sigma and has no schedule
    assert settings["guidance"] == {
        "guidance": "energy", "options": {}, "scale": 4.0, "view": "x_t", "backpropagate": False,
        "schedule": "sigmoid:t0=500,y0=0.05,k=0.02", "start": 0.0,
    }  # fmt: skip
    assert settings["guide"] == "robust"
    assert len(settings["guide_digest"]) == 64
    x, labels = samples(out)
    assert np.isfinite(x).all()
    assert labels.tolist() == [3, 3]
    assert_refused(ebmkit_command(*arguments, cwd=runs), "finished samples")


GUIDES_WITH_MODEL = [name for name, entry in GUIDES.items() if entry.make is not None]


@pytest.mark.parametrize(
    ("guidance", "view"),
    [
        (name, view)
        for k, (name, diagonal) in enumerate(zip(GUIDES_WITH_MODEL, cycle(VIEWS), strict=False))
        for view in (VIEWS if k == 0 else [diagonal])
    ],
)
def test_every_guide_and_view_changes_the_samples(runs, guidance, view):
    """The first guide with every view, and the others with one each."""
    with_steps = {"n": 2} if guidance in ("pgd", "accumulated") else {}
    config = parse_guidance(runs / "robust", guidance, 3.0, None, view, None, with_steps)
    base = load(runs / "diffusion")
    ends = []
    guided = guide_by(base, config, runs / "robust", dataset="digits")
    for model, extra in (guided, (base, {})):
        settings = make_settings(
            model, "ddim", count=2, label="3" if extra else None, steps=4, **extra
        )
        folder = default_folder(runs / "diffusion", settings)
        job = SamplingJob(model, settings, _folder(folder, settings))
        job.run()
        ends.append(job.finished(0)["samples"])
    assert ends[0].isfinite().all()
    assert not torch.equal(*ends)


def _folder(path, settings):
    folder = JobFolder(path)
    folder.begin(settings)
    return folder


def test_energies_of_guided_samples_are_those_of_base_and_guide(runs):
    base = load(runs / "joint")
    model, extra = guide_by(base, make_guidance(scale=3.0), runs / "robust")
    for parameter in model.guide.parameters():  # the runs have the same weights
        parameter.data.mul_(1.5)
    settings = make_settings(model, "ddim", count=2, label="3", steps=40, **extra)
    job = SamplingJob(model, settings, _folder(runs / "energies-of-samples", settings))
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        found, level = job.energies(x), clean_level(model)
        expected = base.log_density(x, level)
        assert torch.equal(found["log_density"], expected)
        joint = model.guide.energies(x, level).log_posterior() + expected[:, None]
    assert torch.equal(found["log_joint"], joint)


@pytest.mark.slow
def test_scale_0_gives_the_unguided_samples(runs):
    for out, more in (("none", ["--label", 3, "--guide", "robust", "--scale", 0]), ("plain", [])):
        result = ebmkit_command("sample", "diffusion", *more, *QUICK, "--out", out, cwd=runs)
        assert result.returncode == 0, result.stderr
    with (
        h5py.File(runs / "none" / "samples.h5") as a,
        h5py.File(runs / "plain" / "samples.h5") as b,
    ):
        assert np.array_equal(a["samples"][()], b["samples"][()])


@pytest.mark.slow
def test_interrupted_command_resumes_and_other_guidance_is_refused(runs, monkeypatch):
    options = ["--guide", "robust", "--label", "all", "--batch-size", 2, *QUICK]
    arguments = ["sample", "diffusion", *options]
    whole = ebmkit_command(*arguments, "--set", "eta=1", "--out", "whole", cwd=runs)
    assert whole.returncode == 0, whole.stderr
    draw = SamplingJob._generator

    def killed(self, number, step):
        if (number, step) == (1, 2):
            raise KeyboardInterrupt
        return draw(self, number, step)

    with monkeypatch.context() as patch:
        patch.setattr(SamplingJob, "_generator", killed)
        ebmkit_command(*arguments, "--set", "eta=1", "--out", "broken", cwd=runs)
    assert not (runs / "broken" / "samples.h5").exists()
    for more, message in (
        (["--scale", 2], "guidance.scale was 1.0 and is now 2.0"),
        (["--guide-start", 0.2], "guidance.start was 0.0 and is now 0.2"),
        (["--guidance", "pgd"], "guidance"),
    ):
        other = ebmkit_command(*arguments, "--set", "eta=1", *more, "--out", "broken", cwd=runs)
        assert_refused(other, "unfinished samples of other settings", message)
    later = ebmkit_command(*arguments, "--set", "eta=1", "--out", "broken", cwd=runs)
    assert later.returncode == 0, later.stderr
    for a, b in zip(samples(runs / "whole"), samples(runs / "broken"), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_mean_energies_of_dual_are_stored_with_the_guide(runs):
    arguments = ["sample", "diffusion", "--guide", "joint", "--label", 3, "--guidance", "dual",
                 "--guide-set", "lambda=0.3", "--dataset", "digits", *QUICK]  # fmt: skip
    result = ebmkit_command(*arguments, "--out", "dual", cwd=runs)
    assert result.returncode == 0, result.stderr
    (stored,) = (runs / "joint" / "energies").glob("digits-*.json")
    energies = json.loads(stored.read_text())
    settings = json.loads((runs / "dual" / "sampling.json").read_text())["settings"]
    assert settings["guide_means"] == energies["energy"]
    assert settings["guidance"]["options"] == {"lambda": 0.3}
    assert energies["digest"] == settings["guide_digest"]
    assert sum(energies["images"]) > 1000


def test_classifier_free_guidance_requires_a_model_with_labels_and_no_guide(runs):
    arguments = ["sample", "joint", "--guidance", "classifier-free", "--label", "2", *QUICK]
    result = ebmkit_command(*arguments, "--scale", 2, "--out", "free", cwd=runs)
    assert result.returncode == 0, result.stderr
    assert_refused(
        ebmkit_command("sample", "diffusion", *arguments[2:], "--out", "free2", cwd=runs),
        "trained with labels, and this one was not",
    )
    assert_refused(
        ebmkit_command(*arguments, "--guide", "robust", "--out", "free3", cwd=runs),
        "takes no guide",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide", "robust"], "guidance needs a label: give --label"),
        (["--scale", "4", "--label", "3"], "--scale needs a guide"),
        (["--schedule", "linear"], "--schedule needs a guide"),
        (["--guide-set", "n=3"], "--guide-set needs a guide"),
        (["--guide", "robust", "--label", "12"], "label 12 is out of range"),
        (
            ["--guide", "robust", "--label", "frog"],
            "label 'frog' is unknown: this model knows 0",
        ),
        (["--guide", "robust", "--label", "3", "--schedule", "cubic"], "write exact or constant"),
        (["--guide", "robust", "--label", "3", "--schedule", "power:q=1"], "'q' is unknown"),
        (["--guide", "robust", "--label", "3", "--guidance", "energi"], "did you mean 'energy'"),
        (["--guide", "robust", "--label", "3", "--guide-set", "n=3"], "there is no field 'n'"),
        (["--guide", "robust", "--label", "3", "--view", "dark"], "unknown view 'dark'"),
        (["--guide", "robust", "--label", "3", "--scale", "-1"], "scale = -1"),
        (["--guide", "robust", "--label", "3", "--guide-start", "2"], "start = 2"),
        (["--guide", "large", "--label", "3"], "size 8x8 and the guide 16x16"),
        (["--guide", "colour", "--label", "3"], "channels 1 and the guide 3"),
        (["--guide", "unlabelled", "--label", "3"], "was trained without"),
        (["--guide", "diffusion", "--label", "3"], "gives no energies"),
        (
            ["--guide", "nowhere", "--label", "3"],
            "there is no run folder or pretrained model 'nowhere'",
        ),
    ],
)
def test_invalid_options_print_one_line_errors(runs, arguments, message):
    result = ebmkit_command("sample", "diffusion", *arguments, "--out", "bad", cwd=runs)
    assert_refused(result, message)
    assert not (runs / "bad").exists()


def test_guide_with_another_number_of_classes_is_refused(runs):
    arguments = ["sample", "joint", "--guide", "three", "--label", "0", *QUICK, "--out", "bad"]
    assert_refused(ebmkit_command(*arguments, cwd=runs), "labels 10 and the guide 3")


@pytest.mark.parametrize(
    ("kind", "names"), [("guidance", GUIDES), ("schedules", GUIDANCE_SCHEDULES)]
)
def test_list_prints_all_guides_and_schedules(runs, kind, names):
    result = ebmkit_command("list", kind, cwd=runs)
    for name in names:
        assert name in result.stdout
