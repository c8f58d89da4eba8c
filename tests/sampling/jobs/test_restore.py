"""Image restoration: measurements, baselines, files and resume."""

import json

import numpy as np
import pytest
import torch
from ebmkit_tests.support.sampling_runs import SHAPE, BlindMixture, mixture, small_network
from PIL import Image

from ebmkit import UserError
from ebmkit.data import write_image
from ebmkit.errors import Interrupted
from ebmkit.metrics import psnr
from ebmkit.sampling.ascent import StochasticAscentConfig
from ebmkit.sampling.inverse import TASKS, TaskOptions, center_hole, find_task
from ebmkit.sampling.jobs import restore as restore_module
from ebmkit.sampling.jobs.restore import RestoreJob, read_mask, restore

QUICK = StochasticAscentConfig(steps=60, beta=0.3, first_sigma=0.9, last_sigma=0.01)
IMAGE = torch.linspace(0, 1, 64).reshape(1, 8, 8)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_restored_images_match_the_measurements(task):
    """The prior has a dark and a bright image; the measurements decide between them."""
    model = mixture(BlindMixture)
    model.card = None  # the estimate of sigma is not limited to a range
    clean = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.7)])
    options = TaskOptions(share=0.75 if task.name == "compressed" else None)
    measurement = task.measurement(SHAPE, options)
    measured = measurement.measure(clean)
    found = restore(model, measurement, measured, QUICK, samples=3)
    assert found.images.shape == (2, 3, *SHAPE)
    assert bool(found.finite.all())
    off = measurement.measure(found.images.flatten(0, 1)) - measured.repeat_interleave(3, 0)
    assert float(off.abs().max()) < 1e-5
    assert float(found.error.max()) < 1e-5
    brightness = found.images.flatten(2).mean(2)
    assert float((brightness - torch.tensor([[0.3], [0.7]])).abs().max()) < 0.15
    again = restore(model, measurement, measured, QUICK, samples=3)
    assert torch.equal(found.images, again.images)
    other = restore(model, measurement, measured, QUICK, samples=3, seed=1)
    assert not torch.equal(found.images, other.images)


def test_baselines_match_their_definitions():
    blocks = find_task("superres").measurement(IMAGE.shape, TaskOptions())
    found = blocks.baselines(blocks.measure(IMAGE[None]))
    small = IMAGE.reshape(4, 2, 4, 2).mean((1, 3)).numpy()
    nearest = np.kron(small, np.ones((2, 2)))
    np.testing.assert_allclose(found["nearest"][0], nearest, atol=1e-6)
    plane = torch.linspace(0.1, 0.9, 32).expand(1, 32, 32)  # bicubic is exact away from the edges
    blocks = find_task("superres").measurement(plane.shape, TaskOptions())
    middle = blocks.baselines(blocks.measure(plane[None]))["bicubic"][0, 6:-6, 6:-6]
    torch.testing.assert_close(middle, plane[0, 6:-6, 6:-6], rtol=0, atol=1e-5)
    hole = center_hole(IMAGE.shape, 0.25)
    found = hole.baselines(hole.measure(IMAGE[None]))
    inside = ~torch.isclose(hole.project(IMAGE[None])[0], IMAGE)
    for name in ("mean", "nearest", "biharmonic"):
        torch.testing.assert_close(found[name][~inside], IMAGE[~inside])
    assert found["mean"][inside].unique().item() == pytest.approx(float(IMAGE[~inside].mean()))
    gaps = found["nearest"][inside][:, None] - IMAGE[~inside]
    assert float(gaps.abs().amin(1).max()) < 1e-6
    torch.testing.assert_close(found["biharmonic"], IMAGE, rtol=0, atol=1e-3)
    for share in (0.3, 1.0):
        blur = find_task("deblur").measurement(IMAGE.shape, TaskOptions(share=share))
        found = blur.baselines(blur.measure(IMAGE[None]))["low-passed"]
        assert (float(psnr(found[None], IMAGE[None])) > 60) == (share == 1)


def test_superresolution_accepts_the_small_image_as_measurement():
    task = TASKS["superres"]
    measurement, numbers, clean = task.degrade(IMAGE, TaskOptions(factor=3), measured=True)
    assert measurement.shape == (1, 24, 24)
    assert clean is None
    look = IMAGE.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(measurement.on_gray(numbers), look)
    _, _, odd = task.degrade(torch.rand(3, 9, 7), TaskOptions())
    assert odd.shape == (3, 8, 6)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("inpaint", {"mask": torch.ones(4, 8, dtype=torch.bool)}, "mask of 4 x 8 does not fit"),
        ("inpaint", {"mask": torch.zeros(8, 8, dtype=torch.bool)}, "black everywhere"),
        ("inpaint", {"factor": 2}, "task inpaint has no --factor: it takes --mask or --share"),
        ("inpaint", {"share": 1.5}, "share 1.5"),
        ("superres", {"factor": 1}, "factor 1"),
        ("superres", {"mask": torch.ones(8, 8, dtype=torch.bool)}, "no --mask"),
        ("deblur", {"share": 0.0}, "share 0.0"),
    ],
)
def test_invalid_options_raise_errors(task, options, message):
    with pytest.raises(UserError, match=message):
        TASKS[task].degrade(IMAGE, TaskOptions(**options))


