"""NaN and Inf in a step: the state before the step is kept, and a report names the cause."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ebmkit
from ebmkit.data.images import write_image
from ebmkit.data.imagesets import origin
from ebmkit.data.sets import load_dataset, pack
from ebmkit.training import Interrupted, RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.nonfinite import describe
from ebmkit.training.optim import exponential_average

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

SMALL = {
    "backbone": "gradresnet10",
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
    "rollback": {"every": 2, "max_rollbacks": 1},
}

KINDS = {
    "plain": {},
    "averaged": {"optimizer": {"ema": 0.9}},
    "sam": {"optimizer": {"sharpness": 0.1}},
    "accumulated": {"compute": {"accumulate": 2}},
    "sgd": {"optimizer": {"kind": "sgd"}},
    "muon": {"optimizer": {"kind": "muon"}},
    "muon accumulated, clipped": {
        "optimizer": {"kind": "muon", "clip_norm": 1.0, "sharpness": 0.1, "ema": 0.9},
        "compute": {"accumulate": 2},
    },
    "adv": {"objective": "adv+dsm", "terms": {"adv": {"eps": 0.3, "steps": 2}}},
    "batch norm": {"objective": "ce", "model": {"backbone": {"norm": "batch"}}},
}


def start(root, *layers):
    config = resolve(SMALL, *layers)
    return assemble(config, RunFolder.create(root, config))


def inject_nan(trainer, at, stream, position, value=float("nan")):
    """Set a pixel of one image in the batches of a stream to ``value``, from step ``at`` on."""
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
    """A deep copy without the elapsed time."""
    kept = {k: v for k, v in state.items() if k != "seconds"}
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, kept)


def assert_equal(one, other):
    leaves = [torch.utils._pytree.tree_flatten(frozen(s)) for s in (one, other)]
    assert leaves[0][1] == leaves[1][1], (leaves[0][1], leaves[1][1])
    for a, b in zip(leaves[0][0], leaves[1][0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (a, b)


QUICK = ("plain",)


@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def test_state_after_a_nan_step_is_bit_identical_to_the_state_before_it(tmp_path, kind):
    """Weights, optimiser, averages, running means and statistics; reference: a run without NaN."""
    before = start(tmp_path / "before", KINDS[kind], {"steps": 6})
    states = []
    before.report = lambda row, written=False: states.append(frozen(before.state_dict()))
    before.fit()
    trainer = start(tmp_path / "run", KINDS[kind])
    inject_nan(trainer, 4, trainer.loss.streams[0], 5)
    with pytest.raises(ebmkit.UserError, match="at step 4: stopped before the update"):
        trainer.fit()
    assert_equal(trainer.state_dict(), states[2])
    saved = RunFolder(tmp_path / "run").load_checkpoint()
    assert_equal({**saved, "buffer": 0}, {**states[2], "buffer": 0})
    resumed = assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    resumed.fit()  # without the NaN pixel
    assert_equal(resumed.state_dict(), states[-1])


@pytest.mark.parametrize(
    ("kind", "done"),
    [
        ("averaged", 2),
        ("muon", 0),
        ("batch norm", 2),
        *(
            pytest.param(kind, done, marks=pytest.mark.slow)
            for kind, done in (
                ("averaged", 0),
                ("muon", 2),
                ("batch norm", 0),
                ("sgd", 0),
                ("sgd", 2),
            )
        ),
    ],
)
def test_steps_after_a_failed_step_are_undone_when_the_host_reads(tmp_path, kind, done):
    """As on a GPU, where the host reads every few steps; also if the first step fails."""
    trainer = start(tmp_path / "run", KINDS[kind])
    drawn = list(trainer.batches(0, done + 2))
    for number in range(done):
        trainer.update(drawn[number], 1e-3 / (1 + number))
    trainer.update.read()
    before = frozen(trainer.state_dict())
    batch = drawn[done]["classify"]
    bad = batch._replace(x=batch.x * math.nan, y=batch.y * math.nan)
    trainer.update({**drawn[done], "classify": bad}, 0.5)
    trainer.update(drawn[done + 1], 0.25)
    stats = trainer.update.read()
    assert (stats.failed, stats.done, stats.skipped) == (True, done, 2)
    trainer.update.undo_skipped(1e-3 / done if done else trainer.config.optimizer.lr)
    assert_equal(trainer.state_dict(), before)


def test_averaged_weights_are_bit_identical_to_pytorch(tmp_path):
    """Reference: `AveragedModel.update_parameters`."""
    trainer = start(tmp_path / "run", KINDS["averaged"])
    config = trainer.config.optimizer
    reference = exponential_average(trainer.model, config.ema, config.ema_warmup)
    for drawn in trainer.batches(0, 3):
        trainer.update(drawn, 1e-2)
        reference.update_parameters(trainer.model)
    assert_equal(trainer.update.average.state_dict(), reference.state_dict())


def test_decay_of_averaged_weights_warms_up(tmp_path):
    """Reference: the formula in float64. The warm-up reduces the influence of the first weights."""
    layer = {"optimizer": {"ema": 0.6, "ema_warmup": True}}
    trainer = start(tmp_path / "run", layer)
    mean = None
    for t, drawn in enumerate(trainer.batches(0, 8)):
        trainer.update(drawn, 1e-2)
        now = trainer.model.backbone.stem.weight.detach().double()
        decay = min(0.6, (1 + t) / (10 + t))
        mean = now if mean is None else decay * mean + (1 - decay) * now
    found = trainer.update.average.module.backbone.stem.weight.detach().double()
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-7)
    assert decay == (1 + 7) / (10 + 7)


@pytest.mark.parametrize(
    ("stream", "term"), [pytest.param("classify", "ce", marks=pytest.mark.slow), ("denoise", "dsm")]
)
def test_report_names_term_step_images_and_gradients(tmp_path, stream, term):
    trainer = start(tmp_path / "run")
    inject_nan(trainer, 3, stream, 5)
    with pytest.raises(ebmkit.UserError) as ended:
        trainer.fit()
    report = json.loads((tmp_path / "run" / "nonfinite-3.json").read_text())
    image = trainer.streams[stream].numbers(2)[5]
    assert report["step"] == 3
    assert report["terms"][term] == "nan"
    assert report["streams"][stream]["indices"] == trainer.streams[stream].numbers(2)
    (row,) = report["streams"][stream]["images"]
    assert (row["position"], row["image"], row["terms"]) == (5, image, [term])
    assert row["finite"] == {"image": False, "noisy": False, "sigma": True, "noise": True}
    other = report["streams"][{"classify": "denoise", "denoise": "classify"}[stream]]
    assert (other["images"], other["looked_at"], other["size"]) == ([], 8, 8)
    (fine,) = trainer.streams[stream].batches(2, 3)
    assert row["sigma"] == f"{float(fine.sigma[5]) * 255:.4g}/255"
    assert row["label"] == int(fine.labels[5])
    assert report["reproduced"]
    assert report["layer"].startswith("backbone.")
    assert report["gradients"][0]["not_finite"] > 0
    assert report["parameters"] == []
    message = str(ended.value)
    assert (
        f"loss {term!r} is nan at step 3: stopped before the update; the state before it" in message
    )
    assert f"stream {stream}: NaN or Inf by themselves: images {image} [{term}, sigma" in message
    assert f"largest gradients: {report['gradients'][0]['parameter']}" in message
    assert "repair or remove these images" in message
    assert len(message.splitlines()) < 10


def test_image_numbers_in_the_report_are_data_set_indices(tmp_path):
    """`Stream.numbers` gives the data set index of each image that the stream draws."""
    plain = {name: {"augmentation": {"crop_padding": 0}} for name in ("classify", "denoise")}
    trainer = start(tmp_path / "run", {"streams": plain})
    for name in plain:
        stream = trainer.streams[name]
        (batch,) = stream.batches(7, 8)
        assert torch.equal(batch.x, trainer.train.floats(torch.tensor(stream.numbers(7))))


def test_nan_or_inf_gradient_with_finite_images_is_reported(tmp_path):
    trainer = start(tmp_path / "run")
    weight = trainer.model.head.density.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ebmkit.UserError, match=r"gradient's norm is (inf|nan) at step 1") as ended:
        trainer.fit()
    assert "largest gradients: head.density.weight inf" in str(ended.value)
    assert "all 8 are finite by themselves" in str(ended.value)


def test_nan_or_inf_parameters_are_named(tmp_path):
    trainer = start(tmp_path / "run")
    with torch.no_grad():
        trainer.model.head.density.weight[0] = float("inf")
    with pytest.raises(ebmkit.UserError, match=r"NaN or Inf: head\.density\.weight"):
        trainer.fit()


@pytest.mark.slow
def test_nan_in_maximum_likelihood_is_diagnosed_and_rolled_back(tmp_path):
    """Rollback restores the chains too; the metrics row and a report file name the cause."""
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
    (row,) = [row for row in trainer.run.metrics() if row["kind"] == "rollback"]
    assert "loss 'ce' is nan" in row["reason"]
    assert "stream classify: none of the 8 images is finite by itself" in "\n".join(row["detail"])
    report = json.loads((tmp_path / "run" / "nonfinite-5.json").read_text())
    assert len(report["streams"]["classify"]["images"]) == 8
    assert bool(trainer.rollback.negatives.buffer.images.isfinite().all())


def test_reports_are_limited_in_number_and_never_overwritten(tmp_path):
    from ebmkit.training.nonfinite import MOST_REPORTS, write_report

    names = {write_report(tmp_path, {"step": 3}) for _ in range(MOST_REPORTS)}
    assert len(names) == len([*tmp_path.iterdir()]) == MOST_REPORTS
    assert write_report(tmp_path, {"step": 3}) == f"no report: the run already has {MOST_REPORTS}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accumulated", "sam", "adv", "dropout", "jem"])
def test_diagnosis_repeats_the_step_exactly(tmp_path, kind):
    """The gradients are equal, so batch, noise, attack, chains and dropout are the same."""
    trainer = start(tmp_path / "run", KINDS.get(kind, {"objective": "ce+dsm"}), MORE.get(kind, {}))
    trainer.update._failed.fill_(1)  # marks the step as failed: the parameters do not change
    trainer.model.train()
    trainer._advance(trainer.batches(0, 1), False)
    own = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.update.optimizer.zero_grad()
    report = trainer.diagnose(1, trainer.update.read())
    assert "failed" not in report
    assert not report["reproduced"]
    assert len(report["gradients"]) > 3
    for row in report["gradients"]:
        assert row["norm"] == pytest.approx(float(own[row["parameter"]].norm()), rel=2e-5)


MORE = {
    "dropout": {"backbone": "wideresnet10-jem", "model": {"backbone": {"dropout": 0.5}}},
    "jem": {"objective": "jem"},
}


@pytest.mark.slow
def test_nan_or_inf_in_the_second_gradient_of_sam_is_diagnosed(tmp_path):
    trainer = start(tmp_path / "run", {"optimizer": {"sharpness": 1e30}})
    before = frozen(trainer.state_dict())
    with pytest.raises(ebmkit.UserError, match="at step 1: stopped before the update"):
        trainer.fit()
    assert_equal(trainer.state_dict(), before)
    report = json.loads((tmp_path / "run" / "nonfinite-1.json").read_text())
    assert report["reproduced"]
    assert report["layer"] is not None or report["gradients"][0]["not_finite"] > 0


@pytest.mark.slow
def test_nan_or_inf_that_is_not_reproduced_is_reported(tmp_path):
    trainer = start(tmp_path / "run")
    times = iter([math.inf])
    trainer.model.head.density.weight.register_hook(lambda gradient: gradient * next(times, 1))
    with pytest.raises(ebmkit.UserError, match="repeated, the step is finite: resume with"):
        trainer.fit()


@pytest.mark.slow
def test_report_after_a_high_learning_rate_names_no_image(tmp_path):
    rate = {"kind": "adamw", "lr": 1e30, "schedule": "constant"}
    trainer = start(tmp_path / "run", {"optimizer": rate})
    with pytest.raises(ebmkit.UserError, match=r"at step 2: stopped before") as ended:
        trainer.fit()
    message = str(ended.value)
    assert "stream denoise: none of the 8 images is finite by itself" in message
    assert "largest parameters: backbone." in message
    assert message.splitlines()[-1].strip() == "try a lower optimizer.lr, or optimizer.clip_norm=1"


@pytest.mark.slow
def test_nan_in_adversarial_maximum_likelihood_is_diagnosed(tmp_path):
    trainer = start(tmp_path / "run", {"objective": "jem+0.1*adv", "terms": {"adv": {"eps": 0.1}}})
    inject_nan(trainer, 3, "generate", 2)
    with pytest.raises(ebmkit.UserError, match="given up") as ended:
        trainer.fit()
    report = json.loads((tmp_path / "run" / "nonfinite-3.json").read_text())
    assert "failed" not in report
    assert [row["position"] for row in report["streams"]["generate"]["images"]] == [2]
    assert "NaN or Inf by themselves: images" in str(ended.value)


@pytest.mark.slow
def test_report_names_the_step_after_resuming_in_the_same_process(tmp_path):
    trainer = start(tmp_path / "run")
    trainer.callbacks = [StopAt(2)]
    with pytest.raises(Interrupted):
        trainer.fit()
    inject_nan(trainer, 4, "denoise", 0)
    with pytest.raises(ebmkit.UserError, match="at step 4: stopped before"):
        trainer.fit()
    assert RunFolder(tmp_path / "run").load_checkpoint()["step"] == 3


class StopAt:
    """Sends SIGINT, as Ctrl-C does, when a step is reported."""

    def __init__(self, step):
        self.step = step

    def report(self, row):
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_failed_write_does_not_hide_the_error(tmp_path):
    """A file size limit of 2 kB acts like a full disk."""
    trainer = start(tmp_path / "run")
    inject_nan(trainer, 2, "denoise", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(ebmkit.UserError, match="'dsm' is nan at step 2") as ended:
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(ended.value)
    assert "step 1 is not saved: cannot write" in message
    assert "no report: cannot write" in message
    assert "NaN or Inf by themselves: images" in message


def test_failed_diagnosis_does_not_hide_the_error(tmp_path):
    trainer = start(tmp_path / "run")
    inject_nan(trainer, 2, "denoise", 0)
    draw = trainer.batches

    def once(first, stop):
        if stop - first == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(first, stop)

    trainer.batches = once
    with pytest.raises(ebmkit.UserError, match="'dsm' is nan at step 2") as ended:
        trainer.fit()
    message = str(ended.value)
    assert "could not be repeated: OutOfMemoryError: CUDA out of memory" in message
    numbers = trainer.streams["denoise"].numbers(1)
    assert f"stream denoise: images {numbers[0]}, {numbers[1]}" in message


@pytest.mark.parametrize("kind", ["folder", "hdf5"])
def test_origin_of_an_image_is_its_file_and_row(tmp_path, kind):
    folder = tmp_path / "images"
    (folder / "train").mkdir(parents=True)
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(pixels):
        write_image(image, folder / "train" / f"{i:02}.png")
    place = folder
    if kind == "hdf5":
        place = tmp_path / "images.h5"
        pack(folder, place)
    whole = load_dataset(kind, place, "train")
    for images in (whole, whole.first(5), whole.spread(4)):
        for number in range(len(images)):
            found = origin(images, number)
            assert torch.equal(images.images[number], images.reader.read([found["row"]])[0])
            if kind == "folder":
                row = int(found["file"].removesuffix(".png"))
                assert torch.equal(images.floats([number])[0], (pixels[row] * 255).round() / 255)


TWO_PROCESSES = """
import sys
import torch
from ebmkit.distributed import join
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from test_nonfinite import SMALL, inject_nan

