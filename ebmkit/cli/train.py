"""``ebmkit train``, ``cost`` and ``reproduce``: single runs, and runs of the papers' tables."""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from ebmkit.cli.console import interrupted
from ebmkit.cli.evaluate import evaluate_run
from ebmkit.cli.options import declare, options_of
from ebmkit.errors import Interrupted, UserError
from ebmkit.terminal import console

if TYPE_CHECKING:
    from ebmkit.distributed import DistributedContext
    from ebmkit.training import RunFolder, TrainConfig, Trainer
    from ebmkit.training.callbacks import Callback
    from ebmkit.training.loop import Stop

TRIAL_STEPS = 4
"""Number of steps of ``--dry-run``; all but the first are timed."""

FINAL_IMAGES = 1000
"""Maximum number of test images in the evaluation at the end of a run."""


def train(
    *,
    dataset: str | None = None,
    data_dir: Path | None = None,
    backbone: str | None = None,
    head: str | None = None,
    objective: str | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: Annotated[int | None, Option(min=1)] = None,
    lr: float | None = None,
    width: int | None = None,
    seed: int | None = None,
    out: Path | None = None,
    recipe: str | None = None,
    image_size: int | None = None,
    config: Path | None = None,
    set_: list[str] | None = None,
    ema: float | None = None,
    workers: Annotated[int | None, Option(min=0)] = None,
    device: str | None = None,
    precision: str | None = None,
    compile_: str | None = None,
    init: str | None = None,
    resume: Path | None = None,
    evaluate: bool = True,
    log: str | None = None,
    tensorboard: Annotated[bool, Option("--tensorboard/--no-tensorboard")] = False,
    wandb: bool = False,
    dry_run: bool = False,
) -> None:
    """Train a model, then evaluate it on the test images.

    The end writes the page RUN/report.html. Without options: GradResNet18 on scikit-learn's digits
    with ce+dsm, about a minute on two cores. Later settings override earlier ones: recipe <
    --config < named options < --set. With `torchrun -m ebmkit train ...` all processes train one
    model.

    Example:
        ebmkit train --dataset folder --data-dir photos --epochs 20

    Args:
        dataset: data set, from `ebmkit list datasets` [default: digits]
        backbone: backbone, from `ebmkit list backbones` [default: set by the recipe, gradresnet18]
        head: head, from `ebmkit list heads` [default: set by the recipe, linear-quadratic]
        objective: objectives joined by +, for example ce+0.5*dsm [default: set by the recipe,
            ce+dsm]
        epochs: length of the run in passes over the training images, by the batches of the
            classification stream (without labels, of the denoising stream); recorded as steps
        steps: number of optimiser steps [default: set by the recipe]
        batch_size: images per step, of each stream [default: set by the recipe]
        lr: learning rate [default: set by the recipe]
        width: channels of the first stage [default: set by the recipe, for its own kind of network]
        seed: random seed of initial weights, data order, augmentation and noise [default: 0]
        out: run folder to create [default: a new one in runs/]
        recipe: recipe, from `ebmkit list recipes` [default: set by the data set]
        config: YAML file of configuration fields
        set_: configuration field, for example optimizer.weight_decay=0.1; repeatable
        ema: decay of averaged weights, for example 0.999 [default: set by the recipe]
        workers: number of processes that read images, for data sets on disk [default: 0]
        precision: precision of training: auto, fp32, tf32, bf16 [default: set by the configuration,
            auto]
        compile_: compile the step: auto, on, off [default: auto]
        init: start from the weights of this run, pretrained model, file, or OWNER/NAME:FILE on the
            Hugging Face hub; the head may have another size
        resume: run folder to resume
        evaluate: evaluate on the test images and write plots at the end
        log: also log to these, joined by commas: tensorboard, wandb (Weights & Biases; offline
            without a connection), csv
        tensorboard: short for --log tensorboard
        wandb: short for --log wandb
        dry_run: estimate the cost of the run, and write nothing
    """
    from ebmkit.distributed import join
    from ebmkit.registry import find
    from ebmkit.training import RunFolder, parse_assignments, read_config
    from ebmkit.training.callbacks import LOGGERS
    from ebmkit.training.config import layer_of
    from ebmkit.training.loop import assemble
    from ebmkit.training.setup import check_test_images, images_of

    options = {
        "dataset": dataset, "data_dir": data_dir, "image_size": image_size, "workers": workers,
        "backbone": backbone, "head": head, "width": width, "objective": objective, "init": init,
        "batch_size": batch_size, "lr": lr, "ema": ema, "steps": steps, "seed": seed,
        "device": device, "precision": precision, "compile": compile_,
    }  # fmt: skip
    layers = [read_config(config)] if config else []
    layers += [layer_of({name: value for name, value in options.items() if value is not None})]
    layers += [parse_assignments(set_ or [])]
    if epochs is not None and (steps is not None or "steps" in layers[-1]):
        raise UserError(f"--epochs {epochs:g} and a number of steps exclude each other: give one")
    names = [*(["tensorboard"] if tensorboard else []), *(["wandb"] if wandb else [])]
    names += log.split(",") if log else []
    loggers = [find("logger", LOGGERS, name)() for name in dict.fromkeys(map(str.strip, names))]
    if resume is not None and (out is not None or recipe is not None):
        raise UserError("--resume writes into its own folder: leave out --out and --recipe")
    if resume is not None and init is not None:
        raise UserError(
            f"--init {init!r} sets the weights of a new run, and --resume those of its checkpoint: "
            "leave out one of them"
        )
    if resume is not None and RunFolder.is_empty_or_aborted(resume):
        console.say(f"nothing was saved in {resume} yet: the run starts from the beginning")
        out, resume = resume, None
    with join() as world, ExitStack() as stack:
        console.quiet |= not world.first
        resolved, resume = _resolved(world, layers, recipe, out, resume, epochs)
        if dry_run:
            _estimate_cost(resolved, world, epochs)
            return
        run = RunFolder.open(resume) if resume is not None and world.first else None
        if run is not None:
            stack.enter_context(run.held())
        trainer = assemble(resolved, run, progress=world.first, world=world, epochs=epochs)
        test = images_of(resolved.dataset, "test", world.first) if evaluate else None
        if test is not None:
            check_test_images(trainer.train, test)
        if resume is None and world.first:  # write nothing if data or model are illegal
            run = RunFolder.create(out or _fresh_folder(resolved), trainer.config)
            stack.enter_context(run.held())
            trainer.run = run
        path = world.broadcast(run.path if run else Path())
        _fit(trainer, path, loggers)
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
        if trainer.run is not None:
            from ebmkit.report.render import refresh_report

            refresh_report(path)
        console.say(f"run folder: {path}")


