"""``ebmkit train``: train, then evaluate on the test images, with a table and plots."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from ebmkit.cli.console import Reporters, TensorBoard, TrainingBar, console, interrupted
from ebmkit.cli.evaluate import evaluate_run
from ebmkit.cli.options import declare, options_of
from ebmkit.errors import UserError

if TYPE_CHECKING:
    from ebmkit.distributed import DistributedContext
    from ebmkit.training import Reporter, RunFolder, TrainConfig, Trainer

TRIAL_STEPS = 4
"""How many steps ``--dry-run`` takes; all but the first are timed."""

FINAL_IMAGES = 1000
"""The evaluation that ends a run looks at so many test images at the most."""


def train(
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    backbone: str | None = None,
    objective: str | None = None,
    width: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    recipe: str | None = None,
    image_size: int | None = None,
    config: Path | None = None,
    set_: list[str] | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile_: str | None = None,
    resume: Path | None = None,
    evaluate: bool = True,
    tensorboard: Annotated[bool, Option("--tensorboard/--no-tensorboard")] = False,
    dry_run: bool = False,
) -> None:
    """Train a model, then evaluate it on the test images.

    Without options: GradResNet18 on scikit-learn's digits with ce+dsm, about 80 seconds on two
    cores. Later settings override earlier ones: recipe < --config < named options < --set. With
    `torchrun -m ebmkit train ...` all processes train one model.

    Args:
        dataset: data set, from `ebmkit list datasets` [default: digits]
        backbone: backbone, from `ebmkit list backbones` [default: set by the recipe, gradresnet18]
        objective: objectives joined by +, for example ce+0.5*dsm [default: set by the recipe,
            ce+dsm]
        width: channels of the first stage
        steps: number of optimiser steps
        seed: random seed of initial weights, data order, augmentation and noise [default: 0]
        out: run folder to create [default: a new one in runs/]
        recipe: recipe, from `ebmkit list recipes` [default: set by the data set]
        config: YAML file of configuration fields
        set_: configuration field, for example optimizer.lr=1e-3; repeatable
        precision: precision of training: auto, fp32, tf32, bf16 [default: set by the configuration,
            auto]
        compile_: compile the step: auto, on, off [default: auto]
        resume: run folder to resume
        evaluate: evaluate on the test images and write plots at the end
        tensorboard: also write TensorBoard events
        dry_run: estimate the cost of the run, and write nothing
    """
    from ebmkit.distributed import join
    from ebmkit.training import RunFolder, parse_assignments, read_config
    from ebmkit.training.loop import assemble
    from ebmkit.training.setup import images_of

    where = data_dir.absolute() if data_dir else None  # so that the run can be used from anywhere
    named = {
        "dataset": {"name": dataset, "data_dir": where, "image_size": image_size},
        "backbone": backbone,
        "model": {"backbone": {"width": width}},
        "objective": objective,
        "steps": steps,
        "seed": seed,
        "device": device,
        "compute": {"precision": precision, "compile": compile_},
    }
    layers = [read_config(config)] if config else []
    layers += [_given(named), parse_assignments(set_ or [])]
    if tensorboard:
        TensorBoard.check()
    if resume is not None and (out is not None or recipe is not None):
        raise UserError("--resume writes into its own folder: leave out --out and --recipe")
    if resume is not None and RunFolder.is_unborn(resume):
        console.say(f"nothing was saved in {resume} yet: the run starts from the beginning")
        out, resume = resume, None
    with join() as world, ExitStack() as stack:
        console.quiet = not world.first
        resolved, resume = _resolved(world, layers, recipe, out, resume)
        if dry_run:
            _estimate_cost(resolved, world)
            return
        run = RunFolder.open(resume) if resume is not None and world.first else None
        if run is not None:
            stack.enter_context(run.held())
        trainer = assemble(resolved, run, progress=console.is_terminal, world=world)
        test = images_of(resolved.dataset, "test", console.is_terminal) if evaluate else None
        if resume is None and world.first:  # nothing is written if data or model are at fault
            run = RunFolder.create(out or _fresh_folder(resolved), resolved)
            stack.enter_context(run.held())
            trainer.run = run
        path = world.broadcast(run.path if run else Path())
        _fit(trainer, path, tensorboard)
        if test is not None:
            from ebmkit.training.metrics import learning_curves

            try:
                if trainer.run is not None:
                    learning_curves(trainer.run.metrics(), path / "learning_curves.png")
                limit = FINAL_IMAGES if len(test) > FINAL_IMAGES else None
                model = trainer.trained.eval().requires_grad_(False)
                evaluate_run(model, path, test, limit=limit, world=trainer.world)
            except KeyboardInterrupt:
                interrupted(
                    "the model is saved. Evaluate it with:\n"
                    f"  ebmkit evaluate {shlex.quote(str(path))}",
                    signal.SIGINT,
                )
        console.say(f"run folder: {path}")


def cost(**options: Any) -> None:
    """Estimate the cost of a training run: parameters, FLOPs, memory and time; writes nothing.

    The options are those of `ebmkit train`. The FLOPs of Langevin steps, where an objective needs
    samples of the model, are listed separately.
    """
    train(**options, dry_run=True)


_RUN_OPTIONS = ("out", "resume", "evaluate", "tensorboard", "dry_run")
declare(cost, (option for option in options_of(train)[1] if option.name not in _RUN_OPTIONS))


def _resolved(
    world: DistributedContext,
    layers: list[dict[str, Any]],
    recipe: str | None,
    out: Path | None,
    resume: Path | None,
) -> tuple[TrainConfig, Path | None]:
    """The configuration, the same for all processes, and the run to resume, if any.

    Only the first process needs to see the run folder.
    """
    from ebmkit.distributed import launch, restarted
    from ebmkit.training import RunFolder, resolve

    found: tuple[dict[str, Any], Path | None] = ({}, None)
    if world.first:
        if resume is None:
            resolved = resolve(*layers, recipe=recipe)
            if restarted() and launch() is not None:
                resume = _interrupted_run(out, resolved)
        else:
            resolved = resolve(RunFolder.open(resume).config(), *layers)
        if resume is not None:
            RunFolder.open(resume).check_same(resolved)
        found = resolved.model_dump(mode="json"), resume
    config, resume = world.broadcast(found)
    return resolve(config), resume


def _interrupted_run(out: Path | None, config: TrainConfig) -> Path | None:
    """The folder that this command wrote to before its launcher started it again, if it did."""
    from ebmkit.distributed import launch
    from ebmkit.storage.reading import read_json

    folders = [out] if out is not None else sorted(Path("runs").glob(f"{_stem(config)}*"))
    for folder in folders:
        path = folder / "environment.json"
        if not path.is_file():
            continue
        with suppress(UserError):  # not ours to read
            document = read_json(path)
            if isinstance(document, dict) and document.get("launch") == launch():
                return folder
    return None


def _given(layer: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as a configuration layer."""
    found = {k: _given(v) if isinstance(v, dict) else v for k, v in layer.items()}
    return {key: value for key, value in found.items() if value is not None and value != {}}


