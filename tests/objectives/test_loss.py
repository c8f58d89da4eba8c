"""Objectives: formulas, sums, balancing, shared forward passes and invalid objectives."""

import math

import pytest
import torch
from ebmkit_tests.support.small_models import gradients
from torch import Tensor

import ebmkit
from ebmkit.data import Batch
from ebmkit.energy import Energies, EnergyModel
from ebmkit.objectives import (
    OBJECTIVES,
    Objective,
    Term,
    TermSettings,
    TrainingLoss,
    parse_objective,
)
from ebmkit.objectives.loss import check_labels


def draw(count: int = 4, seed: int = 0, shape: tuple[int, ...] = (1, 8, 8)) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, *shape, generator=g, dtype=torch.float64)
    sigma = 0.05 + 0.3 * torch.rand(count, generator=g, dtype=torch.float64)
    eps = torch.randn(count, *shape, generator=g, dtype=torch.float64)
    labels = torch.arange(count) % 10
    soft = torch.nn.functional.one_hot(labels, 10).double()
    return Batch(x, x + sigma.reshape(-1, 1, 1, 1) * eps, sigma, eps, labels, soft)


@pytest.fixture
def model() -> ebmkit.JointModel:
    torch.manual_seed(0)
    return ebmkit.create_model("gradresnet18", 10, 1, width=8).double()


def test_cross_entropy_equals_torch_with_hard_and_mixed_labels(model):
    batch = draw()
    for soft in (batch.soft, 0.3 * batch.soft + 0.7 * batch.soft.roll(1, 0)):
        loss = TrainingLoss(model, parse_objective("ce"))({"classify": batch._replace(soft=soft)})
        expected = torch.nn.functional.cross_entropy(model.logits(batch.y), soft)
        assert torch.allclose(loss.total, expected, rtol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_smoothed_cross_entropy_equals_torch_with_hard_and_mixed_labels(model, share):
    batch = draw()
    settings = TermSettings(ce={"label_smoothing": share})
    own = TrainingLoss(model, parse_objective("ce", settings))
    for soft in (batch.soft, 0.3 * batch.soft + 0.7 * batch.soft.roll(1, 0)):
        loss = own({"classify": batch._replace(soft=soft)}).total
        logits = model.logits(batch.y)
        expected = torch.nn.functional.cross_entropy(logits, soft, label_smoothing=share)
        assert torch.allclose(loss, expected, rtol=1e-12)
        pairs = zip(gradients(loss, model), gradients(expected, model), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("name", ["dsm", "cdsm"])
def test_score_matching_is_the_scaled_error_of_the_denoiser(model, name):
    # sigma * score + eps = (D(y) - x) / sigma, so the loss is a mean-squared denoising error.
    batch = draw()
    c = batch.labels if name == "cdsm" else None
    with torch.no_grad():
        error = (model.denoise(batch.y, batch.sigma, c) - batch.x).square().mean((1, 2, 3))
    expected = (error / batch.sigma**2).mean()
    parts = TrainingLoss(model, parse_objective(f"{name}-mean"))({"denoise": batch}).parts
    assert torch.allclose(parts[f"{name}-mean"], expected, rtol=1e-10)


def test_sum_form_is_the_mean_form_times_the_number_of_entries(model):
    batch = {"denoise": draw()}
    mean = TrainingLoss(model, parse_objective("dsm-mean"))(batch).total
    total = TrainingLoss(model, parse_objective("dsm-sum"))(batch).total
    assert torch.allclose(total, 64 * mean, rtol=1e-12)


def test_balanced_gradient_is_that_of_the_logarithm(model):
    # The running mean in the denominator is set to the mean of this batch.
    batch = {"denoise": draw()}
    loss = TrainingLoss(model, parse_objective("dsm"), balance=3.0)
    loss.running = loss(batch).parts["dsm"].reshape(1)
    got = gradients(loss(batch).total, model)
    mean = TrainingLoss(model, parse_objective("dsm-mean"))(batch).total
    for a, b in zip(got, gradients(3.0 * mean.log(), model), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_balanced_gradient_is_linear_in_the_batch(model):
    # So the gradient does not depend on how a batch is split over devices or accumulated.
    batch = draw(4)
    loss = TrainingLoss(model, parse_objective("ce+dsm"))
    loss.running.fill_(0.3)
    whole = gradients(loss({"classify": batch, "denoise": batch}).total, model)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        half = batch.rows(part)
        halves.append(gradients(loss({"classify": half, "denoise": half}).total, model))
    for w, a, b in zip(whole, *halves, strict=True):
        assert torch.allclose(w, (a + b) / 2, rtol=1e-9, atol=1e-12)


def test_a_coefficient_switches_balancing_off(model):
    batch = {"classify": draw(seed=1), "denoise": draw(seed=2)}
    explicit = TrainingLoss(model, parse_objective("ce+0.5*dsm"))(batch).total
    ce = TrainingLoss(model, parse_objective("ce"))(batch).total
    mean = TrainingLoss(model, parse_objective("dsm-mean"))(batch).total
    assert torch.allclose(explicit, ce + 0.5 * mean, rtol=1e-12)


def test_running_mean_starts_at_the_loss_of_a_zero_score_and_converges(model):
    loss = TrainingLoss(model, parse_objective("ce+dsm+cdsm"))
    assert loss.balanced == ("dsm", "cdsm")
    assert loss.running.tolist() == [1.0, 1.0]
    for _ in range(200):
        loss.update_running(
            {"ce": torch.tensor(5.0), "dsm": torch.tensor(0.2), "cdsm": torch.tensor(0.1)}
        )
    assert loss.running.tolist() == pytest.approx([0.2, 0.1], rel=1e-6)


class Counting(EnergyModel):
    """Counts the forward passes of another model."""

    def __init__(self, inner: EnergyModel) -> None:
        super().__init__()
        self.inner, self.num_classes, self.calls = inner, inner.num_classes, 0

    def forward(self, y: Tensor, sigma: object = None) -> Energies:
        self.calls += 1
        return self.inner(y)


def test_objectives_of_one_stream_share_the_forward_pass(model):
    counting = Counting(model)
    both = TrainingLoss(counting, parse_objective("dsm+cdsm"))({"denoise": draw()})
    assert counting.calls == 1
    for name in ("dsm", "cdsm"):
        alone = TrainingLoss(model, parse_objective(name))({"denoise": draw()})
        assert torch.allclose(both.parts[name], alone.parts[name], rtol=1e-12)


def test_objectives_can_share_a_stream_by_setting(model):
    counting = Counting(model)
    loss = TrainingLoss(counting, parse_objective("ce+dsm"), streams={"ce": "denoise"})
    assert loss.streams == ("denoise",)
    shared = loss({"denoise": draw()})
    assert counting.calls == 1
    apart = TrainingLoss(model, parse_objective("ce+dsm"))({"classify": draw(), "denoise": draw()})
    assert torch.allclose(shared.total, apart.total, rtol=1e-12)


def test_exact_score_minimises_dsm_at_one_sigma():
    # E||sigma s + eps||^2 is minimal at the exact score of the noisy mixture: each of several
    # perturbations raises the loss on common draws by more than 5 standard errors.
    torch.manual_seed(0)
    mixture = ebmkit.GaussianMixture(
        torch.tensor([[0.2, 0.3], [0.8, 0.6]], dtype=torch.float64), 0.02
    )
    g = torch.Generator().manual_seed(1)
    x, _ = mixture.sample(40_000, g)
    sigma, eps = 0.15, torch.randn(40_000, 2, generator=g, dtype=torch.float64)
    y = x + sigma * eps
    score = mixture.score(y, sigma=sigma)
    exact = (sigma * score + eps).square().mean(1)
    for delta in (0.5 * torch.ones_like(y), 0.1 * score, -0.1 * score, 2 * (y - 0.5)):
        rise = (sigma * (score + delta) + eps).square().mean(1) - exact
        assert rise.mean() > 5 * rise.std() / 200


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", (Term("ce"),)),
        ("ce+dsm", (Term("ce"), Term("dsm"))),
        (" ce + 0.5 * dsm ", (Term("ce"), Term("dsm", 0.5))),
        ("2*ce+1e-3*dsm-sum", (Term("ce", 2.0), Term("dsm-sum", 1e-3))),
        ("1e+2*dsm", (Term("dsm", 100.0),)),
    ],
)
def test_objectives_parse(text, terms):
    assert parse_objective(text) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ce+dms", "did you mean 'dsm'"),
        ("", "does not parse"),
        ("ce+", "does not parse"),
        ("ce*2*dsm", "does not parse"),
        ("ce+x*dsm", "coefficient 'x'"),
        ("ce+-1*dsm", "coefficient '-1'"),
        ("ce+nan*dsm", "coefficient 'nan'"),
        ("ce+inf*dsm", "coefficient 'inf'"),
        ("dsm+dsm", "twice"),
    ],
)
def test_malformed_objectives_are_refused(text, message):
    with pytest.raises(ebmkit.UserError, match=message.replace("*", r"\*")):
        parse_objective(text)


