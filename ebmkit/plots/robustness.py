"""Pictures of the suite robustness: accuracy against attack strength, alone and beside noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ebmkit.noise import in_255ths
from ebmkit.plots.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    images_of,
    new_figure,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["accuracy_against_strength", "compare", "grid", "strength_and_noise"]

LOOKS = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "--"),
    (GREEN, "^", "-."),
    (PURPLE, "D", ":"),
    (SKY, "v", "-"),
    ("black", "P", "--"),
)
SYMBOLS = {"linf": r"$\ell_\infty$", "l2": r"$\ell_2$"}
UNITS = {"linf": "1/255", "l2": "image units"}

Points = Sequence[tuple[float, float]]
"""Strength (image units) and accuracy (0..1)."""


def accuracy_against_strength(document: dict[str, Any], path: Path) -> None:
    """Accuracy against attack strength, one panel per norm, one line per defence.

    Args:
        document: as in ``robustness.json``.
        path: the PNG file.
    """
    norms = list(document["curves"])
    figure = new_figure(0.6 + 4.3 * len(norms), 4.3, layout="constrained")
    for number, norm in enumerate(norms):
        axes = figure.add_subplot(1, len(norms), number + 1)
        for look, (name, curve) in enumerate(document["curves"][norm].items()):
            label = f"{name}: {document['defences'][name]['about']}"
            _line(axes, norm, document["epsilons"][norm], curve, label, look)
        _finish(axes, norm, document["chance"])
    figure.suptitle(f"Accuracy under PGD attacks: {images_of(document)}, bands 95 %", fontsize=11)
    _legend(figure, columns=1)
    save_figure(figure, path)


def strength_and_noise(document: dict[str, Any], path: Path) -> None:
    """Accuracy over attack strength and the level of the noise that the classifier adds.

    Args:
        document: as in ``robustness.json``, with a map.
        path: the PNG file.
    """
    norms = [norm for norm, rows in document["map"].items() if rows]
    wide = max(len(document["epsilons"][norm]) for norm in norms)
    tall = max(len(document["map"][norm]) for norm in norms)
    figure = new_figure(
        1.8 + len(norms) * (1.0 + 0.5 * wide), 1.7 + 0.42 * tall, layout="constrained"
    )
    panels = []
    for number, norm in enumerate(norms):
        axes = figure.add_subplot(1, len(norms), number + 1)
        panels.append(axes)
        rows = document["map"][norm]
        values = np.array([[100 * e["value"] for e in row["accuracy"]] for row in rows])
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, origin="lower", aspect="auto")
        for (i, k), value in np.ndenumerate(values):
            colour = "black" if value > 50 else "white"
            axes.text(k, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(
            range(values.shape[1]), [_strength(norm, e) for e in document["epsilons"][norm]]
        )
        axes.set_yticks(range(len(rows)), [in_255ths(row["sigma"]) for row in rows])
        axes.set(
            xlabel=f"{SYMBOLS[norm]} strength of the attack ({UNITS[norm]})",
            ylabel="noise added, sigma (1/255)",
        )
    figure.colorbar(image, ax=panels, label="accuracy (%)")
    figure.suptitle(
        f"Accuracy under PGD attacks and added noise: {images_of(document)}", fontsize=11
    )
    save_figure(figure, path)


def grid(document: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """Accuracy against the test radius, one line per network, the thesis's thin beside them.

    Args:
        document: as in ``robustness-grid.json``.
        names: of its columns.
        path: the PNG file.
    """
    norm = document["norm"]
    figure = new_figure(5.6, 4.6, layout="constrained")
    axes = figure.add_subplot()
    colours: dict[float, str] = {}
    theirs = document["thesis"]
    for look, (name, column) in enumerate(zip(names, document["columns"], strict=True)):
        _line(axes, norm, document["epsilons"], column["accuracy"], name, look)
        if column["trained"] is not None:
            colours.setdefault(column["trained"][1], LOOKS[look % len(LOOKS)][0])
    for radius in sorted({e["train"] for e in theirs} & colours.keys()):
        points = sorted((e["test"], e["accuracy"]) for e in theirs if e["train"] == radius)
        x, y = np.array(points, dtype=float).T
        label = f"trained {radius:g}, thesis (ResNet-50)"
        axes.plot(x, 100 * y, color=colours[radius], ls=":", lw=0.9, label=label)
    _finish(axes, norm, document["chance"])
    figure.suptitle(f"Accuracy under PGD attacks: {images_of(document)}, bands 95 %", fontsize=10)
    _legend(figure, columns=2)
    save_figure(figure, path)


def compare(
    documents: Mapping[str, dict[str, Any] | None],
    path: Path,
    paper: Mapping[str, Mapping[str, Points]] | None = None,
    defence: str = "direct",
) -> None:
    """Several models in one figure, as in CDN figure 4: one panel per norm, one line per model.

    Args:
        documents: by the model's name, as in ``robustness.json``; None is told as "not run".
        path: the PNG file.
        paper: published points by model and norm (``linf``, ``l2``), if any, in thin lines.
        defence: whose curve is shown.
    """
    run = {name: d for name, d in documents.items() if d is not None and _has(d, defence)}
    norms = [n for n in SYMBOLS if any(n in d["curves"] for d in run.values())] or list(SYMBOLS)
    figure = new_figure(0.6 + 4.3 * len(norms), 4.3, layout="constrained")
    for number, norm in enumerate(norms):
        axes = figure.add_subplot(1, len(norms), number + 1)
        for look, name in enumerate(documents):
            colour, marker, style = LOOKS[look % len(LOOKS)]
            if name not in run:
                axes.plot([], [], marker, ls=style, color=colour, label=f"{name}: not run")
            elif norm in run[name]["curves"]:
                document = run[name]
                curve = document["curves"][norm][defence]
                label = f"{name} ({images_of(document)})"
                _line(axes, norm, document["epsilons"][norm], curve, label, look)
            points = (paper or {}).get(name, {}).get(norm)
            if points:
                x, y = np.array(points, dtype=float).T
                x = x * (255 if norm == "linf" else 1)
                axes.plot(
                    x, 100 * y, color=colour, ls=style, lw=0.8, alpha=0.6, label=f"{name}, paper"
                )
        chances = {document["chance"] for document in run.values()}
        _finish(axes, norm, chances.pop() if len(chances) == 1 else None)
    shown = "" if defence == "direct" else f", defence {defence}"
    figure.suptitle(f"Accuracy under PGD attacks{shown}, bands 95 %", fontsize=11)
    _legend(figure, columns=1)
    save_figure(figure, path)


def _line(
    axes: Axes,
    norm: str,
    epsilons: Sequence[float],
    curve: Sequence[dict[str, Any]],
    label: str,
    look: int,
) -> None:
    """One accuracy with its 95 % interval."""
    colour, marker, style = LOOKS[look % len(LOOKS)]
    x = np.array(epsilons) * (255 if norm == "linf" else 1)
    value, low, high = (100 * np.array([e[k] for e in curve]) for k in ("value", "low", "high"))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.plot(x, value, marker, ls=style, color=colour, ms=4, lw=1.4, label=label)


def _finish(axes: Axes, norm: str, chance: float | None) -> None:
    if chance is not None:
        axes.axhline(100 * chance, color=GRAY, ls=":", lw=1, label="chance")
    axes.set(
        xlabel=f"{SYMBOLS[norm]} strength of the attack ({UNITS[norm]})",
        ylabel="accuracy (%)",
        ylim=(0, 102),
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, lw=0.5)


def _legend(figure: Any, columns: int) -> None:
    """One legend for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _strength(norm: str, epsilon: float) -> str:
    return in_255ths(epsilon) if norm == "linf" else f"{epsilon:.3g}"


def _has(document: dict[str, Any], defence: str) -> bool:
    return any(defence in curves for curves in document["curves"].values())