def cost(**options: Any) -> None:
    """Estimate time, memory and FLOPs of a training run; write nothing.

    The options are those of `ebmkit train`. The FLOPs of Langevin steps, where an objective needs
    samples of the model, are listed separately.

    Example:
        ebmkit cost --dataset cifar10 --epochs 100 --device cuda
    """
    train(**options, dry_run=True)


_RUN_OPTIONS = ("out", "resume", "evaluate", "log", "tensorboard", "wandb", "dry_run")
declare(cost, (option for option in options_of(train)[1] if option.name not in _RUN_OPTIONS))


def reproduce(
    target: str,
    more: Annotated[list[str] | None, Argument(metavar="ROW")] = None,
    *,
    scale: str = "smoke",
    only: list[str] | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
    imagenet_dir: Path | None = None,
    inception: Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    seed: int | None = None,
    seeds: str | None = None,
    show: bool = False,
    slurm: Annotated[int | None, Option(min=1)] = None,
    slurm_option: list[str] | None = None,
) -> None:
    """Reproduce a table or figure of the papers.

    Writes Markdown, JSON and plots to --out. Every row is a separate run. The same command skips
    finished rows and resumes an interrupted one. Started several times with the same --out, also on
    several machines with shared storage, it shares the rows.

    Example:
        ebmkit reproduce table1 --scale cpu --only joint

    Args:
        target: table1, table2, table3, fig1, fig3, fig4, claims, efficiency: of
            "Classification-denoising networks"; guidance, rcg-table2.1, rcg-table4.2, rcg-fig2.6,
            rcg-fig2.8, rcg-fig4.10, rcg-fig4.11, rcg-fig4.13, rcg-fig4.17: of the thesis; or all
        scale: smoke: digits, seconds per row; cpu: CIFAR-10, our short recipe, minutes per row;
            cpu-cdn: the paper's recipe cut short; full: the published recipes
        more: further rows for --only
        only: run only these rows
        out: folder for rows and reports [default: runs/reproduce-SCALE]
        data_dir: folder of CIFAR-10 [default: data]
        imagenet_dir: folder of ImageNet, for table2 at scale full
        inception: file of the Inception weights, for FID in rcg-table2.1 and rcg-table4.2
            [default: those in PyTorch's cache; without them, features of our own classifier]
        precision: precision of training: auto, fp32, tf32, bf16 [default: set by the recipe]
        seeds: random seeds, as 0-4 or 0,2,5-7: a run per row and seed [default: --seed, or 0]
        show: print the recipe of each row and what differs from it; train nothing
        slurm: submit an array of this many SLURM jobs that share the rows; needs the extra slurm
        slurm_option: option of the SLURM jobs, for example time=720 (minutes, required),
            partition=gpu or gpus_per_node=1; repeatable
    """
    from ebmkit.cli.slurm import Job, submit
    from ebmkit.compute import limited_threads, pick_device
    from ebmkit.experiments import EXPERIMENTS, SCALES, ExperimentRuns, describe, experiments_of
    from ebmkit.experiments import reproduce as run_experiment
    from ebmkit.experiments.seeds import parse_seeds
    from ebmkit.registry import find
    from ebmkit.storage import FolderLocked, make_folder
    from ebmkit.training.loop import Stop

    if more and not only:
        raise UserError(f"unexpected {more[0]!r}: name rows after --only, as in --only {more[0]}")
    if seed is not None and seeds is not None:
        raise UserError(
            f"--seed {seed} and --seeds {seeds!r} exclude each other: give --seeds alone"
        )
    names = [*(only or []), *(more or [])]
    chosen = experiments_of(target, names)
    if slurm_option and slurm is None:
        raise UserError("--slurm-option is for jobs of SLURM: give their number with --slurm")
    if Job.runs:  # this process is one of the jobs
        slurm = None
    if slurm is None:
        pick_device(device)
    runs = ExperimentRuns(
        out or Path("runs") / f"reproduce-{scale}", find("scale", SCALES, scale), data_dir, device,
        (seed or 0,) if seeds is None else parse_seeds(seeds), precision, _fit_row, console.say,
        True, imagenet_dir, inception,
    )  # fmt: skip
    if show:
        for name in chosen:
            console.say(describe(name, runs))
        return
    if slurm is not None:
        submit(slurm, slurm_option or [], f"ebmkit-{target}", runs.out)
        return
    if target == "all":
        if scale == "full" and imagenet_dir is None:
            console.say("table2 is skipped: it needs ImageNet, --imagenet-dir")
            chosen.remove("table2")
        every = [v for name in chosen for v in EXPERIMENTS[name].variants if v.run is None]
        runs.check(list({v.folder: v for v in runs.distinct(every)}.values()))
    make_folder(runs.out)
    stop = Stop()
    try:
        with limited_threads(runs.scale.threads), _terminated_as_interrupted(stop):
            for runs.waits in (False, True) if len(chosen) > 1 else (True,):  # for other processes
                for name in list(chosen):
                    try:
                        paths = run_experiment(name, runs, names)
                    except FolderLocked:  # only without waiting
                        continue
                    chosen.remove(name)
                    for path in paths:
                        if path.suffix == ".md":
                            console.say(path.read_text(encoding="utf-8"))
                        console.say(f"written: {path}")
    except (Interrupted, KeyboardInterrupt) as stopped:
        signum = stopped.signal if isinstance(stopped, Interrupted) else stop.signal
        interrupted(f"run the same command to resume {runs.out}", signum or signal.SIGINT)
    if runs.stopped:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in runs.stopped.items())
        raise UserError(f"not all rows could be finished, the reports say so: {reasons}")


