"""JEM and ce+dsm at equal compute: accuracy, calibration, robustness, OOD detection, time.

    uv run python benchmarks/jem.py --data-dir DIR --out runs/jem

Each row is a run in OUT, trained and evaluated as by the command line. Finished rows are not
repeated, and an interrupted row resumes. Equal compute means equal FLOPs of the training steps,
including Langevin steps, as counted by `ebmkit cost`; seconds are also measured. The result
``benchmarks/results/jem.json`` is the source of the documentation page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

import ebmkit
from ebmkit.evaluation import evaluate as run_suites
from ebmkit.storage import write_atomically
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.setup import images_of

RESULTS = Path(__file__).parent / "results" / "jem.json"

ROWS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    # name: (recipe, settings, compute as a multiple of the first row's; None: the recipe's steps)
    "ce+dsm": ("cifar10-adamw", {}, None),
    "jem, equal compute": ("cifar10-jem-short", {}, 1.0),
    "jem, its authors' rate, equal compute": (
        "cifar10-jem-short",
        {"optimizer": {"lr": 1e-4}},
        1.0,
    ),
    "jem, 3 times the compute": ("cifar10-jem-short", {}, 3.0),
    "ce, JEM's network, equal compute": ("cifar10-jem-short", {"objective": "ce"}, 1.0),
    "digits, ce+dsm": ("digits-adamw", {}, None),
    "digits, jem": ("digits-jem", {}, None),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "robustness": {
        "images": 100,
        "steps": 20,
        "restarts": 1,
        "defences": ["direct"],
        "linf": ["0", "1/255", "2/255", "4/255"],
        "l2": [0, 0.1, 0.25, 0.5],
        "noise_levels": [0],
        "checks": False,
    },
}


STRANGERS = {
    "cifar10": ["cifar100", "interpolations", "uniform"],
    "digits": ["interpolations", "constant", "uniform"],
}

OOD_IMAGES = 1000
"""Number of test images, and of out-of-distribution images, in the suite ood."""


def configuration(name: str, data_dir: Path) -> Any:
    """Configuration of a row, with the number of steps that its share of compute allows."""
    recipe, settings, share = ROWS[name]
    where = {} if name.startswith("digits") else {"dataset": {"data_dir": data_dir.absolute()}}
    config = resolve(where, settings, recipe=recipe)
    if share is None:
        return config
    first = next(iter(ROWS))
    whole = step_cost(configuration(first, data_dir)) * configuration(first, data_dir).steps
    steps = round(share * whole / step_cost(config))
    return resolve(where, settings, {"steps": steps}, recipe=recipe)


def step_cost(config: Any) -> int:
    """FLOPs of a training step."""
    return int(assemble(config).budget.cost(1).step_flops)


def train(name: str, data_dir: Path, out: Path) -> RunFolder:
    """Open the run of a row, and start or resume its training if it is not finished."""
    config = configuration(name, data_dir)
    path = out / name.replace(", ", "_").replace(" ", "-").replace("'", "")
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, config)
    run.check_config(config)
    trainer = assemble(config, run)
    if trainer.step < config.steps:
        trainer.fit()
    return run


def evaluate(name: str, run: RunFolder, data_dir: Path) -> dict[str, Any]:
    """Results of the suites, and cost of the run."""
    config = resolve(run.config())
    test = images_of(config.dataset, "test")
    model = ebmkit.load(run.path)
    out = run.path / "study"
    suites = ["classify", "calibration", "ood", "robustness"]
    found = {}
    options = OPTIONS | {"ood": {"sets": STRANGERS[config.dataset.name]}}
    for suite in suites:
        result = run_suites(
            model,
            test,
            [suite],
            out,
            limit=OOD_IMAGES if suite == "ood" else None,
            noise_levels=(0,),
            options={suite: options[suite]} if suite in options else {},
            data_dir=data_dir,
        )
        found[suite] = result[suite].document
    denoises = model.card is not None and model.card.sigma_range is not None
    if denoises:
        found["denoise"] = run_suites(model, test, ["denoise"], out, limit=1000)["denoise"].document
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    environment = json.loads((run.path / "environment.json").read_text())
    robust = found["robustness"]
    return {
        "name": name,
        "dataset": config.dataset.name,
        "objective": config.objective,
        "recipe": ROWS[name][0],
        "backbone": config.backbone,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "langevin_steps": config.negatives.steps if "jem" in config.objective else 0,
        "flops": step_cost(config) * config.steps,
        "seconds": checkpoint["seconds"],
        "breaches": len((checkpoint["rollback"] or {}).get("history", [])),
        "seed": config.seed,
        "images": found["classify"]["images"],
        "accuracy": found["classify"]["accuracy"],
        "accuracy_interval": found["classify"]["accuracy_interval"],
        "ece": found["calibration"]["ece"],
        "auroc": {
            name: {score: measures["auroc"] for score, measures in one["scores"].items()}
            for name, one in found["ood"]["sets"].items()
        },
        "ood_images": found["ood"]["images"],
        "attacked_images": robust["images"],
        "epsilons": robust["epsilons"],
        "robust": {norm: curves["direct"] for norm, curves in robust["curves"].items()},
        "psnr": found["denoise"]["psnr"] if denoises else None,
        "psnr_noisy": found["denoise"]["psnr_noisy"] if denoises else None,
        "environment": {k: environment[k] for k in ("torch", "cores", "gpu", "git_commit")},
    }


def main() -> None:
    """Run the selected rows and write their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="holds CIFAR-10 and CIFAR-100")
    parser.add_argument("--out", type=Path, default=Path("runs/jem"))
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--train-only", action="store_true", help="skip the evaluation")
    options = parser.parse_args()
    console = Console()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        run = train(name, options.data_dir, options.out)
        if options.train_only:
            console.print(f"{name}: trained")
            continue
        results[name] = evaluate(name, run, options.data_dir)
        ordered = {key: results[key] for key in ROWS if key in results}
        write_atomically(RESULTS, (json.dumps(ordered, indent=1) + "\n").encode())
        console.print(f"{name}: {results[name]['accuracy']:.2%}")


if __name__ == "__main__":
    main()
