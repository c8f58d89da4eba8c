"""Data sets: contents, disjoint splits, and errors for invalid files."""

import os
import pickle
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from ebmkit_tests.support.data_files import (
    SPLITS,
    fake_torchvision,
    image_folder,
    keys,
    load_all,
    write_h5,
)
from ebmkit_tests.support.toy_sets import as_streamed, make_set
from PIL import Image

from ebmkit.data import DATASETS, DatasetEntry, ImageSet, StreamedSet, imagesets, load_dataset
from ebmkit.data.folders import FolderReader
from ebmkit.data.sets import CIFAR, pack
from ebmkit.errors import UserError


def test_digits_match_scikit_learn():
    from sklearn.datasets import load_digits

    published = load_digits()
    by_pixels = {
        image.tobytes(): t for image, t in zip(published.data, published.target, strict=True)
    }
    sets = load_all("digits")
    assert [len(s) for s in sets] == [1293, 144, 360]
    for part in sets:
        values = (part.floats() * 16).round().double().flatten(1)
        for image, label in zip(values.numpy(), part.labels.tolist(), strict=True):
            assert by_pixels[image.tobytes()] == label
        share = part.labels.bincount() / len(part)
        assert (share - 0.1).abs().max() < 0.02  # stratified
    assert sets[0].images.max() == 255
    assert sets[0].class_names == tuple("0123456789")
    # nearly all of the 1,797 scans are different, so overlapping splits would share an image
    assert not set(keys(sets[0])) & set(keys(sets[2]))


@pytest.mark.parametrize("size", [32, 17])
def test_patches_of_different_splits_share_no_pixel(size):
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    regions = {"train": (0, 448), "validation": (448, 512), "test": (512, 640)}
    for split, part in zip(SPLITS, load_all("patches", image_size=size), strict=True):
        assert part.image_size == (size, size)
        assert part.num_classes == 0
        left, right = regions[split]
        stride = size // 4 if split == "train" else size
        bottom = (427 - size) // stride * stride
        last = left + (right - left - size) // stride * stride
        assert last + size <= right
        first, final = part.images[[0, -1]].permute(0, 2, 3, 1).numpy()
        assert (first == photographs[0][:size, left : left + size]).all()
        assert (final == photographs[1][bottom : bottom + size, last : last + size]).all()


def cifar_as_hdf5(place):
    write_h5(place / "cifar10-train.h5", 150)
    write_h5(place / "cifar10-test.h5", 20, seed=1)
    return place


def one_hdf5_file(place, groups=("",)):
    for number, group in enumerate(groups):
        write_h5(place / "set.h5", 60, seed=number, group=group)
    return place / "set.h5"


def folder_with_parts(place):
    for seed, part in enumerate(("train", "test")):
        image_folder(place / part, count=30, seed=seed)
    return place


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("digits", None),
        ("cifar10", cifar_as_hdf5),
        ("hdf5", one_hdf5_file),
        ("folder", folder_with_parts),
        *(
            pytest.param(name, make, marks=pytest.mark.slow)
            for name, make in (
                ("patches", None),
                ("hdf5", lambda place: one_hdf5_file(place, ("train", "test"))),
                ("folder", image_folder),
                ("imagenet", folder_with_parts),
            )
        ),
    ],
)
@pytest.mark.parametrize("limit", [2**30, 100])
def test_training_set_without_held_out_images_has_all(tmp_path, monkeypatch, name, make, limit):
    """Also of streamed sets. Patches that overlap both regions are in neither."""
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", limit)
    data_dir, options = make and make(tmp_path), {"image_size": 8} if name == "imagenet" else {}
    train, validation, test = (labelled(part) for part in load_all(name, data_dir, **options))
    both = load_dataset(name, data_dir, hold_out=False, **options)
    found = labelled(both)
    assert len(validation) > 0
    assert both.split == "train"
    assert isinstance(both, StreamedSet) or make is None or limit > 100
    assert found >= train + validation if name == "patches" else found == train + validation
    assert labelled(load_dataset(name, data_dir, "test", hold_out=False, **options)) == test
    with pytest.raises(UserError, match=f"no images of data set '{name}' are held out"):
        load_dataset(name, data_dir, "validation", hold_out=False, **options)


def labelled(images):
    """How often each image, with its label, is in a set."""
    labels = [None] * len(images) if images.labels is None else images.labels.tolist()
    return Counter(zip(keys(images), labels, strict=True))


