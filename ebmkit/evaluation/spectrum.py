r"""The Jacobian of a denoiser at one image, and its spectrum.

For a denoiser that is a gradient, :math:`D(y) = y + \sigma^2 \nabla\log p(y)`, the Jacobian (CDN
eq. 14)

.. math:: J(y) = \nabla D(y) = I + \sigma^2\, \nabla^2 \log p(y)

is symmetric. If log p is the true density of noisy images, :math:`\sigma^2 J` is the covariance of
the clean image given the noisy one: then no eigenvalue is negative, and
:math:`\sigma^2 \operatorname{tr} J` is the squared error that the denoiser must expect. A direction
whose eigenvalue is near 0 is discarded as noise, near 1 it is kept, above 1 it is amplified; so the
trace counts the dimensions that are kept.

J has as many columns as the image has values d. It is only ever multiplied:
:math:`J^\top v = \nabla_y \langle D(y), v\rangle`, a second derivative in reverse, for a gradient
the Hessian-vector product :math:`v + \sigma^2 \nabla^2\log p(y)\,v`. Many directions are multiplied
at once at as many copies of y, whose graph is kept for the next ones.

Up to `DENSE` values J is written out, its symmetric part decomposed in float64, and its asymmetry,
which for a gradient is rounding alone, measured. Beyond, eigenpairs are found by Lanczos iterations
(`scipy.sparse.linalg.eigsh`). The largest are quickly found. The smallest in magnitude lie *inside*
the spectrum, which Lanczos does not reach: they are the largest of :math:`c I - J^2` ("folded"
spectrum, no inverse needed), rotated within their span to eigenvectors of J. Every pair comes with
its residual :math:`r = \|Jv - \lambda v\|`: some eigenvalue of J lies within r of :math:`\lambda`.
Where very many eigenvalues lie near 0, single ones cannot be separated in fewer products than J
has columns: the vector found is then a mixture of them, r says how wide a range it mixes, and
:math:`|\lambda|` need not be the smallest.

A plain denoiser is the gradient of no density. Its J is not symmetric, and singular values and
right singular vectors stand in for eigenvalues and eigenvectors; it must be small enough to be
written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError

DENSE = 3072
"""Values of an image (32 x 32 x 3) up to which the Jacobian is written out."""

CHUNK_VALUES = 64 * 3072
"""Values of the directions multiplied at once on a CPU; a GPU takes eight times as many."""

PROBES = 16
"""Random directions by which trace and asymmetry are estimated where J is not written out."""

LANCZOS = 40
"""Lanczos vectors between restarts."""

Method = Literal["auto", "dense", "iterative"]
Vectors = NDArray[np.float64]


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
        """J^T v, which is J v if symmetric, of each of ``directions`` (n, C, H, W); same type.

        Raises:
            UserError: if a product is NaN or Inf.
        """
        self.products += len(directions)
        products = []
        for v in torch.split(directions, self.chunk):
            at, clean = self._copies(len(v))
            (product,) = torch.autograd.grad(clean, at, v.to(clean), retain_graph=True)
            products.append(product.to(directions))
        found = torch.cat(products)
        if not found.isfinite().all():
            raise UserError(
                "the Jacobian of this model's denoiser is not finite: its training diverged, or "
                "its weights are damaged"
            )
        return found

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
        matrix = self.vjp(directions.reshape(-1, *self.y.shape)).flatten(1).cpu().double()
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


def _dense_spectrum(operator: Jacobian, largest: int, smallest: int) -> Spectrum:
    matrix = operator.dense()
    if operator.symmetric:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1).T
        images = values[:, None] * vectors
    else:
        left, values, vectors = torch.linalg.svd(matrix)
        images = (left * values).T

    def pairs(chosen: Tensor) -> Eigenpairs:
        residuals = (vectors[chosen] @ matrix.T - images[chosen]).norm(dim=1)
        shape = (len(chosen), *operator.y.shape)
        return Eigenpairs(values[chosen], _signed(vectors[chosen]).reshape(shape), residuals)

    ends = pairs(torch.arange(largest)), pairs(values.abs().argsort()[:smallest])
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm().clamp_min(1e-300))
    return Spectrum(values, *ends, float(matrix.trace()), 0.0, asymmetry, operator.products)


def _iterative_spectrum(
    operator: Jacobian, largest: int, smallest: int, tolerance: float, products: int, seed: int
) -> Spectrum:
    rng = np.random.default_rng(seed)
    last = operator.products + products

    def times(v: Vectors) -> Vectors:
        direction = torch.from_numpy(np.asarray(v, np.float64).reshape(1, *operator.y.shape))
        product: Vectors = operator.vjp(direction).reshape(-1).numpy()
        return product

    def folded(v: Vectors) -> Vectors:
        return 1.1 * scale**2 * v - times(times(v))

    statistics = _probe(operator, rng)
    # the scale of the spectrum, for the fold and for the tolerance
    basis = _lanczos(times, operator, 1, "LM", 0.01, last, rng)
    scale = max(float(_rotate(operator, basis).values.abs().max()), 1e-12)
    found: list[Eigenpairs] = []
    for product, count in ((times, largest), (folded, smallest)):
        goal, start = tolerance, None
        while True:  # each time from what was found, so that there is always something
            start = _lanczos(product, operator, count, "LA", goal, last, rng, start)
            pairs = _rotate(operator, start)
            converged = float(pairs.residuals.max()) <= tolerance * scale
            if converged or operator.products >= last or goal < 1e-14:
                break
            goal /= 10
        order = pairs.values.abs().argsort() if found else pairs.values.argsort(descending=True)
        found.append(Eigenpairs(*(x[order] for x in pairs)))
    return Spectrum(None, found[0], found[1], *statistics, operator.products)


def _lanczos(
    product: Callable[[Vectors], Vectors],
    operator: Jacobian,
    count: int,
    which: Literal["LA", "LM"],
    tolerance: float,
    last: int,
    rng: np.random.Generator,
    start: Vectors | None = None,
) -> Vectors:
    """Orthonormal vectors (d, count): eigenvectors of ``product``, or the best so far.

    Iterates until residuals are below ``tolerance`` times the eigenvalue, or about ``last``
    products with ``operator`` were taken in all.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = operator.size
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
    return basis


