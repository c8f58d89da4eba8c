"""Experiment ``guidance``: evaluates the methods of the thesis (RCG) with newly trained networks.

- robust accuracy by training and test radius (RCG table 4.1), by the suite ``robustness-grid``;
- accuracy and energies along the diffusion (figures 4.5, 4.6, 4.9), by ``diffusion-path``;
- energies of training images by class (figure 4.12), and of generated images (4.15);
- for each guidance method (not in the thesis): share of images that the evaluation classifier
  assigns to the label, distance to real images and diversity by class, saturation, energy gap.

All networks (``guidance.yaml``) are trained on one data set: a *diffusion model* with label dropout
0.1, so that one network makes the unconditional and the conditional prediction; the *guides*,
classifiers and joint models, plain, robust (l2 0.25, 0.5, 1.0 as in RCG section 4.2) or trained on
noise; the two alternatives that the thesis argues against, a time-dependent classifier and the
robust one of Kawar et al. 2023; and the *evaluation classifier* (``judge``), of another
architecture, which guides no method.

The methods have the schedules and eta of the thesis where it states them; guides and their inputs
are compared in one common setting (``common``). Guidance scales are the thesis's times
`StudySize.strength`, because other image sizes and briefly trained classifiers need other scales.
As in the thesis (algorithms 5 and 6) the predicted clean image is not clipped; the thesis's methods
are drawn a second time with clipping, which suppresses saturation. Final images are clamped to
[0, 1] for storing.

Chain n of every method has the same starting noise and the same random numbers at each step, keyed
by (seed, batch, step), so methods differ only in their guidance. Statements of the thesis that
compare two methods (``orderings``) are tested on these pairs of images, over all seeds.

::

    OUT/guidance.md  guidance.json  guidance*.png
    OUT/rows/guidance/NETWORK/   run folders
    OUT/guidance/METHOD.h5       images (N, H, W, C) uint8 and their labels (N,)
    OUT/guidance/METHOD.json     their metrics
    OUT/guidance/seed-1/         the same, by the networks and the noise of seed 1

A method is drawn again if its settings or the weights of its networks change. Images, suites and
energies by class in the report are of the first seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ebmkit.compute import pick_device
from ebmkit.data import AnyImages, ImageSet
from ebmkit.data.hdf5 import read_contents
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import evaluate
from ebmkit.evaluation.features import Extractor, classifier, measure_guided
from ebmkit.evaluation.suite import Images
from ebmkit.experiments.guidance_report import (
    SUMMARY,
    compare_methods,
    energies_by_class,
    figures_of,
    guidance_text,
    samples_of_methods,
)
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    measured_facts,
    run_grid,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant, read_data
from ebmkit.experiments.seeds import compare
from ebmkit.guidance import check_guide, class_energies, guided_model, make_guidance
from ebmkit.models import load, weights_digest
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import SAMPLERS, Chains
from ebmkit.storage import FolderLocked, write_atomically
from ebmkit.storage.hdf5 import open_hdf5, read_attribute
from ebmkit.storage.reading import read_document, read_json
from ebmkit.terminal import counting
from ebmkit.training.config import merge

_DATA = read_data("guidance.yaml")
_NETWORKS = {
    name: Variant(name, family="guidance", **fields) for name, fields in _DATA["networks"].items()
}
NETWORKS = tuple(_NETWORKS.values())
"""All networks, in training order."""
DIFFUSION, EVALUATION_CLASSIFIER, PLAIN = (
    _NETWORKS[name] for name in ("diffusion", "judge", "plain")
)
ROBUST = tuple(_NETWORKS[f"robust-{eps}"] for eps in ("0.25", "0.5", "1"))
ON_GRID = (PLAIN, *ROBUST, _NETWORKS["robust-dsm"])
"""Networks of the robustness grid."""
ON_PATH = (*ON_GRID, *(_NETWORKS[name] for name in ("joint", "of-time", "kawar")))
"""Networks of the curves along the diffusion path."""


@dataclass(frozen=True)
class GuidanceMethod:
    """A guidance method: how images of a label are drawn."""

    name: str  # unique; also names its files
    description: str
    guide: str | None = None  # name of the guiding network; None: no guide
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `GuidanceConfig`; {}: unguided
    eta: float = 0.8  # eta of DDIM
    base: str = "diffusion"  # name of the guided network
    group: str = "thesis"  # section of the report
    figure: str = ""  # figure of RCG with images of these settings
    clip: bool = False  # whether to clip the predicted clean image; RCG's algorithm 6 does not
    fixed: bool = False  # whether `StudySize.strength` does not apply to the scale

    def times(self, strength: float) -> GuidanceMethod:
        """The method with its scale multiplied by ``strength``, unless the scale is fixed."""
        if self.fixed or not self.settings:
            return self
        return replace(self, settings={**self.settings, "scale": strength * self.settings["scale"]})

    def with_options(self, options: Mapping[str, Mapping[str, Any]]) -> GuidanceMethod:
        """The method with other settings of its guide; ``options`` are `StudySize.options`."""
        own = options.get(self.settings.get("guidance", ""))
        return self if not own else replace(self, settings=merge(self.settings, {"options": own}))


def _with_clipping(methods: Iterable[GuidanceMethod]) -> Iterator[GuidanceMethod]:
    """``methods``, those of the thesis each followed by the same method with clipping."""
    for method in methods:
        yield method
        if method.group == "thesis":
            yield replace(method, name=f"{method.name} clipped", clip=True)


METHODS = tuple(_with_clipping(GuidanceMethod(**fields) for fields in _DATA["methods"]))
ORDERINGS: list[list[str]] = _DATA["orderings"]
"""Statements of RCG: greater method, smaller method, metric (`BY_IMAGE`), source."""
BY_IMAGE = {"recognised": ("accuracy", 100), "saturated": ("ends", 100), "gap": ("energy", 1)}
"""Values by image of `measure_guided` and their unit's factor, by metric. Two methods differ in the
gap to real images as they do in E(x)."""


@dataclass(frozen=True)
class StudySize:
    """What one scale of reproduction trains, draws and measures."""

    per_class: int  # images per class and method
    steps: int  # steps of DDIM
    strength: float  # factor of the guidance scales
    real: int  # maximum number of test images to compare with
    path: Mapping[str, Any]  # settings of the suite ``diffusion-path``
    grid: Mapping[str, Any]  # settings of the suite ``robustness-grid``
    path_images: int | None = None  # test images of the suite ``diffusion-path``
    class_images: int | None = None  # maximum number of training images, for energies by class
    # settings of guides that differ from the methods', by name of the guide
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    networks: Sequence[str] = ()  # names of networks to train; empty: all
    methods: Sequence[str] = ()  # names of methods to draw; empty: all


AMOUNTS = {name: StudySize(**fields) for name, fields in _DATA["amounts"].items()}
"""Amounts by name of the scale."""

CLASSIFY = Protocol("guidance", ("classify",), images={"classify": 1000})

BATCH = 100
"""Number of chains per batch."""

DAMAGED = (UserError, ValueError, TypeError, AttributeError)
"""Errors of reading a damaged file of images."""


def run_guidance(
    runs: ExperimentRuns, only: Sequence[str] = (), amount: StudySize | None = None
) -> Report:
    """Train the networks named in ``only`` (empty: all); evaluate with all trained networks.

    Methods are measured with every seed, all else but the networks' accuracy with the first.

    Raises:
        Interrupted: if training is interrupted; the same call resumes it.
        UserError: if data or memory do not suffice for a network. Later failures are listed
            in ``runs.stopped`` and in the report.
    """
    amount = amount or AMOUNTS[runs.scale.size]
    every = [v for v in NETWORKS if not amount.networks or v.name in amount.networks]
    results = run_grid(runs, every, only, lambda network: None)
    results = [one for one in results if runs.seed in one.by_seed]
    train = runs.images(EVALUATION_CLASSIFIER, "train")
    studies = [
        _Study(own, amount, [one.variant for one in results if own.seed in one.by_seed], train)
        for own in runs.each_seed()
    ]
    study = studies[0]
    for other in studies[1:]:
        other.energy = study.energy if study.energy in other.names else None
    networks, classifiers = study.networks(results)
    methods, values = measure_methods(studies)
    report: dict[str, Any] = {
        "networks": networks,
        "grid": study.suite("robustness-grid", ON_GRID, dict(amount.grid), None),
        "path": study.suite("diffusion-path", ON_PATH, dict(amount.path), amount.path_images),
        "ways": methods,
        "orderings": [] if runs.scale.size == "smoke" else compare_orderings(values),
        "classes": study.classes(),
        "amount": {
            n: getattr(amount, n) for n in ("per_class", "steps", "strength", "real", "options")
        },
        **circumstances(runs, "guidance", classifiers, first_seed_shown=True),
    }
    missing = [pair for m in methods for pair in m["missing_seeds"].items()]
    notes = (f"seed {seed}: {reason}" for seed, reason in missing if seed != str(runs.seed))
    report["notes"] += dict.fromkeys(notes)
    done = [method for method in report["ways"] if "stopped" not in method]
    shown = [(method["name"], method["about"], study.shown[method["name"]]) for method in done]
    few, names = [own for own in shown if own[0] in SUMMARY], study.test.class_names
    plots = {
        "guidance-samples.png": partial(samples_of_methods, few or shown, names=names),
        "guidance-all-samples.png": partial(samples_of_methods, shown, names=names),
        "guidance-ways.png": partial(compare_methods, done),
    }
    plots = plots if done else {}
    if any("energy" in own for own in report["classes"]["networks"].values()):
        plots["guidance-class-energies.png"] = partial(energies_by_class, report)
    return Report(report, plots, study.copies)


# --- drawing -------------------------------------------------------------------------------------


class DrawnImages(NamedTuple):
    """Images drawn by a method."""

    images: Tensor  # (N, C, H, W) uint8
    seconds: float  # drawing time


@dataclass
class ImageDrawer:
    """Draws images by DDIM and stores them."""

    folder: Path  # folder of the image files
    models: Callable[[str], ScoreModel]  # trained networks by name
    digests: Callable[[str], str]  # digests of their weights, by name
    classes: int  # number of labels
    per_class: int  # images per label
    seed: int  # seed of starting noise and steps
    train: Images  # labelled training images, for mean energies
    progress: bool = False  # show progress
    _means: dict[str, list[float]] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """Cyclic labels (N,): 0, 1, ..., C - 1, 0, ..."""
        return torch.arange(self.classes * self.per_class) % self.classes

    def path(self, method: GuidanceMethod) -> Path:
        """The file of the images of ``method``."""
        return self.folder / f"{re.sub(r'[^0-9a-z.]+', '-', method.name.lower())}.h5"

    def stored(self, method: GuidanceMethod, steps: int) -> DrawnImages:
        """Load the images of ``method`` with ``steps`` of DDIM, or draw and store them.

        Raises:
            UserError: as in `draw`, or if a file cannot be written.
        """
        import h5py

        labels = self.labels
        networks = [method.base, *([method.guide] if method.guide else [])]
        settings = {
            "guidance": _all_settings(method.settings) if method.settings else None,
            "guide": method.guide,
            "base": method.base,
            "steps": steps,
            "eta": method.eta,
            "clip": method.clip,
            "count": len(labels),
            "seed": self.seed,
            "digests": [self.digests(network) for network in networks],
        }
        path = self.path(method)
        found = _read(path, settings)
        if found is not None:
            return found
        begun = time.perf_counter()
        with torch.no_grad():
            pixels = (255 * self.draw(method, steps)).round().byte()
        seconds = time.perf_counter() - begun
        facts = {"settings": json.dumps(settings), "seed": self.seed, "run": method.base}
        facts |= {"seconds": seconds, "source": "fresh", "sampler": "ddim"}
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            rows = rearrange(pixels, "n c h w -> n h w c").contiguous().numpy()
            file.create_dataset("images", data=rows, compression="gzip")
            file.create_dataset("labels", data=labels.numpy())
            file.attrs.update(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
        return DrawnImages(pixels, seconds)

    def draw(self, method: GuidanceMethod, steps: int) -> Tensor:
        """Draw images (N, C, H, W) of `labels` with ``steps`` of DDIM; finally clamp to [0, 1].

        Raises:
            UserError: if base and guide do not match, or chains become NaN or Inf.
        """
        model, card = self._model(method), self.models(method.base).card
        assert card is not None
        assert card.image_size is not None
        entry = SAMPLERS["ddim"]
        config = entry.config(steps=steps, eta=method.eta, clip=method.clip)
        found, batches = [], torch.split(self.labels, BATCH)
        with counting(method.name, self.progress) as progress:
            for batch, own in enumerate(batches):
                key = partial(keyed_generator, "cpu", self.seed, "guidance", batch)
                c = own if method.settings else None
                sampler = entry.build(model, c, config)
                shape = (len(own), card.channels, *card.image_size)
                start = entry.start(model, sampler, config, shape, key(0), c)
                chains, length = Chains(sampler, sampler.init(start)), entry.length(sampler, config)
                while not chains.done:
                    chains.advance(key(chains.state.step + 1))
                    progress(batch * length + chains.state.step, len(batches) * length)
                if chains.diverged:
                    raise UserError(
                        f"{len(chains.diverged)} of {len(own)} chains of {method.name!r} became "
                        "NaN or Inf: lower its scale"
                    )
                found.append(chains.state.x.clamp(0, 1))
        return torch.cat(found)

    def _model(self, method: GuidanceMethod) -> ScoreModel:
        """The model that ``method`` samples: guided, or the base."""
        base = self.models(method.base)
        if not method.settings:
            return base
        config = make_guidance(**method.settings)
        if method.guide is None:
            return guided_model(base, None, config)
        guide = check_guide(self.models(method.guide))
        if config.needs_means and method.guide not in self._means:
            self._means[method.guide] = class_energies(guide, self.train).energy
        return guided_model(base, guide, config, self._means.get(method.guide))


def _all_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete guidance settings; earlier names are accepted."""
    return make_guidance(**settings).model_dump()