def _resolved(
    world: DistributedContext,
    layers: list[dict[str, Any]],
    recipe: str | None,
    out: Path | None,
    resume: Path | None,
    epochs: float | None,
) -> tuple[TrainConfig, Path | None]:
    """The configuration, the same on all processes, and the run to resume, if any.

    Only rank 0 needs access to the run folder. `assemble` sets the steps of ``epochs``.
    """
    from ebmkit.distributed import launch, restarted
    from ebmkit.training import RunFolder, resolve

    found: tuple[dict[str, Any], Path | None] = ({}, None)
    if world.first:
        if resume is not None:
            layers = [RunFolder.open(resume).config(), *layers]
        resolved = resolve(*layers, recipe=recipe)
        if resume is None and restarted() and launch() is not None:
            resume = _interrupted_run(out, resolved)
        if resume is not None and epochs is None:  # else when the steps are known
            RunFolder.open(resume).check_config(resolved)
        found = resolved.model_dump(mode="json"), resume
    config, resume = world.broadcast(found)
    return resolve(config), resume


def _interrupted_run(out: Path | None, config: TrainConfig) -> Path | None:
    """The run folder of this command before its launcher restarted it; None if there is none."""
    from ebmkit.distributed import launch
    from ebmkit.storage.reading import read_json

    folders = [out] if out is not None else sorted(Path("runs").glob(f"{_stem(config)}*"))
    for folder in folders:
        path = folder / "environment.json"
        if not path.is_file():
            continue
        with suppress(UserError):  # unreadable, so not a run of this command
            document = read_json(path)
            if isinstance(document, dict) and document.get("launch") == launch():
                return folder
    return None


