"""Divergence detection, rollback, mitigations, and giving up."""

import json
import math

import pytest
import torch

from ebmkit import UserError
from ebmkit.training import RunFolder, resolve
from ebmkit.training.config import RollbackConfig
from ebmkit.training.loop import assemble
from ebmkit.training.optim import SAM
from ebmkit.training.rollback import DivergenceMonitor, Mitigations, Snapshot
from ebmkit.training.step import StepStats

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

TINY = {
    "objective": "jem",
    "backbone": "gradresnet10",
    "model": {"backbone": {"width": 8}},
    "streams": {"classify": {"batch_size": 8}, "generate": {"batch_size": 8}},
    "negatives": {"steps": 2, "buffer_size": 40},
    "rollback": {"every": 2, "max_rollbacks": 3},
    "steps": 12,
    "log_every": 1,
    "validation_images": 0,
    "checkpoint_every": 4,
    "device": "cpu",
}


def start(tmp_path, name, *layers, callbacks=()):
    config = resolve(TINY, *layers)
    return assemble(config, RunFolder.create(tmp_path / name, config), callbacks)


def reason(monitor, losses=None, gradient=1.0, gap=0.1, sample=0.5):
    """The result of the monitor for a step with normal values except the given ones."""
    parts = {"ce": 1.0, "ml": 0.1} | (losses or {})
    return monitor.check(StepStats(parts, gradient, 1, 0, False, False), gap, sample)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"ce": math.nan}}, "loss 'ce' is nan"),
        ({"losses": {"ml": math.inf}}, "loss 'ml' is inf"),
        ({"gradient": math.inf}, "the gradient's norm is inf"),
        ({"gap": -1e4}, "log p of samples and data differ by -1e"),
        ({"sample": 40.0}, "samples lie 40 from gray"),
        ({"sample": math.nan}, "samples lie nan from gray"),
        ({"gradient": 1e5}, "the gradient's norm is 1e"),
    ],
)
def test_each_kind_of_divergence_is_detected(changes, message):
    monitor = DivergenceMonitor(RollbackConfig())
    assert all(reason(monitor) is None for _ in range(20))
    assert message in reason(monitor, **changes)


def test_lasting_gap_is_detected_and_a_single_step_is_not():
    monitor = DivergenceMonitor(RollbackConfig(gap=10))
    assert reason(monitor, gap=60.0) is None
    reasons = [reason(monitor, gap=12.0) for _ in range(40)]
    assert reasons[0] is None
    assert reasons[-1] is not None


def test_rollback_takes_a_good_snapshot_and_applies_one_mitigation():
    monitor = DivergenceMonitor(RollbackConfig(every=10, max_rollbacks=4))
    for step in (0, 10, 20, 30):
        monitor.keep(Snapshot(step, {}, torch.zeros(0), None))
    found = []
    for _ in range(5):
        before = monitor.mitigations
        divergence, snapshot = monitor.diverged(31, "reason")
        assert snapshot.step == divergence.back
        changed = [a != b for a, b in zip(before, monitor.mitigations, strict=True)]
        found.append((divergence.back, divergence.change, sum(changed)))
    # the snapshot of step 30 is dropped, because the run diverged one step after it
    assert [back for back, _, _ in found] == [20] * 5
    assert [change for _, change, _ in found] == ["rate", "steps", "penalty", "rate", None]
    assert [count for _, _, count in found] == [1, 1, 1, 1, 0]
    assert monitor.mitigations == Mitigations(pytest.approx(0.09), 1.5, 0.01)


class NaNWeights:
    """Fills a parameter with NaN when step ``at`` is reported, at most ``times`` times."""

    def __init__(self, at, times):
        self.at, self.times, self.trainer, self.rows = at, times, None, []

    def report(self, row):
        self.rows.append(row)
        if row["kind"] == "train" and row["step"] == self.at and self.times:
            self.times -= 1
            with torch.no_grad():
                next(self.trainer.model.parameters()).fill_(math.nan)


def start_with_nan(tmp_path, times):
    reporter = NaNWeights(5, times)
    trainer = start(tmp_path, "run", callbacks=[reporter])
    reporter.trainer = trainer
    return trainer, reporter