def test_unsupported_models_tasks_and_images_raise_errors(tmp_path):
    hole = center_hole(SHAPE)
    measured = torch.zeros(1, hole.count)
    with pytest.raises(UserError, match="kadkhodaie_simoncelli does not support this model"):
        restore(mixture(), hole, measured)
    with pytest.raises(UserError, match="0 samples"):
        restore(mixture(BlindMixture), hole, measured, samples=0)
    with pytest.raises(UserError, match="did you mean 'inpaint'"):
        find_task("inpant")
    with pytest.raises(UserError, match="needs the clean image"):
        TASKS["compressed"].degrade(IMAGE, TaskOptions(), measured=True)
    large = center_hole((1, 2000, 2000))
    with pytest.raises(UserError, match="megapixel"):
        restore(mixture(BlindMixture), large, torch.zeros(1, 1))
    write_image(torch.full((1, 8, 8), 0.5), tmp_path / "mask.png")
    with pytest.raises(UserError, match="neither black nor white"):
        read_mask(tmp_path / "mask.png")


def test_images_beyond_twice_the_trained_size_are_denoised_in_crops(tmp_path, monkeypatch):
    """They keep their size and match the measurements."""
    crops = []
    plain = restore_module.denoise_image
    monkeypatch.setattr(
        restore_module,
        "denoise_image",
        lambda *a, **k: crops.append(a[1].shape) or plain(*a, **k),
    )
    model = small_network(tmp_path)
    for side in (16, 20):
        hole = center_hole((1, side, side))
        measured = hole.measure(torch.full((1, 1, side, side), 0.5))
        found = restore(model, hole, measured, StochasticAscentConfig(steps=2))
        assert found.images.shape == (1, 1, 1, side, side)
        assert float(found.error.max()) < 1e-3
        assert bool(crops) == (side > 16)


def test_restoration_writes_images_and_metrics(tmp_path):
    model = small_network(tmp_path / "run")
    write_image(IMAGE, tmp_path / "ramp.png")
    config = StochasticAscentConfig(steps=3)
    job = RestoreJob(model, TASKS["inpaint"], TaskOptions(), config, samples=2, run="run")
    images = [tmp_path / "ramp.png"]
    folder = job.begin(images, tmp_path)
    document = job.run_on(images, 0, folder)
    folder.finish()
    assert document == json.loads((tmp_path / "ramp.json").read_text())
    for target in job.targets(tmp_path / "ramp.png", tmp_path):
        assert target.is_file(), target
    with Image.open(tmp_path / "ramp-mean.png") as file:
        mean = torch.from_numpy(np.asarray(file) / 255).float()[None]
    clean = torch.from_numpy(np.asarray(Image.open(tmp_path / "ramp.png")) / 255).float()[None]
    found = float(psnr(mean[None], clean[None]))
    assert document["psnr"]["mean_of_samples"] == pytest.approx(found, abs=0.2)  # 8-bit rounding
    assert set(document["psnr"]["baselines"]) == {"mean", "nearest", "biharmonic"}
    assert len(document["sigmas"]) == document["steps"] == 3
    with pytest.raises(UserError, match="exists"):
        job.begin(images, tmp_path)
    only = job._replace(measured=True)
    assert only.run_on(images, 0, only.begin(images, tmp_path / "two"))["psnr"] is None


class Killed(Exception):
    pass


def kill_at(at):
    def hook(step, steps):
        if step == at:
            raise Killed

    return hook


def file_contents(folder):
    """Contents of JSON files without durations, and bytes of PNG files."""
    documents = {p.name: json.loads(p.read_text()) for p in folder.glob("*.json")}
    for document in documents.values():
        del document["seconds"]
    return documents | {p.name: p.read_bytes() for p in folder.glob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_interrupted_restoration_resumes_bit_identically(tmp_path, how):
    """Interrupted in the second of two images; the first is not restored again."""
    model = small_network(tmp_path / "run")
    images = [tmp_path / "ramp.png", tmp_path / "flat.png"]
    for path, image in zip(images, (IMAGE, IMAGE.flip(2)), strict=True):
        write_image(image, path)
    config = StochasticAscentConfig(steps=9, beta=0.5)
    job = RestoreJob(model, TASKS["superres"], TaskOptions(), config, samples=2, run="run")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    folder = job.begin(images, whole)
    for number in range(2):
        job.run_on(images, number, folder)
    folder.finish()
    folder = job.begin(images, broken)
    job.run_on(images, 0, folder)
    first = (broken / "ramp.json").read_bytes()
    calls = []
    with pytest.raises(Killed if how == "killed" else Interrupted):
        if how == "killed":
            job.run_on(images, 1, folder, kill_at(6), save_seconds=0)
        else:
            job.run_on(images, 1, folder, stop=lambda: calls.append(1) or len(calls) == 6)
    assert not (broken / "flat.json").exists()
    other = job._replace(seed=1)
    with pytest.raises(UserError, match=r"unfinished restorations .* seed was 0 and is now 1"):
        other.begin(images, broken)
    folder, steps = job.begin(images, broken), []
    for number in range(2):
        job.run_on(images, number, folder, lambda step, total: steps.append(step))
    folder.finish()
    assert steps == [7, 8, 9]
    assert (broken / "ramp.json").read_bytes() == first
    assert file_contents(whole) == file_contents(broken)
    assert not (broken / "unfinished").exists()


def test_failed_restoration_leaves_no_files(tmp_path):
    model = small_network(tmp_path / "run")
    write_image(IMAGE, tmp_path / "ramp.png")
    images, out = [tmp_path / "ramp.png"], tmp_path / "out"
    config = StochasticAscentConfig(steps=3)
    job = RestoreJob(model, TASKS["inpaint"], TaskOptions(), config, samples=0)
    with pytest.raises(UserError, match="0 samples"):
        job.begin(images, out)
    assert not out.exists()
    broken = job._replace(samples=1)
    folder = broken.begin(images, out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UserError, match=r"every chain of 'ramp\.png' diverged"):
        broken.run_on(images, 0, folder)
    assert not list(out.iterdir())
