r"""The spectrum of a denoiser's Jacobian: eigenvalues, eigenvectors, trace, asymmetry.

Up to `DENSE` values the Jacobian J is written out, its symmetric part decomposed in float64, and
its asymmetry, which for a gradient is rounding alone, measured.

Beyond, eigenpairs are found by Lanczos iterations (`scipy.sparse.linalg.eigsh`). The largest are
quickly found. The smallest in magnitude lie *inside* the spectrum, which Lanczos does not reach:
they are the largest of :math:`c I - J^2` ("folded" spectrum, no inverse needed), rotated within
their span to eigenvectors of J. Every pair comes with its residual
:math:`r = \|Jv - \lambda v\|`: some eigenvalue of J lies within r of :math:`\lambda`. Where very
many eigenvalues lie near 0, single ones cannot be told apart in fewer products than J has columns:
the vector found is then a mixture of them, r says how wide a range it mixes, and
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

from ebmkit.errors import UserError
from ebmkit.jacobian import DENSE, Jacobian

__all__ = ["Eigenpairs", "Method", "Spectrum", "spectrum"]

PROBES = 16
"""Random directions by which trace and asymmetry are estimated where J is not written out."""

LANCZOS = 40
"""Lanczos vectors between restarts."""

Method = Literal["auto", "dense", "iterative"]
Vectors = NDArray[np.float64]


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

    Attributes:
        method: dense or iterative.
        singular: whether values are singular values, and vectors right singular vectors, as the
            denoiser is the gradient of no density.
        values: all of them, descending, if dense; else None.
        largest: the algebraically largest, descending.
        smallest: the smallest in magnitude, ascending.
        trace: of J: exact if dense, else estimated from random directions.
        trace_error: its standard error; 0 if dense.
        asymmetry: ||J - J^T|| / ||J|| in Frobenius' norm, measured or estimated in the same way.
        products: how many products with J were taken.
    """

    method: Literal["dense", "iterative"]
    singular: bool
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
        largest: how many of the largest are wanted.
        smallest: how many of the smallest in magnitude.
        method: dense: all of them; iterative: only those; auto: dense up to `DENSE` values.
        tolerance: iterate until residuals are below this share of the largest value.
        products: iterate no further than about so many products.
        seed: of the random directions and starts of the iterations.

    Raises:
        UserError: if more are wanted than there are, the image is too large for ``dense``, or a
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
    if not matrix.isfinite().all():
        raise UserError(
            "the Jacobian of this model's denoiser is not finite: its training diverged, or its "
            "weights are damaged"
        )
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm().clamp_min(1e-300))
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

    return Spectrum(
        method="dense",
        singular=not operator.symmetric,
        values=values,
        largest=pairs(torch.arange(largest)),
        smallest=pairs(values.abs().argsort()[:smallest]),
        trace=float(matrix.trace()),
        trace_error=0.0,
        asymmetry=asymmetry,
        products=operator.products,
    )


def _iterative_spectrum(
    operator: Jacobian, largest: int, smallest: int, tolerance: float, products: int, seed: int
) -> Spectrum:
    rng = np.random.default_rng(seed)
    last = operator.products + products

    def times(v: Vectors) -> Vectors:
        direction = torch.from_numpy(np.asarray(v, np.float64).reshape(1, *operator.y.shape))
        product: Vectors = operator.pull(direction).reshape(-1).numpy()
        if not np.isfinite(product).all():
            raise UserError(
                "the Jacobian of this model's denoiser is not finite: its training diverged, or "
                "its weights are damaged"
            )
        return product

    trace, trace_error, asymmetry = _probe(operator, rng)
    # the scale of the spectrum, for the fold and for the tolerance
    basis = _lanczos(times, operator, 1, "LM", 0.01, last, rng)
    scale = max(float(_rotate(operator, basis).values.abs().max()), 1e-12)

    def enough(pairs: Eigenpairs) -> bool:
        return float(pairs.residuals.max()) <= tolerance * scale or operator.products >= last

    def folded(v: Vectors) -> Vectors:
        return 1.1 * scale**2 * v - times(times(v))

    found = []
    for product, count in ((times, largest), (folded, smallest)):
        goal, start = tolerance, None
        while True:  # each time from what was found, so that there is always something
            start = _lanczos(product, operator, count, "LA", goal, last, rng, start)
            pairs = _rotate(operator, start)
            if enough(pairs) or goal < 1e-14:
                break
            goal /= 10
        found.append(pairs)
    order = found[0].values.argsort(descending=True), found[1].values.abs().argsort()
    top, bottom = (
        Eigenpairs(*(x[rows] for x in pairs)) for pairs, rows in zip(found, order, strict=True)
    )
    return Spectrum(
        method="iterative",
        singular=False,
        values=None,
        largest=top,
        smallest=bottom,
        trace=trace,
        trace_error=trace_error,
        asymmetry=asymmetry,
        products=operator.products,
    )


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
    """Orthonormal vectors (d, count): the wanted eigenvectors of ``product``, or the best so far.

    Iterates until residuals are below ``tolerance`` times the eigenvalue, or about ``last``
    products with ``operator`` were taken in all.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    size = operator.size
    kept = min(size, max(LANCZOS, 2 * count + 1))
    matrix = LinearOperator((size, size), matvec=product, dtype=np.float64)
    begin = rng.standard_normal(size) if start is None else start.sum(1)
    restarts = max(1, (last - operator.products) // kept)
    try:
        vectors: Vectors = eigsh(
            matrix, count, which=which, ncv=kept, tol=tolerance, v0=begin, maxiter=restarts
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
    images = operator.pull(span.reshape(-1, *operator.y.shape)).flatten(1)
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
    products = operator.pull(v.reshape(-1, *operator.y.shape)).flatten(1)
    forms = v @ products.T
    diagonal, norm = forms.diagonal(), products.square().sum(1).mean().sqrt()
    skew = (forms - forms.T)[tuple(torch.triu_indices(PROBES, PROBES, 1))].square().mean().sqrt()
    error = float(diagonal.std() / PROBES**0.5)
    return float(diagonal.mean()), error, float(skew / norm.clamp_min(1e-300))


def _signed(vectors: Tensor) -> Tensor:
    """``vectors`` (k, d), each turned so that its largest entry in magnitude is positive."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
