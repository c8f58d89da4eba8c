"""Reading images under faults: what cannot be read is named, or left out and counted."""

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

pytestmark = pytest.mark.usefixtures("count_memory_once")


@pytest.fixture
def folder(tmp_path):
    """Twenty-four pictures of two classes, of which two are no pictures, in training and test."""
    g = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cats", "dogs"):
            place = tmp_path / "set" / part / label
            place.mkdir(parents=True)
            for i in range(12):
                pixels = g.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i:02}.png")
        spoil(tmp_path / "set" / part / "cats" / "03.png")
        (tmp_path / "set" / part / "dogs" / "07.png").write_bytes(b"not a picture")
    return tmp_path / "set"


AUGMENTATION = {"crop_size": 16, "crop_padding": 0}


def spoil(path):
    path.write_bytes(path.read_bytes()[:200])


def small(folder, **data):
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


def test_an_image_that_cannot_be_read_names_itself(folder):
    with pytest.raises(UserError, match=r"(03|07)\.png' is .* \(dataset\.unreadable=skip leaves"):
        assemble(small(folder)).fit()


def left_out(folder, split):
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


def test_by_option_images_in_memory_are_left_out_and_counted(folder):
    found, told = left_out(folder, "test")
    assert len(found) == 22
    assert found.labels.bincount().tolist() == [11, 11]
    (sentence,) = told
    assert len(found.left_out) == 2
    assert "2 of 24 images of set/test cannot be read and are skipped: " in sentence
    assert "03.png" in sentence
    assert "07.png" in sentence


def test_labels_stay_with_their_images(folder):
    """What is read with faults left out is what is read where they never were."""
    with_faults, _ = left_out(folder, "test")
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
    source = images_of(small(folder, unreadable="skip").dataset, "train")
    config = StreamConfig(batch_size=8, augmentation={"crop_size": 16})
    drawn = []
    for rank in range(world_size):
        stream = Stream(source, config, "classify", 0, "cpu", workers, rank, world_size)
        drawn.append((list(stream.batches(0, 6)), stream.skipped))
    return drawn


@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_another_image_takes_the_place_the_same_for_workers_and_ranks(folder):
    ((here, skipped),) = batches(folder, 0)
    ((there, others),) = batches(folder, 2)
    assert len(skipped) == 2
    assert skipped.keys() == others.keys()
    for a, b in zip(here, there, strict=True):
        assert len(a.x) == 8
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.labels, b.labels)
    ranks = [own for own, _ in batches(folder, 0, 2)]
    for whole, *halves in zip(here, *ranks, strict=True):
        assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))
        assert torch.equal(whole.x, torch.cat([half.x for half in halves]))


def test_training_counts_what_it_left_out(folder, tmp_path):
    config = small(folder, unreadable="skip")
    run = RunFolder.create(tmp_path / "run", config)
    with pytest.warns(UserWarning, match="skipped in stream 'classify': .*png"):
        assemble(config, run).fit()
    *rows, told = run.metrics()
    assert rows[-1]["unreadable_images"] == 2
    assert told["kind"] == "unreadable"
    assert told["count"] == 2
    assert sorted(why.partition(".png")[0][-7:] for why in told["reasons"]) == [
        "cats/03",
        "dogs/07",
    ]


@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_a_run_that_goes_on_counts_as_one_that_never_stopped(folder, tmp_path):
    config = small(folder, unreadable="skip")
    whole, cut = (RunFolder.create(tmp_path / name, config) for name in ("whole", "cut"))
    assemble(config, whole).fit()

    class Stop(Exception):
        pass

    class StopAt:
        def report(self, row):
            if row["step"] == 10:
                raise Stop

    with pytest.raises(Stop):
        assemble(config, cut, StopAt()).fit()
    assert cut.load_checkpoint()["step"] == 8
    assemble(config, cut).fit()

    def told(run):
        return [(row["step"], row.get("unreadable_images"), row["kind"]) for row in run.metrics()]

    assert told(cut) == told(whole)


def test_training_images_of_any_size_are_left_out_of_an_evaluation(folder):
    images = images_of(small(folder, unreadable="skip").dataset, "train")
    found = images.readable()
    assert len(found) == len(images) - len(found.left_out)
    assert 1 <= len(found.left_out) <= 2  # the other may be held out
    assert sum(len(x) for x, _ in images.batches(5)) == len(found)
    assert {len(x) for x, _ in found.batches(len(found))} == {len(found)}


@pytest.mark.filterwarnings("ignore:skipped in stream")
def test_a_run_that_met_one_goes_on_with_skip(folder, tmp_path):
    """The option changes nothing but that, so a run may take it later."""
    run = RunFolder.create(tmp_path / "run", small(folder))
    with pytest.raises(UserError, match="unreadable=skip"):
        assemble(small(folder), run).fit()
    run.check_config(small(folder, unreadable="skip"))
    assemble(small(folder, unreadable="skip"), run).fit()


def test_a_folder_without_a_readable_image_is_an_error(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of 24 images"):
        left_out(folder, "test")


class KillReader:
    """Kills the processes that read images, as the system does when memory is short."""

    def report(self, row):
        if row["step"] == 5:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_reading_process_that_is_killed_is_told_and_nothing_hangs(folder, tmp_path):
    config = small(folder, unreadable="skip", workers=1)
    run = RunFolder.create(tmp_path / "run", config)
    told = r"was killed by a signal, Killed; .*dataset\.workers; the last checkpoint is .*0*4\.pt"
    with warnings.catch_warnings(), pytest.raises(UserError, match=told):
        warnings.simplefilter("ignore")
        assemble(config.model_copy(update={"steps": 500}), run, KillReader()).fit()
    assert run.load_checkpoint()["step"] == 4


@pytest.mark.slow
def test_a_disk_that_does_not_answer_ends_the_wait(folder, monkeypatch):
    from ebmkit.data import workers

    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 1.0)
    monkeypatch.setattr("ebmkit.data.folders.open_image", lambda *_: signal.pause())
    source = images_of(small(folder, unreadable="skip").dataset, "train")
    config = StreamConfig(batch_size=8, augmentation={"crop_size": 16})
    stream = Stream(source, config, "classify", 0, "cpu", 1)
    with (
        pytest.raises(UserError, match="no image was read for 1 s"),
        workers.translate_worker_errors(),
    ):
        next(stream.batches(0, 2))


def test_links_stay_inside_or_are_followed_when_asked(folder, tmp_path):
    secret = tmp_path / "secret.png"
    (folder / "val" / "cats" / "00.png").rename(secret)
    link = folder / "val" / "cats" / "00.png"
    link.symlink_to(secret)
    for name in ("cats/03.png", "dogs/07.png"):
        (folder / "val" / name).unlink()
    with pytest.raises(UserError, match=r"00\.png' is a link out of the folder, .*links=follow"):
        load_dataset("folder", folder, "test", image_size=16, progress=False)
    ask = {"image_size": 16, "progress": False}
    followed = load_dataset("folder", folder, "test", faults=FaultPolicy(follow=True), **ask)
    link.unlink()
    link.symlink_to("01.png")
    inside = load_dataset("folder", folder, "test", **ask)
    assert len(followed) == len(inside) == 22
    (tmp_path / "elsewhere").symlink_to(folder)  # the folder itself may be a link
    assert len(load_dataset("folder", tmp_path / "elsewhere", "test", **ask)) == 22


def test_a_data_file_that_vanishes_is_named(tmp_path, monkeypatch):
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


def test_a_data_file_that_is_changed_is_named(tmp_path, monkeypatch):
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
