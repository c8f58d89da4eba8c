"""Quantities that `EnergyModel` derives from energies, and refused arguments."""

import math
import traceback

import pytest
import torch
from torch import nn

from ebmkit import Denoiser, Energies, EnergyModel, GaussianMixture, UserError
from ebmkit.energy import LabelLogProbability, LogDensity, jvp, per_image, vjp


class Blind(EnergyModel):
    """A blind model in closed form: an isotropic Gaussian of deviation ``scale`` around 0."""

    def __init__(self, scale: float, num_classes: int = 0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.num_classes = num_classes

    def forward(self, y, sigma=None):
        logits = y.flatten(1)[:, : self.num_classes]
        return Energies(logits, -y.flatten(1).square().sum(1) / (2 * self.scale**2))


def mixture():
    means = torch.tensor([[[[0.2, 0.8]]], [[[0.9, 0.1]]], [[[0.5, 0.5]]]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.02, 0.03, 0.05]), labels=[0, 1, 1])


def test_energies_match_hand_computed_values():
    energies = Energies(torch.tensor([[0.0, math.log(3)]]), torch.tensor([-2.0]))
    torch.testing.assert_close(
        energies.log_joint(), torch.tensor([[math.log(0.25) - 2, math.log(0.75) - 2]])
    )
    torch.testing.assert_close(energies.at_label(torch.tensor([1])), torch.tensor([math.log(0.75)]))


def test_value_and_grads_gives_energies_and_all_scores():
    model, sigma = mixture(), 0.2
    y, c = torch.rand(5, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    targets = LogDensity(), LogDensity(c), LabelLogProbability(c)
    energies, scores = model.value_and_grads(y, sigma, *targets)
    assert torch.equal(energies.log_density, model.log_density(y, sigma))
    assert torch.equal(scores[0], model.score(y, sigma))
    assert torch.equal(scores[1], model.score(y, sigma, c))
    assert torch.equal(scores[2], model.label_score(y, c, sigma))


def test_denoising_reaches_the_network_in_three_calls():
    callers = []

    class Traced(Blind):
        def forward(self, y, sigma=None):
            callers.append([frame.name for frame in traceback.extract_stack()[-5:-1]])
            return super().forward(y, sigma)

    Traced(0.3).denoise(torch.zeros(1, 1, 2, 2, dtype=torch.float64), 0.1)
    here = "test_denoising_reaches_the_network_in_three_calls"
    assert callers == [[here, "denoise", "_score", "value_and_grads"]]


@pytest.mark.parametrize("inference", [False, True])
def test_products_with_the_jacobian_match_the_full_matrix(inference):
    def function(y):
        return (y.cumsum(1) * weight).sin()

    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    J = torch.func.jacrev(function)(torch.full((1, 5), 0.3, dtype=torch.float64)).reshape(5, 5)
    with torch.inference_mode(inference):
        y, v = torch.full((1, 5), 0.3, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)
        value, product = vjp(function, y)
        for _ in range(2):  # the graph stays
            torch.testing.assert_close(product(v), v @ J.detach())
        same, forward = jvp(function, y, v)
        torch.testing.assert_close(forward, v @ J.detach().mT)
        assert torch.equal(value, same)
        assert torch.equal(value, function(y))
        assert not any(t.requires_grad for t in (value, product(v), same, forward))
    with pytest.raises(RuntimeError, match="second time"):
        product = vjp(function, y.clone(), once=True)[1]
        product(v.clone())
        product(v.clone())


def test_values_per_image_broadcast_in_the_precision_of_the_images():
    images = torch.zeros(2, 3, 1, 1)
    value = per_image(torch.tensor([1.0, 2.0], dtype=torch.float64), images)
    assert (value.shape, value.dtype) == ((2, 1, 1, 1), torch.float32)
    assert per_image(torch.tensor([True, False]), images).dtype == torch.bool  # a mask stays one
    assert per_image(0.5, images) == 0.5


def test_label_minus_one_means_no_label():
    model, y = mixture(), torch.rand(3, 1, 1, 2, dtype=torch.float64)
    scores = model._score(y, 0.2, torch.tensor([0, -1, 1]))
    assert torch.equal(scores[1], model.score(y, 0.2)[1])
    torch.testing.assert_close(scores[::2], model.score(y[::2], 0.2, torch.tensor([0, 1])))


def test_labels_passed_as_sigma_are_refused():
    with pytest.raises(UserError, match="pass labels as c="):
        mixture().score(torch.rand(2, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1]))


