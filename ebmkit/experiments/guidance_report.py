"""Report of the experiment ``guidance``: Markdown tables and plots."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.evaluation.robustness_grid import column_names
from ebmkit.evaluation.suite import number
from ebmkit.experiments.report import (
    mark,
    mean_and_deviation,
    percent,
    spread,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import read_data
from ebmkit.experiments.seeds import p_value, rule
from ebmkit.guidance.guides import CLASSIFIER_FREE
from ebmkit.plots import (
    BLUE,
    GRAY,
    ORANGE,
    annotate,
    class_ticks,
    new_figure,
    save_figure,
    show_image,
)

_DATA = read_data("guidance.yaml")
GROUPS: dict[str, str] = _DATA["groups"]
"""Titles of the groups of methods."""
COLUMNS = (
    "s", "eta", "clip", "recognised", "distance (real)", "diversity", "saturated", "gap", "time",
)  # fmt: skip
STATED = tuple(method["name"] for method in _DATA["methods"] if "figure" in method)
"""Methods of which the thesis shows images, in the order of its figures."""
SUMMARY = ("unguided", "by plain", "energy", "step", "sees clean (joint)", "free 3")
"""Methods in the short plot of samples, one of each kind."""
SHOWN = ("recognised", "distance", "diversity", "saturated", "gap")
"""Figures of a method in the plot."""
FIGURE_4_15 = ("sigmoid 500", "dual")
"""Methods whose energies by class the thesis shows."""


def guidance_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    networks = []
    for one in report["networks"]:
        facts, cell = one["facts"], "-"
        accuracies = list(one.get("by_seed", {}).values())  # earlier reports: one seed
        if len(accuracies) > 1:
            cell = percent(mean_and_deviation(accuracies), "{:.1f}")
        elif one["accuracy"] is not None:
            low, high = one["interval"]
            cell = percent({"value": one["accuracy"], "low": low, "high": high}, "{:.1f}")
        counts = [f"{facts[key]:,}" for key in ("parameters", "steps")]
        networks.append([one["name"], one["label"], cell, *counts])
    names = ["name", "what", "accuracy, %", "parameters", "steps"]
    lines = [f"Scale: {report['about']}.", "", "### Networks", ""]
    lines += table_lines(names, networks, left=2)
    sections: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
        ("grid", "Robust accuracy (RCG table 4.1)", _grid),
        ("path", "Along the diffusion (RCG figures 4.5, 4.6, 4.9)", _path),
        ("ways", "Guidance methods", partial(_methods, report["amount"])),
        ("orderings", "Orderings of the thesis", _orderings),
    )
    for key, title, section in sections:
        if report.get(key):
            lines += ["", f"### {title}", "", *section(report[key])]
    title = f"Guidance of a diffusion model, on {report['dataset']} (RCG chapter 4)"
    return text_of(title, lines, report["notes"])


def _grid(document: dict[str, Any]) -> list[str]:
    rows = (
        [f"{epsilon:g}", *(percent(column["accuracy"][row]) for column in document["columns"])]
        for row, epsilon in enumerate(document["epsilons"])
    )
    return [
        f"Accuracy in % (95 % interval) on {document['options']['images']} test images at most, "
        f"{document['options']['steps']}-step PGD; rows: eps of the attack.",
        "",
        *table_lines(["eps", *column_names(document)], rows, left=0),
    ]


def _path(document: Mapping[str, Any]) -> list[str]:
    models = document["models"]
    levels = next(iter(models.values()))["path"]["timestep"]

    def nearest(t: int) -> int:
        return min(range(len(levels)), key=lambda i: abs(levels[i]["t"] - t))

    chosen, middle = [nearest(t) for t in (100, 200, 400)], nearest(500)
    heads = [f"{view}, t = {levels[i]['t']}" for view in ("x_t", "y") for i in chosen]
    dark = f"dark, t = {levels[middle]['t']}"
    rows = []
    for name, one in models.items():
        path, since = one["path"], one["chance_from"]
        shown = [one["clean"], *(path[v][i] for v in ("timestep", "image") for i in chosen)]
        cells = [f"{100 * _value(e['accuracy']):.0f}" for e in [*shown, path["dark"][middle]]]
        cells += ["never" if since[v] is None else str(since[v]) for v in ("timestep", "image")]
        rows.append([name, *cells])
    return [
        f"Accuracy in % of {document['images']:,} test images: clean; noisy as the diffusion model "
        "has them (x_t) and in image units (y) at some timesteps; darkened alone at t = T/2. "
        "*Chance from*: the first timestep measured at which the interval reaches chance.",
        "",
        *table_lines(["network", "clean", *heads, dark, "chance from: x_t", "y"], rows),
    ]


def _methods(amount: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{amount['per_class']} images of each class, {amount['steps']} steps of DDIM, all methods "
        "from the same starting noise. *Clip*: whether the predicted clean image is clipped to "
        "[0, 1] at each step, which the thesis does not do (algorithm 6); final images are clamped "
        "to [0, 1] for storing. *Recognised*: the evaluation classifier predicts the "
        "requested class, % (95 % interval). *Distance*: Frechet distance in its features to real "
        "images of the class, mean over classes; of few images it is biased upwards, and *real* is "
        "that of as many real images. *Diversity*: 1 if images of a class differ as real ones do. "
        "*Saturated*: pixel values at the ends of the range, %, real images' in brackets. "
        "*Gap*: mean E(x) under the most robust classifier, minus real images', nats. "
        "*Time*: seconds per image. Scales s are the thesis's times "
        f"{amount['strength']:g}, where they are not 1.",
    ]
    seeds = max(len(method.get("by_seed", {})) for method in methods)
    if seeds > 1:
        lines[0] += (
            f" Cells are mean ± standard deviation over {seeds} seeds of networks and noise."
        )
    for guide, own in amount.get("options", {}).items():
        values = ", ".join(f"{name} = {value}" for name, value in own.items())
        lines[0] += f" At this scale {guide} has {values}."
    for group, title in GROUPS.items():
        rows = [_method_cells(method) for method in methods if method["group"] == group]
        if rows:
            table = table_lines(["method", "description", *COLUMNS], rows, left=2)
            lines += ["", f"#### {title}", "", *table]
    return lines


def _method_cells(method: Mapping[str, Any]) -> list[str]:
    scale = f"{method['settings']['scale']:g}" if method["settings"] else ""
    about = method["about"].replace("|", "\\|")
    clip = "yes" if method.get("clip", True) else "no"  # older reports: always
    if "stopped" not in method and method.get("missing_seeds"):
        done, missing = len(method["by_seed"]), len(method["missing_seeds"])
        about += f", {done} of {done + missing} seeds"
    head = [method["name"], about, scale, f"{method['eta']:g}", clip]
    if "stopped" in method:
        return [*head, method["stopped"], *[""] * (len(COLUMNS) - 4)]
    found = mean_figures(method)
    recognised = found["recognised"]
    return [
        *head,
        "-" if _value(recognised) is None else percent(recognised),
        f"{spread(found['distance'], '{:.3g}')} ({spread(found['floor'], '{:.3g}')})",
        spread(found["diversity"], "{:.2f}"),
        f"{spread(found['saturated'], '{:.1f}')} ({number(found['real'], '{:.1f}')})",
        spread(found["gap"], "{:+.2f}"),
        spread(found["time"], "{:.2g}"),
    ]


def figures_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a measured method: numbers or None; ``recognised`` with its interval over images.

    Shares of saturated values, also of ``real`` images, are in percent, ``time`` in seconds per
    image; ``floor`` is the distance of real images.
    """
    means, ends, gap = found["means"], found["saturation"]["ends"], found["energy_gap"]
    return {
        "recognised": found["accuracy"],
        "distance": means["frechet"],
        "floor": means["floor"],
        "diversity": means["diversity"],
        "saturated": 100 * _value(ends["samples"]),
        "real": 100 * _value(ends["real"]),
        "gap": _value(gap["energy"]) if gap else None,
        "time": found["seconds"] / found["count"],
    }


