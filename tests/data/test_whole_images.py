"""ImageNet's protocol on a folder of images of many sizes, with torchvision as reference."""

import numpy as np
import pytest
import torch
from ebmkit_tests.support.toy_sets import drawn
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from ebmkit.data import Augmentation, ImageSet, NoiseLaw, Stream, StreamConfig, load_dataset
from ebmkit.data.augment import RANDOM_NUMBERS_PER_CROP, Cut, crop_boxes
from ebmkit.errors import UserError

SIZE, SIDE = 28, 32  # 224 and 256, divided by 8


def image_folder(root, count=6, classes=("n01", "n02")):
    rng = np.random.default_rng(0)
    for part, number in (("train", count), ("val", 3)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                height, width = rng.integers(20, 65, 2)
                pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
                mode = "L" if i == 1 else "RGB"
                image = Image.fromarray(pixels).convert(mode)
                image.save(root / part / name / f"{i}.JPEG", quality=95)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("pictures"))


def load(folder, split="train"):
    return load_dataset("imagenet", folder, split, image_size=SIZE)


def test_evaluation_images_match_resize_and_center_crop(folder):
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(SIDE), v2.CenterCrop(SIZE)])
    expected = ImageFolder(folder / "val", transform)
    found = load(folder, "test")
    assert isinstance(found, ImageSet)
    assert found.class_names == ("n01", "n02")
    order = {image.numpy().tobytes(): label for image, label in expected}
    assert len(order) == len(found) == 6
    for image, label in zip(found.images, found.labels.tolist(), strict=True):
        assert order[image.numpy().tobytes()] == label


def originals(source):
    """The training images as stored in their files, in the order of the set."""
    reader = source.reader
    for row in source.rows.tolist():
        name = reader._names[row].decode()
        yield v2.functional.pil_to_tensor(Image.open(reader.root / name).convert("RGB"))


def test_resized_crops_use_the_original_pixels(folder):
    source = load(folder)
    cut = Cut(
        torch.rand(len(source), RANDOM_NUMBERS_PER_CROP, dtype=torch.float64),
        (SIZE, SIZE),
        (0.08, 1.0),
    )
    found, _ = source.read(range(len(source)), cut)
    for i, (image, original) in enumerate(zip(found, originals(source), strict=True)):
        cut_i = cut.of(i)
        box = crop_boxes(*original.shape[1:], cut_i)[0].tolist()
        expected = v2.functional.resized_crop(original, *box, [SIZE, SIZE], antialias=True)
        assert torch.equal(image, expected)


def test_windows_are_taken_at_the_scale_of_evaluation(folder):
    source = load(folder)
    cut = Cut(torch.rand(len(source), RANDOM_NUMBERS_PER_CROP, dtype=torch.float64), (20, 20))
    found, _ = source.read(range(len(source)), cut)
    for image, original in zip(found, originals(source), strict=True):
        resized = v2.functional.resize(original, [SIDE])
        windows = resized.unfold(1, 20, 1).unfold(2, 20, 1)  # (3, rows, columns, 20, 20)
        assert (windows == image[:, None, None]).all(-1).all(-1).all(0).any()


@pytest.mark.parametrize("scale", [None, (0.08, 1.0)])
def test_streams_do_not_depend_on_workers_first_step_or_ranks(folder, scale):
    config = StreamConfig(
        batch_size=4,
        augmentation=Augmentation(flip=True, crop_size=16, crop_scale=scale, mix="both"),
        noise=NoiseLaw(kind="fixed", max="25/255"),
    )

    def batches(start=0, **options):
        return list(Stream(load(folder), config, "ce", 0, "cpu", **options).batches(start, 3))

    whole = batches()
    others = [batches(workers=2), [*batches()[:1], *batches(1)]]
    shares = [batches(rank=r, world_size=2) for r in range(2)]
    others.append(
        [
            [torch.cat(pair) for pair in zip(*map(drawn, both), strict=True)]
            for both in zip(*shares, strict=True)
        ]
    )
    for other in others:
        for a, b in zip(whole, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(drawn(a), drawn(b), strict=True))
    assert not torch.equal(whole[0].x, whole[1].x)


@pytest.mark.parametrize("scale", [None, (0.08, 1.0)])
def test_each_sample_has_its_own_crop(folder, scale):
    config = StreamConfig(batch_size=4, augmentation=Augmentation(crop_size=16, crop_scale=scale))
    one = load(folder).first(1)
    crops = [b.x for b in Stream(one, config, "ce", 0, "cpu").batches(0, 3)]
    assert len(torch.cat(crops).flatten(1).unique(dim=0)) == 12  # different crops of one image


def test_invalid_crop_settings_are_refused(folder):
    for fields, message in (
        ({"crop_size": 33}, "shorter side of the images, 32: take at most 32"),
        ({"crop_padding": 4}, "set crop_padding to 0"),
    ):
        config = StreamConfig(augmentation=Augmentation(**fields))
        with pytest.raises(UserError, match=message):
            Stream(load(folder), config, "ce", 0, "cpu")


def test_val_is_the_test_set_unless_test_has_class_folders(tmp_path):
    root = image_folder(tmp_path, count=2)
    assert len(load_dataset("folder", root, "test", image_size=8)) == 6
    (root / "test").mkdir()
    Image.new("RGB", (30, 30)).save(root / "test" / "unlabelled.JPEG")  # as in ImageNet
    assert len(load(root, "test")) == 6
    (root / "test" / "n01").mkdir()
    (root / "test" / "unlabelled.JPEG").rename(root / "test" / "n01" / "a.JPEG")
    assert len(load_dataset("folder", root, "test", image_size=8)) == 1


def test_validation_images_without_class_folders_are_refused(tmp_path):
    root = image_folder(tmp_path, count=2)
    for name in ("n01", "n02"):
        for i, path in enumerate((root / "val" / name).iterdir()):
            path.rename(root / "val" / f"{name}-{i}.JPEG")
        (root / "val" / name).rmdir()
    with pytest.raises(UserError, match="loose images and train/ has class folders: sort them"):
        load(root, "test")
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("imagenet")
