"""Guided models: samplers, densities, views, classifier-free guidance, mean energies, errors."""

import pytest
import torch
from ebmkit_tests.support.blind import BlindMixture as Blind
from ebmkit_tests.support.guidance_world import (
    SHAPE,
    draw,
    generator,
    image_mixture,
    numerical_gradient,
    run,
)
from torch import nn

from ebmkit import GaussianMixture, ModelCard, ScoreModel, UserError
from ebmkit.energy import DensityModel, EnergyModel
from ebmkit.guidance import (
    GUIDES,
    LogitModel,
    class_energies,
    guided_model,
    make_guidance,
    stored_energies,
)
from ebmkit.models import DirectDenoiser
from ebmkit.noise import make_schedule
from ebmkit.sampling.base import density_of, label_density_of
from ebmkit.sampling.entry import SAMPLERS, missing

EXACT = make_guidance(guidance="classifier")


def guided(base=GaussianMixture, **settings):
    model = image_mixture(base)
    return guided_model(model, model, make_guidance(**({"guidance": "classifier"} | settings)))


class ConditionalScore(ScoreModel):
    """The mixture as a label-conditional score model without density."""

    noise_conditional = True
    is_energy_based = False

    def __init__(self):
        super().__init__()
        self.inside, self.schedule = image_mixture(dtype=torch.float64), make_schedule("cosine")
        self.num_classes = 2

    def _score(self, y, sigma, c):
        return self.inside.score(y, sigma, c)

    def denoise(self, y, sigma=None, c=None):
        return self.inside.denoise(y, sigma, c)


# --- the contract --------------------------------------------------------------------------------

KS = "kadkhodaie_simoncelli"


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_supports_the_guided_model(name):
    """Guided by the exact posterior at scale 1, chains are those of the label-conditional base."""
    entry = SAMPLERS[name]
    base = image_mixture(Blind if "blind" in entry.needs else GaussianMixture)
    model = guided_model(base, base, EXACT)
    labels, config = torch.tensor([0, 1, 1, 0]), entry.config(steps=10)
    ends = []
    for target in (model, base):
        sampler = entry.build(target, labels, config)
        start = entry.start(target, sampler, config, (4, *SHAPE), generator(), labels)
        x = run(sampler, start, steps=10)
        ends.append(entry.finish(target, sampler, x, labels))
    assert ends[0].isfinite().all()
    if name != KS:  # the base estimates another sigma with a label than without
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("settings", [{"scale": 0.0}, {}])
def test_scale_0_or_no_label_is_bit_identical_to_the_base(name, settings):
    entry = SAMPLERS[name]
    if "labels" in entry.needs:
        pytest.skip("the sampler requires a label")
    base = image_mixture(Blind if "blind" in entry.needs else GaussianMixture)
    model, config = guided_model(base, base, make_guidance(**settings)), entry.config(steps=10)
    labels = torch.tensor([0, 1, 1]) if settings else None
    ends = []
    for target, c in ((model, labels), (base, None)):
        sampler = entry.build(target, c, config)
        start = entry.start(target, sampler, config, (3, *SHAPE), generator())
        ends.append(run(sampler, start, steps=10))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "name",
    [
        "ddim",
        pytest.param("pc", marks=pytest.mark.slow),
        pytest.param("annealed-langevin", marks=pytest.mark.slow),
        KS,
    ],
)
def test_guided_samples_have_the_requested_label(name):
    entry = SAMPLERS[name]
    base = image_mixture(Blind if "blind" in entry.needs else GaussianMixture)
    steps = {
        KS: {"beta": 0.2, "first_step": 0.1},
        "annealed-langevin": {"steps": 60},
    }
    config = entry.config(**steps.get(name, {"steps": 60}))
    # KS estimates sigma from the guided residual, which the energy guide would double
    for guidance_name in ("classifier",) if name == KS else ("classifier", "energy", "dual"):
        model = guided_model(
            base,
            image_mixture(),
            make_guidance(guidance=guidance_name, view="noisy", scale=2.0),
            (-15.0, -15.0),
        )
        labels = torch.arange(20) % 2
        sampler = entry.build(model, labels, config)
        start = entry.start(model, sampler, config, (20, *SHAPE), generator(), labels)
        x = entry.finish(
            model, sampler, run(sampler, start, steps=entry.length(sampler, config)), labels
        )
        assert torch.equal(image_mixture().logits(x).argmax(1), labels), guidance_name


