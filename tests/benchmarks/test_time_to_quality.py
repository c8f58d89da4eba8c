"""Time to quality on synthetic runs: when a mark is reached, and the shortest length for it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = (0.9, (3.0, 4.0, 5.0))


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def benchmark():
    return module(ROOT / "benchmarks" / "time_to_quality.py")


def run(who="ours", steps=100, seed=0, accuracy=0.9, psnr=(3.0, 4.0, 5.0)):
    own = {"who": who, "recipe": f"{who}-recipe", "steps": steps, "seed": seed, "commit": "abc"}
    own |= {"tflop": 2.0 * steps, "seconds": 0.5 * steps}
    return own | {"accuracy": accuracy, "psnr": list(psnr)}


def test_mark_requires_the_mean_over_seeds_of_all_four_metrics(benchmark):
    assert benchmark.reaches([run()], MARK)
    assert benchmark.reaches([run(accuracy=0.8), run(accuracy=1.0, seed=1)], MARK)
    assert not benchmark.reaches([run(accuracy=0.8), run(accuracy=0.99, seed=1)], MARK)
    for i in range(3):
        low = [value - 0.01 * (i == j) for j, value in enumerate(MARK[1])]
        assert not benchmark.reaches([run(psnr=low)], MARK)


def runs():
    return [
        run("AdamW", 400, accuracy=0.5),
        run("ours", 200, accuracy=0.92, seed=0),
        run("ours", 200, accuracy=0.94, seed=1),
        run("ours", 100, accuracy=0.8),
        run("ours", 300, accuracy=0.99),
    ]


def test_summary_has_the_shortest_length_that_reaches_each_mark(benchmark):
    hard = (0.98, (3.0, 4.0, 5.0))
    rows = benchmark.summary(runs(), [MARK, hard])
    adamw, ours = rows[:2]
    assert adamw == {"mark": MARK, "who": "AdamW", "longest_tried": 400}
    assert (ours["steps"], ours["tflop"], ours["seconds"], ours["seeds"]) == (200, 400, 100, 2)
    assert ours["accuracy"] == pytest.approx(0.93)
    assert ours["psnr"] == [3, 4, 5]
    assert [(row["mark"], row["who"], row.get("steps")) for row in rows[2:]] == [
        (hard, "AdamW", None),
        (hard, "ours", 300),
    ]


def test_documentation_page_shows_the_measured_values(benchmark, monkeypatch, tmp_path):
    hooks = module(ROOT / "docs" / "hooks.py")
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert hooks.on_page_markdown("<!-- time-to-quality -->").count("Not measured yet.") == 2
    found = {
        "environment": {"cores": 2, "torch": "2.15", "git_commit": "later"},
        "marks": benchmark.summary(runs(), [MARK]),
        "runs": runs(),
    }
    (tmp_path / "time-to-quality-digits.json").write_text(json.dumps(found))
    page = hooks.on_page_markdown("<!-- time-to-quality -->")
    assert page.count("Not measured yet.") == 1
    assert "| 90.0%, 3.0 / 4.0 / 5.0 | `AdamW-recipe` | not reached by 400 |" in page
    assert "| `ours-recipe` | 200 | 400.0 | 100 | 93.0% | 3.00 / 4.00 / 5.00 |" in page
    assert "2 seeds, seconds of training. 2 CPU cores, PyTorch 2.15, code at abc." in page
