"""`benchmarks/annealing.py` with fewer steps: its result and its plot."""

import importlib.util
from pathlib import Path

import pytest
from ebmkit_tests.support import known_targets as known


@pytest.fixture(scope="module")
def benchmark_module():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "annealing.py"
    spec = importlib.util.spec_from_file_location("annealing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_only_annealed_chains_recover_the_weights_of_the_modes(
    benchmark_module, monkeypatch, tmp_path
):
    """The rare mode has weight 0.2: annealed and exact shares agree within 4 standard errors.

    Naive chains do not change modes, so about half of them stay in the rare one, as at the start.
    """
    monkeypatch.setattr(benchmark_module, "score_of", known.score)  # the same score, in closed form
    document, ends = benchmark_module.measure(chains=1000, seed=3, levels=30, inner=20)
    rare = {name: shares[1] for name, shares in document["shares"].items()}
    error = document["standard_error"]
    assert rare["annealed"] == pytest.approx(0.2, abs=4 * error)
    assert rare["exact"] == pytest.approx(0.2, abs=4 * error)
    assert rare["naive"] > 0.2 + 15 * error
    benchmark_module.draw(document, ends, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
