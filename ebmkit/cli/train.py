"""``ebmkit train``: train, then evaluate on the test images, with a table and pictures."""

from __future__ import annotations

import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ebmkit.cli.app import app
from ebmkit.cli.console import TensorBoard, Together, TrainingBar, console
from ebmkit.data import ImageSet, StreamedSet
from ebmkit.errors import UserError
from ebmkit.training import (
    Interrupted,
    Reporter,
    RunFolder,
    TrainConfig,
    Trainer,
    parse_assignments,
    read_config,
    resolve,
)
from ebmkit.training.assemble import assemble, images_of

__all__ = ["train"]

FINAL_IMAGES = 1000
"""The evaluation that ends a run looks at so many test images at the most."""


@app.command()
def train(
    dataset: Annotated[
        str | None, typer.Option(help="data set [default: digits]; see `ebmkit list datasets`")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="where its files are [default: data]")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="[default: gradresnet18]; see `ebmkit list backbones`")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="objectives joined by +, as ce+0.5*dsm [default: the recipe's, ce+dsm]"),
    ] = None,
    width: Annotated[int | None, typer.Option(help="channels of the first stage")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    seed: Annotated[
        int | None, typer.Option(help="of weights, order, augmentation and noise [default: 0]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="run folder [default: a new one under runs/]")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="defaults to start from [default: the data set's]")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="height and width to bring images to")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of configuration fields")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="one field, as optimizer.lr=1e-3; may be repeated"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1")] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run")] = None,
    evaluate: Annotated[
        bool, typer.Option(help="evaluate on the test images and draw pictures at the end")
    ] = True,
    tensorboard: Annotated[bool, typer.Option(help="also write TensorBoard events")] = False,
) -> None:
    """Train one joint model, then evaluate it on the test images.

    Without any option: GradResNet18 on scikit-learn's digits by ce+dsm, two minutes on two cores.
    Later settings win: recipe < --config < named options < --set.
    """
    named = _named(
        dataset=dataset,
        data_dir=data_dir,
        image_size=image_size,
        backbone=backbone,
        objective=objective,
        width=width,
        steps=steps,
        seed=seed,
        device=device,
    )
    layers = [read_config(config)] if config else []
    layers += [named, parse_assignments(set_ or [])]
    if tensorboard:
        TensorBoard.check()
    test = None
    if resume is None:
        resolved = resolve(*layers, recipe=recipe)
        prepared = _assemble(resolved, None)  # nothing is written if data or model are at fault
        if evaluate:
            test = images_of(resolved.dataset, "test", console.is_terminal)
        run = RunFolder.create(out or _fresh_folder(resolved), resolved)
        prepared.run = run
    else:
        if out is not None or recipe is not None:
            raise UserError("--resume goes on in its own folder: leave out --out and --recipe")
        run = RunFolder.open(resume)
        resolved = resolve(run.config(), *layers)
        run.check_same(resolved)
        prepared = _assemble(resolved, run)
        if evaluate:
            test = images_of(resolved.dataset, "test", console.is_terminal)
    _fit(prepared, run, tensorboard)
    if test is not None:
        try:
            _finish(prepared, run, test)
        except KeyboardInterrupt:
            console.print(
                "interrupted; the model is saved. Evaluate it with:\n"
                f"  ebmkit evaluate {_quoted(run)}",
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    console.print(f"run folder: {run.path}", soft_wrap=True, highlight=False)


def _quoted(run: RunFolder) -> str:
    return shlex.quote(str(run.path))


def _assemble(config: TrainConfig, run: RunFolder | None) -> Trainer:
    return assemble(config, run, progress=console.is_terminal)


def _named(
    dataset: str | None,
    data_dir: Path | None,
    image_size: int | None,
    width: int | None,
    **plain: Any,
) -> dict[str, Any]:
    """The named options that were given, as a configuration layer."""
    layer: dict[str, Any] = {key: value for key, value in plain.items() if value is not None}
    where = data_dir.absolute() if data_dir else None  # so that the run can be used from anywhere
    data = {"name": dataset, "data_dir": where, "image_size": image_size}
    given = {key: value for key, value in data.items() if value is not None}
    if given:
        layer["dataset"] = given
    if width is not None:
        layer["model"] = {"backbone": {"width": width}}
    return layer


def _fresh_folder(config: TrainConfig) -> Path:
    stem = f"{config.dataset.name}-{config.backbone}-{config.objective.replace('*', 'x')}"
    name = "".join(stem.split())
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


def _fit(trainer: Trainer, run: RunFolder, tensorboard: bool) -> None:
    config = trainer.config
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"{config.objective} on {trainer.train.name} ({len(trainer.train):,} images), "
        f"{config.backbone} with {parameters:,} parameters, {config.steps:,} steps "
        f"on {trainer.device}, in {run.path}",
        soft_wrap=True,
        highlight=False,
    )
    if trainer.step >= config.steps:
        console.print(f"this run is finished: {config.steps} of {config.steps} steps are done")
        return
    if trainer.step:
        console.print(f"going on after step {trainer.step}")
    bar = TrainingBar(config.steps, trainer.step)
    reporters: list[Reporter] = [bar]
    board = TensorBoard(run.path / "tensorboard", trainer.step) if tensorboard else None
    if board is not None:
        reporters.append(board)
    trainer.reporter = Together(reporters)
    start = time.perf_counter()
    first = trainer.step
    try:
        with bar if bar.live else nullcontext():
            trainer.fit()
    except Interrupted as stopped:
        console.print(
            f"interrupted; saved after step {stopped.step}. Go on with:\n"
            f"  ebmkit train --resume {_quoted(run)}",
            soft_wrap=True,
            highlight=False,
        )
        raise typer.Exit(130) from None
    finally:
        if board is not None:
            board.close()
    seconds = time.perf_counter() - start
    console.print(f"{config.steps - first:,} steps in {seconds:.0f} s")


def _finish(trainer: Trainer, run: RunFolder, test: ImageSet | StreamedSet) -> None:
    """Evaluate on the test images, print the table, draw the pictures."""
    from ebmkit.cli.evaluate import evaluate_run
    from ebmkit.pictures import learning_curves

    learning_curves(run.metrics(), run.path / "learning_curves.png")
    limit = FINAL_IMAGES if len(test) > FINAL_IMAGES else None
    model = trainer.trained.eval().requires_grad_(False)
    evaluate_run(model, run.path, test, limit=limit)