def test_patches_without_held_out_images_share_no_pixel_with_the_test_patches():
    from sklearn.datasets import load_sample_images

    last = load_dataset("patches", hold_out=False).images[-1].permute(1, 2, 0).numpy()
    assert (last == load_sample_images().images[1][392:424, 480:512]).all()


def test_one_training_image_suffices_without_held_out_images(tmp_path):
    image_folder(tmp_path / "train", count=1, classes=("ant",))
    with pytest.raises(UserError, match="has 1 training images: at least 2 are needed"):
        load_dataset("folder", tmp_path)
    assert len(load_dataset("folder", tmp_path, hold_out=False)) == 1


def test_cifar_is_read_from_hdf5(tmp_path):
    train = write_h5(tmp_path / "cifar10-train.h5", 150)
    test = write_h5(tmp_path / "cifar10-test.h5", 20, seed=1)
    parts = load_all("cifar10", tmp_path)
    assert [len(p) for p in parts] == [147, 3, 20]
    found = keys(parts[0]) + keys(parts[1])
    assert sorted(found) == sorted(image.transpose(2, 0, 1).tobytes() for image in train["images"])
    assert torch.equal(parts[2].labels, torch.from_numpy(test["labels"]))
    assert torch.equal(parts[2].images.permute(0, 2, 3, 1), torch.from_numpy(test["images"]))
    assert parts[0].class_names[3] == "cat"
    again = load_dataset("cifar10", tmp_path, "train")
    assert torch.equal(again.images, parts[0].images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_is_read_from_the_torchvision_folder(tmp_path, monkeypatch, name, inside):
    base, written = fake_torchvision(tmp_path, name, monkeypatch)
    parts = load_all(name, base if inside else tmp_path, download=False)
    total = 40 * (5 if name == "cifar10" else 1)
    assert len(parts[0]) + len(parts[1]) == total
    assert len(load_dataset(name, tmp_path, download=False, hold_out=False)) == total
    file = "test_batch" if name == "cifar10" else "test"
    assert torch.equal(parts[2].images.flatten(1), torch.from_numpy(written[file]["data"]))
    assert parts[2].labels.tolist() == list(written[file].values())[1]
    assert parts[2].num_classes == len(CIFAR[name].class_names)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_incomplete_cifar_folder_is_refused(tmp_path, monkeypatch, damage):
    base, _ = fake_torchvision(tmp_path, "cifar10", monkeypatch)
    file = base / "data_batch_3"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"incomplete or damaged.*cifar-10-python\.tar\.gz"):
        load_dataset("cifar10", tmp_path, "test")


def test_failed_download_error_names_the_expected_files_and_leaves_no_folder(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def fail(self):
        os.makedirs(self.root)
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", fail)
    folder = tmp_path / "absent"
    with pytest.raises(UserError, match=r"cifar-10-batches-py.*cifar10-train\.h5.*no network"):
        load_dataset("cifar10", folder, "train")
    assert not folder.exists()


def test_single_cifar_hdf5_file_is_read(tmp_path):
    write_h5(tmp_path / "cifar100-test.h5", 200, classes=100)
    assert load_dataset("cifar100", tmp_path, "test").num_classes == 100
    with pytest.raises(UserError, match=r"but not cifar100-train\.h5"):
        load_dataset("cifar100", tmp_path, "train")


def test_missing_cifar_without_download_is_refused(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        load_dataset("cifar10", tmp_path, "train", download=False)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"labels": np.full(20, 10)}, "label 10 is out of range"),
        ({"labels": np.full(20, -1)}, "label -1 is out of range"),
        ({"labels": np.zeros(19, int)}, "20 images need 20"),
        ({"labels": np.zeros(20)}, "whole-numbered"),
        ({"labels": None}, "labels"),
        ({"images": None}, "has no array"),
        ({"images": np.zeros((20, 32, 32, 3), np.float32)}, "uint8"),
        ({"images": np.zeros((20, 32, 32), np.uint8)}, r"\(N, H, W, C\)"),
        ({"images": np.zeros((20, 3, 32, 32), np.uint8)}, r"\(N, H, W, C\)"),
        ({"images": np.zeros((20, 16, 16, 3), np.uint8)}, "32, 32, 3"),
    ],
)
def test_invalid_cifar_arrays_give_a_one_line_error(tmp_path, replaced, message):
    path = tmp_path / "cifar10-test.h5"
    write_h5(path, 20, **replaced)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("cifar10", tmp_path, "test")
    assert "cifar10-test.h5" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cifar_file_with_classes_in_another_order_is_refused(tmp_path):
    write_h5(tmp_path / "cifar10-test.h5", 50)
    with h5py.File(tmp_path / "cifar10-test.h5", "a") as file:
        file["class_names"] = sorted(CIFAR["cifar10"].class_names, reverse=True)
    with pytest.raises(UserError, match=r"has class 'truck' where the published .* 'airplane'"):
        load_dataset("cifar10", tmp_path, "test")


