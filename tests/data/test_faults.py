"""Unreadable images: the error names the file, or the image is skipped and counted."""

import multiprocessing
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ebmkit.data import Stream, StreamConfig, load_dataset
from ebmkit.data.imagesets import FaultPolicy
from ebmkit.errors import UserError
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.setup import images_of

pytestmark = pytest.mark.usefixtures("count_cost_roughly")


@pytest.fixture
def folder(tmp_path):
    """Training and test parts of 24 files in two classes, two of them unreadable in each part."""
    g = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cats", "dogs"):
            place = tmp_path / "set" / part / label
            place.mkdir(parents=True)
            for i in range(12):
                pixels = g.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i:02}.png")
        truncate(tmp_path / "set" / part / "cats" / "03.png")
        (tmp_path / "set" / part / "dogs" / "07.png").write_bytes(b"not a picture")
    return tmp_path / "set"


AUGMENTATION = {"crop_size": 16, "crop_padding": 0}


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def small_config(folder, **data):
    return resolve(
        {
            "dataset": {"name": "imagenet", "data_dir": folder, "image_size": 16, **data},
            "backbone": "gradresnet10",
            "model": {"backbone": {"width": 8}},
            "objective": "ce",
            "steps": 12,
            "log_every": 1,
            "checkpoint_every": 4,
            "validation_images": 0,
            "device": "cpu",
            "streams": {"classify": {"batch_size": 8, "augmentation": AUGMENTATION}},
        },
        recipe="digits",
    )


def test_unreadable_image_is_named_in_the_error(folder):
    with pytest.raises(UserError, match=r"(03|07)\.png' is .* \(dataset\.unreadable=skip skips"):
        assemble(small_config(folder)).fit()


def load_with_skip(folder, split):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_dataset(
            "folder",
            folder,
            split,
            image_size=16,
            progress=False,
            faults=FaultPolicy(skip=True),
        )
    return found, [str(w.message) for w in caught]


def test_skipped_images_in_memory_are_counted_in_a_warning(folder):
    found, messages = load_with_skip(folder, "test")
    assert len(found) == 22
    assert found.labels.bincount().tolist() == [11, 11]
    (message,) = messages
    assert len(found.excluded) == 2
    assert "2 of 24 images of set/test cannot be read and are skipped: " in message
    assert "03.png" in message
    assert "07.png" in message


def test_labels_match_their_images_after_skipping(folder):
    """Skipping unreadable files gives the same set as deleting them."""
    with_faults, _ = load_with_skip(folder, "test")
    for name in ("cats/03.png", "dogs/07.png"):
        (folder / "val" / name).unlink()
    clean = load_dataset("folder", folder, "test", image_size=16, progress=False)
    assert sorted(map(bytes, with_faults.images.numpy())) == sorted(
        map(bytes, clean.images.numpy())
    )
    by_image = {bytes(x): int(c) for x, c in zip(clean.images.numpy(), clean.labels, strict=True)}
    for x, c in zip(with_faults.images.numpy(), with_faults.labels, strict=True):
        assert by_image[bytes(x)] == int(c)


def batches(folder, workers, world_size=1):
    source = images_of(small_config(folder, unreadable="skip").dataset, "train")
    config = StreamConfig(batch_size=8, augmentation={"crop_size": 16})
    drawn = []
    for rank in range(world_size):
        stream = Stream(source, config, "classify", 0, "cpu", workers, rank, world_size)
        drawn.append((list(stream.batches(0, 6)), stream.skipped))
    return drawn


@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_unreadable_images_are_replaced_identically_for_workers_and_ranks(folder):
    ((here, skipped),) = batches(folder, 0)
    ((there, others),) = batches(folder, 2)
    assert len(skipped) == 2
    assert skipped.keys() == others.keys()
    for a, b in zip(here, there, strict=True):
        assert len(a.x) == 8
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
    ranks = [own for own, _ in batches(folder, 0, 2)]
    for whole, *shares in zip(here, *ranks, strict=True):
        assert torch.equal(whole.labels, torch.cat([share.labels for share in shares]))
        assert torch.equal(whole.x, torch.cat([share.x for share in shares]))


