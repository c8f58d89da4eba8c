"""Accepted forms of noise levels, and distributions of noise laws."""

import math

import pytest
import torch
from pydantic import BaseModel, ValidationError

from ebmkit.errors import UserError, validated
from ebmkit.noise import NoiseLaw, Sigma, SigmaOrZero, format_sigma, parse_sigma

COUNT = 20_000
LOW, HIGH = 1 / 255, 100 / 255

# The distribution function of each law, from its definition.
LAWS = {
    "squared-uniform": lambda s: (s**0.5 - LOW**0.5) / (HIGH**0.5 - LOW**0.5),
    "log-uniform": lambda s: (s / LOW).log() / math.log(HIGH / LOW),
    "log-normal": lambda s: (
        0.5
        + torch.erf(4 * (s / (LOW * HIGH) ** 0.5).log() / math.log(HIGH / LOW) / 2**0.5)
        / (2 * math.erf(2**0.5))
    ),
    "uniform": lambda s: (s - LOW) / (HIGH - LOW),
}


@pytest.mark.parametrize(
    ("value", "sigma"),
    [
        ("25/255", 25 / 255),
        (" 25 / 255 ", 25 / 255),
        ("0.1", 0.1),
        ("1e-2", 0.01),
        (0.1, 0.1),
        (1, 1.0),
        ("12.5/255", 12.5 / 255),
        (157.4, 157.4),  # a sampler's largest level, from a saved configuration
        ("50/1", 50.0),
    ],
)
def test_accepted_forms_of_sigma(value, sigma):
    assert parse_sigma(value) == pytest.approx(sigma, rel=1e-15)


@pytest.mark.parametrize(
    "value",
    ["abc", "", "/", "25/", "/255", "1/0", "1/2/3", "25,5", "0x10", "25/255/1", None, True, [0.1]],
)
def test_sigma_that_is_not_a_number_is_refused(value):
    with pytest.raises(
        UserError, match="is not a noise level: write a number or a fraction, as in"
    ):
        parse_sigma(value)


@pytest.mark.parametrize("value", ["0", "-1", "-25/255", "0/255", "nan", "inf", "1e999", 0, -0.1])
def test_sigma_must_be_finite_and_positive(value):
    with pytest.raises(UserError, match="must be a finite number above 0"):
        parse_sigma(value)


def test_sigma_zero_is_accepted_only_if_allowed():
    class Config(BaseModel):
        sigma: SigmaOrZero

    assert Config(sigma="0/255").sigma == parse_sigma(0, allow_zero=True) == 0
    for value in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match="must be a finite number of 0 or more"):
            parse_sigma(value, allow_zero=True)


@pytest.mark.parametrize("value", ["25", 25, "50.0"])
def test_255ths_without_their_denominator_are_refused(value):
    with pytest.raises(UserError, match=f"did you mean {value}/255"):
        parse_sigma(value)


@pytest.mark.parametrize("level", [1, 15, 25, 50, 100])
def test_formatting_round_trips(level):
    assert format_sigma(level / 255) == f"{level}/255"
    assert parse_sigma(format_sigma(level / 255)) == level / 255


def test_a_field_reads_the_same_forms_and_its_own_dump():
    class Config(BaseModel):
        sigma: Sigma

    config = Config.model_validate({"sigma": "51/255"})
    assert config.sigma == 0.2
    assert Config.model_validate(config.model_dump(mode="json")) == config
    wide = Config.model_validate({"sigma": "50/1"})
    assert Config.model_validate_json(wide.model_dump_json()) == wide


@pytest.mark.parametrize("kind", LAWS)
def test_the_law_has_its_distribution_function(kind):
    law = NoiseLaw(kind=kind, min="1/255", max="100/255")
    sigma = law.sample(COUNT, torch.Generator().manual_seed(0), "cpu").double().sort().values
    expected = (torch.arange(COUNT) + 0.5) / COUNT
    distance = (LAWS[kind](sigma) - expected).abs().max()
    assert distance < 1.95 / COUNT**0.5  # Kolmogorov's statistic at 0.1 %
    assert sigma.min() >= LOW * (1 - 1e-6)
    assert sigma.max() <= HIGH * (1 + 1e-6)
    assert law.range == (LOW, HIGH)


def test_squared_uniform_law_from_zero_has_mean_max_over_three():
    law = NoiseLaw(kind="squared-uniform", max="20/255")  # E[u^2] = 1/3
    sigma = law.sample(COUNT, torch.Generator().manual_seed(0), "cpu")
    error = (1 / 5 - 1 / 9) ** 0.5 * (20 / 255) / COUNT**0.5
    assert abs(sigma.mean().item() - 20 / 255 / 3) < 4 * error


def test_fixed_law_and_no_noise():
    generator = torch.Generator()
    assert NoiseLaw(kind="fixed", max="25/255").sample(3, generator, "cpu").tolist() == (
        pytest.approx([25 / 255] * 3)
    )
    assert NoiseLaw().sample(2, generator, "cpu").tolist() == [0.0, 0.0]
    assert NoiseLaw(kind="fixed", max="25/255").range == (25 / 255, 25 / 255)
    assert NoiseLaw().range == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "uniform"}, "max above 0"),
        ({"kind": "uniform", "min": "50/255", "max": "25/255"}, "swap"),
        ({"kind": "log-uniform", "max": "25/255"}, "min above 0"),
        ({"kind": "log-normal", "max": "25/255"}, "min above 0"),
        ({"kind": "uniform", "max": "-1/255"}, "0 or more"),
        ({"kind": "uniform", "max": "nan"}, "0 or more"),
        ({"kind": "uniform", "max": "abc"}, "not a noise level"),
        ({"kind": "gaussian"}, "squared-uniform"),
    ],
)
def test_invalid_law_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        validated(NoiseLaw, values, "noise")


def test_noise_law_is_immutable():
    with pytest.raises(ValidationError):
        NoiseLaw().max = 1.0
