"""Errors for users: one sentence, with the nearest valid name."""

from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

from ebmkit.errors import UserError, unknown_name, validated
from ebmkit.registry import find


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: int = Field(64, ge=1)
    depth: int = 18


class Other(BaseModel):
    model_config = ConfigDict(extra="forbid")
    stride: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    maybe: Other | None = None
    steps: Annotated[int, Field(ge=0)] = 0


def test_unknown_name_error_suggests_the_nearest_name():
    error = unknown_name("dataset", "Cifar-10", ["digits", "cifar10", "cifar100"])
    assert str(error) == (
        "unknown dataset 'Cifar-10': did you mean 'cifar10'? Known: cifar10, cifar100, digits"
    )


def test_unknown_name_error_lists_names_if_none_is_near():
    assert str(unknown_name("head", "zzz", ["b", "a"])) == "unknown head 'zzz': known: a, b"


def test_find_returns_the_entry_or_raises():
    assert find("head", {"a": 1}, "a") == 1
    with pytest.raises(UserError, match="unknown head 'b'"):
        find("head", {"a": 1}, "b")


def test_valid_values_build_the_model():
    assert validated(Outer, {"inner": {"width": 8}, "steps": 3}, "config").inner.width == 8


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"stpes": 1},
            "config: there is no field 'stpes': did you mean 'steps'? "
            "fields here: inner, maybe, steps",
        ),
        (
            {"inner": {"widht": 1}},
            "config: there is no field 'inner.widht': did you mean 'width'? "
            "fields here: depth, width",
        ),
        (
            {"maybe": {"strides": 1}},
            "config: there is no field 'maybe.strides': did you mean 'stride'? fields here: stride",
        ),
        (
            {"inner": {"width": 0}},
            "config: inner.width = 0 is not legal: input should be greater than or equal to 1",
        ),
        (
            {"steps": "many"},
            "config: steps = 'many' is not legal: input should be a valid integer, "
            "unable to parse string as an integer",
        ),
    ],
)
def test_invalid_value_error_is_one_sentence(values, sentence):
    with pytest.raises(UserError) as caught:
        validated(Outer, values, "config")
    assert str(caught.value) == sentence
