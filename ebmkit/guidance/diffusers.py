r"""Guidance of `diffusers` pipelines by a classifier, energy model or joint model.

A pipeline calls its UNet for a prediction at (u_t, t); its scheduler does the rest. `GuidedUNet`
wraps the UNet and guides the prediction, so it works with any scheduler (DDPM, DDIM, DPM-Solver,
Euler, ...). It has the configuration, dtype and call signature of the UNet. With
:math:`\bar\alpha` of the scheduler and images in [a, b], usually [-1, 1], the noise is an affine
function of each prediction,

.. math::
    \hat\epsilon = \sqrt{\bar\alpha}\,\hat v + \sqrt{1 - \bar\alpha}\,u
                 = (u - \sqrt{\bar\alpha}\,\hat u_0) / \sqrt{1 - \bar\alpha}
                 = p \cdot \text{prediction} + q\,u ,

guidance changes the noise by :math:`\Delta = -s\,g(t)\,\nabla_u h` (`ebmkit.guidance.guided_noise`;
the guide gets images in [0, 1]), and so the prediction by :math:`\Delta / p`.

Additional output channels are variances and are not changed. If u_t is pure noise
(:math:`\bar\alpha` below 1e-7, as at the end of a rescaled schedule), the guide is not applied.

If the scheduler clips the predicted clean image, the guided noise is recomputed from the clipped
image (``clip``): the DDIM scheduler of `diffusers` keeps the unclipped noise, and under strong
guidance this mismatch pushes the image *away* from the label. A class-conditional UNet gets the
label as an input; ``classifier_free`` = w mixes its predictions as in `ebmkit.guidance.score`.

>>> guided(pipeline, classifier, label=3, scale=4)(batch_size=16)        # doctest: +SKIP
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ebmkit.energy import EnergyModel, Noise
from ebmkit.errors import UserError, first_line
from ebmkit.guidance.guides import CLASSIFIER_FREE, check_guide
from ebmkit.guidance.model import LogitModel
from ebmkit.guidance.score import Guidance, GuidanceConfig, View, guided_noise, make_guidance
from ebmkit.noise import Schedule
from ebmkit.sampling.base import DensityFunction

LATENT = ("vae", "vqvae", "vqgan", "movq", "prior")
"""Components that only latent pipelines have."""

PREDICTIONS: dict[str, Callable[[float], tuple[float, float]]] = {
    "epsilon": lambda abar: (1.0, 0.0),
    "v_prediction": lambda abar: (math.sqrt(abar), math.sqrt(1 - abar)),
    "sample": lambda abar: (-math.sqrt(abar / (1 - abar)), 1 / math.sqrt(1 - abar)),
}
"""By prediction type, abar to (p, q) of noise = p * prediction + q * u_t."""

MIN_ABAR = 1e-7
"""Smallest abar at which a guide is applied; below it u_t is pure noise."""

P = TypeVar("P")


def guided(
    pipeline: P,
    model: nn.Module | None,
    label: int | Tensor | Sequence[int],
    guidance: str = "energy",
    scale: float = 1.0,
    schedule: str = "exact",
    view: View | None = None,
    *,
    backpropagate: bool = False,
    start: float = 0.0,
    means: Sequence[float] | None = None,
    classifier_free: float | None = None,
    null_label: int | None = None,
    image_range: tuple[float, float] = (-1.0, 1.0),
    clip: bool | None = None,
    **settings: Any,
) -> P:
    """Return a copy of ``pipeline`` whose samples are guided to ``label``.

    The copy shares the weights and has its own scheduler; ``pipeline`` is not changed. Guiding the
    copy again adds another guide. ``guidance``, ``scale``, ``schedule``, ``view``,
    ``backpropagate`` and ``start`` are fields of `ebmkit.guidance.GuidanceConfig`.

    Args:
        pipeline: `diffusers` pipeline with a UNet on images, such as DDPMPipeline or DDIMPipeline.
        model: classifier or joint model of ebmkit, or any network from images in [0, 1] to logits
            (`LogitModel` for other ranges); None for ``classifier-free``.
        label: one label for all images, or one per image, (B,).
        means: (C,) mean E over each label's training images, for ``dual``.
        classifier_free: weight w for a class-conditional UNet, in addition to a guide; None: no
            mixing.
        null_label: label that means "no label" to the UNet; None: its last one.
        image_range: range of clean images of the UNet.
        clip: whether to clip the guided prediction of the clean image to the scheduler's
            ``clip_sample_range`` and recompute the noise; None: if the scheduler clips.
        **settings: settings of the guide, such as n and gamma of ``pgd``.

    Raises:
        UserError: if the pipeline works on latents or has no UNet, UNet and guide differ in size,
            channels or labels, or a setting is invalid.

    >>> images = guided(pipeline, robust, 3, "pgd", scale=4, n=20)()     # doctest: +SKIP
    """
    name = type(pipeline).__name__
    for part in LATENT:
        if getattr(pipeline, part, None) is not None:
            raise UserError(
                f"{name} works on latents (it has {part!r}), and a guide takes images: use a "
                "pipeline on pixels, such as DDPMPipeline"
            )
    for part in ("unet", "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise UserError(f"{name} has no {part}: use a diffusers pipeline with a UNet")
    config = make_guidance(
        guidance=guidance, scale=scale, schedule=schedule, view=view, backpropagate=backpropagate,
        start=start, options=settings,
    )  # fmt: skip
    made: Any = copy.copy(pipeline)
    made.scheduler = copy.deepcopy(made.scheduler)
    made.unet = GuidedUNet(
        made.unet, made.scheduler, model, label, config, means=means, null_label=null_label,
        classifier_free=classifier_free, image_range=image_range, clip=clip,
    )  # fmt: skip
    result: P = made
    return result


class GuidedUNet(nn.Module):
    """A `diffusers` UNet whose prediction is guided, for pipelines and custom loops.

    It has the call signature ``(sample, timestep, ...)``, outputs and attributes of the UNet. A
    timestep is a number or tensor, for all images or one per image, and may be fractional.

    Args:
        unet: network that predicts noise, v or clean images at u_t (B, C, H, W), and optionally C
            variances.
        scheduler: `diffusers` scheduler, for its ``alphas_cumprod`` and ``prediction_type``.
        model: as in `guided`, as are ``label`` and all keyword arguments.
        config: settings of guidance.

    Raises:
        UserError: as in `guided`.

    >>> unet = GuidedUNet(pipeline.unet, pipeline.scheduler, robust, 3)  # doctest: +SKIP
    >>> unet(u, t).sample                                                # doctest: +SKIP
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        model: nn.Module | None,
        label: int | Tensor | Sequence[int],
        config: GuidanceConfig | None = None,
        *,
        means: Sequence[float] | None = None,
        classifier_free: float | None = None,
        null_label: int | None = None,
        image_range: tuple[float, float] = (-1.0, 1.0),
        clip: bool | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.guidance_config, self.means = unet, config or GuidanceConfig(), means
        self.schedule = schedule_of(scheduler, image_range)
        self.prediction = str(getattr(scheduler.config, "prediction_type", None) or "epsilon")
        if self.prediction not in PREDICTIONS:
            raise UserError(
                f"the scheduler's prediction_type {self.prediction!r} is not known: "
                f"use one of {', '.join(PREDICTIONS)}"
            )
        clips = getattr(scheduler.config, "clip_sample", False) if clip is None else clip
        limit = getattr(scheduler.config, "clip_sample_range", None) or 1.0
        self.limit: float | None = float(limit) if clips else None
        self.channels, embedded = _check_unet(unet)
        self.label = _check_labels(label)
        self.guide = None if model is None else _check_guide(model, unet, self.channels)
        own = self.guidance(self.label)  # raises for invalid settings and labels
        if self.guide is None and classifier_free is not None:
            raise UserError("classifier_free needs a guide: without one, give w as scale")
        self.mixing = own if self.guide is None else None
        if classifier_free is not None:
            self.mixing = Guidance(None, classifier_free, diffusion=self.schedule)
        if embedded is None and self.mixing is not None:
            raise UserError(
                f"{CLASSIFIER_FREE} guidance needs a class-conditional UNet, and this one has no "
                "num_class_embeds: give a guide"
            )
        self.embedded, self.null_label = embedded is not None, -1
        if embedded is not None:
            self.null_label = embedded - 1 if null_label is None else null_label
            lowest, top = (int(v) for v in torch.as_tensor(self.label).aminmax())
            if lowest < 0 or top >= embedded or not 0 <= self.null_label < embedded:
                raise UserError(
                    f"label {top if top >= embedded else lowest} or null label {self.null_label} "
                    f"is out of range: this UNet knows 0 to {embedded - 1}"
                )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unet":
                raise
            return getattr(self.unet, name)

    def guidance(self, labels: int | Tensor) -> Guidance:
        """The guidance to ``labels``."""
        found = self.guidance_config.build(self.guide, labels, self.means, self.schedule)
        if self.guide is None or found.guide is None:
            return found
        return replace(found, guide=_in_precision_of(self.guide, found.guide))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The guided prediction in the UNet's output type; it has no gradients.

        ``sample`` is u_t (B, C, H, W), ``timestep`` a number, or a tensor with one entry or (B,).
        If ``return_dict`` is False, the output is a tuple. The UNet gets all other arguments.

        Raises:
            UserError: if the numbers of labels and images do not match, the guide takes another
                image size, a timestep is out of range, or the guide is on another device.
        """
        batch, outs, kind = len(sample), [], None
        labels = self._check_sample(sample)
        for part, t in _parts(timestep, batch):

            def own(value: Any, part: slice = part) -> Any:
                """The part of an argument that belongs to these images."""
                each = isinstance(value, Tensor) and value.ndim and len(value) == batch
                return value[part] if each else value

            at, given = own(timestep), [own(value) for value in args]
            named = {key: own(value) for key, value in kwargs.items()}

            def call(u: Tensor, more: dict[str, Tensor]) -> Tensor:
                nonlocal kind
                out = self.unet(u, at, *given, **{**named, **more})  # noqa: B023
                if not isinstance(out, Tensor | tuple):
                    kind, out = type(out), out.sample
                found: Tensor = out[0] if isinstance(out, tuple) else out
                return found

            c = named.get("class_labels")
            outs.append(self._guided(sample[part], t, labels[part], c, call))
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        if not return_dict:
            return (out,)
        return out if kind is None else kind(sample=out)

    def _guided(
        self, u: Tensor, t: Any, labels: Tensor, own: Tensor | None, call: Callable[..., Tensor]
    ) -> Tensor:
        """The UNet's output for images ``u`` of one timestep ``t``, with guided prediction.

        ``labels`` (b,) are the labels of guidance, ``own`` the UNet's ``class_labels``, if any;
        ``call`` calls the UNet with images and additional arguments.
        """
        abar, channels = self.schedule.abar(t), self.channels

        def predict(u: Tensor) -> Tensor:
            """The UNet's output (b, C or 2C, H, W), after classifier-free mixing."""
            if not self.embedded:
                return call(u, {})
            c = labels if own is None else own
            weight = 1.0 if self.mixing is None else self.mixing.weight_at(t)
            if weight == 1:
                return call(u, {"class_labels": c})
            plain = call(u, {"class_labels": torch.full_like(c, self.null_label)})
            if weight == 0:
                return plain
            out = call(u, {"class_labels": c})
            first, other = out[:, :channels], plain[:, :channels]
            return torch.cat([other + weight * (first - other), out[:, channels:]], dim=1)

        if self.guide is None or abar < MIN_ABAR:
            return predict(u)
        outs: list[Tensor] = []
        noises: list[Tensor] = []
        p, q = PREDICTIONS[self.prediction](abar)

        def noise(wide: Tensor, t: int) -> Tensor:
            outs.append(predict(wide.to(u.dtype)))
            noises.append(p * outs[0][:, :channels].to(wide.dtype) + q * wide)
            return noises[0]

        wide = u if u.dtype == torch.float64 else u.float()
        found = guided_noise(noise, self.schedule, self.guidance(labels))(wide, t)
        out, hat, plain = outs[0].detach(), found.detach(), noises[0].detach()
        if found is noises[0]:  # guidance is off at this timestep
            return out
        if self.limit is not None:  # derive the noise from the clipped image
            clean = (wide - math.sqrt(1 - abar) * hat) / math.sqrt(abar)
            clean = clean.clamp(-self.limit, self.limit)
            hat = (wide - math.sqrt(abar) * clean) / math.sqrt(1 - abar)
        first = out[:, :channels].to(hat.dtype) + (hat - plain) / p
        return torch.cat([first.to(out.dtype), out[:, channels:]], dim=1)

    def _check_sample(self, sample: Tensor) -> Tensor:
        """Check device and size of ``sample``, and return its labels (B,)."""
        own = None if self.guide is None else next(self.guide.parameters(), None)
        if own is not None and own.device != sample.device:
            raise UserError(
                f"the guide is on {own.device} and the pipeline on {sample.device}: move it, as in "
                f"model.to({str(sample.device)!r})"
            )
        if self.guide is not None:
            _check_size(tuple(sample.shape[-2:]), self.guide)
        labels = torch.as_tensor(self.label).reshape(-1)
        repeats, rest = divmod(len(sample), len(labels))
        if rest:
            count = f"{len(labels)} labels and {len(sample)} images"
            raise UserError(f"there are {count}: give one for each")
        return labels.repeat(repeats).to(sample.device)


