"""A scaling curve: step time and memory against width, image size and batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ebmkit.bench.measurements import OURS, PLAIN, Row, Setting, measure, training
from ebmkit.compute import ComputeConfig, available_memory
from ebmkit.errors import UserError
from ebmkit.training.cost import format_bytes

__all__ = ["SCALING", "scaling", "scaling_plot", "scaling_settings"]

SCALING = "scaling dsm"
"""What the settings of a scaling curve are called."""


def scaling_settings(
    base: Setting,
    widths: Sequence[int] = (8, 16, 32, 64),
    image_sizes: Sequence[int] = (16, 32, 64, 128),
    batches: Sequence[int] = (16, 32, 64, 128, 256),
) -> list[Setting]:
    """``base``, and it with one of width, image size and batch changed, each once."""
    settings = [base]
    settings += [base._replace(width=width) for width in widths]
    settings += [base._replace(image_size=size) for size in image_sizes]
    settings += [base._replace(batch=batch) for batch in batches]
    return list(dict.fromkeys(settings))


def scaling(
    settings: Sequence[Setting],
    channels: int,
    device: torch.device,
    rounds: int,
    compute: ComputeConfig | None = None,
) -> Iterator[list[Row]]:
    """Rows of the dsm step at each of ``settings``, the first of which is the base point.

    Activations grow with width, pixels and images. A point that by the base point's memory would
    not fit is left out with a warning.
    """
    if not settings:
        return
    base, peak = settings[0], 0.0
    for setting in settings:
        needed = peak * _activations(setting) / _activations(base)
        free = available_memory(device)
        if free is not None and needed > free:
            warnings.warn(
                f"{setting} is left out: it needs about {format_bytes(needed)} of memory, and "
                f"{format_bytes(free)} are free",
                stacklevel=2,
            )
            yield []
            continue
        rows = measure(training(setting, "dsm", channels, device, compute), device, rounds)
        if setting == base:
            peak = 1e6 * max(row.peak_mb for row in rows)
        yield rows


def scaling_plot(rows: Sequence[Row], path: Path) -> None:
    """Step time and memory against width, image size and batch, as a PNG file.

    Args:
        rows: of `scaling`, the base point first; rows of other work are passed over.
        path: the PNG file.

    Raises:
        UserError: if there is nothing to draw.
    """
    from matplotlib.ticker import NullLocator

    from ebmkit.plots.common import BLUE, ORANGE, new_figure, save_figure

    found = [(setting, row) for row in rows if (setting := Setting.read(row.name))]
    found = [(setting, row) for setting, row in found if setting.what == SCALING]
    if not found:
        raise UserError("there are no rows of scaling to draw: measure with --scaling")
    base = found[0][0]
    figure = new_figure(9.6, 5.2, layout="constrained")
    panels = figure.subplots(2, 3, sharex="col")
    looks = {OURS: (BLUE, "o", "-"), PLAIN: (ORANGE, "s", "--")}
    for column, field in enumerate(("width", "image_size", "batch")):
        others = [name for name in Setting._fields if name != field]
        for who, (color, marker, line) in looks.items():
            points = sorted(
                (getattr(setting, field), row.median_s, row.peak_mb)
                for setting, row in found
                if row.name.endswith(f": {who}")
                and all(getattr(setting, name) == getattr(base, name) for name in others)
            )
            for panel, values in zip(panels[:, column], (1, 2), strict=True):
                panel.plot(
                    [p[0] for p in points],
                    [p[values] for p in points],
                    color=color, marker=marker, linestyle=line, markersize=4, label=who,
                )  # fmt: skip
        ticks = sorted({getattr(setting, field) for setting, _ in found})
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(ticks, [str(tick) for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
        panels[1, column].set_xlabel(field.replace("_", " "))
    panels[0, 0].set_ylabel("step (s)")
    panels[1, 0].set_ylabel("peak memory (MB)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{base}, on {found[0][1].device}", fontsize=10)
    save_figure(figure, path)


def _activations(setting: Setting) -> int:
    return setting.width * setting.image_size**2 * setting.batch
