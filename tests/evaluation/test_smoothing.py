"""Certificates against closed form: a linear classifier's smoothed probability and exact radius."""

import math

import pytest
import torch
from scipy.stats import binom, binomtest, norm

from ebmkit.evaluation.smoothing import (
    ABSTAIN,
    Certificates,
    certificates,
    draw_votes,
    largest_radius,
    lower_bound,
    vote_generator,
)


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.05), (37, 0.001), (1000, 0.001)])
def test_the_lower_bound_is_the_exact_one(count, alpha):
    hits = torch.arange(0, count + 1, max(1, count // 20))
    expected = [
        binomtest(k, count, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        for k in hits.tolist()
    ]
    found = lower_bound(hits, count, alpha)
    assert found.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-12)
    # what defines it: were it the truth, so many hits or more would have probability alpha
    some = hits > 0
    chance = binom.sf(hits[some].numpy() - 1, count, found[some].numpy())
    assert chance == pytest.approx(alpha, rel=1e-6)


def margins_and_votes(images, votes, sigma, generator):
    """A linear classifier's distances to its boundary, and labels of noisy copies."""
    margin = 3 * sigma * torch.randn(images, generator=generator, dtype=torch.float64)
    noise = sigma * torch.randn(images, votes, generator=generator, dtype=torch.float64)
    return margin, (margin[:, None] + noise > 0).long()


@pytest.mark.parametrize("alpha", [0.2, 0.02])
def test_a_certificate_is_wrong_as_rarely_as_it_says(alpha):
    """At distance m from a linear boundary, P = Phi(m / sigma) and the exact radius is m."""
    images, sigma = 4000, 0.3
    margin, votes = margins_and_votes(images, 250, sigma, torch.Generator().manual_seed(0))
    found = certificates(votes, 50, sigma, alpha)
    right = found.labels == (margin > 0)
    wrong = (found.labels != ABSTAIN) & (~right | (found.radius > margin.abs()))
    assert int(wrong.sum()) <= binom.ppf(1 - 1e-6, images, alpha)
    # nor is it careful beyond need: only that hits come in whole numbers takes from alpha. Where
    # all votes agree the bound cannot move, so those images are left out
    moving = (margin.abs() < 2 * sigma) & (found.labels != ABSTAIN)
    assert int(wrong[moving].sum()) > 0.6 * alpha * int(moving.sum())


def test_radii_approach_the_exact_one_from_below():
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
    # z = 3.09 standard errors of p, turned into a radius by the slope sigma / phi(m / sigma), and
    # as much again for the draw itself
    p, density = norm.cdf(margin / sigma), norm.pdf(margin / sigma)
    error = torch.from_numpy(sigma * (p * (1 - p) / 100_000) ** 0.5 / density)
    assert (shortfall[2] < 2 * 3.1 * error).all()


def test_images_in_many_dimensions_are_certified_to_their_boundary():
    """The whole way from an image to a radius, with noise in all of its pixels."""
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
    assert 0.17 < float(found.radius) < 0.2  # 3.1 +- 3 standard errors below


def test_all_votes_alike_give_the_largest_radius():
    votes = torch.full((1, 60), 4)
    found = certificates(votes, 10, 0.5, 0.001)
    assert float(found.radius) == pytest.approx(largest_radius(0.5, 50, 0.001))
    assert found.labels.tolist() == [4]
    assert largest_radius(0.5, 9, 0.001) == 0  # even 9 of 9 leave the bound below 1/2
    assert largest_radius(0.5, 10, 0.001) > 0


def test_no_certificate_without_a_majority():
    even = torch.arange(100) % 2
    few = torch.cat([torch.full((10,), 2), torch.full((90,), 1)])  # selected 2, then only 1
    found = certificates(torch.stack([even, few]), 10, 0.5, 0.001)
    assert found.labels.tolist() == [ABSTAIN, ABSTAIN]
    assert found.radius.tolist() == [0, 0]
    assert found.top.tolist() == [0, 1]  # of equals the smaller
    assert found.lower[1] == 0


def test_selection_votes_are_not_counted_again():
    """The bound rests on votes that were drawn after the label was chosen."""
    votes = torch.cat([torch.ones(50), torch.zeros(40), torch.ones(60)]).long()[None]
    found = certificates(votes, 50, 1.0, 0.01)
    assert float(found.lower) == pytest.approx(float(lower_bound(torch.tensor([60]), 100, 0.01)))


def test_a_wrong_label_is_not_certified_right():
    found = Certificates(
        torch.tensor([1, 2, ABSTAIN]), torch.tensor([0.3, 0.2, 0.0]), torch.zeros(3), torch.zeros(3)
    )
    right = found.right_radius(torch.tensor([1, 1, 1]))
    assert (right >= 0).tolist() == [True, False, False]
    assert (right >= 0.3).tolist() == [True, False, False]
    assert (right >= 0.31).tolist() == [False, False, False]


def test_all_classifiers_see_the_same_noise_in_any_batch():
    x = torch.rand(1, 3, 5)  # 15 values: random numbers come in sixteens

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


def test_every_vote_is_told_once():
    told = []
    votes = draw_votes(
        lambda y: {"zero": torch.zeros(len(y), dtype=torch.long)},
        torch.rand(1, 4, 4), 0.1, 105, vote_generator(0, 0), 25, told.append,
    )  # fmt: skip
    assert len(votes["zero"]) == sum(told) == 105
