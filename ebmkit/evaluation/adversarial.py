r"""Suite ``adversarial``: adversarial gradients as differences of denoisers (CDN eq. 9).

.. math:: \nabla_y \log p(c \mid y) = \frac{D_c(y, c) - D_u(y)}{\sigma^2} .

What the conditional denoiser adds to the unconditional one when it is told a label is the direction
in which a classifier is attacked. As sigma goes to 0 the difference must shrink like sigma^2 for
the gradient to stay bounded, which nothing enforces: the instability that sections 2.2 and 5.1
speak of.

Measured at :math:`y = x + \sigma\epsilon` of the first images, in float32, for the *targets*, the
likeliest labels at y beside the predicted one:

- ``norm`` of the gradient, l2, nats per image unit; ``norm_predicted``, of the predicted label's;
  ``score_norm``, :math:`\|\nabla\log p(y)\|`, about :math:`\sqrt d/\sigma` for a good denoiser;
- ``identity_error``, the relative difference of the two sides of the equation, of which the left
  one is differentiated by itself. It is rounding: D is of the size of an image, and its rounding is
  divided by sigma^2 (``rounding`` is what float32 may do, :math:`2^{-24}\|y\|/\sigma^2` relative to
  the norm). With ``precision`` double it vanishes;
- ``steps``: after a step of each length along the gradient, by how much log p(c|y) rose
  (``gain``), how much the gradient promised (``promised``, length times norm), and on which share
  of (image, target) the target is now the prediction (``reached``).

A blind model is also asked at the clean image, where sigma does not enter: level 0 then.

``adversarial.json`` holds, beside the common entries (``images`` is the number measured):
``levels``, by noise level the above as estimates with 95 % intervals (means over images; over
targets first), with ``sigma``; ``targets``, how many; ``lengths`` of the steps.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor

from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.context import EvaluationContext, Suite, check_classifies
from ebmkit.evaluation.data import Batch, Images, noisy_batches
from ebmkit.evaluation.subset import class_name, first_columns, noise_warnings
from ebmkit.evaluation.tables import new_table, number
from ebmkit.metrics import predict
from ebmkit.noise import Sigma, in_255ths

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ADVERSARIAL", "AdversarialConfig", "check", "difference", "draw", "run", "table"]

ROWS = 4
"""Images in the picture."""

PANELS = 3
"""Noise levels in the picture."""


class AdversarialConfig(BaseModel):
    """Settings of the suite ``adversarial``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigmas: tuple[Sigma, ...] = Field(
        tuple(s / 255 for s in (1, 2, 5, 10, 20, 50, 100)),
        min_length=1,
        description="noise levels, image units",
    )
    labels: int = Field(
        2,
        ge=1,
        le=6,
        description="number of target labels: the most likely ones after the predicted label",
    )
    images: int = Field(64, ge=2, description="number of images, from the first; the plot shows 4")
    lengths: tuple[PositiveFloat, ...] = Field(
        (0.05, 0.25, 1.0),
        min_length=1,
        description="l2 lengths of the steps along the gradient, image units",
    )
    precision: Literal["single", "double"] = Field(
        "single", description="precision: single (float32) or double (float64)"
    )


def difference(model: EnergyModel, y: Tensor, c: Tensor, sigma: float) -> Tensor:
    """grad log p(c|y) by the two denoisers, (D_c - D_u) / sigma^2 (CDN eq. 9); shape of ``y``.

    Args:
        model: one with labels.
        y: noisy images (B, C, H, W).
        c: labels (B,).
        sigma: image units.
    """
    return (model.denoise(y, sigma, c) - model.denoise(y, sigma)) / sigma**2


