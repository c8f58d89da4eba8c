"""Values, gradients and errors of guides, on a mixture in closed form and a small network."""

import pytest
import torch
from ebmkit_tests.support.guidance_world import draw, numerical_gradient, plane
from torch import nn

from ebmkit import ModelCard, UserError
from ebmkit.guidance import (
    GUIDES,
    LogitModel,
    accumulated_guide,
    classifier_guide,
    dual_guide,
    energy_guide,
    make_guidance,
    pgd_guide,
)
from ebmkit.guidance.guides import Guide, GuideSettings
from ebmkit.models import DirectDenoiser
from ebmkit.noise import make_schedule

MEANS = (0.3, -0.4)


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    return LogitModel(layers.eval().requires_grad_(False), 2)


def make_guide(name, model, c, means=MEANS, **options):
    options = make_guidance(guidance=name, options=options).options
    return GUIDES[name].make(model, c, GUIDES[name].settings(**options), means)


OPTIONS = {"pgd": {"n": 3, "gamma": 0.02}, "accumulated": {"n": 3, "gamma": 0.02}}
NAMES = [name for name, entry in GUIDES.items() if entry.make is not None]


@pytest.mark.parametrize("model", [plane, network], ids=["mixture", "network"])
@pytest.mark.parametrize("name", NAMES)
def test_small_step_along_the_gradient_raises_the_value(name, model):
    """For dual on both sides of its kink: images have energies above and below the mean."""
    model = model()
    y, c = 0.5 + 0.3 * draw(40, 2), torch.arange(40) % 2
    energy = -model(y).log_density
    middle = float(energy.median())
    guide = make_guide(name, model, c, means=(middle, middle), **OPTIONS.get(name, {}))
    value, gradient = guide(y, None)
    assert value.shape == (40,)
    norm = gradient.flatten(1).norm(dim=1)
    after = guide(y + 1e-5 * gradient / norm[:, None], None)[0]
    assert (after > value).all()
    assert (energy > middle).any()
    assert (energy < middle).any()


@pytest.mark.parametrize("name", ["classifier", "energy", "dual"])
def test_gradients_match_finite_differences_of_the_values(name):
    guide = make_guide(name, plane(), 1)
    y = 0.5 + 0.3 * draw(10, 2)
    numeric = numerical_gradient(lambda v: guide(v, 0.1)[0], y)
    torch.testing.assert_close(guide(y, 0.1)[1], numeric, rtol=1e-6, atol=1e-6)


def test_values_match_their_formulas():
    model, y = plane(), 0.5 + 0.3 * draw(10, 2)
    joint, free = -model.log_joint(y, 0.1)[:, 1], -model.log_density(y, 0.1)
    torch.testing.assert_close(energy_guide(model, 1)(y, 0.1)[0], -joint)
    torch.testing.assert_close(classifier_guide(model, 1)(y, 0.1)[0], free - joint)
    dual = dual_guide(model, 1, MEANS, weight=0.4)(y, 0.1)[0]
    torch.testing.assert_close(dual, -(joint + 0.4 * (MEANS[1] - free).abs()))


def test_classifier_and_energy_guides_raise_different_values():
    """One raises log p(c|x), the other log p(x, c); each sometimes lowers the other's value."""
    model, y = plane(), 0.5 + 0.2 * draw(200, 2)

    def changes(guide):
        v = y + 1e-4 * nn.functional.normalize(guide(y, None)[1], dim=1)
        return (
            (model(v).at_label(one) - model(y).at_label(one)),
            (model(v).log_joint() - model(y).log_joint())[:, 1],
        )

    one = torch.ones(200, dtype=torch.long)
    label, joint = changes(classifier_guide(model, 1))
    assert (label > 0).all()
    assert (joint < 0).any()
    label, joint = changes(energy_guide(model, 1))
    assert (joint > 0).all()
    assert (label < 0).any()


def test_pgd_is_the_inner_guide_after_n_normalised_steps():
    inner, y = energy_guide(plane(), 1), draw(6, 2)
    for a, b in zip(pgd_guide(inner, 0)(y, 0.1), inner(y, 0.1), strict=True):
        assert torch.equal(a, b)
    v = y
    for _ in range(3):
        v = v + 0.05 * nn.functional.normalize(inner(v, 0.1)[1], dim=1)
    for a, b in zip(pgd_guide(inner, 3, 0.05)(y, 0.1), inner(v, 0.1), strict=True):
        torch.testing.assert_close(a, b)
    assert (pgd_guide(inner, 3, 0.05)(y, 0.1)[0] > inner(y, 0.1)[0]).all()


def test_accumulated_guide_is_the_sum_over_its_steps():
    inner, y = classifier_guide(plane(), 1), draw(6, 2)
    for a, b in zip(accumulated_guide(inner, 1)(y, 0.1), inner(y, 0.1), strict=True):
        assert torch.equal(a, b)
    terms = [inner(y, 0.1), pgd_guide(inner, 1, 0.05)(y, 0.1), pgd_guide(inner, 2, 0.05)(y, 0.1)]
    found = accumulated_guide(inner, 3, 0.05)(y, 0.1)
    torch.testing.assert_close(found[0], sum(v for v, _ in terms))
    torch.testing.assert_close(found[1], sum(g for _, g in terms))


