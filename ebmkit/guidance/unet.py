"""The UNet of a pipeline, guided; `ebmkit.guidance.diffusers` has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebmkit.energy import EnergyModel, Noise
from ebmkit.errors import UserError
from ebmkit.guidance.combine import Guidance, View, guided_noise
from ebmkit.guidance.config import CLASSIFIER_FREE, GuidanceConfig
from ebmkit.guidance.pipelines import (
    NOISE_ALONE,
    PREDICTIONS,
    as_guide,
    check_unet,
    clipped,
    from_noise,
    in_precision_of,
    labels_of,
    rows_of,
    schedule_of,
    sizes,
    to_noise,
)

__all__ = ["GuidedUNet"]


def _nothing(v: Tensor, sigma: Noise | None = None) -> tuple[Tensor, Tensor]:
    raise AssertionError("classifier-free guidance has no guide")


class GuidedUNet(nn.Module):
    """A UNet of `diffusers` whose prediction is guided, for pipelines and loops of one's own.

    It is called as the UNet is, ``(sample, timestep, ...)``, gives what that gives, and passes
    other attributes on to it. A timestep is a number or tensor, of all images or one of each,
    between two of the schedule's where a scheduler asks for that.

    Args:
        unet: predicts noise, v or clean images at u_t (B, C, H, W), and perhaps C variances.
        scheduler: of `diffusers`; its ``alphas_cumprod`` and ``prediction_type`` are read.
        model: as for `guided`.
        label: as for `guided`.
        config: how it is guided.
        means: as for `guided`.
        classifier_free: as for `guided`.
        null_label: as for `guided`.
        image_range: as for `guided`.
        clip: as for `guided`.

    Raises:
        UserError: as `guided`.

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
        how = config or GuidanceConfig()
        self.unet = unet
        self.schedule = schedule_of(scheduler, image_range)
        self.prediction = str(getattr(scheduler.config, "prediction_type", None) or "epsilon")
        if self.prediction not in PREDICTIONS:
            raise UserError(
                f"the scheduler's prediction_type {self.prediction!r} is not known: "
                f"{', '.join(PREDICTIONS)} are"
            )
        clips = getattr(scheduler.config, "clip_sample", False) if clip is None else clip
        limit = getattr(scheduler.config, "clip_sample_range", None) or 1.0
        self.limit: float | None = float(limit) if clips else None
        self.channels = check_unet(unet)
        self.label: int | Tensor = labels_of(label)
        self.guide: EnergyModel | None = None
        self.how, self.means = how, means
        self.mixing: Guidance | None = None
        embedded = getattr(unet.config, "num_class_embeds", None)
        if how.guidance == CLASSIFIER_FREE:
            if model is not None or classifier_free is not None:
                raise UserError(
                    f"{CLASSIFIER_FREE} guidance takes no guide: give None as the model"
                )
            self.mixing = Guidance(
                _nothing, how.scale, how.schedule, late=how.late, diffusion=self.schedule
            )
        elif model is None:
            raise UserError(f"guidance {how.guidance!r} needs a guide: give a classifier")
        else:
            self.guide = as_guide(model, unet, self.channels)
            self.guidance(self.label)  # settings and labels that do not suit it are refused
            if classifier_free is not None:
                self.mixing = Guidance(_nothing, classifier_free, diffusion=self.schedule)
        if embedded is None and self.mixing is not None:
            raise UserError(
                f"{CLASSIFIER_FREE} guidance needs a class-conditional UNet, and this one has no "
                "num_class_embeds: give a guide"
            )
        self.null_label = -1
        if embedded is not None:
            self.null_label = embedded - 1 if null_label is None else null_label
            top = int(torch.as_tensor(self.label).max())
            lowest = int(torch.as_tensor(self.label).min())
            if lowest < 0 or top >= embedded or not 0 <= self.null_label < embedded:
                raise UserError(
                    f"label {top if top >= embedded else lowest} or null label {self.null_label} "
                    f"is out of range: this UNet knows 0 to {embedded - 1}"
                )
        self.embedded = embedded is not None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unet":
                raise
            return getattr(self.unet, name)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """The guided prediction, as the UNet's own output; no gradients go back through it.

        Args:
            sample: u_t (B, C, H, W).
            timestep: a number, or a tensor of one or of (B,).
            *args: passed on to the UNet.
            return_dict: whether an output with ``sample`` is wanted, or a tuple.
            **kwargs: passed on to the UNet.

        Raises:
            UserError: if there are other labels than images, the images have another size than the
                guide takes, a timestep is out of range, or the guide is on another device.
        """
        self._check_sample(sample)
        batch, parts, kind = len(sample), [], None
        for rows, t in self._parts(timestep, batch):
            told = (
                timestep[rows]
                if isinstance(timestep, Tensor) and timestep.numel() > 1
                else timestep
            )
            given = [rows_of(value, rows, batch) for value in args]
            named = {key: rows_of(value, rows, batch) for key, value in kwargs.items()}
            part = _Part(self, sample[rows], t, told, self._of(rows, sample), given, named)
            parts.append(part.run())
            kind = part.kind
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not return_dict:
            return (out,)
        return out if kind is None else kind(sample=out)

    def guidance(self, labels: int | Tensor) -> Guidance | None:
        """The guidance to ``labels``; None of a UNet that is only mixed."""
        how, guide, make = self.how, self.guide, self.how.entry.make
        if guide is None or make is None:
            return None
        view: View = how.view or ("noisy" if guide.noise_conditional else "shrunk")
        if guide.noise_conditional and view == "shrunk":
            raise UserError(
                "this guide takes the noise level and shrinks images itself: take the view noisy"
            )
        raised = in_precision_of(guide, make(guide, labels, how.settings, self.means))
        return Guidance(raised, how.scale, how.schedule, view, how.through, how.late, self.schedule)

    def _check_sample(self, sample: Tensor) -> None:
        if self.guide is None:
            return
        own = next(self.guide.parameters(), None)
        if own is not None and own.device != sample.device:
            raise UserError(
                f"the guide is on {own.device} and the pipeline on {sample.device}: move it, as in "
                f"model.to({str(sample.device)!r})"
            )
        size = self.guide.card.image_size if self.guide.card else None
        if size and tuple(sample.shape[-2:]) != tuple(size):
            raise UserError(sizes(tuple(sample.shape[-2:]), size))

    def _parts(self, timestep: Tensor | float, batch: int) -> list[tuple[slice, float]]:
        """Neighbouring images of one timestep and, at most, one set of labels."""
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).tolist()
        if len(times) not in (1, batch):
            raise UserError(f"{batch} images need 1 timestep or {batch}, not {len(times)}")
        each = times * batch if len(times) == 1 else times
        count = batch
        if isinstance(self.label, Tensor):
            count = len(self.label)
            if batch % count:
                raise UserError(f"there are {count} labels and {batch} images: give one for each")
        cuts = [0]
        for i in range(1, batch):
            if i % count == 0 or each[i] != each[i - 1]:
                cuts.append(i)
        return [(slice(a, b), each[a]) for a, b in zip(cuts, [*cuts[1:], batch], strict=True)]

    def _of(self, rows: slice, sample: Tensor) -> Tensor:
        """The labels of some images, (b,) on their device."""
        count = rows.stop - rows.start
        if not isinstance(self.label, Tensor):
            return torch.full((count,), self.label, device=sample.device)
        start = rows.start % len(self.label)
        return self.label[start : start + count].to(sample.device)