def _stem(config: TrainConfig) -> str:
    stem = f"{config.dataset.name}-{config.backbone}-{config.objective.replace('*', 'x')}"
    return "".join(stem.split())


def _fresh_folder(config: TrainConfig) -> Path:
    stem = _stem(config)
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(folder for name in names if not (folder := Path("runs", name)).exists())


def _fit(trainer: Trainer, run: Path, loggers: list[Callback]) -> None:
    from ebmkit.data.imagesets import summarize_reasons
    from ebmkit.storage import write_atomically
    from ebmkit.training.callbacks import TrainingBar

    steps, first = trainer.config.steps, trainer.step
    for sentence in trainer.sentences():
        console.say(sentence)
    if first >= steps:
        if trainer.run is not None:
            _rewrite_damaged_model(trainer, trainer.run)
        return
    if trainer.world.first:
        trainer.callbacks = [TrainingBar(), *loggers]
    start = time.perf_counter()
    try:
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
        console.say(f"{count}: {summarize_reasons(skipped.reasons)}")
    console.say(f"{steps - first:,} steps in {seconds:.0f} s; {stats.sentence()}")


def _rewrite_damaged_model(trainer: Trainer, run: RunFolder) -> None:
    """Rewrite damaged files of the model from the checkpoint."""
    from ebmkit.storage.verify import verify_run

    names = ("model.safetensors", "model.json")
    bad = [f.name for f in verify_run(run.path) if f.name in names and f.state != "whole"]
    if bad:
        warnings.warn(f"written again from the checkpoint: {' and '.join(bad)}", stacklevel=2)
        trainer.save()


def _estimate_cost(config: TrainConfig, world: DistributedContext, epochs: float | None) -> None:
    """Print the cost of the run, counted, and timed over a few steps; write nothing."""
    from ebmkit.training.cost import format_seconds
    from ebmkit.training.loop import assemble

    trainer = assemble(config, progress=world.first, world=world, epochs=epochs)
    steps = trainer.config.steps
    with console.status("counting, and timing a few steps"):
        cost = trainer.budget.cost(steps)
        trainer.try_steps(TRIAL_STEPS)
    seconds = trainer.stopwatch.seconds
    title = "cost of training" if world.size == 1 else f"cost to each of {world.size} processes"
    table = Table(title, trainer.where, show_edge=False)
    for name, value in cost.rows():
        table.add_row(name, value)
    table.add_row("step, measured", f"{format_seconds(seconds)}, MFU {cost.mfu(seconds):.0%}")
    table.add_row(f"{steps:,} steps", format_seconds(seconds * steps))
    console.print(table)


@contextmanager
def _terminated_as_interrupted(stop: Stop) -> Iterator[None]:
    """Context in which SIGTERM interrupts like Ctrl-C; ``stop`` records the signal."""

    def interrupt(signum: int, frame: object) -> None:
        stop.signal = signum
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fit_row(trainer: Trainer, name: str) -> None:
    """Train and show progress under ``name``."""
    from ebmkit.training.callbacks import TrainingBar

    steps = trainer.config.steps
    resumed = f" after step {trainer.step:,}" if trainer.step else ""
    console.say(f"{name}: training, {steps:,} steps{resumed}")
    trainer.callbacks = [TrainingBar(name)]
    trainer.fit()
