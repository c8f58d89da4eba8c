r"""Tables 2.1 and 4.2 of the thesis (RCG): unguided images of a diffusion model, by sampler.

The diffusion model is that of the experiment ``guidance`` (the same run folder).

- ``rcg-table4.2``: DDPM at all 1000 timesteps, with DDPM's larger variance, as Ho et al. 2020 have
  it on CIFAR-10; and DDIM (eta 0) at 100 of them. The settings are those of diffusers' pipelines,
  which the thesis uses: the predicted image is clipped; DDIM does not recompute the noise from it.
- ``rcg-table2.1``: DDIM by eta and number of steps S, as in the code of Song et al. 2021, whose
  table it is: timesteps :math:`\lfloor 0.8\,T (i / (S - 1))^2 \rfloor` (all of them at S = T) and
  no clipping. The row sigma-hat is DDPM's larger variance,
  :math:`\hat\sigma^2 = 1 - \bar\alpha_t / \bar\alpha_{t'}` from timestep t to t' (the thesis's
  :math:`\alpha`), which has the mean of eta = 1 and clips the predicted image.

Inception score, FID, precision and recall need the Inception weights: ``--inception``, or those in
PyTorch's cache; nothing is downloaded. Without them the same quantities are measured in features of
the evaluation classifier of ``guidance`` and named after it. The thesis's values are printed only
beside the same quantity, of Inception, on CIFAR-10, of at least 10,000 images.

::

    OUT/rcg-table4.2.md  .json  .png
    OUT/rcg/SAMPLER-KEY/samples.h5      images, in the format of `ebmkit sample`
    OUT/rcg/SAMPLER-KEY/measures.json   their metrics

KEY depends on weights, settings, number of images and seed, so other images are drawn anew. An
interrupted sampler resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.compute import pick_device
from ebmkit.data import ImageSet
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation.features import (
    INCEPTION_URL,
    Columns,
    Extractor,
    cached_inception,
    classifier,
    find_extractor,
    frechet,
)
from ebmkit.evaluation.generation import measures, read_samples
from ebmkit.evaluation.statistics import to_json
from ebmkit.evaluation.suite import Images, number
from ebmkit.experiments.guidance import CLASSIFY, DIFFUSION, EVALUATION_CLASSIFIER
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    percent,
    run_grid,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, read_data
from ebmkit.experiments.thesis_figures import seed_of
from ebmkit.models import load, weights_digest
from ebmkit.noise import Schedule
from ebmkit.plots import annotate, image_rows, look, new_figure, save_figure
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import DDIM, denoiser_of, noise_predictor_of
from ebmkit.sampling.diffusion import Variance
from ebmkit.sampling.jobs.chains import STATE, Hook, JobFolder, Record, batch_name, run_chains
from ebmkit.storage import FolderLocked, write_atomically
from ebmkit.storage.atomic import replacing
from ebmkit.storage.reading import read_document
from ebmkit.terminal import counting

_DATA = read_data("thesis.yaml")
TABLE_2_1: dict[str, dict[int, float]] = _DATA["table_2_1"]
"""FID by row and steps (RCG table 2.1, CIFAR-10, of Song et al. 2021)."""
TABLE_4_2: dict[str, dict[str, float]] = _DATA["table_4_2"]
"""Metrics by sampler (RCG table 4.2)."""
COMPARABLE = 10_000
"""Number of images from which on the thesis's values are shown."""
BATCH = 250
"""Number of chains per batch."""


@dataclass(frozen=True)
class ThesisSize:
    """What one scale draws and measures."""

    count: int  # images per sampler
    real: int  # maximum number of test images
    lengths: Sequence[int]  # numbers of steps in table 2.1


SIZES = {
    name: ThesisSize(amount["count"], amount["real"], amount["lengths"])
    for name, amount in _DATA["amounts"].items()
}
"""By name of the scale's size."""


