"""Maximum likelihood with negatives: gradient, chains, resume, cost and invalid settings."""

import math
import os
import signal
from functools import partial

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit import GaussianMixture, UserError
from ebmkit.data import Batch
from ebmkit.distributed import DistributedContext
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.sampling.entry import ReplayBuffer
from ebmkit.training import RECIPES, Interrupted, RunFolder, resolve
from ebmkit.training.cost import Recorder, network_flops, step_flops
from ebmkit.training.loop import assemble

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

TINY = {
    "objective": "jem",
    "model": {"backbone": {"width": 8}},
    "streams": {"classify": {"batch_size": 8}, "generate": {"batch_size": 8}},
    "negatives": {"steps": 2, "buffer_size": 40},
    "rollback": {"every": 2},
    "steps": 6,
    "log_every": 1,
    "validate_every": 3,
    "validation_images": 16,
    "checkpoint_every": 2,
    "device": "cpu",
}


def start(tmp_path, name, *layers, callbacks=()):
    config = resolve(TINY, *layers)
    return assemble(config, RunFolder.create(tmp_path / name, config), callbacks)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def small_loss(objective, head="logit"):
    model = ebmkit.create_model(
        "wideresnet10-jem", num_classes=3, in_channels=1, head=head, width=8
    ).double()
    x, other = torch.rand(2, 5, 1, 6, 6, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1, 0])
    soft = torch.nn.functional.one_hot(labels, 3).double()
    batch = Batch(x, x, torch.zeros(5), torch.zeros_like(x), labels, soft)
    terms = parse_objective(objective)
    for term in terms:
        batch = batch.with_columns(term.name, {"negatives": other} if term.name != "ce" else {})
    return TrainingLoss(model, terms, streams={t.name: "generate" for t in terms}), batch


def test_jem_is_short_for_ce_plus_ml():
    assert parse_objective("jem") == parse_objective("ce+ml")
    assert parse_objective("0.5*jem") == parse_objective("0.5*ce+0.5*ml")
    with pytest.raises(UserError, match="'ce' twice"):
        parse_objective("ce+jem")
    with pytest.raises(UserError, match="did you mean 'jem'"):
        parse_objective("jme")


@pytest.mark.parametrize("head", ["logit", "linear-quadratic"])
@pytest.mark.parametrize(("objective", "conditional"), [("ml", False), ("cml", True)])
def test_loss_is_the_difference_of_energies(objective, conditional, head):
    loss, batch = small_loss(objective, head)
    losses = loss({"generate": batch})
    with torch.no_grad():
        energy = [
            -e.log_density - (e.at_label(batch.labels) if conditional else 0)
            for e in (loss.model(batch.y), loss.model(batch.extra[f"{objective}.negatives"]))
        ]
    expected = (energy[0] - energy[1]).mean()
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.parts[objective], expected)
    weight = torch.full((len(batch.x),), 0.1, dtype=batch.x.dtype)
    penalised = loss({"generate": batch.with_columns(objective, {"penalty": weight})})
    added = 0.1 * (energy[0].square() + energy[1].square()).mean()
    torch.testing.assert_close(penalised.total, expected + added)
    # the monitored value has no penalty
    torch.testing.assert_close(penalised.parts[objective], expected)