def test_pgd_of_a_guide_without_gradient_is_zero():
    flat = pgd_guide(lambda v, sigma=None: (v.new_zeros(len(v)), torch.zeros_like(v)), 5)
    value, gradient = flat(torch.ones(2, 3))
    assert not value.any()
    assert not gradient.any()


def test_custom_guide_gets_mean_energies_also_as_an_inner_guide(monkeypatch):
    seen = []

    def make(model, c, settings, means):
        seen.append((settings.temperature, means))
        return energy_guide(model, c)

    class Settings(GuideSettings):
        temperature: float = 2.0

    custom = Guide("a custom guide", Settings, make, needs_means=True)
    monkeypatch.setitem(GUIDES, "custom", custom)
    assert not make_guidance(guidance="energy").needs_means
    assert not make_guidance(guidance="pgd").needs_means
    for name, options in (("custom", {}), ("pgd", {"inner": "custom"})):
        config = make_guidance(guidance=name, options=options)
        assert config.needs_means
        config.build(plane(), 1, MEANS, make_schedule())
    assert seen == [(2.0, MEANS)] * 2


def test_lambda_of_an_ascent_is_that_of_its_inner_dual_guide():
    y = draw(6, 2)
    options = {"inner": "dual", "n": 0, "lambda": 0.4}
    found, expected = make_guide("pgd", plane(), 1, **options), dual_guide(plane(), 1, MEANS, 0.4)
    for a, b in zip(found(y), expected(y), strict=True):
        assert torch.equal(a, b)


# --- errors --------------------------------------------------------------------------------------


def test_unsupported_models_labels_and_settings_are_refused():
    with pytest.raises(UserError, match="DirectDenoiser gives no energies"):
        classifier_guide(DirectDenoiser(nn.Identity(), 1), 0)
    unlabelled = plane()
    unlabelled.card = ModelCard(classifies=False)
    with pytest.raises(UserError, match="was trained without"):
        energy_guide(unlabelled, 0)
    with pytest.raises(UserError, match="label 2 is out of range"):
        energy_guide(plane(), 2)
    for means in ((0.1,), (0.1, float("nan"))):
        with pytest.raises(UserError, match="one finite number for each of 2 labels"):
            dual_guide(plane(), 0, means)
    for inner in ("pgd", "classifier-free", "energi"):
        with pytest.raises(UserError, match=f"unknown inner guide '{inner}'"):
            make_guidance(guidance="pgd", options={"inner": inner})
    with pytest.raises(UserError, match="n = -1"):
        pgd_guide(energy_guide(plane(), 0), -1)
    with pytest.raises(UserError, match="n = 0 is not a number of steps: take 1 or more"):
        accumulated_guide(energy_guide(plane(), 0), 0)


# --- networks with logits ------------------------------------------------------------------------


def test_energies_of_a_logit_model_are_those_of_its_logits():
    model = network()
    y = draw(5, 2)
    logits = model.network(y)
    torch.testing.assert_close(-model.log_joint(y), -logits)
    torch.testing.assert_close(model.energy(y), -logits.logsumexp(1))


@pytest.mark.parametrize(
    ("options", "normalise"),
    [
        ({"signed": True}, lambda x: 2 * x - 1),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}, None),
        ({"mean": 0.4}, lambda x: x - 0.4),
    ],
)
def test_images_are_normalised_for_the_network(options, normalise):
    inside = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    model = LogitModel(inside, 4, in_channels=3, **options)
    x = torch.rand(2, 3, 2, 2)
    if normalise is None:
        pairs = enumerate(zip(*options.values(), strict=True))
        expected = torch.stack([(x[:, i] - m) / s for i, (m, s) in pairs], 1)
    else:
        expected = normalise(x)
    torch.testing.assert_close(model.logits(x), inside(expected))


def test_invalid_normalisation_channels_and_logits_are_refused():
    with pytest.raises(UserError, match="give signed, or mean and std"):
        LogitModel(nn.Flatten(), 4, signed=True, mean=0.5)
    with pytest.raises(UserError, match=r"mean has 2 numbers for 3 channel"):
        LogitModel(nn.Flatten(), 4, mean=(0.5, 0.5), in_channels=3)
    with pytest.raises(UserError, match="above 0"):
        LogitModel(nn.Flatten(), 4, std=-1.0)
    with pytest.raises(UserError, match=r"3 channel\(s\), not 1"):
        LogitModel(nn.Flatten(), 4, in_channels=3).logits(torch.rand(1, 1, 2, 2))
    with pytest.raises(UserError, match=r"gives \(1, 4\) for 1 images, not logits \(1, 3\)"):
        LogitModel(nn.Flatten(), 3).logits(torch.rand(1, 1, 2, 2))
    with pytest.raises(UserError, match="give sigma"):
        LogitModel(nn.Flatten(), 4, noise_conditional=True).logits(torch.rand(1, 1, 2, 2))


def test_noise_conditional_network_receives_sigma():
    class NoiseConditional(nn.Module):
        def forward(self, y, sigma):
            return torch.stack([sigma, -sigma], 1)

    model = LogitModel(NoiseConditional(), 2, noise_conditional=True)
    y, levels = torch.rand(3, 1, 2, 2), torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(model.logits(y, levels)[:, 0], levels)
    torch.testing.assert_close(model.logits(y, 0.2)[:, 0], torch.full((3,), 0.2))