@dataclass(frozen=True)
class UnguidedSampler:
    """A way to draw images from a diffusion model; see `DDIM` for the settings."""

    name: str  # unique; begins the name of its folder
    row: str  # row of the thesis's table
    steps: int
    eta: float
    variance: Variance = "fixed_small"
    spacing: Literal["leading", "quadratic"] = "leading"
    clip: bool = True
    rederive: bool = True

    def build(self, model: ScoreModel) -> DDIM:
        """The sampler of ``model``, which must have a schedule."""
        schedule = model.schedule
        assert schedule is not None
        if self.spacing == "quadratic":
            timesteps = quadratic_timesteps(schedule, self.steps)
        else:
            timesteps = schedule.timesteps(self.steps, "leading")
        return DDIM(
            noise_predictor_of(denoiser_of(model), schedule),
            schedule,
            timesteps,
            self.eta,
            self.clip,
            self.rederive,
            self.variance,
        )


def quadratic_timesteps(schedule: Schedule, count: int) -> tuple[int, ...]:
    """Timesteps of Song et al. 2021 on CIFAR-10, decreasing: floor(0.8 T (i / (count - 1))^2).

    Repeated ones, which change nothing, are left out; all T if ``count`` is T.
    """
    total = len(schedule)
    if count >= total:
        return tuple(reversed(range(total)))
    ends = max(1, count - 1)
    return tuple(sorted({int(0.8 * total * (i / ends) ** 2) for i in range(count)}, reverse=True))


def table_2_1_samplers(lengths: Sequence[int]) -> list[UnguidedSampler]:
    """The samplers of table 2.1, row by row."""
    found = []
    for row in TABLE_2_1:
        hat = row == "sigma-hat"
        eta = 1.0 if hat else float(row)
        for steps in lengths:
            name = f"{'sigma-hat' if hat else f'eta-{row}'}-{steps}"
            variance: Variance = "fixed_large" if hat else "fixed_small"
            found.append(UnguidedSampler(name, row, steps, eta, variance, "quadratic", clip=hat))
    return found


TABLE_4_2_SAMPLERS = (
    UnguidedSampler("ddpm-1000", "DDPM", 1000, 1.0, "fixed_large"),
    UnguidedSampler("ddim-100", "DDIM", 100, 0.0, rederive=False),
)

# --- drawing and measuring -----------------------------------------------------------------------


