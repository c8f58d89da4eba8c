"""Identities of a joint model in float64, for every kind of backbone and head.

The slow tests cover the presets `DEEPER`.

Rounding in float64 is 1e-16; a network of some 20 layers and sums over some 1000 positions loses a
few digits, so the tolerance of exact identities is 1e-10.
"""

import pytest
import torch
from ebmkit_tests.support.small_models import DEEPER, PAIRS, small_model, small_size
from torch import nn

from ebmkit import Energies
from ebmkit.energy import LogDensity, value_and_grads
from ebmkit.models import HEADS

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# shapes of the images: (batch, height, width, 1 if a reference size is set, size_scaling); heights
# and widths are in units of the preset's size, which is also the reference size
SHAPES = {
    "plain": (2, 1, 1, None, "windows"),
    "odd-one": (1, 1.4, 1.15, None, "windows"),
    "windows": (1, 2, 2.3, 1, "windows"),
    "tiles": (1, 2, 2.3, 1, "tiles"),
    "factor": (2, 2, 2.3, 1, "factor"),
}


def skip_unless_smooth(model):
    """Skip networks with kinks: finite differences cross them, and no Hessian exists there."""
    if any(isinstance(module, (nn.ReLU, nn.LeakyReLU)) for module in model.modules()):
        pytest.skip("the network has kinks")


SHAPES_OF = {
    "gradresnet18": tuple(SHAPES),
    "gradresnet18-imagenet": ("plain", "windows"),
    "resnet50": ("odd-one", "tiles"),
    "mlp-sigma": ("plain", "factor"),
}
"""Backbones tested with other shapes than plain; they cover norm, stride and noise input."""

SLOW_SHAPES = {("tiles", "resnet50"), ("windows", "gradresnet18-imagenet")}
SLOW_SHAPES |= {(shape, "logit") for shape in SHAPES if shape != "plain"}
"""Shapes of a backbone or head that are slow tests; those of one network and head are not."""


def marks(backbone):
    return [pytest.mark.slow] if backbone in DEEPER else []


def cases():
    """(shape, backbone, head): the plain shape, or those of `SHAPES_OF`."""
    for backbone, head in PAIRS:
        for shape in SHAPES_OF.get(backbone, ("plain",)):
            name = f"{shape}-{backbone}-{head}"
            slow = {(shape, backbone), (shape, head)} & SLOW_SHAPES
            own = [pytest.mark.slow] if slow else marks(backbone)
            yield pytest.param((shape, backbone, head), id=name, marks=own)


@pytest.fixture(params=[pytest.param(p, id="-".join(p), marks=marks(p[0])) for p in PAIRS])
def pair(request):
    return request.param


@pytest.fixture(params=cases())
def case(request):
    """A model and images of one of `SHAPES`."""
    shape, backbone, head = request.param
    model, size = small_model(backbone, head), small_size(backbone)
    batch, high, wide, reference, model.size_scaling = SHAPES[shape]
    model.reference_size = (size, size) if reference else None
    height, width = round(size * high), round(size * wide)
    return model, torch.rand(batch, 1, height, width, dtype=torch.float64)


def test_log_joint_agrees_with_log_density_and_logits(case):
    model, y = case
    energies = model(y)
    log_joint = model.log_joint(y)
    assert log_joint.shape == (len(y), 3)
    torch.testing.assert_close(log_joint.logsumexp(1), energies.log_density, **EXACT)
    torch.testing.assert_close(
        log_joint - energies.log_density[:, None], model.logits(y).log_softmax(1), **EXACT
    )
    assert torch.equal(model.energy(y), -energies.log_density)


def test_scores_agree_with_conditional_scores_and_denoisers(case):
    model, y = case
    sigma = 25 / 255
    score = model.score(y, sigma=sigma)
    posterior = model.logits(y, sigma).softmax(1)
    labels = [torch.full((len(y),), c) for c in range(3)]
    conditional = torch.stack([model.score(y, sigma, c) for c in labels])
    average = torch.einsum("bc,cbijk->bijk", posterior, conditional)
    torch.testing.assert_close(average, score, **EXACT)
    for c, own in zip(labels, conditional, strict=True):
        label_score = model.label_score(y, c, sigma)
        torch.testing.assert_close(label_score, own - score, **EXACT)
        difference = model.denoise(y, sigma, c) - model.denoise(y, sigma)
        torch.testing.assert_close(label_score, difference / sigma**2, **EXACT)


def test_scores_match_finite_differences(case):
    """Reference: central differences of the log-densities along random directions.

    The error at step h is h^2 f'''/6 + 1e-14 |f|/h, the second term from rounding in the network.
    At h = 1e-6 the second term is 1e-8, and so is the first, even where GroupNorm of small maps has
    large derivatives (at h = 1e-4 the error is about 5e-5 and falls as h^2). The tolerance is 1e-6,
    relative to the score.
    """
    skip_unless_smooth(case[0])
    model, y = case
    c = torch.arange(len(y)) + 1
    step, one_hot = 1e-6, nn.functional.one_hot(c, 3).bool()
    functions = [
        (model.score(y), model.log_density),
        (model.score(y, c=c), lambda z: model.log_joint(z)[one_hot]),
        (model.label_score(y, c), lambda z: model.logits(z).log_softmax(1)[one_hot]),
    ]
    for _ in range(3):
        direction = torch.randn_like(y)
        for gradient, function in functions:
            slope = (function(y + step * direction) - function(y - step * direction)) / (2 * step)
            expected = (gradient * direction).flatten(1).sum(1)
            scale = gradient.detach().flatten(1).norm(dim=1).max().item()
            torch.testing.assert_close(expected, slope, rtol=1e-6, atol=1e-6 * scale)