def test_truncated_hdf5_file_is_refused(tmp_path):
    path = tmp_path / "cifar10-test.h5"
    write_h5(path, 50)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="damaged, incomplete"):
        load_dataset("cifar10", tmp_path, "test")


@pytest.mark.parametrize("limit", [2**30, 0])
def test_folder_in_memory_and_streamed_is_the_same_set(tmp_path, monkeypatch, limit):
    image_folder(tmp_path / "train", 30)
    image_folder(tmp_path / "test", 5, seed=1)
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", limit)
    parts = load_all("folder", tmp_path)
    assert [len(p) for p in parts] == [59, 1, 10]
    for part in parts:
        assert isinstance(part, ImageSet if limit else StreamedSet)
        assert part.class_names == ("ant", "bee")
        assert part.image_size == (8, 8)
        for images, labels in part.batches(4):
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert len(set(keys(parts[0]) + keys(parts[1]))) == 60
    assert len(parts[0].first(7)) == 7
    for part, few in (parts[0], 8), (parts[2], 5):
        assert set(part.first(few).labels.tolist()) == {0, 1}  # not sorted by class


def test_pickled_streamed_set_reads_the_same_images(tmp_path, monkeypatch):
    image_folder(tmp_path, 30)
    in_memory = load_dataset("folder", tmp_path, "train")
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 0)
    streamed = pickle.loads(pickle.dumps(load_dataset("folder", tmp_path, "train")))
    for index in (0, 5, len(in_memory) - 1):
        (image,), labels = streamed.read([index])
        assert torch.equal(image, in_memory.images[index])
        assert labels[0] == in_memory.labels[index]


def test_class_folders_without_parts_are_split_by_path(tmp_path):
    image_folder(tmp_path, 100)
    before = load_dataset("folder", tmp_path, "test")
    parts = load_all("folder", tmp_path)
    every = [key for part in parts for key in keys(part)]
    assert len(set(every)) == 200  # each image once
    assert abs(len(parts[2]) - 20) < 4 * (200 * 0.09) ** 0.5
    Image.new("RGB", (8, 8)).save(tmp_path / "ant" / "new.png")
    after = set(keys(load_dataset("folder", tmp_path, "test")))
    assert set(keys(before)) <= after  # a new file does not move other files


def test_loose_images_make_a_set_without_labels(tmp_path):
    for folder in ("train", "test"):
        image_folder(tmp_path / folder, 5, classes=("",), mode="L")
    part = load_dataset("folder", tmp_path, "train")
    assert (part.labels, part.num_classes, part.channels) == (None, 0, 1)


