"""Experiment ``guidance``: the second paper, measured with networks trained for it.

- the grid of robust accuracy (RCG table 4.1), by the suite ``robustness-grid``;
- accuracy and energies along the diffusion (figures 4.5, 4.6, 4.9, 4.12), by ``diffusion-path``;
- eta and the number of steps of DDIM (table 2.1), unguided;
- what the paper lacks: of each guidance method (`ebmkit.experiments.guidance_grid`), how often the
  evaluation classifier sees the label, distance to real images and diversity by class, saturation,
  energy gap.

Chain n of every method starts from the same numbers and takes the same draws at each step, keyed by
(seed, batch, step). What differs between two methods is then what guidance does, not luck.

::

    OUT/guidance.md  guidance.json  guidance*.png
    OUT/rows/guidance/NETWORK/   run folders
    OUT/guidance/METHOD.h5       images (N, H, W, C) uint8 and their labels (N,)
    OUT/guidance/METHOD.json     what was measured of them

A method is drawn again where its settings, or the weights of the networks, are others than before.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ebmkit.compute import pick_device
from ebmkit.data.hdf5 import read_contents
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import evaluate
from ebmkit.evaluation.features import Extractor, classifier, measure_guided
from ebmkit.evaluation.robustness_grid import column_names
from ebmkit.evaluation.suite import Images, number
from ebmkit.experiments.guidance_grid import (
    AMOUNTS,
    DIFFUSION,
    EVALUATION_CLASSIFIER,
    GROUPS,
    METHODS,
    NETWORKS,
    ON_GRID,
    ON_PATH,
    PLAIN,
    ROBUST,
    TABLE_2_1,
    Amount,
    GuidanceMethod,
)
from ebmkit.experiments.report import (
    Experiment,
    Report,
    Result,
    circumstances,
    line,
    measured_facts,
    percent,
    run_grid,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant, read_document
from ebmkit.guidance import check_guide, class_energies, guided_model, make_guidance
from ebmkit.models import load, weights_digest
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import SAMPLERS, Chains
from ebmkit.storage import write_atomically
from ebmkit.storage.hdf5 import open_hdf5, read_attribute
from ebmkit.storage.reading import read_json

CLASSIFY = Protocol("guidance", ("classify",), images={"classify": 1000})

BATCH = 100
"""Chains that are moved together."""


def run_guidance(
    runs: ExperimentRuns, only: Sequence[str] = (), amount: Amount | None = None
) -> Report:
    """Train the networks that are ``only``, all if empty; measure with all that are trained.

    Args:
        runs: the run folders.
        only: names of networks.
        amount: how much; None: that of the scale.

    Raises:
        Interrupted: if training was; calling again resumes it.
        UserError: if a network does not suit this machine. One that stops later is named in
            ``runs.stopped`` and in the report.
    """
    from ebmkit.experiments.plots import compare_methods, samples_of_methods

    amount = amount or AMOUNTS[runs.scale.name]
    every = [v for v in NETWORKS if not amount.networks or v.name in amount.networks]
    results = run_grid(runs, every, only, lambda network: None)
    study = _Study(runs, amount, [one.variant for one in results if one.status == "done"])
    networks, classifiers = study.networks(results)
    report: dict[str, Any] = {
        "networks": networks,
        "grid": study.suite("robustness-grid", ON_GRID, dict(amount.grid), None),
        "path": study.suite("diffusion-path", ON_PATH, dict(amount.path), amount.path_images),
        "ddim": study.ddim(),
        "ways": study.methods(),
        "amount": {
            name: getattr(amount, name) for name in ("per_class", "steps", "strength", "real")
        },
        **circumstances(runs, "guidance", classifiers),
    }
    done = [method for method in report["ways"] if "stopped" not in method]
    shown = [(method["name"], method["about"], study.shown[method["name"]]) for method in done]
    plots = {
        "guidance-samples.png": partial(samples_of_methods, shown),
        "guidance-ways.png": partial(compare_methods, done),
    }
    return Report(report, guidance_text(report), plots if done else {}, study.copies)


# --- drawing -------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Images of a method, uint8 (N, C, H, W), their labels (N,), and seconds that they took."""

    images: Tensor
    labels: Tensor
    seconds: float