def test_missing_or_mixed_labels_are_refused_if_the_objective_needs_them():
    with pytest.raises(ebmkit.UserError, match="needs labels"):
        check_labels("ce", OBJECTIVES["ce"], num_classes=0, mixes=False, stream="classify")
    with pytest.raises(ebmkit.UserError, match="one label per image"):
        check_labels("cdsm", OBJECTIVES["cdsm"], num_classes=10, mixes=True, stream="denoise")
    check_labels("dsm", OBJECTIVES["dsm"], num_classes=0, mixes=True, stream="denoise")


def test_objective_that_returns_no_loss_per_image_is_refused(model, monkeypatch):
    mean = Objective("", "classify", lambda *of: OBJECTIVES["ce"].loss(*of).mean())
    monkeypatch.setitem(OBJECTIVES, "mean", mean)
    loss = TrainingLoss(model, (Term("mean"),))
    with pytest.raises(ebmkit.UserError, match=r"objective 'mean' returns a loss of shape \(\)"):
        loss({"classify": draw()})


def test_summary_compares_states_in_balanced_terms(model):
    loss = TrainingLoss(model, parse_objective("ce+dsm-sum"), balance=2.0)
    assert loss.summary({"ce": 0.5, "dsm-sum": 0.1}) == pytest.approx(0.5 + 2 * math.log(0.1))
