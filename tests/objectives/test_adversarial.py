"""Adversarial training: PGD compared with foolbox, early stopping, processes, resume, errors."""

import math
import os
import signal
import warnings

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from torch import nn

from ebmkit import UserError
from ebmkit.compile import Inference
from ebmkit.compute import ComputeConfig
from ebmkit.data import Batch
from ebmkit.distributed import DistributedContext
from ebmkit.models import JointModel, load
from ebmkit.models.base import Features
from ebmkit.models.heads import LinearQuadraticHead, LogitHead
from ebmkit.noise import make_schedule
from ebmkit.objectives import OBJECTIVES, RunContext, TrainingLoss, parse_objective
from ebmkit.objectives.adversarial import AdversarialConfig, TrainingAttack
from ebmkit.training import Interrupted, RunFolder, resolve
from ebmkit.training.cost import Recorder, step_flops, trace_step
from ebmkit.training.loop import assemble
from ebmkit.training.optim import make_optimizer
from ebmkit.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

TINY = {
    "backbone": "gradresnet10",
    "objective": "adv",
    "model": {"backbone": {"width": 8}},
    "terms": {"adv": {"steps": 2, "warmup_steps": 0}, "trades": {"steps": 2, "warmup_steps": 0}},
    "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}},
    "steps": 6,
    "log_every": 1,
    "validate_every": 3,
    "validation_images": 16,
    "checkpoint_every": 2,
    "device": "cpu",
}


def start(tmp_path, name, *layers, callbacks=()):
    config = resolve(TINY, *layers, recipe="digits-robust")
    return assemble(config, RunFolder.create(tmp_path / name, config), callbacks)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


