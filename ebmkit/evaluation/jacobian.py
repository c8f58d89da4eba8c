r"""Suite ``jacobian``: the spectrum of the denoiser's Jacobian at single noisy images.

For a denoiser that is a gradient, :math:`D(y) = y + \sigma^2 \nabla\log p(y)`, the Jacobian (CDN
eq. 14, figures 3 and 5)

.. math:: J(y) = \nabla D(y) = I + \sigma^2\, \nabla^2 \log p(y)

is symmetric. If log p is the true density of noisy images, :math:`\sigma^2 J` is the covariance of
the clean image given the noisy one: then no eigenvalue is negative, so that negative ones are a
fault of the model, and the PSNR that the model *expects*,
:math:`-10\log_{10}(\sigma^2 \operatorname{tr} J / d)`, can be set beside the one it has. A
direction whose eigenvalue is near 0 is discarded as noise, near 1 it is kept, above 1 it is
amplified; so the trace counts the dimensions that are kept.

A blind model has an eigenvalue near 2 that says nothing of the image. It reads sigma off the size
of the noise n, so that its score is about :math:`-d\,n/\|n\|^2`, which along n itself grows by
:math:`d/\|n\|^2 \approx 1/\sigma^2`: hence :math:`Jn \approx 2n`. What it removes lies along that
eigenvector.

J has as many columns as the image has values d. It is only ever multiplied:
:math:`J^\top v = \nabla_y \langle D(y), v\rangle`, a second derivative in reverse, for a gradient
the Hessian-vector product :math:`v + \sigma^2 \nabla^2\log p(y)\,v`. Many directions are multiplied
at once at as many copies of y, whose graph is kept for the next ones. Up to `DENSE` values J is
written out, its symmetric part decomposed in float64, and its asymmetry, which for a gradient is
rounding alone, measured. Beyond, eigenpairs are found by Lanczos iterations
(`scipy.sparse.linalg.eigsh`). The largest are quickly found. The smallest in magnitude lie *inside*
the spectrum, which Lanczos does not reach: they are the largest of :math:`c I - J^2` ("folded"
spectrum, no inverse needed), rotated within their span to eigenvectors of J. Every pair comes with
its residual :math:`r = \|Jv - \lambda v\|`: some eigenvalue of J lies within r of :math:`\lambda`.
Where very many eigenvalues lie near 0, single ones cannot be separated in fewer products than J
has columns: the vector found is then a mixture of them, r says how wide a range it mixes, and
:math:`|\lambda|` need not be the smallest.

A plain denoiser is the gradient of no density. Its J is not symmetric, and singular values and
right singular vectors stand in for eigenvalues and eigenvectors; it must be small enough to be
written out. All is in float32, or in float64 if asked; never in less, whatever precision the
evaluation has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation.suite import (
    Batch,
    EvaluationContext,
    Images,
    Precision,
    Suite,
    SuiteConfig,
    add_note,
    class_name,
    new_table,
    noise_warnings,
    number,
)
from ebmkit.metrics import psnr
from ebmkit.noise import Sigma, in_255ths

DENSE = 3072
"""Values of an image (32 x 32 x 3) up to which the Jacobian is written out."""

CHUNK_VALUES = 64 * 3072
"""Values of the directions multiplied at once on a CPU; a GPU takes eight times as many."""

PROBES = 16
"""Random directions by which trace and asymmetry are estimated where J is not written out."""

LANCZOS = 40
"""Lanczos vectors between restarts."""

PAPER = {
    "largest": [2.71, 2.16, 2.03],
    "smallest": [2.8e-5, -1.9e-5],
    "about": "figure 3: one CIFAR-10 image, sigma 50/255, width 64",
}
PAPER_FACTOR = 500
ASYMMETRY = 1e-3
"""Relative asymmetry of a gradient's Jacobian above which rounding is no excuse."""

KINDS = ("largest", "smallest")
NUMBERS = ("trace", "trace_error", "asymmetry")

Method = Literal["auto", "dense", "iterative"]
Vectors = NDArray[np.float64]
UpTo20 = Annotated[int, Field(ge=1, le=20)]


# --- the operator and its spectrum ----------------------------------------------------------------


