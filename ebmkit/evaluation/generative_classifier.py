r"""Suite ``generative-classifier``: Bayes' rule on the likelihood, beside the one-pass classifier.

The generative classifier is :math:`\arg\max_c \log p(x \mid c) + \log p(c)` with the model's prior
(`EnergyModel.log_prior`; uniform if it has none) and :math:`\log p(x \mid c)` from denoising
errors, with common noise for all labels (`ebmkit.likelihood.class_likelihoods`), at the noise level
of the images. A joint energy model gives :math:`p(c \mid x)` in one forward pass, from the same
energy whose gradients the denoising errors are made of. CDN section 2.2 claims that it "can be
evaluated much more efficiently than recent approaches"; the suite compares accuracy, calibration
(ECE, NLL) and cost of the two, on images that are

- ``clean``;
- ``noisy``: with noise of level ``noise``;
- ``attacked``: perturbed by PGD within an :math:`\ell_\infty` ball against the one-pass classifier.
  For the generative classifier this attack is transferred, not adapted, so its accuracy is an upper
  bound of its robust accuracy.

``undecided`` is the share of images on which the two most likely labels differ by less than two
Monte Carlo standard errors. Cost is the time per image, and its number of forward passes and
gradients by the image.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.attacks import gradient_of, projected_gradient_descent, random_start
from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.evaluation import statistics
from ebmkit.evaluation.calibration import calibration_error
from ebmkit.evaluation.likelihood import make_plan
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    Images,
    Positive,
    Suite,
    SuiteConfig,
    add_note,
    check_classifies,
    check_one_size,
    interval,
    new_table,
    number,
)
from ebmkit.likelihood import class_likelihoods, trained_range
from ebmkit.noise import Sigma, format_sigma
from ebmkit.randomness import image_generators

CLASSIFIERS = {"one_pass": "one pass, p(c|x)", "generative": "generative, p(x|c)"}


class GenerativeClassifierConfig(SuiteConfig):
    """Settings of the suite ``generative-classifier``."""

    images: Positive = 50
    """number of images"""
    draws: Annotated[int, Field(ge=4, multiple_of=4)] = 32
    """number of noisy copies of each image, common to all labels"""
    noise: Sigma = 25 / 255
    """level of the noise on noisy images, image units"""
    epsilon: Sigma = 8 / 255
    """l_inf radius of the attack, image units"""
    steps: Positive = 10
    """number of steps of the attack"""


def conditions(options: GenerativeClassifierConfig) -> dict[str, str]:
    """Kinds of images and their descriptions."""
    return {
        "clean": "clean images",
        "noisy": f"noise at sigma {format_sigma(options.noise)}",
        "attacked": f"PGD on the one-pass classifier, l_inf {format_sigma(options.epsilon)}, "
        f"{options.steps} steps",
    }


def _attacked(
    model: EnergyModel, x: Tensor, labels: Tensor, options: GenerativeClassifierConfig, seed: int
) -> Tensor:
    def loss(y: Tensor) -> Tensor:
        return -model(y, 0.0).at_label(labels)

    generators = image_generators(x, f"generative classifier {seed}")
    start = random_start(x, options.epsilon, "linf", generators)
    how: dict[str, Any] = {"steps": options.steps, "start": start}
    how["step_size"] = 2.5 * options.epsilon / options.steps
    return projected_gradient_descent(gradient_of(loss), x, options.epsilon, "linf", **how)


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Classify images in both ways; return the document."""
    options, model = context.option(GenerativeClassifierConfig), context.exact_model
    assert isinstance(model, EnergyModel)
    plan = make_plan(context, None, "uniform")
    images = context.first(options.images)
    costs: dict[str, dict[str, float]] = {}

    def classify(kind: str, batch: EvaluationBatch) -> dict[tuple[str, str], Tensor]:
        y, labels = batch.y, batch.labels
        assert labels is not None
        if kind == "attacked":
            y = _attacked(model, batch.x, labels, options, context.seed)
        began = time.perf_counter()
        level = options.noise if kind == "noisy" else 0.0
        one_pass = model.energies(y, level).log_posterior()
        middle = time.perf_counter()
        found = class_likelihoods(
            model,
            y,
            sigma=max(plan.sigma, level),
            reference=plan.reference,
            draws=options.draws,
            seed=context.seed,
        )
        seconds = {"one_pass": middle - began, "generative": time.perf_counter() - middle}
        costs["one_pass"] = {"forward": 1, "gradients": 0}
        costs["generative"] = {"forward": found.evaluations, "gradients": found.gradients}
        by_bayes = found.log_posterior(model.log_prior)
        columns: dict[tuple[str, str], Tensor] = {}
        for name, posterior in (("one_pass", one_pass), ("generative", by_bayes)):
            confidence, predicted = posterior.exp().max(dim=1)
            columns[name, "right"] = predicted == labels
            columns[name, "confidence"] = confidence.double()
            columns[name, "nll"] = -posterior.gather(1, labels[:, None])[:, 0].double()
            columns[name, "seconds"] = y.new_full((len(y),), seconds[name] / len(y))
        evidence = found.log_density + model.log_prior.to(found.log_density)
        top = evidence.topk(min(2, evidence.shape[1]), dim=1).values
        columns["generative", "undecided"] = top[:, 0] - top[:, -1] < 2 * found.gap_error
        return columns

    results: dict[str, Any] = {}
    for kind, description in conditions(options).items():
        level = options.noise if kind == "noisy" else 0.0
        columns = context.columns(level, partial(classify, kind), images)
        results[kind] = {"about": description}
        for name in CLASSIFIERS:
            right, confidence = columns[name, "right"], columns[name, "confidence"]
            results[kind][name] = {
                "accuracy": statistics.accuracy(right),
                "ece": calibration_error(confidence, right, seed=context.seed),
                "nll": statistics.bounded_mean(columns[name, "nll"]),
            }
            costs[name]["seconds"] = float(columns[name, "seconds"].mean())
        results[kind]["undecided"] = statistics.accuracy(columns["generative", "undecided"])
    return {
        "images": len(images),
        "sigma": plan.sigma,
        "reference": plan.fitted_to,
        "conditions": results,
        "cost": costs,
    }


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``generative-classifier.png``: accuracy of both, and their cost."""
    figure = plots.new_figure(5.6, 4.0, layout="constrained")
    axes = figure.add_subplot()
    kinds = document["conditions"]
    for k, (name, label) in enumerate(CLASSIFIERS.items()):
        cost = document["cost"][name]
        text = f"{label}: {cost['forward']:,} forward passes, {cost['gradients']:,} gradients"
        at = [i + 0.2 * (k - 0.5) for i in range(len(kinds))]
        look: dict[str, Any] = {"fmt": "os"[k], "color": plots.COLOURS[k], "ms": 5, "label": text}
        estimates = [kind[name]["accuracy"] for kind in kinds.values()]
        plots.bars_within(axes, at, estimates, (0, 100), 100, **look)
    axes.set_xticks(range(len(kinds)), list(kinds))
    axes.set(ylim=(0, 102), xlim=(-0.6, len(kinds) - 0.4))
    plots.annotate(axes, plots.images_of(document), "images", "accuracy (%)")
    path = folder / "generative-classifier.png"
    plots.save_figure(figure, path, "Classification by likelihood and in one pass", legend=1)


def table(document: dict[str, Any]) -> Table:
    """Accuracy, calibration and cost of both classifiers."""
    heads = ("images, classifier", "accuracy", "95 % interval", "ECE", "NLL")
    result = new_table(document, heads)
    for kind, found in document["conditions"].items():
        for name in CLASSIFIERS:
            own = found[name]
            result.add_row(
                f"{kind}, {name.replace('_', ' ')}",
                number(own["accuracy"], "{:.1%}"),
                interval(own["accuracy"], "{:.1%}"),
                number(own["ece"], "{:.3f}"),
                number(own["nll"], "{:.3f}"),
            )
        result.add_section()
    notes = [
        f"{label}: {cost['forward']:,} forward passes and {cost['gradients']:,} gradients, "
        f"{1000 * cost['seconds']:.1f} ms per image"
        for label, cost in zip(CLASSIFIERS.values(), document["cost"].values(), strict=True)
    ]
    clean = document["conditions"]["clean"]["undecided"]
    notes.append(f"undecided within two standard errors: {number(clean, '{:.1%}')} of clean images")
    add_note(result, "\n".join(notes))
    return result


def check(model: ScoreModel, images: Images) -> None:
    """Raise `UserError` if the model has no labels or no likelihood, or the images differ."""
    check_classifies(model, images)
    check_one_size("generative-classifier", images)
    trained_range(model)


GENERATIVE_CLASSIFIER = Suite(
    description="classification by log p(x|c), beside p(c|x) in one pass: accuracy, calibration, "
    "robustness, cost",
    measure=measure,
    plot=plot,
    table=table,
    check=check,
    passes=lambda context: 3,
    options=GenerativeClassifierConfig,
    exact=True,
)
