"""Steps that are not finite: nothing of them stays, and the report names what was at fault."""

import json
import math

import pytest
import torch

import ebmkit
from ebmkit.training import RunFolder, resolve
from ebmkit.training.assemble import assemble

pytestmark = pytest.mark.usefixtures("counted_once")

SMALL = {
    "model": {"backbone": {"width": 8}},
    "steps": 6,
    "log_every": 1,
    "validation_images": 0,
    "checkpoint_every": 100,
    "device": "cpu",
    "streams": {
        "classify": {"batch_size": 8},
        "denoise": {"batch_size": 8},
        "generate": {"batch_size": 8},
    },
    "negatives": {"buffer_size": 20, "steps": 2},
    "watch": {"every": 2, "breaches": 1},
}

KINDS = {
    "plain": {},
    "averaged": {"optimizer": {"ema": 0.9}},
    "sam": {"optimizer": {"sharpness": 0.1}},
    "clipped": {"optimizer": {"clip_norm": 1.0}},
    "in parts": {"compute": {"accumulate": 2}},
    "sgd": {"optimizer": {"kind": "sgd"}},
    "adv": {"objective": "adv+dsm", "terms": {"adv": {"eps": 0.3, "steps": 2}}},
    "batch norm": {"objective": "ce", "model": {"backbone": {"norm": "batch"}}},
}


def start(root, *layers):
    config = resolve(SMALL, *layers)
    return assemble(config, RunFolder.create(root, config))


def spoil_batches(trainer, at, stream, position, value=float("nan")):
    """From the ``at``-th step on, one image of a stream's batches has a pixel that is no number."""
    draw = trainer.batches

    def batches(first, stop):
        for step, drawn in enumerate(draw(first, stop), first):
            if step >= at - 1:
                batch = drawn[stream]
                x, y = batch.x.clone(), batch.y.clone()
                x[position, 0, 2, 3] = y[position, 0, 2, 3] = value
                drawn = {**drawn, stream: batch._replace(x=x, y=y)}
            yield drawn

    trainer.batches = batches


def frozen(state):
    """A deep copy, wall clock apart."""
    kept = {k: v for k, v in state.items() if k != "seconds"}
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, kept)