@dataclass
class Drawing:
    """Draws images by DDIM, once: they are stored.

    Args:
        folder: of the images.
        models: trained networks by name.
        digests: of their weights, by name.
        classes: number of labels.
        per_class: images of each.
        seed: of starts and steps.
        train: labelled training images, for mean energies of labels.
    """

    folder: Path
    models: Callable[[str], ScoreModel]
    digests: Callable[[str], str]
    classes: int
    per_class: int
    seed: int
    train: Images
    _means: dict[str, list[float]] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """The labels (N,), in turn: 0, 1, ..., C - 1, 0, ..."""
        return torch.arange(self.classes * self.per_class) % self.classes

    def stored(self, method: GuidanceMethod, steps: int) -> Drawn:
        """The stored images of ``method``, or those drawn and stored now, by ``steps`` of DDIM.

        Raises:
            UserError: as `draw` does, or if a file cannot be written.
        """
        import h5py

        labels = self.labels
        networks = [method.base, *([method.guide] if method.guide else [])]
        settings = {
            "guidance": _resolved(method.settings) if method.settings else None,
            "guide": method.guide,
            "base": method.base,
            "steps": steps,
            "eta": method.eta,
            "count": len(labels),
            "seed": self.seed,
            "digests": [self.digests(network) for network in networks],
        }
        path = self.folder / f"{re.sub(r'[^0-9a-z.]+', '-', method.name.lower())}.h5"
        found = _read(path, settings)
        if found is not None:
            return Drawn(found[0], labels, found[1])
        begun = time.perf_counter()
        with torch.no_grad():
            pixels = (255 * self.draw(method, steps)).round().byte()
        seconds = time.perf_counter() - begun
        content = io.BytesIO()
        with h5py.File(content, "w") as file:
            rows = rearrange(pixels, "n c h w -> n h w c").contiguous().numpy()
            file.create_dataset("images", data=rows, compression="gzip")
            file.create_dataset("labels", data=labels.numpy())
            facts = {"settings": json.dumps(settings), "seed": self.seed, "run": method.base}
            facts |= {"seconds": seconds, "source": "fresh", "sampler": "ddim"}
            file.attrs.update(facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
        return Drawn(pixels, labels, seconds)

    def draw(self, method: GuidanceMethod, steps: int) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of `labels`, by ``steps`` of DDIM.

        Raises:
            UserError: if networks do not fit, or chains become NaN or Inf.
        """
        model, card = self._model(method), self.models(method.base).card
        assert card is not None
        assert card.image_size is not None
        entry = SAMPLERS["ddim"]
        config = entry.config(steps=steps, eta=method.eta)
        found = []
        for batch, own in enumerate(torch.split(self.labels, BATCH)):
            c = own if method.settings else None
            sampler = entry.build(model, c, config)
            shape = (len(own), card.channels, *card.image_size)
            begin = keyed_generator("cpu", self.seed, "guidance", batch, 0)
            chains = Chains(
                sampler, sampler.init(entry.start(model, sampler, config, shape, begin, c))
            )
            while not chains.done:
                step = keyed_generator("cpu", self.seed, "guidance", batch, chains.state.step + 1)
                chains.advance(step)
            if chains.diverged:
                raise UserError(
                    f"{len(chains.diverged)} of {len(own)} chains of {method.name!r} became NaN or "
                    "Inf: lower its scale"
                )
            found.append(chains.state.x.clamp(0, 1))
        return torch.cat(found)

    def _model(self, method: GuidanceMethod) -> ScoreModel:
        """The model that ``method`` samples: guided, or the base itself."""
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


def _resolved(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of guidance; earlier names are understood."""
    return make_guidance(**settings).model_dump()


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[Tensor, float] | None:
    """The images in ``path``, and the seconds they took; None if it has none of these settings."""
    what = repr(str(path))
    damaged = (UserError, ValueError, TypeError, AttributeError)
    with contextlib.suppress(*damaged), open_hdf5(path) as file:
        own = json.loads(read_attribute(file, "settings", what))
        if own.get("guidance"):
            own["guidance"] = _resolved(own["guidance"])
        if (
            own == json.loads(json.dumps(settings))
            and len(pixels := read_contents(path).read_all()) == own["count"]
        ):
            pixels = rearrange(pixels, "n h w c -> n c h w").contiguous()
            return pixels, float(read_attribute(file, "seconds", what))
    return None


# --- measuring -----------------------------------------------------------------------------------


class _Study:
    """What is measured of trained networks.

    Attributes:
        shown: by method, images for the plot.
        copies: plots of suites, by file name.
    """

    def __init__(self, runs: ExperimentRuns, amount: Amount, trained: Sequence[Variant]) -> None:
        self.runs, self.amount, self.trained = runs, amount, list(trained)
        self.names = {network.name for network in trained}
        self.shown: dict[str, Tensor] = {}
        self.copies: dict[str, Path] = {}
        self._loaded: dict[str, ScoreModel] = {}
        self._judge: Extractor | None = None
        self.folder = runs.out / "guidance"
        self.test = runs.images(EVALUATION_CLASSIFIER, "test").spread(amount.real)
        train, classes = runs.images(EVALUATION_CLASSIFIER, "train"), self.test.num_classes
        self.others = train.spread(2 * classes * amount.per_class)
        self.drawing = Drawing(self.folder, self._model, self._digest, classes, amount.per_class,
                               runs.seed, train)  # fmt: skip
        energies = [v.name for v in (*reversed(ROBUST), PLAIN) if v in self.trained]
        self.energy = next(iter(energies), None)  # E(x) of the most robust classifier

    def networks(self, results: Sequence[Result]) -> tuple[list[dict[str, Any]], list[Result]]:
        """What each network is; and what was measured of those that classify."""
        documents, classifiers = [], []
        for one in (result for result in results if result.status == "done"):
            found: dict[str, Any] = {}
            facts = {k: v for k, v in one.facts.items() if k not in ("data", "measured_by")}
            if isinstance(self._model(one.variant.name), EnergyModel):
                found = self.runs.measure(one.variant, CLASSIFY)["classify"]
                own = facts | measured_facts([found])
                classifiers.append(Result(one.variant, {"classify": found}, own))
            documents.append(
                {
                    "name": one.variant.name,
                    "label": one.variant.label,
                    "accuracy": found.get("accuracy"),
                    "interval": found.get("accuracy_interval"),
                    "facts": facts,
                }
            )
        return documents, classifiers

    def suite(
        self, name: str, networks: Sequence[Variant], options: dict[str, Any], images: int | None
    ) -> dict[str, Any] | None:
        """The document of a suite of the first of ``networks``, the plain one if it is trained,
        with the others beside; its plots are copied."""
        chosen = [network for network in networks if network in self.trained]
        chosen.sort(key=lambda network: network is not PLAIN)
        if not chosen:
            return None
        first, *others = chosen
        options |= {
            "name": first.name,
            "beside": [str(self.runs.folder(network)) for network in others],
        }
        key = {"options": options, "digests": [self._digest(network.name) for network in chosen]}
        path, stored = self.folder / f"{name}.json", self.folder / f"{name}.key.json"
        if read_document(stored) != json.loads(json.dumps(key)) or not path.is_file():
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
        document: dict[str, Any] = read_json(path)
        for plot in document["pictures"]:
            if Path(plot).name != plot:
                raise UserError(f"{str(path)!r} is damaged: it names a plot elsewhere")
            self.copies[f"guidance-{plot}"] = self.folder / plot
        return document

    def ddim(self) -> list[dict[str, Any]]:
        """Distances of unguided images by eta and number of steps."""
        if not {DIFFUSION.name, EVALUATION_CLASSIFIER.name} <= self.names:
            return []
        found = []
        for eta in self.amount.etas:
            for steps in self.amount.lengths:
                method = replace(METHODS[0], name=f"ddim eta {eta:g} steps {steps}", eta=eta)
                drawn = self._drawn(method, steps)
                found.append({"eta": eta, "steps": steps} | self._measured(method, drawn, False))
        return found

    def methods(self) -> list[dict[str, Any]]:
        """Everything about each method whose networks are trained."""
        found = []
        for method in (method.times(self.amount.strength) for method in METHODS):
            if self.amount.methods and method.name not in self.amount.methods:
                continue
            used = {method.base, method.guide or method.base, EVALUATION_CLASSIFIER.name}
            if not used <= self.names:
                continue
            about = asdict(method)
            about["about"] = about.pop("description")
            del about["fixed"]
            try:
                drawn = self._drawn(method, self.amount.steps)
            except UserError as error:
                found.append(about | {"stopped": str(error)})
                continue
            self.shown[method.name] = drawn.images[: self.test.num_classes]
            found.append(about | self._measured(method, drawn, True))
        return found

    def _drawn(self, method: GuidanceMethod, steps: int) -> Drawn:
        self.runs.log(f"drawing: {method.name}")
        return self.drawing.stored(method, steps)

    def _measured(self, method: GuidanceMethod, drawn: Drawn, labelled: bool) -> dict[str, Any]:
        """What is measured of the images of ``method``, stored beside them."""
        key = {
            "images": hashlib.sha256(drawn.images.numpy().tobytes()).hexdigest(),
            "judge": self._digest(EVALUATION_CLASSIFIER.name),
            "energy": None if self.energy is None else self._digest(self.energy),
            "real": len(self.test),
            "labelled": labelled,
        }
        path = self.folder / f"{method.name.replace(' ', '-')}.json"
        old = read_document(path)
        if old.get("key") == json.loads(json.dumps(key)):
            return dict(old["found"])
        if self._judge is None:
            device = pick_device(self.runs.device)
            self._judge = classifier(str(self.runs.folder(EVALUATION_CLASSIFIER)), device)
        model = None if self.energy is None else self._model(self.energy)
        assert model is None or isinstance(model, EnergyModel)
        labels = drawn.labels if labelled else None
        found = measure_guided(
            drawn.images, labels, self.test, self._judge, model, others=self.others
        ) | {"seconds": drawn.seconds}
        write_atomically(path, json.dumps({"key": key, "found": found}, indent=1).encode())
        return found

    def _model(self, name: str) -> ScoreModel:
        if name not in self._loaded:
            device = str(pick_device(self.runs.device))
            self._loaded[name] = load(self._folder(name), device=device)
        return self._loaded[name]

    def _digest(self, name: str) -> str:
        return weights_digest(self._folder(name))

    def _folder(self, name: str) -> Path:
        return self.runs.folder(next(network for network in NETWORKS if network.name == name))


# --- the text ------------------------------------------------------------------------------------

COLUMNS = ("s", "eta", "recognised", "distance (real)", "diversity", "saturated", "gap", "time")


def guidance_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    sections: list[tuple[str, list[str]]] = []
    if report["grid"] is not None:
        sections.append(("Robust accuracy (RCG table 4.1)", _grid(report["grid"])))
    if report["path"] is not None:
        sections.append(("Along the diffusion (RCG figures 4.5, 4.6, 4.9)", _path(report["path"])))
    if report["ddim"]:
        sections.append(("DDIM: eta and steps (RCG table 2.1)", _ddim(report["ddim"])))
    if report["ways"]:
        sections.append(("Ways to guide", _methods(report)))
    networks = []
    for one in report["networks"]:
        facts, cell = one["facts"], "-"
        if one["accuracy"] is not None:
            low, high = one["interval"]
            cell = percent({"value": one["accuracy"], "low": low, "high": high}, "{:.1f}")
        counts = [f"{facts[key]:,}" for key in ("parameters", "steps")]
        networks.append([one["name"], one["label"], cell, *counts])
    names = ["name", "what", "accuracy, %", "parameters", "steps"]
    lines = [f"Scale: {report['about']}.", "", "### Networks", ""]
    lines += table_lines(names, networks, left=2)
    for title, content in sections:
        lines += ["", f"### {title}", "", *content]
    title = f"Guidance of a diffusion model, on {report['dataset']} (RCG chapter 4)"
    return text_of(title, lines, report["notes"])


def _grid(document: dict[str, Any]) -> list[str]:
    rows = (
        [f"{epsilon:g}", *(percent(column["accuracy"][row]) for column in document["columns"])]
        for row, epsilon in enumerate(document["epsilons"])
    )
    return [
        f"Accuracy in % (95 % interval) on {document['options']['images']} test images at most, "
        f"{document['options']['steps']}-step PGD; rows: eps of the attack.",
        "",
        *table_lines(["eps", *column_names(document)], rows, left=0),
    ]


def _path(document: Mapping[str, Any]) -> list[str]:
    models = document["models"]
    levels = next(iter(models.values()))["path"]["timestep"]

    def nearest(t: int) -> int:
        return min(range(len(levels)), key=lambda i: abs(levels[i]["t"] - t))

    chosen, middle = [nearest(t) for t in (100, 200, 400)], nearest(500)
    heads = [f"{view}, t = {levels[i]['t']}" for view in ("x_t", "y") for i in chosen]
    dark = f"dark, t = {levels[middle]['t']}"
    rows = []
    for name, one in models.items():
        path, since = one["path"], one["chance_from"]
        shown = [one["clean"], *(path[v][i] for v in ("timestep", "image") for i in chosen)]
        cells = [f"{100 * _value(e['accuracy']):.0f}" for e in [*shown, path["dark"][middle]]]
        cells += ["never" if since[v] is None else str(since[v]) for v in ("timestep", "image")]
        rows.append([name, *cells])
    return [
        f"Accuracy in % of {document['images']:,} test images: clean; noisy as the diffusion model "
        "has them (x_t) and in image units (y) at some timesteps; darkened alone at t = T/2. "
        "*Chance from*: the first timestep measured at which the interval reaches chance.",
        "",
        *table_lines(["network", "clean", *heads, dark, "chance from: x_t", "y"], rows),
    ]


def _ddim(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    lengths, rows = sorted({cell["steps"] for cell in cells}), []
    for eta in sorted({cell["eta"] for cell in cells}):
        own = {cell["steps"]: cell for cell in cells if cell["eta"] == eta}
        theirs = TABLE_2_1.get(eta, {})
        values = [f"{own[s]['frechet']['value']:.3g} ({theirs.get(s, '-')})" for s in lengths]
        rows.append([f"{eta:g}", *values])
    return [
        f"Frechet distance in the judge's features of {cells[0]['count']} unguided images (of as "
        f"many real ones: {cells[0]['floor']['frechet']:.3g}), comparable within this table alone; "
        "in brackets the thesis's FID of a converged model.",
        "",
        *table_lines(["eta", *(f"{steps} steps" for steps in lengths)], rows, left=0),
    ]


def _methods(report: Mapping[str, Any]) -> list[str]:
    amount = report["amount"]
    lines = [
        f"{amount['per_class']} images of each class, {amount['steps']} steps of DDIM, all ways "
        "from the same starting noise. *Recognised*: the judge sees the wanted class, % (95 % "
        "interval). *Distance*: Frechet distance in the judge's features to real images of the "
        "class, mean over classes; of few images it is biased upwards, and *real* is what as many "
        "real images have. *Diversity*: 1 if images of a class differ as real ones do. "
        "*Saturated*: pixel values at the ends of the range, %, real images' in brackets. "
        "*Gap*: mean E(x) under the most robust classifier, minus real images', nats. "
        "*Time*: seconds an image. Scales s are the thesis's times "
        f"{amount['strength']:g}, where they are not 1.",
    ]
    for group, title in GROUPS.items():
        own = [method for method in report["ways"] if method["group"] == group]
        if own:
            head = table_lines(["way", "", *COLUMNS], (), left=2)
            head[0] = head[0].replace("|  |", "| |")
            lines += ["", f"#### {title}", "", *head, *map(_method_line, own)]
    return lines


def _method_line(method: Mapping[str, Any]) -> str:
    scale = f"{method['settings']['scale']:g}" if method["settings"] else ""
    about = method["about"].replace("|", "\\|")
    head = [method["name"], about, scale, f"{method['eta']:g}"]
    if "stopped" in method:
        return f"{line([*head, method['stopped']])[:-2]} | | | | | |"
    means, ends = method["means"], method["saturation"]["ends"]
    gap = method["energy_gap"]["energy"] if method["energy_gap"] else None
    return line(
        [
            *head,
            percent(method["accuracy"]) if method["accuracy"] else "-",
            f"{number(means['frechet'], '{:.3g}')} ({number(means['floor'], '{:.3g}')})",
            number(means["diversity"], "{:.2f}"),
            f"{100 * _value(ends['samples']):.1f} ({100 * _value(ends['real']):.1f})",
            number(None if gap is None else gap["value"], "{:+.2f}"),
            f"{method['seconds'] / method['count']:.2g}",
        ]
    )


def _value(estimate: Any) -> float:
    return float(estimate["value"] if isinstance(estimate, dict) else estimate)


GUIDANCE_EXPERIMENT = Experiment(
    "guiding a diffusion model by energies (the second paper)", run_guidance, NETWORKS
)
