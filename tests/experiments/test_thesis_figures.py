"""Figures of the thesis: values by formula, settings, and what figure 2.6 shows."""

import json
import math
from pathlib import Path

import pytest

from ebmkit.experiments import SCALES, ExperimentRuns, reproduce
from ebmkit.experiments.guidance import METHODS
from ebmkit.experiments.thesis_figures import (
    SCHEDULE_FIGURES,
    langevin_on_mixture,
    run_fig28,
    schedule_curves,
)
from ebmkit.guidance import parse_schedule

T = 1000


def abar(t):
    """Of the linear schedule of Ho et al. 2020, beta from 1e-4 to 0.02."""
    return math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / (T - 1)) for s in range(t + 1))


def sigmoid(t0, y0, k):
    """RCG equation 4.4."""
    return lambda t: (1 - y0) * 1 / (1 + math.exp(-k * (t - t0))) + y0


THESIS = {
    "rcg-fig4.10": [
        lambda t: math.sqrt(1 - abar(t)),
        lambda t: (1 - abar(t)) ** 2,
        lambda t: (1 - abar(t)) ** 8,
    ],
    "rcg-fig4.11": [sigmoid(650, 0.1, 0.01)],
    "rcg-fig4.13": [sigmoid(500, 0.05, 0.02)],
    "rcg-fig4.17": [lambda t: t / T],
}
"""The schedules of each figure, from its caption."""


@pytest.mark.parametrize("name", THESIS)
def test_curves_are_those_of_the_captions(name):
    document = schedule_curves(SCHEDULE_FIGURES[name]["schedules"])
    for curve, formula in zip(document["curves"], THESIS[name], strict=True):
        for t in (0, 1, 250, 499, 650, 999):
            assert curve["g"][t] == pytest.approx(formula(t), rel=1e-9)
    assert document["exact"][300] == pytest.approx(math.sqrt(1 - abar(300)))


def test_samples_beside_a_curve_are_methods_of_guidance_with_that_schedule():
    methods = {method.name: method for method in METHODS}
    for about in SCHEDULE_FIGURES.values():
        names = about["samples"].split("`")[1::2]
        schedules = {str(parse_schedule(text)) for text in about["schedules"]}
        for name in names:
            settings = methods[name].settings
            assert str(parse_schedule(settings["schedule"])) in schedules
            if "scale" in about:
                assert (about["scale"], about["eta"]) == (settings["scale"], methods[name].eta)


@pytest.mark.slow
def test_only_annealed_chains_recover_the_weights_of_the_modes():
    """The rare mode has weight 0.2; annealed and exact shares agree within 4 standard errors.

    Naive chains do not change modes, so about half of them stay in the rare one, as at the start.
    """
    document, _ = langevin_on_mixture(chains=1000, levels=30, seed=3)
    rare = {name: shares[1] for name, shares in document["shares"].items()}
    error = document["standard_error"]
    assert rare["annealed"] == pytest.approx(0.2, abs=4 * error)
    assert rare["exact"] == pytest.approx(0.2, abs=4 * error)
    assert rare["naive"] > 0.2 + 15 * error


def test_the_cosine_schedule_keeps_the_image_for_longer():
    """Half of the variance is noise at cos^2 = 1/2, so at T/2; the linear one is there earlier."""
    document = run_fig28(ExperimentRuns(Path("out"), SCALES["smoke"]), ()).document
    assert document["half"]["cosine"] == pytest.approx(T / 2, abs=10)
    assert document["half"]["linear"] == next(t for t in range(T) if abar(t) < 0.5)
    linear, cosine = document["linear"]["noise"], document["cosine"]["noise"]
    assert all(a > b for a, b in zip(linear[1:990], cosine[1:990], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rcg-fig2.6", "rcg-fig2.8", "rcg-fig4.13"])
def test_a_figure_is_one_command_without_data(name, tmp_path):
    paths = reproduce(name, ExperimentRuns(tmp_path, SCALES["smoke"]))
    assert [path.name for path in paths] == [f"{name}.md", f"{name}.json", f"{name}.png"]
    assert f"command: `ebmkit reproduce {name} --scale smoke`" in paths[0].read_text()
    json.loads(paths[1].read_text())
    assert paths[2].stat().st_size > 10_000
    assert not (tmp_path / "rows").exists()