def test_mixed_sizes_are_resized_and_center_cropped(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    Image.fromarray(wide).save(folder / "wide.png")
    Image.fromarray(np.full((40, 20), 200, np.uint8)).save(folder / "gray.png")
    with pytest.raises(UserError, match="--image-size"):
        load_dataset("folder", tmp_path, "train")
    parts = [load_dataset("folder", tmp_path, split, image_size=8) for split in SPLITS[:2]]
    for part in parts:
        assert part.channels == 1  # the file stored in colour has none
        assert ((part.images.float() - 200).abs() < 2)[..., 1:-1].all()


def test_colour_image_in_a_gray_set_is_refused_when_read(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*convert it to gray"):
        FolderReader(tmp_path, ["a.png"], 1, (8, 8)).read([0])


def test_empty_class_folder_shifts_no_label(tmp_path):
    image_folder(tmp_path / "train", 9, classes=("cat", "dog", "eel"))
    image_folder(tmp_path / "test", 3, classes=("cat", "dog"))
    (tmp_path / "train" / "@eaDir").mkdir()
    with pytest.warns(UserWarning, match="hold no images and are no classes, such as '@eaDir'"):
        train = load_dataset("folder", tmp_path, "train")
    test = load_dataset("folder", tmp_path, "test")
    assert train.class_names == test.class_names == ("cat", "dog", "eel")
    assert test.labels.bincount().tolist() == [3, 3]
    with pytest.warns(UserWarning, match="@eaDir"):
        pack(tmp_path, tmp_path / "a.h5", progress=False)
    packed = load_dataset("hdf5", tmp_path / "a.h5", "test")
    assert packed.class_names == ("cat", "dog", "eel")
    assert packed.labels.bincount().tolist() == [3, 3]


@pytest.mark.parametrize(
    ("colour", "channels", "split", "size"),
    [
        ("gray", 1, "train", None),
        ("red", 3, "test", None),
        ("red", 3, "train", 8),
        ("red", 3, "test", 8),
    ],
)
def test_channels_are_decided_by_the_pixels_of_all_splits(tmp_path, colour, channels, split, size):
    for part in ("train", "test"):
        image_folder(tmp_path / part, 110, mode="L")
    Image.new("RGBA", (8, 8), colour).save(tmp_path / split / "ant" / "051.png")
    parts = [load_dataset("folder", tmp_path, part, image_size=size) for part in ("train", "test")]
    assert [part.channels for part in parts] == [channels, channels]


def test_labels_that_start_at_1_give_a_warning(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((200, 8, 8, 1), np.uint8)
        file["labels"] = 1 + np.arange(200) % 10
    with pytest.warns(UserWarning, match=r"no image of class '0': .* 1 to 10 .* subtract 1"):
        load_dataset("hdf5", tmp_path / "a.h5", "train")
    with pytest.warns(UserWarning, match="subtract 1"):
        ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 2, 2, 1]))


def test_labels_are_numbered_as_in_a_model():
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    own = ImageSet(images, torch.tensor([0, 1, 1]), ("cat", "eel"))
    matched = own.with_classes(["eel", "dog", "cat"])
    assert (matched.labels.tolist(), matched.num_classes) == ([2, 0, 0], 3)
    assert own.with_classes(["0", "1"]) is own  # no name in common
    with pytest.warns(UserWarning, match="the model has no class 'eel'"):
        assert own.with_classes(["cat", "dog"]).labels is None


def test_files_that_are_not_images_give_a_warning(tmp_path):
    image_folder(tmp_path, 3)
    (tmp_path / "ant" / "notes.txt").write_text("hello")
    (tmp_path / "ant" / ".DS_Store").write_text("hidden")
    with pytest.warns(UserWarning, match=r"1 files .* not images .*notes\.txt"):
        load_dataset("folder", tmp_path, "train")


def damaged_folder(root, what):
    if what == "absent":
        return root / "absent"
    if what == "file":
        (root / "file").touch()
        return root / "file"
    if what == "empty":
        return root
    if what == "no test":
        image_folder(root / "train")
        return root
    if what == "unknown class":
        image_folder(root / "train")
        image_folder(root / "test", classes=("wasp",))
        return root
    image_folder(root / "train")
    image_folder(root / "test")
    if what == "corrupt":
        (root / "test" / "ant" / "004.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    elif what == "16 bits":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(root / "test" / "ant" / "004.png")
    elif what == "loose":
        Image.new("RGB", (8, 8)).save(root / "test" / "loose.png")
    return root


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "does not exist"),
        ("file", "is not a folder"),
        ("empty", "holds no test images"),
        ("no test", "put test/CLASS"),
        ("unknown class", "'wasp'"),
        ("corrupt", r"004\.png"),
        ("16 bits", r"004\.png.*16 bits"),
        ("loose", "class folder"),
    ],
)
def test_invalid_folders_give_a_one_line_error(tmp_path, what, message):
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("folder", damaged_folder(tmp_path, what), "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifer10", {}, "did you mean 'cifar10'"),
        ("digits", {"split": "tests"}, "did you mean 'test'"),
        ("digits", {"image_size": 32}, "8x8"),
        ("cifar10", {"image_size": 64}, "32x32"),
        ("patches", {"image_size": 65}, "4 to 64"),
        ("patches", {"image_size": 0}, "1 or more"),
        ("folder", {}, "--data-dir"),
        ("hdf5", {}, "--data-dir"),
    ],
)
def test_invalid_arguments_are_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        load_dataset(name, **options)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), None, "uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"\(N, C, H, W\)"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, "1 or 3 channels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), "label 2 is out"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0]), "2 images need"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), "int64"),
    ],
)
def test_invalid_image_sets_are_refused(images, labels, message):
    with pytest.raises(UserError, match=rf"'mine'.*{message}"):
        ImageSet(images, labels, ("a", "b"), "mine")


