"""Every parser of ours on inputs that are the same each time.

`python -m ebmkit_tests.fuzz` tries more.
"""

import random

import pytest
from ebmkit_tests.fuzz.mutate import mutated
from ebmkit_tests.fuzz.targets import TARGETS, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DEAR = ("run folder", "checkpoint, gone on with", "config", "assignments", "checkpoint", "hdf5")


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_read_is_read_or_refused(name):
    """Seeds and their mutants: no exception but `UserError`."""
    target, drawn = TARGETS[name], random.Random(0)
    seeds = target.seeds()
    outcomes = {check(target, seed) for seed in seeds}
    assert outcomes <= {"read", "refused"}
    for _ in range(5 if name in DEAR else 25):
        check(target, mutated(drawn, seeds))


WORDS = ["ce", "dsm", "+", "*", "0.5", "25/255", ":", "=", "t0"]
TEXT = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\s*[-+0-9.e/*a-z:=,{}\[\]' ]{0,40}", fullmatch=True),
    st.lists(st.sampled_from(WORDS)).map("".join),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if t.text and n not in DEAR])
@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=TEXT)
def test_whatever_is_typed_is_read_or_refused(name, text):
    """Text of all kinds, as people never type it."""
    check(TARGETS[name], text.encode("utf-8", "surrogatepass"))
