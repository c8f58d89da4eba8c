"""Pictures of adversarial gradients as differences of denoisers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ebmkit.noise import in_255ths
from ebmkit.plots.common import (
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    images_of,
    legend_below,
    new_figure,
    save_figure,
    show_image,
)
from ebmkit.plots.jacobian import around_gray, image_grid

__all__ = ["AdversarialPanel", "adversarial_grid", "adversarial_norms"]


class AdversarialPanel(NamedTuple):
    """What `adversarial_grid` shows at one noise level.

    Attributes:
        sigma: image units.
        noisy: (B, C, H, W).
        predicted: of each image, the predicted label and its probability, as text.
        gradients: (B, L, C, H, W) of log p(c|y) for L targets.
        targets: their names, L for each image.
    """

    sigma: float
    noisy: Tensor
    predicted: list[str]
    gradients: Tensor
    targets: list[list[str]]


def adversarial_grid(
    clean: Tensor,
    labels: Sequence[str],
    panels: Sequence[AdversarialPanel],
    path: Path,
    data: str = "",
) -> None:
    """One row per image: the clean one, then at each noise level the noisy one and gradients.

    Args:
        clean: (B, C, H, W).
        labels: their true labels, or empty.
        panels: one per noise level.
        path: the PNG file.
        data: what the images are, for the title.
    """
    wide = 1 + panels[0].gradients.shape[1]
    shape = (clean.shape[-2], clean.shape[-1])
    starts = [1 + wide * p for p in range(len(panels))]
    figure, axes = image_grid(len(clean), 1 + wide * len(panels), shape, starts, head=0.75)
    height = figure.get_figheight()
    for i, row in enumerate(axes):
        show_image(row[0], clean[i], labels[i] if labels else "", "clean" if i == 0 else "")
        for start, panel in zip(starts, panels, strict=True):
            above = "noisy, predicted" if i == 0 else ""
            show_image(row[start], panel.noisy[i], panel.predicted[i], above)
            for k, gradient in enumerate(panel.gradients[i]):
                below = f"{panel.targets[i][k]}: {float(gradient.norm()):.2g}"
                above = f"target {k + 1}" if i == 0 else ""
                show_image(row[start + 1 + k], around_gray(gradient), below, above)
    for start, panel in zip(starts, panels, strict=True):
        place = axes[0][start].get_position()
        text = f"$\\sigma$ = {in_255ths(panel.sigma)}/255"
        figure.text(place.x0, place.y1 + 0.25 / height, text, fontsize=9, weight="bold")
    figure.text(
        0.008,
        1 - 0.16 / height,
        "Adversarial gradients as differences of denoisers: "
        f"$\\nabla \\log p(c|y) = (D_c - D_u) / \\sigma^2${data and f' ({data})'}",
        fontsize=10,
        weight="bold",
        va="center",
    )
    figure.text(
        0.008,
        0.09 / height,
        "Targets: the likeliest labels beside the predicted one at the lowest noise. Gradients are "
        "around gray, each scaled to the full range; numbers are l2 norms, nats per image unit.",
        fontsize=7.5,
    )
    save_figure(figure, path)


def adversarial_norms(document: dict[str, Any], path: Path) -> None:
    """Norms of gradients against the noise level, and what a step along them does.

    Args:
        document: what ``adversarial.json`` holds.
        path: the PNG file.
    """
    figure = new_figure(9.6, 5.0, layout="constrained")
    left, right = figure.subplots(1, 2)
    noisy = [level for level in document["levels"] if level["sigma"]]
    clean = [level for level in document["levels"] if not level["sigma"]]
    x = [255 * level["sigma"] for level in noisy]
    series = (
        ("norm", "targets", ORANGE, "s"),
        ("norm_predicted", "predicted label", BLUE, "o"),
        ("score_norm", "score $\\nabla\\log p(y)$", GREEN, "^"),
    )
    # an interval of a mean may reach 0, which a logarithmic axis has not
    values = [level[name]["value"] for level in noisy for name, *_ in series]
    floor = min([value for value in values if value], default=1.0) / 5
    for name, label, colour, marker in series:
        values = [level[name]["value"] for level in noisy]
        left.plot(x, values, f"{marker}-", color=colour, ms=4, label=label)
        if all(level[name]["low"] is not None for level in noisy):
            low = [max(level[name]["low"], floor) for level in noisy]
            high = [level[name]["high"] for level in noisy]
            left.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        for level in clean:
            left.axhline(level[name]["value"], color=colour, ls=":", lw=1)
    if clean:
        left.plot([], [], color=GRAY, ls=":", lw=1, label="at the clean image")
    left.set(xscale="log", yscale="log", xlabel="noise level sigma (1/255)")
    left.set_ylim(bottom=floor)
    left.set(ylabel="l2 norm (nats per image unit)")
    left.set_title("Gradients of log p(c|y), mean over images", fontsize=10)
    legend_below(left, columns=2)
    lengths = len(document["lengths"])
    for k, length in enumerate(document["lengths"]):
        steps = [level["steps"][k] for level in noisy]
        colour, marker = (BLUE, ORANGE, GREEN)[k % 3], ("o", "s", "^")[k % 3]
        gains = [step["gain"]["value"] for step in steps]
        promised = [step["promised"]["value"] for step in steps]
        right.plot(x, gains, f"{marker}-", color=colour, ms=4, label=f"step {length:g}")
        right.plot(x, promised, "--", color=colour, lw=1)
    right.plot([], [], "--", color=GRAY, lw=1, label="promised by the gradient")
    right.set(xscale="log", xlabel="noise level sigma (1/255)", ylabel="rise of log p(c|y) (nats)")
    if any(level["steps"][k]["gain"]["value"] <= 0 for level in noisy for k in range(lengths)):
        right.set_yscale("symlog", linthresh=0.1)
    else:
        right.set_yscale("log")
    right.set_title("A step along the gradient of a target (l2 length)", fontsize=10)
    legend_below(right, columns=2)
    figure.suptitle(f"Adversarial gradients: {images_of(document)}", fontsize=11)
    save_figure(figure, path)