@pytest.mark.parametrize("make", [lambda s: s, as_streamed])
def test_image_set_and_streamed_set_have_the_same_interface(make):
    images = make(make_set())
    batches = list(images.batches(10))
    assert [len(x) for x, _ in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([x for x, _ in batches]), make_set().floats())
    assert torch.equal(torch.cat([c for _, c in batches]), make_set().labels)
    assert (images.channels, images.image_size, images.num_classes) == (3, (6, 6), 4)
    assert len(images.first(5)) == 5
    assert len(images.first(99)) == 23


def test_every_data_set_has_a_description():
    assert list(DATASETS) == [
        "digits",
        "patches",
        "cifar10",
        "cifar100",
        "folder",
        "imagenet",
        "pictures",
        "hdf5",
    ]
    assert all(entry.description for entry in DATASETS.values())


def test_spread_selects_evenly_from_a_sorted_set():
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1)
    sorted_set = ImageSet(images, torch.arange(40) // 10, ("a", "b", "c", "d"))
    some = sorted_set.spread(8)
    assert some.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert some.images.flatten().tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert sorted_set.spread(100) is sorted_set


def test_default_class_names_are_their_numbers():
    images = torch.randint(256, (6, 3, 8, 8)).to(torch.uint8)
    labels = torch.tensor([0, 2, 1, 0, 1, 2])
    own = ImageSet(images, labels)
    assert own.class_names == ("0", "1", "2")
    assert own.first(1).num_classes == 3
    (found, tags), *_ = own.batches(4)
    assert torch.equal(found, images[:4] / 255)
    assert torch.equal(tags, labels[:4])
    assert ImageSet(images).num_classes == 0
    chosen = own.select(torch.tensor([5, 0]))
    assert torch.equal(chosen.images, images[[5, 0]])
    assert chosen.labels.tolist() == [2, 0]


def test_registered_data_set_is_loaded_by_name(monkeypatch, tmp_path):
    def load(request):
        assert request.path("a folder") == tmp_path
        request.check_size(8)
        return ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), name=request.name)

    monkeypatch.setitem(DATASETS, "zeros", DatasetEntry(load, "zeros"))
    assert load_dataset("zeros", tmp_path).name == "zeros"
    with pytest.raises(UserError, match="8x8, not 9"):
        load_dataset("zeros", tmp_path, image_size=9)


@pytest.mark.parametrize("make", [lambda s: s, as_streamed])
def test_sample_is_balanced_nested_and_drawn_by_the_seed(make):
    """With 3 images of class 0, the other classes fill up larger samples."""
    images = torch.arange(43, dtype=torch.uint8).reshape(43, 1, 1, 1).expand(43, 3, 6, 6)
    labels = torch.tensor([0] * 3 + [1] * 20 + [2] * 20)
    whole = make(ImageSet(images.contiguous(), labels, ("a", "b", "c")))

    def numbers(n, seed=0):
        part = whole.sample(n, seed)
        x, c = next(part.batches(100))
        found = (255 * x[:, 0, 0, 0]).round().long()
        assert torch.equal(labels[found], c)
        return found.tolist()

    for n, expected in [(6, [2, 2, 2]), (7, [2, 2, 3]), (21, [3, 9, 9]), (43, [3, 20, 20])]:
        counts = labels[numbers(n)].bincount(minlength=3)
        assert sorted(counts.tolist()) == expected
        assert len(set(numbers(n))) == n
    assert numbers(21)[:6] == numbers(6)
    assert numbers(21) == numbers(21)
    assert set(numbers(6)) != set(numbers(6, seed=1))
    assert len(whole.sample(99, 0)) == 43


def test_sample_without_labels_is_random():
    unlabelled = ImageSet(torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1))
    found = unlabelled.sample(10, 3).images.flatten().tolist()
    assert len(set(found)) == 10
    assert found != sorted(found)
