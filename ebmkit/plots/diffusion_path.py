"""Pictures of the suite diffusion-path: accuracy and energies along a diffusion model's path."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

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
    show_image,
)
from ebmkit.terminal import shown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracies", "by_class", "energies"]

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, "black")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
LOOKS = tuple(zip(itertools.islice(itertools.cycle(COLOURS), 66), itertools.cycle(MARKERS)))
"""Colour and marker of each model; 6 and 11 have no common divisor, so 66 models differ."""

PANELS = {
    "noise": {"timestep": "x_t", "image": "image units, x + sigma eps"},
    "no noise": {"dark": "dark, sqrt(abar) x", "faded": "faded, x_t without noise"},
}
TITLES = {"noise": "Accuracy against noise", "no noise": "Accuracy against darkness and contrast"}
SHORT = {"timestep": "x_t"}
LINES = ("-", "--")
PANEL, LEFT, GAP, TALL = 4.5, 0.75, 0.75, 2.7

Strip = Sequence[tuple[int, Tensor]]
"""Timesteps, and an image (C, H, W) at each."""


def accuracies(document: dict[str, Any], strips: Mapping[str, Strip], path: Path) -> None:
    """Accuracy against the timestep, with noise and without, above an image as it is seen there.

    Args:
        document: of the suite diffusion-path.
        strips: by view, one image at timesteps evenly spread from the first to the last.
        path: the PNG file.
    """
    models = document["models"]
    cell = PANEL / max(1, len(strips["timestep"]))
    below = 0.62 + 2 * (cell + 0.05)
    legend = 0.45 + 0.2 * -(-len(models) // 4)
    width, height = 2 * (LEFT + PANEL) + 0.2, 0.65 + TALL + below + legend
    figure = new_figure(width, height)
    for column, (kind, views) in enumerate(PANELS.items()):
        left, bottom = LEFT + column * (PANEL + GAP), legend + below
        axes = figure.add_axes((left / width, bottom / height, PANEL / width, TALL / height))
        for (colour, marker), (name, found) in zip(itertools.cycle(LOOKS), models.items()):
            for line, view in zip(LINES, views, strict=True):
                _curve(axes, found["path"][view], colour, marker, line, name)
        _finish(axes, document, 0.5 * cell / PANEL)
        axes.set_title(TITLES[kind], fontsize=10)
        if column == 0:
            axes.set_ylabel("accuracy (%)")
        for row, view in enumerate(views):
            for k, (_, image) in enumerate(strips[view]):
                at = (left + k * cell, bottom - 0.62 - (row + 1) * cell - row * 0.05)
                own = figure.add_axes(
                    (at[0] / width, at[1] / height, 0.96 * cell / width, 0.96 * cell / height)
                )
                show_image(own, image, "", "")
                if k == 0:
                    own.set_ylabel(SHORT.get(view, view), fontsize=8, labelpad=3)
    figure.suptitle(f"{images_of(document)}, {_schedule(document)}, bands 95 %", fontsize=10)
    _legend(figure, models, PANELS)
    save_figure(figure, path)


def energies(document: dict[str, Any], path: Path) -> None:
    """Mean energies along the path as the model sees x_t, and the same in image units.

    Args:
        document: of the suite diffusion-path.
        path: the PNG file.
    """
    models = document["models"]
    figure = new_figure(10, 3.9 + 0.17 * len(models), layout="constrained")
    for column, (view, words) in enumerate(PANELS["noise"].items()):
        axes = figure.add_subplot(1, 2, column + 1)
        known = []
        for (colour, marker), (name, found) in zip(itertools.cycle(LOOKS), models.items()):
            rows = found["path"][view]
            for line, measure, symbol in zip(
                LINES, ("energy", "joint_energy"), ("E(x)", "E(x, y)"), strict=True
            ):
                points = [(r["t"], r[measure]) for r in rows if r[measure]["value"] is not None]
                values = [e["value"] for _, e in points]
                known += values
                axes.plot(
                    [t for t, _ in points],
                    values,
                    color=colour,
                    ls=line,
                    marker=marker,
                    ms=3.5,
                    label=f"{name}: {symbol}",
                )
        if _wide(known):
            axes.set_yscale("symlog", linthresh=max(1.0, float(np.median(np.abs(known)))))
        axes.set_title(f"Seen: {words}", fontsize=9.5)
        axes.set_xlabel("timestep t")
        axes.grid(alpha=0.25, lw=0.5)
        if column == 0:
            axes.set_ylabel("mean energy (nats)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(
        "Energies along the forward process, each model's up to a constant: "
        f"{images_of(document)}, {_schedule(document)}",
        fontsize=10,
    )
    save_figure(figure, path)


def by_class(document: dict[str, Any], path: Path) -> None:
    """Mean and standard deviation of E(x) of each class, of the data and of samples; by model.

    Args:
        document: of the suite diffusion-path.
        path: the PNG file.
    """
    models = document["models"]
    most = max(len(found["classes"]) for found in models.values())
    wide = max(3.4, 1.0 + 0.42 * most)
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure = new_figure(wide * columns, 0.9 + 2.8 * rows, layout="constrained")
    for number, (name, found) in enumerate(models.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        places = {c["label"]: k for k, c in enumerate(found["classes"])}
        _dots(axes, found["classes"], places, -0.12, BLUE, "o", "data")
        samples = found["samples"]
        if samples:
            own = samples["energy"]
            axes.axhline(own["value"] or 0.0, color=ORANGE, ls="--", lw=1, label="samples, all")
            if own["value"] is not None and own["std"] is not None:
                ends = own["value"] - own["std"], own["value"] + own["std"]
                axes.axhspan(*ends, color=ORANGE, alpha=0.1, lw=0)
            classes = [c for c in samples.get("classes", []) if c["label"] in places]
            _dots(axes, classes, places, 0.12, ORANGE, "s", "samples")
        names = [shown_name(c["name"]) for c in found["classes"]]
        slanted = most > 1 and max(len(n) for n in names) > 2
        axes.set_xticks(
            range(len(names)),
            names,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
            fontsize=7 if most > 20 else 8,
        )
        how = "-logsumexp of the logits" if found["reading"] == "logits" else "-log density"
        axes.set_title(f"{name} ({how})", fontsize=9)
        axes.grid(axis="y", alpha=0.25, lw=0.5)
        if number % columns == 0:
            axes.set_ylabel("E(x) (nats)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(
        f"E(x) by class, mean and standard deviation over images: {images_of(document)}",
        fontsize=9.5,
        wrap=True,
    )
    save_figure(figure, path)


def _curve(
    axes: Axes, rows: Sequence[dict[str, Any]], colour: str, marker: str, line: str, name: str
) -> None:
    t = [row["t"] for row in rows]
    value, low, high = (
        [100 * row["accuracy"][k] for row in rows] for k in ("value", "low", "high")
    )
    axes.fill_between(t, low, high, color=colour, alpha=0.13, lw=0)
    few = len(rows) < 30
    axes.plot(t, value, color=colour, ls=line, marker=marker if few else None, ms=3, label=name)


def _finish(axes: Axes, document: dict[str, Any], margin: float) -> None:
    """Limits so that the first and the last timestep stand over the middles of a strip's ends."""
    first, last = document["timesteps"][0], document["timesteps"][-1]
    span = max(1, last - first) / (1 - 2 * margin)
    axes.set_xlim(first - margin * span, last + margin * span)
    axes.axhline(100 * document["chance"], color=GRAY, ls=":", lw=1)
    axes.set(xlabel="timestep t", ylim=(0, 102))
    axes.grid(alpha=0.25, lw=0.5)