def _read(path: Path, settings: Mapping[str, Any]) -> DrawnImages | None:
    """Read the images in ``path``; None if there are none with these settings."""
    what = repr(str(path))
    with contextlib.suppress(*DAMAGED), open_hdf5(path) as file:
        own = {"clip": True} | json.loads(read_attribute(file, "settings", what))
        if own.get("guidance"):
            own["guidance"] = _all_settings(own["guidance"])
        if own == json.loads(json.dumps(settings)):
            pixels = rearrange(read_contents(path).read_all(), "n h w c -> n c h w").contiguous()
            if len(pixels) == own["count"]:
                return DrawnImages(pixels, float(read_attribute(file, "seconds", what)))
    return None


def images_folder(runs: ExperimentRuns) -> Path:
    """Folder of the images of the first seed: ``guidance`` for seed 0, else ``guidance/seed-SEED``.

    Earlier versions used ``guidance`` for any seed: it belongs to the seed of its images.
    """
    folder, owner = runs.out / "guidance", 0
    for path in sorted(folder.glob("*.h5")):
        with contextlib.suppress(*DAMAGED), open_hdf5(path) as file:
            owner = int(read_attribute(file, "seed", repr(str(path))))
            break
    return folder if runs.seed == owner else folder / f"seed-{runs.seed}"


