"""The study of objectives on a 2-D mixture: density, labels and score are learned."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import ebmkit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SLOW = [
    "ce+cdsm", "ce+ism", "ce+dsm under a law, blind",
    "ce+dsm under a law, told sigma (NCSN)",
]  # fmt: skip


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("mixture_study", BENCHMARKS / "mixture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(study):
    return study.load_example()


@pytest.mark.slow
def test_short_jem_training_learns_the_mixture(study, example):
    """A twentieth of the study's training. The errors of a constant density are 1.2, 0.5 and 1.0.

    `test_examples` tests denoising score matching.
    """
    row = study.ROWS["jem"]
    model = example.learn(example.truth(), 150, row.objective, batch_size=256)
    errors = study.measure(example, row, model)["errors"]
    assert errors["log p, nats (rms)"] < 0.5
    assert errors["p(c|y) (mean abs)"] < 0.05
    assert errors["sigma * score (rms)"] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_full_training_learns_the_mixture_closely(study, example, name):
    row = study.ROWS[name]
    model = study.train(example, row, seed=7, steps=500)
    errors = study.measure(example, row, model)["levels"]["0.1"]
    assert errors["log p, nats (rms)"] < 0.15
    assert errors["log p, nats (max)"] < 1.5
    assert errors["p(c|y) (mean abs)"] < 0.03
    assert errors["sigma * score (rms)"] < 0.15


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_persistent_chains_reach_equilibrium_at_their_temperature(example, temperature):
    """For a Gaussian of variance v their variance is T v, within 4 standard errors."""
    variance, count = 0.02, 2000
    model = ebmkit.GaussianMixture(torch.full((1, 2, 1, 1), 0.3), variance)
    chains = example.PersistentChains(model, count, temperature=temperature)
    for _ in range(25):
        drawn = chains.draw()
    exact = temperature * variance
    assert (drawn.mean(0) - 0.3).abs().max() < 4 * (exact / count) ** 0.5
    spread = (drawn - 0.3).square().mean() / exact
    assert spread == pytest.approx(1, abs=4 * count**-0.5)  # 2 * count squares of variance 2


def test_warmed_recovers_the_density_from_its_power(study, example):
    joint = example.truth().log_joint(example.plane(9), example.SIGMA)
    power = 0.1 * joint.logsumexp(1)[:, None] + joint.log_softmax(1)
    torch.testing.assert_close(study.warmed(power, 0.1), joint, rtol=1e-4, atol=1e-4)


def test_errors_are_zero_at_the_truth_and_match_values_computed_by_hand(study, example):
    """For a density tilted by exp(2 y_1) and odds multiplied by e."""
    mixture, points, sigma = example.truth(), example.plane(41), example.SIGMA
    exact = example.fields(lambda y: mixture.log_joint(y, sigma), points)
    torch.testing.assert_close(exact.score, mixture.score(points, sigma=sigma).flatten(1))
    assert max(example.distances(example.aligned(exact, exact), exact, sigma).values()) < 1e-5

    def tilted(y):
        joint = mixture.log_joint(y, sigma)
        log_p, odds = joint.logsumexp(1), joint[:, 1] - joint[:, 0] + 1
        labels = torch.stack([torch.zeros_like(odds), odds], dim=1).log_softmax(1)
        return labels + (log_p + 2 * y[:, 0, 0, 0] + 5)[:, None]

    found = example.aligned(example.fields(tilted, points), exact)
    errors = example.distances(found, exact, sigma)
    weight = exact.log_density.softmax(0)
    first = points[:, 0, 0, 0]
    spread = ((first - (first * weight).sum()).square() * weight).sum().sqrt()
    assert errors["log p, nats (rms)"] == pytest.approx(2 * float(spread), rel=1e-3)
    assert errors["sigma * score (rms)"] == pytest.approx(2 * sigma, rel=1e-3)
    assert errors["p(c|y) (max)"] == pytest.approx(0.2449, abs=0.01)  # at odds of e^-1/2


def test_blind_log_joint_matches_the_closed_form(study, example):
    """References: `GaussianMixture.blind_score`, and Bayes' rule over the noise levels."""
    mixture, points = example.truth(), example.plane(9)
    fields = example.fields(lambda y: study.blind_log_joint(mixture, study.LAW, y), points)
    low, high = study.LAW.range
    nodes = low * (high / low) ** ((torch.arange(200) + 0.5) / 200)
    score = mixture.blind_score(points, nodes).flatten(1)
    torch.testing.assert_close(fields.score, score, rtol=1e-2, atol=1e-2)
    joint = torch.stack([mixture.log_joint(points, float(s)).exp() for s in nodes]).mean(0)
    posterior = joint / joint.sum(1, keepdim=True)
    torch.testing.assert_close(fields.posterior, posterior, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_study_writes_results_and_skips_finished_rows(study, tmp_path, monkeypatch, capsys):
    arguments = ["mixture", "--out", "rows", "--only", "cdsm", "--seeds", "3"]
    arguments += ["--steps", "2", "--results", "found.json", "--picture", "found.png"]
    monkeypatch.setattr(study, "GRID", {"count": 21, "reach": 0.8})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    first = json.loads(Path("found.json").read_text())
    assert Path("found.png").is_file()
    monkeypatch.setattr(study, "train", None)  # not called again
    drawn = study.load_example()
    monkeypatch.setattr(drawn, "draw", lambda rows, path: None)
    monkeypatch.setattr(study, "load_example", lambda: drawn)
    study.main()
    assert json.loads(Path("found.json").read_text())["rows"] == first["rows"]
