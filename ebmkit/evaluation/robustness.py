r"""Suite ``robustness``: accuracy against the strength of attacks, and against noise beside it.

With :math:`\epsilon^*` the smallest strength, on a grid, at which an image is given a wrong label,

.. math:: \text{accuracy}(\epsilon) = \text{share of images with } \epsilon^* > \epsilon .

This is an upper bound of the accuracy under the worst perturbation, as tight as the attack is good:
no attack proves that there is none (a certificate does).

Protocol. PGD by foolbox in :math:`\ell_\infty` and :math:`\ell_2`, in image units, of 40 steps of
0.2 of the strength from a random start, on float images within [0, 1] that are never rounded to
255ths; in float32; on the first 200 images unless told otherwise (`RobustnessConfig`). Defences,
how they are attacked through, and what noise they are judged on: `ebmkit.evaluation.attacks` and
`ebmkit.evaluation.defences`. A defence with noise sums probabilities over ``draws`` draws, and each
gradient of its attacker over ``eot`` others. The *map* has the noise level as its second axis, as
CDN section 5.1 asks: row 0 is ``direct`` and row sigma is ``noise`` at that level.

An attack that fails may be a bad attack. Four signs of masked gradients (Athalye et al. 2018,
Carlini et al. 2019) are looked for, each of which makes a warning:

- ``few_steps``, ``one_step``, ``random_noise``: at one strength the full attack is set against PGD
  of a quarter of the steps, one step, and ten draws of noise of the same size. None may break more
  images than it, beyond chance (sign test on the images that only one of the two breaks, 1 %);
- ``gray``: in the ball of radius 1/2 (:math:`\ell_\infty`) or :math:`\sqrt d/2` (:math:`\ell_2`)
  every image can be turned into the gray one, which gets one label. So there no classifier is right
  more often than the share of the commonest label, and an attack that leaves more has failed;
- with ``autoattack``, the accuracy under AutoAttack and by how much PGD's is above it.

``robustness.json`` holds, beside the common entries (``images`` is the number attacked): ``chance``
and ``epsilons``, by norm; ``curves``, by norm and defence, a list of accuracies (with intervals)
over ``epsilons``; ``map``, by norm, a list of ``sigma`` and ``accuracy`` likewise; ``defences``,
what each is; and ``checks``, by norm and defence, what is said above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ebmkit.compile import in_float32
from ebmkit.energy import EnergyModel
from ebmkit.evaluation import masking
from ebmkit.evaluation.attacks import Attack, Norm, minimal_epsilons, rounds
from ebmkit.evaluation.autoattack import breaks as autoattack_breaks
from ebmkit.evaluation.autoattack import check_installed
from ebmkit.evaluation.context import EvaluationContext, Suite, check_classifies
from ebmkit.evaluation.data import Batch
from ebmkit.evaluation.defences import Defence, DefendedClassifier, image_noise
from ebmkit.evaluation.masking import norm_name, strength
from ebmkit.evaluation.robustness_config import RobustnessConfig
from ebmkit.evaluation.statistics import finite
from ebmkit.evaluation.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ROBUSTNESS", "RobustnessConfig", "draw", "run", "table"]

VALUES_PER_STEP = 32_768
"""Pixel values that one step of an attack takes at least, if there are as many: 512 digits."""

NOISE_TRIES = 10

FAR = 0.25
"""Root mean square per pixel, image units, by which a refinement may move images untold."""


def passes(setting: EvaluationContext) -> int:
    """Passes over the images: a PGD attack at one strength, with one draw of noise, is one."""
    config = setting.option(RobustnessConfig)
    total = 0
    for norm in config.norms:
        levels = len(config.strengths(norm)) - 1 + config.checks
        total += rounds(levels) * sum(_cost(d, config) for d in config.attacked())
        if config.checks or config.autoattack:
            total += sum(_cost(d, config) for d in config.curve().values())
    return total


def run(setting: EvaluationContext) -> dict[str, Any]:
    """Measure; see the module's text for what is returned.

    Raises:
        UserError: if AutoAttack is asked for and not installed, or an image leaves [0, 1].
    """
    config = setting.option(RobustnessConfig)
    if config.autoattack:
        check_installed()
    with in_float32(setting.device):
        work = _Work(setting, config)
        moved = {name: work.moved(d) for name, d in config.curve().items() if d.steps}
        warnings = _warnings(setting, config, moved)
        curves: dict[str, Any] = {}
        maps: dict[str, Any] = {}
        checks: dict[str, Any] = {}
        for norm in config.norms:
            found = {d: work.strengths(norm, d) for d in config.attacked()}
            grid = config.strengths(norm)
            curves[norm] = {n: _accuracies(found[d], grid) for n, d in config.curve().items()}
            maps[norm] = [
                {"sigma": d.sigma, "accuracy": _accuracies(found[d], grid)} for d in config.rows()
            ]
            checks[norm] = {}
            if config.checks or config.autoattack:
                for name, d in config.curve().items():
                    signs = work.checks(norm, d, found[d])
                    checks[norm][name] = signs.document
                    warnings += [f"{name}, {norm_name(norm)}: {doubt}" for doubt in signs.doubts]
    return {
        "images": work.count,
        "sigmas": list(config.noise_levels),
        "precision": "fp32",
        "compiled": False,
        "chance": 1 / setting.model.num_classes,
        "epsilons": {norm: list(config.strengths(norm)) for norm in config.norms},
        "defences": {
            name: {"about": d.description(setting.model.noise_conditional), "sigma": d.sigma}
            | ({"moved": finite(moved[name])} if name in moved else {})
            for name, d in config.curve().items()
        },
        "curves": curves,
        "map": maps,
        "checks": checks,
        "warnings": warnings,
    }


class _Work:
    """The attacks on the first images of a setting, shared among its processes."""

    def __init__(self, setting: EvaluationContext, config: RobustnessConfig) -> None:
        model = setting.exact_model
        assert isinstance(model, EnergyModel)
        self.setting, self.config, self.model = setting, config, model
        self.images = setting.images.first(min(config.images, len(setting.images)))
        self.count = len(self.images)
        self._exact, self._told = 0.0, 0

    def strengths(self, norm: Norm, defence: Defence) -> Tensor:
        """The smallest strength that breaks each image, (N,); beyond the grid, the gray radius."""
        epsilons = list(self.config.strengths(norm)[1:])
        if self.config.checks:
            epsilons.append(self._gray_radius(norm))
        cost = _cost(defence, self.config)

        def measure(batch: Batch) -> dict[str, Tensor]:
            assert batch.labels is not None
            found = minimal_epsilons(
                self._pgd(norm),
                self._target(defence),
                batch.x,
                batch.labels,
                epsilons,
                self._noise(batch.x, defence),
                str(self.setting.seed),
                partial(self._advance, cost, len(batch.x)),
            )
            return {"smallest": found}

        return self._columns(measure, defence, cost * rounds(len(epsilons)))["smallest"]

    def moved(self, defence: Defence) -> float:
        """Root mean square per pixel, image units, of how far ``defence`` refines clean images."""
        target = self._target(defence)

        def measure(batch: Batch) -> dict[str, Tensor]:
            noise = image_noise(batch.x, defence.noises, "moved") if defence.random else None
            return {
                "square": (target.refined(batch.x, noise) - batch.x).flatten(1).square().mean(1)
            }

        few = replace(self.setting, images=self.images, advance=lambda count: None)
        return float(few.columns(0.0, measure)["square"].double().mean().sqrt())

    def checks(self, norm: Norm, defence: Defence, smallest: Tensor) -> masking.MaskingChecks:
        """What speaks against the attack that gave ``smallest`` (N,)."""
        signs = masking.MaskingChecks(norm, smallest)
        epsilon = masking.telling_strength(smallest, self.config.strengths(norm))
        if epsilon is not None:
            signs.compare(epsilon, self._at(norm, defence, epsilon))
        if self.config.checks:
            assert self.images.labels is not None
            signs.gray(self._gray_radius(norm), self.images.labels)
        return signs

    def _at(self, norm: Norm, defence: Defence, epsilon: float) -> dict[str, Tensor]:
        """Which images (N,) each attack breaks at ``epsilon``."""
        pgd = self._pgd(norm)
        attacks = {"pgd": pgd}
        if self.config.checks:
            attacks["few_steps"] = replace(pgd, steps=max(1, pgd.steps // 4))
            attacks["one_step"] = Attack(norm, "one-step")
            attacks["random_noise"] = Attack(norm, "noise", restarts=NOISE_TRIES)
        cost = _cost(defence, self.config)

        def measure(batch: Batch) -> dict[str, Tensor]:
            x, labels, target = batch.x, batch.labels, self._target(defence)
            assert labels is not None
            noise, seed = self._noise(x, defence), f"check {self.setting.seed}"
            found = {
                name: attack.breaks(target, x, labels, epsilon, noise, seed)
                for name, attack in attacks.items()
            }
            if self.config.autoattack:
                found["autoattack"] = autoattack_breaks(
                    target, norm, x, labels, epsilon, noise, self.setting.seed
                )
            return found

        return self._columns(measure, defence, cost)

    def _columns(
        self, measure: Callable[[Batch], dict[str, Tensor]], defence: Defence, cost: int
    ) -> dict[str, Tensor]:
        """`EvaluationContext.columns` of attacked images; progress ends ``cost`` passes on."""
        end = self._exact + cost
        channels, (height, width) = self.images.channels, self.images.image_size
        rows = max(self.setting.batch_size, VALUES_PER_STEP // (channels * height * width))
        draws = self.config.eot if defence.random else 1
        share = math.ceil(self.count / self.setting.world.size)
        few = replace(
            self.setting,
            images=self.images,
            batch_size=max(1, min(rows // draws, share)),
            advance=lambda count: None,
        )
        columns = few.columns(0.0, measure)
        self._exact = end
        self._tell()
        return columns

    def _advance(self, passes: float, images: int) -> None:
        """Tell the setting that of so many passes so many images are done, by each process."""
        self._exact += passes * images * self.setting.world.size / self.count
        self._tell()

    def _tell(self) -> None:
        whole = int(self._exact * len(self.setting.images) + 1e-6) - self._told
        if whole:
            self._told += whole
            self.setting.left -= whole
            self.setting.advance(whole)

    def _gray_radius(self, norm: Norm) -> float:
        """The radius of the ball about any image that holds the gray one, 1/2 everywhere."""
        height, width = self.images.image_size
        return 0.5 if norm == "linf" else math.sqrt(self.images.channels * height * width) / 2

    def _pgd(self, norm: Norm) -> Attack:
        config = self.config
        return Attack(norm, "pgd", config.steps, config.restarts, config.stepsize)

    def _target(self, defence: Defence) -> DefendedClassifier:
        return DefendedClassifier(self.model, defence, self.config.eot if defence.random else 1)

    def _noise(self, x: Tensor, defence: Defence) -> Tensor | None:
        if not defence.random:
            return None
        seed = f"judged on {self.setting.seed} {defence.sigma:.9g}"
        return image_noise(x, self.config.averaged(defence) * defence.noises, seed)


def draw(setting: EvaluationContext, document: dict[str, Any], folder: Path) -> None:
    """Write ``robustness.png`` and, unless there is one noise level, ``robustness-map.png``."""
    from ebmkit.plots import robustness as pictures

    pictures.accuracy_against_strength(document, folder / "robustness.png")
    if any(document["map"].values()):
        pictures.strength_and_noise(document, folder / "robustness-map.png")


def table(document: dict[str, Any]) -> Table:
    """Accuracy at each strength, a column per defence, with intervals where there are up to two;
    below, in the gray ball and under AutoAttack."""
    from rich.text import Text

    names = list(document["defences"])
    few = len(names) <= 2
    heads = [f"{name}, % (95 %)" if few else name for name in names]
    result = new_table(document, ("norm", "strength", *heads))
    if not few:
        told = "accuracy in %; 95 % intervals: robustness.json"
        result.caption = Text.assemble(told, *(("\n", result.caption) if result.caption else ()))
    cell = _cell if few else _value
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


def _cell(estimate: dict[str, Any]) -> str:
    low, high = (100 * estimate[key] for key in ("low", "high"))
    return f"{_value(estimate)} ({low:.0f} to {high:.0f})"


def _value(estimate: dict[str, Any]) -> str:
    return f"{100 * estimate['value']:.1f}"


def _cost(defence: Defence, config: RobustnessConfig) -> int:
    """Passes for one attack on ``defence``; a gradient through a score takes three more."""
    scores = 1 if defence.denoises else defence.steps
    return (config.eot if defence.random else 1) * (1 + 3 * scores)


def _accuracies(smallest: Tensor, grid: tuple[float, ...]) -> list[dict[str, Any]]:
    return [masking.share(smallest > epsilon) for epsilon in grid]


def _warnings(
    setting: EvaluationContext, config: RobustnessConfig, moved: dict[str, float]
) -> list[str]:
    found = [
        f"{name} moves images by {rms:.3g} a pixel (root mean square, image units): steps of "
        f"{config.refine_step_size:g} are too large for this model's score; set "
        "robustness.refine_step_size to about the square of its lowest noise level"
        for name, rms in moved.items()
        if not rms <= FAR
    ]
    card = setting.model.card
    if card is None or card.sigma_range is not None:
        return found
    names = [name for name, d in config.curve().items() if d.denoises]
    return found + [
        f"{name}: this model was not trained to denoise (its objective is {card.objective!r})"
        for name in names
    ]


ROBUSTNESS = Suite(
    description="accuracy under l_inf and l2 attacks (PGD), and a map over attack "
    "strength and noise level",
    check=check_classifies,
    passes=passes,
    run=run,
    draw=draw,
    table=table,
    options=RobustnessConfig,
)
