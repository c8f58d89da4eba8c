"""``ebmkit evaluate``: accuracy, denoising and calibration of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebmkit.cli.app import app
from ebmkit.cli.console import console
from ebmkit.core import EnergyModel
from ebmkit.evaluation import Images, evaluation_folder, parse_suites, tables
from ebmkit.evaluation import evaluate as run_suites
from ebmkit.models import load
from ebmkit.training import DataConfig, RunFolder, resolve
from ebmkit.training.assemble import Split, images_of
from ebmkit.training.optim import pick_device

__all__ = ["evaluate", "evaluate_run"]


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run folder")],
    suite: Annotated[
        str, typer.Option(help="suites joined by commas, or all; see `ebmkit list suites`")
    ] = "all",
    dataset: Annotated[
        str | None, typer.Option(help="data set [default: the one trained on]")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where its files are")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="height and width to bring images to")
    ] = None,
    split: Annotated[str, typer.Option(help="test, validation or train")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N images")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    weights: Annotated[str, typer.Option(help="last, or best by validation")] = "last",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1")] = "auto",
) -> None:
    """Evaluate a trained model: tables here, JSON and pictures under RUN/evaluation.

    PSNR is the mean over images of each image's own, for images in [0, 1], output clipped, noise
    drawn from a fixed seed. Intervals are 95 %.
    """
    model = load(run, device=str(pick_device(device)), weights=weights)
    trained = resolve(RunFolder.open(run).config()).dataset
    name = dataset or trained.name
    own = name == trained.name
    where = DataConfig(
        name=name,
        data_dir=data_dir or (trained.data_dir if own else None),
        image_size=image_size or (trained.image_size if own else None),
    )
    images = images_of(where, _split(split), progress=console.is_terminal)
    evaluate_run(model, run, images, suite, limit, seed, weights)


def evaluate_run(
    model: EnergyModel,
    run: Path,
    images: Images,
    suites: str = "all",
    limit: int | None = None,
    seed: int = 0,
    weights: str = "last",
) -> None:
    """Run suites, print their tables and say where the files are."""
    names = parse_suites(suites, model, images)
    folder = evaluation_folder(run, model, images, limit, weights)
    results = run_suites(
        model,
        images,
        names,
        folder,
        limit=limit,
        seed=seed,
        weights=weights,
        progress=console.is_terminal,
    )
    for table in tables(results):
        console.print(table)
    console.print(f"tables and pictures: {folder}", soft_wrap=True, highlight=False)


def _split(name: str) -> Split:
    from ebmkit.data.imagesets import SPLITS
    from ebmkit.registry import find

    return find("split", {split: split for split in SPLITS}, name)
