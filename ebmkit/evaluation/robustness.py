r"""Suite ``robustness``: accuracy under attacks of increasing strength, also with added noise.

With :math:`\epsilon^*` the minimal strength, on a grid, at which an image is misclassified,

.. math:: \text{accuracy}(\epsilon) = \text{share of images with } \epsilon^* > \epsilon ,

an upper bound of the accuracy under the worst perturbation, which is tighter for stronger attacks.
The attack is PGD in :math:`\ell_\infty` and :math:`\ell_2` through defences; see
`ebmkit.evaluation.attacks`. The *map* has the noise level as second axis (CDN section 5.1): row 0
is ``direct``, row sigma is ``noise`` at that level.

Masked gradients let attacks fail on classifiers that are not robust (Athalye et al., arXiv
1802.00420; Carlini et al., arXiv 1902.06705). The suite warns if one of these checks fails:

- ``few_steps``, ``one_step``, ``random_noise``: compare the full attack at one strength with PGD of
  a quarter of the steps, one step, and ten draws of noise of the same size. b images are broken by
  the weaker attack only, c by the stronger only. By chance, at worst
  :math:`b \sim \text{Binomial}(b + c, 1/2)`; the test is a one-sided sign test at 1 %;
- ``gray``: the ball of radius 1/2 (:math:`\ell_\infty`) or :math:`\sqrt d/2` (:math:`\ell_2`)
  around any image contains the gray image, which has one label. So the accuracy at this radius is
  at most the share of the most frequent label (with added noise only approximately, because draws
  differ between images);
- ``autoattack``: the accuracy under AutoAttack, and the excess of PGD's over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import AfterValidator, NonNegativeInt, PositiveFloat
from rich.table import Table
from torch import Tensor

from ebmkit import plots
from ebmkit.attacks import Norm, search_steps
from ebmkit.energy import EnergyModel
from ebmkit.evaluation.attacks import (
    Attack,
    Defence,
    DefenceName,
    DefendedClassifier,
    autoattack,
    check_autoattack,
)
from ebmkit.evaluation.statistics import accuracy
from ebmkit.evaluation.suite import (
    EvaluationBatch,
    EvaluationContext,
    NonEmptyUnique,
    Positive,
    Suite,
    SuiteConfig,
    add_note,
    check_classifies,
    new_table,
)
from ebmkit.noise import Radius, Sigma, SigmaOrZero, in_255ths
from ebmkit.randomness import image_noise
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP

VALUES_PER_STEP = 32_768
"""Minimum number of pixel values per batch of an attack, if available: 512 digits."""

NOISE_TRIES = 10

FAR = 0.25
"""Root mean square change per pixel by ``refine``, image units, above which the suite warns."""

SIGNIFICANT = 0.01
"""Level of the sign test."""

TOLERATED_GAP = 0.05
"""Maximum excess of PGD's accuracy over AutoAttack's without a warning."""

WEAKER = {
    "few_steps": "PGD of a quarter of the steps",
    "one_step": "a single step",
    "random_noise": "random noise of the same size",
}


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({0.0, *values}))


Strengths = Annotated[tuple[SigmaOrZero, ...], AfterValidator(_ascending)]
Radii = Annotated[tuple[Radius, ...], AfterValidator(_ascending)]


class RobustnessConfig(SuiteConfig):
    """Settings of the suite, as in ``--set robustness.steps=100``."""

    images: Positive = 200
    """number of attacked images, from the first"""
    norms: NonEmptyUnique[Norm] = ("linf", "l2")
    """norms of the attacks: linf, l2"""
    linf: Strengths = tuple(e / 255 for e in (0, 0.5, 1, 2, 4, 8, 16))
    """attack strengths in l_inf, image units, for example 8/255; 0 is always included"""
    l2: Radii = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
    """attack strengths in l2, image units; 0 is always included"""
    defences: NonEmptyUnique[DefenceName] = ("direct", "noise")
    """defences, one curve each: direct, noise, denoise, denoise+noise, refine"""
    sigma: Sigma = 20 / 255
    """noise level that the defences noise and denoise+noise add, image units"""
    noise_levels: Strengths = tuple(s / 255 for s in (0, 20, 50))
    """noise levels of the map, image units; 0 is always included; [0]: no map"""
    steps: Positive = 40
    """number of PGD steps"""
    restarts: Positive = 2
    """number of random starts of PGD; the strongest counts"""
    stepsize: PositiveFloat | None = None
    """PGD step size relative to the strength; null: 0.2, or 2.5 / steps if larger"""
    eot: Positive = 4
    """number of noise draws averaged in each gradient of the attack (EOT)"""
    draws: Positive = 16
    """number of noise draws averaged by a defence"""
    refine_steps: NonEmptyUnique[NonNegativeInt] = (0, 1, 10)
    """numbers of Langevin steps of the defence refine, one curve each"""
    refine_chains: Positive = 4
    """number of chains that refine averages over"""
    refine_step_size: PositiveFloat = JEM_STEP
    """step size of refine (factor of the score), squared image units; default: JEM's"""
    refine_noise: SigmaOrZero = JEM_NOISE
    """standard deviation of the noise in a step of refine, image units; default: JEM's"""
    checks: bool = True
    """run the gradient-masking checks"""
    autoattack: bool = False
    """also run AutoAttack, at the strength of the checks (needs pyautoattack)"""

    def strengths(self, norm: Norm) -> tuple[float, ...]:
        """Strengths for ``norm``, ascending from 0."""
        return self.linf if norm == "linf" else self.l2

    def curve(self) -> dict[str, Defence]:
        """Defences with a curve, by name; ``refine`` has one for each number of steps."""
        found: dict[str, Defence] = {}
        chain = self.refine_step_size, self.refine_noise
        for name in self.defences:
            if name == "refine":
                found |= {f"refine-{k}": Defence(name, 0.0, k, *chain) for k in self.refine_steps}
            else:
                found[name] = Defence(name, 0.0 if name == "direct" else self.sigma)
        return found

    def rows(self) -> list[Defence]:
        """Rows of the map; none for a single noise level."""
        levels = self.noise_levels if len(self.noise_levels) > 1 else ()
        return [Defence("noise", sigma) if sigma else Defence("direct") for sigma in levels]

    def attacked(self) -> list[Defence]:
        """All attacked defences, without duplicates."""
        return list(dict.fromkeys([*self.curve().values(), *self.rows()]))

    def gradient_draws(self, defence: Defence) -> int:
        """Number of draws averaged in each gradient."""
        return self.eot if defence.random else 1

    def cost(self, defence: Defence) -> int:
        """Number of passes of an attack on ``defence``; each score in a gradient counts three."""
        scores = 1 if defence.denoises else defence.steps
        return self.gradient_draws(defence) * (1 + 3 * scores)


