"""Batches depend only on the step, not on the first step or the number of workers and ranks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from ebmkit_tests.support.toy_sets import as_streamed, drawn, make_set

from ebmkit.data import Augmentation, NoiseLaw, Stream, StreamConfig
from ebmkit.errors import UserError
from ebmkit.randomness import keyed_seed

NOISE = NoiseLaw(kind="squared-uniform", min="1/255", max="100/255")
FULL = StreamConfig(
    batch_size=8,
    augmentation=Augmentation(flip=True, crop_padding=2, mix="both"),
    noise=NOISE,
)
PLAIN = StreamConfig(batch_size=8)


@pytest.fixture
def toy():
    """23 colour images of 6x6 in 4 classes, in memory."""
    return make_set()


@pytest.fixture
def streamed(toy):
    """The same images, read on demand."""
    return as_streamed(toy)


def same(a, b):
    """Whether two batches are equal bit for bit."""
    pairs = zip(drawn(a), drawn(b), strict=True)
    return all((u is None and v is None) or torch.equal(u, v) for u, v in pairs)


def stream(source, config=FULL, name="ce", seed=0, **options):
    return Stream(source, config, name, seed, "cpu", **options)


def test_start_at_a_later_step_is_bit_identical(toy):
    whole = list(stream(toy).batches(0, 10))
    tail = list(stream(toy).batches(5, 10))
    assert all(same(a, b) for a, b in zip(whole[5:], tail, strict=True))


def test_interleaved_iterators_are_independent(toy):
    one = stream(toy)
    a, b = one.batches(0, 4), one.batches(2, 4)
    mixed = [next(a), next(b), next(a), next(b), next(a), next(a)]
    order = [0, 2, 1, 3, 2, 3]
    clean = list(stream(toy).batches(0, 4))
    assert all(same(x, clean[i]) for x, i in zip(mixed, order, strict=True))


def test_steps_names_and_seeds_draw_independently(toy):
    first, second = stream(toy).batches(0, 2)
    other_name = next(stream(toy, name="dsm").batches(0, 1))
    other_seed = next(stream(toy, seed=1).batches(0, 1))
    for other in (second, other_name, other_seed):
        assert not torch.equal(first.sigma, other.sigma)
        assert not torch.equal(first.eps, other.eps)
        assert not torch.equal(first.x, other.x)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_set_is_bit_identical_to_the_set_in_memory(toy, streamed, workers):
    expected = list(stream(toy).batches(3, 9))
    found = list(stream(streamed, workers=workers).batches(3, 9))
    assert len(found) == 6
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix", "both"])
@pytest.mark.parametrize("make", [lambda s: s, as_streamed])
def test_ranks_split_the_global_batch(toy, mix, make):
    config = FULL.model_copy(
        update={"augmentation": Augmentation(flip=True, crop_padding=1, mix=mix)}
    )
    source = make(toy)
    ranks = [stream(source, config, rank=r, world_size=2).batches(0, 4) for r in range(2)]
    for whole, first, second in zip(stream(source, config).batches(0, 4), *ranks, strict=True):
        joined = [torch.cat(pair) for pair in zip(drawn(first), drawn(second), strict=True)]
        assert same(whole, joined)


ALTERNATING_FLIPS_AND_CUTOUT = Augmentation(
    flip="alternating",
    crop_padding=2,
    crop_fill="reflect",
    cutout=3,
    mix="both",
    mix_probability=0.5,
)


@pytest.mark.parametrize("make", [lambda s: s, as_streamed])
def test_ranks_split_the_global_batch_with_alternating_flips_and_cutout(toy, make):
    config = FULL.model_copy(update={"augmentation": ALTERNATING_FLIPS_AND_CUTOUT})
    source = make(toy)
    ranks = [stream(source, config, rank=r, world_size=2).batches(0, 8) for r in range(2)]
    for whole, first, second in zip(stream(source, config).batches(0, 8), *ranks, strict=True):
        joined = [torch.cat(pair) for pair in zip(drawn(first), drawn(second), strict=True)]
        assert same(whole, joined)
    tail = list(stream(source, config).batches(5, 8))
    assert all(map(same, list(stream(source, config).batches(0, 8))[5:], tail))


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    source = make_set(count=10)
    config = StreamConfig(batch_size=4, augmentation=Augmentation(flip="alternating"))
    seen = torch.cat([b.x for b in stream(source, config).batches(0, 10)])  # 4 epochs
    for epochs in (seen[:20], seen[20:]):
        for image in source.floats():
            assert (epochs == image).flatten(1).all(1).sum() == 1
            assert (epochs == image.flip(-1)).flatten(1).all(1).sum() == 1
    mirrored = [(seen[:10] == image.flip(-1)).flatten(1).all(1).any() for image in source.floats()]
    assert 0 < sum(mirrored) < 10


def test_mix_probability_is_the_share_of_mixed_batches(toy):
    augmentation = Augmentation(mix="mixup", mix_probability=0.3)
    config = StreamConfig(batch_size=2, augmentation=augmentation)
    batches = stream(toy, config).batches(0, 400)
    mixed = sum(bool((b.soft.max(1).values < 1).any()) for b in batches)
    detectable = 1 - 5 / 22 * 1.0  # mixing within a class leaves labels hard
    assert abs(mixed - 400 * 0.3 * detectable) < 5 * (400 * 0.3 * 0.7) ** 0.5


def test_images_too_small_for_reflect_padding_are_refused(toy):
    config = StreamConfig(augmentation=Augmentation(crop_padding=6, crop_fill="reflect"))
    with pytest.raises(UserError, match="at most 5"):
        stream(toy, config)


def test_cutout_as_large_as_an_image_or_crop_is_refused(toy):
    def cut(side, **options):
        return StreamConfig(augmentation=Augmentation(cutout=side, **options))

    with pytest.raises(
        UserError, match=r"cutout 6 .*6x6: set streams\.ce\.aug.*cutout to at most 5"
    ):
        stream(toy, cut(6))
    with pytest.raises(UserError, match=r"cutout 4 .*4x4: .*to at most 3, or to 0"):
        stream(toy, cut(4, crop_size=4))
    assert next(stream(toy, cut(5)).batches(0, 1)).x.shape == (64, 3, 6, 6)


def test_epoch_order_is_cached_per_device(streamed):
    """The sampler needs it on the host, alternating flips on the device of the batch."""
    own = stream(streamed)
    order = own._order(0, torch.device("cpu"))
    meta = own._order(0, torch.device("meta"))
    assert (meta.device.type, meta.shape) == ("meta", order.shape)
    assert own._order(0, torch.device("cpu")) is order


def test_each_epoch_visits_every_image_once():
    source = make_set(count=10)
    keys = source.images.flatten(1).sum(1)
    seen = torch.cat([b.x for b in stream(source, PLAIN).batches(0, 5)])  # 40 samples, 4 epochs
    sums = (seen * 255).round().flatten(1).sum(1).long()
    orders = sums.reshape(4, 10)
    for order in orders:
        assert sorted(order.tolist()) == sorted(keys.tolist())
    assert not torch.equal(orders[0], orders[1])


def test_set_smaller_than_the_batch():
    source = make_set(count=3)
    batch = next(stream(source, PLAIN).batches(0, 1))
    assert len(batch.x) == 8
    assert batch.labels.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_labels_match_their_images(toy):
    for batch in stream(toy, PLAIN).batches(0, 3):
        for image, label in zip(batch.x, batch.labels, strict=True):
            row = (toy.floats() == image).flatten(1).all(1).nonzero().item()
            assert toy.labels[row] == label
        assert torch.equal(batch.soft, torch.nn.functional.one_hot(batch.labels, 4).float())


def test_noise_is_sigma_times_a_standard_normal(toy):
    config = StreamConfig(batch_size=64, noise=NOISE)
    batches = list(stream(toy, config).batches(0, 20))
    for batch in batches:
        assert torch.equal(batch.y, batch.x + batch.sigma[:, None, None, None] * batch.eps)
    eps = torch.cat([b.eps for b in batches]).flatten()
    assert abs(eps.mean()) < 4 / len(eps) ** 0.5
    assert abs(eps.var() - 1) < 4 * (2 / len(eps)) ** 0.5
    sigma = torch.cat([b.sigma for b in batches])
    assert sigma.unique().numel() > 0.99 * sigma.numel()  # one level per image
    quiet = next(stream(toy, PLAIN).batches(0, 1))
    assert torch.equal(quiet.y, quiet.x)
    assert not quiet.sigma.any()


def test_augmentation_does_not_change_the_noise(toy):
    plain = next(stream(toy, StreamConfig(batch_size=8, noise=NOISE)).batches(4, 5))
    full = next(stream(toy).batches(4, 5))
    assert torch.equal(plain.eps, full.eps)
    assert torch.equal(plain.sigma, full.sigma)


def test_crops_to_a_size_with_and_without_padding(toy):
    for padding, size in [(0, 4), (3, 9)]:
        config = StreamConfig(
            batch_size=8, augmentation=Augmentation(crop_padding=padding, crop_size=size)
        )
        assert next(stream(toy, config).batches(0, 1)).x.shape == (8, 3, size, size)


def test_set_without_labels_gives_no_labels():
    batch = next(stream(make_set(classes=0), PLAIN).batches(0, 1))
    assert batch.labels is None
    assert batch.soft is None


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_unchanged(streamed, workers):
    before = torch.get_rng_state()
    list(stream(streamed, workers=workers).batches(0, 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_file_gives_a_one_line_error(toy, workers):
    source = as_streamed(toy, damaged=range(23))
    with pytest.raises(UserError) as caught:
        list(stream(source, workers=workers).batches(0, 3))
    assert "is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_closing_a_stream_ends_its_workers(streamed, monkeypatch):
    """Workers that do not respond, as on a busy machine, are killed; here they are stopped."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.0)
    batches = stream(streamed, workers=2).batches(0, 1000)
    next(batches)
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    batches.close()
    try:
        for process in processes:
            process.join(2)
            assert not process.is_alive()
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("source", "config", "options", "message"),
    [
        (make_set().first(0), PLAIN, {}, "no train images"),
        (make_set(classes=0), FULL, {}, "set mix to none"),
        (make_set(), PLAIN, {"world_size": 3}, "multiple of 3"),
        (
            make_set(),
            StreamConfig(augmentation=Augmentation(crop_size=7)),
            {},
            "at most 6",
        ),
    ],
)
def test_invalid_streams_are_refused(source, config, options, message):
    with pytest.raises(UserError, match=message):
        stream(source, config, **options)


def test_keyed_seed_has_the_same_value_on_every_machine():
    assert keyed_seed(0, "ce", "noise", 7) == 1271487706228487403


@pytest.mark.slow
def test_workers_survive_ctrl_c_and_end_with_the_main_process(tmp_path):
    """On Ctrl-C a trainer finishes its step and saves, which needs the workers."""
    script = tmp_path / "training.py"
    script.write_text(
        textwrap.dedent(
            """
            import signal
            from ebmkit.data import Stream, StreamConfig
            from ebmkit_tests.support.toy_sets import as_streamed, make_set

            if __name__ == "__main__":
                stopped = []
                signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
                stream = Stream(as_streamed(make_set()), StreamConfig(), "ce", 0, "cpu", workers=2)
                steps_left = 20
                for step, _ in enumerate(stream.batches(0, 10**9)):
                    if step == 3:
                        print("running", flush=True)
                    steps_left -= len(stopped)
                    if steps_left == 0:
                        raise KeyboardInterrupt
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout.readline() == "running\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        _, errors = process.communicate(timeout=30)  # returns once the workers have ended too
    finally:
        process.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "exited unexpectedly" not in errors