class _Unguided:
    """Draws and measures images of the trained diffusion model."""

    def __init__(self, runs: ExperimentRuns, size: ThesisSize, extractor: Extractor) -> None:
        self.runs, self.size, self.extractor = runs, size, extractor
        self.device = pick_device(runs.device)
        self.test = runs.images(DIFFUSION, "test").spread(size.real)
        self.seed = seed_of(runs)
        own = runs.folder(EVALUATION_CLASSIFIER)
        self._digests = [
            weights_digest(runs.folder(DIFFUSION)),
            "inception" if extractor.model is None else weights_digest(own),
        ]

    @cached_property
    def model(self) -> ScoreModel:
        return load(self.runs.folder(DIFFUSION), device=str(self.device))

    @cached_property
    def real(self) -> Columns:
        return self._columns(self.test)

    def floor(self, measure: Measure) -> dict[str, Any]:
        """Metrics of as many training images."""
        train = self.runs.images(DIFFUSION, "train").spread(self.size.count)
        found: dict[str, Any] = to_json(measure(self._columns(train), self.real, self.extractor))
        return found

    def row(self, sampler: UnguidedSampler, measure: Measure) -> dict[str, Any]:
        """Settings, metrics and drawing time of ``sampler``, or why it ``stopped``.

        Raises:
            FolderLocked: if another process draws its images.
        """
        about = asdict(sampler)
        try:
            folder = self._drawn(sampler)
        except FolderLocked:
            raise
        except UserError as error:
            self.runs.stopped[sampler.name] = str(error)
            return about | {"stopped": str(error)}
        samples = read_samples(folder / "samples.h5", self.test, sampler.name)
        key = [samples.description["fingerprint"], self._digests[1], len(self.test)]
        path = folder / "measures.json"
        old = read_document(path)
        if old.get("key") == key and self.extractor.names["frechet"] in old["measures"]:
            found = old["measures"]
        else:
            columns = self._columns(ImageSet(samples.images))
            found = to_json(measure(columns, self.real, self.extractor))
            content = json.dumps({"key": key, "measures": found}, indent=1)
            write_atomically(path, content.encode())
        settings = samples.description["settings"]
        return about | {"seconds": settings["seconds"], "folder": folder.name, "measures": found}

    def _columns(self, images: Images) -> Columns:
        with torch.no_grad():
            rows = [self.extractor.extract(x.to(self.device)) for x, _ in images.batches(BATCH)]
        return {name: torch.cat([row[name].cpu() for row in rows]) for name in rows[0]}

    def _drawn(self, sampler: UnguidedSampler) -> Path:
        """Folder with the images of ``sampler``; draws what is missing."""
        settings = asdict(sampler) | {
            "count": self.size.count,
            "seed": self.seed,
            "weights": self._digests[0],
        }
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        folder = JobFolder(self.runs.out / "rcg" / f"{sampler.name}-{key}", done="")
        if (folder.path / "samples.h5").is_file():
            return folder.path
        self.runs.log(f"drawing {self.size.count:,} images: {sampler.name}")
        folder.begin(settings)
        with folder.alone("drawing"), counting(sampler.name, self.runs.progress) as progress:
            chain, counts = sampler.build(self.model), self._batches()
            for batch, count in enumerate(counts):
                if not folder.file(batch_name(batch)).is_file():
                    self._draw_batch(folder, chain, batch, count, progress)
            batches = [folder.load(batch_name(batch)) or {} for batch in range(len(counts))]
        pixels = torch.cat([batch["images"] for batch in batches])
        settings["seconds"] = sum(float(batch["seconds"]) for batch in batches)
        _write_hdf5(folder.path / "samples.h5", pixels, settings, self.seed)
        folder.finish()
        return folder.path

    def _batches(self) -> list[int]:
        whole, rest = divmod(self.size.count, BATCH)
        return [BATCH] * whole + [rest] * (rest > 0)

    def _draw_batch(
        self, folder: JobFolder, chain: DDIM, batch: int, count: int, progress: Hook
    ) -> None:
        card = self.model.card
        assert card is not None
        assert card.image_size is not None
        shape = (count, card.channels, *card.image_size)
        key = partial(keyed_generator, device_of(self.model), self.seed, "rcg", batch)

        def start() -> Tensor:
            noise = torch.randn(shape, generator=key(0), device=device_of(self.model))
            return 0.5 + chain.sigmas[0] * noise

        with torch.no_grad():
            chains, seconds = run_chains(
                chain,
                start,
                shape,
                chain.steps,
                key,
                Record(chain.steps),
                lambda step: progress(
                    batch * chain.steps + step, len(self._batches()) * chain.steps
                ),
                folder=folder,
                batch=batch,
            )
        if chains.diverged:
            raise UserError(
                f"{len(chains.diverged)} of {count} chains became NaN or Inf: train the diffusion "
                "model for longer"
            )
        images = (255 * chains.state.x.clamp(0, 1)).round().byte()
        folder.save(
            batch_name(batch), {"images": images, "seconds": torch.tensor(seconds).double()}
        )
        folder.file(STATE).unlink(missing_ok=True)


Measure = Callable[[Columns, Columns, Extractor], Mapping[str, Any]]


def _frechet_alone(a: Columns, b: Columns, extractor: Extractor) -> dict[str, Any]:
    return {extractor.names["frechet"]: frechet(a["features"], b["features"])}


