"""The time score and the objectives that compare noise levels, against closed forms."""

import math

import pytest
import torch
from ebmkit_tests.support.small_models import gradients

import ebmkit
from ebmkit.data import Batch, ImageSet
from ebmkit.energy import LogDensity, value_and_grads
from ebmkit.errors import UserError
from ebmkit.models import MLP, JointModel, LinearHead, MLPConfig, PreconditionedModel
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.objectives.time_score import level_groups
from ebmkit.training import resolve
from ebmkit.training.setup import build_model, check_terms

D = 3


def mixture():
    """Three Gaussians with full covariances and two labels, in float64."""
    g = torch.Generator().manual_seed(5)
    means = torch.randn(3, D, 1, 1, generator=g, dtype=torch.float64)
    roots = torch.randn(3, D, D, generator=g, dtype=torch.float64) / 2
    covariances = roots @ roots.mT + 0.1 * torch.eye(D, dtype=torch.float64)
    return ebmkit.GaussianMixture(means, covariances, [0.5, 0.3, 0.2], labels=[0, 1, 0])


def draw(model, count, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, labels = model.sample(count, g)
    sigma = 0.05 * 100 ** torch.rand(count, generator=g, dtype=x.dtype)
    eps = torch.randn(x.shape, generator=g, dtype=x.dtype)
    soft = torch.nn.functional.one_hot(labels).to(x)
    return Batch(x, x + sigma[:, None, None, None] * eps, sigma, eps, labels, soft)


def network(seed=0):
    torch.manual_seed(seed)
    backbone = MLP(D, MLPConfig(width=16, noise_conditional=True))
    joint = JointModel(backbone, LinearHead(16, 2), in_channels=D)
    return PreconditionedModel(joint, 0.1, 1.2).double()


@pytest.mark.parametrize("c", [None, 1])
@pytest.mark.parametrize("make", [mixture, network])
def test_time_score_is_the_derivative_by_log_sigma(make, c):
    """Central differences at step 1e-5 have errors of about 1e-10."""
    model, batch, h = make(), draw(mixture(), 6), 1e-5
    up, down = (model.log_density(batch.y, batch.sigma * math.exp(t), c) for t in (h, -h))
    found = model.time_score(batch.y, batch.sigma, c)
    torch.testing.assert_close(found, (up - down) / (2 * h), rtol=1e-6, atol=1e-7)


def test_time_score_is_the_heat_equation():
    """d log p / d log sigma = sigma^2 (|s|^2 + tr grad s), which is E[|eps|^2 - d | y]."""
    model, batch = mixture(), draw(mixture(), 6)
    expected = []
    for y, sigma in zip(batch.y, batch.sigma, strict=True):

        def score(z, own=sigma[None]):
            return model.score(z.reshape(1, D, 1, 1), own).flatten()

        s, jacobian = score(y), torch.autograd.functional.jacobian(score, y.flatten())
        expected.append(sigma**2 * (s.square().sum() + jacobian.trace()))
    torch.testing.assert_close(model.time_score(batch.y, batch.sigma), torch.stack(expected))


def test_all_ways_to_differentiate_agree():
    model, batch = network(), draw(mixture(), 5)
    targets = LogDensity(), LogDensity(batch.labels)

    def compute(**how):
        return value_and_grads(
            model.forward, batch.y, batch.sigma, *targets, by_log_sigma=True, **how
        )

    _, eager = compute()
    _, functional = compute(use_autograd=False)
    with torch.inference_mode():
        _, frozen = compute()
    assert [g.shape for g in eager] == [batch.y.shape] * 2 + [(5,)] * 2
    for own, *others in zip(eager, functional, frozen, strict=True):
        for other in others:
            torch.testing.assert_close(own, other)
    plain = value_and_grads(model.forward, batch.y, batch.sigma, *targets)[1]
    for own, other in zip(eager, plain, strict=False):
        assert torch.equal(own, other)


@pytest.mark.parametrize("use_autograd", [True, False])
def test_score_and_time_score_share_a_pass_and_give_the_gradients_of_two(use_autograd):
    batch = {"denoise": draw(mixture(), 8)}
    together, passes = network(), []
    together.network.register_forward_hook(lambda *_: passes.append(1))
    loss = TrainingLoss(together, parse_objective("1*dsm+1*tsm"))
    loss.use_autograd = use_autograd
    both = gradients(loss(batch).total, together)
    assert len(passes) == 1
    apart = []
    for text in ("1*dsm", "1*tsm"):
        model = network()
        apart.append(gradients(TrainingLoss(model, parse_objective(text))(batch).total, model))
    for own, *parts in zip(both, *apart, strict=True):
        torch.testing.assert_close(own, sum(parts))


def test_loss_is_one_for_no_prediction_and_least_for_the_truth():
    """A constant density predicts 0. Standard errors at 20,000 images are below 0.02."""
    truth = mixture()
    batch = {"denoise": draw(truth, 20_000)}

    class Constant(ebmkit.EnergyModel):
        noise_conditional = True

        def forward(self, y, sigma=None):
            zero = 0 * y.flatten(1).sum(1)
            return ebmkit.Energies(zero[:, None], zero)

    class Wrong(Constant):
        def forward(self, y, sigma=None):  # a factor that depends on sigma is wrong, too
            logits, density = truth(y, sigma)
            return ebmkit.Energies(logits, density + 0.3 * sigma.log())

    tsm = {
        kind: float(TrainingLoss(kind, parse_objective("tsm"))(batch).parts["tsm"])
        for kind in (Constant(), truth, Wrong())
    }
    none, least, wrong = tsm.values()
    assert none == pytest.approx(1, abs=0.03)
    assert least < none - 0.1
    assert wrong == pytest.approx(least + 0.3**2 / (2 * D), abs=0.01)
    dsm = [float(TrainingLoss(m, parse_objective("dsm"))(batch).parts["dsm"]) for m in tsm]
    assert dsm[1] == pytest.approx(dsm[2])  # which dsm does not see


def test_classification_of_levels_is_least_for_the_truth():
    """A wrong constant per level raises the cross-entropy."""
    truth, batch = mixture(), draw(mixture(), 4096)

    class Off(ebmkit.EnergyModel):
        noise_conditional = True

        def forward(self, y, sigma=None):
            logits, density = truth(y, sigma)
            return ebmkit.Energies(logits, density + 0.5 * sigma.log())

    found = []
    for model in (truth, Off()):
        loss = TrainingLoss(model, parse_objective("diffclf"))
        parts = [loss({"denoise": batch.rows(slice(i, i + 64))}) for i in range(0, 4096, 64)]
        found.append(sum(float(part.parts["diffclf"]) for part in parts) / len(parts))
    assert found[0] < found[1] - 0.01
    assert found[0] < math.log(4) - 0.1  # that of guessing


@pytest.mark.parametrize("count", [1, 2, 5, 8, 37, 64])
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_groups_partition_the_batch(count, levels):
    """Each image is in one group, of which it is the first member, so the prior is uniform."""
    sigma = torch.rand(count, generator=torch.Generator().manual_seed(count))
    groups = level_groups(sigma, levels)
    assert groups[:, 0].tolist() == list(range(count))
    sets = [frozenset(row[row >= 0].tolist()) for row in groups]
    assert all(sets[i] == sets[j] for i in range(count) for j in sets[i])
    assert max(map(len, sets)) <= levels


@pytest.mark.parametrize("name", ["tsm", "diffclf"])
def test_blind_models_and_denoisers_are_refused(name):
    pixels, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4)
    images = ImageSet(pixels, labels, ("a", "b", "c", "d"))
    for backbone, sentence in (("mlp", "blind"), ("dncnn", "density")):
        config = resolve({"backbone": backbone, "objective": f"dsm+{name}"})
        loss = TrainingLoss(build_model(config, images), parse_objective(config.objective))
        with pytest.raises(UserError, match=sentence):
            check_terms(loss, config, images)


def test_a_blind_model_has_no_time_score():
    with pytest.raises(UserError, match="blind"):
        ebmkit.create_model("mlp", in_channels=1).time_score(torch.rand(2, 1, 8, 8), 0.1)
