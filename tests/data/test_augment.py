"""Augmentation: distributions and pixels, with torchvision as reference."""

import math

import pytest
import torch
import torchvision.transforms.v2 as tv
import torchvision.transforms.v2.functional as functional
from ebmkit_tests.support.toy_sets import as_streamed, make_set

from ebmkit.data import Stream, StreamConfig
from ebmkit.data.augment import (
    RANDOM_NUMBERS_PER_CROP,
    Augmentation,
    Cut,
    Rows,
    crop_boxes,
    cutout,
    flip,
    mix,
    pad_images,
    random_crop,
    resize_boxes,
)

MIXES = ["mixup", "cutmix", "both"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class FixedBeta:
    """Replaces torchvision's Beta distribution; returns the given lambda."""

    def __init__(self, lam):
        self.lam = lam

    def sample(self, shape):
        return self.lam


def batch(count, height=8, width=8):
    images = torch.rand(count, 3, height, width)
    return images, torch.nn.functional.one_hot(torch.arange(count) % 10, 10).float()


def test_flip_mirrors_half_of_the_images():
    images = torch.rand(2000, 1, 2, 5)
    flipped = flip(images, generator())
    mirrored = (flipped == functional.hflip(images)).flatten(1).all(1)
    unchanged = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ unchanged).all()
    assert abs(int(mirrored.sum()) - 1000) < 4 * (2000 / 4) ** 0.5


def test_padded_crops_match_torchvision_at_uniform_offsets():
    count, padding = 2500, 2
    images = torch.rand(count, 1, 4, 6)
    cropped = random_crop(pad_images(images, padding), (4, 6), generator())
    found = torch.zeros(2 * padding + 1, 2 * padding + 1)
    wide = functional.pad(images, [padding] * 4)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = functional.crop(wide, top, left, 4, 6)
            found[top, left] = (cropped == window).flatten(1).all(1).sum()
    assert found.sum() == count  # each crop matches exactly one offset
    expected = count / found.numel()
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < 52  # 24 degrees of freedom, p = 1e-3


def test_random_crops_match_torchvision_per_image():
    images = torch.rand(400, 3, 6, 7)
    cropped = random_crop(images, 5, generator())
    matches = torch.zeros(400, dtype=torch.long)
    for top in range(2):
        for left in range(3):
            window = functional.crop(images, top, left, 5, 5)
            matches += (cropped == window).flatten(1).all(1)
    assert (matches == 1).all()


def test_reflect_padding_matches_pytorch():
    images = torch.rand(3, 2, 5, 7)
    expected = torch.nn.functional.pad(images, (4,) * 4, mode="reflect")
    assert torch.equal(pad_images(images, 4, "reflect"), expected)
    integers = (images * 255).to(torch.uint8)  # PyTorch's padding does not support them
    assert torch.equal(
        pad_images(integers, 4, "reflect").float(), pad_images(integers.float(), 4, "reflect")
    )


def test_cutout_fills_one_square_per_image():
    images = torch.rand(4000, 2, 6, 5)
    found = cutout(images, 3, generator())
    changed = (found != images).any(1)
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    assert torch.equal(found, torch.where(changed[:, None], mean, images))
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), rows * columns)  # a rectangle
    unclipped = int(((rows == 3) & (columns == 3)).sum())  # squares that the border does not clip
    expected = 4000 * (4 / 6) * (3 / 5)
    assert abs(unclipped - expected) < 4 * (expected * 0.6) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_fill": "reflect"}, "set crop_padding"),
        ({"mix_probability": 0.5}, "set mix to mixup"),
    ],
)
def test_options_of_a_disabled_augmentation_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("seed", range(6))
def test_mixup_matches_torchvision(seed):
    images, soft = batch(7)
    ours, labels = mix(images, soft, "mixup", generator(seed))
    theirs = tv.MixUp(num_classes=10)
    theirs._dist = FixedBeta(torch.rand((), generator=generator(seed)))
    expected, expected_labels = theirs(images, soft)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7)  # one rounding
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=2e-7)


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_matches_torchvision(seed, monkeypatch):
    images, soft = batch(5, height=9, width=12)
    ours, labels = mix(images, soft, "cutmix", generator(seed))
    replay = generator(seed)
    theirs = tv.CutMix(num_classes=10)
    theirs._dist = FixedBeta(torch.rand((), generator=replay))
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda top, size: randint(top, size, generator=replay))
    expected, expected_labels = theirs(images, soft)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=2e-7)


def test_mix_both_chooses_mixup_and_cutmix_equally_often():
    images, soft = batch(3)
    cut = 0
    for seed in range(400):
        mixed, _ = mix(images, soft, "both", generator(seed))
        cut += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert abs(cut - 200) < 4 * 10


