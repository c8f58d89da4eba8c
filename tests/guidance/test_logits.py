"""Networks that give logits have their energies."""

import pytest
import torch
from ebmkit_tests.support.guidance_world import draw
from torch import nn

from ebmkit import UserError
from ebmkit.guidance import LogitModel


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    return LogitModel(layers.eval().requires_grad_(False), 2)


def test_a_network_that_gives_logits_has_their_energies():
    model = network()
    y = draw(5, 2)
    logits = model.network(y)
    torch.testing.assert_close(-model.log_joint(y), -logits)
    torch.testing.assert_close(model.energy(y), -logits.logsumexp(1))


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        ({"signed": True}, lambda x: 2 * x - 1),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}, None),
        ({"mean": 0.4}, lambda x: x - 0.4),
    ],
)
def test_images_are_brought_to_what_the_network_wants(asked, seen):
    inside = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    model = LogitModel(inside, 4, in_channels=3, **asked)
    x = torch.rand(2, 3, 2, 2)
    if seen is None:
        pairs = enumerate(zip(*asked.values(), strict=True))
        shown = torch.stack([(x[:, i] - m) / s for i, (m, s) in pairs], 1)
    else:
        shown = seen(x)
    torch.testing.assert_close(model.logits(x), inside(shown))


def test_what_the_network_does_not_take_is_refused():
    with pytest.raises(UserError, match="give signed, or mean and std"):
        LogitModel(nn.Flatten(), 4, signed=True, mean=0.5)
    with pytest.raises(UserError, match=r"mean has 2 numbers for 3 channel"):
        LogitModel(nn.Flatten(), 4, mean=(0.5, 0.5), in_channels=3)
    with pytest.raises(UserError, match="above 0"):
        LogitModel(nn.Flatten(), 4, std=-1.0)
    with pytest.raises(UserError, match=r"3 channel\(s\), not 1"):
        LogitModel(nn.Flatten(), 4, in_channels=3).logits(torch.rand(1, 1, 2, 2))
    with pytest.raises(UserError, match=r"gives \(1, 4\) for 1 images, not logits \(1, 3\)"):
        LogitModel(nn.Flatten(), 3).logits(torch.rand(1, 1, 2, 2))
    with pytest.raises(UserError, match="give sigma"):
        LogitModel(nn.Flatten(), 4, noise_conditional=True).logits(torch.rand(1, 1, 2, 2))


def test_a_network_that_takes_the_noise_level_is_told_it():
    class Told(nn.Module):
        def forward(self, y, sigma):
            return torch.stack([sigma, -sigma], 1)

    model = LogitModel(Told(), 2, noise_conditional=True)
    y, levels = torch.rand(3, 1, 2, 2), torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(model.logits(y, levels)[:, 0], levels)
    torch.testing.assert_close(model.logits(y, 0.2)[:, 0], torch.full((3,), 0.2))
