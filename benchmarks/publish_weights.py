"""Put the weights of a run into the package, as a pretrained model.

    python benchmarks/publish_weights.py RUN NAME --task joint --recipe digits \
        --description "..." --data "..." --limit "..."
    ebmkit evaluate --pretrained NAME
    python benchmarks/publish_weights.py ... --stored runs/pretrained/NAME/evaluation

writes ``ebmkit/weights/NAME`` (`ebmkit.pretrained`): the averaged weights as float16, and a model
card with the figures in RUN/evaluation. The second call adds the figures of the float16 weights and
their difference. The run may be unfinished: its newest checkpoint is published, with its noise
level calibrated and the Gaussians of its classes fitted as at the end of training, and the card
states its step. An existing model of this name is replaced. To make it the default of a command,
change `ebmkit.pretrained.DEFAULTS`.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from ebmkit import load
from ebmkit.errors import UserError
from ebmkit.models.config import ModelConfig
from ebmkit.models.saving import model_files
from ebmkit.pretrained import CARD, WEIGHTS, Figure, PretrainedCard, Training
from ebmkit.storage.manifest import MANIFEST, Manifest, entry_of
from ebmkit.training import RunFolder, resolve
from ebmkit.training.setup import calibrate_sigma, fit_class_gaussians, images_of

LARGEST, LARGEST_SUM = 8_000_000, 20_000_000
"""Maximum bytes of a model, and of all together."""

DENOISERS = {
    "unconditional": "sigma given",  # if the model takes it
    "blind": "sigma estimated",
    "conditional_true": "label and sigma given",
}
"""Denoisers of the suite ``denoise`` in a model card, with their names there."""


def publish(run: Path, name: str, options: argparse.Namespace, weights: Path = WEIGHTS) -> Path:
    """Write the folder of the pretrained model ``name`` from ``run``; return it."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    model = load(run)
    card, built_from = model.card, model.built_from
    assert card is not None
    assert isinstance(built_from, ModelConfig)
    if card.plugins:
        raise UserError(f"{str(run)!r} was trained with plugins, which the package does not have")
    if card.steps < config["steps"]:  # these are computed at the end of training
        data = resolve(config).dataset
        data = data.model_copy(update={"data_dir": options.data_dir or data.data_dir})
        train, held_out = images_of(data, "train"), images_of(data, "validation")
        calibrate_sigma(model, held_out if len(held_out) else train, card)
        model.class_gaussians = fit_class_gaussians(model, train, card)
    parameters = sum(p.numel() for p in model.parameters())
    config["dataset"]["data_dir"] = None  # of the machine that trained
    document = PretrainedCard(
        description=options.description,
        task=options.task,
        data=options.data,
        parameters=parameters,
        training=training_of(run, config, card.steps, card.objective, options.recipe),
        figures=figures_of(options.evaluation or run / "evaluation", options.stored),
        measured=measured_by(
            options.stored or options.evaluation or run / "evaluation", options.stored is None
        ),
        limits=options.limit,
        licence=options.licence,
    )
    files = model_files(model.half(), built_from, card)
    files["config.yaml"] = yaml.safe_dump(config, sort_keys=False).encode()
    files[CARD] = (document.model_dump_json(indent=1) + "\n").encode()
    entries = {file: entry_of(content) for file, content in files.items()}
    files[MANIFEST] = Manifest(files=entries).to_bytes()
    check_size(name, sum(map(len, files.values())), weights)
    folder = weights / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    load(folder)
    return folder


def check_size(name: str, size: int, weights: Path) -> None:
    """Check the limits of the package's size."""
    others = sum(path.stat().st_size for path in weights.glob("*/*") if path.parent.name != name)
    if size > LARGEST or size + others > LARGEST_SUM:
        raise UserError(
            f"{name!r} has {size:,} bytes, all together {size + others:,}: the limits are "
            f"{LARGEST:,} and {LARGEST_SUM:,}"
        )


