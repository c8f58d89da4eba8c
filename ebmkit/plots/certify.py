"""The picture of what the suite certify finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebmkit.noise import in_255ths
from ebmkit.plots.common import BLUE, GRAY, ORANGE, images_of, new_figure, save_figure

__all__ = ["certified_accuracy"]

LOOKS = ((BLUE, "-"), (ORANGE, "--"))
STEPS = 300


def certified_accuracy(document: dict[str, Any], path: Path, names: Mapping[Any, str]) -> None:
    """Certified accuracy against the l2 radius: one panel per noise level.

    Args:
        document: of the suite certify.
        path: the PNG file.
        names: of the classifiers, by their names in the document.
    """
    from ebmkit.evaluation.statistics import proportion

    levels, truth = document["levels"], document["labels"]
    figure = new_figure(0.9 + 2.75 * len(levels), 3.6, layout="constrained")
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    limit = 1.06 * max(level["largest_radius"] for level in levels)
    for axes, level in zip(panels, levels, strict=True):
        largest = level["largest_radius"]
        radii = [i * largest / STEPS for i in range(STEPS + 1)]
        for (name, found), (colour, dashes) in zip(
            level["classifiers"].items(), LOOKS, strict=False
        ):
            right = [
                radius if label == c else -1.0
                for radius, label, c in zip(found["radius"], found["predicted"], truth, strict=True)
            ]
            hits = [sum(own >= r for own in right) for r in radii]
            known = {count: proportion(count, len(right)) for count in set(hits)}
            shares = [known[count] for count in hits]
            low, high = [100 * s.low for s in shares], [100 * s.high for s in shares]
            axes.fill_between(radii, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(
                radii,
                [100 * s.value for s in shares],
                dashes,
                color=colour,
                lw=1.6,
                label=names[name],
            )
        axes.axvline(largest, color=GRAY, ls=":", lw=1, label="largest possible")
        axes.set(xlim=(0, limit), ylim=(0, 102), xlabel="$\\ell_2$ radius (image units)")
        axes.set_title(
            f"$\\sigma$ = {level['sigma']:.3g} = {in_255ths(level['sigma'])}/255", fontsize=10
        )
    panels[0].set_ylabel("certified accuracy (%)")
    votes, alpha = document["options"]["samples"], document["options"]["alpha"]
    figure.suptitle(
        f"Certified accuracy: {images_of(document, document['certified_images'])}, {votes:,} votes "
        f"each, $\\alpha$ = {alpha:g}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)
