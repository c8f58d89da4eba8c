"""Errors of worker processes are one sentence, at once."""

import resource

import pytest
from ebmkit_tests.support.data_files import image_folder

from ebmkit import UserError
from ebmkit.data import imagesets, load_dataset, workers


@pytest.fixture
def small_shared_memory(monkeypatch):
    """Limit files, and so blocks of shared memory, to 64 KiB, as a small /dev/shm does."""
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 120.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_shared_memory_is_said_at_once(
    tmp_path, monkeypatch, small_shared_memory, capfd
):
    monkeypatch.setattr(imagesets, "MEMORY_LIMIT", 0)
    images = load_dataset("folder", image_folder(tmp_path, 30), "train", image_size=64)
    requests = [(list(range(20)), None)] * 4
    with pytest.raises(UserError, match=r"of 245,760 bytes does not fit .*enlarge /dev/shm"):
        list(workers.read_batches(images, requests, 2, False))
    assert capfd.readouterr().err == ""


def test_workers_that_cannot_start_are_an_error(tmp_path, monkeypatch):
    def full(*settings, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "iter", full, raising=False)
    images = load_dataset("folder", image_folder(tmp_path, 3), "train")
    with pytest.raises(UserError, match=r"2 worker processes .* cannot be started .*No space left"):
        list(workers.read_batches(images, [], 2, False))