def test_all_guides_are_known_here_and_have_descriptions():
    assert {"classifier", "energy", "dual", "pgd", "accumulated", "classifier-free"} == set(GUIDES)
    for entry in GUIDES.values():
        assert entry.description
        assert all(f.description for f in entry.settings.model_fields.values())


# --- density -------------------------------------------------------------------------------------


def test_guided_log_density_is_that_of_the_base_plus_the_guide():
    model = guided(scale=3.0)
    y, c = torch.rand(5, *SHAPE), torch.tensor([0, 1, 0, 1, 1])
    value, gradient = density_of(model, c)(y, 0.2)
    base = model.base
    at_label, push = label_density_of(base, c)(y, 0.2)
    torch.testing.assert_close(value, base.log_density(y, 0.2) + 3 * at_label)
    torch.testing.assert_close(gradient, base.score(y, 0.2) + 3 * push)
    torch.testing.assert_close(model.score(y, 0.2, c), gradient)
    torch.testing.assert_close(model.log_density(y, 0.2, c), value)
    label, label_score = label_density_of(model, c)(y, 0.2)
    torch.testing.assert_close(label, value - base.log_density(y, 0.2))
    torch.testing.assert_close(label_score, gradient - base.score(y, 0.2))


@pytest.mark.parametrize(("name", "view"), [("energy", "noisy"), ("dual", "x_t")])
def test_guided_score_is_the_gradient_of_the_guided_log_density(name, view):
    base = image_mixture(dtype=torch.float64)
    guide = image_mixture(Blind if view == "x_t" else GaussianMixture, torch.float64)
    config = make_guidance(guidance=name, scale=3.0, view=view, schedule="power:k=2")
    model = guided_model(base, guide, config, (-15.0, -15.0))
    y, c = torch.rand(3, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 1])
    expected = numerical_gradient(lambda y: model.log_density(y, 0.2, c), y)
    for found in (model.score(y, 0.2, c), density_of(model, c)(y, 0.2)[1]):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_guided_energy_model_is_no_energy_model_and_can_be_guided_again():
    """Its energies would be those of base and guide, not of the guided density."""
    model = guided(scale=3.0)
    assert not isinstance(model, EnergyModel)
    y, c = torch.rand(3, *SHAPE), torch.tensor([0, 1, 1])
    twice = density_of(guided_model(model, model.guide, EXACT), c)(y, 0.2)
    # the second guidance is of the guided model without its label
    for a, b in zip(twice, density_of(guided(), c)(y, 0.2), strict=True):
        torch.testing.assert_close(a, b)


def test_density_calls_the_guide_once():
    model = guided()
    calls = []
    original = model.guide.forward
    base = image_mixture()
    model.base = base
    model.guide.forward = lambda *a: calls.append(1) or original(*a)
    density_of(model, 1)(torch.rand(2, *SHAPE), 0.2)
    assert len(calls) == 1


def test_no_density_with_view_x0_hat_or_base_without_density():
    assert isinstance(guided(), DensityModel)
    assert not isinstance(guided(view="x0_hat"), DensityModel)
    plain = guided_model(DirectDenoiser(nn.Identity(), 1, True), image_mixture(), EXACT)
    assert not isinstance(plain, DensityModel)
    assert missing(plain, ("labels",)) is None
    with pytest.raises(UserError, match=r"mala does not support .* has no log-density"):
        SAMPLERS["mala"].build(plain, 1)


# --- views ---------------------------------------------------------------------------------------


def test_default_view_depends_on_the_guide():
    blind = LogitModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 2)
    assert guided_model(image_mixture(), blind, EXACT).view == "x_t"
    assert guided().view == "noisy"
    with pytest.raises(UserError, match="use the view noisy"):
        guided(view="x_t")
    with pytest.raises(UserError, match="needs the view x0_hat"):
        make_guidance(backpropagate=True)
    with pytest.raises(UserError, match="leave the view out"):
        make_guidance(guidance="classifier-free", view="x0_hat")