def _parts(timestep: Tensor | float, batch: int) -> list[tuple[slice, float]]:
    """Slices of consecutive images with the same timestep, each with that timestep."""
    times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).tolist()
    if len(times) not in (1, batch):
        raise UserError(f"{batch} images need 1 timestep or {batch}, not {len(times)}")
    each = times * batch if len(times) == 1 else times
    cuts = [0, *(i for i in range(1, batch) if each[i] != each[i - 1]), batch]
    return [(slice(a, b), each[a]) for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True)
class _Levels(Schedule):
    """A scheduler's noise levels, interpolated between timesteps."""

    def abar(self, t: float) -> float:
        low = math.floor(t)
        if t == low:
            return super().abar(low)
        before, after = (math.sqrt((1 - a) / a) for a in map(super().abar, (low, low + 1)))
        level = before + (t - low) * (after - before)  # linear, as in diffusers' Euler scheduler
        return 1 / (1 + level**2)


def schedule_of(scheduler: Any, image_range: tuple[float, float] = (-1.0, 1.0)) -> Schedule:
    """The noise levels of a `diffusers` ``scheduler``, to the precision of ``alphas_cumprod``.

    Raises:
        UserError: if it has no ``alphas_cumprod``, so that its model's input is not u_t.
    """
    abar = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(abar, Tensor) or not len(abar):
        raise UserError(
            f"{type(scheduler).__name__} has no alphas_cumprod: only schedulers of "
            "variance-preserving diffusion can be guided, such as DDPM, DDIM and DPM-Solver"
        )
    known = abar.detach().double().cpu().clamp_min(MIN_ABAR / 2)
    before = torch.cat([known.new_ones(1), known[:-1]])
    return _Levels((1 - known / before).clamp(1e-12, 1 - 1e-12), image_range)