def _write_hdf5(path: Path, pixels: Tensor, settings: Mapping[str, Any], seed: int) -> None:
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        rows = rearrange(pixels, "n c h w -> n h w c").contiguous().numpy()
        file.create_dataset("images", data=rows, compression="gzip")
        file.attrs.update(
            {
                "settings": json.dumps(settings),
                "seed": seed,
                "run": DIFFUSION.name,
                "source": "fresh",
                "sampler": "ddpm" if settings["eta"] == 1 else "ddim",
            }
        )


def inception_weights(runs: ExperimentRuns) -> Path | None:
    """File of the Inception weights: ``runs.inception``, or that in PyTorch's cache, if any.

    Raises:
        UserError: if ``runs.inception`` is given, and there is no such file or no torch-fidelity.
    """
    if runs.inception is None:
        return cached_inception()
    if not runs.inception.is_file():
        raise UserError(
            f"--inception: there is no file {str(runs.inception)!r}; it is {INCEPTION_URL}"
        )
    if find_spec("torch_fidelity") is None:
        raise UserError(
            "--inception needs the package torch-fidelity, which is not installed: pip install "
            "'ebmkit-vision[generation]', or leave out --inception"
        )
    return runs.inception


def _measured(
    target: str,
    runs: ExperimentRuns,
    only: Sequence[str],
    size: ThesisSize,
    samplers: Sequence[UnguidedSampler],
    measure: Measure,
) -> dict[str, Any]:
    """Train what is needed, and measure ``samplers``; return the report's document.

    Networks and images are of the first seed.
    """
    runs = runs.at(runs.seed)
    weights, device = inception_weights(runs), pick_device(runs.device)
    extractor = None if weights is None else find_extractor("inception", weights, device)
    networks = [DIFFUSION] if extractor else [DIFFUSION, EVALUATION_CLASSIFIER]
    results = run_grid(runs, networks, only, lambda v: None if v is DIFFUSION else CLASSIFY)
    document: dict[str, Any] = {"missing": [r.variant.name for r in results if r.status != "done"]}
    rows: list[dict[str, Any]] = []
    accuracy = None
    if not document["missing"]:
        if extractor is None:
            extractor = classifier(str(runs.folder(EVALUATION_CLASSIFIER)), device)
            own = results[1].documents["classify"]
            low, high = own["accuracy_interval"]
            accuracy = {"value": own["accuracy"], "low": low, "high": high}
        unguided = _Unguided(runs, size, extractor)
        work = [(sampler.name, partial(unguided.row, sampler, measure)) for sampler in samplers]
        found = runs.share(work)
        rows = [found[sampler.name] for sampler in samplers]
        document |= {
            "names": extractor.names,
            "extractor": {"kind": extractor.kind, "accuracy": accuracy},
            "count": size.count,
            "real": len(unguided.test),
            "floor": unguided.floor(measure),
            "comparable": is_comparable(extractor.kind, unguided.test.name, size.count),
        }
        of = len(runs.images(DIFFUSION, "test"))
        data = f"{unguided.test.name}, {len(unguided.test):,} of {of:,} test images (samples)"
        results = [_with_data(result, data) for result in results]
    else:
        results = []
    return document | {"rows": rows} | circumstances(runs, target, results)


def _with_data(result: VariantResult, data: str) -> VariantResult:
    every = {s: f | {"data": [data, *f["data"]]} for s, f in result.facts_by_seed.items()}
    return replace(result, facts_by_seed=every)


def is_comparable(extractor: str, dataset: str, count: int) -> bool:
    """Whether values of ``count`` images are of the same kind as the thesis's.

    >>> is_comparable("classifier", "cifar10", 10_000), is_comparable("inception", "cifar10", 200)
    (False, False)
    """
    return extractor == "inception" and dataset == "cifar10" and count >= COMPARABLE


