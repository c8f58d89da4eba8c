"""Packing into HDF5 is lossless and leaves no files when it fails."""

import os
import pickle

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

from ebmkit.data import Stream, StreamConfig, StreamedSet, imagesets, load_dataset
from ebmkit.data.hdf5 import read_contents
from ebmkit.data.sets import pack
from ebmkit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """30 + 30 training and 5 + 5 test images in two classes."""
    image_folder(tmp_path / "src" / "train", 30)
    image_folder(tmp_path / "src" / "test", 5, seed=1)
    return tmp_path / "src"


@pytest.mark.parametrize("limit", [2**30, 0])
def test_packed_folder_has_the_same_images_and_labels(folder, tmp_path, monkeypatch, limit):
    out = tmp_path / "out.h5"
    pack(folder, out, progress=False)
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", limit)
    packed, original = load_all("hdf5", out), load_all("folder", folder)
    assert [len(p) for p in packed] == [59, 1, 10]
    assert sorted(keys(packed[2])) == sorted(keys(original[2]))
    assert sorted(keys(packed[0]) + keys(packed[1])) == sorted(
        keys(original[0]) + keys(original[1])
    )
    for part in packed:
        assert isinstance(part, StreamedSet) == (limit == 0)
        assert part.class_names == ("ant", "bee")
        for images, labels in part.batches(4):
            assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert set(packed[2].first(5).labels.tolist()) == {0, 1}  # not sorted by class
    assert os.stat(out).st_mode & 0o777 == 0o644


def test_streamed_file_with_workers_is_bit_identical(folder, tmp_path, monkeypatch):
    out = tmp_path / "out.h5"
    pack(folder, out, progress=False)
    memory = load_dataset("hdf5", out, "train")
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 0)
    streamed = load_dataset("hdf5", out, "train")
    streamed.read([0])  # the file is open here when workers start
    expected = Stream(memory, StreamConfig(batch_size=16), "ce", 0, "cpu").batches(0, 6)
    found = Stream(streamed, StreamConfig(batch_size=16), "ce", 0, "cpu", workers=2).batches(0, 6)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
    again = pickle.loads(pickle.dumps(streamed))
    assert torch.equal(again.read([3])[0][0], memory.images[3])


def test_each_process_opens_its_own_file_handle(folder, tmp_path, monkeypatch):
    pack(folder, tmp_path / "out.h5", progress=False)
    reader = read_contents(tmp_path / "out.h5", "train")
    first = reader.read([4])
    handle = reader._images
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as seen after a fork
    assert torch.equal(reader.read([4]), first)
    assert reader._images is not handle


def test_folder_without_parts_is_split_nine_to_one(tmp_path):
    image_folder(tmp_path / "src", 50)
    out = tmp_path / "out.h5"
    pack(tmp_path / "src", out, progress=False)
    with h5py.File(out) as file:
        assert file["images"].shape == (100, 8, 8, 3)
        assert file["images"].compression == "gzip"
    parts = load_all("hdf5", out)
    assert [len(p) for p in parts] == [88, 2, 10]
    assert len({key for part in parts for key in keys(part)}) == 100


def test_class_names_of_an_hdf5_file_are_optional(tmp_path):
    path = tmp_path / "a.h5"
    write_h5(path, 40, classes=4, group="train")
    write_h5(path, 10, classes=3, group="test")
    parts = load_all("hdf5", path)
    assert all(part.class_names == ("0", "1", "2", "3") for part in parts)
    write_h5(tmp_path / "b.h5", 40, labels=None)
    assert load_dataset("hdf5", tmp_path / "b.h5", "test").num_classes == 0