# --- measuring -----------------------------------------------------------------------------------


class _Study:
    """Measurements of the networks trained with one seed, the first of ``runs``."""

    def __init__(
        self, runs: ExperimentRuns, amount: StudySize, trained: Sequence[Variant], train: AnyImages
    ) -> None:
        self.runs, self.amount, self.trained = runs, amount, list(trained)
        self.names = {network.name for network in trained}
        self.shown: dict[str, Tensor] = {}  # images for the plot, by method
        self.copies: dict[str, Path] = {}  # plots of suites, by file name
        self._loaded: dict[str, ScoreModel] = {}
        self._classifier: Extractor | None = None
        self.folder = images_folder(runs)
        self.test = runs.images(EVALUATION_CLASSIFIER, "test").spread(amount.real)
        self.train, classes = train, self.test.num_classes
        self.others = self.train.spread(2 * classes * amount.per_class)
        self.drawing = ImageDrawer(
            self.folder,
            self._model,
            self._digest,
            classes,
            amount.per_class,
            runs.seed,
            train,
            runs.progress,
        )
        energies = [v.name for v in (*reversed(ROBUST), PLAIN) if v in self.trained]
        self.energy = next(iter(energies), None)  # E(x) of the most robust classifier

    def networks(
        self, results: Sequence[VariantResult]
    ) -> tuple[list[dict[str, Any]], list[VariantResult]]:
        """Descriptions of all networks, and results of the classifiers."""
        documents, classifiers = [], []
        measured = self.runs.share(
            (run.named(one.variant), partial(run.measure, one.variant, CLASSIFY))
            for one in results
            if isinstance(self._model(one.variant.name), EnergyModel)
            for run in map(self.runs.at, one.by_seed)
        )
        for one in results:
            facts = {k: v for k, v in one.facts.items() if k not in ("data", "measured_by")}
            names = {seed: self.runs.at(seed).named(one.variant) for seed in one.by_seed}
            found = {s: measured[n]["classify"] for s, n in names.items() if n in measured}
            if found:
                each = {s: one.facts_by_seed[s] | measured_facts([d]) for s, d in found.items()}
                classifiers.append(
                    VariantResult(one.variant, facts_by_seed=each, missing=one.missing)
                )
            shown = found.get(self.runs.seed, {})
            documents.append(
                {
                    "name": one.variant.name,
                    "label": one.variant.label,
                    "accuracy": shown.get("accuracy"),
                    "interval": shown.get("accuracy_interval"),
                    "by_seed": {str(seed): own["accuracy"] for seed, own in found.items()},
                    "facts": facts,
                }
            )
        return documents, classifiers

    def suite(
        self, name: str, networks: Sequence[Variant], options: dict[str, Any], images: int | None
    ) -> dict[str, Any] | None:
        """Run the suite ``name`` on ``networks``, the plain classifier first; return its document.

        The report copies its plots.
        """
        chosen = [network for network in networks if network in self.trained]
        chosen.sort(key=lambda network: network is not PLAIN)
        if not chosen:
            return None
        first, *others = chosen
        beside = [str(self.runs.folder(network)) for network in others]
        options |= {"name": first.name, "beside": beside}
        key = {"options": options, "digests": [self._digest(network.name) for network in chosen]}
        path, stored = self.folder / f"{name}.json", self.folder / f"{name}.key.json"

        def measure() -> None:
            with self.runs.claimed(path):
                if read_document(stored) == json.loads(json.dumps(key)) and path.is_file():
                    return
                self.runs.log(f"measuring {name}")
                evaluate(
                    self._model(first.name),
                    self.runs.images(first, "test"),
                    [name],
                    self.folder,
                    limit=images,
                    seed=self.runs.seed,
                    options={name: options},
                    progress=self.runs.progress,
                )
                write_atomically(stored, json.dumps(key).encode())

        self.runs.share([(name, measure)])
        document: dict[str, Any] = read_json(path)
        for plot in document["pictures"]:
            if Path(plot).name != plot:
                raise UserError(f"{str(path)!r} is damaged: it names a plot in another folder")
            if plot != "class-energies.png":  # of test images
                self.copies[f"guidance-{plot}"] = self.folder / plot
        return document

    def classes(self) -> dict[str, Any]:
        """Energies of training images by class under each classifier (RCG figure 4.12)."""
        train, found = self.train, {}
        images = (
            train if self.amount.class_images is None else train.spread(self.amount.class_images)
        )
        for network in (network for network in ON_PATH if network in self.trained):
            key = {"digest": self._digest(network.name), "images": len(images)}
            path = self.folder / f"class-energies-{network.name}.json"
            energies = partial(self._class_energies, network.name, images)
            found[network.name] = _cached(path, key, energies)
        return {"networks": found, "names": list(train.class_names), "energy": self.energy}

    def _class_energies(self, name: str, images: Images) -> dict[str, Any]:
        """Fields of `ClassEnergies`, or the reason why there are none."""
        self.runs.log(f"measuring energies by class: {name}")
        try:
            with counting(name, self.runs.progress) as progress:
                guide = check_guide(self._model(name))
                return class_energies(guide, images, progress).model_dump()
        except UserError as error:
            return {"stopped": str(error)}

    def methods(self) -> list[GuidanceMethod]:
        """The methods of this scale whose networks are trained."""
        every = (m.times(self.amount.strength).with_options(self.amount.options) for m in METHODS)
        chosen = (m for m in every if not self.amount.methods or m.name in self.amount.methods)
        return [method for method in chosen if not self.untrained(method)]

    def untrained(self, method: GuidanceMethod) -> list[str]:
        """Names of the networks that ``method`` lacks."""
        used = (method.base, method.guide or method.base, EVALUATION_CLASSIFIER.name)
        return [name for name in dict.fromkeys(used) if name not in self.names]

    def named(self, method: GuidanceMethod) -> str:
        """Name of the images of ``method`` in messages."""
        return f"{method.name}, seed {self.runs.seed}" if self.runs.seed else method.name

    def measured(self, method: GuidanceMethod) -> dict[str, Any]:
        """Metrics of ``method``, or the reason why its images cannot be drawn.

        Raises:
            FolderLocked: if another process draws or measures them.
        """
        try:
            with self.runs.claimed(self.drawing.path(method)):
                self.runs.log(f"drawing: {self.named(method)}")
                drawn = self.drawing.stored(method, self.amount.steps)
                self.shown[method.name] = drawn.images[: self.test.num_classes]
                return self._measured(method, drawn)
        except FolderLocked:
            raise
        except UserError as error:
            return {"stopped": str(error)}

    def _measured(self, method: GuidanceMethod, drawn: DrawnImages) -> dict[str, Any]:
        """Metrics of the images of ``method``, stored next to the images."""
        key = {
            "images": hashlib.sha256(drawn.images.numpy().tobytes()).hexdigest(),
            "judge": self._digest(EVALUATION_CLASSIFIER.name),
            "energy": None if self.energy is None else self._digest(self.energy),
            "real": len(self.test),
            "labelled": True,
            "classes": True,
            "by_image": True,
        }
        path = self.folder / f"{method.name.replace(' ', '-')}.json"
        return _cached(path, key, partial(self._metrics, drawn))

    def _metrics(self, drawn: DrawnImages) -> dict[str, Any]:
        """Metrics of ``drawn``, and their energies by class (RCG figure 4.15)."""
        if self._classifier is None:
            device = pick_device(self.runs.device)
            self._classifier = classifier(str(self.runs.folder(EVALUATION_CLASSIFIER)), device)
        model = None if self.energy is None else self._model(self.energy)
        assert model is None or isinstance(model, EnergyModel)
        labels = self.drawing.labels
        found = measure_guided(
            drawn.images,
            labels,
            self.test,
            self._classifier,
            model,
            others=self.others,
            by_image=True,
        ) | {"seconds": drawn.seconds}
        if self.energy is not None:
            images = ImageSet(drawn.images, labels, self.test.class_names, "samples", "test")
            found["energies_by_class"] = self._class_energies(self.energy, images)
        return found

    def _model(self, name: str) -> ScoreModel:
        if name not in self._loaded:
            device = str(pick_device(self.runs.device))
            self._loaded[name] = load(self.runs.folder(_NETWORKS[name]), device=device)
        return self._loaded[name]

    def _digest(self, name: str) -> str:
        return weights_digest(self.runs.folder(_NETWORKS[name]))


