"""Warnings of BatchNorm and kinked activations; BatchNorm in training uses eager autograd."""

import warnings

import pytest
import torch
from torch import nn

from ebmkit import create_model
from ebmkit.energy import KINKED


def images(batch=3):
    return torch.rand(batch, 1, 8, 8, dtype=torch.float64)


def small(**options):
    return create_model(width=8, num_classes=3, in_channels=1, **options).double()


@pytest.mark.parametrize(
    ("options", "name", "figure"),
    [({"norm": "batch"}, "BatchNorm", r"11\.9 %"), ({"activation": "relu"}, "ReLU", r"92\.0 %")],
)
def test_batch_norm_or_relu_warns_once_and_cites_the_ablation(options, name, figure):
    model, y = small(**options), images()
    model.log_density(y)  # no score, no warning
    with pytest.warns(UserWarning, match=rf"{name}.*table 3\).*{figure}") as caught:
        model.score(y)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the warning points at the caller of `score`
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(y)
        model.denoise(y, 0.1, c=1)


def test_batch_norm_and_relu_together_give_two_warnings():
    model = small(norm="batch", activation="relu")
    with pytest.warns(UserWarning, match="table 3") as caught:
        model.score(images())
    assert len(caught) == 2
    assert {name for w in caught for name in ("BatchNorm", "ReLU") if name in str(w.message)} == {
        "BatchNorm",
        "ReLU",
    }


def test_activations_with_kinks_are_those_whose_derivative_jumps():
    """Reference: differences of the derivative on a grid, for the activations of PyTorch."""
    kinds = [getattr(nn, name) for name in nn.modules.activation.__all__]
    several = (nn.GLU, nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax)
    x = torch.linspace(-8, 8, 160001, dtype=torch.float64, requires_grad=True)
    for kind in set(kinds) - set(several):  # functions of one number
        activation = (kind(0.5, 0.1) if kind is nn.Threshold else kind()).double().eval()
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert (slope.diff().abs().max() > 0.01) == (kind in KINKED), kind


def test_default_network_does_not_warn():
    small().score(images())  # a warning would be an error


@pytest.mark.filterwarnings("ignore:a score is differentiated")
@pytest.mark.parametrize("num_classes", [0, 3])
def test_score_gradients_with_batch_norm_in_training(num_classes):
    """Reference: finite differences of the loss in float64; each call updates the statistics."""
    model = create_model(width=8, num_classes=num_classes, in_channels=1, norm="batch").double()
    y, noise = images(), torch.randn(3, 1, 8, 8, dtype=torch.float64)

    def loss():
        return (0.1 * model.score(y) + noise).square().mean()

    parameters = [p for p in model.parameters() if p.ndim == 4]
    parameters.append(model.head.density.weight)
    gradients = torch.autograd.grad(loss(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step, values = 1e-6, []
    for move in (step, -2 * step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=move)
        values.append(loss().detach())
    # the error is of order step^2; BatchNorm over 3 images has large third derivatives
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:a score is differentiated")
def test_batch_norm_in_training_updates_statistics_and_couples_images():
    model, y = small(norm="batch"), images()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    score = model.score(y)
    assert not torch.equal(norm.running_mean, before)
    assert int(norm.num_batches_tracked) == 1
    other = torch.cat([y[:1], 1 - y[1:]])
    assert not torch.allclose(model.score(other)[0], score[0])


@pytest.mark.filterwarnings("ignore:a score is differentiated")
def test_score_with_batch_norm_in_evaluation_is_per_image():
    model, y = small(norm="batch"), images()
    model.score(y)  # one step of statistics
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    alone = torch.cat([model.score(image[None]) for image in y])
    torch.testing.assert_close(model.score(y), alone)
    leaf = y.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.log_density(leaf).sum(), leaf)
    torch.testing.assert_close(model.score(y), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:a score is differentiated")
def test_eager_and_functional_scores_agree_in_evaluation():
    """The eager path of training, with frozen statistics, against the functional path."""
    model, y = small(norm="batch"), images()
    model.score(y)
    model.eval()
    expected = model.score(y, c=1), model.label_score(y, 2)
    model.training = True  # selects the eager path; the norms stay in evaluation mode
    torch.testing.assert_close((model.score(y, c=1), model.label_score(y, 2)), expected)
