"""Phases: batch and crop sizes change during a run; each batch depends only on its step."""

import pytest
import torch
from ebmkit_tests.support.toy_sets import as_streamed, drawn, make_set

from ebmkit.data import Augmentation, NoiseLaw, Phase, Stream, StreamConfig
from ebmkit.data.schedule import images_between, stage_at, stages
from ebmkit.errors import UserError

STEPS = 12
CONFIG = StreamConfig(
    batch_size=8,
    augmentation=Augmentation(flip=True, crop_size=3),
    noise=NoiseLaw(kind="uniform", min="1/255", max="50/255"),
    phases=(
        Phase(after="1/3", batch_size=6, crop_size=4),
        Phase(after="150/200", batch_size=2),
    ),
)


def batches(source, config=CONFIG, start=0, stop=STEPS, **options):
    return Stream(source, config, "dsm", 0, "cpu", steps=STEPS, **options).batches(start, stop)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(drawn(a), drawn(b), strict=True))


def test_batches_have_the_sizes_of_their_phase():
    shapes = [tuple(batch.x.shape) for batch in batches(make_set())]
    first, second, third = (8, 3, 3, 3), (6, 3, 4, 4), (2, 3, 3, 3)  # third: the stream's crop
    assert shapes == [first] * 4 + [second] * 5 + [third] * 3
    assert all(batch.eps.shape == batch.x.shape for batch in batches(make_set()))


def test_epochs_are_complete_across_phases():
    source = make_set(count=17)  # 68 samples: 32 of 8, 30 of 6, 6 of 2; no epoch ends with a phase
    config = CONFIG.model_copy(
        update={
            "augmentation": Augmentation(),
            "phases": tuple(p.model_copy(update={"crop_size": None}) for p in CONFIG.phases),
        }
    )
    seen = torch.cat([(b.x * 255).round().flatten(1).sum(1) for b in batches(source, config)])
    assert len(seen) == 68
    every = source.images.flatten(1).sum(1).tolist()
    for epoch in seen.long().reshape(4, 17):
        assert sorted(epoch.tolist()) == sorted(every)


@pytest.mark.parametrize("start", [3, 4, 6, 10])
def test_stream_can_start_at_any_step(start):
    expected = list(batches(make_set()))[start:]
    found = list(batches(make_set(), start=start))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    streamed = list(batches(as_streamed(make_set()), start=start))
    assert all(same(a, b) for a, b in zip(expected, streamed, strict=True))


def test_ranks_split_the_batches_of_every_phase():
    ranks = [batches(make_set(), rank=r, world_size=2) for r in range(2)]
    for whole, first, second in zip(batches(make_set()), *ranks, strict=True):
        assert same(
            whole, [torch.cat(pair) for pair in zip(drawn(first), drawn(second), strict=True)]
        )


def test_stages_are_the_common_phases_of_all_streams():
    other = StreamConfig(batch_size=10, phases=(Phase(after=0.5, batch_size=20),))
    plan = stages({"classify": other, "denoise": CONFIG}, STEPS)
    assert [(s.start, s.stop) for s in plan] == [(0, 4), (4, 6), (6, 9), (9, 12)]
    assert [s.images_per_step for s in plan] == [18, 16, 26, 22]
    assert [stage_at(plan, step) for step in (0, 3, 4, 11, 12)] == [0, 0, 1, 3, 3]
    assert images_between(plan, 3, 10) == 18 + 2 * 16 + 3 * 26 + 22
    assert plan[2].fields == {
        "classify": "streams.classify.phases[0]",
        "denoise": "streams.denoise.phases[0]",
    }
    assert len(stages({"denoise": CONFIG}, 1)) == 1  # too short for phases


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, {"world_size": 4}, r"phases\[0\]\.batch_size to a multiple of 4"),
        (CONFIG, {"parts": 4}, r"batch of 6 .*phases\[0\]"),
        (
            CONFIG.model_copy(update={"phases": (Phase(after=0.5, batch_size=2, crop_size=7),)}),
            {},
            r"crop_size 7 .* at most 6 in streams\.dsm\.phases\[0\]",
        ),
    ],
)
def test_every_phase_is_checked_before_the_first_step(config, options, message):
    with pytest.raises(UserError, match=message):
        batches(make_set(), config, **options)


@pytest.mark.parametrize("after", ["0", "1", "x", "3/2", "1/0", -0.1])
def test_phase_that_does_not_begin_within_the_run_is_refused(after):
    with pytest.raises(ValueError, match="between 0 and 1, as 150/400"):
        Phase(after=after, batch_size=8)


def test_unordered_phases_and_missing_number_of_steps_are_refused():
    with pytest.raises(ValueError, match="does not rise"):
        StreamConfig(phases=(Phase(after=0.5, batch_size=2), Phase(after=0.5, batch_size=4)))
    with pytest.raises(UserError, match="needs the number of steps"):
        Stream(make_set(), CONFIG, "dsm", 0, "cpu")