def training_of(
    run: Path, config: dict[str, Any], steps: int, objective: str, recipe: str
) -> Training:
    """How the run was trained, from its files."""
    where = json.loads((run / "environment.json").read_text())
    cost = run / "cost.json"
    per_step = sum(json.loads(cost.read_text())["flops"].values()) if cost.is_file() else None
    state = RunFolder.open(run).load_checkpoint() or {}
    return Training(
        recipe=recipe,
        command=" ".join(Path(a).name if a.startswith("/") else a for a in where["command"]),
        objective=objective,
        steps=steps,
        of=config["steps"],
        averaged=config["optimizer"]["ema"] or 0.0,
        seed=config["seed"],
        flops=None if per_step is None else float(per_step * steps),
        seconds=state.get("seconds", 0.0),
        hardware=where["gpu"] or f"{where['threads']} of {where['cores']} CPU cores, shared",
        torch=where["torch"],
        commit=where["git_commit"],
    )


def figures_of(evaluation: Path, stored: Path | None) -> list[Figure]:
    """The figures in the folder ``stored``, compared with those in ``evaluation`` of the run."""
    before = _figures(evaluation)
    if stored is None:
        return list(before.values())
    return [
        figure.model_copy(update={"float32": before[name].value if name in before else None})
        for name, figure in _figures(stored).items()
    ]


def _figures(evaluation: Path) -> dict[str, Figure]:
    found: list[Figure] = []
    if (path := evaluation / "classify.json").is_file():
        own = json.loads(path.read_text())
        low, high = own["accuracy_interval"]
        found.append(
            Figure(
                name="accuracy", value=own["accuracy"], low=low, high=high, unit="%",
                images=own["images"],
            )
        )  # fmt: skip
    if (path := evaluation / "denoise.json").is_file():
        own = json.loads(path.read_text())
        for denoiser, how in DENOISERS.items():
            if own.get("knows_sigma", {}).get(denoiser) == "unused":
                how = "blind"
            levels = own["denoisers"].get(denoiser, {"psnr": {}})["psnr"]
            found += [
                Figure(
                    name=f"PSNR at sigma {level}/255, {how}",
                    value=psnr["value"],
                    low=psnr["low"],
                    high=psnr["high"],
                    unit="dB",
                    images=psnr["count"],
                    noisy=own["psnr_noisy"][level],
                )
                for level, psnr in levels.items()
            ]
    return {figure.name: figure for figure in found}


def measured_by(evaluation: Path, float32: bool) -> str:
    """How the figures were measured, from the JSON files in ``evaluation``."""
    files = [evaluation / f"{suite}.json" for suite in ("classify", "denoise")]
    own = next((json.loads(path.read_text()) for path in files if path.is_file()), None)
    if own is None:
        return "Nothing was measured."
    where, kind = own["environment"], "float32 weights of the run" if float32 else "stored weights"
    return (
        f"Measured on the {kind} by `ebmkit evaluate` on the {own['split']} split of "
        f"{own['dataset']} ({own['images']:,} of {own['of']:,} images), seed {own['seed']}; "
        "intervals are 95 %. PSNR is the mean over images of the PSNR of the output clipped to "
        f"[0, 1]. {where['cores']} CPU cores, PyTorch {where['torch']}, code at "
        f"{where['git_commit']}."
    )


def parser() -> argparse.ArgumentParser:
    """Arguments of the script."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("run", type=Path, help="run folder, finished or not")
    made.add_argument("name", help="name of the pretrained model")
    kinds = ["joint", "classifier", "denoiser", "diffusion"]
    made.add_argument("--task", required=True, choices=kinds)
    made.add_argument("--recipe", required=True, help="name of the recipe of the run")
    made.add_argument("--description", required=True, help="what the model is, in a line")
    made.add_argument("--data", required=True, help="data set, its source and splits")
    made.add_argument("--limit", action="append", default=[], help="a limit; repeatable")
    made.add_argument("--licence", default="Apache-2.0")
    made.add_argument("--evaluation", type=Path, help="evaluation of the run [RUN/evaluation]")
    made.add_argument("--stored", type=Path, help="evaluation of the float16 weights")
    made.add_argument("--data-dir", type=Path, help="data of an unfinished run")
    return made


if __name__ == "__main__":
    given = parser().parse_args()
    print(publish(given.run, given.name, given))
