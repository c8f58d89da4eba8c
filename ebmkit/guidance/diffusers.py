r"""Guidance of the pipelines of `diffusers`, by any classifier, energy model or joint model.

A pipeline asks its UNet for a prediction at (u_t, t) and leaves the rest to its scheduler. So a
UNet whose prediction is guided guides the pipeline, whatever the scheduler (DDPM, DDIM,
DPM-Solver, Euler, ...). `GuidedUNet` is one: it has the configuration, type and signature of the
UNet that it wraps. With :math:`\bar\alpha` of the scheduler and images in [a, b], usually
[-1, 1], each prediction is an affine function of the noise,

.. math::
    \hat\epsilon = \sqrt{\bar\alpha}\,\hat v + \sqrt{1 - \bar\alpha}\,u
                 = (u - \sqrt{\bar\alpha}\,\hat u_0) / \sqrt{1 - \bar\alpha} ,

guidance changes the noise by :math:`\Delta = -s\,g(t)\,\nabla_u h` (`ebmkit.guidance.guided_noise`,
where the guide sees images in [0, 1]), and so the prediction by

============== =====================================================
``epsilon``    :math:`\Delta`
``v_prediction`` :math:`\Delta / \sqrt{\bar\alpha}`
``sample``     :math:`-\Delta\,\sqrt{(1 - \bar\alpha)/\bar\alpha}`
============== =====================================================

Channels beyond the images' own are variances, and stay. Where there is noise alone
(:math:`\bar\alpha` below 1e-7, as at the end of a rescaled schedule), a guide sees nothing, and the
prediction stays.

Schedulers that clip the predicted clean image, as those of DDPM's models do, must clip the guided
one, and DDIM's of `diffusers` keeps the noise as it was predicted. Under strong guidance the two
then disagree, and what is cut off pushes *away* from the label. So the guided noise is derived from
the clipped image here (``clip``), as DDPM does in any case.

A class-conditional UNet gets the label itself, or with ``classifier_free`` = w the mixture
:math:`\hat\epsilon_u + w(\hat\epsilon_c - \hat\epsilon_u)`; its own label for none is the last.

>>> guided(pipeline, classifier, label=3, scale=4)(batch_size=16)        # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from ebmkit.guidance.combine import View
from ebmkit.guidance.config import make_guidance
from ebmkit.guidance.pipelines import check_pipeline, schedule_of
from ebmkit.guidance.unet import GuidedUNet

__all__ = ["GuidedUNet", "guided", "schedule_of"]

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
    through: bool = False,
    late: float = 0.0,
    means: Sequence[float] | None = None,
    classifier_free: float | None = None,
    null_label: int | None = None,
    image_range: tuple[float, float] = (-1.0, 1.0),
    clip: bool | None = None,
    **settings: Any,
) -> P:
    """A pipeline like ``pipeline`` whose samples are guided to ``label``.

    It shares the weights, and has a scheduler of its own; ``pipeline`` is left as it is. Guiding
    the result again adds another guide.

    Args:
        pipeline: of `diffusers`, with a UNet on images, as DDPMPipeline and DDIMPipeline.
        model: what knows the labels: a classifier or joint model of ours, or any network that
            gives logits of images in [0, 1] (`LogitModel` for other ranges); None for
            ``classifier-free``.
        label: of all images, or one for each, (B,).
        guidance: a name from `ebmkit list guidance`.
        scale: s; 0 is unguided. Of ``classifier-free``, w.
        schedule: g(t), as sigmoid:t0=500,y0=0.05,k=0.02.
        view: what the guide sees: noisy, shrunk or clean; None: noisy if the guide takes the noise
            level, else shrunk.
        through: whether the gradient of ``clean`` goes back through the UNet.
        late: share of noise levels, from the noisiest, without guidance.
        means: (C,) mean E of each label's training images, for ``dual``.
        classifier_free: w, in addition to a guide, for a class-conditional UNet; None: it gets the
            label itself.
        null_label: the UNet's label for none; None: its last.
        image_range: where clean images of the UNet live.
        clip: whether the guided prediction of the clean image is held to the scheduler's
            ``clip_sample_range``, and the noise derived from it; None: if the scheduler clips.
        **settings: of the guide, as n and gamma of ``pgd``.

    Raises:
        UserError: if the pipeline works on latents or has no UNet, UNet and guide differ in size,
            channels or labels, or a setting is not legal.

    >>> images = guided(pipeline, robust, 3, "pgd", scale=4, n=20)()     # doctest: +SKIP
    """
    check_pipeline(pipeline)
    config = make_guidance(
        guidance=guidance,
        scale=scale,
        schedule=schedule,
        view=view,
        through=through,
        late=late,
        options=settings,
    )
    made: Any = copy.copy(pipeline)
    scheduler = copy.deepcopy(made.scheduler)
    unet = GuidedUNet(
        made.unet,
        scheduler,
        model,
        label,
        config,
        means=means,
        classifier_free=classifier_free,
        null_label=null_label,
        image_range=image_range,
        clip=clip,
    )
    made.scheduler = scheduler
    made.unet = unet
    result: P = made
    return result