config = resolve(SMALL)
with join() as world:
    run = RunFolder.create(sys.argv[1], config) if world.first else None
    trainer = assemble(config, run, world=world)
    if world.rank == 1:
        inject_nan(trainer, 3, "denoise", 1)
    before = world.gather(0)
    try:
        trainer.fit()
    except ebmkit.UserError as error:
        print(world.rank, trainer.step, error, flush=True)
"""


@pytest.mark.slow
def test_report_names_the_process_that_drew_the_nan_image(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.replace("sys.argv[1]", f"Path({str(tmp_path / 'run')!r})"))
    script.write_text("import ebmkit\nfrom pathlib import Path\n" + script.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"{rank} 2 loss 'dsm' is nan at step 3" in done.stdout
    assert done.stdout.count("process 1 of 2") == 2
    report = json.loads((tmp_path / "run" / "nonfinite-3.json").read_text())
    assert [own["streams"]["denoise"]["looked_at"] for own in report["by_process"]] == [4, 4]
    (row,) = report["streams"]["denoise"]["images"]
    # the second process draws the second half of the batch of a single process
    alone = start(tmp_path / "alone")
    assert row["image"] == alone.streams["denoise"].numbers(2)[4 + 1]
    assert RunFolder(tmp_path / "run").load_checkpoint()["step"] == 2


@pytest.mark.slow
def test_compiled_step_is_diagnosed_eagerly(tmp_path):
    small = {"backbone": "mlp", "model": {"backbone": {"width": 8}}, "compute": {"compile": "on"}}
    trainer = start(tmp_path / "run", small)
    assert trainer.update.compiled
    inject_nan(trainer, 2, "denoise", 3)
    with pytest.raises(ebmkit.UserError, match="'dsm' is nan at step 2: stopped before"):
        trainer.fit()
    report = json.loads((tmp_path / "run" / "nonfinite-2.json").read_text())
    assert report["compiled"]
    assert [row["position"] for row in report["streams"]["denoise"]["images"]] == [3]
    assert report["layer"].startswith("backbone.")


def test_file_name_cannot_add_lines_to_the_message(tmp_path):
    row = {"position": 0, "image": 7, "terms": ["ce"], "sigma": "0/255", "label": None}
    row |= {"finite": {"image": False}, "file": "a\nebmkit: all is well\x1b[2J.png"}
    found = {"size": 2, "looked_at": 2, "images": [row], "indices": [7, 8]}
    report = {"terms": {"ce": "nan"}, "grad_norm": "nan", "lr": 0.1, "streams": {"classify": found}}
    (_, line, _) = describe({**report, "failed": "no"})
    assert r"images 7 ('a\nebmkit: all is well\x1b[2J.png') [ce" in line
