"""Whether chains arrive at images: the trial before sampling, and the levels after it."""

import json
import re

import pytest
import torch
from ebmkit_tests.support.sampling_runs import SHAPE, BlindMixture, mixture

from ebmkit import Energies, UserError
from ebmkit.guidance import guided_model, make_guidance
from ebmkit.sampling.ascent import StochasticAscent, StochasticAscentConfig
from ebmkit.sampling.base import Chains
from ebmkit.sampling.jobs import job as job_module
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


class Gray(BlindMixture):
    """The ideal denoiser of gray images, of any size."""

    def forward(self, y, sigma=None):
        return Energies(y.new_zeros(len(y), 2), y.new_zeros(len(y)))

    def estimate_sigma(self, y):
        return (y - 0.5).flatten(1).square().mean(1).sqrt()

    def denoise_blind(self, y, c=None, sigma_range=None):
        return torch.full_like(y, 0.5), self.estimate_sigma(y)


def model_of(kind):
    model = mixture(kind)
    model.card = model.card.model_copy(update={"sigma_range": (0.001, 0.2)})
    return model


def job_of(path, kind, guidance=None, **settings):
    model = model_of(kind)
    if guidance is not None:
        model, settings = guided_model(model, None, guidance), settings | {"guidance": guidance}
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


@pytest.mark.parametrize(("beta", "short"), [(0.1, True), (0.02, False)])
def test_time_is_that_of_the_steps_until_chains_end_without_the_first(
    tmp_path, monkeypatch, beta, short
):
    """The first call takes 1,000 s, others 1 s for a batch of any size; chains end by themselves,
    also after more steps than a trial has."""
    now = [0.0]

    class Slow(Gray):
        def denoise_blind(self, *args):
            now[0] += 1 if now[0] else 1000
            return super().denoise_blind(*args)

    monkeypatch.setattr(job_module.time, "perf_counter", lambda: now[0])
    job = job_of(tmp_path, Slow, count=6, batch_size=2, image_size=32, options={"beta": beta})
    found = forecast(job, no_images)
    assert found.caution is None
    job.run()
    longest = max(len(job.finished(batch)["sums"]) for batch in range(3))
    assert found.steps == pytest.approx(longest, rel=0.15)
    assert (found.steps < 150) == short
    assert longest < job.length
    assert found.seconds == pytest.approx(3 * found.steps)


def test_guided_jobs_have_a_trial_by_the_estimate_of_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_plot", lambda *arguments: [])
    guidance = make_guidance(guidance="classifier-free", scale=1.0)
    for kind, stuck in ((StuckAtGray, True), (BlindMixture, False)):
        how = {"label": "all", "count": 4, "options": {"beta": 0.5}}
        job = job_of(tmp_path / kind.__name__, kind, guidance, **how)
        found = forecast(job, no_images)
        assert found.seconds > 0
        assert (found.caution is not None) == stuck
    job.run()
    write_results(job, "run")
    document = json.loads((job.folder.path / "sampling.json").read_text())
    assert document["diagnostics"]["noise"]["arrived"] == 4


def test_short_jobs_and_other_starts_have_only_a_time(tmp_path):
    assert forecast(job_of(tmp_path / "a", StuckAtGray, count=2, steps=20), no_images) is None
    assert not forecast(job_of(tmp_path / "c", StuckAtGray, count=2, steps=50), no_images).caution
    job = job_of(tmp_path / "b", StuckAtGray, start="class_gaussian")
    job.sources = Sources(train=(TRAIN, LABELS))
    found = forecast(job, no_images)
    assert (found.steps, found.caution) == (job.length, None)
    assert found.seconds > 0


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
