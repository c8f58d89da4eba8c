"""Naive against annealed Langevin: the benchmark's claim, with fewer steps, and its picture."""

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
def test_naive_chains_miss_the_shares_of_modes_and_annealed_ones_have_them(
    benchmark_module, monkeypatch, tmp_path
):
    """Within 4 standard errors of 0.2, where naive dynamics stay at the half they started with."""
    monkeypatch.setattr(benchmark_module, "score_of", known.score)  # the same, written out
    document, ends = benchmark_module.measure(chains=1000, seed=3, levels=30, inner=20)
    rare = {name: shares[1] for name, shares in document["shares"].items()}
    error = document["standard_error"]
    assert rare["annealed"] == pytest.approx(0.2, abs=4 * error)
    assert rare["exact"] == pytest.approx(0.2, abs=4 * error)
    assert rare["naive"] > 0.2 + 15 * error
    benchmark_module.draw(document, ends, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