def test_run_that_diverges_once_continues(tmp_path):
    trainer, reporter = start_with_nan(tmp_path, 1)
    trainer.fit()
    assert trainer.step == 12
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    (row,) = [row for row in reporter.rows if row["kind"] == "rollback"]
    assert (row["at"], row["step"], row["change"]) == (6, 4, "rate")
    rows = trainer.run.metrics()
    assert [r["step"] for r in rows if r["kind"] == "train"] == list(range(1, 13))
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates[4] < 0.4 * rates[3]
    aside = (tmp_path / "run" / "rollbacks" / "01.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [5]
    # the checkpoint holds the mitigations, so they apply to a resumed run
    resumed = assemble(trainer.config, RunFolder.open(tmp_path / "run"))
    assert resumed.rollback.monitor.mitigations.rate == 0.3
    assert resumed.rollback.monitor.history == trainer.rollback.monitor.history
    assert resumed.rollback.negatives.attempt == 1


def test_rollback_restores_the_snapshot_bit_identically(tmp_path):
    """Network, optimiser and chains after a rollback equal those of the snapshot."""
    trainer, _ = start_with_nan(tmp_path, 1)
    recorded = {}
    rollback = trainer.rollback
    snapshot, restore_snapshot = rollback.snapshot, rollback.restore_snapshot

    def recording_snapshot():
        snapshot()
        recorded[trainer.step] = rollback.monitor.snapshots[-1]

    def checking_restore(reason):
        divergence = restore_snapshot(reason)
        old = recorded[divergence.back].state
        assert torch.equal(rollback.negatives.buffer.images, recorded[divergence.back].chains)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(value, old["model"][name])
        moments = trainer.update.optimizer.state_dict()["state"]
        assert all(
            torch.equal(moments[k]["exp_avg"], old["optimizer"]["state"][k]["exp_avg"])
            for k in moments
        )
        recorded["done"] = True
        return divergence

    rollback.snapshot, rollback.restore_snapshot = recording_snapshot, checking_restore
    trainer.fit()
    assert recorded["done"]


@pytest.mark.slow
def test_run_that_never_recovers_ends_with_its_rollback_history(tmp_path):
    trainer, _ = start_with_nan(tmp_path, 100)
    with pytest.raises(UserError) as ended:
        trainer.fit()
    message = str(ended.value)
    assert "diverged 4 times and is given up" in message
    assert message.count("back to step 4") == 4
    assert "learning rate times 0.3" in message
    assert "Langevin steps times 1.5" in message
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    saved = RunFolder.open(tmp_path / "run").load_checkpoint()
    assert saved["step"] == 4
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_sam_perturbation_equals_its_formula_and_is_undone():
    layer = torch.nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    for adaptive in (False, True):
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in layer.named_parameters()}
        sizes = {n: before[n].abs() if adaptive else torch.ones_like(p) for n, p in before.items()}
        norm = sum(((sizes[n] * g) ** 2).sum() for n, g in gradients.items()).sqrt()
        with SAM(0.7, adaptive).perturbed(layer):
            for name, p in layer.named_parameters():
                expected = before[name] + 0.7 * sizes[name] ** 2 * gradients[name] / norm
                torch.testing.assert_close(p.detach(), expected)
        assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


def test_sam_does_not_update_running_means():
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    layers(torch.randn(8, 3)).square().sum().backward()
    before = layers[1].running_mean.clone()
    with SAM(0.1).perturbed(layers):
        layers(torch.randn(8, 3))
    assert torch.equal(layers[1].running_mean, before)
    layers(torch.randn(8, 3))
    assert not torch.equal(layers[1].running_mean, before)


@pytest.mark.slow
def test_hundredfold_learning_rate_recovers_or_ends_with_an_error(tmp_path):
    config = resolve({"objective": "jem", "steps": 24, "validation_images": 0})
    wild = resolve(config.model_dump(mode="json"), {"optimizer": {"lr": 100 * config.optimizer.lr}})
    trainer = assemble(wild, RunFolder.create(tmp_path / "run", wild))
    too_many_rollbacks = ""
    try:
        trainer.fit()
    except UserError as error:
        too_many_rollbacks = str(error)
    assert trainer.step == 24 or "diverged" in too_many_rollbacks
    history = trainer.rollback.monitor.history
    assert history
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    saved = RunFolder.open(tmp_path / "run").load_checkpoint()
    assert all(v.isfinite().all() for v in saved["model"].values())
    assert len(list((tmp_path / "run" / "rollbacks").iterdir())) == len(history)