def passes(context: EvaluationContext) -> int:
    """Number of passes over the images: one is a PGD attack at one strength with one noise draw."""
    config = context.option(RobustnessConfig)
    total = 0
    for norm in config.norms:
        levels = len(config.strengths(norm)) - 1 + config.checks
        total += search_steps(levels) * sum(map(config.cost, config.attacked()))
        if config.checks or config.autoattack:
            total += sum(map(config.cost, config.curve().values()))
    return total


def measure(context: EvaluationContext) -> dict[str, Any]:
    """Attack all defences; return the document.

    Raises:
        UserError: if an image is outside [0, 1], or AutoAttack is requested but not installed.
    """
    config = context.option(RobustnessConfig)
    if config.autoattack:
        check_autoattack()
    attacks = _Attacks(context, config)
    moved = {n: attacks.displacement(d) for n, d in config.curve().items() if d.steps}
    warnings = _warnings(context, config, moved)
    curves, maps, checks = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for norm in config.norms:
        found = {d: attacks.minimal_epsilons(norm, d) for d in config.attacked()}
        curve = {
            d: [accuracy(smallest > epsilon) for epsilon in config.strengths(norm)]
            for d, smallest in found.items()
        }
        curves[norm] = {name: curve[d] for name, d in config.curve().items()}
        context.image_values |= {f"{norm}/{n}": found[d] for n, d in config.curve().items()}
        maps[norm] = [{"sigma": d.sigma, "accuracy": curve[d]} for d in config.rows()]
        checks[norm] = {}
        if config.checks or config.autoattack:
            for name, d in config.curve().items():
                checks[norm][name], doubts = attacks.check(norm, d, found[d])
                warnings += [f"{name}, {norm_name(norm)}: {doubt}" for doubt in doubts]
    return {
        "images": len(attacks.images),
        "sigmas": list(config.noise_levels),
        "chance": 1 / context.model.num_classes,
        "epsilons": {norm: list(config.strengths(norm)) for norm in config.norms},
        "defences": {
            name: {"about": d.description(context.model.noise_conditional), "sigma": d.sigma}
            | ({"moved": moved[name]} if name in moved else {})
            for name, d in config.curve().items()
        },
        "curves": curves,
        "map": maps,
        "checks": checks,
        "warnings": warnings,
    }


