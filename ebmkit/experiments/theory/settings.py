"""The settings of figure 1: a true distribution and a family that is fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ebmkit.experiments.theory.families import (
    CentredMeans,
    ClassCovariances,
    Family,
    NaiveBayes,
    SharedCovariance,
)
from ebmkit.experiments.theory.truth import Truth

__all__ = ["PAPER", "SETTINGS", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A truth and the family fitted to it.

    Attributes:
        name: a short key.
        title: of a panel, one line.
        about: truth and family in a sentence.
        truth: p(x, c).
        family: p_theta(x, c).
        well_specified: whether the truth is in the family.
        smallest: the smallest training set that is measured.
    """

    name: str
    title: str
    description: str
    truth: Truth
    family: Family
    well_specified: bool
    smallest: int


PAPER = (
    {
        "title": "Paper, left: bias dominates",
        "b_gen": 5.0,
        "b_dis": 1.0,
        "v_gen": 20.0,
        "v_dis": 100.0,
    },
    {
        "title": "Paper, right: variance dominates",
        "b_gen": 1.0,
        "b_dis": 1.0,
        "v_gen": 100.0,
        "v_dis": 10000.0,
    },
)
"""The stylised constants of figure 1; its caption draws b + v/n."""


def _truth(
    means: Sequence[Sequence[float]],
    covariances: Sequence[Sequence[Sequence[float]]],
    weights: Sequence[float],
    labels: Sequence[int] | None = None,
) -> Truth:
    centres = torch.tensor(means, dtype=torch.float64)
    spreads = torch.tensor(covariances, dtype=torch.float64)
    return Truth(
        means=centres,
        covariances=spreads.expand(len(means), *spreads.shape[1:]).contiguous(),
        weights=torch.tensor(weights, dtype=torch.float64),
        labels=torch.tensor(range(len(means)) if labels is None else labels),
    )


def _on_an_axis(dim: int, distance: float) -> Truth:
    """Two equally likely classes in ``dim`` dimensions, unit covariances, opposite means."""
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[0, 0], means[1, 0] = distance / 2, -distance / 2
    return Truth(
        means=means,
        covariances=torch.eye(dim, dtype=torch.float64).expand(2, dim, dim).contiguous(),
        weights=torch.full((2,), 0.5, dtype=torch.float64),
        labels=torch.arange(2),
    )


_UNIT = [[[1.0, 0.0], [0.0, 1.0]]]

SETTINGS = (
    Setting(
        name="many-parameters",
        title="Opposite means, d = 20",
        description="Two unit Gaussians in 20 dimensions, 3 standard deviations apart; family: "
        "unit covariances, opposite means.",
        truth=_on_an_axis(20, 3.0),
        family=CentredMeans(2, 20),
        well_specified=True,
        smallest=50,
    ),
    Setting(
        name="naive-bayes",
        title="Naive Bayes, correlated features",
        description="Two Gaussians in the plane, correlation 0.3; family: one diagonal covariance.",
        truth=_truth([[1.2, 1.2], [-1.2, -1.2]], [[[1.0, 0.3], [0.3, 1.0]]], [0.5, 0.5]),
        family=NaiveBayes(2, 2),
        well_specified=False,
        smallest=25,
    ),
    Setting(
        name="centred-means",
        title="Centred means, C = 3",
        description="Three unit Gaussians in the plane whose means sum to zero; family: the same.",
        truth=_truth([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5]], _UNIT, [0.4, 0.3, 0.3]),
        family=CentredMeans(3, 2),
        well_specified=True,
        smallest=50,
    ),
    Setting(
        name="shared-covariance",
        title="Shared covariance, C = 3",
        description="Three Gaussians in the plane with one covariance; family: the same.",
        truth=_truth(
            [[1.8, 0.2], [-1.0, 1.6], [-0.6, -1.6]],
            [[[1.0, 0.4], [0.4, 0.8]]],
            [0.3, 0.4, 0.3],
        ),
        family=SharedCovariance(3, 2),
        well_specified=True,
        smallest=50,
    ),
    Setting(
        name="class-covariances",
        title="Class covariances",
        description="Two Gaussians in the plane with a covariance each; family: the same.",
        truth=_truth(
            [[0.8, 0.0], [-0.8, 0.4]],
            [[[1.0, 0.3], [0.3, 0.6]], [[0.7, -0.2], [-0.2, 1.4]]],
            [0.5, 0.5],
        ),
        family=ClassCovariances(2, 2),
        well_specified=True,
        smallest=100,
    ),
    Setting(
        name="unequal-covariances",
        title="Shared covariance, truth unequal",
        description="Two Gaussians in the plane, one with about three times the other's variances; "
        "family: one covariance.",
        truth=_truth(
            [[1.0, 0.0], [-1.0, 0.0]],
            [[[2.0, 0.3], [0.3, 1.2]], [[0.6, 0.0], [0.0, 0.6]]],
            [0.4, 0.6],
        ),
        family=SharedCovariance(2, 2),
        well_specified=False,
        smallest=25,
    ),
    Setting(
        name="two-humps",
        title="Shared covariance, truth not Gaussian",
        description="Two classes in the plane, one with a fifth of its mass in a hump of its own; "
        "family: one covariance.",
        truth=_truth([[1.0, 0.0], [1.0, 3.5], [-1.0, 0.0]], _UNIT, [0.4, 0.1, 0.5], [0, 0, 1]),
        family=SharedCovariance(2, 2),
        well_specified=False,
        smallest=25,
    ),
)
