r"""Suite ``diffusion-path``: what a classifier and its energies make of the images that a diffusion
model goes through (RCG figures 4.5, 4.6, 4.9, 4.12 and 4.15).

The classifier is shown the images of every timestep in four ways, `VIEWS` of
`ebmkit.evaluation.diffusion_views`: noisy as the diffusion model has them (``timestep``) and in
image units (``image``), and without noise, ``dark`` and ``faded``. Nothing is clipped.
Noise-conditional models are told the deviation of the noise in what they see. The noise is that of
the suite ``classify`` at :math:`\sigma_t`.

Of every view are measured accuracy and the means of E(x) and of E(x, y) of the true label
(`ebmkit.evaluation.energies`, nats); of the clean images also by class.

``diffusion-path.json`` holds, beside the common entries (``sigmas`` are those of the timesteps):
``timesteps``, ``abar``, ``chance`` (one over the number of classes), ``views`` (in words),
``files`` (what the file of samples says, or null) and ``models``, by name (the first is the one
evaluated) ``reading`` (of its energies), ``clean``, ``path``, ``chance_from``, ``classes`` and
``samples``. ``clean`` and each entry of ``path[view]`` have ``accuracy``, ``energy`` and
``joint_energy``, the latter two with ``std`` over images; the entries of ``path`` also ``t``,
``sigma`` and ``abar``. ``chance_from[view]`` is the first timestep measured at which the interval
of the accuracy reaches down to chance, or null. ``classes`` are the clean images by class
(`class_statistics`), ``samples`` those of the file: ``energy``, and with labels ``joint_energy``
and ``classes``.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ebmkit.compile import optimize
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext, Suite, check_classifies
from ebmkit.evaluation.data import Batch, Images, noisy_batches
from ebmkit.evaluation.diffusion_views import VIEWS, DiffusionPathConfig, views_at
from ebmkit.evaluation.energies import (
    EnergySource,
    ImageEnergies,
    class_statistics,
    energies_of,
    energy_source,
    spread,
)
from ebmkit.evaluation.generated import Generated, read_samples
from ebmkit.evaluation.subset import check_one_size, columns_of
from ebmkit.evaluation.tables import new_table, number
from ebmkit.noise import Schedule

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DIFFUSION_PATH", "draw", "run", "table"]

SHORT = {"timestep": "x_t", "image": "image", "dark": "dark", "faded": "faded"}
SHOWN = 9
LISTED = (0.1, 0.2, 0.4, 1.0)
"""Shares of the last timestep at which the table tells accuracy."""


def check(model: ScoreModel, images: Images) -> None:
    """Whether labels can be predicted and compared, on images of one size.

    Raises:
        UserError: if they cannot.
    """
    check_classifies(model, images)
    check_one_size("diffusion-path", images)


def ready(setting: EvaluationContext) -> None:
    """Whether the settings fit together, and further runs and samples are there.

    Raises:
        UserError: if they do not, or are not.
    """
    setting.option(DiffusionPathConfig).timesteps()
    _models(setting)
    _samples(setting)


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    config, generated = setting.option(DiffusionPathConfig), _samples(setting)
    schedule, timesteps = config.make_schedule(), config.timesteps()
    models, images = _models(setting), setting.images
    assert images.labels is not None
    labels = images.labels.cpu()
    clean = setting.columns(0.0, partial(_measure, models, config.energies, None, -1))
    documents: dict[str, dict[str, Any]] = {
        name: {
            "reading": energy_source(model, config.energies),
            "clean": _row(clean, name, "clean"),
            "path": {view: [] for view in VIEWS},
            "classes": class_statistics(
                clean[name, "clean", "energy"],
                clean[name, "clean", "joint_energy"],
                labels,
                images.class_names,
            ),
        }
        for name, model in models.items()
    }
    for t in timesteps:
        sigma, abar = schedule.sigma(t), schedule.abar(t)
        measure = partial(_measure, models, config.energies, schedule, t)
        columns = setting.columns(sigma, measure)
        for name, document in documents.items():
            for view in VIEWS:
                row = {"t": t, "sigma": sigma, "abar": abar} | _row(columns, name, view)
                document["path"][view].append(row)
    chance = 1 / setting.model.num_classes
    sampled = _of_samples(setting, models, generated)
    for name, document in documents.items():
        document["chance_from"] = {
            view: next((r["t"] for r in rows if r["accuracy"]["low"] <= chance), None)
            for view, rows in document["path"].items()
        }
        document["samples"] = sampled.get(name)
    return {
        "sigmas": [schedule.sigma(t) for t in timesteps],
        "timesteps": list(timesteps),
        "abar": [schedule.abar(t) for t in timesteps],
        "chance": chance,
        "views": VIEWS,
        "models": documents,
        "files": generated
        and generated.description
        | {"count": len(generated.images), "left_out": generated.left_out},
        "warnings": _warnings(documents),
    }


Key = tuple[str, str, str]
"""Model, view and measure."""


def _measure(
    models: dict[str, EnergyModel],
    reading: EnergySource,
    schedule: Schedule | None,
    t: int,
    batch: Batch,
) -> dict[Key, Tensor]:
    """Columns (B,) of all models and views; of the clean images without a schedule."""
    assert batch.labels is not None
    shown = {"clean": (batch.x, 0.0)}
    if schedule is not None:
        shown = views_at(schedule, t, batch.x, batch.y)
    columns: dict[Key, Tensor] = {}
    for view, (images, sigma) in shown.items():
        for name, model in models.items():
            found = energies_of(model, images, sigma, reading)
            columns[name, view, "right"] = found.log_posterior.argmax(dim=1) == batch.labels
            columns[name, view, "energy"] = found.energy
            columns[name, view, "joint_energy"] = found.joint(batch.labels)
    return columns


def _row(columns: dict[Key, Tensor], name: str, view: str) -> dict[str, Any]:
    right = columns[name, view, "right"]
    return {
        "accuracy": statistics.proportion(int(right.sum()), len(right)).document(),
        "energy": spread(columns[name, view, "energy"]),
        "joint_energy": spread(columns[name, view, "joint_energy"]),
    }


def _of_samples(
    setting: EvaluationContext, models: dict[str, EnergyModel], generated: Generated | None
) -> dict[str, dict[str, Any]]:
    """Energies of samples, by model; none without a file."""
    if generated is None:
        return {}
    from ebmkit.data import ImageSet

    reading = setting.option(DiffusionPathConfig).energies

    def measure(batch: Batch) -> dict[tuple[str, str], Tensor]:
        found = {}
        for name, model in models.items():
            for measure, column in energies_of(model, batch.x, 0.0, reading)._asdict().items():
                found[name, measure] = column
        return found

    columns = columns_of(setting, ImageSet("samples", "test", generated.images), 0.0, measure)
    documents: dict[str, dict[str, Any]] = {}
    for name in models:
        read = ImageEnergies(*(columns[name, m] for m in ImageEnergies._fields))
        documents[name] = {"energy": spread(read.energy)}
        wanted = generated.labels
        if wanted is not None:
            own = read.joint(wanted)
            documents[name]["joint_energy"] = spread(own)
            documents[name]["classes"] = class_statistics(
                read.energy, own, wanted, setting.images.class_names
            )
    return documents


def _models(setting: EvaluationContext) -> dict[str, EnergyModel]:
    """The model evaluated and those beside it, by name.

    Raises:
        UserError: if one is not there, or does not suit the images.
    """
    from ebmkit.models import load

    assert isinstance(setting.model, EnergyModel)
    config = setting.option(DiffusionPathConfig)
    found: dict[str, EnergyModel] = {setting.option(DiffusionPathConfig).name: setting.model}
    for path in config.beside:
        model = load(path, device=str(setting.device))
        known = setting.model.num_classes
        if not classifies(model) or model.num_classes != known:
            raise UserError(
                f"diffusion-path.beside: the model in {str(path)!r} knows {model.num_classes} "
                f"classes and the one evaluated {known}: name runs with labels of the same classes"
            )
        channels = model.card.channels if model.card else setting.images.channels
        if channels != setting.images.channels:
            raise UserError(
                f"diffusion-path.beside: the model in {str(path)!r} takes images of {channels} "
                f"channel(s), and {setting.images.name!r} has {setting.images.channels}"
            )
        name = base = Path(os.path.abspath(path)).name
        number = 1
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found[name] = optimize(model, setting.inference.precision)
    for model in found.values():
        energy_source(model, config.energies)
    return found


def _samples(setting: EvaluationContext) -> Generated | None:
    path = setting.option(DiffusionPathConfig).samples
    if path is None:
        return None
    found = read_samples(path, setting.images, "diffusion-path.samples")
    known = setting.model.num_classes
    if found.labels is not None and not bool(((found.labels >= 0) & (found.labels < known)).all()):
        worst = int(found.labels.max()) if found.labels.max() >= known else int(found.labels.min())
        raise UserError(
            f"diffusion-path.samples: {str(path)!r} has label {worst}, and this model knows 0 to "
            f"{known - 1}"
        )
    return found


def _warnings(documents: dict[str, dict[str, Any]]) -> list[str]:
    found = []
    for name, document in documents.items():
        rows = [row for path in document["path"].values() for row in path]
        bad = [row["t"] for row in rows if row["energy"]["value"] is None]
        if bad:
            found.append(
                f"{name}: energies are not finite on some images from timestep {min(bad)} on, so "
                "their means are left out"
            )
    return found


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``diffusion-path.png``, ``diffusion-energies.png`` and ``class-energies.png``."""
    from ebmkit.plots import diffusion_path as pictures

    config = setting.option(DiffusionPathConfig)
    schedule, timesteps = config.make_schedule(), config.timesteps()
    chosen = [timesteps[i] for i in _spread_over(len(timesteps), SHOWN)]
    strips: dict[str, list[tuple[int, Tensor]]] = {view: [] for view in VIEWS}
    for t in chosen:
        (batch,) = noisy_batches(setting.images.first(1), schedule.sigma(t), setting.seed, 1)
        for view, (images, _) in views_at(schedule, t, batch.x, batch.y).items():
            strips[view].append((t, images[0]))
    pictures.accuracies(document, strips, folder / "diffusion-path.png")
    pictures.energies(document, folder / "diffusion-energies.png")
    pictures.by_class(document, folder / "class-energies.png")


