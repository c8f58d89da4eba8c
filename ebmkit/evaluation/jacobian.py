r"""Suite ``jacobian``: what the denoiser keeps of single noisy images, by its Jacobian's spectrum.

At :math:`y = x + \sigma\epsilon` of the first images, eigenvalues and eigenvectors of

.. math:: J(y) = \nabla D_u(y) = I + \sigma^2\,\nabla^2\log p(y)

(CDN eq. 14, figures 3 and 5), by `ebmkit.spectrum`. In float32, or in float64 if asked; never in
less, whatever precision the evaluation has. A plain denoiser's Jacobian is not symmetric; its
singular values stand in, and its asymmetry, which for a gradient is rounding alone, says how far it
is from one.

If log p were the true density, :math:`\sigma^2 J` would be the covariance of the clean image given
the noisy one. So negative eigenvalues are a fault of the model, and the PSNR that the model
*expects*, :math:`-10\log_{10}(\sigma^2 \operatorname{tr} J / d)`, can be set beside the one it has.

A blind model has an eigenvalue near 2 that says nothing of the image. It reads sigma off the size
of the noise n, so that its score is about :math:`-d\,n/\|n\|^2`, which along n itself grows by
:math:`d/\|n\|^2 \approx 1/\sigma^2`: hence :math:`Jn \approx 2n`. What it removes lies along that
eigenvector.

``jacobian.json`` holds, beside the common entries (``images`` is the number measured): ``sigma``;
``dimensions`` d; ``method`` (dense or iterative); ``singular``, whether values are singular values;
``classes``, whether conditional denoisers were drawn; ``per_image``, and the ``paper``'s values. Of
each image: ``label`` and ``predicted`` (names or null) with its ``confidence``; ``largest`` (the
algebraically largest) and ``smallest`` (in magnitude), lists of ``value``, ``residual``
:math:`\|Jv - \lambda v\|` and ``noise``, the share of :math:`\|D_u - y\|^2` that lies along v;
``converged``, whether residuals are within the tolerance; ``trace`` with ``trace_error`` (its
standard error, 0 if dense); ``asymmetry`` :math:`\|J - J^\top\|_F/\|J\|_F`; ``products`` with J;
``psnr`` of :math:`D_u` unclipped, and ``expected_psnr`` (null if the trace is not positive);
``difference``, the root mean square of
:math:`D_c - D_u`. If dense, also ``eigenvalues`` (all, descending), ``above_half``, how many are
above 1/2, and ``negative``, how many are below 0.
"""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.context import EvaluationContext, Suite
from ebmkit.evaluation.data import Batch, Images
from ebmkit.evaluation.statistics import finite
from ebmkit.evaluation.subset import class_name, first_columns, noise_warnings
from ebmkit.evaluation.tables import new_table, number
from ebmkit.jacobian import DENSE, jacobian
from ebmkit.metrics import psnr
from ebmkit.noise import Sigma, in_255ths
from ebmkit.spectrum import Eigenpairs, Method, spectrum

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["JACOBIAN", "JacobianConfig", "check", "draw", "run", "table"]

PAPER = {
    "largest": [2.71, 2.16, 2.03],
    "smallest": [2.8e-5, -1.9e-5],
    "about": "figure 3: one CIFAR-10 image, sigma 50/255, width 64",
}
ASYMMETRY = 1e-3
"""Relative asymmetry of a gradient's Jacobian above which rounding is no excuse."""


