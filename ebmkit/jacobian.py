r"""The Jacobian of a denoiser at one image, and how linear the denoiser is there.

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
at once at as many copies of y, whose graph is kept for the next ones. `ebmkit.spectrum` finds
eigenvalues and eigenvectors.

**Local linearity.** Where D is homogeneous of degree 1 (Mohan et al., 2020, arXiv 1906.05478),
:math:`D(y) = J(y)\,y` (section 4.2). For log p homogeneous of degree k, the score is so of degree
k - 1, and by Euler's identity

.. math:: D(y) - J(y)\,y = (2 - k)\, \sigma^2 \nabla\log p(y) = (2 - k)\,(D(y) - y) ,

so the claim holds for k = 2 alone. `linearity` measures the error and the k that fits it best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError

__all__ = ["DENSE", "Jacobian", "Linearity", "directional", "jacobian", "linearity"]

DENSE = 3072
"""Values of an image (32 x 32 x 3) up to which the Jacobian is written out."""

CHUNK_VALUES = 64 * 3072
"""Values of the directions multiplied at once on a CPU; a GPU takes eight times as many."""

Map = Callable[[Tensor], Tensor]


class Jacobian:
    """The Jacobian of ``denoise`` at ``y`` as an operator.

    Args:
        denoise: images (B, C, H, W) to images of the same shape, each on its own.
        y: one image (C, H, W).
        symmetric: whether it must be so, because ``denoise`` is a gradient.
        chunk: directions multiplied at once; None: by their size, see `CHUNK_VALUES`.

    Attributes:
        products: how many products were taken so far.
    """

    def __init__(
        self, denoise: Map, y: Tensor, symmetric: bool = True, chunk: int | None = None
    ) -> None:
        self.denoise = denoise
        self.y = y
        self.symmetric = symmetric
        values = CHUNK_VALUES * (8 if y.is_cuda else 1)
        self.chunk = chunk or max(1, min(512, values // max(1, y.numel())))
        self.products = 0
        self._graph: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """The number of rows, d = C H W."""
        return self.y.numel()

    def pull(self, directions: Tensor) -> Tensor:
        """J^T v, which is J v if symmetric, of each of ``directions`` (n, C, H, W); same type."""
        self.products += len(directions)
        parts = []
        for v in torch.split(directions, self.chunk):
            at, clean = self._copies(len(v))
            (product,) = torch.autograd.grad(clean, at, v.to(clean), retain_graph=True)
            parts.append(product.to(directions))
        return torch.cat(parts)

    def dense(self) -> Tensor:
        """J, (d, d) float64 on the CPU; d products.

        Raises:
            UserError: if d is above `DENSE`.
        """
        if self.size > DENSE:
            raise UserError(
                f"the Jacobian of an image of {self.size} values cannot be written out beyond "
                f"{DENSE}: take method iterative, or smaller images"
            )
        matrix = torch.empty(self.size, self.size, dtype=torch.float64)
        for rows in torch.split(torch.arange(self.size), self.chunk):
            v = torch.zeros(len(rows), self.size, dtype=self.y.dtype, device=self.y.device)
            v[torch.arange(len(rows)), rows] = 1
            matrix[rows] = self.pull(v.reshape(-1, *self.y.shape)).flatten(1).cpu().double()
        self._graph = None
        return matrix

    def _copies(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` copies of y and, with a graph that leads to them, of D(y)."""
        if self._graph is None or len(self._graph[0]) != count:
            self._graph = None
            self._graph = _recorded(self.denoise, self.y.expand(count, *self.y.shape))
        return self._graph


def jacobian(model: ScoreModel, y: Tensor, sigma: float, chunk: int | None = None) -> Jacobian:
    """The Jacobian at ``y`` (C, H, W) of ``model``'s unconditional denoiser, given ``sigma``.

    Args:
        model: in evaluation mode. It is symmetric if it is an `EnergyModel`.
        y: a noisy image.
        sigma: the noise level, image units.
        chunk: directions multiplied at once; None: by their size.
    """

    def denoise(images: Tensor) -> Tensor:
        return model.denoise(images, sigma)

    return Jacobian(denoise, y, isinstance(model, EnergyModel), chunk)


class Linearity(NamedTuple):
    """How far a denoiser is from D(y) = J(y) y at images; all (B,).

    Attributes:
        error: ||D - J y|| / ||D||.
        of_change: ||D - J y|| / ||D - y||, which is |2 - k| for log p homogeneous of degree k.
        degree: the k that fits best, 2 - <D - J y, D - y> / ||D - y||^2.
        unexplained: ||D - J y - (2 - degree)(D - y)|| / ||D||, what no degree explains.
        explained: the share of ||D - J y||^2 that the degree explains; of rounding errors alone
            where the error is about 1e-6 and less.
        along: <y, D - y> / sigma^2 = <y, score>, which is k log p by Euler's identity.
    """

    error: Tensor
    of_change: Tensor
    degree: Tensor
    unexplained: Tensor
    explained: Tensor
    along: Tensor


def linearity(model: ScoreModel, y: Tensor, sigma: float) -> Linearity:
    """Measure the local linearity of ``model``'s unconditional denoiser at ``y`` (CDN section 4.2).

    Args:
        model: in evaluation mode.
        y: noisy images (B, C, H, W).
        sigma: their noise level, image units.
    """
    clean, product = directional(
        lambda images: model.denoise(images, sigma), y, y, isinstance(model, EnergyModel)
    )
    D, Jy, flat = (t.flatten(1).double() for t in (clean, product, y))
    rest, change = D - Jy, D - flat
    tiny = torch.finfo(torch.float64).tiny
    moved = change.square().sum(1).clamp_min(tiny)
    missing = (rest * change).sum(1) / moved  # 2 - k
    left = (rest - missing[:, None] * change).norm(dim=1)
    size, error = D.norm(dim=1).clamp_min(tiny), rest.norm(dim=1)
    return Linearity(
        error=error / size,
        of_change=error / moved.sqrt(),
        degree=2 - missing,
        unexplained=left / size,
        explained=1 - (left / error.clamp_min(tiny)).square().clamp(max=1),
        along=(flat * change).sum(1) / sigma**2,
    )


def directional(
    denoise: Map, y: Tensor, v: Tensor, symmetric: bool = True
) -> tuple[Tensor, Tensor]:
    """D(y) and J(y) v for images ``y`` and directions ``v``, both (B, C, H, W), each on its own.

    Args:
        denoise: images to images of the same shape.
        y: images.
        v: directions.
        symmetric: whether J is, so that it is its own transpose. If not, Jv is the transpose, by
            one more derivative, of J^T u, which is linear in u.
    """
    at, clean = _recorded(denoise, y)
    if symmetric:
        return clean.detach(), torch.autograd.grad(clean, at, v)[0]
    u = torch.zeros_like(clean, requires_grad=True)
    (back,) = torch.autograd.grad(clean, at, u, create_graph=True)
    return clean.detach(), torch.autograd.grad(back, u, v)[0]


def _recorded(denoise: Map, y: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of ``y``, and D(y) with a graph that leads to it."""
    with torch.inference_mode(False), torch.enable_grad():
        at = y.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        return at, denoise(at)