def table(document: dict[str, Any]) -> Table:
    """Accuracy of every model and view at a few timesteps, where it reaches chance, energies."""
    timesteps = document["timesteps"]
    rows = sorted(
        {
            min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - share * timesteps[-1]))
            for share in LISTED
        }
    )
    heads = [f"t={timesteps[i]}" for i in rows]
    result = new_table(document, ("seen", "clean", *heads, "chance from"))
    widest = 0.0
    for name, found in document["models"].items():
        result.add_row(name, *[""] * (len(rows) + 2))
        for view, path in found["path"].items():
            values = [row["accuracy"] for row in (found["clean"], *(path[i] for i in rows))]
            widest = max(widest, *(e["high"] - e["low"] for e in values))
            at = found["chance_from"][view]
            shown = [f"{e['value']:.1%}" for e in values]
            result.add_row(f"  {SHORT[view]}", *shown, "-" if at is None else f"t={at}")
        path = [found["clean"], *(found["path"]["timestep"][i] for i in rows)]
        for measure, symbol in (("energy", "E(x)"), ("joint_energy", "E(x,y)")):
            shown = [number(row[measure]["value"], "{:.4g}") for row in path]
            result.add_row(f"  {symbol}", *shown, "")
            if found["samples"] and measure in found["samples"]:
                own = number(found["samples"][measure]["value"], "{:.4g}")
                result.add_row("  samples", own, *[""] * (len(rows) + 1))
        result.add_section()
    description = [f"{SHORT[view]}: {words}" for view, words in document["views"].items()]
    description.append("E: means, nats; along t of what is seen as x_t")
    description.append(f"95 % intervals of accuracies: at most {100 * widest:.1f} points wide")
    result.caption = "\n".join([*description, str(result.caption or "")]).strip()
    return result


def _spread_over(count: int, most: int) -> list[int]:
    """At most ``most`` of 0 .. count - 1, the first and the last among them, evenly."""
    few = min(count, most)
    return sorted({round(i * (count - 1) / max(1, few - 1)) for i in range(few)})


def _passes(setting: EvaluationContext) -> int:
    config = setting.option(DiffusionPathConfig)
    return 1 + len(config.timesteps()) + (config.samples is not None)


DIFFUSION_PATH = Suite(
    description="accuracy and energies along a diffusion model's forward process, on "
    "darkened images, by class",
    check=check,
    passes=_passes,
    run=run,
    draw=draw,
    table=table,
    options=DiffusionPathConfig,
    ready=ready,
)
