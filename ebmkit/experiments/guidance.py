"""Target ``guidance``: the second paper, measured from networks trained for it.

- the grid of robust accuracy (RCG table 4.1), by the suite ``robustness-grid``;
- accuracy and energies along the diffusion (figures 4.5, 4.6, 4.9, 4.12), by ``diffusion-path``;
- eta and the number of steps of DDIM (table 2.1), unguided;
- what the paper lacks: of each way to guide (`ebmkit.experiments.guidance_rows`), how often a judge
  sees the wanted class, distance to real images and diversity by class, saturation, energy gap.

::

    OUT/guidance.md  guidance.json  guidance*.png
    OUT/rows/guidance/NETWORK/   run folders
    OUT/guidance/                images of every way, and what was measured of them
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ebmkit.compute import pick_device
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import SUITES, evaluate
from ebmkit.evaluation.features import Extractor, classifier
from ebmkit.evaluation.guided import measure_guided
from ebmkit.experiments.guidance_rows import (
    AMOUNTS,
    DIFFUSION,
    EVALUATION_CLASSIFIER,
    NETWORKS,
    ON_GRID,
    ON_PATH,
    PLAIN,
    ROBUST,
    WAYS,
    Amount,
    GuidanceMethod,
)
from ebmkit.experiments.guided import Drawing, Drawn, keep_drawing
from ebmkit.experiments.keeping import Protocol
from ebmkit.experiments.report import Found
from ebmkit.experiments.rows import Row
from ebmkit.experiments.runs import Rows
from ebmkit.experiments.tabulate import circumstances, measured
from ebmkit.models import load, weights_digest
from ebmkit.storage import write_atomically
from ebmkit.storage.reading import read_json

__all__ = ["FAMILY", "run_guidance"]

FAMILY = "guidance"

CLASSIFY = Protocol("guidance", ("classify",), images={"classify": 1000})


def run_guidance(rows: Rows, only: Sequence[str], amount: Amount | None = None) -> list[Path]:
    """Train the networks that are ``only``, all if empty; measure with all that are trained.

    Args:
        rows: the runs.
        only: names of networks.
        amount: how much; None: that of the scale.

    Raises:
        Interrupted: if training was; calling again goes on.
        UserError: if a network does not suit this machine. One that stops later is named in
            ``rows.stopped`` and in the report.
    """
    from ebmkit.experiments.guidance_report import write

    amount = amount or AMOUNTS[rows.scale.name]
    every = [row for row in NETWORKS if not amount.networks or row.name in amount.networks]
    wanted = [row for row in every if not only or row.name in only]
    rows.check(wanted, FAMILY)
    for row in wanted:
        rows.try_train(row, FAMILY)
    trained = [row for row in every if rows.trained(row, FAMILY)]
    study = _Study(rows, amount, trained)
    found = study.networks()
    report: dict[str, Any] = {
        "networks": found,
        "grid": study.suite("robustness-grid", ON_GRID, dict(amount.grid), None),
        "path": study.suite(
            "diffusion-path",
            [r for r in trained if r in ON_PATH],
            dict(amount.path),
            amount.path_images,
        ),
        "ddim": study.ddim(),
        "ways": study.ways(),
        "amount": {
            name: getattr(amount, name) for name in ("per_class", "steps", "strength", "real")
        },
        **circumstances(rows, "guidance", study.found),
    }
    return [*write(report, study.shown, rows.out), *study.copied]


class _Study:
    """What is measured of trained networks.

    Attributes:
        found: networks, for the circumstances.
        shown: images of each way, for the picture.
        copied: pictures of suites.
    """

    def __init__(self, rows: Rows, amount: Amount, trained: Sequence[Row]) -> None:
        self.rows, self.amount, self.trained = rows, amount, list(trained)
        self.found: list[Found] = []
        self.shown: dict[str, torch.Tensor] = {}
        self.copied: list[Path] = []
        self._loaded: dict[str, ScoreModel] = {}
        self._judge: Extractor | None = None
        self.folder = rows.out / "guidance"
        self.test = rows.images(EVALUATION_CLASSIFIER, FAMILY, "test").spread(amount.real)
        self.train = rows.images(EVALUATION_CLASSIFIER, FAMILY, "train")
        count = self.test.num_classes * amount.per_class
        self.others = self.train.spread(2 * count)
        self.drawing = Drawing(
            self._model,
            self._digest,
            self.test.num_classes,
            amount.per_class,
            rows.seed,
            self.train,
        )

    def networks(self) -> list[dict[str, Any]]:
        """What each network is: accuracy where it classifies, and how it was trained."""
        documents = []
        for row in self.trained:
            classifies = isinstance(self._model(row.name), EnergyModel)
            document: dict[str, Any] | None = None
            if classifies:
                document = self.rows.measure(row, FAMILY, CLASSIFY)["classify"]
            facts = self.rows.facts(row, FAMILY)
            if document is not None:
                self.found.append(Found(row, {}, facts | measured([document])))
            documents.append(
                {
                    "name": row.name,
                    "label": row.label,
                    "accuracy": None if document is None else document["accuracy"],
                    "interval": None if document is None else document["accuracy_interval"],
                    "facts": facts,
                }
            )
        return documents

    def suite(
        self, name: str, rows: Sequence[Row], options: dict[str, Any], images: int | None
    ) -> dict[str, Any] | None:
        """The document of a suite of the first of ``rows`` with the others beside; its pictures."""
        chosen = [row for row in rows if row in self.trained]
        chosen.sort(key=lambda row: row is not PLAIN)
        if not chosen or name not in SUITES:
            return None
        first, *others = chosen
        model = self._model(first.name)
        options["name"] = first.name
        options["beside"] = [str(self.rows.folder(row)) for row in others]
        wanted = {"options": options, "digests": [self._digest(row.name) for row in chosen]}
        path = self.folder / f"{name}.json"
        kept = self.folder / f"{name}.key.json"
        if not (_same(kept, wanted) and path.is_file()):
            self.rows.tell(f"measuring {name}")
            evaluate(
                model,
                self.rows.images(first, FAMILY, "test"),
                [name],
                self.folder,
                limit=images,
                seed=self.rows.seed,
                options={name: options},
                progress=self.rows.progress,
            )
            write_atomically(kept, json.dumps(wanted).encode())
        document: dict[str, Any] = read_json(path)
        for picture in map(Path, document["pictures"]):
            if picture.name != str(picture):
                raise UserError(f"{str(path)!r} is damaged: it names a picture elsewhere")
            target = self.rows.out / f"guidance-{picture.name}"
            shutil.copyfile(self.folder / picture, target)
            self.copied.append(target)
        return document

    def ddim(self) -> list[dict[str, Any]]:
        """Distances of unguided images by eta and number of steps."""
        way, found = WAYS[0], list[dict[str, Any]]()
        if DIFFUSION not in self.trained or EVALUATION_CLASSIFIER not in self.trained:
            return found
        for eta in self.amount.etas:
            for steps in self.amount.lengths:
                name = f"ddim eta {eta:g} steps {steps}"
                drawn = self._drawn(way, name, steps, eta)
                found.append({"eta": eta, "steps": steps} | self._measured(name, drawn, False))
        return found

    def ways(self) -> list[dict[str, Any]]:
        """Everything about each way whose networks are trained."""
        names, found = {row.name for row in self.trained}, []
        for way in (way.times(self.amount.strength) for way in WAYS):
            if self.amount.ways and way.name not in self.amount.ways:
                continue
            if not {way.base, way.guide or way.base, EVALUATION_CLASSIFIER.name} <= names:
                continue
            description = {
                "name": way.name,
                "about": way.description,
                "group": way.group,
                "eta": way.eta,
            }
            description |= {"guide": way.guide, "settings": dict(way.settings), "base": way.base}
            try:
                drawn = self._drawn(way, way.name, self.amount.steps, None)
            except UserError as error:
                found.append(description | {"stopped": str(error)})
                continue
            self.shown[way.name] = drawn.images[: self.test.num_classes]
            found.append(description | self._measured(way.name, drawn, True))
        return found

    def _drawn(self, way: GuidanceMethod, name: str, steps: int, eta: float | None) -> Drawn:
        self.rows.tell(f"drawing: {name}")
        return keep_drawing(self.drawing, way, self.folder, steps, eta, name=name)

    def _measured(self, name: str, drawn: Drawn, labelled: bool) -> dict[str, Any]:
        """What is measured of images, kept beside them."""
        energy = self._energy()
        key = {
            "images": hashlib.sha256(drawn.images.numpy().tobytes()).hexdigest(),
            "judge": self._digest(EVALUATION_CLASSIFIER.name),
            "energy": None if energy is None else self._digest(energy),
            "real": len(self.test),
            "labelled": labelled,
        }
        path = self.folder / f"{name.replace(' ', '-')}.json"
        if _same(path, key, within="key"):
            return dict(read_json(path)["found"])
        model = None if energy is None else self._model(energy)
        assert model is None or isinstance(model, EnergyModel)
        found = measure_guided(
            drawn.images,
            drawn.labels if labelled else None,
            self.test,
            self._extractor(),
            model,
            others=self.others,
        ) | {"seconds": drawn.seconds}
        write_atomically(path, json.dumps({"key": key, "found": found}, indent=1).encode())
        return found

    def _energy(self) -> str | None:
        """Under whose energy samples are told: the most robust classifier's."""
        names = [row.name for row in (*reversed(ROBUST), PLAIN) if row in self.trained]
        return names[0] if names else None

    def _extractor(self) -> Extractor:
        if self._judge is None:
            device = pick_device(self.rows.device)
            self._judge = classifier(str(self.rows.folder(EVALUATION_CLASSIFIER)), device)
        return self._judge

    def _model(self, name: str) -> ScoreModel:
        if name not in self._loaded:
            device = str(pick_device(self.rows.device))
            self._loaded[name] = load(self._folder(name), device=device)
        return self._loaded[name]

    def _digest(self, name: str) -> str:
        return weights_digest(self._folder(name))

    def _folder(self, name: str) -> Path:
        return self.rows.folder(next(row for row in NETWORKS if row.name == name))


def _same(path: Path, wanted: dict[str, Any], within: str | None = None) -> bool:
    """Whether the JSON at ``path`` is ``wanted``, or its entry ``within`` is."""
    try:
        document = read_json(path)
        found = document if within is None else document[within]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(found == json.loads(json.dumps(wanted)))