@dataclass
class _Part:
    """One call: images ``u`` (b, C, H, W) of one timestep ``t``, which the UNet is ``told``."""

    owner: GuidedUNet
    u: Tensor
    t: Any  # a whole number, or between two
    told: Any
    labels: Tensor
    args: list[Any]
    kwargs: dict[str, Any]
    kind: Any = None

    def run(self) -> Tensor:
        """The UNet's output with its prediction guided."""
        owner, channels = self.owner, self.owner.channels
        guidance, abar = owner.guidance(self.labels), owner.schedule.abar(self.t)
        if guidance is None or abar < NOISE_ALONE:
            return self.predicted(self.u)
        outs: list[Tensor] = []
        noises: list[Tensor] = []

        def noise(u: Tensor, t: int) -> Tensor:
            outs.append(self.predicted(u.to(self.u.dtype)))
            noises.append(to_noise(outs[0][:, :channels].to(u.dtype), u, abar, owner.prediction))
            return noises[0]

        wide = self.u if self.u.dtype == torch.float64 else self.u.float()
        found = guided_noise(noise, owner.schedule, guidance)(wide, self.t)
        out, hat = outs[0].detach(), found.detach()
        if found is noises[0]:
            return out
        if owner.limit is not None:
            hat = clipped(hat, wide, abar, owner.limit)
        change = hat - noises[0].detach()
        first = from_noise(out[:, :channels].to(hat.dtype), hat, change, abar, owner.prediction)
        return torch.cat([first.to(out.dtype), out[:, channels:]], dim=1)

    def predicted(self, u: Tensor) -> Tensor:
        """What the UNet says at ``u``, (b, C or 2C, H, W), mixed with that of no label."""
        owner = self.owner
        if not owner.embedded:
            return self.called(u, {})
        labels = self.kwargs.get("class_labels")
        labels = self.labels if labels is None else labels
        weight = 1.0 if owner.mixing is None else owner.mixing.weight_at(self.t)
        if weight == 1:
            return self.called(u, {"class_labels": labels})
        plain = self.called(u, {"class_labels": torch.full_like(labels, owner.null_label)})
        if weight == 0:
            return plain
        out, channels = self.called(u, {"class_labels": labels}), owner.channels
        first, other = out[:, :channels], plain[:, :channels]
        return torch.cat([other + weight * (first - other), out[:, channels:]], dim=1)

    def called(self, u: Tensor, more: dict[str, Any]) -> Tensor:
        out = self.owner.unet(u, self.told, *self.args, **{**self.kwargs, **more})
        if isinstance(out, Tensor):
            return out
        if isinstance(out, tuple):
            first: Tensor = out[0]
            return first
        self.kind = type(out)
        sample: Tensor = out.sample
        return sample
