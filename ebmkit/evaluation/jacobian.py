r"""Suite ``jacobian``: spectrum of the denoiser's Jacobian at single noisy images.

The Jacobian of a denoiser that is a gradient, :math:`D(y) = y + \sigma^2 \nabla\log p(y)` (CDN eq.
14, figures 3 and 5),

.. math:: J(y) = \nabla D(y) = I + \sigma^2\, \nabla^2 \log p(y)

is symmetric. If log p is the true density of noisy images, :math:`\sigma^2 J` is the covariance of
the clean image given the noisy one. Then no eigenvalue is negative, so negative eigenvalues are
errors of the model, and the *expected* PSNR is
:math:`-10\log_{10}(\sigma^2 \operatorname{tr} J / d)`. The denoiser removes a direction with an
eigenvalue near 0 as noise, keeps one near 1 and amplifies one above 1, so the trace counts the
dimensions that it keeps.

A blind model has one eigenvalue near 2 that does not depend on the image. It estimates sigma from
the norm of the noise n, so its score is about :math:`-d\,n/\|n\|^2`. Along n this grows by
:math:`d/\|n\|^2 \approx 1/\sigma^2`, hence :math:`Jn \approx 2n`. Most of what the denoiser removes
lies along that eigenvector.

The d x d matrix J is only accessed by products :math:`J^\top v = \nabla_y \langle D(y), v\rangle`,
for a gradient the Hessian-vector products :math:`v + \sigma^2 \nabla^2\log p(y)\,v`. Each batch of
directions uses as many copies of y; their graph is reused. For images of up to `DENSE` values the
full J is computed, its symmetric part is decomposed in float64, and its asymmetry, which for a
gradient is only rounding error, is measured. For larger images Lanczos iterations
(`scipy.sparse.linalg.eigsh`) find eigenpairs. The largest converge quickly. Those smallest in
magnitude are in the *interior* of the spectrum, which Lanczos does not reach; they are the largest
of :math:`c I - J^2` (folded spectrum, no inverse needed), rotated within their span to eigenvectors
of J. Each pair has a residual :math:`r = \|Jv - \lambda v\|`: some eigenvalue of J is within r of
:math:`\lambda`. If very many eigenvalues are near 0, fewer products than J has columns cannot
separate them. The vector is then a mixture of eigenvectors, r measures the range of their
eigenvalues, and :math:`|\lambda|` need not be the smallest.

A plain denoiser is not the gradient of a density, and its J is not symmetric. Singular values and
right singular vectors replace eigenvalues and eigenvectors, and the image must be small enough for
the full J. Everything is in float32, or float64 if requested, whatever the evaluation's precision.
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
from ebmkit.energy import DensityModel, ScoreModel, classifies, vjp
from ebmkit.errors import UserError
from ebmkit.evaluation.suite import (
    EvaluationBatch,
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
"""Maximum number of values of an image (32 x 32 x 3) for the full Jacobian."""

CHUNK_VALUES = 64 * 3072
"""Number of values in a batch of directions on a CPU; eight times as many on a GPU."""

PROBES = 16
"""Number of random directions that estimate trace and asymmetry without the full J."""

LANCZOS = 40
"""Number of Lanczos vectors between restarts."""

PAPER = {
    "largest": [2.71, 2.16, 2.03],
    "smallest": [2.8e-5, -1.9e-5],
    "about": "figure 3: one CIFAR-10 image, sigma 50/255, width 64",
}
PAPER_FACTOR = 500
ASYMMETRY = 1e-3
"""Relative asymmetry of a gradient's Jacobian above which rounding does not explain it."""

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
        denoise: maps images (B, C, H, W) to images of the same shape, independently.
        y: one image (C, H, W).
        symmetric: whether the Jacobian is symmetric because ``denoise`` is a gradient.
        chunk: number of directions per batch; 0: as many as `CHUNK_VALUES` allows.
        products: number of products computed so far.
    """

    denoise: Callable[[Tensor], Tensor]
    y: Tensor
    symmetric: bool = True
    chunk: int = 0
    products: int = 0
    _product: tuple[int, Callable[[Tensor], Tensor]] | None = None

    def __post_init__(self) -> None:
        values = CHUNK_VALUES * (8 if self.y.is_cuda else 1)
        self.chunk = self.chunk or max(1, min(512, values // max(1, self.size)))

    @property
    def size(self) -> int:
        """Number of rows, d = C H W."""
        return self.y.numel()

    def vjp(self, directions: Tensor) -> Tensor:
        """J^T v for each of ``directions`` (n, d) or (n, C, H, W), in their shape and dtype.

        Raises:
            UserError: if a product has NaN or Inf.
        """
        self.products += len(directions)
        products = []
        for v in torch.split(directions.reshape(-1, *self.y.shape), self.chunk):
            products.append(self._product_of(len(v))(v).to(directions))
        found = torch.cat(products)
        if not found.isfinite().all():
            raise UserError(
                "the Jacobian of this model's denoiser has NaN or Inf: its training diverged, or "
                "its weights are damaged"
            )
        return found.reshape(directions.shape)

    def dense(self) -> Tensor:
        """J (d, d) float64 on the CPU, from d products.

        Raises:
            UserError: if d is above `DENSE`, or J has NaN or Inf.
        """
        if self.size > DENSE:
            raise UserError(
                f"an image of {self.size} values is too large for its full Jacobian (at most "
                f"{DENSE}): use method iterative, or smaller images"
            )
        directions = torch.eye(self.size, dtype=self.y.dtype, device=self.y.device)
        matrix = self.vjp(directions).cpu().double()
        self._product = None
        return matrix

    def _product_of(self, count: int) -> Callable[[Tensor], Tensor]:
        """The product v -> J^T v of ``count`` directions, with the graph of D at that many y."""
        if self._product is None or self._product[0] != count:
            self._product = None  # free the graph before the next one is made
            y = self.y.expand(count, *self.y.shape)
            y = y.clone(memory_format=torch.contiguous_format)
            self._product = count, vjp(self.denoise, y)[1]
        return self._product[1]


def jacobian(model: ScoreModel, y: Tensor, sigma: float, chunk: int = 0) -> Jacobian:
    """The Jacobian of ``model``'s unconditional denoiser at ``y``.

    Args:
        model: a model in evaluation mode. The Jacobian of a `DensityModel` is symmetric.
        y: one noisy image (C, H, W).
        sigma: noise level given to the denoiser, image units.
        chunk: number of directions per batch; 0: as many as `CHUNK_VALUES` allows.
    """
    symmetric = isinstance(model, DensityModel)
    return Jacobian(lambda images: model.denoise(images, sigma), y, symmetric, chunk)


class Eigenpairs(NamedTuple):
    """Eigenvalues (k,), unit eigenvectors (k, C, H, W) and residuals ||J v - value v|| (k,).

    All float64, on the CPU. The entry of largest magnitude of each vector is positive.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of a Jacobian, in full or in part.

    For a denoiser that is not the gradient of a density, values are singular values and vectors
    right singular vectors.

    Attributes:
        values: all values, descending, if the full J was computed; else None.
        largest: algebraically largest eigenpairs, descending.
        smallest: eigenpairs of smallest magnitude, ascending.
        trace: trace of J; exact with the full J, else estimated from random directions.
        trace_error: standard error of the trace; 0 with the full J.
        asymmetry: ||J - J^T|| / ||J|| in the Frobenius norm, exact or estimated like the trace.
        products: number of products with J.
    """

    values: Tensor | None
    largest: Eigenpairs
    smallest: Eigenpairs
    trace: float
    trace_error: float
    asymmetry: float
    products: int

    def converged(self, tolerance: float) -> bool:
        """Whether all residuals are at most ``tolerance`` times the largest known value."""
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
        largest: number of largest eigenvalues.
        smallest: number of eigenvalues of smallest magnitude.
        method: ``dense`` computes all, ``iterative`` only the requested ones; ``auto`` is dense up
            to `DENSE` values, or if J is not symmetric.
        tolerance: residual at which iterations stop, relative to the largest value.
        products: approximate maximum number of products of the iterations.
        seed: random seed of the directions and the iterations' starts.

    Raises:
        UserError: if a number is not between 1 and d - 1, the image is too large for ``dense``, or
            ``iterative`` is used for a Jacobian that is not symmetric.
    """
    if largest < 1 or smallest < 1 or max(largest, smallest) >= operator.size:
        raise UserError(
            f"of the {operator.size} eigenvalues of an image's Jacobian, {largest} largest and "
            f"{smallest} smallest cannot be computed: request 1 to {operator.size - 1} of each"
        )
    if method == "auto":
        method = "dense" if operator.size <= DENSE or not operator.symmetric else "iterative"
    if method == "dense":
        return _dense_spectrum(operator, largest, smallest)
    if not operator.symmetric:
        raise UserError(
            "a plain denoiser's Jacobian is not symmetric, which method iterative requires: use "
            "method dense"
        )
    return _iterative_spectrum(operator, largest, smallest, tolerance, products, seed)


