"""Samplers by name: the table that the command line and the tests read.

An entry knows what its sampler needs of a model, makes the sampler at fixed labels, says where
chains start and for how many steps they run, and what is left to do at the end. All noise levels
lie where the model was trained (`ebmkit.ModelCard.sigma_range`); a model in closed form has no
limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.registry import find
from ebmkit.sampling import config as configs
from ebmkit.sampling.base import Sampler
from ebmkit.sampling.config import SamplerConfig, Start
from ebmkit.sampling.factories import (
    make_annealed,
    make_ascent,
    make_ddim,
    make_hmc,
    make_ks,
    make_langevin,
    make_mala,
    make_pc,
    make_sgld,
)
from ebmkit.sampling.inverse import Measurement
from ebmkit.sampling.kadkhodaie import StochasticAscent
from ebmkit.sampling.levels import first_level, highest, last_level
from ebmkit.sampling.requirements import Need, missing
from ebmkit.sampling.seeds import ClassGaussians
from ebmkit.sampling.target import (
    blind_denoiser_of,
    denoiser_of,
)

__all__ = ["SAMPLERS", "SamplerEntry", "find_sampler", "make_restorer"]

C = TypeVar("C", bound=SamplerConfig)
Labels = Tensor | int | None


@dataclass(frozen=True)
class SamplerEntry(Generic[C]):
    """A sampler that has a name.

    Attributes:
        name: of the table.
        about: one line.
        config: its settings; their defaults are for images in [0, 1] and models trained on noise
            of 1 to 100/255.
        needs: what a model must have.
        make: model, labels and settings to the sampler.
        exact: whether its samples have the model's law in the long run, as no other's have.
        noisy_end: whether images at the end carry noise that `finish` takes out.
    """

    name: str
    description: str
    config: type[C]
    needs: tuple[Need, ...]
    make: Callable[[ScoreModel, Labels, C], Sampler[Any]]
    exact: bool = False
    noisy_end: bool = False

    def drives(self, model: ScoreModel) -> bool:
        """Whether it can drive ``model``."""
        return missing(model, self.needs) is None

    def check(self, model: ScoreModel, c: Labels = None) -> None:
        """Whether it can drive ``model``, with labels ``c`` if they are given.

        Raises:
            UserError: if not; it says why, and which samplers can.
        """
        reason = missing(model, self.needs)
        if reason is not None:
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
        return self.make(model, c, self.config() if config is None else config)

    def length(self, sampler: Sampler[Any], config: C) -> int:
        """How many steps are taken: the sampler's own schedule, or what the settings say."""
        return config.steps if sampler.steps is None else sampler.steps

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
            sampler: as `build` made it.
            config: its settings.
            shape: (B, C, H, W).
            generator: source of what is drawn.
            c: labels, for ``seeds`` of labels; None: of all images.
            data: training images and labels, for ``data`` and ``seeds``.
            mean: what noise is laid about; gray, or the mean image.

        Raises:
            UserError: if data are needed and none are given.
        """
        device, level = generator.device, first_level(sampler)
        kind = config.start
        if kind == "auto":
            kind = "noise" if data is None or isinstance(sampler, StochasticAscent) else "seeds"
        if kind == "uniform":
            return torch.rand(tuple(shape), generator=generator, device=device)
        if kind == "noise":
            if isinstance(sampler, StochasticAscent) and sampler.measurement is not None:
                return sampler.start(tuple(shape), generator)
            begin = torch.zeros(tuple(shape), device=device) + mean
            level = highest(model, None) if level is None else level
        else:
            begin = _of_data(kind, shape, generator, c, data).to(device)
        if level is None:
            return begin
        return begin + level * torch.randn(tuple(shape), generator=generator, device=device)

    def finish(
        self, model: ScoreModel, sampler: Sampler[Any], x: Tensor, c: Labels = None
    ) -> Tensor:
        """``x`` without the noise of the last level; ``x`` itself where the end has none.

        A blind model finds the level by itself, within those it was trained at. A model that was
        never trained to denoise has no such noise: its density is that of the images themselves.
        """
        untrained = model.card is not None and model.card.sigma_range is None
        if not self.noisy_end or untrained:
            return x
        if not model.noise_conditional:
            return blind_denoiser_of(model, c)(x)
        level = last_level(sampler)
        return x if level is None else denoiser_of(model, c)(x, level)


def find_sampler(name: str) -> SamplerEntry[Any]:
    """The entry of `SAMPLERS` called ``name``.

    Raises:
        UserError: if there is none; it names the nearest.
    """
    return find("sampler", SAMPLERS, name)


def make_restorer(
    model: ScoreModel,
    measurement: Measurement,
    measured: Tensor,
    config: configs.StochasticAscentConfig | None = None,
    c: Labels = None,
) -> StochasticAscent:
    """The stochastic ascent under linear measurements: images that have exactly these.

    Args:
        model: a blind denoiser.
        measurement: which numbers of an image are known.
        measured: (B, n) or (1, n), what they are.
        config: of the sampler ``ks``.
        c: labels, a number or (B,).

    Raises:
        UserError: if the model cannot be driven by ``ks``, or a noise level is not the model's.
    """
    SAMPLERS["ks"].check(model, c)
    return make_ks(model, c, config or configs.StochasticAscentConfig(), measurement, measured)


def _of_data(
    kind: Start,
    shape: Sequence[int],
    generator: torch.Generator,
    c: Labels,
    data: tuple[Tensor, Tensor | None] | None,
) -> Tensor:
    """Images of the data set, or draws from the Gaussian of a label's, or of all."""
    if data is None:
        raise UserError(f"chains start from {kind}: give images of the data set")
    images, labels = data
    if kind == "data":
        device = generator.device
        at = torch.randint(len(images), (shape[0],), generator=generator, device=device)
        return images[at.to(images.device)]
    if c is None:
        return ClassGaussians(images).sample(shape[0], generator)
    if labels is None:
        raise UserError("seeds of a label are made of its images: give their labels, too")
    wanted = torch.as_tensor(c, device=images.device).expand(shape[0])
    return ClassGaussians(images, labels).sample(shape[0], generator, wanted)


