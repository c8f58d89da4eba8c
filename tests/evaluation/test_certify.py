"""Suite ``certify``: exact certificates, a known mixture and a small network."""

import json
import math

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from ebmkit_tests.support.two_processes import run_shared
from rich.console import Console
from scipy.stats import binom, binomtest, norm

from ebmkit import GaussianMixture, UserError
from ebmkit.evaluation import EvaluationContext, evaluate, tables
from ebmkit.evaluation.certify import (
    ABSTAIN,
    CERTIFY,
    Certificates,
    CertifyConfig,
    certificates,
    draw_votes,
    largest_radius,
    lower_bound,
    vote_generator,
)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.05), (37, 0.001), (1000, 0.001)])
def test_lower_bound_is_clopper_pearson(count, alpha):
    hits = torch.arange(0, count + 1, max(1, count // 20))
    expected = [
        binomtest(k, count, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        for k in hits.tolist()
    ]
    found = lower_bound(hits, count, alpha)
    assert found.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-12)
    # definition: P(at least this many hits) = alpha if p equals the bound
    some = hits > 0
    chance = binom.sf(hits[some].numpy() - 1, count, found[some].numpy())
    assert chance == pytest.approx(alpha, rel=1e-6)


def margins_and_votes(images, votes, sigma, generator):
    """Distances to the boundary of a linear classifier, and its labels of noisy copies."""
    margin = 3 * sigma * torch.randn(images, generator=generator, dtype=torch.float64)
    noise = sigma * torch.randn(images, votes, generator=generator, dtype=torch.float64)
    return margin, (margin[:, None] + noise > 0).long()


@pytest.mark.parametrize("alpha", [0.2, 0.02])
def test_certificates_are_wrong_with_probability_alpha_at_most(alpha):
    """At distance m from a linear boundary, P = Phi(m / sigma) and the exact radius is m."""
    images, sigma = 4000, 0.3
    margin, votes = margins_and_votes(images, 250, sigma, torch.Generator().manual_seed(0))
    found = certificates(votes, 50, sigma, alpha)
    right = found.labels == (margin > 0)
    wrong = (found.labels != ABSTAIN) & (~right | (found.radius > margin.abs()))
    assert int(wrong.sum()) <= binom.ppf(1 - 1e-6, images, alpha)
    # the bound is tight: only the discreteness of hits lowers the rate below alpha. Images far from
    # the boundary are excluded, since all their votes agree
    moving = (margin.abs() < 2 * sigma) & (found.labels != ABSTAIN)
    assert int(wrong[moving].sum()) > 0.6 * alpha * int(moving.sum())


def test_radii_approach_exact_radius_from_below():
    sigma, margin = 0.25, torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    shortfall = []
    for count in (300, 3000, 100_000):
        noise = sigma * torch.randn(3, count + 100, generator=generator, dtype=torch.float64)
        found = certificates((margin[:, None] + noise > 0).long(), 100, sigma, 0.001)
        shortfall.append(margin - found.radius)
        assert (found.radius < margin).all()
    assert (shortfall[2] < shortfall[1]).all()
    assert (shortfall[1] < shortfall[0]).all()
    # the bound is z = 3.09 standard errors of p low, which sigma / phi(m / sigma) converts to a
    # radius; the factor 2 allows as much for the sampling error of the votes
    p, density = norm.cdf(margin / sigma), norm.pdf(margin / sigma)
    error = torch.from_numpy(sigma * (p * (1 - p) / 100_000) ** 0.5 / density)
    assert (shortfall[2] < 2 * 3.1 * error).all()


def test_linear_classifier_of_images_is_certified_up_to_its_boundary():
    """From an image of 75 pixels, all noisy, to its radius."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(3, 5, 5, generator=generator)
    x, sigma = torch.rand(3, 5, 5, generator=generator), 0.2
    b = 0.2 * float(w.norm()) - float((w * x).sum())  # so that x is at distance 0.2 = sigma

    def classify(y):
        return {"linear": ((w * y).sum((1, 2, 3)) + b > 0).long()}

    votes = draw_votes(classify, x, sigma, 4100, vote_generator(0, 7))["linear"]
    share = float(votes.double().mean())
    p = norm.cdf(1)
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 4100))
    found = certificates(votes[None], 100, sigma, 0.001)
    assert found.labels.tolist() == [1]
    assert 0.17 < float(found.radius) < 0.2  # 3.1 +- 3 standard errors less


def test_unanimous_votes_give_largest_radius():
    votes = torch.full((1, 60), 4)
    found = certificates(votes, 10, 0.5, 0.001)
    assert float(found.radius) == pytest.approx(largest_radius(0.5, 50, 0.001))
    assert found.labels.tolist() == [4]
    assert largest_radius(0.5, 9, 0.001) == 0  # even 9 of 9 leave the bound below 1/2
    assert largest_radius(0.5, 10, 0.001) > 0


def test_no_certificate_without_a_majority():
    even = torch.arange(100) % 2
    few = torch.cat([torch.full((10,), 2), torch.full((90,), 1)])  # selection votes 2, then only 1
    found = certificates(torch.stack([even, few]), 10, 0.5, 0.001)
    assert found.labels.tolist() == [ABSTAIN, ABSTAIN]
    assert found.radius.tolist() == [0, 0]
    assert found.top.tolist() == [0, 1]  # ties: the smaller label
    assert found.lower[1] == 0


def test_selection_votes_are_not_used_for_the_bound():
    """The bound uses only votes drawn after the label was selected."""
    votes = torch.cat([torch.ones(50), torch.zeros(40), torch.ones(60)]).long()[None]
    found = certificates(votes, 50, 1.0, 0.01)
    assert float(found.lower) == pytest.approx(float(lower_bound(torch.tensor([60]), 100, 0.01)))


def test_wrong_labels_and_abstentions_are_not_certified_correct():
    found = Certificates(
        torch.tensor([1, 2, ABSTAIN]), torch.tensor([0.3, 0.2, 0.0]), torch.zeros(3), torch.zeros(3)
    )
    right = found.right_radius(torch.tensor([1, 1, 1]))
    assert (right >= 0).tolist() == [True, False, False]
    assert (right >= 0.3).tolist() == [True, False, False]
    assert (right >= 0.31).tolist() == [False, False, False]


def test_all_classifiers_vote_on_the_same_noise_at_any_batch_size():
    x = torch.rand(1, 3, 5)  # 15 values: torch draws normal numbers in blocks of 16

    def classify(y):
        assert len(y) <= size
        seen = (1e6 * y.double().sum((1, 2, 3))).long()
        return {"one": seen, "other": seen.clone()}

    found = []
    for size in (1, 7, 16, 1000):
        votes = draw_votes(classify, x, 0.2, 110, vote_generator(3, 5), size)
        assert torch.equal(votes["one"], votes["other"])
        found.append(votes["one"])
    assert len(found[0].unique()) > 100
    assert all(torch.equal(found[0], other) for other in found[1:])
    other = draw_votes(classify, x, 0.2, 110, vote_generator(3, 6), size)["one"]
    assert not torch.equal(found[0], other)


def test_progress_counts_every_vote_once():
    advanced = []
    votes = draw_votes(
        lambda y: {"zero": torch.zeros(len(y), dtype=torch.long)},
        torch.rand(1, 4, 4), 0.1, 105, vote_generator(0, 0), 25, advanced.append,
    )  # fmt: skip
    assert len(votes["zero"]) == sum(advanced) == 105


FEW = {"samples": 30, "selection": 10, "images": 6, "sigmas": [0.1, 0.3]}


def run_suite(context, **options):
    context.options = {CertifyConfig: CertifyConfig(**{**FEW, **options})}
    with torch.no_grad():
        return CERTIFY.run(context)


@pytest.fixture
def two_gaussians():
    """Two equally likely round Gaussians: the boundary is the plane between them at any sigma."""
    means = torch.full((2, 1, 4, 4), 0.5)
    means[0] -= 0.06
    means[1] += 0.06
    model = GaussianMixture(means, 0.05**2).eval()
    x, c = model.sample(40, torch.Generator().manual_seed(0))
    return model, Drawn(x, c, class_names=("dark", "bright"))


def test_radii_of_a_mixture_are_below_distance_to_boundary(two_gaussians):
    model, images = two_gaussians
    options = {"samples": 1000, "selection": 50, "images": 20, "sigmas": [0.1]}
    found = run_suite(EvaluationContext(model, images.first(20), batch_size=1050), **options)
    x = images.images[:20].flatten(1)
    margin = (x.mean(1) - 0.5) * 4  # along (1, .., 1) / 4
    (level,) = found["levels"]
    direct = level["classifiers"]["direct"]
    pairs = zip(direct["predicted"], direct["radius"], margin.tolist(), strict=True)
    for predicted, radius, m in pairs:
        p = norm.cdf(abs(m) / 0.1)
        unlucky = torch.tensor([max(0, int(binom.ppf(1e-6, 1000, p)))])
        least = 0.1 * norm.ppf(float(lower_bound(unlucky, 1000, 0.001)))
        if predicted is None:  # too near for 1000 votes
            assert least <= 0
            continue
        assert predicted == (m > 0)
        assert max(0, least) <= radius < abs(m)
    right = (margin > 0).long() == images.labels[:20]
    assert found["unsmoothed_accuracy"]["value"] == pytest.approx(float(right.double().mean()))


def test_both_classifiers_use_the_same_noise(two_gaussians):
    """E[x|y] lies on the same side of the boundary as y, so both classifiers vote identically."""
    found = run_suite(EvaluationContext(*two_gaussians, batch_size=310), images=20, samples=300)
    for level in found["levels"]:
        assert level["classifiers"]["direct"] == level["classifiers"]["denoised"]
        assert level["difference"]["value"] == 0
    radii = [level["classifiers"]["direct"]["radius"] for level in found["levels"]]
    assert len({*radii[0], *radii[1]}) > 20


def test_denoised_classifier_is_denoising_before_classification(two_gaussians, monkeypatch):
    """``direct`` classifies the noisy images and ``denoised`` their denoised versions."""
    model, images = two_gaussians
    calls = []
    forward = GaussianMixture.forward

    def recording_forward(self, y, sigma=None):
        calls.append((torch.as_tensor(y.std()), sigma))
        return forward(self, y, sigma)

    monkeypatch.setattr(GaussianMixture, "forward", recording_forward)
    run_suite(EvaluationContext(model, images, batch_size=500), images=1, sigmas=[0.3])
    (_, zero), (noisy, sigma), (denoised, after) = calls
    assert (zero, sigma, after) == (0.0, 0.3, 0.0)
    assert noisy > 0.28
    assert denoised < 0.1
    calls.clear()
    run_suite(EvaluationContext(model, images, batch_size=500), images=1, classifiers=["direct"])
    assert [sigma for _, sigma in calls] == [0.0, 0.1, 0.3]


def test_summaries_follow_from_results_of_images(network, random_images):
    found = run_suite(EvaluationContext(network, random_images))
    truth = found["labels"]
    assert found["numbers"] == list(range(0, 30, 5))
    assert truth == random_images.labels[::5].tolist()
    for level in found["levels"]:
        for one in level["classifiers"].values():
            right = [
                r if p == c else -1
                for p, r, c in zip(one["predicted"], one["radius"], truth, strict=True)
            ]
            for entry in one["certified"]:
                share = sum(r >= entry["radius"] for r in right) / 6
                assert entry["value"] == pytest.approx(share)
            average = sum(max(0, r) for r in right) / 6
            assert one["average_radius"]["value"] == pytest.approx(average)
            assert one["abstained"]["value"] == pytest.approx(one["predicted"].count(None) / 6)
            assert max(one["radius"]) <= level["largest_radius"] * (1 + 1e-9)


def test_results_do_not_depend_on_batch_size_and_processes(network, random_images):
    context = EvaluationContext(network, random_images)
    whole = run_suite(context, images=5, sigmas=[0.3])
    assert (
        run_suite(EvaluationContext(network, random_images, batch_size=9), images=5, sigmas=[0.3])
        == whole
    )
    assert run_shared(CERTIFY.run, context) == [whole, whole]
    alone = EvaluationContext(network, random_images.first(1))  # fewer images than processes
    expected = run_suite(alone, sigmas=[0.3])
    assert run_shared(CERTIFY.run, alone) == [expected, expected]


def test_limit_does_not_change_noise_of_remaining_images(two_gaussians, monkeypatch):
    model, images = two_gaussians
    keys = []
    monkeypatch.setattr(
        "ebmkit.evaluation.certify.vote_generator",
        lambda seed, number: keys.append((seed, number)) or vote_generator(seed, number),
    )

    def by_number(images):
        found = run_suite(EvaluationContext(model, images, seed=4), sigmas=[0.3], images=8)
        assert keys == [(4, number) for number in found["numbers"]]
        keys.clear()
        (level,) = found["levels"]
        one = level["classifiers"]["direct"]
        pairs = zip(one["predicted"], one["radius"], strict=True)
        return dict(zip(found["numbers"], pairs, strict=True))

    whole, limited = by_number(images), by_number(images.first(24))
    assert (list(whole), list(limited)) == (list(range(0, 40, 5)), list(range(0, 24, 3)))
    both = whole.keys() & limited.keys()
    assert both == {0, 15}
    assert all(whole[n] == limited[n] for n in both)
    assert len(set(whole.values())) > 3


def test_progress_counts_noisy_images(network, random_images):
    advanced = []
    context = EvaluationContext(network, random_images, advance=advanced.append)
    options = CertifyConfig(**{**FEW, "samples": 31})
    context.options = {CertifyConfig: options}
    context.left = CERTIFY.passes(context) * len(random_images)
    with torch.no_grad():
        CERTIFY.run(context)
    assert sum(advanced) == CERTIFY.passes(context) * 30 == 17 * 30  # for 2 x 6 x 41 votes
    assert context.left == 0


@pytest.mark.slow
def test_json_figure_and_table_are_written(network, random_images, tmp_path):
    results = evaluate(
        network,
        random_images,
        ["certify"],
        tmp_path,
        options={"certify": {**FEW, "radii": [0, 0.05]}},
    )
    document = json.loads((tmp_path / "certify.json").read_text())
    assert document["options"]["samples"] == 30
    assert document["options"]["alpha"] == 0.001
    assert [level["sigma"] for level in document["levels"]] == [0.1, 0.3]
    assert (tmp_path / "certified-accuracy.png").stat().st_size > 10_000
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*tables(results))
    console.file.close()
    text = console.export_text()
    assert "denoised" in text
    assert "at 0.05" in text
    assert "…" not in text


def test_sigma_outside_trained_range_gives_warning(network, random_images):
    (warning,) = run_suite(EvaluationContext(network, random_images), images=1, sigmas=[0.1, 0.5])[
        "warnings"
    ]
    assert "127.5/255 is outside the range" in warning
    network.card.sigma_range = None
    (warning,) = run_suite(EvaluationContext(network, random_images), images=1)["warnings"]
    assert "not trained to denoise" in warning
    assert (
        run_suite(EvaluationContext(network, random_images), images=1, classifiers=["direct"])[
            "warnings"
        ]
        == []
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 9}, "samples 9 cannot certify anything at alpha 0.001: take at least 10"),
        ({"alpha": 0.7}, "alpha = 0.7 is not legal"),
        ({"sigmas": ["64"]}, "did you mean 64/255"),
        ({"radii": [-1.0]}, "radii .-1.0. must be finite and not below 0"),
        ({"classifiers": ["denoise"]}, "'direct' or 'denoised'"),
        ({"votes": 5}, "no field 'votes'"),
    ],
)
def test_illegal_settings_are_refused(options, words, network, random_images, tmp_path):
    with pytest.raises(UserError, match=words):
        evaluate(network, random_images, ["certify"], tmp_path, options={"certify": options})


def test_a_model_without_labels_is_refused(network, random_images, tmp_path):
    network.card.classifies = False
    with pytest.raises(UserError, match="trained without labels"):
        evaluate(network, random_images, ["certify"], tmp_path)
    assert not CERTIFY.standard  # takes minutes to hours: runs only on request