ImageValues = dict[str, dict[int, dict[str, list[float]]]]
"""Values by image (N,), by method, seed and name in `BY_IMAGE`."""


def measure_methods(studies: Sequence[_Study]) -> tuple[list[dict[str, Any]], ImageValues]:
    """Draw and measure every method of the first study, with the seed of each study.

    Returns:
        Settings and metrics (of the first seed) of each method, with the figures of the report
        ``by_seed`` and the reasons for ``missing_seeds``; and the values by image.
    """
    first, documents, values = studies[0], list[dict[str, Any]](), ImageValues()
    found = first.runs.share(
        (study.named(method), partial(study.measured, method))
        for study in studies
        for method in study.methods()
    )
    for method in first.methods():
        each: dict[int, dict[str, Any]] = {
            study.runs.seed: {"stopped": f"not trained: {', '.join(lacking)}"}
            if (lacking := study.untrained(method))
            else found[study.named(method)]
            for study in studies
        }
        done = {seed: own for seed, own in each.items() if "stopped" not in own}
        values[method.name] = {seed: own.pop("by_image") for seed, own in done.items()}
        about = {k: v for k, v in asdict(method).items() if k not in ("description", "fixed")}
        figure = f" (figure {method.figure})" if method.figure else ""
        about["about"] = method.description + figure
        about |= each[first.runs.seed]
        about["by_seed"] = {str(seed): figures_of(own) for seed, own in done.items()}
        about["missing_seeds"] = {str(s): o["stopped"] for s, o in each.items() if s not in done}
        documents.append(about)
    return documents, values


