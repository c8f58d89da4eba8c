"""Corruptions against their statistics, other libraries, and each other."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import gaussian_blur

from ebmkit import UserError
from ebmkit.evaluation.corruptions import CORRUPTIONS, constants_for, corrupt
from ebmkit.metrics import psnr


@pytest.fixture(scope="module")
def photo():
    """A real photograph, (1, 3, 224, 224)."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy())
    return pixels[100:324, 200:424].movedim(-1, 0)[None].float() / 255


@pytest.fixture(scope="module")
def small(photo):
    """The same at 32x32."""
    return torch.nn.functional.avg_pool2d(photo, 7)


FLAT = torch.full((1, 1, 300, 300), 0.4)
VALUES = FLAT.numel()


def assert_moments(found, mean, variance):
    """Both inside 5 standard errors, taking the noise as about normal."""
    assert float(found.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / VALUES))
    assert float(found.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / VALUES))


@pytest.mark.parametrize("photons", [500, 75])
def test_poisson_counts_photons(photons):
    found = corrupt(FLAT, "poisson", photons)
    assert_moments(found, 0.4, 0.4 / photons)
    counts = found * photons
    assert torch.allclose(counts, counts.round(), atol=1e-3)


def test_speckle_grows_with_brightness():
    for value in (0.4, 0.2):
        found = corrupt(torch.full_like(FLAT, value), "speckle", 0.2)
        assert_moments(found, value, (0.2 * value) ** 2)
    assert not corrupt(torch.zeros(1, 1, 9, 9), "speckle", 0.2).any()


def test_salt_and_pepper_replace_a_share_of_the_values():
    found = corrupt(FLAT, "salt-and-pepper", 0.07)
    for colour in (0, 1):
        share = float((found == colour).double().mean())
        assert share == pytest.approx(0.035, abs=5 * math.sqrt(0.035 / VALUES))
    assert set(found.unique().tolist()) == {0.0, FLAT[0, 0, 0, 0].item(), 1.0}
    # channels of a colour image are hit one by one, as by scikit-image's random_noise
    colour = corrupt(FLAT.expand(-1, 3, -1, -1), "salt-and-pepper", 0.07)
    assert float((colour == 0.4).all(dim=1).double().mean()) == pytest.approx(0.93**3, abs=0.01)


def test_blur_is_gaussian(photo):
    """torchvision mirrors the border, where ours repeats it: inside both are the same."""
    found = corrupt(photo, "blur", 2.0)
    expected = gaussian_blur(photo, 17, 2.0)
    assert torch.allclose(found[..., 8:-8, 8:-8], expected[..., 8:-8, 8:-8], atol=1e-5)
    assert not torch.allclose(found, photo, atol=0.05)


def test_contrast_shrinks_towards_the_mean_of_each_channel(small):
    found = corrupt(small, "contrast", 0.3)
    assert torch.allclose(found.mean((2, 3)), small.mean((2, 3)), atol=1e-6)
    assert torch.allclose(found.std((2, 3)), 0.3 * small.std((2, 3)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(small, channels, tmp_path):
    x = small[:, :channels]
    pixels = (255 * x[0]).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels.squeeze()).save(tmp_path / "a.jpg", quality=40)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        read = np.asarray(image)
    found = (255 * corrupt(x, "jpeg", 40)[0]).movedim(0, -1).squeeze(-1)
    assert np.array_equal(found.round().byte().numpy(), read)
    assert not np.array_equal(read, pixels.squeeze())


def test_jpeg_of_other_channels_is_refused():
    with pytest.raises(UserError, match="JPEG holds 1 or 3 channels, not 2"):
        corrupt(torch.rand(1, 2, 8, 8), "jpeg", 40)


@pytest.mark.parametrize(
    ("name", "least", "tolerance"),
    [
        ("poisson", 1e8, 1e-3),
        ("speckle", 0, 0),
        ("salt-and-pepper", 0, 0),
        ("blur", 0, 0),
        ("contrast", 1, 1e-6),
        ("jpeg", 100, 2 / 255),
    ],
)
def test_nothing_is_left_of_a_corruption_at_its_least(small, name, least, tolerance):
    gray = small[:, :1]  # of colours, JPEG halves the resolution at any quality
    assert torch.allclose(corrupt(gray, name, least), gray, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_stronger_is_further_from_the_clean_image(name, small, photo):
    for kind, x in {"cifar": small, "imagenet": photo}.items():
        assert constants_for((x.shape[-2], x.shape[-1])) == kind
        values = []
        for strength in range(1, 6):
            found = corrupt(x, name, CORRUPTIONS[name].constant(strength, kind))
            assert found.min() >= 0
            assert found.max() <= 1
            values.append(float(psnr(found, x)))
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 1


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_by_its_number(name, small):
    images = torch.cat([small, small.flip(-1), small, small.flip(-2)])
    constant = CORRUPTIONS[name].constant(5, "cifar")
    whole = corrupt(images, name, constant, seed=4)
    parts = [corrupt(images[i : i + 1], name, constant, 4, first=i) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    if name in ("poisson", "speckle", "salt-and-pepper"):  # the others draw nothing
        assert not torch.equal(whole[0], whole[2])
        assert not torch.equal(whole, corrupt(images, name, constant, seed=5))
