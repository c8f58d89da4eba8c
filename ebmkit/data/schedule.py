r"""Settings of a stream, and batch and crop sizes that change during a run.

Training may start with many small crops and end with few large ones (CDN appendix A, after
Restormer, arXiv 2111.09881). A *phase* begins after a share :math:`a_k` of the run's T steps, at
step :math:`t_k = \operatorname{round}(a_k T)`, with batches of :math:`B_k` images. Samples are
numbered consecutively: step :math:`t \ge t_k` of phase k holds the numbers

.. math:: n_k + (t - t_k) B_k, \dots, n_k + (t - t_k + 1) B_k - 1, \qquad
    n_{k+1} = n_k + (t_{k+1} - t_k) B_k, \quad t_0 = n_0 = 0 ,

so a batch is still a function of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ebmkit.data.augment import Augmentation
from ebmkit.errors import UserError
from ebmkit.noise import NoiseLaw, parse_fraction


def parse_share(value: object, of_decay: bool = False) -> float:
    """Read a share of a run's steps from ``0.5``, ``"0.5"`` or ``"150/400"``.

    Args:
        value: number or text.
        of_decay: whether it is the share over which the learning rate decays, which may be 1.

    Raises:
        UserError: if it does not parse or is out of range.
    """
    share, given = parse_fraction(value), repr(str(value).strip())
    if share is not None and (0 < share < 1 or (of_decay and share == 1)):
        return share
    if of_decay:
        raise UserError(
            "the share of the steps, at the end, over which the rate falls is above 0 and at most "
            f"1, as 0.2 or 100/400, not {given}"
        )
    raise UserError(
        f"a share of the run's steps is between 0 and 1, as 150/400, not {given}: "
        "phases and milestones begin after one"
    )


class Phase(BaseModel):
    """Batch and crop size from a given step on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Annotated[float, BeforeValidator(parse_share)] = Field(
        description="share of the run's steps after which the phase begins, for example 150/400"
    )
    batch_size: int = Field(ge=1, description="images per step, over all processes")
    crop_size: int | None = Field(
        None, ge=1, description="height and width of the crop, pixels; null: those of the stream"
    )


class StreamConfig(BaseModel):
    """Settings of a stream: batch size, augmentation, noise and phases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(64, ge=1, description="images per step, over all processes")
    augmentation: Augmentation = Field(
        Augmentation(), description="augmentation: flips, crops, mixing"
    )
    noise: NoiseLaw = Field(NoiseLaw(), description="distribution of the noise level")
    phases: tuple[Phase, ...] = Field(
        (), description="later batch and crop sizes, for example [{after: 1/2, batch_size: 32}]"
    )

    @model_validator(mode="after")
    def _check(self) -> StreamConfig:
        begins = [phase.after for phase in self.phases]
        if any(b <= a for a, b in itertools.pairwise(begins)):
            raise UserError(
                "phases must begin one after the other: "
                f"{', '.join(f'{b:g}' for b in begins)} does not rise"
            )
        return self

    def spans(self, steps: int | None = None) -> tuple[Span, ...]:
        """Spans of a run of ``steps`` steps; the first has the stream's own sizes.

        Raises:
            UserError: if there are phases and ``steps`` is None.
        """
        own = self.augmentation.crop_size
        found = [Span(0, 0, 0, self.batch_size, own)]
        if self.phases and steps is None:
            raise UserError("a stream with phases needs the number of steps of the run")
        for number, phase in enumerate(self.phases, 1):
            last, start = found[-1], round(phase.after * (steps or 0))
            first = last.first + (start - last.start) * last.batch_size
            found.append(Span(number, start, first, phase.batch_size, phase.crop_size or own))
        return tuple(found)


class Span(NamedTuple):
    """A phase of a stream in a run of known length, in steps.

    Attributes:
        number: 0 for the stream's own sizes, k for its k-th phase.
        start: first step.
        first: number of the first sample of that step.
        batch_size: images per step, over all processes.
        crop_size: side of the crop, pixels; None: no crop.
    """

    number: int
    start: int
    first: int
    batch_size: int
    crop_size: int | None

    def field(self, stream: str) -> str:
        """Name of the configuration field with the sizes, for messages."""
        return f"streams.{stream}" + (f".phases[{self.number - 1}]" if self.number else "")


class Stage(NamedTuple):
    """Steps of a run in which no stream changes its sizes.

    Attributes:
        start, stop: first step, and the step after the last.
        spans: stream name -> its span.
    """

    start: int
    stop: int
    spans: dict[str, Span]

    @property
    def fields(self) -> dict[str, str]:
        """Stream name -> configuration field with its sizes."""
        return {name: span.field(name) for name, span in self.spans.items()}

    @property
    def images_per_step(self) -> int:
        """Images per step, over all streams and processes."""
        return sum(span.batch_size for span in self.spans.values())


def span_at(spans: Sequence[Span], step: int) -> Span:
    """The span that contains ``step``."""
    return next(span for span in reversed(spans) if span.start <= step)


def stages(streams: Mapping[str, StreamConfig], steps: int) -> tuple[Stage, ...]:
    """Stages of a run of ``steps`` steps, in order; a single one if no stream has phases."""
    spans = {name: config.spans(steps) for name, config in streams.items()}
    begins = sorted({span.start for own in spans.values() for span in own if span.start < steps})
    return tuple(
        Stage(start, stop, {name: span_at(own, start) for name, own in spans.items()})
        for start, stop in zip(begins, [*begins[1:], steps], strict=True)
    )


def stage_at(plan: Sequence[Stage], step: int) -> int:
    """Index of the stage that contains ``step``; the last one for later steps."""
    return max(number for number, stage in enumerate(plan) if stage.start <= step)


def images_between(plan: Sequence[Stage], start: int, stop: int) -> int:
    """Number of images in steps ``start`` .. ``stop`` - 1, over all streams and processes."""
    taken = (range(max(stage.start, start), min(stage.stop, stop)) for stage in plan)
    return sum(len(own) * s.images_per_step for own, s in zip(taken, plan, strict=True))
