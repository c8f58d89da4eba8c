"""User errors when creating or calling a model."""

import pytest
import torch
from torch import nn

from ebmkit import JointModel, UserError, create_model
from ebmkit.models import Features, LinearQuadraticHead, LogitHead


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "gradresnet81"},
            "unknown backbone 'gradresnet81': did you mean 'gradresnet18'",
        ),
        ({"head": "logits"}, "unknown head 'logits': did you mean 'logit'"),
        ({"widht": 16}, "backbone gradresnet18: there is no field 'widht': did you mean 'width'?"),
        ({"width": 12}, "width 12 is no multiple of channels_per_group 8"),
        ({"width": 0}, "width = 0 is not legal: input should be greater than or equal to 1"),
        ({"width": 3, "channels_per_group": 1}, "width 3 must be even"),
        ({"depth": 50}, "depth = 50 is not legal: input should be 10, 18 or 34"),
        (
            {"activation": "silu"},
            "activation = 'silu' is not legal: input should be 'gelu' or 'relu'",
        ),
        ({"norm": "layer"}, "norm = 'layer' is not legal"),
        ({"strides": (1, 1, 2, 2)}, "strides"),
        ({"strides": (1, 1, 3, 2, 2)}, "must each be 1, 2 or 4"),
        ({"in_channels": 2}, "in_channels = 2 is not legal: input should be 1 or 3"),
        ({"num_classes": -1}, "num_classes = -1 is not legal"),
        (
            {"size_scaling": "window"},
            "size_scaling = 'window' is not legal: input should",
        ),
        ({"image_size": 0}, r"reference_size\.0 = 0 is not legal: input should be greater than 0"),
        ({"head": "logit", "num_classes": 0}, "use head 'linear-quadratic'"),
    ],
    ids=str,
)
def test_create_model_errors_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model(**{"width": 8, **arguments})
    assert "\n" not in str(caught.value)


class WithColumns(LinearQuadraticHead):
    """A head whose log-density has one dimension too many."""

    def forward(self, pooled):
        energies = super().forward(pooled)
        return energies._replace(log_density=energies.log_density[:, None])


def test_head_with_wrong_log_density_shape_is_refused():
    model = create_model("mlp", 3, 1, width=8)
    model.head = WithColumns(model.backbone.num_features, 3)
    with pytest.raises(UserError, match=r"WithColumns gives .*\(2, 1\).*\(B,\) are needed"):
        model(torch.zeros(2, 1, 8, 8))


def test_logit_head_without_classes_is_refused():
    with pytest.raises(UserError, match="cannot have 0 classes"):
        LogitHead(4, 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 8), r"takes images of 1 channel\(s\), not 3"),
        ((1, 8, 8), r"images must be \(batch, channels, height, width\), not \(1, 8, 8\)"),
        ((8, 8), "images must be"),
        ((1, 1, 1, 8, 8), "images must be"),
    ],
    ids=str,
)
def test_images_of_wrong_shape_are_refused(shape, message):
    model = create_model(width=8, in_channels=1)
    for method in ("log_density", "logits", "log_joint", "score", "denoise", "energy"):
        with pytest.raises(UserError, match=message):
            getattr(model, method)(torch.rand(shape))


class Flat(nn.Module):
    """A backbone without the method ``pool``."""

    num_features = 3

    def forward(self, y):
        return Features(y.mean((2, 3)))


def test_size_scaling_by_windows_requires_a_backbone_with_pool():
    head = LinearQuadraticHead(3, 2)
    with pytest.raises(UserError, match=r"Flat has no method pool\(maps, grid\)"):
        JointModel(Flat(), head, reference_size=(8, 8), size_scaling="windows")
    y = torch.rand(1, 3, 16, 16)
    plain = JointModel(Flat(), head)
    factor = JointModel(Flat(), head, reference_size=(8, 8), size_scaling="factor")
    torch.testing.assert_close(factor.log_density(y), 4 * plain.log_density(y))


@pytest.mark.parametrize(
    "parts", [(nn.Identity(), LinearQuadraticHead(3, 2)), (Flat(), nn.Identity())]
)
def test_modules_without_the_attributes_of_backbone_and_head_are_refused(parts):
    with pytest.raises(UserError, match="a backbone needs num_features, a head needs num_classes"):
        JointModel(*parts)