def _stem(config: TrainConfig) -> str:
    stem = f"{config.dataset.name}-{config.backbone}-{config.objective.replace('*', 'x')}"
    return "".join(stem.split())


def _fresh_folder(config: TrainConfig) -> Path:
    path = Path("runs") / _stem(config)
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([path], numbered) if not folder.exists())


def _fit(trainer: Trainer, run: Path, tensorboard: bool) -> None:
    from ebmkit.data.imagesets import some_of
    from ebmkit.storage import write_atomically
    from ebmkit.training import Interrupted

    config, first = trainer.config, trainer.step
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.say(
        f"{config.objective} on {trainer.train.name} ({len(trainer.train):,} images), "
        f"{config.backbone} with {parameters:,} parameters, {config.steps:,} steps "
        f"on {_describe_device(trainer)}, in {run}"
    )
    if first >= config.steps:
        console.say(f"this run is finished: {config.steps} of {config.steps} steps are done")
        if trainer.run is not None:
            _rewrite_damaged_model(trainer, trainer.run)
        return
    if first:
        console.say(f"resuming after step {first}")
    bar = TrainingBar(config.steps, first)
    reporters: list[Reporter] = [bar]
    start = time.perf_counter()
    try:
        with ExitStack() as stack:
            if tensorboard and trainer.world.first:
                reporters.append(board := TensorBoard(run / "tensorboard", first))
                stack.callback(board.writer.close)
            trainer.reporter = Reporters(reporters) if trainer.world.first else None
            if bar.live and trainer.world.first:
                stack.enter_context(bar)
            trainer.fit()
    except Interrupted as stopped:
        interrupted(
            f"saved after step {stopped.step}. Resume with:\n"
            f"  ebmkit train --resume {shlex.quote(str(run))}",
            stopped.signal,
        )
    seconds = time.perf_counter() - start
    stats, skipped = trainer.run_stats(), trainer.state.skipped
    if trainer.run is not None:
        write_atomically(run / "cost.json", json.dumps(asdict(stats), indent=2).encode())
    if skipped:
        count = f"{len(skipped)} training images cannot be read and were skipped"
        console.say(f"{count}: {some_of(skipped.reasons)}")
    console.say(f"{config.steps - first:,} steps in {seconds:.0f} s; {stats.sentence()}")


def _rewrite_damaged_model(trainer: Trainer, run: RunFolder) -> None:
    """Write the model again where it is damaged: the checkpoint has all of it."""
    from ebmkit.storage.verify import verify_run

    names = ("model.safetensors", "model.json")
    bad = [f.name for f in verify_run(run.path) if f.name in names and f.state != "whole"]
    if bad:
        warnings.warn(f"written again from the checkpoint: {' and '.join(bad)}", stacklevel=2)
        trainer.save()


def _estimate_cost(config: TrainConfig, world: DistributedContext) -> None:
    """Show the cost of the run: counted, and timed over a few steps; nothing is written."""
    from ebmkit.training.cost import format_seconds
    from ebmkit.training.loop import assemble

    trainer = assemble(config, progress=console.is_terminal, world=world)
    with console.status("counting, and timing a few steps"):
        cost = trainer.budget.cost(config.steps)
        trainer.try_steps(TRIAL_STEPS)
    seconds = trainer.stopwatch.seconds
    title = "cost of training" if world.size == 1 else f"cost to each of {world.size} processes"
    table = Table(title, _describe_device(trainer), show_edge=False)
    for name, value in cost.rows():
        table.add_row(name, value)
    table.add_row("step, measured", f"{format_seconds(seconds)}, MFU {cost.mfu(seconds):.0%}")
    table.add_row(f"{config.steps:,} steps", format_seconds(seconds * config.steps))
    console.print(table)


def _describe_device(trainer: Trainer) -> str:
    """Device, precision and number of processes, in words."""
    step = trainer.update
    compiled = ", compiled" if step.compiled else ""
    processes = f", {trainer.world.size} processes" if trainer.world.size > 1 else ""
    return f"{trainer.device} ({step.precision}{compiled}{processes})"