@pytest.mark.parametrize("backpropagate", [False, True])
def test_view_x0_hat_gives_the_guide_the_denoised_image(backpropagate):
    seen = []

    class RecordingModel(LogitModel):
        def forward(self, y, sigma=None):
            seen.append(y.detach())
            return super().forward(y, sigma)

    torch.manual_seed(0)
    guide = RecordingModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 2).requires_grad_(False)
    base = image_mixture()
    model = guided_model(base, guide, make_guidance(view="x0_hat", backpropagate=backpropagate))
    y = torch.rand(3, *SHAPE)
    with torch.no_grad():
        found = model.denoise(y, 0.3, 1)
    torch.testing.assert_close(seen[-1], base.denoise(y, 0.3))
    assert not found.requires_grad
    assert (found - base.denoise(y, 0.3)).abs().max() > 1e-4


# --- classifier-free -----------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_extrapolates_score_and_denoiser(w):
    base = ConditionalScore()
    model = guided_model(base, None, make_guidance(guidance="classifier-free", scale=w))
    assert model.schedule is base.schedule
    assert missing(model, ("labels",)) is None
    y, c = draw(4, *SHAPE), torch.tensor([0, 1, 1, 0])
    u, own = base.score(y, 0.4), base.score(y, 0.4, c)
    torch.testing.assert_close(model.score(y, 0.4, c), u + w * (own - u))
    u, own = base.denoise(y, 0.4), base.denoise(y, 0.4, c)
    torch.testing.assert_close(model.denoise(y, 0.4, c), u + w * (own - u))
    if w in (0, 1):
        assert torch.equal(model.denoise(y, 0.4, c), own if w else u)


def test_classifier_free_guidance_starts_at_the_noise_level_of_each_image():
    base = ConditionalScore()
    config = make_guidance(guidance="classifier-free", scale=2.0, start=0.5)
    model = guided_model(base, None, config)
    y, levels = draw(2, *SHAPE), torch.tensor([base.schedule.sigma(t) for t in (400, 600)])
    found, c = model.denoise(y, levels, 1), torch.tensor([1, 1])
    u, own = base.denoise(y, levels), base.denoise(y, levels, c)
    torch.testing.assert_close(found[0], (u + 2 * (own - u))[0])
    torch.testing.assert_close(found[1], u[1])


def test_classifier_free_guidance_of_a_density_is_guidance_by_its_classifier():
    base = image_mixture()
    model = guided_model(base, None, make_guidance(guidance="classifier-free", scale=2.0))
    y, c = torch.rand(3, *SHAPE), torch.tensor([0, 1, 1])
    value, gradient = density_of(model, c)(y, 0.3)
    at_label, push = label_density_of(base, c)(y, 0.3)
    torch.testing.assert_close(value, base.log_density(y, 0.3) + 2 * at_label)
    torch.testing.assert_close(gradient, base.score(y, 0.3) + 2 * push)
    torch.testing.assert_close(model.score(y, 0.3, c), gradient)


# --- errors --------------------------------------------------------------------------------------


def with_card(**facts):
    model = image_mixture()
    named = {"image_size": (4, 4), "channels": 1, "class_names": ["dark", "bright"]}
    model.card = ModelCard(classifies=True, **(named | facts))
    return model


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"image_size": (8, 8)}, "images of size 4x4 and the guide 8x8"),
        ({"channels": 3}, "channels 1 and the guide 3"),
    ],
)
def test_different_sizes_or_channels_of_base_and_guide_are_refused(facts, message):
    with pytest.raises(UserError, match=message):
        guided_model(with_card(), with_card(**facts), EXACT)


def test_incompatible_guides_unknown_labels_and_settings_are_refused():
    three = LogitModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3)
    with pytest.raises(UserError, match="labels 2 and the guide 3"):
        guided_model(with_card(), three, EXACT)
    with pytest.raises(UserError, match=r"channels 1 and the guide 3"):
        guided_model(with_card(), LogitModel(nn.Flatten(), 2, in_channels=3), EXACT)
    model = guided_model(with_card(), with_card(), EXACT)
    with pytest.raises(UserError, match=r"label 2 is out of range.* or dark, bright"):
        model.score(torch.rand(1, *SHAPE), 0.1, 2)
    with pytest.raises(UserError, match="needs a guide"):
        guided_model(with_card(), None, EXACT)
    with pytest.raises(UserError, match="takes no guide"):
        guided_model(with_card(), with_card(), make_guidance(guidance="classifier-free"))
    unlabelled = DirectDenoiser(nn.Identity(), 1)
    with pytest.raises(UserError, match="trained with labels, and this one was not"):
        guided_model(unlabelled, None, make_guidance(guidance="classifier-free"))
    with pytest.raises(UserError, match="did you mean 'energy'"):
        make_guidance(guidance="enrgy")
    with pytest.raises(UserError, match=r"no field 'lambada'.*fields here: lambda"):
        make_guidance(guidance="dual", options={"lambada": 1})
    with pytest.raises(UserError, match="write exact or constant or step:at"):
        make_guidance(schedule="cubic")


