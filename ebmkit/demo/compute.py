r"""What the demo page shows of an image x and a label c: images in, values and images out.

With noise of level sigma, :math:`y = x + \sigma\epsilon`, the two denoisers are :math:`D_u(y) =
E[x \mid y]` and :math:`D_c(y) = E[x \mid y, c]`. Their difference is the adversarial gradient (CDN
eq. 9),

.. math:: D_c(y) - D_u(y) = \sigma^2\, \nabla_y \log p(c \mid y),

and an attack follows it towards c, in a ball of l2 radius epsilon around the clean image. Samples
of p(x|c) come from the model's default sampler. Their guidance weight w is that of classifier-free
guidance, :math:`s_u + w\,(s_c - s_u)`, or the scale of another model's energies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebmkit.attacks import projected_gradient_descent
from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.guidance import CLASSIFIER_FREE, GuidanceConfig, guided_model
from ebmkit.inference import denoise_image
from ebmkit.inputs import image_batch
from ebmkit.metrics import psnr
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import Chains
from ebmkit.sampling.base import clean_level
from ebmkit.sampling.entry import default_sampler, gaussians_of, takes_labels

LARGEST = 384
"""Longer side to which images are shrunk for a model that only denoises, pixels."""

ATTACK_STEPS = 10
SAMPLING_STEPS = 100
"""Maximum number of steps of a chain: a page should answer within seconds."""


def class_names(model: ScoreModel) -> list[str]:
    """Names of the labels, in their order."""
    names = model.card.class_names if model.card else []
    return names or [str(c) for c in range(model.num_classes)]


def fit_image(model: ScoreModel, pixels: Any) -> Tensor:
    """Convert an image to one that the model takes, (C, H, W) in [0, 1].

    For a model with labels the centre is cropped and resized to the training size, else a large
    image is shrunk to `LARGEST`. Colour becomes gray if the model takes gray images.

    Args:
        model: the model.
        pixels: a PIL image, or pixels as in `ebmkit.inputs.image_batch`.

    Raises:
        UserError: if it is no image, or partly transparent.
    """
    image = image_batch(pixels, None, torch.zeros(()))[0]
    channels = model.card.channels if model.card else model.in_channels or len(image)
    if channels != len(image):
        image = image.mean(0, keepdim=True).expand(channels, -1, -1)
    height, width = image.shape[-2:]
    size = model.card.image_size if model.card else None
    if size is not None and takes_labels(model):
        scale = max(size[0] / height, size[1] / width)
        target = max(size[0], round(scale * height)), max(size[1], round(scale * width))
    else:
        scale = min(1, LARGEST / max(height, width))
        size = target = round(scale * height) or 1, round(scale * width) or 1
    if target != (height, width):
        image = nn.functional.interpolate(image[None], target, mode="bilinear", antialias=True)[0]
    top, left = ((a - b) // 2 for a, b in zip(target, size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]].clamp(0, 1)


class Classes(NamedTuple):
    """log p(c|x) of each label, (C,), and log p(x), a number, in nats."""

    log_posterior: Tensor
    log_density: float


@torch.no_grad()
def classify(model: EnergyModel, x: Tensor) -> Classes:
    """Label probabilities and log-density (up to the model's constant) of ``x`` (C, H, W)."""
    energies = model.energies(x[None].to(device_of(model)), clean_level(model))
    return Classes(energies.log_posterior()[0].cpu(), float(energies.log_density[0]))


class Denoising(NamedTuple):
    """Noisy and denoised images (C, H, W), clipped, and their PSNR in dB.

    ``sigma`` is the noise level that the model estimated, if it does; ``by_label`` is None without
    a label.
    """

    noisy: Tensor
    plain: Tensor
    by_label: Tensor | None
    sigma: float | None
    psnr: tuple[float, ...]


@torch.no_grad()
def denoise(
    model: ScoreModel, x: Tensor, sigma: float, c: int | None = None, seed: int = 0
) -> Denoising:
    """Add noise of level ``sigma``, image units, to ``x`` (C, H, W), and remove it.

    A blind model estimates the level. With a label ``c``, also by the conditional denoiser.
    """
    device = device_of(model)
    clean = x.to(device)
    noise = torch.randn(x.shape, generator=keyed_generator("cpu", seed, "demo")).to(device)
    y = clean + sigma * noise
    blind = not model.noise_conditional
    found = denoise_image(model, y, None if blind else sigma)
    images = [y, found.image]
    if c is not None:
        images.append(denoise_image(model, y, found.sigma, c).image)
    clipped = [image.clamp(0, 1) for image in images]
    quality = tuple(float(psnr(image[None], clean[None])) for image in clipped)
    noisy, plain, *rest = (image.cpu() for image in clipped)
    return Denoising(noisy, plain, rest[0] if rest else None, found.sigma if blind else None,
                     quality)  # fmt: skip


class Attack(NamedTuple):
    """``gradient``: grad log p(c|x) of the clean image, (C, H, W), nats per image unit;
    ``image``: the attacked image (C, H, W); ``before``, ``after``: log p(c|x) of the label."""

    gradient: Tensor
    image: Tensor
    before: float
    after: float


@torch.no_grad()
def attack(model: EnergyModel, x: Tensor, c: int, epsilon: float) -> Attack:
    """Move ``x`` (C, H, W) towards label ``c``, at most by the l2 length ``epsilon``, image units.

    Projected gradient descent with `ATTACK_STEPS` steps of 2.5 epsilon / `ATTACK_STEPS`.
    """
    clean, sigma = x[None].to(device_of(model)), clean_level(model)

    def gradient(y: Tensor) -> Tensor:
        return model.label_score(y, c, sigma)

    step = 2.5 * epsilon / ATTACK_STEPS
    moved = clean
    if epsilon > 0:
        moved = projected_gradient_descent(
            gradient, clean, epsilon, "l2", steps=ATTACK_STEPS, step_size=step
        )
    values = model.energies(torch.cat([clean, moved]), sigma).log_posterior()[:, c]
    found = gradient(clean)[0].cpu(), moved[0].cpu()
    return Attack(*found, *map(float, values))


def guide(model: ScoreModel, other: EnergyModel | None, scale: float) -> ScoreModel:
    """``model``, guided to labels at ``scale`` by the energies of ``other``, or by its own.

    Raises:
        UserError: if the models do not fit together, or ``model`` has no labels and no guide.
    """
    if other is None:
        if not takes_labels(model):
            raise UserError("this model has no labels to sample by: give a classifier by --guide")
        config = GuidanceConfig(guidance=CLASSIFIER_FREE, scale=scale)
    else:
        config = GuidanceConfig(guidance="energy", scale=scale)
    guided = guided_model(model, other, config)
    guided.class_gaussians = model.class_gaussians  # chains start from these
    return guided


def can_sample(model: ScoreModel) -> bool:
    """Whether `sample` can draw from ``model``: it denoises images of a known size."""
    card = model.card
    return card is not None and card.image_size is not None and denoises(model)


def denoises(model: ScoreModel) -> bool:
    """Whether ``model`` was trained to denoise."""
    return model.schedule is not None or (model.card is not None and model.card.denoises)


@torch.no_grad()
def sample(
    model: ScoreModel,
    c: int,
    count: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Draw ``count`` images of label ``c`` by the default sampler, (count, C, H, W), clipped.

    ``progress`` is called with (steps done, number of steps).
    """
    card = model.card
    assert card is not None
    assert card.image_size is not None
    shape = (count, card.channels, *card.image_size)
    entry = default_sampler(model, gaussians_of(model, shape[1:]) is not None)
    config = entry.config()
    config = config.model_copy(update={"steps": min(config.steps, SAMPLING_STEPS)})
    device = device_of(model)
    labels = torch.full((count,), c, device=device)
    sampler = entry.build(model, labels, config)
    generator = keyed_generator(device, seed, "demo samples")
    x = entry.start(model, sampler, config, shape, generator, labels)
    length = entry.length(sampler, config)
    chains = Chains(sampler, sampler.init(x))
    chains.run(length, generator, lambda state, info: progress(state.step, length))
    return entry.finish(model, sampler, chains.state.x, labels).clamp(0, 1).cpu()