def test_adversarial_gradient_is_the_difference_of_the_denoisers():
    model, sigma = mixture(), torch.tensor([0.1, 0.3], dtype=torch.float64)
    y, c = torch.rand(2, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1])
    difference = model.denoise(y, sigma, c) - model.denoise(y, sigma)
    expected = difference / sigma[:, None, None, None] ** 2
    # cancellation in the difference of two denoised images: 1e-16 / sigma^2
    torch.testing.assert_close(model.label_score(y, c, sigma), expected, rtol=1e-10, atol=1e-12)


def test_energy_is_minus_the_log_density():
    model, y = mixture(), torch.rand(2, 1, 1, 2, dtype=torch.float64)
    assert torch.equal(model.energy(y, 0.1), -model.log_density(y, 0.1))


def test_blind_model_estimates_sigma_from_its_score():
    """Gaussian noise under a Gaussian of the same sigma: ||score|| = sqrt(d) / sigma on average."""
    model, dim = Blind(0.3), 3 * 32 * 32
    y = 0.3 * torch.randn(8, 3, 32, 32, dtype=torch.float64)
    # ||eps|| / sqrt(d) deviates from 1 by 1 / sqrt(2 d) = 1.3 %; 4 of these
    torch.testing.assert_close(
        model.estimate_sigma(y),
        torch.full((8,), 0.3, dtype=torch.float64),
        rtol=4 / (2 * dim) ** 0.5,
        atol=0,
    )


def test_blind_denoising_uses_the_estimated_level():
    model = Blind(0.3, num_classes=2)
    y, c = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 1])
    level = model.estimate_sigma(y)
    torch.testing.assert_close(model.denoise(y), model.denoise(y, level))
    torch.testing.assert_close(model.denoise(y, c=c), model.denoise(y, level, c))
    estimated = model.denoise(y)
    # the step is as long as noise of this level: ||D(y) - y|| = sigma sqrt(d)
    torch.testing.assert_close((estimated - y).flatten(1).norm(dim=1), level * 4)


def test_blind_denoising_keeps_an_image_with_zero_score():
    """A bias-free network has score 0 at a black image: sigma is infinite, and inf * 0 is NaN."""
    black = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(Blind(0.3).denoise(black), black)


def test_score_is_available_and_detached_under_no_grad():
    model, y = mixture(), torch.rand(2, 1, 1, 2, dtype=torch.float64)
    expected = model.score(y, sigma=0.1)
    with torch.no_grad():
        detached = model.score(y, sigma=0.1)
    assert torch.equal(detached, expected)
    assert not detached.requires_grad
    with torch.inference_mode():
        assert torch.equal(model.score(y, sigma=0.1), expected)


def test_score_is_differentiable_with_respect_to_parameters():
    model, y = Blind(0.5), torch.rand(2, 1, 2, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(model.score(y).sum(), model.scale)
    torch.testing.assert_close(gradient, 2 * y.sum() / 0.5**3)  # score = -y / scale^2


def test_energy_models_are_denoisers():
    assert isinstance(mixture(), Denoiser)


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label", [1, torch.tensor(1), torch.tensor([1, 1]), torch.tensor([1, 1]).int()]
)
def test_labels_may_be_numbers_or_tensors(label):
    model, y = mixture(), torch.rand(2, 1, 1, 2, dtype=torch.float64)
    expected = model.score(y, 0.1, torch.tensor([1, 1]))
    assert torch.equal(model.score(y, 0.1, label), expected)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, "label 2 is out of range: this model knows 0 to 1"),
        (-1, "label -1 is out of range"),
        (torch.tensor([0, 7]), "label 7 is out of range"),
        (torch.tensor([0]), "2 images need 2 labels"),
        (torch.tensor([0, 1, 1]), "2 images need 2 labels"),
        (torch.tensor([[0], [1]]), "2 images need 2 labels"),
        (1.0, "whole numbers"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([True, False]), "whole numbers"),
    ],
)
@pytest.mark.parametrize("method", ["score", "label_score", "denoise"])
def test_invalid_labels_are_refused(method, label, message):
    model, y = mixture(), torch.rand(2, 1, 1, 2, dtype=torch.float64)
    with pytest.raises(UserError, match=message):
        getattr(model, method)(y, c=label, sigma=0.1)


@pytest.mark.parametrize("method", ["score", "label_score", "denoise"])
def test_model_without_labels_refuses_a_label(method):
    with pytest.raises(UserError, match="trained without labels: leave the label out"):
        getattr(Blind(0.3), method)(torch.zeros(1, 1, 2, 2, dtype=torch.float64), c=0)
