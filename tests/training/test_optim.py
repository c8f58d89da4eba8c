"""Muon: the update, the parameters it updates, its cost and invalid settings."""

import math
import re

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ebmkit
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training import RunFolder, resolve
from ebmkit.training.cost import step_flops, step_memory
from ebmkit.training.loop import assemble
from ebmkit.training.optim import (
    Muon,
    make_optimizer,
    optimizer_flops,
    orthogonalize,
    set_rate,
    state_values_per_parameter,
)

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

SHAPES = [(24, 24), (16, 144), (48, 16), (1, 30), (30, 1)]


def muon(**fields):
    return resolve({"optimizer": {"kind": "muon", **fields}}).optimizer


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def updated_weights(weights, gradients, rest=(), **settings):
    """The weights after one step for each list in ``gradients``."""
    weights = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon(weights, rest, 0.02, weight_decay=0.1, **settings)
    for own in gradients:
        for weight, gradient in zip(weights, own, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [w.detach() for w in weights]


def reference_weights(weights, gradients, momentum, nesterov):
    """The same by definition: Newton-Schulz as a polynomial of the singular values, in float64."""
    weights = [w.double() for w in weights]
    means = [torch.zeros_like(w) for w in weights]
    for own in gradients:
        for i, gradient in enumerate(own):
            g = gradient.double()
            means[i] = momentum * means[i] + (1 - momentum) * g
            update = momentum * means[i] + (1 - momentum) * g if nesterov else means[i]
            u, s, v = torch.linalg.svd(update.flatten(1), full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            scale = 0.2 * math.sqrt(max(update.flatten(1).shape))
            step = scale * (u * s) @ v
            weights[i] = (1 - 0.02 * 0.1) * weights[i] - 0.02 * step.view(gradient.shape)
    return weights


@pytest.mark.parametrize("nesterov", [True, False])
def test_update_is_the_polynomial_of_the_singular_values(nesterov):
    shapes = [*SHAPES, (24, 24), (8, 4, 3, 3), (48, 16)]  # equal shapes are batched
    weights = [normal(i, *shape) for i, shape in enumerate(shapes)]
    gradients = [[normal(10 * t + i, *s) for i, s in enumerate(shapes)] for t in range(1, 4)]
    settings = {"momentum": 0.8, "nesterov": nesterov}
    expected = reference_weights(weights, gradients, **settings)
    for dtype, accuracy in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        w = [x.to(dtype) for x in weights]
        found = updated_weights(w, [[g.to(dtype) for g in own] for own in gradients], **settings)
        for one, other, start in zip(found, expected, weights, strict=True):
            assert float((one - other).norm() / (other - start).norm()) < accuracy


@pytest.mark.parametrize("shape", SHAPES)
def test_update_matches_torch_muon(shape):
    """`torch.optim.Muon` computes in bfloat16 (8 bits), hence the tolerance of 2 %."""
    start, gradients = normal(0, *shape), [[normal(i, *shape)] for i in range(1, 6)]
    [found] = updated_weights([start], gradients)
    weight = nn.Parameter(start.clone())
    reference = torch.optim.Muon(
        [weight], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for [gradient] in gradients:
        weight.grad = gradient.clone()
        reference.step()
    assert float((found - weight.detach()).norm() / (weight.detach() - start).norm()) < 0.02


@pytest.mark.parametrize("shape", [(20, 20), (16, 144), (64, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    """Values above 1 % of the norm map to [0.68, 1.21], the band of these coefficients."""
    x = normal(0, 3, *shape)
    before, after = (torch.linalg.svdvals(m) for m in (x, orthogonalize(x)))
    large = before > 0.01 * before.norm(dim=1, keepdim=True)
    assert large.float().mean() > 0.9
    assert 0.68 < float(after[large].min()) <= float(after.max()) < 1.21


@pytest.mark.parametrize("shape", [(24, 24), (32, 288), (64, 16)])
@pytest.mark.parametrize("rank", [3, None])
def test_orthogonalize_does_not_amplify_rounding_errors(shape, rank):
    """With singular values from 1 to 1e-6, or only three nonzero ones. Reference: float64."""
    small = min(shape)
    u, _ = torch.linalg.qr(normal(0, shape[0], small, dtype=torch.float64))
    v, _ = torch.linalg.qr(normal(1, shape[1], small, dtype=torch.float64))
    s = torch.logspace(0, -6, small, dtype=torch.float64)
    s[rank:] = 0 if rank else s[rank:]
    x = ((u * s) @ v.mT)[None]
    expected = orthogonalize(x)
    error = (orthogonalize(x.float()) - expected).norm() / expected.norm()
    assert float(error) < 1e-3
    ours = torch.linalg.svdvals(orthogonalize(x.float()))[0]
    assert float(ours.max()) < 1.21
    if rank:
        assert float(ours[rank:].max()) < 1e-3


def test_convolution_update_equals_that_of_its_matrix_in_any_layout():
    start, gradients = normal(0, 8, 4, 3, 3), [[normal(i, 8, 4, 3, 3)] for i in (1, 2)]
    [expected] = updated_weights([start], gradients)
    [matrix] = updated_weights(
        [start.flatten(1)], [[g.flatten(1) for g in own] for own in gradients]
    )
    assert torch.equal(matrix.view(start.shape), expected)
    last = torch.channels_last
    for one, other in ((last, last), (last, None), (None, last)):
        w = start.contiguous(memory_format=one or torch.contiguous_format)
        own = [[g.contiguous(memory_format=other or torch.contiguous_format)] for [g] in gradients]
        [found] = updated_weights([w], own)
        assert found.stride() == w.stride()
        assert torch.equal(found, expected)


def test_joint_update_of_matrices_equals_separate_updates():
    """Matrices of equal shape are batched, so the results agree to float64 rounding."""
    shapes = [(8, 4, 3, 3), (16, 8), (8, 36), (16, 8), (8, 4, 3, 3)]
    weights = [normal(i, *s, dtype=torch.float64) for i, s in enumerate(shapes)]
    gradients = [[normal(10 + i, *s, dtype=torch.float64) for i, s in enumerate(shapes)]]
    for one, w, g in zip(updated_weights(weights, gradients), weights, gradients[0], strict=True):
        torch.testing.assert_close(one, updated_weights([w], [[g]])[0], rtol=1e-12, atol=1e-12)


def test_other_parameters_are_updated_by_adamw_at_its_own_rate():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    twin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    twin.load_state_dict(model.state_dict())
    optimizer = make_optimizer(model, muon(lr=0.05, adamw_lr=0.002, betas=[0.8, 0.9]))
    rest = [p for p in twin.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(rest, lr=0.002, betas=(0.8, 0.9), weight_decay=0.05, fused=True)
    for seed in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = normal(seed, *p.shape)
            q.grad = p.grad.clone()
        set_rate(optimizer, 0.05 * 0.5**seed)
        adamw.param_groups[0]["lr"] = 0.002 * 0.5**seed
        optimizer.step()
        adamw.step()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs if p.ndim == 1)


@pytest.mark.parametrize(
    ("backbone", "excluded"),
    [
        ("gradresnet18", {"head", "norm", "shortcut.1"}),
        ("resnet18", {"head", "norm", "downsample.1", "bn", "bias"}),
        ("mlp", {"head", "bias"}),
    ],
)
def test_muon_updates_convolution_and_linear_weights_except_the_head(backbone, excluded):
    width = {} if backbone == "mlp" else {"width": 8}
    model = ebmkit.create_model(backbone, 10, 1, **width)
    names = {id(p): name for name, p in model.named_parameters()}
    first, *rest = make_optimizer(model, muon()).param_groups
    chosen = {names[id(p)] for p in first["params"]}
    others = {names[id(p)] for group in rest for p in group["params"]}
    assert chosen | others == set(names.values())
    assert not chosen & others
    assert all(p.ndim > 1 for p in first["params"])
    for name in others:
        assert any(word in name for word in excluded), name
    assert not any(name.startswith("head") for name in chosen)


def test_shared_weight_is_updated_and_count_memory_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight = model[0].weight
    first, rest = make_optimizer(model, muon()).param_groups
    assert [id(p) for p in first["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert all(p.ndim == 1 for p in rest["params"])
    alone = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    assert optimizer_flops(model, muon()) == optimizer_flops(alone, muon())


def test_muon_updates_only_two_dimensional_transposed_convolutions():
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2), nn.ConvTranspose1d(4, 3, 2))
    first, rest = make_optimizer(model, muon()).param_groups
    assert [id(p) for p in first["params"]] == [id(model[0].weight)]
    assert any(p is model[1].weight for p in rest["params"])


def test_adamw_for_excludes_matrices_from_muon():
    model = ebmkit.create_model("gradresnet18", 10, 1, width=8)
    count = len(make_optimizer(model, muon()).param_groups[0]["params"])
    groups = make_optimizer(model, muon(adamw_for=["stem", "side"])).param_groups
    assert len(groups[0]["params"]) == count - 4
    assert any(p is model.backbone.stem.weight for p in groups[1]["params"])
    with pytest.raises(ebmkit.UserError, match=r"adamw_for names 'stam'.*backbone\.stem\.weight"):
        make_optimizer(model, muon(adamw_for=["stam"]))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_failed_step_leaves_parameters_and_state_bit_identical(value):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0  # an update by 0 would lose the sign
    optimizer = make_optimizer(model, muon())
    for p in model.parameters():
        p.grad = normal(0, *p.shape)
    optimizer.found_inf = torch.zeros(())
    set_rate(optimizer, 0.0)  # updates the moments only
    optimizer.step()
    tensors = [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())]
    before = [t.detach().clone() for t in tensors]
    optimizer.found_inf.fill_(1.0)
    set_rate(optimizer, 0.1)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    optimizer.step()
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
        assert torch.equal(tensor.signbit(), old.signbit())
    optimizer.found_inf.zero_()
    for p in model.parameters():
        p.grad = normal(1, *p.shape)
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_update_does_not_synchronise_with_the_device(device):
    """Reading a value of a fake tensor is an error; fake CUDA tensors need no GPU."""
    with FakeTensorMode():
        weights = [torch.empty(8, 4, 3, 3, device=device), torch.empty(8, 8, device=device)]
        optimizer = Muon(map(nn.Parameter, weights), [], 0.1)
        optimizer.found_inf = torch.zeros((), device=device)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert {w.device.type for own in optimizer.state.values() for w in own.values()} == {device}


def test_parameters_without_a_gradient_do_not_change():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model, muon())
    optimizer.step()
    model[1].weight.grad = normal(0, 4, 4)
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert changed == [False, False, True, False]
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("backbone", [pytest.param("gradresnet10", marks=pytest.mark.slow), "mlp"])
def test_flops_and_state_memory_equal_those_of_a_real_step(backbone):
    loss = TrainingLoss(ebmkit.create_model(backbone, 10, 1, width=16), parse_objective("ce+dsm"))
    config = muon(ema=0.9)
    optimizer = make_optimizer(loss.model, config)
    for p in loss.model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    flops = optimizer_flops(loss.model, config)
    assert flops == counted.get_total_flops()
    shapes = {"classify": (8, 1, 8, 8), "denoise": (8, 1, 8, 8)}
    assert step_flops(loss, shapes, update_flops=flops)["optimiser"] == flops
    stored = [t for own in optimizer.state.values() for n, t in own.items() if n != "step"]
    average = sum(p.nbytes for p in loss.model.parameters())
    memory = step_memory(loss, shapes, state_values_per_parameter(loss.model, config))
    assert memory.optimizer == sum(t.nbytes for t in stored) + average


@pytest.mark.slow
def test_muon_takes_less_than_five_percent_of_the_flops_of_a_step():
    """At width 16, with 128 and 64 images of CIFAR-10 size."""
    model = ebmkit.create_model("gradresnet18", 10, 3, width=16)
    loss = TrainingLoss(model, parse_objective("ce+dsm"))
    shapes = {"classify": (128, 3, 32, 32), "denoise": (64, 3, 32, 32)}
    assert optimizer_flops(model, muon()) < 0.05 * sum(step_flops(loss, shapes).values())


SMALL = {
    "model": {"backbone": {"width": 8}},
    "steps": 60,
    "validate_every": 60,
    "log_every": 10,
    "device": "cpu",
    "streams": {
        "classify": {"batch_size": 32},
        "denoise": {"batch_size": 16},
        "generate": {"batch_size": 8},
    },
    "optimizer": {"kind": "muon", "lr": 0.01},
}


@pytest.mark.slow
def test_muon_learns_digits(tmp_path):
    config = resolve(SMALL)
    run = RunFolder.create(tmp_path / "run", config)
    assemble(config, run).fit()
    last = [row for row in run.metrics() if row["kind"] == "validation"][-1]
    assert last["accuracy"] > 0.65  # measured: 0.76; AdamW: 0.61 at rate 3e-3, 0.69 at 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer",
    [
        {"objective": "jem", "backbone": "gradresnet10"},
        {"objective": "ce+cdsm-sum", "optimizer": {"sharpness": 0.05}},
        {"objective": "adv+dsm", "terms": {"adv": {"eps": 0.3, "steps": 2}}},
        {"objective": "trades", "terms": {"trades": {"eps": 0.3, "steps": 2}}},
        {"objective": "ism", "backbone": "mlp"},
        {"objective": "ddpm", "backbone": "unet"},
        {"objective": "dsm", "backbone": "dncnn20-bias-free"},
    ],
    ids=lambda layer: layer["objective"],
)
def test_every_objective_trains_with_muon(tmp_path, layer):
    small = {**SMALL, "steps": 3, "validation_images": 0, "log_every": 1, "rollback": {"every": 2}}
    if not layer.get("backbone", "gradresnet18").startswith("gradresnet"):
        del small["model"]
    config = resolve(small, {"negatives": {"buffer_size": 100, "steps": 2}}, layer)
    trainer = assemble(config, None)
    before = [p.detach().clone() for p in trainer.update.optimizer.param_groups[0]["params"]]
    trainer.fit()
    assert trainer.step == 3
    after = trainer.update.optimizer.param_groups[0]["params"]
    assert not any(torch.equal(p, b) for p, b in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adamw_lr": 1e-3}, "adamw_lr = 0.001 does nothing here.*optimizer.kind=muon"),
        ({"kind": "sgd", "nesterov": False}, "nesterov = False does nothing here"),
        ({"adamw_for": ["stem"]}, "adamw_for = .*stem.* does nothing here"),
        ({"decay_share": 0.1}, "decay_share = 0.1 does nothing.*schedule=warmup-stable-decay"),
        ({"ema_warmup": True}, "ema_warmup = True does nothing.*optimizer.ema"),
        ({"kind": "muon", "momentum": 1}, "momentum = 1 is not legal"),
        ({"kind": "muno"}, "kind = 'muno' is not legal.*'muon'"),
        ({"schedule": "warmup-stable-decay", "decay_share": 2}, "decay_share = 2 is not legal"),
    ],
)
def test_invalid_settings_and_settings_without_effect_are_refused(fields, message):
    with pytest.raises(ebmkit.UserError, match=message) as error:
        resolve({"optimizer": fields}, recipe="digits-adamw")
    assert "\n" not in str(error.value)


def test_defaults_depend_on_the_kind():
    config = resolve({"optimizer": {"kind": "muon"}}, recipe="digits-adamw")
    own = config.optimizer
    assert (own.momentum, own.nesterov, own.adamw_lr) == (0.95, True, 3e-3)
    assert resolve(config.model_dump(mode="json")) == config
    plain = resolve(recipe="digits-adamw").optimizer
    assert (plain.momentum, plain.nesterov, plain.adamw_lr) == (0.9, None, None)
    chosen = {"optimizer": {"schedule": "warmup-stable-decay"}}
    stable = resolve(chosen, recipe="digits-adamw").optimizer
    assert stable.decay_share == 0.2


def test_model_without_matrices_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.GroupNorm(1, 4), nn.Linear(4, 2)

    with pytest.raises(ebmkit.UserError, match="none is left beside the head"):
        make_optimizer(Scale(), muon())


@pytest.mark.slow
def test_train_command_reports_optimizer_errors_without_traceback(tmp_path):
    small = ["--width=8", "--device=cpu", "--steps=40", "--no-evaluate", "--set=log_every=1"]
    small += [
        "--recipe=digits-adamw",
        "--set=streams.classify.batch_size=8",
        "--set=streams.denoise.batch_size=8",
    ]
    muon_run = ["--set=optimizer.kind=muon", *small]

    def refused(*words):
        ended = ebmkit_command("train", *words, cwd=tmp_path)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        return ended.stderr

    assert "'muno'" in refused("--set=optimizer.kind=muno", *small)
    assert "momentum = 2.0" in refused(*muon_run, "--set=optimizer.momentum=2.0")
    assert "kind=muon" in refused("--set=optimizer.adamw_lr=1e-3", *small)
    output = refused(*muon_run, "--set=optimizer.lr=1e30", "--out=lost")
    assert re.search(r"loss '(ce|dsm)' is (nan|-?inf) at step 2: stopped before", output), output
    assert "lr" in output
    assert RunFolder.open(tmp_path / "lost").load_checkpoint()["step"] == 1


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (
            "digits",
            [
                ("kind=adamw", "'muon'", "'adamw'"),
                ("schedule=cosine", "'warmup-stable-decay'", "'cosine'"),
                ("ema=null", "0.98", "None"),
            ],
        ),
        pytest.param("digits-adamw", [("kind=muon", "'adamw'", "'muon'")], marks=pytest.mark.slow),
    ],
    ids=["muon", "adamw"],
)
def test_resume_with_another_optimizer_setting_is_refused(tmp_path, recipe, changes):
    """The message names the changed field, not the fields that depend on it."""
    small = ["--width=8", "--device=cpu", "--steps=2", "--no-evaluate", f"--recipe={recipe}"]
    small += [f"--set=streams.{name}.batch_size=8" for name in ("classify", "denoise")]
    ended = ebmkit_command("train", *small, "--out=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for field, was, now in changes:
        ended = ebmkit_command("train", "--resume=run", f"--set=optimizer.{field}", cwd=tmp_path)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        name = field.partition("=")[0]
        assert f"optimizer.{name} was {was} and is now {now}" in ended.stderr