def test_second_derivatives_by_the_image_match_finite_differences(model, images):
    """Derivatives of the scores, and second derivatives of the log-density."""
    skip_unless_smooth(model)
    leaf = images[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(model.score, leaf, fast_mode=True)
    assert torch.autograd.gradcheck(lambda y: model.score(y, c=1), leaf, fast_mode=True)
    assert torch.autograd.gradgradcheck(model.log_density, leaf, fast_mode=True)


def test_parameter_gradients_of_scores_match_finite_differences(model, images, labels):
    """Derivatives of both scores by all parameters, against one joint finite difference.

    Each parameter moves in proportion to its size, biases of 0 by 0.1. At a step of 1e-6 the error
    of the difference is up to 2e-8 of the norm of the derivatives, and the smallest derivative is
    2e-4 of that norm. A tolerance of 1e-6 therefore detects an error of 1 % in any of them.
    """
    skip_unless_smooth(model)
    parameters = list(model.parameters())
    weights = torch.randn(2, *images.shape, dtype=torch.float64)
    start, step = [p.detach().clone() for p in parameters], 1e-6
    directions = [p.square().mean().sqrt().clamp(min=0.1) * torch.randn_like(p) for p in start]

    def value():
        scores = model.value_and_grads(images, None, LogDensity(), LogDensity(labels))[1]
        return (weights * torch.stack(scores)).sum()

    def moved(by):
        with torch.no_grad():
            for p, origin, direction in zip(parameters, start, directions, strict=True):
                p.copy_(origin + by * direction)
        return value().detach()

    gradients = torch.autograd.grad(value(), parameters)
    slopes = [(g * d).sum() for g, d in zip(gradients, directions, strict=True)]
    slope = (moved(step) - moved(-step)) / (2 * step)
    scale = torch.stack(slopes).norm().item()
    torch.testing.assert_close(sum(slopes), slope, rtol=0, atol=1e-6 * scale)


def test_functional_path_matches_double_backward(model, images, labels):
    """`torch.func.vjp` against `autograd.grad(create_graph=True)`: values and their gradients."""
    noise, sigma = torch.randn_like(images), 0.1
    parameters = list(model.parameters())

    targets = LogDensity(), LogDensity(labels)
    scores = value_and_grads(model, images, None, *targets, use_autograd=False)[1]

    leaf = images.clone().requires_grad_()
    rows = torch.arange(len(labels))
    plain = [
        torch.autograd.grad(value.sum(), leaf, create_graph=True)[0]
        for value in (model.log_density(leaf), model.log_joint(leaf)[rows, labels])
    ]
    for ours, theirs in zip(scores, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        gradients = [
            torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for loss in ((sigma * s + noise).square().sum() for s in (ours, theirs))
        ]
        for mine, other in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


def test_the_jacobian_of_the_denoiser_is_symmetric(model, size):
    """grad D = Id + sigma^2 Hessian of log p (CDN eq. 14), which is symmetric."""
    skip_unless_smooth(model)
    y = torch.rand(1, 1, size, size, dtype=torch.float64)
    basis = torch.randn(6, *y.shape, dtype=torch.float64)  # a 6 x 6 block of the Jacobian
    for c in (None, 1):
        _, vjp_fn = torch.func.vjp(lambda z, c=c: model.denoise(z, 0.2, c), y)
        products = [vjp_fn(v)[0] for v in basis]
        block = torch.stack([(basis * p).flatten(1).sum(1) for p in products])
        inner = torch.einsum("iabcd,jabcd->ij", basis, basis)
        torch.testing.assert_close(block, block.T, **EXACT)
        assert (block - inner).abs().max() > 1e-5  # the Hessian is not 0


def test_images_of_a_batch_are_independent(case):
    """Energies and scores of a batch equal those of its images evaluated one by one."""
    model, y = case
    together, alone = model(y), [model(image[None]) for image in y]
    for ours, theirs in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), **EXACT)
    separate = torch.cat([model.score(image[None]) for image in y])
    torch.testing.assert_close(model.score(y), separate, **EXACT)


def test_only_noise_conditional_models_use_sigma(model, images):
    """Blind models ignore sigma bit by bit; the others evaluate each image at its own sigma."""
    assert isinstance(model(images), Energies)
    clean, noisy = model(images), model(images, 0.3)
    for ours, theirs in zip(noisy, clean, strict=True):
        assert torch.equal(ours, theirs) == (not model.noise_conditional)
    apart = model(images, torch.tensor([0.3, 0.0], dtype=images.dtype))
    for ours, first, second in zip(apart, noisy, clean, strict=True):
        torch.testing.assert_close(ours, torch.stack([first[0], second[1]]), **EXACT)


@pytest.mark.parametrize("size_scaling", ["tiles", "windows", "factor"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_windows_and_tiles_use_the_sigma_of_their_image(size_scaling, head):
    model = small_model("mlp-sigma", head)
    assert model.noise_conditional
    model.reference_size, model.size_scaling = (8, 8), size_scaling
    y, sigma = torch.rand(3, 1, 20, 17, dtype=torch.float64), torch.tensor([0.02, 0.1, 0.4])
    together = model.score(y, sigma=sigma)
    alone = [model.score(image[None], sigma=float(s)) for image, s in zip(y, sigma, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), **EXACT | {"rtol": 1e-6})
