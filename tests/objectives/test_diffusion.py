"""Noise prediction: dsm with the noise law of a diffusion model, and random label dropout."""

import pytest
import torch

from ebmkit import create_model
from ebmkit.data import Batch, NoiseLaw
from ebmkit.noise import make_schedule
from ebmkit.objectives import TermSettings, TrainingLoss, parse_objective
from ebmkit.objectives.diffusion import label_dropout


def batch_of(count=6, classes=3):
    generator = torch.Generator().manual_seed(3)
    law = NoiseLaw(kind="diffusion")
    x = torch.rand(count, 1, 8, 8, generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    sigma = law.sample(count, generator, "cpu")
    labels = torch.arange(count) % classes
    soft = torch.nn.functional.one_hot(labels, classes).float()
    return Batch(x, x + sigma[:, None, None, None] * eps, sigma, eps, labels, soft)


def loss_of(model, objective, **ddpm):
    settings = TermSettings.model_validate({"ddpm": ddpm})
    return TrainingLoss(model, parse_objective(objective, settings))


def model_of(**options):
    torch.manual_seed(0)
    return create_model("gradresnet18", 3, in_channels=1, width=8, **options).eval()


def test_ddpm_is_bit_identical_to_dsm_mean_with_a_joint_model():
    """Loss and gradient of a joint model in place of the UNet."""
    model, batch = model_of(), batch_of()
    gradients = []
    for objective in ("ddpm", "dsm-mean"):
        model.zero_grad()
        losses = loss_of(model, objective)({"denoise": batch})
        losses.total.backward()
        gradients.append(
            [
                losses.total.detach(),
                *(p.grad.clone() for p in model.parameters() if p.grad is not None),
            ]
        )
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("share", "same_as"), [(0.0, "cdsm-mean"), (1.0, "dsm-mean")])
def test_class_dropout_of_0_or_1_gives_the_conditional_or_unconditional_loss(share, same_as):
    model, batch = model_of(), batch_of()
    ours = loss_of(model, "ddpm", class_dropout=share)({"denoise": batch}).total
    theirs = loss_of(model, same_as)({"denoise": batch}).values[0]
    torch.testing.assert_close(ours.detach(), theirs)
    assert ours.requires_grad


def test_dropped_label_gives_the_unconditional_score():
    """Half of the labels: the loss is the mean of conditional and unconditional losses."""
    model, batch = model_of(), batch_of(40)
    dropped = label_dropout(batch.eps, 0.5)
    assert 0 < dropped.sum() < 40
    wide = batch.sigma[:, None, None, None]
    plain = (wide * model.score(batch.y) + batch.eps).square().flatten(1).mean(1)
    conditional = (
        (wide * model.score(batch.y, c=batch.labels) + batch.eps).square().flatten(1).mean(1)
    )
    expected = torch.where(dropped, plain, conditional).mean().detach()
    found = loss_of(model, "ddpm", class_dropout=0.5)({"denoise": batch}).total.detach()
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(plain, conditional, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_labels_are_dropped_at_random(share, dtype):
    """The share is right to 4 standard errors, and independent of the noise's sum and size."""
    count = 20_000
    eps = torch.randn(count, 1, 2, 2, dtype=dtype)
    dropped = label_dropout(eps, share)
    error = (share * (1 - share) / count) ** 0.5
    assert float(dropped.double().mean()) == pytest.approx(share, abs=4 * error)
    for statistic in (eps.flatten(1).sum(1), eps.square().flatten(1).sum(1)):
        z = (statistic - statistic.mean()) / statistic.std()
        assert abs(float(z[dropped].mean())) < 4 / (share * count) ** 0.5


def test_label_dropout_does_not_depend_on_how_the_batch_is_split():
    eps = torch.randn(12, 3, 8, 8)
    whole = label_dropout(eps, 0.5)
    parts = torch.cat([label_dropout(part, 0.5) for part in eps.flip(0).split(5)])
    assert torch.equal(whole, parts.flip(0))
    assert not torch.equal(whole, label_dropout(torch.randn_like(eps), 0.5))


def test_ddpm_needs_labels_only_with_class_dropout():
    (plain,) = loss_of(model_of(), "ddpm").terms
    (conditional,) = loss_of(model_of(), "ddpm", class_dropout=0.1).terms
    assert not plain.objective.needs_labels
    assert conditional.objective.needs_labels
    assert conditional.objective.needs_hard_labels


def test_noise_levels_of_the_schedule_are_drawn_uniformly():
    """40 expected draws per level: chi-square of 1000 levels within 5 standard deviations."""
    law = NoiseLaw(kind="diffusion", schedule="cosine")
    levels = make_schedule("cosine").sigmas.float()
    drawn = law.sample(40_000, torch.Generator().manual_seed(0), "cpu")
    assert law.range == make_schedule("cosine").sigma_range
    assert set(drawn.tolist()) <= set(levels.tolist())
    counts = torch.bincount(torch.searchsorted(levels, drawn), minlength=1000)
    chi_square = float(((counts - 40) ** 2 / 40).sum())
    assert chi_square == pytest.approx(999, abs=5 * (2 * 999) ** 0.5)
