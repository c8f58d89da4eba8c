r"""Table of samplers, settings of all samplers, and starting points of chains.

A sampler is one file with its functions, its settings and its `SamplerEntry`; `ebmkit.sampling`
adds the entry to `SAMPLERS`. No other code depends on the name of a sampler: an entry states what
its sampler needs of a model, builds it for fixed labels, draws starting points, sets the number of
steps and removes remaining noise at the end.

**Replay buffer.** Persistent contrastive divergence (Tieleman 2008) continues its chains between
training steps instead of restarting them. JEM stores 10,000 chains and continues a random batch at
each step. With labels, class c owns the slots :math:`cM/C \dots (c+1)M/C - 1`, so a chain of p(x|c)
continues as one of p(x|c). The slots of a batch are distinct if there are enough, so writing the
batch back does not depend on an order.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.class_gaussians import ClassGaussians
from ebmkit.energy import DensityModel, EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.noise import Sigma, check_trained
from ebmkit.registry import Table, find
from ebmkit.sampling.base import (
    Labels,
    Sampler,
    blind_denoiser_of,
    clean_level,
    denoiser_of,
    highest_level,
    trained_range,
)
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array


class ReplayBuffer:
    """M chains ``images`` (M, C, H, W) float32, divided among ``num_classes`` (0: no labels).

    Raises:
        UserError: if M is 0 or not a multiple of ``num_classes``.
    """

    def __init__(self, images: Tensor, num_classes: int = 0) -> None:
        if not len(images):
            raise UserError("a replay buffer needs 1 image or more: set negatives.buffer_size")
        if num_classes and len(images) % num_classes:
            raise UserError(
                f"a replay buffer of {len(images)} images does not divide among {num_classes} "
                f"classes: set negatives.buffer_size to a multiple of {num_classes}"
            )
        self.images, self.num_classes = images, num_classes

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor | None:
        """Label of each slot, (M,) int64; None without labels."""
        slots = torch.arange(len(self), device=self.images.device)
        return slots // (len(self) // self.num_classes) if self.num_classes else None

    def choose(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Draw random slots (count,) int64, distinct if there are enough.

        ``generator`` is on the device of the buffer. A buffer with classes needs ``labels``
        (count,), the label of each slot.
        """
        classes, device = self.num_classes or 1, self.images.device
        shape = classes, len(self) // classes
        order = torch.rand(shape, generator=generator, device=device).argsort(dim=1)
        if not self.num_classes:
            return order[0, torch.arange(count, device=device) % len(self)]
        assert labels is not None
        own = torch.nn.functional.one_hot(labels, classes)
        rank = (own.cumsum(0) * own).sum(1) - 1  # index of each entry within its class
        return labels * shape[1] + order[labels, rank % shape[1]]

    def put(self, slots: Tensor, images: Tensor) -> None:
        """Replace the chains in ``slots`` (B,) with ``images`` (B, C, H, W)."""
        self.images[slots] = images.detach()

    def to_bytes(self) -> bytes:
        """The buffer as an HDF5 file: ``images`` (M, C, H, W) float32 and ``labels`` (M,)."""
        import h5py

        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file["images"] = self.images.cpu().numpy()
            if self.labels is not None:
                file["labels"] = self.labels.cpu().numpy()
        return buffer.getvalue()

    @staticmethod
    def read_images(content: bytes, what: str) -> Tensor:
        """Read the images (M, C, H, W) float32 of an HDF5 file that `to_bytes` wrote.

        Raises:
            UserError: if ``content`` is not such a file; the error calls it ``what``.
        """
        with open_hdf5(content, what) as file:
            found = find_array(file, "images", what)
            if found is None or found.dtype != "float32" or found.ndim != 4:
                raise UserError(f"{what} is damaged: it holds no replay buffer")
            return torch.from_numpy(read_array(found, what))


Start = Literal["auto", "noise", "uniform", "data", "class_gaussian"]

