"""Checks of the entries of a checkpoint, which may be an untrusted file."""

import re

import pytest
import torch

from ebmkit import UserError
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.optim import make_optimizer
from ebmkit.training.state import SavedOptimizer, restore_optimizer

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

ONES = torch.ones


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trainer that can resume, and the state to resume from."""
    layer = {
        "objective": "jem",
        "backbone": "gradresnet18",
        "model": {"backbone": {"width": 4, "channels_per_group": 4}},
        "negatives": {"buffer_size": 20, "steps": 1},
        "streams": {name: {"batch_size": 2} for name in ("classify", "denoise", "generate")},
        "optimizer": {"ema": 0.9},
        "validation_images": 0,
        "device": "cpu",
        "steps": 2,
    }
    run = RunFolder.create(tmp_path_factory.mktemp("saved") / "run", resolve(layer))
    assemble(resolve(layer), run).fit()
    trainer = assemble(resolve({**layer, "steps": 3}), None)
    return trainer, run.load_checkpoint()


def moment(state, name):
    return state["optimizer"]["state"][0], name


def snapshots(state):
    return state["rollback"]["kept"]


@pytest.mark.parametrize(
    ("where", "new", "message"),
    [
        (lambda s: moment(s, "exp_avg"), ONES(1), "optimizer, parameter 0, 'exp_avg' is"),
        (lambda s: moment(s, "exp_avg_sq"), ONES(0), "optimizer, parameter 0, 'exp_avg_sq' is"),
        (lambda s: moment(s, "step"), ONES(2), "'step' is float32 (2,), and should be float32 ()"),
        (lambda s: moment(s, "momentum_buffer"), ONES(1), "of another optimiser"),
        (lambda s: (s["optimizer"], "state"), {10**6: {}}, "parameter 1000000, is of another"),
        (lambda s: (s["optimizer"], "state"), [], "valid dictionary"),
        (lambda s: (s, "optimizer"), None, "the checkpoint: optimizer"),
        (lambda s: (s, "running"), ONES(7), "'running' is float32 (7,)"),
        (lambda s: (s, "running"), [1.0], "the checkpoint: running"),
        (lambda s: (s, "seconds"), float("nan"), "the checkpoint: seconds"),
        (lambda s: (s, "best"), float("nan"), "the checkpoint: best"),
        (lambda s: (s, "step"), 4, "is at step 4, but the run ends at 3"),
        (lambda s: (s, "average"), None, "average 'n_averaged' is missing"),
        (lambda s: (s["model"], "backbone.stem.weight"), ONES(2), "'backbone.stem.weight' is"),
        (lambda s: (s["model"], "x\x1b[2J"), ONES(2), r"'x\x1b[2J' is of another model"),
        (lambda s: (s, "unreadable"), {1: 2}, "the checkpoint: unreadable"),
        (lambda s: (s, "rollback"), None, "the checkpoint: rollback"),
        (lambda s: (s, "buffer"), None, "has no replay buffer"),
        (lambda s: (s["rollback"], "attempt"), "1", "the checkpoint: rollback: attempt"),
        (lambda s: (s["rollback"], "history"), [[1, "why"]], "the checkpoint: rollback: history"),
        (lambda s: (s["rollback"]["remedies"], "rate"), -1.0, "rollback: remedies.rate = -1.0"),
        (lambda s: (s["rollback"]["remedies"], "steps"), 2**62, "rollback: remedies.steps ="),
        (lambda s: (snapshots(s)[0], 2), ONES(1), "the chains kept at step 0 is float32 (1,)"),
    ],
)
def test_invalid_checkpoint_entries_are_refused_by_name(saved, where, new, message):
    """With moments of another shape, the fused kernel would read and write out of bounds."""
    trainer, state = saved
    inside, name = where(state)
    absent = isinstance(inside, dict) and name not in inside
    old = None if absent else inside[name]
    inside[name] = new
    try:
        with pytest.raises(UserError, match=re.escape(message)):
            trainer.load_state_dict(state)
    finally:
        if absent:
            del inside[name]
        else:
            inside[name] = old
    trainer.load_state_dict(state)  # the original state loads


@pytest.fixture(scope="module")
def saved_by_muon():
    layer = {
        "model": {"backbone": {"width": 4, "channels_per_group": 4}},
        "streams": {name: {"batch_size": 2} for name in ("classify", "denoise")},
        "optimizer": {"kind": "muon"},
        "validation_images": 0,
        "device": "cpu",
    }
    trainers = [assemble(resolve({**layer, "steps": n}), None) for n in (1, 2)]
    trainers[0].fit()
    return trainers[1], trainers[0].state_dict()


def parameter_state(state, number):
    return state["optimizer"]["state"][number]


@pytest.mark.parametrize(
    ("number", "name", "new", "message"),
    [
        (
            0,
            "momentum_buffer",
            ONES(0),
            "optimizer, parameter 0, 'momentum_buffer' is float32 (0,)",
        ),
        (0, "momentum_buffer", torch.ones(4, 1, 3, 3).double(), "'momentum_buffer' is float64"),
        (0, "exp_avg", ONES(1), "parameter 0, is of another optimiser"),
        (0, "momentum_buffer", None, "checkpoint: optimizer.state"),
        (-1, "exp_avg", ONES(2), "'exp_avg' is float32 (2,)"),
        (-1, "momentum_buffer", ONES(1), "is of another optimiser"),
    ],
)
def test_muon_states_are_checked_by_the_kind_of_parameter(
    saved_by_muon, number, name, new, message
):
    trainer, state = saved_by_muon
    own = parameter_state(state, number % len(state["optimizer"]["state"]))
    old = own.copy()
    own[name] = new
    try:
        with pytest.raises(UserError, match=re.escape(message)):
            trainer.load_state_dict(state)
    finally:
        own.clear()
        own |= old
    trainer.load_state_dict(state)


def test_states_of_adamw_and_muon_are_not_interchangeable(saved, saved_by_muon):
    for (trainer, _), (_, state) in ((saved, saved_by_muon), (saved_by_muon, saved)):
        found = SavedOptimizer.model_validate(state["optimizer"])
        with pytest.raises(UserError, match="is of another optimiser or model"):
            restore_optimizer(trainer.update.optimizer, found)


def test_snapshot_is_checked_when_it_is_restored(saved):
    trainer, state = saved
    own = snapshots(state)[0][1]
    old, own["model"] = own["model"], {}
    trainer.load_state_dict(state)
    try:
        with pytest.raises(UserError, match="is missing"):
            trainer.rollback.restore_snapshot("made up")
    finally:
        own["model"] = old


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_optimiser_resume_ignores_parameter_groups_of_the_file(kind):
    """Rates, decay and sign come from the configuration, so the resume is bit-identical."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        settings = resolve({"optimizer": {"kind": kind, "weight_decay": 0.1}}).optimizer
        return model, make_optimizer(model, settings)

    def step(model, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"lr": 1e6, "weight_decay": 9.0, "maximize": True, "fused": False, "evil": [0]}
    again, other = make()
    again.load_state_dict(model.state_dict())
    restore_optimizer(other, SavedOptimizer.model_validate(state))
    for number in (1, 2):
        step(model, optimizer, number)
        step(again, other, number)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(UserError, match="of another optimiser"):
        wrong = {0: {"exp_avg": ONES(4, 3, 3, 3)}}
        restore_optimizer(other, SavedOptimizer(state=wrong))