def mean_figures(method: Mapping[str, Any]) -> dict[str, Any]:
    """`figures_of` ``method``, of several seeds their `mean_and_deviation` (or None)."""
    each = list(method.get("by_seed", {}).values())
    if len(each) < 2:
        return figures_of(method)
    values = {name: [_value(own[name]) for own in each] for name in each[0]}
    return {n: None if None in own else mean_and_deviation(own) for n, own in values.items()}


def _orderings(orderings: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = (
        [
            *(one["greater"], one["smaller"], one["metric"], one["source"]),
            *(f"{one['ours']:+.2f}", p_value(one), one["verdict"]),
        ]
        for one in orderings
    )
    return [
        "Comparisons of two methods in the thesis, which judges images by eye. *Ours*: mean "
        "difference of images from the same noise, *greater* minus *smaller* (points of %; gap: "
        "nats).",
        "",
        *table_lines(["greater", "smaller", "metric", "RCG", "ours", "p", "verdict"], rows, left=4),
        "",
        rule(orderings, "generated images"),
    ]


def overview(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table of rows that are chosen by a rule, not by their results.

    First the settings of which the thesis shows images (`STATED`), in the order of its figures;
    then no guidance; every guide with E(x, y) in one setting; and classifier-free guidance of the
    same diffusion model at every scale. ``methods`` is the entry ``ways`` of a report.
    """

    parts = (
        [method for name in STATED for method in methods if method["name"] == name],
        [method for method in methods if method["name"] == "unguided"],
        [m for m in methods if m["name"] == "energy" or m["group"] == "guides"],
        [
            m
            for m in methods
            if m["base"] == "diffusion" and m["settings"].get("guidance") == CLASSIFIER_FREE
        ],
    )
    rows = [_method_cells(method) for part in parts for method in part]
    names = ["method", "description", *COLUMNS]
    shown = [names.index(name) for name in names if name not in ("eta", "gap", "time")]
    return table_lines([names[i] for i in shown], ([row[i] for i in shown] for row in rows), left=2)


def _value(estimate: Any) -> Any:
    return estimate["value"] if isinstance(estimate, Mapping) else estimate


def samples_of_methods(
    methods: Sequence[tuple[str, str, Tensor]], path: Path, names: Sequence[str], note: str = ""
) -> None:
    """One row of images per method, one column per class, as the PNG file ``path``.

    Args:
        methods: name, description, and images uint8 (n, C, H, W), in the order of labels.
        path: the PNG file.
        names: class names in label order.
        note: text below the images.
    """
    columns = max(len(images) for _, _, images in methods)
    cell, left, head, foot = 0.6, 3.0, 0.3, 0.3 if note else 0.05  # inches
    figure = new_figure(left + cell * columns + 0.1, cell * len(methods) + head + foot)
    width, height = figure.get_size_inches()
    for row, (name, description, images) in enumerate(methods):
        top = height - head - cell * (row + 1)
        figure.text(
            (left - 0.08) / width,
            (top + cell / 2) / height,
            textwrap.fill(f"{name}: {description}", 46),
            ha="right",
            va="center",
            fontsize=7,
        )
        for column, image in enumerate(images):
            place = (left + cell * column) / width, top / height
            axes = figure.add_axes((*place, 0.94 * cell / width, 0.94 * cell / height))
            show_image(axes, image.float() / 255, "", names[column] if row == 0 else "")
            axes.title.set_fontsize(7)
    figure.text(0.1 / width, 0.1 / height, note, fontsize=7)
    save_figure(figure, path)


def compare_methods(methods: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy, distance by class, diversity, saturation and energy gap of each method."""
    figure = new_figure(14.0, 0.25 * len(methods) + 1.4, layout="constrained")
    axes = figure.subplots(1, 5, sharey=True)
    for at, method in enumerate(methods):
        found = mean_figures(method)
        for axis, name in zip(axes, SHOWN, strict=True):
            mark(axis, at, found[name])
        mark(axes[1], at, _value(found["floor"]), "|", ORANGE, 9)
        mark(axes[3], at, _value(found["real"]), "|", ORANGE, 9)
    titles = (
        "recognised by the evaluation classifier",
        "distance of a class (bar: real images)",
        "diversity (1: real images)",
        "saturated values, % (bar: real images)",
        "energy gap, nats (0: real images)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_xlabel(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color=GRAY, alpha=0.25, linewidth=0.5)
    axes[0].set_xlim(0, 1)
    axes[2].axvline(1, color=ORANGE, linewidth=0.8)
    axes[4].axvline(0, color=ORANGE, linewidth=0.8)
    axes[1].set_xlim(left=0)
    axes[0].set_yticks(range(len(methods)), [method["name"] for method in methods], fontsize=7)
    axes[0].invert_yaxis()
    several = any(len(method.get("by_seed", {})) > 1 for method in methods)
    save_figure(figure, path, "Mean and standard deviation over seeds" if several else "")


def energies_by_class(report: Mapping[str, Any], path: Path) -> None:
    """Plot mean and standard deviation of E(x) by class, as the PNG file ``path``.

    One panel for each method of `FIGURE_4_15`, of its images and of training images under the most
    robust classifier, with the mean and standard deviation of all its images; then one per
    classifier, of training images (RCG figure 4.12).
    """
    found = report["classes"]
    known = {name: own for name, own in found["networks"].items() if "stopped" not in own}
    panels: list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]] = []
    for method in report["ways"]:
        own = method.get("energies_by_class") or {}
        if method["name"] in FIGURE_4_15 and "energy" in own and found["energy"] in known:
            title = f"images of {method['name']}, under {found['energy']}"
            panels.append((title, known[found["energy"]], own))
    panels += [(name, own, None) for name, own in known.items()]
    columns, names = min(2, len(panels)), found["names"]
    rows = -(-len(panels) // columns)
    width = max(3.4, 1.0 + 0.42 * len(names))
    figure = new_figure(width * columns, 0.9 + 2.6 * rows, layout="constrained")
    for place, (title, training, made) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        kinds = [("training images", training, BLUE, "o", -0.12)]
        kinds += [] if made is None else [("generated images", made, ORANGE, "s", 0.12)]
        for label, own, colour, marker, aside in kinds:
            x = [i + aside for i in range(len(own["energy"]))]
            look: dict[str, Any] = {"fmt": marker, "color": colour, "ms": 4, "elinewidth": 0.9}
            axes.errorbar(x, own["energy"], own["energy_std"], label=label, capsize=2, **look)
        if made is not None:
            mean, std = _pooled(made)
            axes.axhline(mean, color=ORANGE, ls="--", lw=1, label="generated, all classes")
            axes.axhspan(mean - std, mean + std, color=ORANGE, alpha=0.1, lw=0)
        class_ticks(axes, names, size=7)
        annotate(axes, title, y="" if place % columns else "E(x) (nats)")
        axes.grid(axis="y", alpha=0.25, lw=0.5)
    save_figure(figure, path, "E(x) by class, mean and standard deviation over images", legend=3)


def _pooled(energies: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and standard deviation of E(x) over the images of all classes."""
    count = sum(energies["images"])
    rows = list(zip(energies["images"], energies["energy"], energies["energy_std"], strict=True))
    mean = sum(n * value for n, value, _ in rows) / count
    square = sum(n * (std**2 + value**2) for n, value, std in rows) / count
    return mean, max(0.0, square - mean**2) ** 0.5