def _head(document: Mapping[str, Any], what: str) -> list[str]:
    """Sentences about images and features."""
    if document["missing"]:
        return [f"Not measured: {', '.join(document['missing'])} is not trained."]
    accuracy = document["extractor"]["accuracy"]
    lines = [
        f"{document['count']:,} images of each sampler against {document['real']:,} test images."
    ]
    if document["extractor"]["kind"] == "inception":
        lines.append("Features: Inception of 2015 (torch-fidelity).")
    else:
        lines.append(
            f"{what} in features of the evaluation classifier "
            f"(accuracy {percent(accuracy, '{:.1f}')} %), comparable within this table alone, and "
            "not with the thesis's values, which are of Inception features (`--inception`)."
        )
    if document["comparable"]:
        lines.append("In brackets the thesis's values.")
    elif document["extractor"]["kind"] == "inception":
        lines.append(
            f"The thesis's values are of CIFAR-10 and {COMPARABLE:,} images or more: not shown."
        )
    lines.append("*Real*: as many training images.")
    return [" ".join(lines), ""]


# --- table 4.2 -----------------------------------------------------------------------------------

FEATURES_UNKNOWN = (
    "The thesis does not state the features of its precision and recall; here they are those of "
    "the Frechet distance, with the third nearest neighbour."
)
COLUMNS = {"score": "{:.2f}", "frechet": "{:.2f}", "precision": "{:.2f}", "recall": "{:.2f}"}
"""Columns of table 4.2, with the format of their values."""


def run_table42(
    runs: ExperimentRuns, only: Sequence[str] = (), size: ThesisSize | None = None
) -> Report:
    """Table 4.2: DDPM and DDIM by Inception score, FID, precision and recall.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if data, memory or Inception do not suffice. Later failures are listed in
            ``runs.stopped`` and in the report.
    """
    size = size or SIZES[runs.scale.size]
    name = "rcg-table4.2"
    document = _measured(name, runs, only, size, TABLE_4_2_SAMPLERS, measures)
    done = [row for row in document["rows"] if "stopped" not in row]
    files = {row["row"]: runs.out / "rcg" / row["folder"] / "samples.h5" for row in done}
    test = runs.images(DIFFUSION, "test")
    shown = {row: read_samples(path, test).images[:SHOWN] for row, path in files.items()}
    plots = {f"{name}.png": partial(_draw_samples, shown)} if shown else {}
    return Report(document, plots)


def table42_text(document: Mapping[str, Any]) -> str:
    """The report of table 4.2 as Markdown."""
    lines = _head(document, "Score, Frechet distance, precision and recall")
    if document["rows"]:
        names = [document["names"][kind] for kind in COLUMNS]
        rows = []
        for row in document["rows"]:
            theirs = TABLE_4_2[row["row"]] if document["comparable"] else {}
            rows.append([row["row"], row["steps"], *_cells(row, names, theirs)])
        rows.append(["real", "", *_cells({"measures": document["floor"]}, names, {})])
        lines += table_lines(["sampler", "steps", *names, "s per image"], rows)
        lines += ["", FEATURES_UNKNOWN]
    return text_of(
        "Table 4.2: unguided images by DDPM and DDIM (RCG table 4.2)", lines, document["notes"]
    )


def _cells(row: Mapping[str, Any], names: Sequence[str], theirs: Mapping[str, float]) -> list[str]:
    if "stopped" in row:
        return [row["stopped"], *[""] * len(names)]
    cells = []
    for (kind, form), name in zip(COLUMNS.items(), names, strict=True):
        beside = f" ({form.format(theirs[kind])})" if kind in theirs else ""
        cells.append(number(row["measures"][name], form) + beside)
    seconds, count = row.get("seconds"), row["measures"][names[0]]["count"]
    return [*cells, "" if seconds is None else f"{seconds / count:.2g}"]


SHOWN = 20
"""Number of images of each sampler in the plot."""


