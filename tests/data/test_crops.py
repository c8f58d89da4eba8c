"""Crops whose boxes are drawn on the host: torchvision's law, and torchvision's pixels."""

import math

import pytest
import torch
from torchvision.transforms import v2
from toy_sets import as_streamed, make_set

from ebmkit.data import Augmentation, Stream, StreamConfig
from ebmkit.data.augment import DRAWS, Crop, Cut, crop_boxes, resize_boxes


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, DRAWS, generator=generator, dtype=torch.float64)


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
    law = Crop((24, 24), (0.08, 1.0), (3 / 4, 4 / 3))
    boxes = crop_boxes(height, width, Cut(law, u))
    transform = v2.RandomResizedCrop(24, law.scale, law.ratio)
    module = __import__(type(transform).__module__, fromlist=["torch"])
    for row, box in zip(u, boxes.tolist(), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(module, "torch", GivenNumbers(row))
            expected = transform.make_params([torch.zeros(3, height, width)])
        assert box == [expected[k] for k in ("top", "left", "height", "width")]


@pytest.mark.parametrize("size", [(8, 8), (20, 24)])
def test_batches_are_cut_and_resized_as_torchvision_does_one_by_one(size):
    images = make_set(count=40, size=16).images
    boxes = crop_boxes(16, 16, Cut(Crop(size, (0.08, 1.0)), drawn(40)))
    found = resize_boxes(images, boxes, size)
    expected = torch.stack(
        [
            v2.functional.resized_crop(image.float(), *box, list(size), antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert (found - expected).abs().max() < 0.51  # rounded to a grey level


def test_windows_are_uniform_and_change_no_pixel():
    u = drawn(4000)
    boxes = crop_boxes(7, 9, Cut(Crop((4, 4)), u))
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
        ({"crop_scale": (0.5, 1), "crop_padding": 4}, "take one of them"),
        ({"crop_ratio": (2, 1)}, "must rise from above 0"),
    ],
)
def test_crops_that_make_no_sense_are_told(fields, told):
    with pytest.raises(ValueError, match=told):
        Augmentation(**fields)