class JacobianConfig(BaseModel):
    """Settings of the suite ``jacobian``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigma: Sigma = Field(50 / 255, description="noise level, image units")
    images: int = Field(3, ge=1, le=20, description="number of images, from the first")
    largest: int = Field(
        3, ge=1, le=20, description="number of largest eigenvalues and their eigenvectors"
    )
    smallest: int = Field(
        2,
        ge=1,
        le=20,
        description="number of eigenvalues of smallest magnitude and their eigenvectors",
    )
    method: Method = Field(
        "auto",
        description="dense (all eigenvalues), iterative, or auto (dense up to 3072 values "
        "per image)",
    )
    tolerance: float = Field(
        0.01,
        gt=0,
        lt=1,
        description="maximum residual of an eigenpair without a warning, relative to the "
        "largest eigenvalue",
    )
    products: int = Field(
        4000,
        ge=100,
        description="iterative: approximate maximum number of products with J per image",
    )
    precision: Literal["single", "double"] = Field(
        "single", description="precision: single (float32) or double (float64)"
    )


@dataclass(frozen=True)
class Found:
    """What is drawn of the images, each (N, ...)."""

    columns: dict[str, Tensor]

    def pairs(self, kind: str, image: int) -> Eigenpairs:
        """Those of ``kind`` (largest or smallest) of one image."""
        return Eigenpairs(*(self.columns[f"{kind} {part}"][image] for part in Eigenpairs._fields))


_FOUND: dict[int, Found] = {}
"""By the id of a setting, for as long as it lives: what `run` found and `draw` draws."""


def check(model: ScoreModel, images: Images) -> None:
    """Whether the Jacobian of ``model`` at ``images`` can be decomposed.

    Raises:
        UserError: if it is not symmetric and too large to be written out.
    """
    size = images.channels * math.prod(images.image_size)
    if not isinstance(model, EnergyModel) and size > DENSE:
        raise UserError(
            f"a plain denoiser's Jacobian is not symmetric and must be written out, which images "
            f"of {size} values are too large for: take images of up to {DENSE} values"
        )


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned.

    Raises:
        UserError: if the Jacobian is not finite, or has fewer eigenvalues than are asked for.
    """
    config, model = setting.option(JacobianConfig), setting.exact_model
    double = config.precision == "double"
    if double:
        model = copy.deepcopy(model).double()
    with in_float32(setting.device):
        found = Found(
            first_columns(
                setting,
                config.images,
                config.sigma,
                lambda batch: _measure(model, batch, config, setting.seed),
                batch_size=1,
            )
        )
    _FOUND[id(setting)] = found
    weakref.finalize(setting, _FOUND.pop, id(setting), None)
    per_image = [_document(setting, found, i) for i in range(len(found.columns["x"]))]
    dense = "eigenvalues" in found.columns
    return {
        "images": len(per_image),
        "precision": "fp64" if double else "fp32",
        "compiled": False,
        "sigmas": [config.sigma],
        "sigma": config.sigma,
        "dimensions": found.columns["x"][0].numel(),
        "method": "dense" if dense else "iterative",
        "singular": not isinstance(model, EnergyModel),
        "classes": classifies(model),
        "per_image": per_image,
        "paper": PAPER,
        "warnings": noise_warnings(model, [config.sigma]) + _warnings(setting.model, per_image),
    }


def _measure(
    model: ScoreModel, batch: Batch, config: JacobianConfig, seed: int
) -> dict[str, Tensor]:
    """Of one image, each (1, ...)."""
    dtype = torch.float64 if config.precision == "double" else batch.y.dtype
    x, y = batch.x.to(dtype), batch.y.to(dtype)
    operator = jacobian(model, y[0], config.sigma)
    found = spectrum(
        operator,
        config.largest,
        config.smallest,
        config.method,
        config.tolerance,
        config.products,
        seed,
    )
    clean = model.denoise(y, config.sigma)
    columns = {"x": x, "y": y, "unconditional": clean, "psnr": psnr(clean, x)}
    for name, pairs in (("largest", found.largest), ("smallest", found.smallest)):
        columns |= {f"{name} {part}": value[None] for part, value in pairs._asdict().items()}
    if found.values is not None:
        columns["eigenvalues"] = found.values[None]
    for name in ("trace", "trace_error", "asymmetry", "products"):
        columns[name] = torch.tensor([getattr(found, name)], dtype=torch.float64)
    columns["converged"] = torch.tensor([found.converged(config.tolerance)])
    if classifies(model):
        confidence, predicted = model.energies(y, config.sigma).log_posterior().exp().max(dim=1)
        columns |= {"confidence": confidence, "predicted": predicted}
        columns["conditional"] = model.denoise(y, config.sigma, predicted)
    return columns