def _legend(
    figure: Figure, models: Mapping[str, Any], panels: Mapping[str, Mapping[str, str]]
) -> None:
    from matplotlib.lines import Line2D

    named = [
        Line2D([], [], color=colour, marker=marker, ms=4, label=name)
        for (colour, marker), name in zip(itertools.cycle(LOOKS), models)
    ]
    noise, plain = (list(views) for views in panels.values())
    styles = [
        Line2D([], [], color="black", ls=line, label=f"{SHORT.get(a, a)}; {b}")
        for line, a, b in zip(LINES, noise, plain, strict=True)
    ]
    styles.append(Line2D([], [], color=GRAY, ls=":", label="chance"))
    look: dict[str, Any] = {"loc": "lower center", "frameon": False, "fontsize": 8}
    figure.legend(handles=styles, ncols=3, **look)
    look["bbox_to_anchor"] = (0.5, 0.22 / figure.get_figheight())
    figure.legend(handles=named, ncols=4, **look)


def _dots(
    axes: Axes,
    classes: Sequence[dict[str, Any]],
    places: Mapping[int, int],
    aside: float,
    colour: str,
    marker: str,
    label: str,
) -> None:
    known = [c for c in classes if c["energy"]["value"] is not None]
    axes.errorbar(
        [places[c["label"]] + aside for c in known],
        [c["energy"]["value"] for c in known],
        [c["energy"]["std"] or 0.0 for c in known],
        fmt=marker,
        color=colour,
        ms=4,
        elinewidth=0.9,
        capsize=2,
        label=label,
    )


def _wide(values: Sequence[float]) -> bool:
    """Whether most of the ``values`` would lie on one line of a linear scale."""
    if not values:
        return False
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0])
    inner = np.quantile(values, 0.75) - np.quantile(values, 0.25)
    return bool(high - low > 30 * max(inner, 1e-12)) and bool(middle != 0)


def _schedule(document: dict[str, Any]) -> str:
    options = document["options"]
    return f"{options['schedule']} schedule of {options['steps']} steps"