def test_gradient_with_exact_samples_is_that_of_the_likelihood():
    """A normalised mixture with one free parameter, the common shift of its means."""
    means = torch.tensor([[0.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    truth = GaussianMixture(means + 0.3, 0.05)
    x = truth.sample(40_000, torch.Generator().manual_seed(0))[0]
    model = GaussianMixture(means, 0.05)  # normalised at every shift
    negatives = model.sample(40_000, torch.Generator().manual_seed(1))[0]
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    gap = model(negatives - shift).log_density - model(x - shift).log_density
    (contrastive,) = torch.autograd.grad(gap.mean(), shift, retain_graph=True)
    (exact,) = torch.autograd.grad(-model(x - shift).log_density.mean(), shift)
    # the term of the negatives estimates the mean score, 0, with an error of std / sqrt(n)
    spread = model.score(negatives).std(0) / math.sqrt(len(negatives))
    assert ((contrastive - exact).abs() < 4 * spread).all()


def test_chains_take_langevin_steps_and_return_to_the_buffer(tmp_path):
    trainer = start(tmp_path, "run", {"negatives": {"noise": 0.0, "restart": 0.0}})
    negatives = trainer.rollback.negatives
    before = negatives.buffer.images.clone()
    batch = next(trainer.batches(0, 1))["generate"]
    moved = negatives.draw(batch, 0)
    changed = (negatives.buffer.images != before).flatten(1).any(1)
    assert changed.sum() == len(batch.x)
    x = before[changed]
    for _ in range(2):
        x = x + 0.25 * trainer.model.eval().score(x)
    found = negatives.buffer.images[changed]
    torch.testing.assert_close(found, x.detach(), rtol=1e-5, atol=1e-6)
    assert {tuple(row.flatten().tolist()) for row in moved} == {
        tuple(row.flatten().tolist()) for row in found
    }
    assert not any(p.grad is not None for p in trainer.model.parameters())


def test_negatives_depend_on_the_step_and_not_on_the_number_of_processes(tmp_path):
    class OneOfTwo(DistributedContext):
        """One of two processes; the functions in ``others`` replace the calls of `gather`."""

        others: list

        def gather(self, thing):
            return self.others.pop(0)(thing)

    def drawn(world, rows):
        trainer = start(tmp_path, f"{world.rank}-{world.size}-{len(list(tmp_path.iterdir()))}")
        negatives = trainer.rollback.negatives
        negatives.world = world
        batch = next(trainer.batches(0, 1))["generate"]
        return negatives.draw(batch.rows(rows), 0), negatives

    def gathered(other, rank, own):
        return [own, other] if rank == 0 else [other, own]

    whole, buffer = drawn(DistributedContext(), slice(None))
    again, _ = drawn(DistributedContext(), slice(None))
    assert torch.equal(whole, again)
    for rank in (0, 1):
        world = OneOfTwo(rank, 2)
        share = slice(4 * rank, 4 * rank + 4)
        other = whole[4 * (1 - rank) : 4 * (1 - rank) + 4]
        world.others = [partial(gathered, other, rank)]
        own, held = drawn(world, share)
        torch.testing.assert_close(own, whole[share], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(held.buffer.images, buffer.buffer.images, rtol=1e-4, atol=1e-5)


def test_replay_buffer_slots_have_the_label_and_are_distinct():
    buffer = ReplayBuffer(torch.arange(12.0).reshape(12, 1, 1, 1), num_classes=3)
    labels = torch.tensor([2, 0, 2, 2, 1, 2])
    slots = buffer.choose(6, torch.Generator().manual_seed(0), labels)
    assert buffer.labels[slots].tolist() == labels.tolist()
    assert len(set(slots.tolist())) == 6
    plain = ReplayBuffer(torch.zeros(12, 1, 1, 1))
    assert len(set(plain.choose(12, torch.Generator().manual_seed(0)).tolist())) == 12
    restored = ReplayBuffer.read_images(buffer.to_bytes(), "it")
    assert torch.equal(restored, buffer.images)
    with pytest.raises(UserError, match="it is damaged"):
        ReplayBuffer.read_images(buffer.to_bytes()[:200], "it")
    with pytest.raises(UserError, match="to a multiple of 5"):
        ReplayBuffer(torch.zeros(12, 1, 1, 1), num_classes=5)


class StopAt:
    """Sends SIGINT, as Ctrl-C does, when a step is reported."""

    def __init__(self, step):
        self.step = step

    def report(self, row):
        if row["kind"] == "train" and row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "layer",
    [
        {},
        pytest.param(
            {"objective": "ce+cml", "optimizer": {"kind": "sgd", "sharpness": 0.1, "ema": 0.9}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["jem", "cml-sgd-sam"],
)
def test_resume_after_interrupt_is_bit_identical(tmp_path, layer):
    whole = start(tmp_path, "whole", layer)
    whole.fit()
    cut = start(tmp_path, "cut", layer, callbacks=[StopAt(3)])
    with pytest.raises(Interrupted, match="after step 3"):
        cut.fit()
    resumed = assemble(cut.config, RunFolder.open(tmp_path / "cut"))
    assert resumed.step == 3
    resumed.fit()
    assert torch.equal(weights(whole), weights(resumed))
    buffers = [t.rollback.negatives.buffer.images for t in (whole, resumed)]
    assert torch.equal(*buffers)
    files = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").glob("buffer-*"))
    assert [name.rpartition("-")[0] for name in files] == ["buffer-4", "buffer-6"]
    saved = [t.run.load_checkpoint()["rollback"] for t in (whole, resumed)]
    assert [step for step, *_ in saved[0]["kept"]] == [2, 4, 6]
    assert_same(*saved)


def assert_same(one, other):
    """Nested states are bit-identical, except for the elapsed time."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_checkpoint_with_damaged_or_missing_chains_is_refused(tmp_path):
    trainer = start(tmp_path, "run", {"steps": 2})
    trainer.fit()
    (path,) = (tmp_path / "run" / "checkpoints").glob("buffer-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"buffer-2-.*\.h5' is damaged: its content differs"):
        assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    path.unlink()
    with pytest.raises(UserError, match=r"buffer-2-.*\.h5' is damaged: it is missing"):
        assemble(trainer.config, RunFolder.open(tmp_path / "run"))


@pytest.mark.slow
def test_cost_counts_langevin_steps(tmp_path):
    trainer = start(tmp_path, "run")
    shapes = trainer.budget.plan[0][1]
    flops = step_flops(trainer.loss, shapes)
    assert list(flops) == ["ce", "ml", "2 Langevin steps"]
    batches = next(trainer.batches(0, 1))
    with Recorder() as counted:
        trainer.rollback.negatives.draw(batches["generate"], 0)
    assert flops["2 Langevin steps"] == counted.flops  # of real chains
    once = network_flops(trainer.model, (1, 1, 8, 8))
    assert flops["2 Langevin steps"] == pytest.approx(2 * 8 * 2 * once, rel=0.01)
    assert step_flops(trainer.loss, shapes, gradients=2)["ce"] == 2 * flops["ce"]
    ended = ebmkit_command("cost", "--objective=jem", "--width=8", cwd=tmp_path)
    assert ended.returncode == 0
    assert "10 Langevin steps" in ended.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # nothing was written


def test_recipes_are_the_published_ones_in_image_units():
    jem, better, sada = (resolve(recipe=name) for name in ("jem", "jem++", "sada-jem"))
    assert (jem.backbone, jem.head, jem.optimizer.lr) == ("wideresnet28-10-jem", "logit", 1e-4)
    assert jem.negatives.steps == 20
    # the papers use u = 2x - 1: a step of 1 * d/du log p and noise of 0.01 become these in x
    assert (jem.negatives.step_size, jem.negatives.noise) == (1 / 4, 0.01 / 2)
    assert jem.streams.generate.noise.range == (0.03 / 2, 0.03 / 2)
    assert better.negatives.start == "gaussian"
    assert better.negatives.largest_drift == 1 / 2
    assert sada.optimizer.sharpness == 2
    assert sada.optimizer.sharpness_adaptive
    assert not sada.streams.generate.augmentation.flip
    assert sada.streams.classify.augmentation.crop_padding == 4
    assert resolve({"objective": "jem"}).backbone == "wideresnet10-jem"
    cifar = resolve({"objective": "jem", "dataset": {"name": "cifar10"}})
    assert cifar.backbone == "wideresnet28-10-jem"
    assert resolve({"objective": "jem", "backbone": "gradresnet18"}).head == "logit"
    for name in RECIPES:
        resolve(recipe=name)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"objective": "ce+ml+cml"}, "need negatives of different densities"),
        ({"negatives": {"buffer_size": 4}}, "a batch of 8 negatives needs as many chains"),
        ({"objective": "cml", "negatives": {"buffer_size": 41}}, "multiple of 10"),
        ({"backbone": "dncnn", "objective": "ml"}, "needs a log-density"),
        (
            {"streams": {"generate": {"augmentation": {"crop_size": 4}}}}
            | {"negatives": {"buffer_size": 40, "start": "gaussian"}},
            "that of whole images",
        ),
    ],
)
def test_invalid_settings_are_refused_before_the_first_step(layer, message):
    with pytest.raises(UserError, match=message):
        assemble(resolve(TINY, layer))


def test_gaussian_starts_and_bounds_on_chains(tmp_path):
    layer = {"negatives": {"start": "gaussian", "clip": True, "largest_drift": 0.01, "noise": 0.0}}
    trainer = start(tmp_path, "run", layer, {"steps": 1})
    before = trainer.rollback.negatives.buffer.images.clone()
    pixels = trainer.train.floats()
    spread = pixels.std(0) / math.sqrt(len(before)) + 1e-3
    assert ((before.mean(0) - pixels.mean(0)).abs() < 5 * spread).all()
    trainer.rollback.negatives.config = trainer.rollback.negatives.config.model_copy(
        update={"restart": 0.0}
    )
    trainer.rollback.negatives.draw(next(trainer.batches(0, 1))["generate"], 0)
    after = trainer.rollback.negatives.buffer.images
    assert ((after - before.clamp(0, 1)).abs()[after != before] <= 0.02 + 1e-6).all()