START = (
    "starting points. auto: class_gaussian if images of the data set are available, else noise; "
    "noise: Gaussian noise around gray, of the first level or the model's highest; uniform: "
    "uniform in [0, 1]; data: images of the data set; class_gaussian: draws from the Gaussian of a "
    "label's images, or of all. Samplers over noise levels add the first level's noise to data and "
    "class_gaussian"
)
"""Description of the field ``start``."""

RENAMED = {"ks": "kadkhodaie_simoncelli", "seeds": "class_gaussian", "largest_drift": "drift_clip"}
"""Old -> current names of samplers, starts and settings."""


def check_renamed(kind: str, name: str | None) -> None:
    """Raise a `UserError` that gives the current name if ``name`` is an old one."""
    if name in RENAMED:
        raise UserError(f"{kind} {name!r} is now called {RENAMED[name]!r}: write that instead")


class SamplerConfig(BaseModel):
    """Settings of all samplers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1, description="number of steps per chain")
    start: Start = Field("auto", description=START)

    def resolve_levels(self, model: ScoreModel) -> Self:
        """Return the settings with unset noise levels replaced by those of ``model``.

        Raises:
            UserError: if a noise level is outside the trained range.
        """
        return self


class LevelConfig(SamplerConfig):
    """Settings of samplers at one noise level."""

    sigma: Sigma | None = Field(
        None,
        description="noise level of the density, for models with noise level input, for "
        "example 10/255; null: the model's lowest, or 0 for closed forms",
    )

    def resolve_levels(self, model: ScoreModel) -> Self:
        sigma = clean_level(model) if self.sigma is None else self.sigma
        if sigma is not None:
            check_trained(sigma, trained_range(model))
        return self.model_copy(update={"sigma": sigma})


C = TypeVar("C", bound=SamplerConfig)
Need = Literal["score", "density", "labels", "levels", "blind", "conditional"]


@dataclass(frozen=True, kw_only=True)
class SamplerEntry(Generic[C]):
    """Entry of a sampler in `SAMPLERS`.

    Attributes:
        name: name of the sampler.
        description: one-line description.
        config: class of the settings; defaults are for images in [0, 1] and models trained on
            noise of 1 to 100/255.
        needs: requirements on the model: ``score`` (every model has one), ``density`` (the score
            is its gradient), trained ``labels``, trained noise ``levels`` (closed forms have all
            levels), ``blind`` (the model takes no noise level), ``conditional`` (it takes one).
        make: maps the model, labels and settings with noise levels of the model to the sampler.
        noisy_end: whether the final images contain noise that `finish` removes.
        no_stationary_distribution: why diagnostics are undefined; empty: the chains have a
            stationary distribution.
        caveat: a note on the stationary distribution.
        priority: the default sampler is the one of highest priority that supports the model; 0:
            never the default.
        default_for: further condition on a model for which it is the default.
        starts_from_data: whether ``start=auto`` means ``class_gaussian`` if there are data.
        weighted: whether the state has importance weights, ``log_weight``; they need the density of
            the starting points, so ``noise`` is the only legal start.
        min_fresh_steps: minimum number of steps of chains that do not continue a replay buffer.
    """

    name: str
    description: str
    config: type[C]
    needs: tuple[Need, ...]
    make: Callable[[ScoreModel, Labels, C], Sampler[Any]]
    noisy_end: bool = False
    no_stationary_distribution: str = ""
    caveat: str = ""
    priority: int = 0
    default_for: Callable[[ScoreModel], bool] = lambda model: True
    starts_from_data: bool = True
    weighted: bool = False
    min_fresh_steps: int = 0

    def supports(self, model: ScoreModel) -> bool:
        """Whether the sampler supports ``model``."""
        return missing(model, self.needs) is None

    def check(self, model: ScoreModel, c: Labels = None) -> None:
        """Raise a `UserError` if the sampler does not support ``model`` with labels ``c``.

        The error states the reason and the samplers that support the model.
        """
        if (reason := missing(model, self.needs)) is not None:
            able = ", ".join(name for name, entry in SAMPLERS.items() if entry.supports(model))
            raise UserError(
                f"sampler {self.name} does not support this model: {reason}; take {able}"
            )
        if c is not None and (reason := missing(model, ("labels",))) is not None:
            raise UserError(f"this model does not take labels: {reason}; leave the label out")
        if c is None and "labels" in self.needs:
            raise UserError(f"sampler {self.name} needs a label: give one")

    def build(self, model: ScoreModel, c: Labels = None, config: C | None = None) -> Sampler[Any]:
        """Build the sampler of p(x), or of p(x|c) with labels ``c``, a number or (B,).

        Raises:
            UserError: if the sampler does not support the model, or a noise level is outside the
                trained range.
        """
        self.check(model, c)
        config = self.config() if config is None else config
        return self.make(model, c, config.resolve_levels(model))

    def length(self, sampler: Sampler[Any], config: C) -> int:
        """Number of steps: the length of the schedule of ``sampler``, or ``config.steps``."""
        return config.steps if sampler.steps is None else sampler.steps

    def check_start(self, start: str) -> None:
        """Raise a `UserError` if chains of this sampler cannot begin at ``start``."""
        if self.weighted and start not in ("auto", "noise"):
            raise UserError(
                f"sampler {self.name} cannot start from {start!r}: its weights need the density of "
                "the starting points, so leave --start out or take noise"
            )

    def resolve_start(self, start: Start, model: ScoreModel, has_data: bool) -> Start:
        """Replace ``auto`` by ``class_gaussian`` if there are data, else by ``noise``.

        Diffusion models always start from noise, which hides any image at their first level.
        """
        self.check_start(start)
        if start != "auto":
            return start
        from_data = has_data and self.starts_from_data and model.schedule is None
        from_data = from_data and not self.weighted
        return "class_gaussian" if from_data else "noise"

    def start(
        self,
        model: ScoreModel,
        sampler: Sampler[Any],
        config: C,
        shape: Sequence[int],
        generator: torch.Generator,
        c: Labels = None,
        data: tuple[Tensor, Tensor | None] | None = None,
        mean: Tensor | float = 0.5,
    ) -> Tensor:
        """Draw starting points (B, C, H, W) float32 on the device of ``generator``.

        For samplers over noise levels, noise of the first level is added to the points of
        ``config.start``, except for ``uniform``.

        Args:
            model: model to sample from.
            sampler: sampler that `build` returned for ``config``.
            config: settings of the sampler.
            shape: (B, C, H, W).
            generator: random generator.
            c: labels for ``class_gaussian``; None: one Gaussian for all images.
            data: training images and labels, for ``data`` and ``class_gaussian``; None:
                ``class_gaussian`` uses the Gaussians that are stored with the model.
            mean: image that ``noise`` is added to: gray, or the mean image.

        Raises:
            UserError: if data are needed and none are given.
        """
        device, shape, (level, _) = generator.device, tuple(shape), noise_levels(sampler)
        stored = gaussians_of(model, shape[1:]) if data is None else None
        kind = self.resolve_start(config.start, model, data is not None or stored is not None)
        if kind == "uniform":
            return torch.rand(shape, generator=generator, device=device)
        if kind == "noise":
            begin = torch.zeros(shape, device=device) + mean
            level = highest_level(model) if level is None else level
        elif kind == "class_gaussian" and stored is not None:
            own = None if c is None else torch.as_tensor(c, device=device).expand(shape[0])
            begin = stored.to(device).sample(shape[0], generator, own)
        elif data is None:
            raise UserError(f"chains start from {kind}: give images of the data set")
        elif kind == "data":
            at = torch.randint(len(data[0]), (shape[0],), generator=generator, device=device)
            begin = data[0][at.to(data[0].device)].to(device)
        else:
            images, labels = data if c is not None else (data[0], None)
            if c is not None and labels is None:
                raise UserError(
                    "the Gaussian of a label is fitted to its images: give their labels, too"
                )
            own = None if c is None else torch.as_tensor(c, device=images.device).expand(shape[0])
            begin = ClassGaussians(images, labels).sample(shape[0], generator, own).to(device)
        if level is None:
            return begin
        return begin + level * torch.randn(shape, generator=generator, device=device)

    def finish(
        self, model: ScoreModel, sampler: Sampler[Any], x: Tensor, c: Labels = None
    ) -> Tensor:
        """Remove the noise of the last level from ``x``; return ``x`` if there is none.

        A blind model estimates the level, clamped to the trained range. A model that was not
        trained to denoise has no such noise: its density is that of clean images.
        """
        untrained = model.card is not None and model.card.sigma_range is None
        if not self.noisy_end or untrained:
            return x
        if not model.noise_conditional:
            return blind_denoiser_of(model, c)(x)
        level = noise_levels(sampler)[1]
        return x if level is None else denoiser_of(model, c)(x, level)


SAMPLERS: dict[str, SamplerEntry[Any]] = Table("sampler", {})
"""All samplers, by name; `ebmkit.sampling` fills the table."""


def find_sampler(name: str) -> SamplerEntry[Any]:
    """Return the entry of `SAMPLERS` called ``name``.

    Raises:
        UserError: if it is unknown; the error suggests the nearest name, or gives the new one.
    """
    check_renamed("sampler", name)
    return find("sampler", SAMPLERS, name)


def gaussians_of(model: ScoreModel, shape: Sequence[int]) -> ClassGaussians | None:
    """Gaussians stored with ``model``, if they are of images of ``shape`` (C, H, W)."""
    found = model.class_gaussians
    return found if found is not None and found.shape == tuple(shape) else None


def default_sampler(model: ScoreModel, gaussians: bool = False) -> SamplerEntry[Any]:
    """Return the default sampler of ``model``.

    ``ddim`` for blind denoisers with Gaussians to start from, and ``kadkhodaie_simoncelli`` for
    other ones; ``heun`` for those that take the noise level and were trained on noise that hides an
    image, ``ddim`` for other ones and diffusion models; ``sgld``, as in JEM, for densities that
    were not trained to denoise. ``gaussians``: whether chains can start from the Gaussians that are
    stored with the model.
    """
    entries = (entry for entry in SAMPLERS.values() if entry.priority and entry.default_for(model))
    able = [entry for entry in entries if entry.supports(model)]
    if gaussians:
        able = [entry for entry in able if entry.starts_from_data]
    return max(able, key=lambda entry: entry.priority)


def noise_levels(sampler: Sampler[Any]) -> tuple[float | None, float | None]:
    """Noise levels of the starting points and of the final images of a sampler.

    The first is None for a single level; both are None without levels.
    """
    levels: Sequence[float] = getattr(sampler, "sigmas", ())
    return (levels[0], levels[-1]) if levels else (None, getattr(sampler, "sigma", None))


def takes_labels(model: ScoreModel) -> bool:
    """Whether ``model`` has a score for each label that it was trained on.

    This includes class-conditional diffusion models, which are not classifiers.
    """
    conditional = not isinstance(model, EnergyModel) and model.num_classes > 0
    return conditional or classifies(model)


def missing(model: ScoreModel, needs: Sequence[Need]) -> str | None:
    """Reason why ``model`` lacks one of ``needs``, as a clause of a message; None if it has all."""
    plain = f"{type(model).__name__} is a plain denoiser and has no log-density"
    untrained = "it was not trained to denoise, so it has no noise levels"
    given = "it takes the noise level as an input, and this sampler needs a blind denoiser"
    blind = "it ignores the noise level, and this sampler needs a density at each level"
    lacking: dict[Need, str] = {
        "density": "" if isinstance(model, DensityModel) else plain,
        "labels": "" if takes_labels(model) else "it was trained without labels",
        "levels": untrained if model.card and not model.card.denoises else "",
        "blind": given if model.noise_conditional else "",
        "conditional": "" if model.noise_conditional else blind,
    }
    return next((lacking[need] for need in needs if lacking.get(need)), None)