def check(model: ScoreModel, images: Images) -> None:
    """Whether there are labels to turn to.

    Raises:
        UserError: if the model or the images have none, they differ, or there is a single one.
    """
    check_classifies(model, images)
    if model.num_classes < 2:
        raise UserError("a model of one class has no adversarial gradients: they are all 0")


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned."""
    config, model = setting.option(AdversarialConfig), _model(setting)
    used = min(config.images, len(setting.images))
    rows = min(setting.batch_size, math.ceil(used / setting.world.size))
    levels = []
    with in_float32(setting.device):
        for sigma in _levels(setting):
            measure = partial(_measure, model, sigma, config)
            columns = first_columns(setting, used, sigma, measure, rows)
            levels.append(_level(sigma, config, columns))
    return {
        "images": used,
        "precision": "fp64" if config.precision == "double" else "fp32",
        "compiled": False,
        "sigmas": list(config.sigmas),
        "targets": _targets(config, model),
        "lengths": list(config.lengths),
        "levels": levels,
        "warnings": noise_warnings(model, config.sigmas),
    }


def _model(setting: EvaluationContext) -> EnergyModel:
    model = setting.exact_model
    assert isinstance(model, EnergyModel)
    if setting.option(AdversarialConfig).precision == "double":
        return copy.deepcopy(model).double()
    return model


def _levels(setting: EvaluationContext) -> list[float]:
    """Those asked for, ascending; the clean image first, if the model needs no sigma."""
    levels = sorted(set(setting.option(AdversarialConfig).sigmas))
    return levels if setting.model.noise_conditional else [0.0, *levels]


def _targets(config: AdversarialConfig, model: ScoreModel) -> int:
    return min(config.labels, model.num_classes - 1)


def _measure(
    model: EnergyModel, sigma: float, config: AdversarialConfig, batch: Batch
) -> dict[str, Tensor]:
    y = batch.y.double() if config.precision == "double" else batch.y
    level = sigma or None
    order = model.energies(y, level).logits.argsort(dim=1, descending=True)
    columns = {
        "norm_predicted": _norm(model.label_score(y, order[:, 0], level)),
        "score_norm": _norm(model.score(y, sigma=level)),
    }
    by_target = []
    for rank in range(1, 1 + _targets(config, model)):
        by_target.append(_of_target(model, y, order[:, rank], sigma, config))
    for name in by_target[0]:
        columns[name] = torch.stack([found[name] for found in by_target]).mean(0)
    return columns


def _of_target(
    model: EnergyModel, y: Tensor, c: Tensor, sigma: float, config: AdversarialConfig
) -> dict[str, Tensor]:
    level = sigma or None
    gradient = model.label_score(y, c, level)
    norm = _norm(gradient)
    columns = {"norm": norm}
    safe = norm.clamp_min(torch.finfo(norm.dtype).tiny)
    if sigma:
        columns["identity_error"] = _norm(difference(model, y, c, sigma) - gradient) / safe
        columns["rounding"] = torch.finfo(y.dtype).eps / 2 * _norm(y) / sigma**2 / safe
    before = model.energies(y, level).at_label(c)
    for i, length in enumerate(config.lengths):
        step = y + length * gradient / safe.reshape(-1, 1, 1, 1)
        after = model.energies(step, level)
        columns[f"gain {i}"] = after.at_label(c) - before
        columns[f"promised {i}"] = length * norm
        columns[f"reached {i}"] = (predict(after.logits) == c).to(norm)
    return columns


def _norm(images: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(images.flatten(1), dim=1)
    return norm


def _level(sigma: float, config: AdversarialConfig, columns: dict[str, Tensor]) -> dict[str, Any]:
    means = {name: statistics.mean(column).document() for name, column in columns.items()}
    steps = [
        {"length": length, **{k: means.pop(f"{k} {i}") for k in ("gain", "promised", "reached")}}
        for i, length in enumerate(config.lengths)
    ]
    return {"sigma": sigma, "identity_error": None, "rounding": None, **means, "steps": steps}


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``adversarial.png``, gradients at some noise levels, and ``adversarial-norms.png``."""
    from ebmkit.plots import adversarial as pictures
    from ebmkit.plots.common import images_of

    config, model = setting.option(AdversarialConfig), _model(setting)
    sigmas = sorted(set(config.sigmas))
    middle = sorted({0, (len(sigmas) - 1) // 2, len(sigmas) - 1})[:PANELS]
    few = setting.images.first(min(ROWS, len(setting.images)))
    panels, targets, clean = [], None, None
    with in_float32(setting.device):
        for sigma in [sigmas[i] for i in middle]:
            ((clean, y, _),) = noisy_batches(few, sigma, setting.seed, ROWS, setting.device)
            y = y.double() if config.precision == "double" else y
            posterior = model.energies(y, sigma).log_posterior().exp()
            if targets is None:  # the same at all levels, so that gradients can be compared
                targets = posterior.argsort(dim=1, descending=True)[:, 1 : 1 + document["targets"]]
            confidence, predicted = posterior.max(dim=1)
            names = [class_name(setting.images, int(c)) for c in predicted]
            panels.append(
                pictures.AdversarialPanel(
                    sigma=sigma,
                    noisy=y,
                    predicted=[
                        f"{n} ({100 * p:.0f} %)" for n, p in zip(names, confidence, strict=True)
                    ],
                    gradients=torch.stack(
                        [difference(model, y, c, sigma) for c in targets.T], dim=1
                    ),
                    targets=[[class_name(setting.images, int(c)) for c in row] for row in targets],
                )
            )
    assert clean is not None
    labels = few.labels
    titles = [] if labels is None else [class_name(setting.images, int(c)) for c in labels]
    description = images_of(document, len(few))
    pictures.adversarial_grid(clean, titles, panels, folder / "adversarial.png", description)
    pictures.adversarial_norms(document, folder / "adversarial-norms.png")


def table(document: dict[str, Any]) -> Table:
    """By noise level: norms, the identity's error, and the longest step."""
    length = f"{document['lengths'][-1]:g}"
    result = new_table(
        document,
        ("sigma", "norm", "predicted", "score", "eq. 9 error", f"gain at {length}", "promised"),
    )
    for level in document["levels"]:
        step, error = level["steps"][-1], level["identity_error"]
        result.add_row(
            f"{in_255ths(level['sigma'])}/255" if level["sigma"] else "clean",
            number(level["norm"]["value"], "{:.3g}"),
            number(level["norm_predicted"]["value"], "{:.3g}"),
            number(level["score_norm"]["value"], "{:.3g}"),
            number(error and error["value"], "{:.1e}"),
            number(step["gain"]["value"], "{:+.2f}"),
            number(step["promised"]["value"], "{:+.2f}"),
        )
    return result


ADVERSARIAL = Suite(
    description="adversarial gradients as differences of denoisers (eq. 9), and their "
    "norm against noise",
    check=check,
    passes=lambda setting: len(_levels(setting)),
    run=run,
    draw=draw,
    table=table,
    options=AdversarialConfig,
)
