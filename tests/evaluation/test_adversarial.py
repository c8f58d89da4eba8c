"""Suite ``adversarial``: gradients in closed form, and what steps along them do."""

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
    """grad log p(c|y) for all c, (B, C, d): a linear classifier's, as covariances are equal."""
    axes, variances = mixture._axes[0], mixture._variances[0] + sigma**2
    means = mixture.means.flatten(1)
    weights = means @ axes / variances @ axes.T  # (C, d)
    posterior = mixture(y, sigma).logits.softmax(1)
    return weights - (posterior @ weights)[:, None]


def test_the_difference_of_denoisers_is_the_gradient(mixture):
    mixture.double()
    x, c = mixture.sample(6)
    y = x + SIGMA * torch.randn_like(x)
    expected = closed_form(mixture, y, SIGMA)[torch.arange(6), c]
    found = difference(mixture, y, c, SIGMA).flatten(1)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)  # axes rounded to float32
    assert torch.allclose(found, mixture.label_score(y, c, SIGMA).flatten(1), rtol=1e-9)


def test_norms_and_gains_are_those_of_the_closed_form(mixture, drawn, evaluate):
    document = evaluate(mixture, drawn, labels=1, lengths=[0.001, 0.3], precision="double")
    assert (document["images"], document["targets"], document["precision"]) == (30, 1, "fp64")
    (level,) = document["levels"]  # a noise-conditional model is not asked at the clean image
    assert level["identity_error"]["value"] < 1e-9
    mixture.double()
    ((_, y, *_),) = noisy_batches(drawn.first(30), SIGMA, batch_size=30)
    y = y.double()
    gradients = closed_form(mixture, y, SIGMA)
    order = mixture(y, SIGMA).logits.argsort(1, descending=True)
    norms = gradients.norm(dim=2).gather(1, order)
    assert level["norm_predicted"]["value"] == pytest.approx(float(norms[:, 0].mean()), rel=1e-5)
    assert level["norm"]["value"] == pytest.approx(float(norms[:, 1].mean()), rel=1e-5)
    short, long = level["steps"]
    assert short["promised"]["value"] == pytest.approx(0.001 * level["norm"]["value"])
    # log-softmax of a linear function is concave, and its curvature below the norm squared
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
def test_a_blind_model_is_also_asked_at_the_clean_image(network, squares, evaluate):
    document = evaluate(network, squares, sigmas=["20/255", "5/255"])
    assert [level["sigma"] for level in document["levels"]] == [0, 5 / 255, 20 / 255]
    clean = document["levels"][0]
    assert clean["identity_error"] is None
    predicted = network.logits(squares.images).argmax(1)
    norms = network.label_score(squares.images, predicted).flatten(1).norm(dim=1)
    assert clean["norm_predicted"]["value"] == pytest.approx(float(norms.mean()), rel=1e-5)
    scores = network.score(squares.images).flatten(1).norm(dim=1)
    assert clean["score_norm"]["value"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert document["targets"] == 2
    for level in document["levels"][1:]:
        # float32: at most some times what rounding D alone may do
        assert level["identity_error"]["value"] < 5 * level["rounding"]["value"]


@pytest.mark.slow
def test_figures(network, squares, evaluate, tmp_path):
    evaluate(network, squares, sigmas=["20/255", "5/255"], plots=True)
    for name in ("adversarial.png", "adversarial-norms.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_targets_are_as_many_as_there_are(network, squares, evaluate):
    assert evaluate(network, squares, labels=6)["targets"] == 2  # of three classes


def test_what_has_no_labels_is_refused(network, squares, evaluate):
    with pytest.raises(UserError, match="no labels to compare"):
        evaluate(network, Drawn(squares.images, None))
    one = Gaussian(torch.full((1, 8, 8), 0.5), 0.01).eval()
    only = Drawn(squares.images, torch.zeros(30, dtype=torch.long), class_names=("only",))
    with pytest.raises(UserError, match="one class has no adversarial gradients"):
        evaluate(one, only)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"labels": 0}, "labels"), ({"lengths": [-1]}, "lengths"), ({"sigmas": [0]}, "above 0")],
)
def test_illegal_settings_are_refused(options, words, network, squares, evaluate):
    with pytest.raises(UserError, match=words):
        evaluate(network, squares, **options)
