"""Suite ``adversarial``: gradients of log p(c|y) and steps along them, against closed forms."""

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn

from ebmkit import Gaussian, UserError, evaluation
from ebmkit.evaluation.adversarial import difference
from ebmkit.evaluation.suite import noisy_batches

SIGMA = 0.05


@pytest.fixture
def evaluate(tmp_path):
    def run(model, data, plots=False, **options):
        results = evaluation.evaluate(
            model,
            data,
            ["adversarial"],
            tmp_path,
            options={"adversarial": {"sigmas": [SIGMA], "images": 30, **options}},
            plots=plots,
        )
        return results["adversarial"].document

    return run


def closed_form(mixture, y, sigma):
    """grad log p(c|y) for all c, (B, C, d); equal covariances make the classifier linear."""
    axes, variances = mixture._axes[0], mixture._variances[0] + sigma**2
    means = mixture.means.flatten(1)
    weights = means @ axes / variances @ axes.T  # (C, d)
    posterior = mixture(y, sigma).logits.softmax(1)
    return weights - (posterior @ weights)[:, None]


def test_difference_of_denoisers_equals_gradient(mixture):
    mixture.double()
    x, c = mixture.sample(6)
    y = x + SIGMA * torch.randn_like(x)
    expected = closed_form(mixture, y, SIGMA)[torch.arange(6), c]
    found = difference(mixture, y, c, SIGMA).flatten(1)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)  # axes rounded to float32
    assert torch.allclose(found, mixture.label_score(y, c, SIGMA).flatten(1), rtol=1e-9)


def test_norms_and_gains_match_closed_form(mixture, mixture_samples, evaluate):
    document = evaluate(
        mixture, mixture_samples, labels=1, lengths=[0.001, 0.3], precision="double"
    )
    assert (document["images"], document["targets"], document["precision"]) == (30, 1, "fp64")
    (level,) = document["levels"]  # a noise-conditional model is not evaluated at clean images
    assert level["identity_error"]["value"] < 1e-9
    mixture.double()
    ((_, y, *_),) = noisy_batches(mixture_samples.first(30), SIGMA, batch_size=30)
    y = y.double()
    gradients = closed_form(mixture, y, SIGMA)
    order = mixture(y, SIGMA).logits.argsort(1, descending=True)
    norms = gradients.norm(dim=2).gather(1, order)
    assert level["norm_predicted"]["value"] == pytest.approx(float(norms[:, 0].mean()), rel=1e-5)
    assert level["norm"]["value"] == pytest.approx(float(norms[:, 1].mean()), rel=1e-5)
    short, long = level["steps"]
    assert short["promised"]["value"] == pytest.approx(0.001 * level["norm"]["value"])
    # log-softmax of a linear function is concave with curvature below the squared norm
    missing = short["promised"]["value"] - short["gain"]["value"]
    assert 0 < missing < 0.5 * 0.001**2 * float(norms[:, 1].square().mean())
    direction = gradients[torch.arange(30), order[:, 1]]
    moved = y.flatten(1) + 0.3 * direction / direction.norm(dim=1, keepdim=True)
    after = mixture(moved.reshape(y.shape), SIGMA).log_posterior()
    gain = after - mixture(y, SIGMA).log_posterior()
    gain = gain.gather(1, order[:, 1:2]).mean()
    assert long["gain"]["value"] == pytest.approx(float(gain), rel=1e-5)
    reached = (after.argmax(1) == order[:, 1]).double().mean()
    assert long["reached"]["value"] == pytest.approx(float(reached))


@pytest.mark.slow
def test_blind_model_is_also_evaluated_at_clean_images(network, random_images, evaluate):
    document = evaluate(network, random_images, sigmas=["20/255", "5/255"])
    assert [level["sigma"] for level in document["levels"]] == [0, 5 / 255, 20 / 255]
    clean = document["levels"][0]
    assert clean["identity_error"] is None
    predicted = network.logits(random_images.images).argmax(1)
    norms = network.label_score(random_images.images, predicted).flatten(1).norm(dim=1)
    assert clean["norm_predicted"]["value"] == pytest.approx(float(norms.mean()), rel=1e-5)
    scores = network.score(random_images.images).flatten(1).norm(dim=1)
    assert clean["score_norm"]["value"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert document["targets"] == 2
    for level in document["levels"][1:]:
        # float32: within 5 times the rounding error of D
        assert level["identity_error"]["value"] < 5 * level["rounding"]["value"]


@pytest.mark.slow
def test_figures_are_written(network, random_images, evaluate, tmp_path):
    evaluate(network, random_images, sigmas=["20/255", "5/255"], plots=True)
    for name in ("adversarial.png", "adversarial-norms.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_number_of_targets_is_limited_by_classes(network, random_images, evaluate):
    assert evaluate(network, random_images, labels=6)["targets"] == 2  # of three classes


def test_missing_labels_and_single_class_are_refused(network, random_images, evaluate):
    with pytest.raises(UserError, match="no labels to compare"):
        evaluate(network, Drawn(random_images.images, None))
    one = Gaussian(torch.full((1, 8, 8), 0.5), 0.01).eval()
    only = Drawn(random_images.images, torch.zeros(30, dtype=torch.long), class_names=("only",))
    with pytest.raises(UserError, match="one class has no adversarial gradients"):
        evaluate(one, only)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"labels": 0}, "labels"), ({"lengths": [-1]}, "lengths"), ({"sigmas": [0]}, "above 0")],
)
def test_illegal_settings_are_refused(options, words, network, random_images, evaluate):
    with pytest.raises(UserError, match=words):
        evaluate(network, random_images, **options)