def _draw_samples(shown: Mapping[str, Tensor], path: Path) -> None:
    """Images of each sampler side by side, as in RCG figure 4.2."""
    columns = 5
    blocks = [[(image.float() / 255, "") for image in images] for images in shown.values()]
    rows = [
        [cell for block in blocks for cell in block[k : k + columns]]
        for k in range(0, min(map(len, blocks)) // columns * columns, columns)
    ]
    groups = {i * columns: row for i, row in enumerate(shown)}
    image_rows(rows, [""] * (columns * len(blocks)), path, groups, "Unguided images")


# --- table 2.1 -----------------------------------------------------------------------------------


SIGMA_HAT = (
    "sigma-hat: DDPM's larger variance, with the mean of eta = 1 and the predicted image clipped; "
    "the other rows do not clip (Song et al. 2021)."
)


def run_table21(
    runs: ExperimentRuns, only: Sequence[str] = (), size: ThesisSize | None = None
) -> Report:
    """Table 2.1: FID of DDIM by eta and number of steps; errors are those of `run_table42`."""
    size = size or SIZES[runs.scale.size]
    name = "rcg-table2.1"
    samplers = table_2_1_samplers(size.lengths)
    document = _measured(name, runs, only, size, samplers, _frechet_alone)
    done = [row for row in document["rows"] if "stopped" not in row]
    plots = {f"{name}.png": partial(_draw_table21, document)} if done else {}
    return Report(document, plots)


def table21_text(document: Mapping[str, Any]) -> str:
    """The report of table 2.1 as Markdown."""
    lines = _head(document, "Frechet distance")
    if document["rows"]:
        name = document["names"]["frechet"]
        lengths = sorted({row["steps"] for row in document["rows"]})
        rows = []
        for eta, theirs in TABLE_2_1.items():
            own = {row["steps"]: row for row in document["rows"] if row["row"] == eta}
            cells = []
            for steps in lengths:
                beside = f" ({theirs[steps]:.2f})" if document["comparable"] else ""
                cell = own[steps].get("stopped") or number(own[steps]["measures"][name], "{:.2f}")
                cells.append(cell + beside)
            rows.append([eta, *cells])
        rows.append(["real", *[number(document["floor"][name], "{:.2f}")] * len(lengths)])
        lines += table_lines([f"{name}: eta", *(f"{steps} steps" for steps in lengths)], rows)
        lines += ["", SIGMA_HAT]
        if document["comparable"]:
            lines[-1] += " The thesis's are of 50,000 images against the training images."
    return text_of("Table 2.1: DDIM by eta and steps (RCG table 2.1)", lines, document["notes"])


def _draw_table21(document: Mapping[str, Any], path: Path) -> None:
    name = document["names"]["frechet"]
    done = [row for row in document["rows"] if "stopped" not in row]
    figure = new_figure(5.6, 4.0, layout="constrained")
    axes = figure.subplots()
    for index, eta in enumerate(TABLE_2_1):
        own = [row for row in done if row["row"] == eta]
        label = eta if eta == "sigma-hat" else f"eta = {eta}"
        values = [row["measures"][name]["value"] for row in own]
        axes.plot([row["steps"] for row in own], values, label=label, ms=4, lw=1.2, **look(index))
    axes.axhline(
        document["floor"][name]["value"], color="black", lw=0.8, ls=":", label="real images"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    lengths = sorted({row["steps"] for row in done})
    axes.set_xticks(lengths, [str(steps) for steps in lengths])
    axes.set_xticks([], minor=True)
    annotate(axes, f"{document['count']:,} images of each sampler", "steps", name)
    axes.grid(alpha=0.25, lw=0.5, which="both")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    save_figure(figure, path)


NETWORKS = (DIFFUSION, EVALUATION_CLASSIFIER)
THESIS_TABLES = {
    "rcg-table2.1": Experiment(
        "DDIM by eta and number of steps", run_table21, table21_text, NETWORKS
    ),
    "rcg-table4.2": Experiment(
        "unguided images by DDPM and DDIM", run_table42, table42_text, NETWORKS
    ),
}
"""The tables, by name."""