def _document(setting: EvaluationContext, found: Found, i: int) -> dict[str, Any]:
    columns, images = found.columns, setting.images
    sigma = setting.option(JacobianConfig).sigma
    trace, size = float(columns["trace"][i]), columns["x"][i].numel()
    document: dict[str, Any] = {
        "label": None,
        "predicted": None,
        "converged": bool(columns["converged"][i]),
        "trace": trace,
        "trace_error": float(columns["trace_error"][i]),
        "asymmetry": float(columns["asymmetry"][i]),
        "products": int(columns["products"][i]),
        "psnr": finite(float(columns["psnr"][i])),
        "expected_psnr": -10 * math.log10(sigma**2 * trace / size) if trace > 0 else None,
    }
    if images.labels is not None:
        document["label"] = class_name(images, int(images.labels[i]))
    if "predicted" in columns:
        difference = columns["conditional"][i] - columns["unconditional"][i]
        document["predicted"] = class_name(images, int(columns["predicted"][i]))
        document["confidence"] = float(columns["confidence"][i])
        document["difference"] = float(difference.square().mean().sqrt())
    removed = (columns["unconditional"][i] - columns["y"][i]).double().flatten()
    for kind in ("largest", "smallest"):
        pairs = found.pairs(kind, i)
        noise = (pairs.vectors.flatten(1) @ removed).square() / removed.square().sum()
        numbers = (x.tolist() for x in (pairs.values, pairs.residuals, noise))
        document[kind] = [
            {"value": value, "residual": residual, "noise": share}
            for value, residual, share in zip(*numbers, strict=True)
        ]
    if "eigenvalues" in columns:
        values = columns["eigenvalues"][i]
        document["above_half"] = int((values > 0.5).sum())
        document["negative"] = int((values < 0).sum())
        document["eigenvalues"] = [float(f"{value:.6g}") for value in values.tolist()]
    return document


def _warnings(model: ScoreModel, per_image: list[dict[str, Any]]) -> list[str]:
    found = []
    left = sum(not one["converged"] for one in per_image)
    if left:
        found.append(
            f"of {left} of {len(per_image)} images not all eigenpairs converged: see their "
            "residuals, within which some eigenvalue lies; give more products, or a larger "
            "tolerance"
        )
    worst = max(one["asymmetry"] for one in per_image)
    if isinstance(model, EnergyModel) and worst > ASYMMETRY:
        found.append(
            f"the Jacobian is asymmetric by {worst:.1e} of its norm, which is more than rounding: "
            "the density is not twice differentiable, or its derivative is wrong"
        )
    return found


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``jacobian.png`` and, if dense, ``spectrum.png``."""
    from ebmkit.plots import jacobian as pictures

    found = _FOUND[id(setting)]
    columns = found.columns
    rows = [
        pictures.JacobianRow(
            x=columns["x"][i],
            y=columns["y"][i],
            unconditional=columns["unconditional"][i],
            conditional=columns["conditional"][i] if "conditional" in columns else None,
            vectors=torch.cat([found.pairs(k, i).vectors for k in ("largest", "smallest")]),
        )
        for i in range(len(columns["x"]))
    ]
    pictures.jacobian_grid(rows, document, folder / "jacobian.png")
    if "eigenvalues" in columns:
        pictures.spectra(document, folder / "spectrum.png")


def table(document: dict[str, Any]) -> Table:
    """Of each image: trace, eigenvalues, asymmetry, PSNR.

    Below, the paper's eigenvalues, where data, noise level and quantity are the paper's; its
    network and image are its own, as the caption says.
    """
    from rich.text import Text

    result = new_table(
        document, ("image", "trace", "> 1/2", "largest", "smallest", "asym.", "PSNR", "exp.")
    )
    for i, one in enumerate(document["per_image"]):
        result.add_row(
            str(i),
            f"{one['trace']:.1f}",
            number(one.get("above_half"), "{:d}"),
            " ".join(f"{pair['value']:.2f}" for pair in one["largest"][:3]),
            " ".join(f"{pair['value']:.1e}" for pair in one["smallest"][:2]),
            f"{one['asymmetry']:.0e}",
            number(one["psnr"], "{:.1f}"),
            number(one["expected_psnr"], "{:.1f}"),
        )
    same = document["dataset"] == "cifar10" and in_255ths(document["sigma"]) == "50"
    if not same or document["singular"]:
        return result
    paper = document["paper"]
    result.add_section()
    result.add_row(
        "paper",
        "",
        "",
        " ".join(f"{value:.2f}" for value in paper["largest"]),
        " ".join(f"{value:.1e}" for value in paper["smallest"]),
    )
    told = f"paper: its network, {paper['description']}"
    result.caption = Text.assemble(told, *(("\n", result.caption) if result.caption else ()))
    return result


JACOBIAN = Suite(
    description="eigenvalues and eigenvectors of the denoiser's Jacobian at a few images",
    check=check,
    passes=lambda setting: 1,
    run=run,
    draw=draw,
    table=table,
    options=JacobianConfig,
)
