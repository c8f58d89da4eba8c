"""Noise levels as people write them."""

import pytest
from pydantic import BaseModel

from ebmkit.errors import UserError
from ebmkit.noise import Sigma, SigmaOrZero, format_sigma, parse_sigma


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
def test_forms(value, sigma):
    assert parse_sigma(value) == pytest.approx(sigma, rel=1e-15)


@pytest.mark.parametrize(
    "value",
    ["abc", "", "/", "25/", "/255", "1/0", "1/2/3", "25,5", "0x10", "25/255/1", None, True, [0.1]],
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(
        UserError, match="is not a noise level: write a number or a fraction, as in"
    ):
        parse_sigma(value)


@pytest.mark.parametrize("value", ["0", "-1", "-25/255", "0/255", "nan", "inf", "1e999", 0, -0.1])
def test_only_finite_numbers_above_zero_are_levels(value):
    with pytest.raises(UserError, match="must be a finite number above 0"):
        parse_sigma(value)


def test_no_noise_is_a_level_only_where_allowed():
    class Config(BaseModel):
        sigma: SigmaOrZero

    assert Config(sigma="0/255").sigma == parse_sigma(0, allow_zero=True) == 0
    for value in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match="must be a finite number not below 0"):
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