def test_guided_model_has_the_card_of_the_base_and_labels_of_the_guide():
    base, guide = with_card(sigma_range=(0.01, 2.0)), with_card(class_names=["black", "white"])
    model = guided_model(base, guide, EXACT)
    assert model.card.sigma_range == (0.01, 2.0)
    assert model.card.class_names == ["black", "white"]
    assert model.card.classifies
    assert base.card.class_names == ["dark", "bright"]
    assert model.noise_conditional


def test_guidance_settings_are_resolved_and_round_trip():
    config = make_guidance(guidance="pgd", options={"n": 20}, schedule="power")
    again = make_guidance(**config.model_dump(mode="json"))
    assert again == config
    assert config.schedule == "power:k=0.5"
    assert config.options == {"lambda": 0.15, "n": 20, "gamma": 0.005, "inner": "energy"}


def test_guidance_settings_with_earlier_names_are_read():
    saved = {"view": "clean", "through": True, "late": 0.2}
    assert make_guidance(**saved) == make_guidance(view="x0_hat", backpropagate=True, start=0.2)
    assert make_guidance(view="shrunk").view == "x_t"


class Images:
    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def batches(self, size):
        for at in range(0, len(self), size):
            part = slice(at, at + size)
            yield self.x[part], None if self.labels is None else self.labels[part]


def test_mean_energies_match_the_images_of_each_label():
    model = image_mixture(dtype=torch.float64)
    x, labels = model.sample(100, generator())
    progress = []
    found = class_energies(model, Images(x, labels), lambda *p: progress.append(p), batch_size=40)
    for c in range(2):
        own = x[labels == c]
        assert found.energy[c] == pytest.approx(float(-model(own).log_density.mean()))
        assert found.joint[c] == pytest.approx(float(-model(own).log_joint()[:, c].mean()))
        spread = float(model(own).log_density.std(correction=0))
        assert found.energy_std[c] == pytest.approx(spread, rel=1e-6)
    assert sum(found.images) == 100
    assert progress == [(40, 100), (80, 100), (100, 100)]


def test_mean_energy_of_a_gaussian_is_its_entropy():
    """d/2 log(2 pi e v), within 4 standard errors; the variance of the energy is d/2."""
    model = GaussianMixture(torch.zeros(1, 1, 4, 4, dtype=torch.float64), 0.01)
    x, labels = model.sample(2000, generator())
    found = class_energies(model, Images(x, labels))
    theory = 8 * float(torch.log(torch.tensor(2 * torch.pi * torch.e * 0.01)))
    assert abs(found.energy[0] - theory) < 4 * (8 / 2000) ** 0.5


def test_stored_energies_are_recomputed_for_other_weights_data_or_damage(tmp_path):
    model = image_mixture(dtype=torch.float64)
    images = Images(*model.sample(20, generator()))
    calls = []

    def compute():
        calls.append(1)
        return class_energies(model, images)

    def stored(data="abc", digest="1"):
        return stored_energies(tmp_path, "digits", data, digest, compute)

    first = stored()
    assert stored().energy == first.energy
    assert len(calls) == 1
    stored(data="xyz")
    stored()
    assert len(calls) == 2
    stored(digest="2")
    stored(digest="2")
    assert len(calls) == 3
    path = tmp_path / "energies" / "digits-abc.json"
    path.write_text(path.read_text()[:50])
    stored(digest="2")
    assert len(calls) == 4


def test_data_without_required_labels_is_refused():
    model = image_mixture()
    x, labels = model.sample(20, generator())
    with pytest.raises(UserError, match="need images with labels"):
        class_energies(model, Images(x, None))
    with pytest.raises(UserError, match=r"labels \[1\] have no image"):
        class_energies(model, Images(x, torch.zeros_like(labels)))
    with pytest.raises(UserError, match="out of range"):
        class_energies(model, Images(x, labels + 5))
    with pytest.raises(UserError, match="give means"):
        guided_model(model, model, make_guidance(guidance="dual"))
