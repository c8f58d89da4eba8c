"""The examples run at a small size and give the documented results."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_mixture_2d_learns_the_mixture(tmp_path):
    # For energies of 0 the error of sigma * score is about 1.4, and that of p(c|y) 0.5.
    errors = example("mixture_2d").main(steps=300, out=tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").is_file()
    assert errors["sigma * score (rms)"] < 0.5
    assert errors["p(c|y) (mean abs)"] < 0.1


def test_custom_model_trains_saves_and_loads(tmp_path):
    assert example("compose").main(steps=60, out=tmp_path / "own") > 0.6


def test_guidance_of_a_diffusers_pipeline_raises_the_label_probability(tmp_path):
    unguided, with_guide = example("guide_diffusers").main(steps=5, out=tmp_path / "a.png")
    assert with_guide > unguided + 0.1
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "a-unguided.png").is_file()


@pytest.mark.slow
def test_blind_denoising_of_a_photograph(tmp_path):
    # On test patches the gain is 5 dB after 200 steps and 6.4 dB after 400.
    noisy, denoised, sigma = example("denoise_photo").main(250, tmp_path / "photo", size=200)
    assert denoised > noisy + 3
    assert sigma == pytest.approx(25 / 255, rel=0.25)
    assert (tmp_path / "photo" / "photograph.png").is_file()


@pytest.mark.slow
def test_jem_samples_are_drawn_and_classified(tmp_path):
    found = example("jem_digits").main(tmp_path / "jem", steps=2, chain_steps=2)
    assert set(found["recognised"]) == {"noise", "gaussian"}
    assert (tmp_path / "jem" / "jem-digits.png").stat().st_size > 5_000
    again = example("jem_digits").main(tmp_path / "jem", steps=2, chain_steps=2)  # loads the run
    assert again["recognised"] == found["recognised"]


@pytest.mark.slow
def test_jem_on_digits_trains_without_rollbacks(tmp_path):
    """Target: accuracy of at least 97 %, and samples that another classifier recognises."""
    found = example("jem_digits").main(tmp_path / "jem")
    assert found["breaches"] == 0
    assert found["accuracy"] >= 0.97
    assert found["recognised"]["gaussian"]["low"] > 0.5
    assert found["recognised"]["noise"]["low"] > 0.2  # chance level 0.1