def _pairs(operator: Jacobian, values: Tensor, vectors: Tensor, rest: Tensor) -> Eigenpairs:
    """`Eigenpairs` from ``vectors`` (k, d) and their ``rest`` J v - value v (k, d)."""
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

    rng, size = np.random.default_rng(seed), operator.size  # NumPy's, as ARPACK's vectors are
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
        """Return orthonormal vectors (d, count), the best eigenvectors of ``product`` within about
        ``last`` products, and the eigenpairs of J in their span (Rayleigh-Ritz)."""
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
    # scale of the spectrum, for folding and for the tolerance
    scale = max(float(lanczos(times, 1, "LM", 0.01)[1].values.abs().max()), 1e-12)
    found: list[Eigenpairs] = []
    for product, count in ((times, largest), (folded, smallest)):
        goal, start = tolerance, None
        while True:  # start from the previous vectors, so there is always a result
            start, pairs = lanczos(product, count, "LA", goal, start)
            converged = float(pairs.residuals.max()) <= tolerance * scale
            if converged or operator.products >= last or goal < 1e-14:
                break
            goal /= 10
        order = pairs.values.abs().argsort() if found else pairs.values.argsort(descending=True)
        found.append(Eigenpairs(*(x[order] for x in pairs)))
    return Spectrum(None, found[0], found[1], *estimates, operator.products)