def test_training_counts_skipped_images(folder, tmp_path):
    config = small_config(folder, unreadable="skip")
    run = RunFolder.create(tmp_path / "run", config)
    with pytest.warns(UserWarning, match="skipped in stream 'classify': .*png"):
        assemble(config, run).fit()
    *rows, summary = run.metrics()
    assert rows[-1]["unreadable_images"] == 2
    assert summary["kind"] == "unreadable"
    assert summary["count"] == 2
    assert sorted(why.partition(".png")[0][-7:] for why in summary["reasons"]) == [
        "cats/03",
        "dogs/07",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_resumed_run_counts_skipped_images_like_an_uninterrupted_one(folder, tmp_path):
    config = small_config(folder, unreadable="skip")
    reference, resumed = (RunFolder.create(tmp_path / name, config) for name in ("whole", "cut"))
    assemble(config, reference).fit()

    class Stop(Exception):
        pass

    class StopAt:
        def report(self, row):
            if row["step"] == 10:
                raise Stop

    with pytest.raises(Stop):
        assemble(config, resumed, [StopAt()]).fit()
    assert resumed.load_checkpoint()["step"] == 8
    assemble(config, resumed).fit()

    def counts(run):
        return [(row["step"], row.get("unreadable_images"), row["kind"]) for row in run.metrics()]

    assert counts(resumed) == counts(reference)


def test_readable_excludes_unreadable_training_images(folder):
    images = images_of(small_config(folder, unreadable="skip").dataset, "train")
    found = images.readable()
    assert len(found) == len(images) - len(found.excluded)
    assert 1 <= len(found.excluded) <= 2  # the other may be a validation image
    assert sum(len(x) for x, _ in images.batches(5)) == len(found)
    assert {len(x) for x, _ in found.batches(len(found))} == {len(found)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_run_stopped_by_an_unreadable_image_resumes_with_skip(folder, tmp_path):
    """A run may change this option later, because it only affects unreadable images."""
    run = RunFolder.create(tmp_path / "run", small_config(folder))
    with pytest.raises(UserError, match="unreadable=skip"):
        assemble(small_config(folder), run).fit()
    run.check_config(small_config(folder, unreadable="skip"))
    assemble(small_config(folder, unreadable="skip"), run).fit()


def test_folder_without_readable_images_is_refused(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 24 images"):
        load_with_skip(folder, "test")


class KillWorkers:
    """Kills the worker processes at step 5, as the kernel does when memory is short."""

    def report(self, row):
        if row["step"] == 5:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_worker_raises_an_error_instead_of_hanging(folder, tmp_path):
    config = small_config(folder, unreadable="skip", workers=1)
    run = RunFolder.create(tmp_path / "run", config)
    error = r"was killed by a signal, Killed; .*dataset\.workers; the last checkpoint is .*0*4\.pt"
    with warnings.catch_warnings(), pytest.raises(UserError, match=error):
        warnings.simplefilter("ignore")
        assemble(config.model_copy(update={"steps": 500}), run, [KillWorkers()]).fit()
    assert run.load_checkpoint()["step"] == 4


@pytest.mark.slow
def test_unresponsive_disk_raises_an_error_after_a_timeout(folder, monkeypatch):
    from ebmkit.data import workers

    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 1.0)
    source = images_of(small_config(folder, unreadable="skip").dataset, "train")
    monkeypatch.setattr("ebmkit.data.folders.open_image", lambda *_: signal.pause())
    config = StreamConfig(batch_size=8, augmentation={"crop_size": 16})
    stream = Stream(source, config, "classify", 0, "cpu", 1)
    with (
        pytest.raises(UserError, match="no image was read for 1 s"),
        workers.translate_worker_errors(),
    ):
        next(stream.batches(0, 2))


def test_links_out_of_the_folder_are_refused_unless_followed(folder, tmp_path):
    secret = tmp_path / "secret.png"
    (folder / "val" / "cats" / "00.png").rename(secret)
    link = folder / "val" / "cats" / "00.png"
    link.symlink_to(secret)
    for name in ("cats/03.png", "dogs/07.png"):
        (folder / "val" / name).unlink()
    with pytest.raises(UserError, match=r"00\.png' is a link out of the folder, .*links=follow"):
        load_dataset("folder", folder, "test", image_size=16, progress=False)
    options = {"image_size": 16, "progress": False}
    followed = load_dataset("folder", folder, "test", faults=FaultPolicy(follow=True), **options)
    link.unlink()
    link.symlink_to("01.png")
    inside = load_dataset("folder", folder, "test", **options)
    assert len(followed) == len(inside) == 22
    (tmp_path / "elsewhere").symlink_to(folder)  # the folder itself may be a link
    assert len(load_dataset("folder", tmp_path / "elsewhere", "test", **options)) == 22


def test_deleted_data_file_is_named_in_the_error(tmp_path, monkeypatch):
    import h5py

    from ebmkit.data import imagesets

    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 100)
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((40, 8, 8, 1), np.uint8)
    streamed = load_dataset("hdf5", path, "train", progress=False)
    path.unlink()
    with pytest.raises(UserError, match=r"set\.h5"):
        streamed.read([0])


def test_data_file_changed_during_use_is_named_in_the_error(tmp_path, monkeypatch):
    import h5py

    from ebmkit.data import imagesets

    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 100)
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((40, 8, 8, 1), np.uint8)
    streamed = load_dataset("hdf5", path, "train", progress=False)
    streamed.read([0])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.ones((41, 8, 8, 1), np.uint8)
    os.replace(tmp_path / "other.h5", path)
    with pytest.raises(UserError, match=r"set\.h5' was changed while it was in use"):
        streamed.read([1])