class Tiny(nn.Module):
    """One convolution and a BatchNorm whose two modes differ."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, y):
        h = nn.functional.gelu(self.norm(self.conv(y)))
        return Features(h.mean((2, 3)), (h,))


def classifier(classes=5):
    torch.manual_seed(1)
    model = JointModel(Tiny(), LogitHead(8, classes), in_channels=1).double()
    with torch.no_grad():  # larger logits, so that the attack changes the loss
        model.head.classifier.weight.mul_(8)
    return model


def draw(count=6, sigma=0.0, classes=5, seed=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 6, 6, generator=g, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=g)
    level = torch.full((count,), sigma, dtype=torch.float64)
    soft = nn.functional.one_hot(labels, classes).double()
    return Batch(x, x + sigma * eps, level, eps, labels, soft)


def make_attack(model, objective="adv", **settings):
    config = OBJECTIVES[objective].config(**settings)
    return TrainingAttack(RunContext(model, objective, "classify"), config, objective == "trades")


def with_attacked(batch, images, *names):
    for name in names or ("adv",):
        batch = batch.with_columns(name, {"attacked": images})
    return batch


def attacked(model, batch, objective="adv", step=0, **settings):
    return make_attack(model, objective, **settings).attack(batch, step)


def label_loss(model, y, labels, sigma=None):
    with torch.no_grad():
        return -model.eval().energies(y, sigma).at_label(labels)


def foolbox_attack(model, batch, config, start=None, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox.attacks as fa
        from foolbox import PyTorchModel, TargetedMisclassification
    import eagerpy

    class Plain(nn.Module):
        def forward(self, y):
            return model(y).logits

    linf = config.norm == "linf"
    if config.steps == 1:
        attack = fa.LinfFastGradientAttack() if linf else fa.L2FastGradientAttack()
    else:
        kind = (
            fa.LinfProjectedGradientDescentAttack if linf else fa.L2ProjectedGradientDescentAttack
        )
        attack = kind(abs_stepsize=config.step, steps=config.steps, random_start=start is not None)
        attack.get_random_start = lambda x0, epsilon: eagerpy.astensor(start)
    model.eval().requires_grad_(False)
    goal = batch.labels if target is None else TargetedMisclassification(target)
    found = attack(
        PyTorchModel(Plain().eval(), bounds=(0, 1), device="cpu"),
        batch.y,
        goal,
        epsilons=config.eps,
    )[0]
    model.requires_grad_(True)
    return found


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("linf", 0.1)])
def test_attack_equals_foolbox(norm, eps, steps):
    """Float64, without random start; with one step, the reference is the fast gradient method."""
    model, batch = classifier(), draw()
    settings = {"norm": norm, "eps": eps, "steps": steps, "random_start": False}
    found = attacked(model, batch, **settings)
    expected = foolbox_attack(model, batch, AdversarialConfig(**settings))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (label_loss(model, found, batch.labels) > label_loss(model, batch.y, batch.labels)).all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.8), ("linf", 0.1)])
def test_attack_with_firstand_target_equals_foolbox(norm, eps, targeted):
    model, batch = classifier(), draw()
    own = make_attack(model, norm=norm, eps=eps, targeted=targeted)
    config = own.config
    generator = torch.Generator().manual_seed(0)
    first, target = own._drawn(batch, config, generator)
    own._drawn = lambda *_: (first, target)
    found = own.attack(batch, 0)
    assert not torch.equal(first, batch.y)
    expected = foolbox_attack(model, batch, config, first, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if targeted:
        assert (target != batch.labels).all()
        assert (label_loss(model, found, target) < label_loss(model, batch.y, target)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_random_starts_are_uniform_in_the_ball(norm):
    """l2: radius^d is uniform; linf: each entry is. First two moments, to 4 standard errors."""
    batch = draw(2000)._replace(sigma=torch.ones(2000).double())  # not clipped
    own = make_attack(classifier(), norm=norm, eps=0.5)
    generator = torch.Generator().manual_seed(5)
    offset = (own._drawn(batch, own.config, generator)[0] - batch.y).flatten(1) / 0.5
    u = offset.norm(dim=1) ** 36 if norm == "l2" else (offset.flatten() + 1) / 2
    assert u.max() <= 1 + 1e-9
    error = 1 / math.sqrt(12 * len(u))
    assert abs(u.mean() - 1 / 2) < 4 * error
    assert abs(u.square().mean() - 1 / 3) < 4 * error
    assert offset.mean(0).abs().max() < 0.1


def test_early_stop_leaves_misclassified_images_unchanged():
    model, batch = classifier(), draw(12)
    options = {"norm": "l2", "eps": 1.0, "steps": 1, "step_size": 0.1, "random_start": False}
    wrong = model.eval().logits(batch.y).argmax(1) != batch.labels
    assert 0 < wrong.sum() < len(wrong)
    far = attacked(model, batch, **options | {"steps": 8})
    held = attacked(model, batch, **options | {"steps": 8, "early_stop": True})
    y, still = batch.y, ~wrong
    for _ in range(8):
        y = torch.where(
            still[:, None, None, None], attacked(model, batch._replace(y=y), **options), y
        )
        still &= model.eval().logits(y).argmax(1) == batch.labels
    torch.testing.assert_close(held, y, rtol=0, atol=1e-12)
    assert torch.equal(held[wrong], batch.y[wrong])
    assert not torch.allclose(far, held)


def test_variance_preserving_radius_holds_for_scaled_noisy_images():
    """The distance in sqrt(abar) y is eps at every noise level; noisy images are not clipped."""
    model, batch = classifier(), draw()
    sigma = torch.tensor([0.0, 0.0, 0.1, 0.5, 1.0, 3.0]).double()
    batch = batch._replace(sigma=sigma, y=batch.x + sigma[:, None, None, None] * batch.eps)
    settings = {"eps": 0.2, "steps": 3, "step_size": 10.0, "variance_preserving": True}
    found = attacked(model, batch, **settings)
    abar = 1 / (1 + (2 * sigma) ** 2)
    moved = (abar.sqrt()[:, None, None, None] * (found - batch.y)).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved[2:], torch.full((4,), 0.2).double())
    assert (moved[:2] <= 0.2 + 1e-12).all()
    schedule = make_schedule()  # lengths of x_t = sqrt(abar) (2 x - 1) + noise are twice these
    t = 400
    level = torch.full((6,), schedule.sigma(t)).double()
    noisy = batch._replace(sigma=level, y=batch.x + schedule.sigma(t) * batch.eps)
    both = (attacked(model, noisy, **settings | {"eps": 0.25}), noisy.y)
    x_t = [schedule.abar(t) ** 0.5 * (2 * y - 1) for y in both]
    torch.testing.assert_close((x_t[0] - x_t[1]).flatten(1).norm(dim=1), 0 * level + 0.5)
    clean, noisy = found[:2], found[2:]
    assert clean.min() >= 0
    assert clean.max() <= 1
    assert noisy.min() < 0
    assert noisy.max() > 1
    plain = attacked(model, batch, **settings | {"variance_preserving": False})
    moved = (plain - batch.y)[2:].flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((4,), 0.2).double())


def test_radius_grows_during_warm_up_and_is_full_in_validation():
    model, batch = classifier(), draw()
    sigma = torch.full((6,), 3.0).double()  # noisy images are not clipped
    batch = batch._replace(sigma=sigma, y=batch.x + 3 * batch.eps)
    settings = {"eps": 0.4, "steps": 3, "step_size": 10.0, "warmup_steps": 3}
    own = make_attack(model, **settings)

    def radius(step):
        moved = own.attack(batch, step) - batch.y
        return moved.flatten(1).norm(dim=1)

    for step, share in ((0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (9, 1.0)):
        torch.testing.assert_close(radius(step), torch.full((6,), share * 0.4).double())
    own.warm = True
    torch.testing.assert_close(radius(0), torch.full((6,), 0.4).double())


def test_attack_does_not_change_the_network():
    """It stays in training mode, without gradients, with its running statistics; no warning."""
    model, batch = classifier().train(), draw()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attacked(model, batch)
    assert model.training
    assert not model._warned
    assert not found.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(found, attacked(model.eval(), batch))  # attacked in evaluation mode


def test_adv_with_radius_zero_is_bit_identical_to_cross_entropy(tmp_path):
    options = {"terms": {"adv": {"eps": 0}}, "steps": 2, "validation_images": 0}
    runs = [start(tmp_path, name, options, {"objective": name}) for name in ("adv", "ce")]
    for trainer in runs:
        trainer.fit()
    assert torch.equal(*map(weights, runs))
    assert [t.card.attack for t in runs] == ["", ""]


def test_attack_on_mixed_labels_raises_the_mixed_loss(tmp_path):
    model, batch = classifier(), draw()
    soft = 0.7 * batch.soft + 0.3 * batch.soft.roll(1, 0)
    found = attacked(model, batch._replace(soft=soft), random_start=False)
    loss = TrainingLoss(model.eval(), parse_objective("adv"))
    with torch.no_grad():
        before, after = (
            loss({"classify": with_attacked(batch._replace(soft=soft), y)}).total
            for y in (batch.y, found)
        )
    assert after > before
    mix = {"streams": {"classify": {"augmentation": {"mix": "both"}}}}
    start(tmp_path, "run", mix, {"steps": 1}).fit()


def test_adv_uses_attacked_images_and_ce_uses_clean_images():
    model, batch = classifier().eval(), draw()
    under_attack = attacked(model, batch)
    batch = with_attacked(batch, under_attack)
    loss = TrainingLoss(model, parse_objective("ce+0.5*adv"))({"classify": batch})
    clean, under = (label_loss(model, y, batch.labels).mean() for y in (batch.y, under_attack))
    torch.testing.assert_close(loss.parts["ce"], clean)
    torch.testing.assert_close(loss.parts["adv"], under)
    torch.testing.assert_close(loss.total.detach(), clean + 0.5 * under)


def test_objectives_on_one_stream_use_their_own_attacks():
    """The loss of adv+trades is the sum of both losses, each on its own attacked images."""
    model, batch = classifier().eval(), draw()
    loss = TrainingLoss(model, parse_objective("adv+trades"))
    both = loss.prepared(loss.preparations(), {"classify": batch}, 3)
    alone = 0
    for name in ("adv", "trades"):
        own = TrainingLoss(model, parse_objective(name))
        alone = alone + own(own.prepared(own.preparations(), {"classify": batch}, 3)).total
    torch.testing.assert_close(loss(both).total, alone)
    assert not torch.equal(*both["classify"].extra.values())


def test_trades_loss_and_gradient_equal_the_formula():
    """Two classes with logits W y: CE + beta KL and its gradient with respect to W."""

    class Linear(nn.Module):
        num_features = 4

        def forward(self, y):
            return Features(y.flatten(1), (y,))

    model = JointModel(Linear(), LogitHead(4, 2), in_channels=1).double()
    w = model.head.classifier.weight
    g = torch.Generator().manual_seed(2)
    y, other = torch.rand(2, 3, 1, 2, 2, generator=g, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    soft = nn.functional.one_hot(labels, 2).double()
    zero = torch.zeros(3, dtype=torch.float64)
    batch = Batch(y, y, zero, torch.zeros_like(y), labels, soft)
    batch = with_attacked(batch, other, "trades")
    settings = {"trades": OBJECTIVES["trades"].config(beta=4.0)}
    loss = TrainingLoss(model, parse_objective("trades", settings))
    total = loss({"classify": batch}).total
    (found,) = torch.autograd.grad(total, w)

    a, b = y.flatten(1), other.flatten(1)
    p, q = ((v @ w.detach().T).softmax(1) for v in (a, b))
    ratio = (p / q).log()
    kl = (p * ratio).sum(1)
    expected = -(soft * p.log()).sum(1) + 4 * kl
    torch.testing.assert_close(total.detach(), expected.mean())
    # dKL/d(clean logits) = p (log(p/q) - KL), dKL/d(attacked logits) = q - p
    by_clean, by_attacked = p - soft + 4 * p * (ratio - kl[:, None]), 4 * (q - p)
    by_hand = (by_clean.T @ a + by_attacked.T @ b) / 3
    torch.testing.assert_close(found, by_hand)


def test_trades_attack_raises_the_kl_divergence():
    model, batch = classifier(), draw()
    found = attacked(model, batch, "trades", eps=0.5)
    with torch.no_grad():
        p, q = (model.eval().energies(y).log_posterior() for y in (batch.y, found))
        nearby = model.energies(batch.y + 0.001 * batch.eps).log_posterior()
    kl = (p.exp() * (p - q)).sum(1)
    assert (kl > 10 * (p.exp() * (p - nearby)).sum(1)).all()
    assert ((found - batch.y).flatten(1).norm(dim=1) <= 0.5 + 1e-12).all()


@pytest.mark.parametrize("objective", ["adv", "trades"])
def test_attack_depends_on_the_step_and_not_on_the_number_of_processes(objective):
    model, batch = classifier(), draw(8)
    settings = {"targeted": True} if objective == "adv" else {}
    whole = attacked(model, batch, objective, step=4, **settings)
    assert torch.equal(whole, attacked(model, batch, objective, step=4, **settings))
    assert not torch.equal(whole, attacked(model, batch, objective, step=5, **settings))
    for rank in (0, 1):
        own = make_attack(model, objective, **settings)
        own.world = DistributedContext(rank, 2)
        rows = slice(4 * rank, 4 * rank + 4)
        share = batch.rows(rows)
        found = own.attack(share, 4)
        torch.testing.assert_close(found, whole[rows], rtol=0, atol=1e-12)
    parts = make_attack(model, objective, **settings)
    parts.parts = 3
    torch.testing.assert_close(parts.attack(batch, 4), whole, rtol=0, atol=1e-12)


class StopAt:
    """Sends SIGINT, as Ctrl-C does, when a step is reported."""

    def __init__(self, step):
        self.step = step

    def report(self, row):
        if row["kind"] == "train" and row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_resume_after_interrupt_is_bit_identical(tmp_path):
    layer = {"objective": "trades+dsm", "steps": 5, "optimizer": {"sharpness": 0.1, "ema": 0.9}}
    whole = start(tmp_path, "whole", layer)
    whole.fit()
    cut = start(tmp_path, "cut", layer, callbacks=[StopAt(3)])
    with pytest.raises(Interrupted, match="after step 3"):
        cut.fit()
    resumed = assemble(cut.config, RunFolder.open(tmp_path / "cut"))
    resumed.fit()
    assert torch.equal(weights(whole), weights(resumed))
    rows = [[r for r in t.run.metrics() if r["kind"] == "validation"] for t in (whole, resumed)]
    assert rows[0] == rows[1]
    assert {"trades", "dsm", "accuracy", "accuracy_attacked"} <= rows[0][0].keys()


@pytest.mark.parametrize(
    ("objective", "backend"),
    [
        pytest.param("ce+adv", "aot_eager", marks=pytest.mark.slow),
        pytest.param("trades", "aot_eager", marks=pytest.mark.slow),
        pytest.param("adv", "eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_step_equals_eager_step(objective, backend):
    def gradients(compile):
        model = classifier().float()
        loss = TrainingLoss(model, parse_objective(objective))
        optimizer = make_optimizer(model, resolve({}).optimizer)
        step = TrainingStep(loss, optimizer, ComputeConfig(compile=compile), backend=backend)
        batch = Batch(*(c.float() if c.is_floating_point() else c for c in draw().tensors))
        step(loss.prepared(loss.preparations(), {"classify": batch}, 0), rate=0.0)
        assert step.compiled == (compile == "on")
        return torch.cat([p.grad.flatten() for p in step.parameters])

    eager, compiled = gradients("off"), gradients("on")
    assert (compiled - eager).norm() < 1e-5 * eager.norm()


def test_compiled_attack_equals_eager_attack():
    model, batch = classifier(), draw()
    eager = attacked(model, batch)
    inference = Inference(mode="on", backend="aot_eager")
    own = make_attack(model)
    own.computed = inference.wrap(model)
    for _ in range(2):  # compiled when a size repeats
        found = own.attack(batch, 0)
    assert inference.compiled
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_cost_counts_attack_steps(tmp_path):
    for objective, passes in (("adv", 2), ("trades", 2.5)):
        trainer = start(tmp_path, objective, {"objective": objective, "backbone": "gradresnet18"})
        shapes = trainer.budget.plan[0][1]
        flops = step_flops(trainer.loss, shapes)
        assert list(flops) == [objective, "2 attack steps"]
        batch = next(trainer.batches(0, 1))["classify"]
        with Recorder() as counted:
            trainer.preparations[objective].attack(batch, 0)
        assert flops["2 attack steps"] == counted.flops
        forwards = {"adv": 3, "trades": 6}[objective]  # forward and backward, twice for trades
        expected = 2 * passes / forwards
        assert flops["2 attack steps"] / flops[objective] == pytest.approx(expected, rel=0.05)
        assert trace_step(trainer.loss, shapes).unused == ()
    assert "2 attack steps" not in step_flops(
        start(tmp_path, "none", {"terms": {"adv": {"eps": 0}}}).loss, shapes
    )


@pytest.mark.slow
def test_train_command_with_adv_and_dsm(tmp_path):
    arguments = ["--objective=adv+dsm", "--steps=2", "--width=8", "--no-evaluate", "--out=run"]
    arguments += [f"--set=streams.{name}.batch_size=8" for name in ("classify", "denoise")]
    arguments += ["--set=objective.adv.norm=linf", "--set=objective.adv.eps=8/255"]
    ended = ebmkit_command("train", *arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert load(tmp_path / "run").card.attack == "linf 0.0313725"
    config = RunFolder.open(tmp_path / "run").config()
    assert config["terms"]["adv"]["eps"] == 8 / 255
    assert config["head"] == "logit"


def test_settings_of_robust_recipes(tmp_path):
    full = resolve({"objective": "adv", "dataset": {"name": "cifar10"}, "backbone": "resnet50"})
    assert full.optimizer.kind == "sgd"
    assert (full.optimizer.lr, full.optimizer.weight_decay, full.steps) == (0.1, 5e-4, 58_594)
    assert full.optimizer.milestones == (50 / 150, 100 / 150)
    assert (full.terms.adv.steps, full.terms.adv.random_start, full.head) == (7, False, "logit")
    assert full.streams.classify.noise.range == (0, 0)
    own = resolve({"objective": "adv", "backbone": "resnet50", "terms": {"adv": {"norm": "linf"}}})
    assert own.streams == resolve(recipe="digits-robust").streams
    assert own.terms.adv.norm == "linf"
    assert resolve({"objective": "trades"}).optimizer == own.optimizer
    other = resolve({"objective": "ce+adv", "dataset": {"name": "folder"}})
    assert (other.head, other.backbone) == ("logit", "gradresnet18")
    assert resolve(recipe="cifar10-robust-short").terms.trades.steps == 3


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"objective": "adv", "dataset": {"name": "patches"}}, "needs labels"),
        ({"objective": "adv", "backbone": "dncnn"}, "is a denoiser without them"),
        ({"terms": {"adv": {"norm": "l1"}}}, "norm = 'l1' is not legal"),
        ({"terms": {"adv": {"eps": "-1"}}}, "must be a finite number of 0 or more"),
        ({"terms": {"adv": {"eps": "much"}}}, "'much' is not a radius"),
        ({"terms": {"adv": {"step_size": 0}}}, "greater than 0"),
        ({"terms": {"adv": {"steps": 0}}}, "greater than or equal to 1"),
        ({"terms": {"trades": {"targeted": True}}}, "has no target"),
        ({"terms": {"trades": {"random_start": False}}}, "no gradient at the image itself"),
    ],
)
def test_invalid_settings_are_refused_before_the_first_step(layer, message):
    with pytest.raises(UserError, match=message):
        assemble(resolve(TINY, layer))


def test_network_without_labels_or_with_one_class_is_refused():
    with pytest.raises(UserError, match="there is only one class"):
        make_attack(classifier(1), targeted=True)
    bare = JointModel(Tiny(), LinearQuadraticHead(8, 0), in_channels=1)
    with pytest.raises(UserError, match="this network has no labels"):
        make_attack(bare)