@dataclass
class Jacobian:
    """The Jacobian of ``denoise`` at ``y`` as an operator.

    Args:
        denoise: images (B, C, H, W) to images of the same shape, each on its own.
        y: one image (C, H, W).
        symmetric: whether it must be so, because ``denoise`` is a gradient.
        chunk: directions multiplied at once; 0: by their size, see `CHUNK_VALUES`.
        products: how many products were taken so far.
    """

    denoise: Callable[[Tensor], Tensor]
    y: Tensor
    symmetric: bool = True
    chunk: int = 0
    products: int = 0
    _graph: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        values = CHUNK_VALUES * (8 if self.y.is_cuda else 1)
        self.chunk = self.chunk or max(1, min(512, values // max(1, self.size)))

    @property
    def size(self) -> int:
        """The number of rows, d = C H W."""
        return self.y.numel()

    def vjp(self, directions: Tensor) -> Tensor:
        """J^T v, which is J v if symmetric, of each of ``directions`` (n, d) or (n, C, H, W);
        their shape and type.

        Raises:
            UserError: if a product is NaN or Inf.
        """
        self.products += len(directions)
        products = []
        for v in torch.split(directions.reshape(-1, *self.y.shape), self.chunk):
            at, clean = self._copies(len(v))
            (product,) = torch.autograd.grad(clean, at, v.to(clean), retain_graph=True)
            products.append(product.to(directions))
        found = torch.cat(products)
        if not found.isfinite().all():
            raise UserError(
                "the Jacobian of this model's denoiser is not finite: its training diverged, or "
                "its weights are damaged"
            )
        return found.reshape(directions.shape)

    def dense(self) -> Tensor:
        """J, (d, d) float64 on the CPU; d products.

        Raises:
            UserError: if d is above `DENSE`, or J has NaN or Inf.
        """
        if self.size > DENSE:
            raise UserError(
                f"the Jacobian of an image of {self.size} values cannot be written out beyond "
                f"{DENSE}: take method iterative, or smaller images"
            )
        directions = torch.eye(self.size, dtype=self.y.dtype, device=self.y.device)
        matrix = self.vjp(directions).cpu().double()
        self._graph = None
        return matrix

    def _copies(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` copies of y and, with a graph that leads to them, of D(y)."""
        if self._graph is None or len(self._graph[0]) != count:
            self._graph = None
            with torch.inference_mode(False), torch.enable_grad():
                y = self.y.detach().expand(count, *self.y.shape)
                at = y.clone(memory_format=torch.contiguous_format).requires_grad_()
                self._graph = at, self.denoise(at)
        return self._graph


def jacobian(model: ScoreModel, y: Tensor, sigma: float, chunk: int = 0) -> Jacobian:
    """The Jacobian at ``y`` (C, H, W) of ``model``'s unconditional denoiser, given ``sigma``.

    Args:
        model: in evaluation mode. It is symmetric if it is an `EnergyModel`.
        y: a noisy image.
        sigma: the noise level, image units.
        chunk: directions multiplied at once; 0: by their size.
    """
    symmetric = isinstance(model, EnergyModel)
    return Jacobian(lambda images: model.denoise(images, sigma), y, symmetric, chunk)


class Eigenpairs(NamedTuple):
    """Some eigenvalues (k,), their unit vectors (k, C, H, W) and residuals ||J v - value v|| (k,).

    All float64, on the CPU. The largest entry in magnitude of each vector is positive.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class Spectrum:
    """What is known of the spectrum of a Jacobian.

    Of the denoiser that is the gradient of no density, values are singular values, and vectors
    right singular vectors.

    Attributes:
        values: all of them, descending, if J was written out; else None.
        largest: the algebraically largest, descending.
        smallest: the smallest in magnitude, ascending.
        trace: of J: exact if written out, else estimated from random directions.
        trace_error: its standard error; 0 if written out.
        asymmetry: ||J - J^T|| / ||J|| in Frobenius' norm, measured or estimated in the same way.
        products: how many products with J were taken.
    """

    values: Tensor | None
    largest: Eigenpairs
    smallest: Eigenpairs
    trace: float
    trace_error: float
    asymmetry: float
    products: int

    def converged(self, tolerance: float) -> bool:
        """Whether each residual is at most ``tolerance`` times the largest value known."""
        residuals = torch.cat([self.largest.residuals, self.smallest.residuals])
        values = torch.cat([self.largest.values, self.smallest.values]).abs()
        return bool(residuals.max() <= tolerance * values.max())


def spectrum(
    operator: Jacobian,
    largest: int = 3,
    smallest: int = 2,
    method: Method = "auto",
    tolerance: float = 0.01,
    products: int = 4000,
    seed: int = 0,
) -> Spectrum:
    """Eigenvalues and eigenvectors of a Jacobian; singular ones if it is not symmetric.

    Args:
        operator: the Jacobian.
        largest: how many of the largest.
        smallest: how many of the smallest in magnitude.
        method: dense: all of them; iterative: only those; auto: dense up to `DENSE` values.
        tolerance: iterate until residuals are below this share of the largest value.
        products: iterate no further than about so many products.
        seed: of the random directions and starts of the iterations.

    Raises:
        UserError: if more are asked for than there are, the image is too large for ``dense``, or a
            Jacobian that is not symmetric is too large to be written out.
    """
    if largest < 1 or smallest < 1 or max(largest, smallest) >= operator.size:
        raise UserError(
            f"of the {operator.size} eigenvalues of an image's Jacobian, {largest} largest and "
            f"{smallest} smallest cannot be taken: ask for 1 to {operator.size - 1} of each"
        )
    if method == "auto":
        method = "dense" if operator.size <= DENSE or not operator.symmetric else "iterative"
    if method == "dense":
        return _dense_spectrum(operator, largest, smallest)
    if not operator.symmetric:
        raise UserError(
            "a plain denoiser's Jacobian is not symmetric and has no eigenvectors to iterate for: "
            "take method dense"
        )
    return _iterative_spectrum(operator, largest, smallest, tolerance, products, seed)


def _pairs(operator: Jacobian, values: Tensor, vectors: Tensor, rest: Tensor) -> Eigenpairs:
    """Of ``vectors`` (k, d) with ``rest`` J v - value v (k, d)."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    signed = vectors * torch.where(largest < 0, -1.0, 1.0)
    return Eigenpairs(values, signed.reshape(-1, *operator.y.shape), rest.norm(dim=1))


def _dense_spectrum(operator: Jacobian, largest: int, smallest: int) -> Spectrum:
    matrix = operator.dense()
    if operator.symmetric:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1).T
        images = values[:, None] * vectors
    else:
        left, values, vectors = torch.linalg.svd(matrix)
        images = (left * values).T
    top, bottom = (
        _pairs(operator, values[k], vectors[k], vectors[k] @ matrix.T - images[k])
        for k in (torch.arange(largest), values.abs().argsort()[:smallest])
    )
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm().clamp_min(1e-300))
    return Spectrum(values, top, bottom, float(matrix.trace()), 0.0, asymmetry, operator.products)


def _iterative_spectrum(
    operator: Jacobian, largest: int, smallest: int, tolerance: float, products: int, seed: int
) -> Spectrum:
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    rng, size = np.random.default_rng(seed), operator.size
    last = operator.products + products

    def times(v: Vectors) -> Vectors:
        direction = torch.from_numpy(np.asarray(v, np.float64).reshape(1, -1))
        product: Vectors = operator.vjp(direction)[0].numpy()
        return product

    def folded(v: Vectors) -> Vectors:
        return 1.1 * scale**2 * v - times(times(v))

    def lanczos(
        product: Callable[[Vectors], Vectors],
        count: int,
        which: Literal["LA", "LM"],
        tolerance: float,
        start: Vectors | None = None,
    ) -> tuple[Vectors, Eigenpairs]:
        """Orthonormal vectors (d, count), eigenvectors of ``product`` or the best that about
        ``last`` products gave, and the eigenpairs of J within their span (Rayleigh and Ritz)."""
        krylov = min(size, max(LANCZOS, 2 * count + 1))
        matrix = LinearOperator((size, size), matvec=product, dtype=np.float64)
        begin = rng.standard_normal(size) if start is None else start.sum(1)
        restarts = max(1, (last - operator.products) // krylov)
        try:
            vectors: Vectors = eigsh(
                matrix, count, which=which, ncv=krylov, tol=tolerance, v0=begin, maxiter=restarts
            )[1]
        except ArpackNoConvergence as error:
            vectors = np.asarray(error.eigenvectors, np.float64)
            before = rng.standard_normal((size, count)) if start is None else start
            vectors = np.concatenate([vectors, before], axis=1)[:, :count]
        basis: Vectors = np.linalg.qr(vectors)[0]
        span = torch.from_numpy(np.ascontiguousarray(basis.T))
        images = operator.vjp(span)
        small = images @ span.T
        values, turn = torch.linalg.eigh((small + small.T) / 2)
        own, images = turn.T @ span, turn.T @ images
        return basis, _pairs(operator, values, own, images - values[:, None] * own)

    estimates = _probe(operator, rng)
    # the scale of the spectrum, for the fold and for the tolerance
    scale = max(float(lanczos(times, 1, "LM", 0.01)[1].values.abs().max()), 1e-12)
    found: list[Eigenpairs] = []
    for product, count in ((times, largest), (folded, smallest)):
        goal, start = tolerance, None
        while True:  # each time from what was found, so that there is always something
            start, pairs = lanczos(product, count, "LA", goal, start)
            converged = float(pairs.residuals.max()) <= tolerance * scale
            if converged or operator.products >= last or goal < 1e-14:
                break
            goal /= 10
        order = pairs.values.abs().argsort() if found else pairs.values.argsort(descending=True)
        found.append(Eigenpairs(*(x[order] for x in pairs)))
    return Spectrum(None, found[0], found[1], *estimates, operator.products)


def _probe(operator: Jacobian, rng: np.random.Generator) -> tuple[float, float, float]:
    """Trace, its standard error, and relative asymmetry, from random directions.

    For white v, u: E[v^T J v] = tr J, E||J v||^2 = ||J||^2 and E[(u^T (J - J^T) v)^2] =
    ||J - J^T||^2.
    """
    v = torch.from_numpy(rng.standard_normal((PROBES, operator.size)))
    products = operator.vjp(v)
    forms = v @ products.T
    diagonal, norm = forms.diagonal(), products.square().sum(1).mean().sqrt()
    skew = (forms - forms.T)[tuple(torch.triu_indices(PROBES, PROBES, 1))].square().mean().sqrt()
    error = float(diagonal.std() / PROBES**0.5)
    return float(diagonal.mean()), error, float(skew / norm.clamp_min(1e-300))


# --- the suite ------------------------------------------------------------------------------------


class JacobianConfig(SuiteConfig):
    """Settings of the suite ``jacobian``."""

    sigma: Sigma = 50 / 255
    """noise level, image units"""
    images: UpTo20 = 3
    """number of images, from the first"""
    largest: UpTo20 = 3
    """number of largest eigenvalues and their eigenvectors"""
    smallest: UpTo20 = 2
    """number of eigenvalues of smallest magnitude and their eigenvectors"""
    method: Method = "auto"
    """dense (all eigenvalues), iterative, or auto (dense up to 3072 values per image)"""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """maximum residual of an eigenpair without a warning, relative to the largest eigenvalue"""
    products: Annotated[int, Field(ge=100)] = 4000
    """iterative: approximate maximum number of products with J per image"""
    precision: Precision = "single"
    """precision: single (float32) or double (float64)"""


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` where the Jacobian is not symmetric and too large to be written out."""
    size = images.channels * math.prod(images.image_size)
    if not isinstance(model, EnergyModel) and size > DENSE:
        raise UserError(
            f"a plain denoiser's Jacobian is not symmetric and must be written out, which images "
            f"of {size} values are too large for: take images of up to {DENSE} values"
        )


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Decompose the Jacobians; return the document.

    Raises:
        UserError: if the Jacobian has NaN or Inf, or has fewer eigenvalues than are asked for.
    """
    config = context.option(JacobianConfig)
    model = context.model_in(config.precision)

    def of_image(batch: Batch) -> dict[str, Tensor]:
        return _measure(model, batch, config, context.seed)

    columns = context.columns(config.sigma, of_image, context.first(config.images), batch_size=1)
    context.measured = columns
    per_image = [
        _document({name: column[i] for name, column in columns.items()}, i, context.images, config)
        for i in range(len(columns["x"]))
    ]
    return {
        "images": len(per_image),
        "sigmas": [config.sigma],
        "sigma": config.sigma,
        "dimensions": columns["x"][0].numel(),
        "method": "dense" if "eigenvalues" in columns else "iterative",
        "singular": not isinstance(model, EnergyModel),
        "classes": classifies(model),
        "per_image": per_image,
        "paper": PAPER,
        "warnings": noise_warnings(model, [config.sigma]) + _warnings(model, per_image),
    }


def _measure(
    model: ScoreModel, batch: Batch, config: JacobianConfig, seed: int
) -> dict[str, Tensor]:
    """Of one image, each (1, ...)."""
    dtype = torch.float64 if config.precision == "double" else batch.y.dtype
    x, y = batch.x.to(dtype), batch.y.to(dtype)
    options = config.model_dump(include={*KINDS, "method", "tolerance", "products"})
    found = spectrum(jacobian(model, y[0], config.sigma), seed=seed, **options)
    clean = model.denoise(y, config.sigma)
    columns = {"x": x, "y": y, "unconditional": clean, "psnr": psnr(clean, x)}
    for kind in KINDS:
        pairs = getattr(found, kind)._asdict()
        columns |= {f"{kind} {name}": value[None] for name, value in pairs.items()}
    if found.values is not None:
        columns["eigenvalues"] = found.values[None]
    numbers: dict[str, float] = {"converged": found.converged(config.tolerance)}
    numbers |= {name: getattr(found, name) for name in (*NUMBERS, "products")}
    columns |= {n: torch.tensor([value], dtype=torch.float64) for n, value in numbers.items()}
    if classifies(model):
        confidence, predicted = model.energies(y, config.sigma).log_posterior().exp().max(dim=1)
        columns |= {"confidence": confidence, "predicted": predicted}
        columns["conditional"] = model.denoise(y, config.sigma, predicted)
    return columns


def _document(
    own: dict[str, Tensor], number: int, images: Images, config: JacobianConfig
) -> dict[str, Any]:
    """What the JSON file holds of the image with this ``number``, of its entries of columns."""
    expected = config.sigma**2 * float(own["trace"]) / own["x"].numel()
    document: dict[str, Any] = {
        "label": None if images.labels is None else class_name(images, int(images.labels[number])),
        "predicted": None,
        "converged": bool(own["converged"]),
        **{name: float(own[name]) for name in NUMBERS},
        "products": int(own["products"]),
        "psnr": float(own["psnr"]),
        "expected_psnr": -10 * math.log10(expected) if expected > 0 else None,
    }
    if "predicted" in own:
        difference = own["conditional"] - own["unconditional"]
        document["predicted"] = class_name(images, int(own["predicted"]))
        document["confidence"] = float(own["confidence"])
        document["difference"] = float(difference.square().mean().sqrt())
    removed = (own["unconditional"] - own["y"]).double().flatten()
    for kind in KINDS:
        along = (own[f"{kind} vectors"].flatten(1) @ removed).square() / removed.square().sum()
        rows = torch.stack([own[f"{kind} values"], own[f"{kind} residuals"], along], dim=1)
        keys = ("value", "residual", "noise")
        document[kind] = [dict(zip(keys, row, strict=True)) for row in rows.tolist()]
    if (values := own.get("eigenvalues")) is not None:
        document["above_half"] = int((values > 0.5).sum())
        document["negative"] = int((values < 0).sum())
        document["eigenvalues"] = [float(f"{value:.6g}") for value in values.tolist()]
    return document


def _warnings(model: ScoreModel, per_image: list[dict[str, Any]]) -> list[str]:
    found = []
    if left := sum(not one["converged"] for one in per_image):
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


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``jacobian.png``, the paper's figure 3 (denoised images, their difference, eigenvectors
    of the Jacobian), and, if dense, ``spectrum.png``."""
    columns = context.measured
    if "eigenvalues" in columns:
        _plot_spectra(document, folder / "spectrum.png")
    heads = ["image", f"noisy, {plots.sigma_label(document['sigma'])}", "$D_u$"]
    if document["classes"]:
        heads += ["$D_c$, predicted label", "$D_c - D_u$"]
    first, largest = len(heads), len(document["per_image"][0]["largest"])
    rows = []
    for i, one in enumerate(document["per_image"]):
        own = {name: column[i] for name, column in columns.items()}
        row = [(own["x"], one["label"] or ""), (own["y"], "")]
        row.append((own["unconditional"], f"{one['psnr']:.1f} dB" if one["psnr"] else ""))
        if document["classes"]:
            change = own["conditional"] - own["unconditional"]
            factor = magnification(change)
            note = f"x{factor:g}" + (" (x500 saturates)" if factor < PAPER_FACTOR else "")
            row.append(
                (own["conditional"], f"{one['predicted']} ({100 * one['confidence']:.0f} %)")
            )
            row.append((plots.around_gray(change, factor), note))
        for kind, form in zip(KINDS, ("{:.2f}", "{:.1e}"), strict=True):
            for vector, pair in zip(own[f"{kind} vectors"], one[kind], strict=True):
                value = form.format(pair["value"])
                if pair["residual"] > 0.1 * abs(pair["value"]):
                    value += f" ± {pair['residual']:.0e}"
                row.append((plots.around_gray(vector), value + " (noise)" * (pair["noise"] > 0.5)))
        rows.append(row)
    what = "right singular vectors" if document["singular"] else "eigenvectors"
    plots.image_rows(
        rows,
        heads + [""] * (len(rows[0]) - first),
        folder / "jacobian.png",
        {2: "", first: "largest", first + largest: "smallest in magnitude"},
        f"{plots.images_of(document)}: denoising, and {what} of the Jacobian (value, ± residual)",
        "Differences and vectors are shown around gray, each vector scaled to the full range. "
        '"noise": most of what $D_u$ removes lies along it.',
    )


def magnification(difference: Tensor, factor: float = PAPER_FACTOR) -> float:
    """``factor``, or the largest of 1, 2, 5, 10, ... below it that does not saturate.

    An image saturates where more than 1 % of the values of ``factor * difference`` leave
    [-1/2, 1/2].
    """
    most = float(difference.abs().flatten().double().quantile(0.99))
    if most * factor <= 0.5:
        return factor
    exponent = math.floor(math.log10(0.5 / most))
    steps = [m * 10.0**exponent for m in (1, 2, 5)]
    return max(step for step in steps if step * most <= 0.5 * (1 + 1e-9))


def _plot_spectra(document: dict[str, Any], path: Path) -> None:
    """All eigenvalues of each image: sorted, and their magnitudes on a logarithmic axis."""
    figure = plots.new_figure(9.6, 4.1, layout="constrained")
    left, right = figure.subplots(1, 2)
    kind = "singular value" if document["singular"] else "eigenvalue"
    for i, one in enumerate(document["per_image"]):
        values = np.asarray(one["eigenvalues"])
        rank = np.arange(1, len(values) + 1)
        name = one["label"] or f"image {i}"
        note = f"{name}: trace {one['trace']:.1f}, {one['above_half']} above 1/2"
        look = plots.look(i) | {"marker": "", "lw": 1.4}
        left.plot(rank, values, label=note, **look)
        right.plot(rank, np.sort(np.abs(values))[::-1], **look)
    for axes, level in ((left, 0), (left, 1), (right, 1)):
        axes.axhline(level, color=plots.GRAY, lw=0.8, ls=":")
    size = document["dimensions"]
    plots.annotate(left, "Sorted: 1 keeps, 0 discards", f"rank, of {size}", kind)
    x = f"rank by magnitude, of {size}"
    plots.annotate(right, "Magnitudes", x, "magnitude", yscale="log")
    left.legend(fontsize=7.5, frameon=False)
    title = f"Spectrum of the denoiser's Jacobian at {plots.sigma_label(document['sigma'])}"
    plots.save_figure(figure, path, f"{title}: {plots.images_of(document)}")


def table(document: dict[str, Any]) -> Table:
    """Of each image: trace, eigenvalues, asymmetry, PSNR.

    Below, the paper's eigenvalues, where data, noise level and quantity are the paper's; its
    network and image are its own, as the caption says.
    """
    heads = ("image", "trace", "> 1/2", "largest", "smallest", "asym.", "PSNR", "exp.")
    result = new_table(document, heads)

    def values(largest: list[float], smallest: list[float]) -> tuple[str, str]:
        shown = [f"{value:.2f}" for value in largest[:3]], [f"{v:.1e}" for v in smallest[:2]]
        return " ".join(shown[0]), " ".join(shown[1])

    for i, one in enumerate(document["per_image"]):
        result.add_row(
            str(i),
            f"{one['trace']:.1f}",
            number(one.get("above_half"), "{:d}"),
            *values(*([pair["value"] for pair in one[kind]] for kind in KINDS)),
            f"{one['asymmetry']:.0e}",
            number(one["psnr"], "{:.1f}"),
            number(one["expected_psnr"], "{:.1f}"),
        )
    same = document["dataset"] == "cifar10" and in_255ths(document["sigma"]) == "50"
    if same and not document["singular"]:
        paper = document["paper"]
        result.add_section()
        result.add_row("paper", "", "", *values(paper["largest"], paper["smallest"]))
        add_note(result, f"paper: its network, {paper['about']}")
    return result


JACOBIAN = Suite(
    description="eigenvalues and eigenvectors of the denoiser's Jacobian at a few images",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    options=JacobianConfig,
    exact=True,
)