@pytest.mark.parametrize(
    "src", ["folder", pytest.param("torchvision:CIFAR10", marks=pytest.mark.slow)]
)
def test_cifar_is_packed_completely(tmp_path, monkeypatch, src):
    _, written = fake_torchvision(tmp_path / "src", "cifar10", monkeypatch, count=300)
    source = str(tmp_path / "src")
    out = tmp_path / "out.h5"
    pack(source if src == "folder" else f"{src}:{source}", out, progress=False)
    with h5py.File(out) as file:
        assert file["train/images"].shape == (1500, 32, 32, 3)
        pixels = file["test/images"][()].transpose(0, 3, 1, 2).reshape(300, -1)
        assert np.array_equal(pixels, written["test_batch"]["data"])
        assert file["test/labels"][()].tolist() == written["test_batch"]["labels"]
    assert load_dataset("hdf5", out, "test").class_names[9] == "truck"


def test_images_are_resized(folder, tmp_path):
    pack(folder, tmp_path / "out.h5", image_size=4, progress=False)
    assert load_dataset("hdf5", tmp_path / "out.h5", "test").image_size == (4, 4)
    with pytest.raises(UserError, match="--image-size 8"):
        load_dataset("hdf5", tmp_path / "out.h5", "test", image_size=8)


def test_existing_file_is_replaced_only_with_overwrite(folder, tmp_path):
    out = tmp_path / "out.h5"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match="exists"):
        pack(folder, out, progress=False)
    assert out.read_bytes() == b"precious"
    pack(folder, out, overwrite=True, progress=False)
    assert len(load_dataset("hdf5", out, "test")) == 10


def test_corrupt_image_is_named_and_the_old_file_stays(folder, tmp_path):
    (folder / "train" / "bee" / "007.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    out = tmp_path / "out.h5"
    out.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"007\.png"):
        pack(folder, out, overwrite=True, image_size=8, progress=False)
    assert out.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "src"]


def test_full_disk_and_ctrl_c_leave_no_files(folder, tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    for error, seen in [(full, UserError), (KeyboardInterrupt(), KeyboardInterrupt)]:

        def fail(*_args, error=error):
            raise error

        monkeypatch.setattr("ebmkit.data.sets._write", fail)
        with pytest.raises(seen):
            pack(folder, tmp_path / "out.h5", progress=False)
        assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    ("src", "out", "message"),
    [
        ("absent", "out.h5", "does not exist"),
        ("src", "absent/out.h5", "there is no folder"),
        ("torchvision:CIFAR11", "out.h5", "unknown torchvision data set 'CIFAR11'"),
        ("torchvision:FakeData", "out.h5", "no training and test parts"),
    ],
)
def test_invalid_arguments_are_refused(folder, tmp_path, src, out, message):
    source = src if ":" in src else tmp_path / src
    with pytest.raises(UserError, match=message):
        pack(source, tmp_path / out, progress=False)


def test_training_and_test_images_of_different_kinds_are_refused(tmp_path):
    image_folder(tmp_path / "src" / "train", 3)
    image_folder(tmp_path / "src" / "test", 3, size=(9, 9))
    with pytest.raises(UserError, match="differ in size, colour or classes"):
        pack(tmp_path / "src", tmp_path / "out.h5", progress=False)


@pytest.mark.parametrize("what", ["folder", "absent", "text", "no test", "no images"])
def test_invalid_hdf5_files_give_a_one_line_error(tmp_path, what):
    path = tmp_path / "a.h5"
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("not HDF5")
    elif what == "no test":
        write_h5(path, 10, group="train")
    elif what == "no images":
        write_h5(path, 10, images=None)
    message = {
        "folder": "is a folder",
        "absent": "ebmkit data pack",
        "text": "something else",
        "no test": "no group 'test'",
        "no images": "must hold images",
    }
    with pytest.raises(UserError, match=message[what]) as caught:
        load_dataset("hdf5", path, "test")
    assert "\n" not in str(caught.value)


def test_splits_are_reproducible(folder, tmp_path):
    out = tmp_path / "out.h5"
    pack(folder, out, progress=False)
    for split in SPLITS:
        first, second = (load_dataset("hdf5", out, split) for _ in range(2))
        assert torch.equal(first.images, second.images)