def _in_precision_of(model: nn.Module, guide: DensityFunction) -> DensityFunction:
    """``guide`` computed in the dtype of the model's parameters; results in the dtype of v."""
    own = next(model.parameters(), None)
    if own is None:
        return guide

    def cast(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
        level = sigma.to(own.dtype) if isinstance(sigma, Tensor) else sigma
        value, gradient = guide(v.to(own.dtype), level)
        return value.to(v.dtype), gradient.to(v.dtype)

    return cast


def _check_unet(unet: nn.Module) -> tuple[int, int | None]:
    """Number of image channels C, and number of class embeddings, if any."""
    config: Any = getattr(unet, "config", None)
    taken, given = (getattr(config, name, None) for name in ("in_channels", "out_channels"))
    if not isinstance(taken, int) or given not in (taken, 2 * taken):
        raise UserError(
            f"{type(unet).__name__} takes {taken} channels and gives {given}: it must return as "
            "many as it takes, or twice as many with variances"
        )
    return taken, getattr(config, "num_class_embeds", None)


def _check_labels(label: int | Tensor | Sequence[int]) -> int | Tensor:
    found = torch.as_tensor(label).detach().cpu()
    fractional = found.is_floating_point() or found.dtype == torch.bool
    if fractional or found.ndim > 1 or not found.numel():
        raise UserError(f"label {label} must be a whole number, or one for each image")
    return int(found) if found.ndim == 0 else found.long()


def _check_guide(model: nn.Module, unet: Any, channels: int) -> EnergyModel:
    """Check ``model``, and return it as a guide for the UNet's images."""
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(model).__name__} is no network and cannot guide")
    random = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(m, random) and m.training for m in model.modules()):
        raise UserError(
            "the guide is in training mode, and BatchNorm or dropout would change its output: call "
            "model.eval()"
        )
    size = getattr(unet.config, "sample_size", None)
    known = (size, size) if isinstance(size, int) else tuple(size) if size else None
    guide = model if isinstance(model, EnergyModel) else _wrap_network(model, channels, known)
    check_guide(guide)
    taken = guide.in_channels or (guide.card.channels if guide.card else None)
    if taken is not None and taken != channels:
        what = f"the pipeline makes images of {channels} channel(s), and this guide takes {taken}"
        raise UserError(f"{what}: give one trained on such images")
    if known:
        _check_size(known, guide)
    return guide


def _check_size(size: tuple[int, ...], guide: EnergyModel) -> None:
    trained = guide.card.image_size if guide.card else None
    if trained and tuple(trained) != size:
        raise UserError(
            f"the pipeline makes images of {size[0]}x{size[1]}, and this guide was trained on "
            f"{trained[0]}x{trained[1]}: give one trained on such images"
        )


def _wrap_network(model: nn.Module, channels: int, size: tuple[int, ...] | None) -> LogitModel:
    """Wrap a custom network; its logits for a black image give the number of labels."""
    if size is None:
        raise UserError("the UNet's config has no sample_size: wrap the network in LogitModel")
    own = next(model.parameters(), torch.empty(0))
    black = torch.zeros(1, channels, *size, dtype=own.dtype, device=own.device)
    try:
        with torch.no_grad():
            logits = model(black)
    except (RuntimeError, TypeError, ValueError) as error:
        what = f"the network does not take an image {tuple(black.shape[1:])}"
        raise UserError(f"{what}: {first_line(error)}") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise UserError(
            "the network must return only logits (B, labels): wrap it in a module that does"
        )
    return LogitModel(model, logits.shape[1], in_channels=channels)