def assert_equal(one, other):
    leaves = [torch.utils._pytree.tree_flatten(frozen(s)) for s in (one, other)]
    assert leaves[0][1] == leaves[1][1], (leaves[0][1], leaves[1][1])
    for a, b in zip(leaves[0][0], leaves[1][0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_one_before_the_step_to_the_bit(tmp_path, kind):
    """Weights, optimiser, averages, running means, statistics: as of a run that ended before it."""
    before = start(tmp_path / "before", KINDS[kind], {"steps": 6})
    states = []
    before.report = lambda row, written=False: states.append(frozen(before.state()))
    before.fit()
    trainer = start(tmp_path / "run", KINDS[kind])
    spoil_batches(trainer, 4, trainer.loss.streams[0], 5)
    with pytest.raises(ebmkit.UserError, match="at step 4: stopped before the update"):
        trainer.fit()
    assert_equal(trainer.state(), states[2])
    saved = RunFolder(tmp_path / "run").load_checkpoint()
    assert_equal({**saved, "buffer": 0}, {**states[2], "buffer": 0})
    resumed = assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    resumed.fit()  # the pixel was bad luck
    assert_equal(resumed.state(), states[-1])


def test_averaged_weights_stay_without_waiting_for_the_device(tmp_path, monkeypatch):
    """What a GPU does: several steps pass before the host hears of the first that failed."""
    trainer = start(tmp_path / "run", KINDS["averaged"])
    step = trainer.update
    drawn = list(trainer.batches(0, 4))
    step(drawn[0], 1e-3)
    step(drawn[1], 1e-3)
    before = frozen(trainer.state())
    monkeypatch.setattr(step, "device", torch.device("meta"))  # any that is not the CPU
    bad = drawn[2]["denoise"]
    bad = bad._replace(y=bad.y * math.nan)
    for batches in ({**drawn[2], "denoise": bad}, drawn[3]):
        monkeypatch.setattr(step, "device", torch.device("cpu"))
        values = step._differentiate(batches)
        norm = torch.nn.utils.get_total_norm([p.grad for p in step.parameters])
        step._note(torch.cat([values, torch.zeros(1)]), norm)
        monkeypatch.setattr(step, "device", torch.device("meta"))
        step.optimizer.step()
        step._follow()
    assert int(trainer.average.n_averaged) == 4
    trainer.average.n_averaged.fill_(2)
    assert_equal(trainer.state(), before)


@pytest.mark.parametrize(("stream", "term"), [("classify", "ce"), ("denoise", "dsm")])
def test_the_report_names_term_step_images_and_gradients(tmp_path, stream, term):
    trainer = start(tmp_path / "run")
    spoil_batches(trainer, 3, stream, 5)
    with pytest.raises(ebmkit.UserError) as ended:
        trainer.fit()
    report = json.loads((tmp_path / "run" / "nonfinite-3.json").read_text())
    image = trainer.streams[stream].numbers(2)[5]
    assert report["step"] == 3
    assert report["terms"][term] == "nan"
    assert report["streams"][stream]["indices"] == trainer.streams[stream].numbers(2)
    (row,) = report["streams"][stream]["images"]
    assert (row["position"], row["image"], row["terms"]) == (5, image, [term])
    assert (row["image_is_finite"], row["noisy_is_finite"]) == (False, False)
    other = {"classify": "denoise", "denoise": "classify"}[stream]
    assert report["streams"][other] == {
        "images": [],
        "looked_at": 8,
        "size": 8,
        "indices": trainer.streams[other].numbers(2),
    }
    assert report["layer"].startswith("backbone.")
    assert report["gradients"][0]["not_finite"] > 0
    assert report["parameters"] == []
    told = str(ended.value)
    assert f"loss {term!r} is nan at step 3: stopped before the update; the state before it" in told
    assert f"stream {stream}: not finite by themselves: images {image} [{term}, sigma" in told
    assert f"largest gradients: {report['gradients'][0]['parameter']}" in told
    assert len(told.splitlines()) < 10


def test_numbers_in_the_report_are_those_of_the_data_set(tmp_path):
    """The image that a stream draws is the one its number names."""
    plain = {name: {"augmentation": {"crop_padding": 0}} for name in ("classify", "denoise")}
    trainer = start(tmp_path / "run", {"streams": plain})
    for name in plain:
        stream = trainer.streams[name]
        (batch,) = stream.batches(7, 8)
        assert torch.equal(batch.x, trainer.train.floats(torch.tensor(stream.numbers(7))))


def test_a_gradient_without_an_image_at_fault_is_told_as_such(tmp_path):
    trainer = start(tmp_path / "run")
    weight = trainer.model.head.density.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ebmkit.UserError, match=r"gradient's norm is (inf|nan) at step 1") as ended:
        trainer.fit()
    assert "largest gradients: head.density.weight inf" in str(ended.value)
    assert "of 8, 8 were looked at and are finite by themselves" in str(ended.value)


def test_parameters_that_are_not_finite_are_named(tmp_path):
    trainer = start(tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.density.weight[0] = float("inf")
    with pytest.raises(ebmkit.UserError, match=r"not finite: head\.density\.weight"):
        trainer.fit()


def test_a_breach_of_maximum_likelihood_names_them_too(tmp_path):
    """The run goes back, and its chains with it; the row and a file say what was at fault."""
    trainer = start(tmp_path / "run", {"objective": "jem"})
    draw, done = trainer.batches, []

    def batches(first, stop):
        for step, drawn in enumerate(draw(first, stop), first):
            if step == 4 and not done:
                done.append(step)
                batch = drawn["classify"]
                drawn = {**drawn, "classify": batch._replace(y=batch.y * math.nan)}
            yield drawn

    trainer.batches = batches
    trainer.fit()
    (row,) = [row for row in trainer.run.metrics() if row["kind"] == "breach"]
    assert "loss 'ce' is nan" in row["reason"]
    assert any(
        "stream classify: not finite by themselves: images" in line for line in row["detail"]
    )
    report = json.loads((tmp_path / "run" / "nonfinite-5.json").read_text())
    assert len(report["streams"]["classify"]["images"]) == 8
    assert bool(trainer.recovery.negatives.buffer.images.isfinite().all())


def test_reports_are_bounded_and_never_overwritten(tmp_path):
    from ebmkit.training.nonfinite import MOST_REPORTS, write_report

    names = {write_report(tmp_path, {"step": 3}) for _ in range(MOST_REPORTS)}
    assert len(names) == MOST_REPORTS
    assert write_report(tmp_path, {"step": 3}) is None