class _Attacks:
    """Attacks on the first images of a context, distributed over its processes."""

    def __init__(self, context: EvaluationContext, config: RobustnessConfig) -> None:
        model = context.exact_model
        assert isinstance(model, EnergyModel)
        self.context, self.config, self.model = context, config, model
        self.images = context.first(config.images)

    def minimal_epsilons(self, norm: Norm, defence: Defence) -> Tensor:
        """Minimal strength (N,) that breaks each image; beyond the grid, the gray radius."""
        epsilons = list(self.config.strengths(norm)[1:])
        if self.config.checks:
            epsilons.append(self._gray_radius(norm))
        cost, context = self.config.cost(defence), self.context
        target, seed = self._target(defence), str(context.seed)
        one = cost * context.world.size * len(context.images) / len(self.images)

        def measure(batch: EvaluationBatch) -> dict[str, Tensor]:
            assert batch.labels is not None
            at, noise = (batch.x, batch.labels, epsilons), self._noise(batch.x, defence)

            def done() -> None:  # one bisection step, in all processes
                context.skip(int(one * len(batch.x)))

            return {"smallest": self._pgd(norm).minimal_epsilons(target, *at, noise, seed, done)}

        return self._columns(measure, defence, cost * search_steps(len(epsilons)))["smallest"]

    def displacement(self, defence: Defence) -> float:
        """Root mean square change per pixel, image units, of clean images by ``defence``."""
        target = self._target(defence)

        def measure(batch: EvaluationBatch) -> dict[str, Tensor]:
            noise = image_noise(batch.x, defence.noises, "moved") if defence.random else None
            return {"square": (target.purify(batch.x, noise) - batch.x).flatten(1).square().mean(1)}

        columns = self.context.columns(0.0, measure, self.images, passes=0)
        return float(columns["square"].double().mean().sqrt())

    def check(
        self, norm: Norm, defence: Defence, smallest: Tensor
    ) -> tuple[dict[str, Any], list[str]]:
        """Check the attack that found ``smallest`` (N,); return JSON entry and warnings."""
        document, doubts = dict[str, Any](epsilon=None), list[str]()
        epsilon = most_informative_epsilon(smallest, self.config.strengths(norm))
        if epsilon is not None:
            broken = self._broken_at(norm, defence, epsilon)
            document, doubts = compare_attacks(norm, epsilon, smallest, broken)
        if self.config.checks:
            assert self.images.labels is not None
            radius = self._gray_radius(norm)
            left = accuracy(smallest > radius)
            bound = int(self.images.labels.bincount().max()) / len(self.images)
            document["gray"] = {"epsilon": radius, "accuracy": left, "bound": bound}
            if left.value > bound:
                doubts.append(
                    f"at {strength(norm, radius)} every image can be turned gray, so the accuracy "
                    f"is at most {bound:.1%}, but it is {left.value:.1%} under PGD: gradients are "
                    "masked, and the accuracies are too high"
                )
        return document, doubts

    def _broken_at(self, norm: Norm, defence: Defence, epsilon: float) -> dict[str, Tensor]:
        """Images (N,) bool that each attack breaks at ``epsilon``."""
        pgd, target = self._pgd(norm), self._target(defence)
        attacks = {"pgd": pgd}
        if self.config.checks:
            attacks["few_steps"] = replace(pgd, steps=max(1, pgd.steps // 4))
            attacks["one_step"] = Attack(norm, "one-step")
            attacks["random_noise"] = Attack(norm, "noise", restarts=NOISE_TRIES)

        def measure(batch: EvaluationBatch) -> dict[str, Tensor]:
            assert batch.labels is not None
            at = (batch.x, batch.labels, epsilon, self._noise(batch.x, defence))
            seed = f"check {self.context.seed}"
            found = {name: a.succeeds(target, *at, seed) for name, a in attacks.items()}
            if self.config.autoattack:
                found["autoattack"] = autoattack(target, norm, *at, self.context.seed)
            return found

        return self._columns(measure, defence, self.config.cost(defence))

    def _columns(
        self, measure: Callable[[EvaluationBatch], dict[str, Tensor]], defence: Defence, cost: int
    ) -> dict[str, Tensor]:
        """`EvaluationContext.columns` of the attacked images, counted as ``cost`` passes."""
        channels, (height, width) = self.images.channels, self.images.image_size
        rows = max(self.context.batch_size, VALUES_PER_STEP // (channels * height * width))
        share = math.ceil(len(self.images) / self.context.world.size)
        size = max(1, min(rows // self.config.gradient_draws(defence), share))
        return self.context.columns(0.0, measure, self.images, size, cost)

    def _gray_radius(self, norm: Norm) -> float:
        """Radius of a ball around any image that contains the gray image, 1/2 everywhere."""
        height, width = self.images.image_size
        return 0.5 if norm == "linf" else math.sqrt(self.images.channels * height * width) / 2

    def _pgd(self, norm: Norm) -> Attack:
        config = self.config
        return Attack(norm, "pgd", config.steps, config.restarts, config.stepsize)

    def _target(self, defence: Defence) -> DefendedClassifier:
        return DefendedClassifier(self.model, defence, self.config.gradient_draws(defence))

    def _noise(self, x: Tensor, defence: Defence) -> Tensor | None:
        if not defence.random:
            return None
        config = self.config
        draws = config.refine_chains if defence.name == "refine" else config.draws
        seed = f"judged on {self.context.seed} {defence.sigma:.9g}"
        return image_noise(x, draws * defence.noises, seed)


def most_informative_epsilon(smallest: Tensor, grid: Sequence[float]) -> float | None:
    """Strength at which about half of the correctly classified images are broken, where attacks
    differ most. The largest of equally good ones; None if no image is classified correctly.

    Args:
        smallest: minimal strength (N,) that breaks each image; 0 if it is wrong unattacked.
        grid: strengths, image units.
    """
    right = int((smallest > 0).sum())
    strengths = sorted((epsilon for epsilon in grid if epsilon > 0), reverse=True) if right else []
    half = {epsilon: abs(int((smallest > epsilon).sum()) - right / 2) for epsilon in strengths}
    return min(half, key=half.__getitem__, default=None)


def compare_attacks(
    norm: Norm, epsilon: float, smallest: Tensor, broken: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """Compare PGD with other attacks; return accuracies and warnings about PGD.

    Args:
        norm: norm of the attacks.
        epsilon: strength of the attacks, image units.
        smallest: minimal strength (N,) that breaks each image; 0 if it is wrong unattacked.
        broken: images (N,) bool that each attack breaks, by attack, including ``pgd``.
    """
    from scipy.stats import binomtest

    right, pgd, at = smallest > 0, broken["pgd"], strength(norm, epsilon)
    left = {name: accuracy(right & ~other) for name, other in broken.items()}
    document, doubts = {"epsilon": epsilon, **left}, []
    for name, other in broken.items():
        only, rest = int((right & other & ~pgd).sum()), int((right & pgd & ~other).sum())
        test = partial(binomtest, only, only + rest, alternative="greater")
        if name in WEAKER and only > rest and test().pvalue < SIGNIFICANT:
            doubts.append(
                f"{WEAKER[name]} at {at} breaks {only} images that PGD does not, and PGD breaks "
                f"{rest} others: gradients are masked, and the accuracies are too high"
            )
        if name == "autoattack":
            gap = document["gap"] = (only - rest) / len(right)
            if gap > TOLERATED_GAP:
                doubts.append(
                    f"accuracy at {at} is {left[name].value:.1%} under AutoAttack and "
                    f"{left['pgd'].value:.1%} under PGD, which is too weak: accuracies are too high"
                )
    return document, doubts


def _warnings(
    context: EvaluationContext, config: RobustnessConfig, moved: dict[str, float]
) -> list[str]:
    found = [
        f"{name} moves images by {rms:.3g} per pixel (root mean square, image units): steps of "
        f"{config.refine_step_size:g} are too large for this model's score; set "
        "robustness.refine_step_size to about the square of its lowest noise level"
        for name, rms in moved.items()
        if not rms <= FAR
    ]
    card = context.model.card
    return found + [
        f"{name}: this model was not trained to denoise (its objective is {card.objective!r})"
        for name, defence in config.curve().items()
        if defence.denoises and card is not None and not card.denoises
    ]


def norm_name(norm: str) -> str:
    """Name of a norm in tables."""
    return "l_inf" if norm == "linf" else norm


def strength(norm: str, epsilon: float) -> str:
    """Format of a strength in tables: l_inf in 255ths, l2 in image units."""
    return f"{in_255ths(epsilon)}/255" if norm == "linf" else f"{epsilon:.4g}"


def percent(estimate: Mapping[str, Any], with_interval: bool) -> str:
    """Format of an accuracy in %, such as 60.0 (31 to 83)."""
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.0f} to {high:.0f})" if with_interval else f"{value:.1f}"


def table(document: dict[str, Any]) -> Table:
    """Accuracy by strength (rows) and defence (columns; with intervals for up to two), in the gray
    ball, and under AutoAttack."""
    names = list(document["defences"])
    few = len(names) <= 2
    heads = [f"{name}, % (95 %)" if few else name for name in names]
    result = new_table(document, ("norm", "strength", *heads))
    if not few:
        add_note(result, "accuracy in %; 95 % intervals: robustness.json")
    cell = partial(percent, with_interval=few)
    for norm, curves in document["curves"].items():
        for i, epsilon in enumerate(document["epsilons"][norm]):
            cells = [cell(curves[name][i]) for name in names]
            result.add_row("" if i else norm_name(norm), strength(norm, epsilon), *cells)
        checks = [document["checks"][norm].get(name, {}) for name in names]
        if any("gray" in check for check in checks):
            radius = strength(norm, checks[0]["gray"]["epsilon"])
            result.add_row("gray ball", radius, *[cell(c["gray"]["accuracy"]) for c in checks])
        for epsilon in sorted({c["epsilon"] for c in checks if "autoattack" in c}):
            of = [c if c.get("epsilon") == epsilon else {} for c in checks]
            cells = [cell(c["autoattack"]) if "autoattack" in c else "-" for c in of]
            result.add_row("AutoAttack", strength(norm, epsilon), *cells)
        result.add_section()
    return result


SYMBOLS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}
UNITS = {"linf": "1/255", "l2": "image units"}


class Curve(NamedTuple):
    """Accuracies by strength: estimates as in JSON, or published numbers, drawn as a thin line."""

    label: str
    look: dict[str, Any]
    epsilons: Sequence[float]
    accuracy: Sequence[Any]


def plot_curves(
    panels: Mapping[str, Sequence[Curve]], chance: float | None, title: str, path: Path
) -> None:
    """Plot accuracy against the strength of attacks, one panel per norm."""
    figure = plots.new_figure(0.6 + 4.3 * len(panels), 4.3, layout="constrained")
    for number, (norm, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for label, look, epsilons, values in curves:
            x = np.array(epsilons) * (255 if norm == "linf" else 1)
            published = [100 * value for value in values if isinstance(value, float)]
            if published:
                thin = look | {"marker": "", "lw": 0.8, "alpha": 0.6}
                axes.plot(x, published, label=label, **thin)
            else:
                plots.plot_estimates(axes, x, values, 100, ms=4, lw=1.4, label=label, **look)
        if chance is not None:
            axes.axhline(100 * chance, color=plots.GRAY, ls=":", lw=1, label="chance")
        axes.set(xlabel=_axis(norm), ylabel="accuracy (%)", ylim=(0, 102))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, lw=0.5)
    plots.save_figure(figure, path, title, legend=1 if len(panels) > 1 else 2)


def plot(context: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``robustness.png`` and, for several noise levels, ``robustness-map.png``."""
    panels = {
        norm: [
            Curve(f"{name}: {document['defences'][name]['about']}", plots.look(i), epsilons, curve)
            for i, (name, curve) in enumerate(document["curves"][norm].items())
        ]
        for norm, epsilons in document["epsilons"].items()
    }
    title = f"Accuracy under PGD attacks: {plots.images_of(document)}, bands 95 %"
    plot_curves(panels, document["chance"], title, folder / "robustness.png")
    if any(document["map"].values()):
        plot_map(document, folder / "robustness-map.png")


def plot_map(document: dict[str, Any], path: Path) -> None:
    """Plot accuracy by attack strength and by the noise level that the classifier adds."""
    maps = {norm: rows for norm, rows in document["map"].items() if rows}
    wide = max(len(document["epsilons"][norm]) for norm in maps)
    tall = max(map(len, maps.values()))
    size = 1.8 + len(maps) * (1.0 + 0.5 * wide), 1.7 + 0.42 * tall
    figure = plots.new_figure(*size, layout="constrained")
    for number, (norm, rows) in enumerate(maps.items()):
        axes = figure.add_subplot(1, len(maps), number + 1)
        values = np.array([[100 * e["value"] for e in row["accuracy"]] for row in rows])
        unit = in_255ths if norm == "linf" else "{:.3g}".format
        columns = [unit(epsilon) for epsilon in document["epsilons"][norm]]
        levels = [in_255ths(row["sigma"]) for row in rows]
        image = plots.annotated_map(axes, values, columns, levels, "{:.0f}")
        axes.invert_yaxis()
        axes.set(xlabel=_axis(norm), ylabel="noise added, sigma (1/255)")
    figure.colorbar(image, ax=figure.axes, label="accuracy (%)")
    title = f"Accuracy under PGD attacks and added noise: {plots.images_of(document)}"
    plots.save_figure(figure, path, title)


def plot_comparison(
    documents: Mapping[str, dict[str, Any] | None],
    path: Path,
    paper: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]] | None = None,
    defence: str = "direct",
    bands: str = "95 %",
) -> None:
    """Plot several models, as in CDN figure 4: one panel per norm, one line per model.

    Args:
        documents: contents of ``robustness.json`` by model name; None is labelled "not run".
        path: PNG file.
        paper: published points (strength in image units, accuracy 0..1) by model and norm
            (``linf``, ``l2``), drawn as thin lines.
        defence: name of the plotted defence.
        bands: what the bands show, for the title.
    """
    run = {
        name: document
        for name, document in documents.items()
        if document and any(defence in curves for curves in document["curves"].values())
    }
    norms = [n for n in SYMBOLS if any(n in d["curves"] for d in run.values())] or list(SYMBOLS)
    panels: dict[str, list[Curve]] = {norm: [] for norm in norms}
    for norm, curves in panels.items():
        for i, name in enumerate(documents):
            if name not in run:
                curves.append(Curve(f"{name}: not run", plots.look(i), [], []))
            elif norm in run[name]["curves"]:
                found = run[name]
                label = f"{name} ({plots.images_of(found)})"
                grid, curve = found["epsilons"][norm], found["curves"][norm][defence]
                curves.append(Curve(label, plots.look(i), grid, curve))
            points = (paper or {}).get(name, {}).get(norm)
            if points:
                x, y = np.array(points, dtype=float).T
                curves.append(Curve(f"{name}, paper", plots.look(i), x, y.tolist()))
    chances = {document["chance"] for document in run.values()}
    shown = "" if defence == "direct" else f", defence {defence}"
    title = f"Accuracy under PGD attacks{shown}, bands {bands}"
    plot_curves(panels, chances.pop() if len(chances) == 1 else None, title, path)


def _axis(norm: str) -> str:
    return f"{SYMBOLS[norm]} strength of the attack ({UNITS[norm]})"


ROBUSTNESS = Suite(
    description="accuracy under l_inf and l2 attacks (PGD), and a map over attack "
    "strength and noise level",
    measure=measure,
    plot=plot,
    table=table,
    check=check_classifies,
    passes=passes,
    exact=True,
    options=RobustnessConfig,
)
