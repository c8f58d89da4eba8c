"""Noise laws draw what they say."""

import math

import pytest
import torch
from pydantic import ValidationError

from ebmkit.data import NoiseLaw
from ebmkit.errors import UserError, validated

COUNT = 20_000
LOW, HIGH = 1 / 255, 100 / 255

# The distribution function of each law, from its definition.
LAWS = {
    "squared-uniform": lambda s: (s**0.5 - LOW**0.5) / (HIGH**0.5 - LOW**0.5),
    "log-uniform": lambda s: (s / LOW).log() / math.log(HIGH / LOW),
    "uniform": lambda s: (s - LOW) / (HIGH - LOW),
}


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


def test_the_papers_law_from_zero_has_mean_a_third_of_max():
    law = NoiseLaw(kind="squared-uniform", max="20/255")  # E[u^2] = 1/3
    sigma = law.sample(COUNT, torch.Generator().manual_seed(0), "cpu")
    error = (1 / 5 - 1 / 9) ** 0.5 * (20 / 255) / COUNT**0.5
    assert abs(sigma.mean().item() - 20 / 255 / 3) < 4 * error


def test_fixed_and_none():
    generator = torch.Generator()
    assert NoiseLaw(kind="fixed", max="25/255").sample(3, generator, "cpu").tolist() == (
        pytest.approx([25 / 255] * 3)
    )
    assert NoiseLaw().sample(2, generator, "cpu").tolist() == [0.0, 0.0]
    assert NoiseLaw(kind="fixed", max="25/255").range == (25 / 255, 25 / 255)
    assert NoiseLaw().range == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "uniform"}, "max above 0"),
        ({"kind": "uniform", "min": "50/255", "max": "25/255"}, "swap"),
        ({"kind": "log-uniform", "max": "25/255"}, "min above 0"),
        ({"kind": "uniform", "max": "-1/255"}, "not below 0"),
        ({"kind": "uniform", "max": "nan"}, "not below 0"),
        ({"kind": "uniform", "max": "abc"}, "not a noise level"),
        ({"kind": "gaussian"}, "squared-uniform"),
    ],
)
def test_an_illegal_law_is_told(values, told):
    with pytest.raises(UserError, match=told):
        validated(NoiseLaw, values, "noise")


def test_a_law_does_not_change():
    with pytest.raises(ValidationError):
        NoiseLaw().max = 1.0
