"""``ebmkit evaluate``: accuracy, denoising and calibration of a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Option

from ebmkit.terminal import console

if TYPE_CHECKING:
    from ebmkit.data import AnyImages
    from ebmkit.distributed import DistributedContext
    from ebmkit.energy import ScoreModel
    from ebmkit.evaluation import Images
    from ebmkit.training import DataConfig
    from ebmkit.training.setup import Split


def evaluate(
    run: Path,
    *,
    suite: str = "standard",
    dataset: str | None = None,
    data_dir: Path | None = None,
    image_size: int | None = None,
    split: str = "test",
    limit: Annotated[int | None, Option(min=1)] = None,
    seed: int = 0,
    weights: str = "last",
    device: str = "auto",
    precision: str = "auto",
    compile_: str = "auto",
    set_: list[str] | None = None,
) -> None:
    """Evaluate a trained model: tables, JSON and plots.

    Writes to RUN/evaluation, and the report RUN/report.html. PSNR is the mean of the per-image
    PSNR, for images in [0, 1] and clipped output, with noise from a fixed seed. Intervals are 95 %.
    With `torchrun -m ebmkit evaluate ...` the processes share the images.

    Example:
        ebmkit evaluate runs/digits --suite classify,denoise

    Args:
        suite: suites separated by commas, from `ebmkit list suites`; standard: quick suites; all:
            all suites that apply
        split: split: test, validation or train
        limit: use only the first N images
        compile_: compile the score: on, off; auto: on CUDA, if the evaluation takes more than five
            minutes
        set_: setting of a suite, for example robustness.steps=10, or dataset.unreadable=skip;
            repeatable
    """
    from ebmkit.compute import pick_device
    from ebmkit.distributed import device_of_rank, join
    from ebmkit.errors import validated
    from ebmkit.models import load
    from ebmkit.pretrained import results_folder
    from ebmkit.report.render import refresh_report
    from ebmkit.training.config import FaultsConfig, parse_assignments

    options = parse_assignments(set_ or [])
    faults = validated(FaultsConfig, options.pop("dataset", {}), "--set dataset")
    with join() as world:
        console.quiet |= not world.first
        place = device_of_rank(pick_device(device))
        model = load(run, device=str(place), weights=weights)
        where = _where(run, dataset, data_dir, image_size)
        where = where.model_copy(update=faults.model_dump(exclude_unset=True))
        ours = data_dir is not None or where.data_dir is None  # False: the run names the folder
        evaluate_run(
            model,
            run,
            _images(where, split, world, limit, download=ours),
            suite,
            world=world,
            data_dir=where.data_dir,
            limit=limit,
            seed=seed,
            weights=weights,
            precision=precision,
            compile=compile_,
            options=options,
        )
        if world.first and results_folder(run) == run:
            refresh_report(run)


def _where(
    run: Path, dataset: str | None, data_dir: Path | None, image_size: int | None
) -> DataConfig:
    """The data set to evaluate on: the run's own or another."""
    from ebmkit.training import DataConfig, RunFolder, resolve

    imported = dataset is not None and not (run / "config.yaml").exists()
    trained = DataConfig(name="") if imported else resolve(RunFolder.open(run).config()).dataset
    name = dataset or trained.name
    own = name == trained.name
    return DataConfig(
        unreadable=trained.unreadable,
        links=trained.links if own else "inside",
        hold_out=trained.hold_out if own else True,
        name=name,
        data_dir=data_dir or (trained.data_dir if own else None),
        image_size=image_size or (trained.image_size if own else None),
    )


def _images(
    where: DataConfig, split: str, world: DistributedContext, limit: int | None, download: bool
) -> AnyImages:
    """Load one split of the data set ``where``, without skipped images.

    ``download`` is False if only the run names the data folder: nothing is written there, because
    the run may be untrusted.
    """
    from ebmkit.data import StreamedSet
    from ebmkit.training.setup import images_of

    if not world.first:
        world.broadcast(None)  # wait for rank 0, which downloads missing data
    images = images_of(where, cast("Split", split), world.first, download)
    if world.first:
        world.broadcast(None)
    if isinstance(images, StreamedSet) and images.skip:  # such as training images of any size
        images = images.first(limit or len(images)).readable()
    return images


def evaluate_run(
    model: ScoreModel,
    run: Path,
    images: Images,
    suites: str = "standard",
    *,
    world: DistributedContext,
    limit: int | None = None,
    weights: str = "last",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> None:
    """Run suites; rank 0 prints their tables and the folder of the files.

    Further ``settings`` are passed to `ebmkit.evaluation.evaluate`.
    """
    from ebmkit.evaluation import evaluate as run_suites
    from ebmkit.evaluation import evaluation_folder, parse_options, parse_suites, tables
    from ebmkit.evaluation.runner import match_classes

    images = match_classes(model, images)
    names = parse_suites(suites, model, images)
    own = parse_options(options or {}, names)
    folder = world.broadcast(
        evaluation_folder(run, model, images, limit, weights, own) if world.first else run
    )
    settings |= {"limit": limit, "weights": weights, "options": options, "world": world}
    results = run_suites(model, images, names, folder, progress=True, **settings)
    if not world.first:
        return
    for table in tables(results):
        console.print(table)
    console.say(f"tables and plots: {folder}")
