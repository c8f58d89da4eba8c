"""Gaussians of classes that are stored with a model, and samples that start from them."""

import json

import pytest
import torch
from ebmkit_tests.support.blind import VARIANCE
from ebmkit_tests.support.sampling_runs import SHAPE, BlindMixture, mixture, save_run, small_network
from typer.testing import CliRunner

import ebmkit
from ebmkit import UserError
from ebmkit.class_gaussians import MAX_STORED, ClassGaussians, storable_rank
from ebmkit.cli.app import app
from ebmkit.data.hdf5 import read_contents
from ebmkit.data.imagesets import ImageSet
from ebmkit.guidance import make_guidance
from ebmkit.models import save_model
from ebmkit.models.saving import GAUSSIANS
from ebmkit.sampling import Chains, find_sampler
from ebmkit.sampling.jobs import job as job_module
from ebmkit.sampling.jobs.chains import JobFolder
from ebmkit.sampling.jobs.job import SamplingJob, write_results
from ebmkit.sampling.jobs.settings import make_settings
from ebmkit.sampling.jobs.sources import sources_for
from ebmkit.storage.reading import DamagedFile
from ebmkit.training.setup import fit_class_gaussians

LABELS = torch.arange(60) % 2


def images(seed=0):
    """Correlated images of two classes."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(16, 16, generator=generator) * 0.7 ** torch.arange(16)
    x = 0.1 * torch.randn(60, 16, generator=generator) @ factors.T
    return (x + 0.3 + 0.4 * LABELS[:, None]).reshape(60, *SHAPE)


def sampled(**card):
    """A blind model that stores the Gaussians of exact samples of its classes."""
    model = mixture(BlindMixture)
    model.card = model.card.model_copy(update={"sigma_range": (0.001, 0.2)} | card)
    x, c = model.sample(4000, torch.Generator().manual_seed(1))
    model.class_gaussians = ClassGaussians(x, c).compressed(16)
    return model


# --- compression and files -----------------------------------------------------------------------


def test_compressed_covariance_is_exact_at_full_rank_and_probabilistic_pca_below():
    found, x = ClassGaussians(images(), LABELS), images()
    for rank in (16, 64, 3):
        small = found.compressed(rank)
        for c in (0, 1):
            exact = x[c == LABELS].flatten(1).double().T.cov()
            values, vectors = torch.linalg.eigh(exact)
            values[: max(16 - rank, 0)] = 0  # the smallest are replaced by their mean over all
            rest = float(exact.trace() - values.sum()) / 16
            expected = vectors @ values.diag() @ vectors.T + rest * torch.eye(16)
            own = small.spreads[c].double()
            own = own.T @ own + small.residuals[c] ** 2 * torch.eye(16)
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-6 * float(exact.trace()))
            assert len(small.spreads[c]) == min(rank, 16)
            assert torch.equal(small.means[c], found.means[c])


def test_draws_have_the_compressed_covariance():
    """Within 4.5 standard errors of a covariance of Gaussian samples."""
    small, count = ClassGaussians(images(), LABELS).compressed(3), 40_000
    drawn = small.sample(count, torch.Generator().manual_seed(0), torch.ones(count).long())
    own = small.spreads[1].T @ small.spreads[1] + small.residuals[1] ** 2 * torch.eye(16)
    error = (own.diag()[:, None] * own.diag() + own**2).div(count).sqrt()
    assert ((drawn.flatten(1).T.cov() - own).abs() / error).max() < 4.5


def test_bounded_size_holds_for_any_number_of_classes_and_pixels():
    assert storable_rank(10, 64) == storable_rank(10, 3 * 32 * 32) == 64
    assert 8 <= storable_rank(100, 3 * 32 * 32) < 64
    assert storable_rank(1000, 3 * 224 * 224) == 0
    for classes, entries in ((100, 3072), (10, 9000), (37, 5000)):
        assert classes * entries * (storable_rank(classes, entries) + 1) <= MAX_STORED


def test_file_restores_the_gaussians_and_refuses_others(tmp_path):
    small = ClassGaussians(images(), LABELS).compressed(3)
    content = small.to_bytes()
    found = ClassGaussians.from_bytes(content, tmp_path)
    draws = [g.sample(9, torch.Generator().manual_seed(0)) for g in (small, found)]
    assert torch.equal(*draws)
    small.spreads[1] = small.spreads[1][:, :-1]
    small.residuals[0] = float("nan")
    import safetensors.torch

    for bad in (small.to_bytes(), safetensors.torch.save({"means": torch.zeros(2, 3)}), b"", b"{}"):
        with pytest.raises(DamagedFile, match="is damaged"):
            ClassGaussians.from_bytes(bad, tmp_path)


def test_saved_model_has_the_gaussians_of_last_and_best_weights(tmp_path):
    run = save_run(tmp_path / "run")
    model = ebmkit.load(run)
    assert model.class_gaussians is None
    model.class_gaussians = ClassGaussians(torch.rand(60, 1, 8, 8), LABELS).compressed(4)
    save_model(tmp_path / "run", model, model.built_from, model.card)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    for weights in ("last", "best"):
        found = ebmkit.load(run, weights=weights).class_gaussians
        assert torch.equal(found.spreads[1], model.class_gaussians.spreads[1])
    (run / GAUSSIANS).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"class_gaussians\.safetensors' is damaged"):
        ebmkit.load(run)


# --- which models store them ---------------------------------------------------------------------


def image_set(labels=LABELS):
    pixels = (255 * torch.rand(60, 1, 10, 10)).byte()
    return ImageSet(pixels, labels, class_names=("dark", "bright"), name="own", split="train")


def test_gaussians_are_those_of_training_images_cropped_to_the_training_size(tmp_path):
    model, data = small_network(tmp_path, num_classes=2, steps=500), image_set()
    found = fit_class_gaussians(model, data, model.card)
    crops = data.images[..., 1:9, 1:9].float() / 255
    assert found.shape == (1, 8, 8)
    for c in (0, 1):
        torch.testing.assert_close(found.means[c], crops[c == LABELS].mean(0))


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_range": None},
        {"classifies": False},
        {"steps": 20},
        {"image_size": (2**9, 2**9), "channels": 3},
    ],
)
def test_other_models_store_no_gaussians(tmp_path, change):
    model = small_network(tmp_path, num_classes=2, **({"steps": 500} | change))
    if "image_size" in change:
        model.card = model.card.model_copy(update=change)
        few = ImageSet(torch.zeros(2, 3, 2, 2).byte(), torch.arange(2), class_names=("a", "b"))
        assert fit_class_gaussians(model, few, model.card) is None
        return
    assert fit_class_gaussians(model, image_set(), model.card) is None


def test_no_gaussians_for_a_noise_conditional_model_or_a_class_of_one_image(tmp_path):
    model = small_network(tmp_path, num_classes=2, steps=500)
    one = image_set((torch.arange(60) == 7).long())
    assert fit_class_gaussians(model, one, model.card) is None
    model.noise_conditional = True
    assert fit_class_gaussians(model, image_set(), model.card) is None


# --- sampling ------------------------------------------------------------------------------------


def test_model_with_gaussians_starts_from_them_by_default():
    model = sampled()
    found = make_settings(model)
    assert (found.sampler, found.start, found.label) == ("ddim", "class_gaussian", "all")
    assert (found.options["start"], found.options["steps"]) == ("class_gaussian", 50)
    assert make_settings(model, steps=80).options["steps"] == 80
    assert make_settings(model, label="bright").label == "bright"
    explicit = make_settings(model, "ddim")
    assert (explicit.start, explicit.label) == ("class_gaussian", None)
    assert explicit.options["steps"] == 100


@pytest.mark.parametrize(
    "given",
    [{"start": "noise"}, {"start": "uniform"}, {"image_size": 8}, {"options": {"start": "noise"}}],
)
def test_other_starts_and_sizes_keep_the_sampler_of_blind_denoisers(given):
    found = make_settings(sampled(), **given)
    assert (found.sampler, found.label) == ("kadkhodaie_simoncelli", None)
    assert found.start == ("uniform" if given.get("start") == "uniform" else "noise")


def test_guided_model_has_no_gaussians():
    guidance = make_guidance(guidance="classifier-free", scale=1.0)
    from ebmkit.guidance import guided_model

    guided = guided_model(sampled(), None, guidance)
    found = make_settings(guided, label="all", guidance=guidance)
    assert found.sampler == "kadkhodaie_simoncelli"


def test_default_samples_have_mean_and_variance_of_their_class(tmp_path, monkeypatch):
    """Classes are Gaussian, so the start is exact, and the denoiser is known. The standard error of
    the variance is 2.5 %, and 5 steps narrow it by 3 %; without the spread of a class at the start
    they would narrow it by 28 %. No training images are needed."""
    monkeypatch.setattr(job_module, "_plot", lambda *arguments: [])
    model = sampled(sigma_range=(0.001, 0.1))
    settings = make_settings(model, count=400, batch_size=200, steps=100)
    sources = sources_for(tmp_path / "no-run", model, settings)
    assert sources.train is None
    folder = JobFolder(tmp_path / "out")
    folder.begin(settings)
    job = SamplingJob(model, settings, folder, sources)
    job.run()
    x = torch.cat([job.finished(b)["samples"] for b in (0, 1)])
    labels = torch.cat([job.finished(b)["labels"] for b in (0, 1)])
    for c, mean in enumerate((0.3, 0.7)):
        own = x[labels == c]
        assert float(own.mean()) == pytest.approx(mean, abs=4 * (VARIANCE / own.numel()) ** 0.5)
        assert float(own.var(0).mean()) == pytest.approx(VARIANCE, rel=0.1)
    write_results(job, "run")
    document = json.loads((tmp_path / "out" / "sampling.json").read_text())
    start = document["diagnostics"]["start"]["meaning"]
    assert "taken to be Gaussian" in start
    assert document["diagnostics"]["noise"]["arrived"] > 200


def test_ddim_denoises_at_the_estimated_level_if_gaussians_are_stored():
    """A model that knows its level better than the schedule: images with less noise than that."""
    model, seen = sampled(), []

    class Watching(type(model)):
        def denoise_blind(self, y, c=None, sigma_range=None):
            seen.append(sigma_range)
            return super().denoise_blind(y, c, sigma_range)

    model.__class__ = Watching
    entry = find_sampler("ddim")
    sampler = entry.build(model, 0)
    y = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    chains = Chains(sampler, sampler.init(y))
    chains.run(1, torch.Generator())
    assert seen == [(0.001, 0.2)]


@pytest.mark.slow
def test_quick_start_samples_digits_that_another_classifier_recognises(tmp_path, monkeypatch):
    """At least 90 % of 200 samples by a support vector machine that is trained on the same split
    and right on 97 % or more of the test images; they are no copies of training images."""
    from sklearn.svm import SVC

    from ebmkit.data import load_dataset

    monkeypatch.chdir(tmp_path)
    runner, train = CliRunner(), "train --backbone gradresnet18 --objective ce+dsm --no-evaluate"
    assert runner.invoke(app, [*train.split(), "--out", "run"]).exit_code == 0
    result = runner.invoke(app, ["sample", "run", "-n", "200", "--out", "samples"])
    assert result.exit_code == 0
    assert "taken to be Gaussian" in result.output
    assert "not images" not in result.output
    train, test = (load_dataset("digits", None, part) for part in ("train", "test"))
    x, t = (part.images.flatten(1).numpy() / 255 for part in (train, test))
    classifier = SVC(gamma=0.06, C=10).fit(x, train.labels)
    assert classifier.score(t, test.labels) > 0.97
    made = read_contents(tmp_path / "samples" / "samples.h5")
    pixels = made.read_all().reshape(200, -1).numpy() / 255
    assert made.labels.bincount().tolist() == [20] * 10
    assert (classifier.predict(pixels) == made.labels.numpy()).mean() >= 0.9
    real = torch.tensor(x)
    own, of_test = (torch.cdist(torch.tensor(a), real).amin(1).median() for a in (pixels, t))
    assert own > 0.8 * of_test
