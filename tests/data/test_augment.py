"""Augmentation against torchvision's own: its law, and its pixels."""

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


class Drawn:
    """Stands in for torchvision's Beta distribution: gives the lambda that we drew."""

    def __init__(self, lam):
        self.lam = lam

    def sample(self, shape):
        return self.lam


def batch(count, height=8, width=8):
    images = torch.rand(count, 3, height, width)
    return images, torch.nn.functional.one_hot(torch.arange(count) % 10, 10).float()


def test_flips_mirror_half_of_the_images():
    images = torch.rand(2000, 1, 2, 5)
    flipped = flip(images, generator())
    mirrored = (flipped == functional.hflip(images)).flatten(1).all(1)
    kept = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert abs(int(mirrored.sum()) - 1000) < 4 * (2000 / 4) ** 0.5


def test_padded_crops_are_torchvisions_at_uniform_offsets():
    count, padding = 2500, 2
    images = torch.rand(count, 1, 4, 6)
    cropped = random_crop(pad_images(images, padding), (4, 6), generator())
    found = torch.zeros(2 * padding + 1, 2 * padding + 1)
    wide = functional.pad(images, [padding] * 4)
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            window = functional.crop(wide, top, left, 4, 6)
            found[top, left] = (cropped == window).flatten(1).all(1).sum()
    assert found.sum() == count  # every image is one of them, and only one
    expected = count / found.numel()
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < 52  # 24 degrees of freedom, 0.1 %


def test_random_crops_are_torchvisions_per_image():
    images = torch.rand(400, 3, 6, 7)
    cropped = random_crop(images, 5, generator())
    matches = torch.zeros(400, dtype=torch.long)
    for top in range(2):
        for left in range(3):
            window = functional.crop(images, top, left, 5, 5)
            matches += (cropped == window).flatten(1).all(1)
    assert (matches == 1).all()


def test_reflected_padding_is_torchs():
    images = torch.rand(3, 2, 5, 7)
    expected = torch.nn.functional.pad(images, (4,) * 4, mode="reflect")
    assert torch.equal(pad_images(images, 4, "reflect"), expected)
    whole = (images * 255).to(torch.uint8)  # which torch's does not take
    assert torch.equal(
        pad_images(whole, 4, "reflect").float(), pad_images(whole.float(), 4, "reflect")
    )


def test_cutout_paints_one_square_around_each_centre():
    images = torch.rand(4000, 2, 6, 5)
    found = cutout(images, 3, generator())
    changed = (found != images).any(1)
    mean = images.mean((2, 3), keepdim=True).expand_as(images)
    assert torch.equal(found, torch.where(changed[:, None], mean, images))
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), rows * columns)  # a rectangle
    whole = int(((rows == 3) & (columns == 3)).sum())  # centres that are no rim's
    expected = 4000 * (4 / 6) * (3 / 5)
    assert abs(whole - expected) < 4 * (expected * 0.6) ** 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop_fill": "reflect"}, "set crop_padding"),
        ({"mix_probability": 0.5}, "set mix to mixup"),
    ],
)
def test_options_of_what_is_not_done_are_refused(options, words):
    with pytest.raises(Exception, match=words):
        Augmentation(**options)


@pytest.mark.parametrize("seed", range(6))
def test_mixup_is_torchvisions(seed):
    images, soft = batch(7)
    ours, labels = mix(images, soft, "mixup", generator(seed))
    theirs = tv.MixUp(num_classes=10)
    theirs._dist = Drawn(torch.rand((), generator=generator(seed)))
    expected, expected_labels = theirs(images, soft)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-7)  # one rounding
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=2e-7)


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_is_torchvisions(seed, monkeypatch):
    images, soft = batch(5, height=9, width=12)
    ours, labels = mix(images, soft, "cutmix", generator(seed))
    replay = generator(seed)
    theirs = tv.CutMix(num_classes=10)
    theirs._dist = Drawn(torch.rand((), generator=replay))
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda top, size: randint(top, size, generator=replay))
    expected, expected_labels = theirs(images, soft)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(labels, expected_labels, rtol=0, atol=2e-7)


def test_both_chooses_each_half_of_the_time():
    images, soft = batch(3)
    cut = 0
    for seed in range(400):
        mixed, _ = mix(images, soft, "both", generator(seed))
        cut += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert abs(cut - 200) < 4 * 10


@pytest.mark.parametrize("kind", MIXES)
def test_soft_labels_stay_probabilities_and_follow_the_pixels(kind):
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
def test_a_part_of_a_batch_gets_what_the_whole_would_give_it(operation):
    images = torch.rand(8, 3, 6, 6)
    positions = torch.tensor([7, 2, 3])
    whole = operation(images, generator())
    part = operation(images[positions], generator(), rows=Rows(8, positions))
    assert torch.equal(part, whole[positions])


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, RANDOM_NUMBERS_PER_CROP, generator=generator, dtype=torch.float64)


class GivenNumbers:
    """Stands in for torch inside torchvision: uniform numbers come from a list."""

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
def test_boxes_are_torchvision_s_from_the_same_numbers(height, width, monkeypatch):
    u = drawn(100)
    law = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = crop_boxes(height, width, Cut(u, (24, 24), *law))
    transform = tv.RandomResizedCrop(24, *law)
    module = __import__(type(transform).__module__, fromlist=["torch"])
    for row, box in zip(u, boxes.tolist(), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(module, "torch", GivenNumbers(row))
            expected = transform.make_params([torch.zeros(3, height, width)])
        assert box == [expected[k] for k in ("top", "left", "height", "width")]


@pytest.mark.parametrize("size", [(8, 8), (20, 24)])
def test_batches_are_cut_and_resized_as_torchvision_does_one_by_one(size):
    images = make_set(count=40, size=16).images
    boxes = crop_boxes(16, 16, Cut(drawn(40), size, (0.08, 1.0)))
    found = resize_boxes(images, boxes, size)
    expected = torch.stack(
        [
            tv.functional.resized_crop(image.float(), *box, list(size), antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert (found - expected).abs().max() < 0.51  # rounded to a grey level


def test_windows_are_uniform_and_change_no_pixel():
    u = drawn(4000)
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
def test_a_stream_resizes_its_crops_the_same_on_any_number_of_processes(make):
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
    ("fields", "told"),
    [
        ({"crop_scale": (0, 1)}, "must rise within 0 to 1"),
        ({"crop_scale": (0.5, 0.2)}, "must rise"),
        ({"crop_scale": (0.5, 1), "crop_padding": 4}, "set only one of them"),
        ({"crop_ratio": (2, 1)}, "must rise from above 0"),
    ],
)
def test_crops_that_make_no_sense_are_told(fields, told):
    with pytest.raises(ValueError, match=told):
        Augmentation(**fields)
