r"""The table of samplers: what an entry says, what all settings have, and where chains start.

A sampler is one file with its functions, its settings and its `SamplerEntry`, and one line in
`ebmkit.sampling`, which puts the entry into `SAMPLERS`. Nothing else asks for a sampler by name: an
entry says what its sampler needs of a model, makes it at fixed labels, says where chains start and
for how many steps they run, and what is left to do at the end.

**Gaussian of each class** (Santurkar et al., arXiv 1906.09453; JEM++, arXiv 2109.09032): starts are
:math:`x_0 \sim \mathcal N(\mu_c, \Sigma_c)` with the mean and covariance of the images of class c.
Of n images in d dimensions the covariance is never formed: with the centred images
:math:`X \in \mathbb R^{n \times d}`,

.. math:: x_0 = \mu_c + X^\top z / \sqrt{n - 1}, \qquad z \sim \mathcal N(0, I_n)

has just that covariance, of whatever rank.

**Replay buffer.** Persistent contrastive divergence (Tieleman 2008) continues its chains between
training steps instead of starting them anew; JEM stores 10,000 of them and continues a random batch
at each step. With labels the slots are divided among the classes, class c owning the slots
:math:`cM/C \dots (c+1)M/C - 1`, so a chain of p(x|c) continues as one of p(x|c). A batch takes
different slots as long as there are enough, so that writing it back does not depend on any order.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel, classifies
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

FITTED = 1000
"""Images of a class that its Gaussian is fitted to, at the most, evenly through the set."""


class ClassGaussians:
    """The Gaussians of each class of images (N, C, H, W), or of all, without labels (N,).

    Raises:
        UserError: if a class has fewer than two images.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        count = int(labels.max()) + 1 if labels is not None else 1
        self.means, self.spreads, shares = [], [], []
        for c in range(count):
            own = images if labels is None else images[labels == c]
            if len(own) < 2:
                raise UserError(
                    f"class {c} has {len(own)} image(s), too few to fit a Gaussian to: start "
                    "chains from uniform noise"
                )
            shares.append(len(own))
            rows = torch.arange(min(len(own), FITTED), device=own.device)
            fitted = own[rows * len(own) // len(rows)]
            self.means.append(fitted.mean(0))
            self.spreads.append((fitted - fitted.mean(0)).flatten(1) / (len(fitted) - 1) ** 0.5)
        self.shares = torch.tensor(shares, dtype=images.dtype, device=images.device)

    def sample(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Starting points (count, C, H, W), not clipped; the generator is on the images' device.

        ``labels`` (count,) say of which Gaussians; None: classes as often as they are in the set.

        Raises:
            UserError: if there were no images of a label.
        """
        if labels is None:
            labels = torch.multinomial(self.shares, count, replacement=True, generator=generator)
        elif len(labels) and (largest := int(labels.max())) >= len(self.means):
            raise UserError(
                f"label {largest} has 0 images to fit a Gaussian to, the largest label among them "
                f"is {len(self.means) - 1}: start chains from uniform noise"
            )
        kind: dict[str, Any] = {"dtype": self.shares.dtype, "device": self.shares.device}
        most = max(map(len, self.spreads))
        z = torch.randn(count, most, generator=generator, **kind)
        out = torch.empty((count, *self.means[0].shape), **kind)
        for c, (mean, spread) in enumerate(zip(self.means, self.spreads, strict=True)):
            rows = torch.nonzero(labels == c).flatten()
            if len(rows):
                drawn = z[rows, : len(spread)] @ spread
                out[rows] = mean + drawn.reshape(-1, *mean.shape)
        return out


class ReplayBuffer:
    """M chains ``images`` (M, C, H, W) of float32; ``num_classes`` share the slots (0: none).

    Raises:
        UserError: if M is 0 or does not divide among the classes.
    """

    def __init__(self, images: Tensor, num_classes: int = 0) -> None:
        if not len(images):
            raise UserError("a replay buffer needs room for 1 image or more: negatives.buffer_size")
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
        """The label of each slot, (M,) int64; None without labels."""
        slots = torch.arange(len(self), device=self.images.device)
        return slots // (len(self) // self.num_classes) if self.num_classes else None

    def choose(
        self, count: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        """Slots (count,) int64, drawn at random, different ones as long as there are enough.

        ``generator`` is on the buffer's device; ``labels`` (count,), whose slots to take, are
        needed by a buffer with classes.
        """
        classes, device = self.num_classes or 1, self.images.device
        shape = classes, len(self) // classes
        order = torch.rand(shape, generator=generator, device=device).argsort(dim=1)
        if not self.num_classes:
            return order[0, torch.arange(count, device=device) % len(self)]
        assert labels is not None
        own = torch.nn.functional.one_hot(labels, classes)
        rank = (own.cumsum(0) * own).sum(1) - 1  # how many of its class come before it
        return labels * shape[1] + order[labels, rank % shape[1]]

    def put(self, slots: Tensor, images: Tensor) -> None:
        """Replace the chains in ``slots`` (B,) by ``images`` (B, C, H, W)."""
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
        """The images in an HDF5 file that `to_bytes` wrote, (M, C, H, W) float32.

        Raises:
            UserError: if ``content`` is not such a file; it names it as ``what``.
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
"""The description of the field ``start``."""

RENAMED = {"ks": "kadkhodaie_simoncelli", "seeds": "class_gaussian", "largest_drift": "drift_clip"}
"""Names of earlier versions -> today's, of samplers, starts and settings."""


def check_renamed(kind: str, name: str | None) -> None:
    """Raise a `UserError` at a name of an earlier version; it says what it is called now."""
    if name in RENAMED:
        raise UserError(f"{kind} {name!r} is now called {RENAMED[name]!r}: write that instead")


class SamplerConfig(BaseModel):
    """Settings that all samplers have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: int = Field(1000, ge=1, description="number of steps per chain")
    start: Start = Field("auto", description=START)

    def at_levels_of(self, model: ScoreModel) -> Self:
        """These settings with noise levels that ``model`` was trained for in place of none.

        Raises:
            UserError: if one was asked for at which it was not trained.
        """
        return self


class LevelConfig(SamplerConfig):
    """Settings of samplers of one density."""

    sigma: Sigma | None = Field(
        None,
        description="noise level of the density, for models with noise level input, for "
        "example 10/255; null: the model's lowest, or 0 for closed forms",
    )

    def at_levels_of(self, model: ScoreModel) -> Self:
        sigma = clean_level(model) if self.sigma is None else self.sigma
        if sigma is not None:
            check_trained(sigma, trained_range(model))
        return self.model_copy(update={"sigma": sigma})


C = TypeVar("C", bound=SamplerConfig)
Need = Literal["score", "density", "labels", "levels", "blind"]


@dataclass(frozen=True, kw_only=True)
class SamplerEntry(Generic[C]):
    """A sampler that has a name.

    Attributes:
        name: of the table.
        description: one line.
        config: its settings; their defaults are for images in [0, 1] and models trained on noise
            of 1 to 100/255.
        needs: what a model must have: ``score`` (any has one), ``density`` (of which the score is
            the gradient), ``labels`` and noise ``levels`` (that it was trained on; closed forms
            have all levels), ``blind`` (it takes no noise level).
        make: model, labels and settings, at noise levels of the model, to the sampler.
        noisy_end: whether images at the end carry noise that `finish` takes out.
        no_law: why its chains have no stationary law, so that their draws cannot be compared with
            each other; empty: they have one.
        caveat: what to know of that law.
        priority: the sampler that is taken where none is asked for is the one of the highest
            priority that can drive the model; 0: never.
        starts_from_data: whether ``start=auto`` means the Gaussian of the data.
        fresh_steps: steps that a chain needs at least unless it resumes a replay buffer's.
    """

    name: str
    description: str
    config: type[C]
    needs: tuple[Need, ...]
    make: Callable[[ScoreModel, Labels, C], Sampler[Any]]
    noisy_end: bool = False
    no_law: str = ""
    caveat: str = ""
    priority: int = 0
    starts_from_data: bool = True
    fresh_steps: int = 0

    def drives(self, model: ScoreModel) -> bool:
        """Whether it can drive ``model``."""
        return missing(model, self.needs) is None

    def check(self, model: ScoreModel, c: Labels = None) -> None:
        """Raise a `UserError` if it cannot drive ``model``, with labels ``c`` if they are given.

        It says why, and which samplers can.
        """
        if (reason := missing(model, self.needs)) is not None:
            able = ", ".join(name for name, entry in SAMPLERS.items() if entry.drives(model))
            raise UserError(f"sampler {self.name} cannot drive this model: {reason}; take {able}")
        if c is not None and (reason := missing(model, ("labels",))) is not None:
            raise UserError(f"labels cannot be asked of this model: {reason}; leave the label out")
        if c is None and "labels" in self.needs:
            raise UserError(f"sampler {self.name} climbs to a label: say which")

    def build(self, model: ScoreModel, c: Labels = None, config: C | None = None) -> Sampler[Any]:
        """The sampler of p(x), or of p(x|c) with labels ``c``, a number or (B,).

        Raises:
            UserError: if the model cannot be driven by it, or a noise level is not the model's.
        """
        self.check(model, c)
        config = self.config() if config is None else config
        return self.make(model, c, config.at_levels_of(model))

    def length(self, sampler: Sampler[Any], config: C) -> int:
        """How many steps are taken: the sampler's own schedule, or what the settings say."""
        return config.steps if sampler.steps is None else sampler.steps

    def resolve_start(self, start: Start, model: ScoreModel, has_data: bool) -> Start:
        """What ``auto`` means for ``model``: the Gaussian of the data where there are any.

        A diffusion model begins with noise that hides an image, and needs none.
        """
        if start != "auto":
            return start
        from_data = has_data and self.starts_from_data and model.schedule is None
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
        """Where chains begin, (B, C, H, W) float32 on the generator's device.

        Samplers that go down noise levels begin with noise of the first one on top of what
        ``config.start`` says.

        Args:
            model: what is sampled.
            sampler: as `build` made it of ``config``.
            config: its settings.
            shape: (B, C, H, W).
            generator: source of what is drawn.
            c: labels, for ``class_gaussian`` of labels; None: of all images.
            data: training images and labels, for ``data`` and ``class_gaussian``.
            mean: of the images that ``noise`` is added to; gray, or the mean image.

        Raises:
            UserError: if data are needed and none are given.
        """
        device, shape, (level, _) = generator.device, tuple(shape), noise_levels(sampler)
        kind = self.resolve_start(config.start, model, data is not None)
        if kind == "uniform":
            return torch.rand(shape, generator=generator, device=device)
        if kind == "noise":
            begin = torch.zeros(shape, device=device) + mean
            level = highest_level(model) if level is None else level
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
        """``x`` without the noise of the last level; ``x`` itself where the end has none.

        A blind model estimates the level, within those it was trained at. A model that was never
        trained to denoise has no such noise: its density is that of the images themselves.
        """
        untrained = model.card is not None and model.card.sigma_range is None
        if not self.noisy_end or untrained:
            return x
        if not model.noise_conditional:
            return blind_denoiser_of(model, c)(x)
        level = noise_levels(sampler)[1]
        return x if level is None else denoiser_of(model, c)(x, level)


SAMPLERS: dict[str, SamplerEntry[Any]] = Table("sampler", {})
"""All samplers, by name; filled by `ebmkit.sampling`."""


def find_sampler(name: str) -> SamplerEntry[Any]:
    """The entry of `SAMPLERS` called ``name``.

    Raises:
        UserError: if there is none; it names the nearest, or the new name of a renamed one.
    """
    check_renamed("sampler", name)
    return find("sampler", SAMPLERS, name)


def default_sampler(model: ScoreModel) -> SamplerEntry[Any]:
    """The sampler for ``model`` where none is asked for.

    ``kadkhodaie_simoncelli`` for blind denoisers, ``ddim`` for those that take the noise level, and
    ``sgld``, JEM's own, for densities that were never trained to denoise.
    """
    able = (entry for entry in SAMPLERS.values() if entry.priority and entry.drives(model))
    return max(able, key=lambda entry: entry.priority)


def noise_levels(sampler: Sampler[Any]) -> tuple[float | None, float | None]:
    """The noise level at which a sampler begins, and that of the images at its end.

    The first is None where there is a single level, both where there is none.
    """
    levels: Sequence[float] = getattr(sampler, "sigmas", ())
    return (levels[0], levels[-1]) if levels else (None, getattr(sampler, "sigma", None))


def takes_labels(model: ScoreModel) -> bool:
    """Whether ``model`` has a score for each label that it was trained on.

    A class-conditional diffusion model has, and is no classifier.
    """
    conditional = not isinstance(model, EnergyModel) and model.num_classes > 0
    return conditional or classifies(model)


def missing(model: ScoreModel, needs: Sequence[Need]) -> str | None:
    """Why ``model`` does not have what a sampler ``needs``, for a sentence; None if it does."""
    plain = f"{type(model).__name__} is a plain denoiser and has no log-density"
    untrained = "it was not trained to denoise, so noise levels mean nothing to it"
    given = "it takes the noise level as an input, and this sampler reads it off a blind denoiser"
    lacking: dict[Need, str] = {
        "density": "" if isinstance(model, EnergyModel) else plain,
        "labels": "" if takes_labels(model) else "it was trained without labels",
        "levels": untrained if model.card and model.card.sigma_range is None else "",
        "blind": given if model.noise_conditional else "",
    }
    return next((lacking[need] for need in needs if lacking.get(need)), None)
