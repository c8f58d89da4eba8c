"""Pictures of a denoiser's Jacobian: eigenvectors, spectra, local linearity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ebmkit.noise import in_255ths
from ebmkit.plots.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    bars_within,
    images_of,
    legend_below,
    new_figure,
    save_figure,
    show_image,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "JacobianRow",
    "around_gray",
    "image_grid",
    "jacobian_grid",
    "linearity_curves",
    "linearity_grid",
    "magnification",
    "spectra",
]

PAPER_FACTOR = 500
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, GRAY)
MARKERS = ("o", "s", "^", "D", "v", "x")


class JacobianRow(NamedTuple):
    """One row of `jacobian_grid`: images (C, H, W), and eigenvectors (k, C, H, W).

    ``conditional`` is None for a model without labels.
    """

    x: Tensor
    y: Tensor
    unconditional: Tensor
    conditional: Tensor | None
    vectors: Tensor


def around_gray(image: Tensor, factor: float | None = None) -> Tensor:
    """``image`` times ``factor`` around gray; without one, its largest entry becomes 0 or 1."""
    if factor is None:
        factor = 0.5 / max(float(image.abs().max()), 1e-30)
    return 0.5 + factor * image


def magnification(difference: Tensor, factor: float = PAPER_FACTOR) -> float:
    """``factor``, or the largest of 1, 2, 5, 10, ... below it that does not saturate.

    A picture saturates where more than 1 % of the values of ``factor * difference`` leave
    [-1/2, 1/2].
    """
    size = difference.abs().flatten().double()
    most = float(size.quantile(0.99))
    if most * factor <= 0.5:
        return factor
    exponent = math.floor(math.log10(0.5 / most))
    steps = [m * 10.0**exponent for m in (1, 2, 5)]
    return max(step for step in steps if step * most <= 0.5 * (1 + 1e-9))


def image_grid(
    rows: int, columns: int, shape: tuple[int, int], gaps: Sequence[int] = (), head: float = 0.6
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` x ``columns`` pictures with room for labels.

    Args:
        rows: pictures per column.
        columns: pictures per row.
        shape: height and width of the pictures, in pixels.
        gaps: columns before which a gap is left.
        head: room above the pictures, inches.
    """
    widths: list[float] = []
    places = []
    for column in range(columns):
        if column in gaps:
            widths.append(0.14)
        places.append(len(widths))
        widths.append(1.0)
    cell, label, foot = 1.22, 0.27, 0.42  # inches
    tall = min(2.5, max(0.4, shape[0] / shape[1])) * cell
    height = rows * tall + (rows - 1) * label + head + foot
    figure = new_figure(cell * sum(widths) * 1.04 + 0.2, height)
    grid = figure.add_gridspec(
        rows,
        len(widths),
        width_ratios=widths,
        left=0.008,
        right=0.992,
        bottom=foot / height,
        top=1 - head / height,
        wspace=0.05,
        hspace=label / tall,
    )
    return figure, [[figure.add_subplot(grid[i, k]) for k in places] for i in range(rows)]


def jacobian_grid(rows: Sequence[JacobianRow], document: dict[str, Any], path: Path) -> None:
    """The paper's figure 3: denoised images, their difference, eigenvectors of the Jacobian.

    Args:
        rows: one per image.
        document: what ``jacobian.json`` holds.
        path: the PNG file.
    """
    classes = rows[0].conditional is not None
    first = 5 if classes else 3  # of the eigenvectors
    largest = len(document["per_image"][0]["largest"])
    total = first + len(rows[0].vectors)
    shape = (rows[0].x.shape[-2], rows[0].x.shape[-1])
    gaps = [2, first, first + largest]
    figure, axes = image_grid(len(rows), total, shape, gaps=gaps)
    what = "right singular vectors" if document["singular"] else "eigenvectors"
    for i, (row, one) in enumerate(zip(rows, document["per_image"], strict=True)):
        shown: list[tuple[Tensor, str, str]] = [
            (row.x, one["label"] or "", "image"),
            (row.y, "", f"noisy, $\\sigma$ = {in_255ths(document['sigma'])}/255"),
            (row.unconditional, f"{one['psnr']:.1f} dB" if one["psnr"] else "", "$D_u$"),
        ]
        if row.conditional is not None:
            change = row.conditional - row.unconditional
            factor = magnification(change)
            note = f"x{factor:g}" + (" (x500 saturates)" if factor < PAPER_FACTOR else "")
            predicted = f"{one['predicted']} ({100 * one['confidence']:.0f} %)"
            shown += [
                (row.conditional, predicted, "$D_c$, predicted label"),
                (around_gray(change, factor), note, "$D_c - D_u$"),
            ]
        for k, (vector, pair) in enumerate(
            zip(row.vectors, one["largest"] + one["smallest"], strict=True)
        ):
            form = "{:.2f}" if k < largest else "{:.1e}"
            value = form.format(pair["value"])
            if pair["residual"] > 0.1 * abs(pair["value"]):
                value += f" ± {pair['residual']:.0e}"
            if pair["noise"] > 0.5:
                value += " (noise)"
            shown.append((around_gray(vector), value, ""))
        for cell, (image, below, above) in zip(axes[i], shown, strict=True):
            show_image(cell, image, below, above if i == 0 else "")
    for column, text in ((first, "largest"), (first + largest, "smallest in magnitude")):
        place = axes[0][column].get_position()
        figure.text(place.x0, place.y1 + 0.05 / figure.get_figheight(), text, fontsize=8.5)
    height = figure.get_figheight()
    title = f"{images_of(document)}: denoising, and {what} of the Jacobian (value, ± residual)"
    figure.text(0.008, 1 - 0.2 / height, title, fontsize=10, weight="bold", va="center")
    figure.text(
        0.008,
        0.1 / height,
        "Differences and vectors are shown around gray, each vector scaled to the full range. "
        '"noise": most of what $D_u$ removes lies along it.',
        fontsize=7.5,
    )
    save_figure(figure, path)


