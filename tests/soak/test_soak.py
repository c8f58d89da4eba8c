"""The short form of `python -m ebmkit_tests.soak`: a few kills of each kind of training."""

import pytest
from ebmkit_tests.soak.kills import killed
from ebmkit_tests.soak.scenarios import TRAININGS

pytestmark = pytest.mark.slow

FEW = [("ce+dsm", 2, 1), ("muon", 1, 0), ("jem", 1, 1), ("jem-astray", 1, 0), ("two-ranks", 1, 0)]


@pytest.mark.parametrize(("name", "kills", "saves"), FEW, ids=[name for name, *_ in FEW])
def test_training_that_is_killed_ends_as_if_it_never_was(tmp_path, name, kills, saves):
    """Weights, averages, optimiser, buffer, watch, best weights and metrics: the same bits."""
    outcome = killed(TRAININGS[name], tmp_path, kills, saves, 1, True, print)
    assert outcome.differing == []
    assert outcome.kills >= kills
    assert outcome.in_a_save >= saves  # proven by the file left behind


@pytest.mark.parametrize("name", ["control-randomness", "control-optimizer"])
def test_what_is_not_restored_is_seen(tmp_path, name):
    """A defect put in on purpose must show, or the comparison proves nothing."""
    differing = killed(TRAININGS[name], tmp_path, 1, 0, 2, True, print).differing
    assert any("state.model" in where for where in differing)
