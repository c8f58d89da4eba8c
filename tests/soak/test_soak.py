"""The short form of `python -m ebmkit_tests.soak`: one or two kills per scenario."""

import pytest
from ebmkit_tests.soak.kills import kill_and_compare
from ebmkit_tests.soak.scenarios import TRAININGS

pytestmark = pytest.mark.slow

CASES = [
    ("ce+dsm", 2, 1),
    ("muon", 1, 0),
    ("jem-diverging", 1, 1),
    ("two-ranks", 1, 0),
]


@pytest.mark.parametrize(("name", "kills", "saves"), CASES, ids=[name for name, *_ in CASES])
def test_resume_is_bit_identical_after_sigkill(tmp_path, name, kills, saves):
    """Weights, averages, optimiser, buffer, divergence state, best weights and metrics.

    ``muon`` runs the convolutions, norms and GELUs with our derivatives (thresholds at 0).
    ``jem-diverging`` covers the replay buffer and the snapshots of ``jem``.
    """
    outcome = kill_and_compare(TRAININGS[name], tmp_path, kills, saves, 1, True, print)
    assert outcome.differing == []
    assert outcome.kills >= kills
    assert outcome.in_a_save >= saves  # shown by the partial file


def test_resume_without_optimizer_state_is_detected(tmp_path):
    """Control: the comparison must find an injected defect."""
    control = TRAININGS["control-optimizer"]
    differing = kill_and_compare(control, tmp_path, 1, 0, 2, True, print).differing
    assert any("state.model" in where for where in differing)