def spectra(document: dict[str, Any], path: Path) -> None:
    """All eigenvalues of each image: sorted, and their magnitudes on a logarithmic axis."""
    figure = new_figure(9.6, 4.1, layout="constrained")
    left, right = figure.subplots(1, 2)
    kind = "singular value" if document["singular"] else "eigenvalue"
    for i, one in enumerate(document["per_image"]):
        values = np.asarray(one["eigenvalues"])
        rank = np.arange(1, len(values) + 1)
        name = one["label"] or f"image {i}"
        note = f"{name}: trace {one['trace']:.1f}, {one['above_half']} above 1/2"
        look = {"color": COLOURS[i % 6], "ls": ("-", "--", "-.", ":")[i // 6 % 4], "lw": 1.4}
        left.plot(rank, values, label=note, **look)
        right.plot(rank, np.sort(np.abs(values))[::-1], **look)
    for level in (0, 1):
        left.axhline(level, color=GRAY, lw=0.8, ls=":")
    right.axhline(1, color=GRAY, lw=0.8, ls=":")
    size = document["dimensions"]
    left.set(xlabel=f"rank, of {size}", ylabel=kind, title="Sorted: 1 keeps, 0 discards")
    right.set(xlabel=f"rank by magnitude, of {size}", ylabel="magnitude", yscale="log")
    right.set_title("Magnitudes")
    left.legend(fontsize=7.5, frameon=False)
    sigma = in_255ths(document["sigma"])
    title = f"Spectrum of the denoiser's Jacobian at $\\sigma$ = {sigma}/255"
    figure.suptitle(f"{title}: {images_of(document)}", fontsize=11)
    save_figure(figure, path)


def linearity_curves(document: dict[str, Any], path: Path) -> None:
    """Errors of D(y) = J(y) y, and the degree of homogeneity, against the noise level.

    Args:
        document: what ``linearity.json`` holds.
        path: the PNG file.
    """
    figure = new_figure(9.2, 4.7, layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = sorted(document["levels"], key=lambda level: float(level["sigma"]))
    errors = (
        ("error", "$\\|D - Jy\\| / \\|D\\|$", BLUE, "o"),
        ("of_change", "$\\|D - Jy\\| / \\|D - y\\|$, pooled", ORANGE, "s"),
        ("unexplained", "rest of $D - Jy$ that no k explains, by $\\|D\\|$", GREEN, "^"),
    )
    degrees = (
        ("degree", "best fit", BLUE, "o"),
        ("euler_degree", "Euler's, $\\langle y, s\\rangle / \\log p$", ORANGE, "s"),
    )
    for axes, series, limits_of in ((left, errors, _log_limits), (right, degrees, _degree_limits)):
        limits = limits_of([level[name] for level in levels for name, *_ in series if level[name]])
        cut = False
        for name, label, colour, marker in series:
            known = [level for level in levels if level[name]]
            x = [255 * level["sigma"] for level in known]
            look = {"fmt": f"{marker}-", "color": colour, "ms": 4, "lw": 1.2, "label": label}
            if known:
                cut |= bars_within(axes, x, [level[name] for level in known], limits, **look)
        if cut:
            axes.plot([], [], marker=7, color=GRAY, ls="", label="the interval goes on")
    left.set(yscale="log", ylabel="relative error")
    right.axhline(2, color=GRAY, ls=":", lw=1, label="2: locally linear")
    theory = document["theory"]
    if theory and theory["degree"] is not None:
        label = f"theory: {theory['degree']:.0f}"
        right.axhline(theory["degree"], color="black", ls="--", lw=0.8, label=label)
    right.set_ylabel("degree k, pooled over images")
    for axes in (left, right):
        axes.set_xlabel("noise level sigma (1/255)")
    legend_below(left)
    legend_below(right, columns=2)
    left.set_title("Is D(y) = J(y) y?", fontsize=10)
    right.set_title("Degree of homogeneity of log p", fontsize=10)
    figure.suptitle(f"Local linearity of the denoiser: {images_of(document)}", fontsize=11)
    save_figure(figure, path)


def linearity_grid(cells: Sequence[dict[str, Any]], path: Path, data: str = "") -> None:
    """Local linearity of networks that differ in norm, activation and biases, beside the theory.

    Args:
        cells: by network ``norm`` (group or scale), ``activation`` (gelu or relu), ``bias`` (bool),
            ``levels`` and ``theory`` as in ``linearity.json``.
        path: the PNG file.
        data: which images, for the title.
    """
    figure = new_figure(max(6.4, 1.15 * len(cells) + 1.4), 6.2, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    sigmas = [level["sigma"] for level in cells[0]["levels"]]
    every = [level for cell in cells for level in cell["levels"]]
    limits = {
        "error": _log_limits([level["error"] for level in every]),
        "degree": _degree_limits([level["degree"] for level in every]),
    }
    cut = False
    for k, sigma in enumerate(sigmas):
        at = np.arange(len(cells)) + (k - (len(sigmas) - 1) / 2) * 0.6 / len(sigmas)
        look = {"color": COLOURS[k % 6], "marker": MARKERS[k % 6], "ls": "", "ms": 5}
        for axes, name in ((top, "error"), (bottom, "degree")):
            found = [cell["levels"][k][name] for cell in cells]
            label = f"$\\sigma$ = {in_255ths(sigma)}/255" if axes is top else None
            cut |= bars_within(axes, list(at), found, limits[name], lw=1, label=label, **look)
    if cut:
        top.plot([], [], marker=7, color=GRAY, ls="", label="the interval goes on")
    names = {"group": "plain norm", "scale": "scale-keeping", "batch": "batch norm"}
    activations = {"relu": "ReLU", "gelu": "GELU"}
    ticks = []
    for i, cell in enumerate(cells):
        degree = cell["theory"] and cell["theory"]["degree"]
        if degree is not None:
            label = "theory" if "theory" not in bottom.get_legend_handles_labels()[1] else None
            bottom.plot([i - 0.42, i + 0.42], [degree] * 2, color="black", lw=1.2, label=label)
        ticks.append(
            f"{names.get(cell['norm'], cell['norm'])}\n"
            f"{activations.get(cell['activation'], cell['activation'])}\n"
            f"{'biases' if cell['bias'] else 'no bias'}\n"
            f"theory: {'no k' if degree is None else f'k = {degree:.0f}'}"
        )
    bottom.set_xticks(range(len(cells)), ticks, fontsize=8)
    for axes in (top, bottom):
        for i in range(len(cells) - 1):
            axes.axvline(i + 0.5, color=GRAY, lw=0.4)
    top.set(yscale="log", ylabel="$\\|D - Jy\\| / \\|D\\|$")
    where = f", {data}" if data else ""
    top.set_title(
        f"Local linearity D(y) = J(y) y: relative error (0: as section 4.2 claims){where}"
    )
    bottom.set(ylabel="degree k, best fit, pooled")
    bottom.set_title("Degree of homogeneity of log p (locally linear: 2)")
    figure.legend(loc="outside lower center", ncols=len(sigmas) + 2, frameon=False, fontsize=8.5)
    save_figure(figure, path)


def _log_limits(estimates: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """What is drawn of ``estimates`` on a logarithmic axis, on which an interval may reach 0."""
    values = [e["value"] for e in estimates if e["value"]]
    highs = [e["high"] for e in estimates if e["high"]]
    return min(values, default=0.1) / 5, max([*values, *highs], default=1.0)


def _degree_limits(estimates: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """What is drawn of degrees: 0 and 2, and no more beyond than lets these be told apart."""
    ends = [e[k] for e in estimates for k in ("value", "low", "high") if e[k] is not None]
    return max(-2.0, min([-0.5, *ends])), min(5.0, max([2.5, *ends]))