def compare_orderings(values: ImageValues) -> list[dict[str, Any]]:
    """Test `ORDERINGS` by differences of images from the same noise, over seeds and images.

    Images of two seeds share no noise, so the test over images is of their means over seeds.
    """
    found = []
    for greater, smaller, metric, source in ORDERINGS:
        column, factor = BY_IMAGE[metric]
        a, b = (
            {s: factor * np.array(own[column], float) for s, own in each.items() if column in own}
            for each in (values.get(greater, {}), values.get(smaller, {}))
        )
        gaps = {seed: a[seed] - b[seed] for seed in a if seed in b}
        if not gaps or not all(np.isfinite(own).all() for own in gaps.values()):
            continue
        compared = compare(np.stack(list(gaps.values())))
        found.append(
            {
                "greater": greater,
                "smaller": smaller,
                "metric": metric,
                "source": source,
                "ours": compared.difference,
                "seeds": list(gaps),
                "images": len(a[min(gaps)]),
                **compared.document(),
            }
        )
    return found


def _cached(path: Path, key: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result stored in ``path`` if it was stored for ``key``, else computed and stored."""
    old = read_document(path)
    if old.get("key") == json.loads(json.dumps(key)):
        return dict(old["found"])
    found = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"key": key, "found": found}, indent=1).encode())
    return found


GUIDANCE_EXPERIMENT = Experiment(
    "guiding a diffusion model by energies (the second paper)",
    run_guidance,
    guidance_text,
    NETWORKS,
)