def _probe(operator: Jacobian, rng: np.random.Generator) -> tuple[float, float, float]:
    """Estimate the trace, its standard error, and the relative asymmetry from random directions.

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
    """Raise `UserError` if the Jacobian is not symmetric and the images are too large for it."""
    size = images.channels * math.prod(images.image_size)
    if not isinstance(model, DensityModel) and size > DENSE:
        raise UserError(
            f"a plain denoiser's Jacobian is not symmetric and must be computed in full, for which "
            f"images of {size} values are too large: use images of up to {DENSE} values"
        )


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Decompose the Jacobians; return the document.

    Raises:
        UserError: if a Jacobian has NaN or Inf, or fewer eigenvalues than requested.
    """
    config = context.option(JacobianConfig)
    model = context.model_in(config.precision)

    def of_image(batch: EvaluationBatch) -> dict[str, Tensor]:
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
        "singular": not isinstance(model, DensityModel),
        "classes": classifies(model),
        "per_image": per_image,
        "paper": PAPER,
        "warnings": noise_warnings(model, [config.sigma]) + _warnings(model, per_image),
    }


def _measure(
    model: ScoreModel, batch: EvaluationBatch, config: JacobianConfig, seed: int
) -> dict[str, Tensor]:
    """Compute the columns (1, ...) of one image."""
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
    """JSON entry of image ``number`` from its columns."""
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
            f"not all eigenpairs of {left} of {len(per_image)} images converged (some eigenvalue "
            "is within each residual): increase jacobian.products or jacobian.tolerance"
        )
    worst = max(one["asymmetry"] for one in per_image)
    if isinstance(model, DensityModel) and worst > ASYMMETRY:
        found.append(
            f"the relative asymmetry of the Jacobian is {worst:.1e}, more than rounding errors: "
            "the density is not twice differentiable, or its derivative is wrong"
        )
    return found


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``jacobian.png`` (denoised images, their difference and eigenvectors, as in the paper's
    figure 3) and, with all eigenvalues, ``spectrum.png``."""
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
        "Differences and vectors: gray is 0, each vector is scaled to the full range. "
        '"noise": most of what $D_u$ removes lies along this vector.',
    )


def magnification(difference: Tensor, factor: float = PAPER_FACTOR) -> float:
    """Return ``factor``, or the largest of 1, 2, 5, 10, ... below it that does not saturate.

    A factor saturates if more than 1 % of the values of ``factor * difference`` are outside
    [-1/2, 1/2].
    """
    most = float(difference.abs().flatten().double().quantile(0.99))
    if most * factor <= 0.5:
        return factor
    exponent = math.floor(math.log10(0.5 / most))
    steps = [m * 10.0**exponent for m in (1, 2, 5)]
    return max(step for step in steps if step * most <= 0.5 * (1 + 1e-9))


def _plot_spectra(document: dict[str, Any], path: Path) -> None:
    """Plot all eigenvalues of each image, sorted, and their magnitudes on a logarithmic axis."""
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
    """Trace, eigenvalues, asymmetry and PSNR of each image.

    If data set, noise level and quantity are the paper's, the last row has the paper's eigenvalues,
    which are for its own network and image.
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
