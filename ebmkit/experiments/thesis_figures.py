r"""Figures of the thesis (RCG) that need no network: one command each, at every scale.

- ``rcg-fig2.6``: naive and annealed Langevin dynamics on a mixture with a rare mode. Both have the
  same start, the same number of steps and, at the last noise level, the same target.
- ``rcg-fig2.8``: the linear and the cosine schedule, and an image under both.
- ``rcg-fig4.10``, ``-4.11``, ``-4.13``, ``-4.17``: the guidance schedules g(t) of
  :math:`\hat\epsilon = \epsilon - s\, g(t)\, \nabla_{x_t}(\dots)` (`ebmkit.guidance.guides`) on the
  linear noise schedule. Samples by them are part of ``ebmkit reproduce guidance``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.analytic import GaussianMixture
from ebmkit.compute import environment
from ebmkit.energy import Noise
from ebmkit.experiments.report import Experiment, Report, table_lines, text_of
from ebmkit.experiments.runs import ExperimentRuns, read_data
from ebmkit.guidance import parse_schedule
from ebmkit.noise import Schedule, make_schedule, require_sigma
from ebmkit.plots import (
    BLUE,
    GRAY,
    ORANGE,
    annotate,
    legend_below,
    look,
    new_figure,
    save_figure,
    show_image,
)
from ebmkit.sampling import AnnealedLangevin, Chains, Langevin, Sampler, geometric_sigmas
from ebmkit.sampling.langevin import AnnealedConfig

_DATA = read_data("thesis.yaml")
SCHEDULE_FIGURES: dict[str, dict[str, Any]] = _DATA["schedules"]
"""By name: ``title``, text forms of the ``schedules``, guidance methods with such ``samples``; and
for samples beside the curve ``eta`` and ``scale`` s."""

SHOWN_TIMESTEPS = (0, 100, 250, 500, 650, 750, 900, 999)
"""Timesteps of the tables."""

# --- figure 2.6 ----------------------------------------------------------------------------------

SPAN = 8.0
"""Chains start uniformly in [-SPAN, SPAN]^2."""

WEIGHTS = (0.8, 0.2)
HIGHEST, LOWEST = 20.0, 0.3
"""Noise levels: the highest merges the modes, the last adds a tenth to their variance of 1."""

INNER, RATE, SHOWN = 20, 0.2, 1500


def rare_mode() -> GaussianMixture:
    """Frequent mode at (5, 5), rare mode at (-5, -5), variance 1 (Song & Ermon 2019, figure 3)."""
    return GaussianMixture(torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 1.0, weights=WEIGHTS)


def langevin_on_mixture(
    chains: int, levels: int, seed: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run both samplers for ``levels`` * `INNER` steps; also draw exact samples.

    Returns:
        The document, with ``shares`` of the modes (mean posteriors, whose expectations are the
        weights of the mixture), and the final points (chains, 2), both by sampler.
    """
    mixture = rare_mode()
    sigmas = geometric_sigmas(HIGHEST, LOWEST, levels)
    config = AnnealedConfig(steps=levels * INNER, inner=INNER, rate=RATE)

    def score(y: Tensor, sigma: Noise | None = None) -> Tensor:
        """Tweedie's formula, with the denoiser in closed form: no derivatives."""
        sigma = require_sigma(sigma)
        found: Tensor = (mixture.posterior_mean(y, sigma) - y) / sigma**2
        return found

    samplers: dict[str, Sampler[Any]] = {
        "naive": Langevin(score, RATE * LOWEST**2, sigma=LOWEST),
        "annealed": AnnealedLangevin(score, sigmas, config),
    }
    clean, _ = mixture.sample(chains, torch.Generator().manual_seed(seed))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 1))
    ends = {"exact": clean + LOWEST * noise}
    for name, sampler in samplers.items():
        generator = torch.Generator().manual_seed(seed + 2)
        start = SPAN * (2 * torch.rand(chains, 2, generator=generator) - 1)
        ends[name] = Chains(sampler, sampler.init(start)).run(config.steps, generator).x
    shares = {
        name: mixture(x, LOWEST).logits.softmax(1).mean(0).tolist() for name, x in ends.items()
    }
    document = {
        "chains": chains,
        "steps": config.steps,
        "levels": levels,
        "sigma": [HIGHEST, LOWEST],
        "step_size": {"naive": RATE * LOWEST**2, "annealed": f"{RATE:g} sigma^2"},
        "weights": WEIGHTS,
        "standard_error": math.sqrt(math.prod(WEIGHTS) / chains),
        "shares": shares,
    }
    return document, ends