SAMPLERS: dict[str, SamplerEntry[Any]] = {
    entry.name: entry
    for entry in (
        SamplerEntry(
            "langevin",
            "unadjusted Langevin dynamics (ULA) at one noise level",
            configs.LangevinConfig,
            ("score",),
            make_langevin,
            noisy_end=True,
        ),
        SamplerEntry(
            "sgld",
            "Langevin dynamics with less noise than its step requires, as in JEM",
            configs.SGLDConfig,
            ("score",),
            make_sgld,
        ),
        SamplerEntry(
            "mala",
            "Metropolis-adjusted Langevin: exact for the model's density",
            configs.MALAConfig,
            ("density",),
            make_mala,
            exact=True,
            noisy_end=True,
        ),
        SamplerEntry(
            "hmc",
            "Hamiltonian Monte Carlo: exact for the model's density, with longer moves",
            configs.HMCConfig,
            ("density",),
            make_hmc,
            exact=True,
            noisy_end=True,
        ),
        SamplerEntry(
            "annealed-langevin",
            "Langevin dynamics over decreasing noise levels (Song & Ermon 2019)",
            configs.AnnealedConfig,
            ("levels",),
            make_annealed,
            noisy_end=True,
        ),
        SamplerEntry(
            "pc",
            "predictor-corrector over decreasing noise levels (Song et al. 2021)",
            configs.PCConfig,
            ("levels",),
            make_pc,
            noisy_end=True,
        ),
        SamplerEntry(
            "ddpm",
            "ancestral sampling at every timestep of a diffusion schedule (Ho et al. 2020)",
            configs.DDPMConfig,
            ("levels",),
            make_ddim,
        ),
        SamplerEntry(
            "ddim",
            "deterministic sampling at some timesteps of a diffusion schedule (Song et al. 2021)",
            configs.DDIMConfig,
            ("levels",),
            make_ddim,
        ),
        SamplerEntry(
            "ks",
            "stochastic ascent with a blind denoiser (Kadkhodaie & Simoncelli 2021)",
            configs.StochasticAscentConfig,
            ("levels", "blind"),
            make_ks,
        ),
        SamplerEntry(
            "ascent",
            "gradient ascent to a label (Santurkar et al. 2019)",
            configs.AscentConfig,
            ("density", "labels"),
            make_ascent,
        ),
    )
}
"""All samplers, by name."""