@pytest.mark.parametrize("kind", MIXES)
def test_soft_labels_equal_the_pixel_fractions(kind):
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 6, 6)[:, :3].contiguous()
    images = torch.cat([images, 1 - images.sum(1, keepdim=True)], 1)  # image i is 1 in channel i
    for seed in range(10):
        mixed, soft = mix(images, torch.eye(4), kind, generator(seed))
        torch.testing.assert_close(mixed.mean((2, 3)), soft, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "operation",
    [
        flip,
        lambda x, g, rows=None: random_crop(pad_images(x, 2), 6, g, rows),
        lambda x, g, rows=None: random_crop(x, 4, g, rows),
    ],
)
def test_part_of_a_batch_is_augmented_like_the_full_batch(operation):
    images = torch.rand(8, 3, 6, 6)
    positions = torch.tensor([7, 2, 3])
    whole = operation(images, generator())
    part = operation(images[positions], generator(), rows=Rows(8, positions))
    assert torch.equal(part, whole[positions])


def random_numbers(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, RANDOM_NUMBERS_PER_CROP, generator=generator, dtype=torch.float64)


class FixedRandomNumbers:
    """Replaces ``torch`` inside torchvision; uniform numbers come from a list."""

    def __init__(self, u):
        self.attempts, self.place = iter(u[:-2].tolist()), iter(u[-2:].tolist())
        self.log, self.tensor = torch.log, torch.tensor

    def empty(self, _):
        return self

    def uniform_(self, low, high):
        low, high = float(low), float(high)
        return torch.tensor(low + (high - low) * next(self.attempts), dtype=torch.float64)

    def exp(self, x):
        return x.exp()

    def randint(self, _, high, size):
        return torch.tensor(math.floor(next(self.place) * high))


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (60, 40), (28, 28), (20, 300), (300, 20)]
)
def test_crop_boxes_match_torchvision_for_the_same_random_numbers(height, width, monkeypatch):
    u = random_numbers(100)
    law = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(height, width, Cut(u, (24, 24), *law))
    transform = tv.RandomResizedCrop(24, *law)
    module = __import__(type(transform).__module__, fromlist=["torch"])
    for row, box in zip(u, boxes.tolist(), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(module, "torch", FixedRandomNumbers(row))
            expected = transform.make_params([torch.zeros(3, height, width)])
        assert box == [expected[k] for k in ("top", "left", "height", "width")]


@pytest.mark.parametrize("size", [(8, 8), (20, 24)])
def test_batched_resized_crops_match_torchvision_per_image(size):
    images = make_set(count=40, size=16).images
    boxes = crop_boxes(16, 16, Cut(random_numbers(40), size, (0.08, 1.0)))
    found = resize_boxes(images, boxes, size)
    expected = torch.stack(
        [
            tv.functional.resized_crop(image.float(), *box, list(size), antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert (found - expected).abs().max() < 0.51  # rounded to integers


def test_windows_are_uniform_and_copy_pixels_unchanged():
    u = random_numbers(4000)
    boxes = crop_boxes(7, 9, Cut(u, (4, 4)))
    assert boxes[:, 2:].unique().tolist() == [4]
    places = boxes[:, 0] * 6 + boxes[:, 1]  # 4 rows, 6 columns
    counts = places.bincount(minlength=24)
    assert len(counts) == 24
    assert (((counts - 4000 / 24) ** 2) / (4000 / 24)).sum() < 49.7  # chi2, 23 dof, p = 1e-3
    images = make_set(count=40, size=7).images
    top, left = boxes[0, 0], boxes[0, 1].clamp(max=3)
    same = torch.tensor([[top, left, 4, 4]]).expand(40, 4)
    cut = images[:, :, top : top + 4, left : left + 4]
    assert torch.equal(resize_boxes(images, same, (4, 4)), cut)


@pytest.mark.parametrize("make", [lambda s: s, as_streamed])
def test_resized_crops_do_not_depend_on_the_number_of_processes(make):
    augmentation = Augmentation(crop_scale=(0.2, 0.9), crop_size=4, mix="both")
    config = StreamConfig(batch_size=8, augmentation=augmentation)
    source = make(make_set())

    def stream(**options):
        return Stream(source, config, "ce", 0, "cpu", **options).batches(0, 3)

    ranks = [stream(rank=r, world_size=2) for r in range(2)]
    for whole, *shares in zip(stream(), *ranks, strict=True):
        assert whole.x.shape == (8, 3, 4, 4)
        assert torch.equal(whole.x, torch.cat([share.x for share in shares]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_scale": (0, 1)}, "must rise within 0 to 1"),
        ({"crop_scale": (0.5, 0.2)}, "must rise"),
        ({"crop_scale": (0.5, 1), "crop_padding": 4}, "set only one of them"),
        ({"crop_ratio": (2, 1)}, "must rise from above 0"),
    ],
)
def test_invalid_crop_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)