TITLES = {"exact": "the mixture", "naive": "naive Langevin", "annealed": "annealed Langevin"}


def run_fig26(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Figure 2.6."""
    amount = _DATA["amounts"][runs.scale.size]
    document, ends = langevin_on_mixture(amount["chains"], amount["levels"], seed_of(runs))
    error = document["standard_error"]
    rows = [
        [title, *(f"{share:.3f}" for share in document["shares"][name])]
        for name, title in TITLES.items()
    ]
    lines = [
        f"{document['chains']:,} chains of {document['steps']:,} steps, from the same points, even "
        f"over the square of side {2 * SPAN:g}. Naive: at noise level {LOWEST:g} alone. Annealed: "
        f"{INNER} steps at each of {document['levels']} levels from {HIGHEST:g} to {LOWEST:g}. "
        "Naive chains go to the nearer mode and stay there; annealed chains find the weights.",
        "",
        *table_lines(["points", *(f"mode of weight {w:g}" for w in WEIGHTS)], rows),
        "",
        f"Standard error of a share: {error:.3f}.",
    ]
    title = "Figure 2.6: naive and annealed Langevin dynamics (RCG figure 2.6)"
    notes = [f"seed: {seed_of(runs)}", "scores in closed form; data: drawn from the mixture"]
    return _report(
        runs, "rcg-fig2.6", title, document, lines, notes, partial(_draw_fig26, ends=ends)
    )


def _draw_fig26(document: Mapping[str, Any], path: Path, ends: Mapping[str, Tensor]) -> None:
    figure = new_figure(9.6, 3.9, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3, sharey=True), TITLES.items(), strict=True):
        x = ends[name][:SHOWN]
        colours = [ORANGE if rare else BLUE for rare in (x.sum(1) < 0).tolist()]
        axes.plot([-SPAN, SPAN], [SPAN, -SPAN], color=GRAY, lw=0.7, ls=":")
        axes.scatter(x[:, 0], x[:, 1], s=3, c=colours, alpha=0.5, linewidths=0)
        share = document["shares"][name][1]
        limits = (-SPAN - 1, SPAN + 1)
        annotate(axes, f"{title}\nrare mode: {share:.1%}", xlim=limits, ylim=limits, aspect="equal")
        axes.set(xticks=(-8, -4, 0, 4, 8), yticks=(-8, -4, 0, 4, 8))
        axes.tick_params(labelsize=8)
    shown = min(SHOWN, document["chains"])
    figure.supxlabel(
        f"{document['chains']:,} chains ({shown:,} drawn), {document['steps']:,} steps each, "
        f"started evenly over the square of side {2 * SPAN:g}",
        fontsize=8.5,
    )
    save_figure(figure, path)


# --- figure 2.8 ----------------------------------------------------------------------------------

STRIP = 9
"""Number of timesteps at which the image is shown, from 0 to T - 1."""


def run_fig28(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Figure 2.8: noise by timestep, and an image at some timesteps."""
    schedules = {name: make_schedule(name) for name in ("linear", "cosine")}
    timesteps = [round(i * 999 / (STRIP - 1)) for i in range(STRIP)]
    document: dict[str, Any] = {"timesteps": list(range(1000)), "shown": timesteps}
    halves = {}
    for name, schedule in schedules.items():
        abar = [schedule.abar(t) for t in range(1000)]
        document[name] = {"abar": abar, "noise": [math.sqrt(1 - share) for share in abar]}
        halves[name] = next(t for t, share in enumerate(abar) if share < 0.5)
    document["half"] = halves
    rows = [
        [t, *(f"{document[name][kind][t]:.4f}" for kind in ("abar", "noise") for name in schedules)]
        for t in SHOWN_TIMESTEPS
    ]
    heads = [f"{kind}, {name}" for kind in ("abar", "sqrt(1 - abar)") for name in schedules]
    lines = [
        "x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps: the noise level sqrt(1 - abar) of the linear "
        "(Ho et al. 2020) and the cosine schedule (Nichol & Dhariwal 2021), T = 1000. Half of the "
        f"variance is noise from timestep {halves['linear']} (linear) or {halves['cosine']} "
        "(cosine) on: the cosine schedule keeps the image for longer.",
        "",
        *table_lines(["t", *heads], rows, left=0),
    ]
    title = "Figure 2.8: linear and cosine schedule (RCG figure 2.8)"
    notes = [f"seed of the noise in the pictures: {seed_of(runs)}"]
    draw = partial(_draw_fig28, schedules=schedules, seed=seed_of(runs))
    return _report(runs, "rcg-fig2.8", title, document, lines, notes, draw)


def photograph(side: int = 64) -> Tensor:
    """A photograph (3, side, side) in [0, 1] that scikit-learn includes."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1) / 255
    square = image[:, :384, 128:512]
    return torch.nn.functional.interpolate(square[None], (side, side), mode="area")[0]


def _draw_fig28(
    document: Mapping[str, Any], path: Path, schedules: Mapping[str, Schedule], seed: int
) -> None:
    figure = new_figure(9.6, 5.6, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.25])[:, 0]
    x = photograph()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    grid = above.subplots(2, STRIP)
    for axes, (name, schedule) in zip(grid, schedules.items(), strict=True):
        for panel, t in zip(axes, document["shown"], strict=True):
            abar = schedule.abar(t)
            u = math.sqrt(abar) * (2 * x - 1) + math.sqrt(1 - abar) * noise
            show_image(panel, (u + 1) / 2, "", f"t = {t}" if name == "linear" else "")
        axes[0].set_ylabel(name, fontsize=9)
    panels = zip(
        below.subplots(1, 2),
        (("abar", "$\\bar\\alpha_t$, share of the image"),
         ("noise", "$\\sqrt{1 - \\bar\\alpha_t}$, noise level")),
        strict=True,
    )  # fmt: skip
    for axes, (kind, label) in panels:
        for number, name in enumerate(schedules):
            style = look(number) | {"marker": ""}
            axes.plot(document["timesteps"], document[name][kind], label=name, **style)
        annotate(axes, label, "timestep t", xlim=(0, 1000), ylim=(0, 1.03))
        axes.grid(alpha=0.25, lw=0.5)
        axes.tick_params(labelsize=8)
        axes.legend(frameon=False, fontsize=8.5, loc="best")
    save_figure(figure, path)


# --- guidance schedules --------------------------------------------------------------------------

EXACT = "power:k=0.5"
FORMULAS = {
    "power": "g(t) = (1 - abar_t)^{k:g}",
    "sigmoid": "g(t) = (1 - {y0:g}) / (1 + exp(-{k:g} (t - {t0:g}))) + {y0:g}",
    "linear": "g(t) = t / 1000",
}


def schedule_curves(schedules: Sequence[str]) -> dict[str, Any]:
    """g(t) of the ``schedules`` at t = 0, ..., 999 on the linear noise schedule, and the exact one.

    Returns:
        ``timesteps``; ``exact``, sqrt(1 - abar); ``curves``, each with ``schedule`` (its text
        form), ``formula`` and ``g``.
    """
    noise = make_schedule("linear")
    t = torch.arange(len(noise), dtype=torch.float64)
    abar = torch.tensor([noise.abar(k) for k in range(len(noise))], dtype=torch.float64)
    curves = []
    for text in schedules:
        own = parse_schedule(text)
        formula = FORMULAS[own.name].format(**own.model_dump())
        g = own.factor(t, abar, len(noise)).tolist()
        curves.append({"schedule": str(own), "formula": formula, "g": g})
    return {
        "timesteps": list(range(len(noise))),
        "exact": (1 - abar).sqrt().tolist(),
        "curves": curves,
    }


def run_schedules(name: str, runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """The figure ``name`` of `SCHEDULE_FIGURES`."""
    about = SCHEDULE_FIGURES[name]
    document = schedule_curves(about["schedules"]) | {
        k: about[k] for k in ("eta", "scale") if k in about
    }
    curves, scale = document["curves"], about.get("scale")
    heads = ["t", *(f"`{curve['schedule']}`" for curve in curves)]
    heads += [f"times s = {scale:g}"] if scale else []
    beside = all(curve["schedule"] != EXACT for curve in curves)
    heads += ["exact: sqrt(1 - abar)"] if beside else []
    rows = []
    for t in SHOWN_TIMESTEPS:
        values = [curve["g"][t] for curve in curves]
        values += [scale * value for value in values] if scale else []
        values += [document["exact"][t]] if beside else []
        rows.append([t, *(f"{value:.4g}" for value in values)])
    lines = ["On the linear noise schedule, T = 1000; sampling goes from t = 999 to 0."]
    lines += ["", *(f"- `{curve['schedule']}`: {curve['formula']}" for curve in curves), ""]
    lines += table_lines(heads, rows, left=0)
    number = name.removeprefix("rcg-fig")
    notes = [f"samples: method {about['samples']} of `ebmkit reproduce guidance`"]
    if scale:
        notes.append(f"samples in the thesis: s = {scale:g}, eta = {about['eta']:g}")
    title = f"Figure {number}: {about['title']} (RCG figure {number})"
    return _report(runs, name, title, document, lines, notes, _draw_schedules)


def _draw_schedules(document: Mapping[str, Any], path: Path) -> None:
    curves, t = document["curves"], document["timesteps"]
    figure = new_figure(
        4.4 * len(curves) if len(curves) == 1 else 3.4 * len(curves), 3.6, "constrained"
    )
    grid = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, curve in zip(grid, curves, strict=True):
        if curve["schedule"] != EXACT:
            label = "exact: $\\sqrt{1 - \\bar\\alpha_t}$"
            axes.plot(t, document["exact"], color=GRAY, ls="--", lw=1.0, label=label)
        axes.plot(t, curve["g"], color=BLUE, lw=1.8, label=curve["schedule"])
        annotate(
            axes,
            curve["formula"],
            "timestep t (sampling: right to left)",
            xlim=(0, 1000),
            ylim=(0, 1.03),
        )
        axes.title.set_fontsize(8.5)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, lw=0.5)
        legend_below(axes, 2)
    grid[0].set_ylabel("guidance schedule g(t)")
    save_figure(figure, path)


# --- all -----------------------------------------------------------------------------------------


def seed_of(runs: ExperimentRuns) -> int:
    """Seed of what the targets of the thesis draw."""
    return runs.seed


def _report(
    runs: ExperimentRuns,
    name: str,
    title: str,
    document: dict[str, Any],
    lines: Sequence[str],
    notes: Sequence[str],
    draw: Any,
) -> Report:
    own = environment()
    command = runs.command(name)
    notes = [*notes, f"command: `{command}`", f"PyTorch {own['torch']}; commit {own['git_commit']}"]
    document = {
        **document,
        "title": title,
        "lines": list(lines),
        "notes": notes,
        "command": command,
        "made": {k: own[k] for k in ("torch", "git_commit")},
    }
    return Report(document, {f"{name}.png": partial(draw, document)})


def figure_text(document: Mapping[str, Any]) -> str:
    """The document of a figure as Markdown."""
    return text_of(document["title"], document["lines"], document["notes"])


THESIS_FIGURES = {
    "rcg-fig2.6": Experiment(
        "naive and annealed Langevin dynamics on a mixture", run_fig26, figure_text
    ),
    "rcg-fig2.8": Experiment("linear and cosine noise schedule", run_fig28, figure_text),
    **{
        name: Experiment(about["title"], partial(run_schedules, name), figure_text)
        for name, about in SCHEDULE_FIGURES.items()
    },
}
"""The figures, by name."""