def _rotate(operator: Jacobian, basis: Vectors) -> Eigenpairs:
    """The eigenpairs of J within the span of ``basis`` (d, k) (Rayleigh and Ritz)."""
    span = torch.from_numpy(np.ascontiguousarray(basis.T))
    images = operator.vjp(span.reshape(-1, *operator.y.shape)).flatten(1)
    small = images @ span.T
    values, turn = torch.linalg.eigh((small + small.T) / 2)
    vectors, images = turn.T @ span, turn.T @ images
    residuals = (images - values[:, None] * vectors).norm(dim=1)
    return Eigenpairs(values, _signed(vectors).reshape(-1, *operator.y.shape), residuals)


def _probe(operator: Jacobian, rng: np.random.Generator) -> tuple[float, float, float]:
    """Trace, its standard error, and relative asymmetry, from random directions.

    For white v, u: E[v^T J v] = tr J, E||J v||^2 = ||J||^2 and E[(u^T (J - J^T) v)^2] =
    ||J - J^T||^2.
    """
    v = torch.from_numpy(rng.standard_normal((PROBES, operator.size)))
    products = operator.vjp(v.reshape(-1, *operator.y.shape)).flatten(1)
    forms = v @ products.T
    diagonal, norm = forms.diagonal(), products.square().sum(1).mean().sqrt()
    skew = (forms - forms.T)[tuple(torch.triu_indices(PROBES, PROBES, 1))].square().mean().sqrt()
    error = float(diagonal.std() / PROBES**0.5)
    return float(diagonal.mean()), error, float(skew / norm.clamp_min(1e-300))


def _signed(vectors: Tensor) -> Tensor:
    """``vectors`` (k, d), each turned so that its largest entry in magnitude is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
