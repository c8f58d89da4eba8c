"""Each objective on a labelled 2-D mixture with known density.

    uv run python benchmarks/mixture.py --out runs/mixture

The mixture and the training loop are from ``examples/mixture_2d.py``. Each row is trained once per
seed, and its errors are measured on a grid against the closed form. Finished rows are kept in OUT
and not repeated. Writes ``benchmarks/results/mixture.json``, the source of the documentation page,
and a plot of the models of the first seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import ebmkit
from ebmkit.compute import environment
from ebmkit.data import NoiseLaw
from ebmkit.storage import write_atomically

RESULTS = Path(__file__).parent / "results" / "mixture.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "mixture-objectives.png"
EXAMPLE = Path(__file__).parents[1] / "examples" / "mixture_2d.py"

STEPS, BATCH, SEEDS = 2000, 512, (0, 1, 2)
LAW = NoiseLaw(kind="log-uniform", min=0.05, max=0.2)
LEVELS = (0.05, 0.1, 0.2)
NODES = 64
GRID = {"count": 151, "reach": 1.5}


class Row(NamedTuple):
    """A row: objective, noise law (None: one sigma), and whether the model is given sigma."""

    objective: str
    law: NoiseLaw | None = None
    told: bool = False
    by_class: bool = False  # whether log p(y|c) has a free constant for each class
    temperature: float = 1.0  # of the chains that sample negatives

    @property
    def remedy(self) -> str | None:
        """Correction of the model before the comparison."""
        if self.by_class:
            return "its two constants set"
        return "its log p over T" if self.temperature != 1 else None


ROWS = {
    "ce+dsm": Row("ce+dsm"),
    "cdsm": Row("cdsm", by_class=True),
    "ce+cdsm": Row("ce+cdsm"),
    "ce+ism": Row("ce+ism"),
    "jem": Row("ce+ml"),
    "jem, chains at T = 0.1": Row("ce+ml", temperature=0.1),
    "ce+dsm under a law, told sigma (NCSN)": Row("ce+dsm", LAW, told=True),
    "ce+dsm under a law, blind": Row("ce+dsm", LAW),
}


def load_example() -> ModuleType:
    """``examples/mixture_2d.py`` as a module."""
    spec = importlib.util.spec_from_file_location("mixture_2d", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blind_log_joint(mixture: ebmkit.GaussianMixture, law: NoiseLaw, y: Tensor) -> Tensor:
    r"""Log joint density (N, C) that a blind network learns under a log-uniform ``law``.

    Its score is that of the density :math:`q(y) \propto \int \pi(\sigma)\,\sigma^2 p_\sigma(y)`
    (the gradient of log q is `GaussianMixture.blind_score`), and its label posterior is that of
    :math:`\int \pi(\sigma)\, p_\sigma(y, c)`.
    """
    low, high = law.range
    nodes = low * (high / low) ** ((torch.arange(NODES) + 0.5) / NODES)
    joint = torch.stack([mixture.log_joint(y, float(s)) for s in nodes])  # (S, N, C)
    density = (joint.logsumexp(2) + 2 * nodes.log()[:, None]).logsumexp(0)
    return density[:, None] + joint.logsumexp(0).log_softmax(1)


def warmed(log_joint: Tensor, temperature: float) -> Tensor:
    r"""``log_joint`` (N, C) with the density that chains of ``temperature`` T sample.

    Maximum likelihood converges when its negatives, of density :math:`q^{1/T}`, match the images,
    of density :math:`p_\sigma`. So the learned density is :math:`q = p_\sigma^T`; the label
    posterior does not change.
    """
    return log_joint.logsumexp(1)[:, None] / temperature + log_joint.log_softmax(1)


def train(example: ModuleType, row: Row, seed: int, steps: int) -> ebmkit.JointModel:
    """Train the model of ``row``."""
    law = row.law or example.AT_ONE_SIGMA
    model: ebmkit.JointModel = example.learn(
        example.truth(), steps, row.objective, law, row.told, seed, BATCH, row.temperature
    )
    return model


def compare(
    example: ModuleType, row: Row, model: ebmkit.JointModel, sigma: float, points: Tensor
) -> tuple[Any, Any, Any]:
    """Fields of the exact mixture, of the corrected model, and of the uncorrected model.

    The correction adjusts what the objective cannot determine: the constant of each class, or the
    temperature of the chains. Both models are aligned by one constant.
    """
    mixture = example.truth()
    if row.law is not None and not row.told:
        exact = example.fields(lambda y: blind_log_joint(mixture, row.law, y), points)
    else:
        exact = example.fields(lambda y: mixture.log_joint(y, sigma), points)
    plain = example.fields(lambda y: model.log_joint(y, sigma), points)
    right = plain
    if row.temperature != 1:
        right = example.fields(lambda y: warmed(model.log_joint(y, sigma), row.temperature), points)
    return (
        exact,
        example.aligned(right, exact, by_class=row.by_class),
        example.aligned(plain, exact),
    )


def measure(example: ModuleType, row: Row, model: ebmkit.JointModel) -> dict[str, Any]:
    """Errors of ``model``: per noise level, their maxima, and those before the correction."""
    points = example.plane(**GRID)
    levels: dict[str, dict[str, float]] = {}
    result: dict[str, Any] = {}
    for sigma in LEVELS if row.told else (example.SIGMA,):
        exact, found, plain = compare(example, row, model, sigma, points)
        levels[str(sigma)] = example.distances(found, exact, sigma)
        if row.remedy:
            result["errors_before"] = example.distances(plain, exact, sigma)
    names = next(iter(levels.values()))
    worst = {name: max(errors[name] for errors in levels.values()) for name in names}
    return {"errors": worst, "levels": levels, **result}


def main() -> None:
    """Train and measure the selected rows; write results and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mixture"), help="keeps the rows")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG file to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, example = Console(), load_example()
    commit = environment()["git_commit"]
    drawn: dict[str, tuple[Any, float]] = {}
    found: dict[str, Any] = {}
    for name, row in ROWS.items():
        if name not in options.only:
            continue
        rows = []
        for seed in options.seeds:
            stem = options.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}-{options.steps}"
            model = example.learner(row.told)
            if stem.with_suffix(".json").exists():
                model.load_state_dict(torch.load(stem.with_suffix(".pt"), weights_only=True))
                rows.append(json.loads(stem.with_suffix(".json").read_text()))
            else:
                console.print(f"{name}, seed {seed}")
                begun = time.process_time()
                model = train(example, row, seed, options.steps)
                seconds = time.process_time() - begun
                torch.save(model.state_dict(), stem.with_suffix(".pt"))
                description = {"seed": seed, "cpu_seconds": seconds, "git_commit": commit}
                rows.append({**description, **measure(example, row, model)})
                write_atomically(stem.with_suffix(".json"), json.dumps(rows[-1]).encode())
            console.print(rows[-1]["errors"])
            if seed == options.seeds[0]:
                points = example.plane()
                exact, right, plain = compare(example, row, model, example.SIGMA, points)
                if row.law is None or row.told:
                    drawn.setdefault(f"truth at {example.SIGMA}", (exact, example.SIGMA))
                else:
                    drawn["truth under the law, blind"] = (exact, example.SIGMA)
                shown = right if row.temperature == 1 else plain
                drawn[name.replace(", ", ",\n")] = (shown, example.SIGMA)
        description = {"objective": row.objective, "told": row.told, "remedy": row.remedy}
        found[name] = {**description, "runs": rows}
    document = {
        "what": f"{options.steps} steps of {BATCH} points, perceptron of 64 features",
        "sigma": example.SIGMA,
        "law": LAW.model_dump(),
        "levels": LEVELS,
        "rows": found,
        "environment": environment(),
    }
    write_atomically(options.results, (json.dumps(document, indent=1) + "\n").encode())
    example.draw(drawn, options.picture)
    console.print(f"wrote {options.results} and {options.picture}")


if __name__ == "__main__":
    main()
