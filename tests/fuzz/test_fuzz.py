"""Every parser of the package on a fixed set of inputs.

`python -m ebmkit_tests.fuzz` tries more inputs.
"""

import random

import pytest
from ebmkit_tests.fuzz.mutate import mutated
from ebmkit_tests.fuzz.targets import TARGETS, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOW = ("run folder", "checkpoint, resumed", "config", "assignments", "checkpoint", "hdf5")


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_raise_only_user_errors(name):
    """Seeds and mutated seeds."""
    target, drawn = TARGETS[name], random.Random(0)
    seeds = target.seeds()
    outcomes = {check(target, seed) for seed in seeds}
    assert outcomes <= {"read", "refused"}
    for _ in range(2 if name in SLOW else 25):
        check(target, mutated(drawn, seeds))


WORDS = ["ce", "dsm", "+", "*", "0.5", "25/255", ":", "=", "t0"]
TEXT = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\s*[-+0-9.e/*a-z:=,{}\[\]' ]{0,40}", fullmatch=True),
    st.lists(st.sampled_from(WORDS)).map("".join),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if t.text and n not in SLOW])
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXT)
def test_random_text_raises_only_user_errors(name, text):
    check(TARGETS[name], text.encode("utf-8", "surrogatepass"))
