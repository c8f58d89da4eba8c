"""Images of any size, assembled from crops; exact for a log-density that is a sum of pixels."""

import math

import pytest
import torch

import ebmkit
from ebmkit import Energies, EnergyModel, UserError
from ebmkit.inference import denoise_image, image_score


class Pixels(EnergyModel):
    """Independent Gaussian pixels of variance 1 / 4, noise included: the score is -4 (y - 1/2)."""

    num_classes = 2

    def forward(self, y, sigma=None):
        log_density = -2 * (y - 0.5).square().flatten(1).sum(1)
        return Energies(torch.stack([y.flatten(1).sum(1), y.flatten(1).sum(1)], 1), log_density)


@pytest.mark.parametrize("shape", [(3, 50, 70), (1, 97, 33), (3, 16, 16), (1, 5, 200)], ids=str)
@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (16, 0), (32, 5)])
def test_blended_crops_give_the_exact_score_of_independent_pixels(shape, tile, overlap):
    y = torch.rand(shape, dtype=torch.float64)
    score = image_score(Pixels(), y, tile=tile, overlap=overlap)
    torch.testing.assert_close(score, -4 * (y - 0.5))


def test_sigma_is_estimated_from_the_full_image():
    y = torch.rand(3, 50, 70, dtype=torch.float64)
    blind = denoise_image(Pixels(), y, tile=16)
    sigma = math.sqrt(y.numel()) / float((4 * (y - 0.5)).norm())
    assert blind.sigma == pytest.approx(sigma)
    torch.testing.assert_close(blind.image, y - sigma**2 * 4 * (y - 0.5))
    labelled = denoise_image(Pixels(), y, c=1, tile=16)  # from the unconditional score
    assert labelled.sigma == pytest.approx(sigma)


def test_progress_counts_all_crops():
    seen = []
    image_score(Pixels(), torch.rand(1, 600, 300), tile=64, progress=lambda *n: seen.append(n))
    done, count = zip(*seen, strict=True)
    assert len(set(count)) == 1
    assert done[-1] == count[-1]
    assert list(done) == sorted(set(done))


def test_black_image_stays_black():
    model = ebmkit.create_model("gradresnet18", 3, in_channels=1, width=8)
    result = denoise_image(model, torch.zeros(1, 40, 40), tile=16)
    assert torch.equal(result.image, torch.zeros(1, 40, 40))


def test_score_of_an_image_of_one_crop_equals_the_models():
    model = ebmkit.create_model("gradresnet18", 3, in_channels=1, width=8, image_size=16).double()
    y = torch.rand(1, 32, 30).double()
    torch.testing.assert_close(image_score(model, y, c=2, tile=32), model.score(y[None], c=2)[0])


@pytest.mark.parametrize("sigma", [0.0, -0.1, float("inf"), float("nan")])
def test_invalid_noise_levels_are_refused(sigma):
    with pytest.raises(UserError, match="finite number above 0"):
        denoise_image(Pixels(), torch.rand(1, 8, 8), sigma)
    with pytest.raises(UserError, match="finite number above 0"):
        Pixels().denoise(torch.rand(1, 1, 8, 8), sigma)


def test_invalid_overlap_is_refused():
    with pytest.raises(UserError, match="overlap 16"):
        image_score(Pixels(), torch.rand(1, 8, 8), tile=16, overlap=16)
