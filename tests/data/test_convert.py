"""Data sets from tensors, arrays and data sets of other libraries."""

import numpy as np
import pytest
import torch
from ebmkit_tests.support.data_files import image_folder
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from ebmkit.data import ImageSet, StreamedSet, as_images, imagesets
from ebmkit.errors import UserError

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

PIXELS = torch.randint(256, (6, 3, 4, 5), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Items:
    """A map-style data set of given items."""

    def __init__(self, items, **attributes):
        self.items = list(items)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def pil(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


PAIRS = list(zip(PIXELS, LABELS.tolist(), strict=True))
SOURCES = {
    "tensors": (PIXELS, LABELS),
    "floats": (PIXELS.double() / 255, LABELS.tolist()),
    "arrays, channels last": (PIXELS.permute(0, 2, 3, 1).numpy(), LABELS.numpy()[:, None]),
    "TensorDataset": TensorDataset(PIXELS.float() / 255, LABELS),
    "PIL": Items((pil(x), c) for x, c in PAIRS),
    "Subset": Subset(TensorDataset(PIXELS, LABELS), range(6)),
    "mappings": Items({"label": c, "image": x.permute(1, 2, 0).numpy()} for x, c in PAIRS),
    "IterableDataset": Stream(PAIRS),
    "generator": (pair for pair in PAIRS),
    "names": Items(((x, "xyz"[c]) for x, c in PAIRS)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_images_and_labels(kind):
    found = as_images(SOURCES[kind])
    assert torch.equal(found.images, PIXELS)
    assert torch.equal(found.labels, LABELS)
    assert found.class_names == (("x", "y", "z") if kind == "names" else ("0", "1", "2"))
    assert repr(found) == "ImageSet('images', 'train': 6 images of 3x4x5, 3 classes)"


def test_large_source_is_read_by_index(monkeypatch):
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 100)
    found = as_images(SOURCES["PIL"])
    assert isinstance(found, StreamedSet)
    images, labels = found.read([4, 1])
    assert torch.equal(images, PIXELS[[4, 1]])
    assert labels.tolist() == [1, 1]
    with pytest.raises(UserError, match=r"more than 1 do not fit in .* MiB; set limit"):
        as_images(Stream(PAIRS))
    assert len(as_images(Stream(PAIRS), limit=1)) == 1


def test_images_without_labels_and_gray_images():
    gray = PIXELS[:, :1]
    for source in (gray[:, 0], Items(x[0].numpy() for x in gray), TensorDataset(gray)):
        found = as_images(source)
        assert torch.equal(found.images, gray)
        assert found.labels is None
    mixed = as_images(Items([gray[0], PIXELS[1]]))
    assert torch.equal(mixed.images, torch.stack([gray[0].expand(3, -1, -1), PIXELS[1]]))
    train = as_images((PIXELS, list("abcabc")))
    held = as_images((gray, ["c"] * 6), "validation", like=train)
    assert (held.channels, held.labels[0], held.class_names) == (3, 2, ("a", "b", "c"))


def test_path_is_a_folder_and_image_size_resizes(tmp_path):
    image_folder(tmp_path / "train", 5)
    assert as_images(str(tmp_path), image_size=6).image_size == (6, 6)
    assert as_images(Items([PIXELS[0], PIXELS[1, :, :3]]), image_size=3).image_size == (3, 3)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ((PIXELS[:0], LABELS[:0]), {}, "has no images"),
        (Items([]), {}, "has no images"),
        (Stream([]), {}, "has no images"),
        ((PIXELS.float(), LABELS), {}, r"values from 0 to 255: images are floats in \[0, 1\]"),
        ((PIXELS / 127.5 - 1, LABELS), {}, "values from -1 to 1: .* leave out the normalisation"),
        ((PIXELS.long(), LABELS), {}, "values are int64: convert images to uint8"),
        (Items([(Image.new("F", (4, 4)), 0)]), {}, "item 0 .* has 32 bits per pixel"),
        ((PIXELS, LABELS[:4]), {}, "6 images and 4 labels"),
        ((PIXELS, LABELS - 1), {}, "label -1 is out of range: labels are 0 to 1"),
        ((PIXELS, LABELS), {"class_names": ["a", "b"]}, "label 2 is out of range"),
        ((PIXELS, LABELS / 2), {}, "label 0.0 of item 0 is no whole number"),
        ((PIXELS, list("abcabc")), {"class_names": ["a", "b"]}, "'c' is none of the classes a, b"),
        (Items([PIXELS[0], PIXELS[1, :, :3]]), {}, "differ in size .*item 1 .*3x5, item 0 4x5"),
        (Items([{"image": PIXELS[0]}]), {"image": "img"}, "no column 'img': the columns are image"),
        (Items([{"a": 1}]), {}, "0 columns of images: set image; the columns are a"),
        (Items([{"image": PIXELS[0], "label": 0, "target": 0}]), {}, "label and target: set label"),
        (Items([(PIXELS[0], 0, 1)]), {}, "tuples of 3: set image and label"),
        (Items([("a.png", 0)]), {}, "item 0 .* is a str: give a PIL image, tensor or array"),
        (Items([(Image.new("RGBA", (4, 4)), 0)]), {}, "is partly transparent"),
        (DataLoader(TensorDataset(PIXELS)), {}, "a DataLoader is no data set"),
        ({"train": [], "test": []}, {}, "give one of 'train', 'test'"),
        (7, {}, "7 is no data set"),
        ("digts", {}, "did you mean 'digits'"),
    ],
)  # fmt: skip
def test_unusable_sources_are_refused_in_one_sentence(source, options, message):
    with pytest.raises(UserError, match=message):
        as_images(source, **options)


def test_images_stored_in_colour_without_a_pixel_in_colour_are_gray():
    gray = PIXELS[:, :1]
    pictures = [Image.fromarray(x[0].numpy()) for x in gray]
    pictures[2] = pictures[2].convert("RGBA")
    assert torch.equal(as_images(Items(pictures)).images, gray)
    held = as_images(Items([pictures[2]]), "validation", like=as_images(gray))
    assert torch.equal(held.images, gray[2:3])
    assert as_images(Items([pictures[2]])).channels == 3  # all are stored in colour


def test_classes_of_other_splits_are_matched_by_name():
    """As of two image folders of torchvision, of which one lacks a class."""
    train = as_images(Items(PAIRS, classes=["cat", "dog", "eel"]))
    pairs = [(PIXELS[0], 0), (PIXELS[1], 1)]
    held = as_images(Items(pairs, classes=["cat", "eel", "fox"]), "test", like=train)
    assert (held.labels.tolist(), held.class_names) == ([0, 2], train.class_names)
    with pytest.raises(UserError, match="test images have the class 'ant', and the training"):
        as_images(Items(pairs, classes=["cat", "ant"]), "test", like=train)
    unnamed = as_images((PIXELS, LABELS))
    held = as_images(Items(pairs, classes=["cat", "dog"]), "test", like=unnamed)
    assert (held.labels.tolist(), held.class_names) == ([0, 1], ("0", "1", "2"))


def test_validation_that_does_not_fit_is_refused():
    train = as_images((PIXELS[:, :1], LABELS))
    for source, message in (((PIXELS, LABELS), "in colour"), (PIXELS, "have no labels")):
        with pytest.raises(UserError, match=message):
            as_images(source, "validation", like=train)


def test_random_transforms_and_absent_classes_give_a_warning():
    class Random(Items):
        def __getitem__(self, row):
            return torch.rand(1, 4, 4), row

    with pytest.warns(UserWarning, match="item 0 .* differs each time it is read"):
        as_images(Random(range(3)))
    with pytest.warns(UserWarning, match="no image of class .0."):
        as_images((PIXELS, LABELS + 1))


def test_hugging_face_columns_are_found_by_type():
    datasets = pytest.importorskip("datasets")
    kinds = {"photo": datasets.Image(), "species": datasets.ClassLabel(names=["a", "b", "c"])}
    rows = {"photo": [pil(x) for x in PIXELS], "species": LABELS.tolist()}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    named = data.rename_columns({"photo": "image", "species": "label"})
    unknown = named.to_iterable_dataset().map(lambda row: row)  # features are unknown
    for source in (data, data.to_iterable_dataset(), unknown):
        found = as_images(source)
        assert torch.equal(found.images, PIXELS)
        assert torch.equal(found.labels, LABELS)
        assert found.class_names == (("a", "b", "c") if source is not unknown else ("0", "1", "2"))
    with pytest.raises(UserError, match="no column 'fotos': the columns are photo, species"):
        as_images(data, image="fotos")
    with pytest.raises(UserError, match="give one of 'train'"):
        as_images(datasets.DatasetDict(train=data))


def test_hugging_face_labels_are_read_without_images(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 100)
    rows = {"image": [pil(x) for x in PIXELS], "label": LABELS.tolist()}
    found = as_images(datasets.Dataset.from_dict(rows))
    assert isinstance(found, StreamedSet)
    assert torch.equal(found.labels, LABELS)
    assert torch.equal(found.read([5])[0][0], PIXELS[5])


def test_image_sets_are_returned_unchanged():
    own = ImageSet(PIXELS)
    assert as_images(own) is own
    assert np.shares_memory(as_images((PIXELS, LABELS)).images.numpy(), PIXELS.numpy())
