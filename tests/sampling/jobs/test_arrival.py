"""Whether chains arrive at images: the trial before sampling, and the levels after it."""

import json
import re

import pytest
import torch
from ebmkit_tests.support.sampling_runs import SHAPE, BlindMixture, mixture

from ebmkit import UserError
from ebmkit.sampling.ascent import StochasticAscent, StochasticAscentConfig
from ebmkit.sampling.base import Chains
from ebmkit.sampling.jobs.arrival import forecast
from ebmkit.sampling.jobs.chains import JobFolder
from ebmkit.sampling.jobs.job import SamplingJob, write_results
from ebmkit.sampling.jobs.settings import make_settings
from ebmkit.sampling.jobs.sources import Sources

LABELS = torch.arange(40) % 2
SIGNS = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0)).sign()
TRAIN = torch.tensor([0.3, 0.7])[LABELS, None, None, None] + 0.11 * SIGNS
"""Images whose estimated level is (0.11^2 - 0.01)^(1/2), about 0.05, so that the limit is 0.1."""


class StuckAtGray(BlindMixture):
    """Takes gray images for noisy ones, whatever is removed, as a network never trained on them."""

    def _is_gray(self, y):
        return (y.flatten(1).mean(1) - 0.5).abs() < 0.1

    def estimate_sigma(self, y):
        return torch.where(self._is_gray(y), 0.19, super().estimate_sigma(y))

    def denoise_blind(self, y, c=None, sigma_range=None):
        image, level = super().denoise_blind(y, c, sigma_range)
        stripes = 0.19 * torch.ones_like(y)
        stripes[..., ::2] *= -1
        gray = y - y.mean((1, 2, 3), keepdim=True) + 0.5 + stripes
        return torch.where(self._is_gray(y)[:, None, None, None], gray, image), level


def model_of(kind):
    model = mixture(kind)
    model.card = model.card.model_copy(update={"sigma_range": (0.001, 0.2)})
    return model


def job_of(path, kind, **settings):
    model = model_of(kind)
    settings = make_settings(model, "kadkhodaie_simoncelli", **settings)
    folder = JobFolder(path)
    folder.begin(settings)
    return SamplingJob(model, settings, folder, Sources(held_out=TRAIN))


def no_images():
    raise UserError("no images")


def test_trial_says_that_chains_stay_noisy_and_offers_what_arrives(tmp_path):
    job = job_of(tmp_path, StuckAtGray, label="all")
    steps = []
    found = forecast(job, lambda: (TRAIN, LABELS), lambda done, total: steps.append(done))
    assert found.seconds > 0
    assert "do not reach images from noise" in found.caution
    level = float(re.search(r"estimate is ([0-9.]+)/255", found.caution)[1]) / 255
    assert level == pytest.approx(0.19, abs=0.02)  # at which they stay
    assert "--sampler ddim --start class_gaussian" in found.caution
    assert max(steps) == 150
    alone = forecast(job, no_images)
    assert "train with higher noise" in alone.caution
    assert "ddim" not in alone.caution


def test_trial_of_a_model_that_samples_says_only_the_time(tmp_path):
    found = forecast(job_of(tmp_path, BlindMixture), no_images)
    assert found.caution is None
    assert found.seconds > 0


def test_short_jobs_and_other_starts_have_no_trial(tmp_path):
    assert forecast(job_of(tmp_path / "a", StuckAtGray, count=2, steps=50), no_images) is None
    assert forecast(job_of(tmp_path / "b", StuckAtGray, start="class_gaussian"), no_images) is None


def test_results_state_how_many_samples_arrived(tmp_path):
    """The stochastic ascent denoises after its last step, so the level before it counts."""
    for name, kind, arrived in (("good", BlindMixture, 4), ("stuck", StuckAtGray, 0)):
        job = job_of(tmp_path / name, kind, count=4, steps=60, options={"beta": 0.5})
        job.run()
        batch = job.finished(0)
        assert (batch["level"] >= batch["last_sigma"]).all()
        write_results(job, "run")
        document = json.loads((tmp_path / name / "sampling.json").read_text())
        noise = document["diagnostics"]["noise"]
        assert (noise["arrived"], noise["samples"]) == (arrived, 4)
        assert (noise["level_of_samples"] <= noise["limit"]) == bool(arrived)
        warned = any("not images" in sentence for sentence in document["warnings"])
        assert warned != bool(arrived)


def test_level_after_follows_an_ideal_denoiser():
    """A Gaussian around gray of variance 0 has the denoiser D(y) = gray, at any noise level."""
    config = StochasticAscentConfig(first_sigma=0.5, last_sigma=0.01, steps=100)
    ascent = StochasticAscent(lambda y, sigma=None: torch.full_like(y, 0.5), config)
    generator = torch.Generator().manual_seed(0)
    chains = Chains(ascent, ascent.init(ascent.start((4, 1, 64, 64), generator)))
    levels = []
    chains.run(100, generator, lambda state, info: levels.append(float(info.sigma.mean())))
    for steps in (0, 10, 50, 99):
        assert levels[steps] == pytest.approx(ascent.level_after(steps), rel=0.03)
