"""The report of target ``guidance``: Markdown, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.evaluation.robustness_grid import column_names
from ebmkit.experiments.guidance_rows import TABLE_2_1
from ebmkit.storage import write_atomically

__all__ = ["markdown", "write"]

GROUPS = {
    "thesis": "Ways of the thesis, by the classifier trained at l2 1",
    "guides": "Other guides, in the setting of `energy`",
    "views": "What the guide sees: the classifier trained at l2 0.5, in the setting of `energy`",
    "noise": "At high or at low noise alone: log p(y|x)",
    "rivals": "Rivals: told the noise (log p(y|x, t)), or trained with labels",
    "own": "A joint model in the place of the UNet",
}
HEADS = ("s", "eta", "recognised", "distance (real)", "diversity", "saturated", "gap", "time")


def write(report: dict[str, Any], shown: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write ``guidance.md``, ``.json`` and pictures into ``folder``; their paths.

    Args:
        report: as `ebmkit.experiments.guidance.run_guidance` makes it.
        shown: some images of each way, uint8 (n, C, H, W), in the order of labels.
        folder: where.
    """
    from ebmkit.plots.guidance import compare_ways, samples_of_ways

    paths = [folder / "guidance.md", folder / "guidance.json"]
    write_atomically(paths[0], markdown(report).encode())
    write_atomically(paths[1], json.dumps(report, indent=1, allow_nan=False).encode())
    done = [way for way in report["ways"] if "stopped" not in way]
    if done:
        paths += [folder / "guidance-samples.png", folder / "guidance-ways.png"]
        samples_of_ways([(way["name"], way["about"], shown[way["name"]]) for way in done], paths[2])
        compare_ways(done, paths[3])
    return paths


def markdown(report: dict[str, Any]) -> str:
    """``report`` as Markdown."""
    lines = [
        f"## Guidance of a diffusion model, on {report['dataset']} (RCG chapter 4)",
        "",
        f"Scale: {report['description']}.",
        "",
        *_networks(report["networks"]),
        *_grid(report["grid"]),
        *_path(report["path"]),
        *_ddim(report["ddim"]),
        *_ways(report),
    ]
    return "\n".join([*lines, *(f"- {note}" for note in report["notes"])]) + "\n"


def _networks(networks: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["### Networks", "", "| name | what | accuracy, % | parameters | steps |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for one in networks:
        facts, cell = one["facts"], "-"
        if one["accuracy"] is not None:
            low, high = one["interval"]
            cell = f"{100 * one['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(
            f"| {one['name']} | {one['label']} | {cell} | {facts['parameters']:,} "
            f"| {facts['steps']:,} |"
        )
    return [*lines, ""]


def _grid(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return []
    return ["### Robust accuracy (RCG table 4.1)", "", *_grid_table(document), ""]


def _grid_table(document: dict[str, Any]) -> list[str]:
    columns, heads = document["columns"], column_names(document)
    lines = [
        f"Accuracy in % (95 % interval) on {document['options']['images']} test images at most, "
        f"{document['options']['steps']}-step PGD; rows: eps of the attack.",
        "",
        "| eps | " + " | ".join(heads) + " |",
        "| ---: |" + " ---: |" * len(heads),
    ]
    for row, epsilon in enumerate(document["epsilons"]):
        cells = [_percent(column["accuracy"][row]) for column in columns]
        lines.append(f"| {epsilon:g} | " + " | ".join(cells) + " |")
    return lines


def _path(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return []
    lines = [
        "### Along the diffusion (RCG figures 4.5, 4.6, 4.9)",
        "",
        f"Accuracy in % of {document['images']:,} test images: clean; noisy as the diffusion model "
        "has them (x_t) and in image units (y) at some timesteps; darkened alone at t = T/2. "
        "*Chance from*: the first timestep measured at which the interval reaches chance.",
        "",
    ]
    models = document["models"]
    first = next(iter(models.values()))["path"]["timestep"]
    wanted = [_nearest(first, t) for t in (100, 200, 400)]
    heads = ["network", "clean"]
    heads += [f"{view}, t = {first[i]['t']}" for view in ("x_t", "y") for i in wanted]
    middle = _nearest(first, 500)
    heads += [f"dark, t = {first[middle]['t']}", "chance from: x_t", "y"]
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for name, one in models.items():
        cells = [_share(one["clean"])]
        cells += [_share(one["path"][v][i]) for v in ("timestep", "image") for i in wanted]
        cells.append(_share(one["path"]["dark"][middle]))
        since = one["chance_from"]
        cells += ["never" if since[v] is None else str(since[v]) for v in ("timestep", "image")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _ddim(cells: Sequence[dict[str, Any]]) -> list[str]:
    if not cells:
        return []
    lengths = sorted({cell["steps"] for cell in cells})
    lines = [
        "### DDIM: eta and steps (RCG table 2.1)",
        "",
        f"Frechet distance in the judge's features of {cells[0]['count']} unguided images (of as "
        f"many real ones: {cells[0]['floor']['frechet']:.3g}), comparable within this table alone; "
        "in brackets the thesis's FID of a converged model.",
        "",
        "| eta | " + " | ".join(f"{steps} steps" for steps in lengths) + " |",
        "| ---: |" + " ---: |" * len(lengths),
    ]
    for eta in sorted({cell["eta"] for cell in cells}):
        own = {cell["steps"]: cell for cell in cells if cell["eta"] == eta}
        theirs = TABLE_2_1.get(eta, {})
        row = [f"{own[s]['frechet']['value']:.3g} ({theirs.get(s, '-')})" for s in lengths]
        lines.append(f"| {eta:g} | " + " | ".join(row) + " |")
    return [*lines, ""]


def _ways(report: dict[str, Any]) -> list[str]:
    ways, amount = report["ways"], report["amount"]
    if not ways:
        return []
    lines = [
        "### Ways to guide",
        "",
        f"{amount['per_class']} images of each class, {amount['steps']} steps of DDIM, all ways "
        "from the same starting noise. *Recognised*: the judge sees the wanted class, % (95 % "
        "interval). *Distance*: Frechet distance in the judge's features to real images of the "
        "class, mean over classes; of few images it is biased upwards, and *real* is what as many "
        "real images have. *Diversity*: 1 if images of a class differ as real ones do. "
        "*Saturated*: pixel values at the ends of the range, %, real images' in brackets. "
        "*Gap*: mean E(x) under the most robust classifier, minus real images', nats. "
        "*Time*: seconds an image. Scales s are the thesis's times "
        f"{amount['strength']:g}, where they are not 1.",
        "",
    ]
    for group, title in GROUPS.items():
        own = [way for way in ways if way["group"] == group]
        if not own:
            continue
        lines += [
            f"#### {title}",
            "",
            f"| way | | {' | '.join(HEADS)} |",
            "| --- | --- |" + " ---: |" * len(HEADS),
            *(_way(way) for way in own),
            "",
        ]
    return lines


def _way(way: dict[str, Any]) -> str:
    scale = f"{way['settings']['scale']:g}" if way["settings"] else ""
    description = way["about"].replace("|", "\\|")
    head = f"| {way['name']} | {description} | {scale} | {way['eta']:g} | "
    if "stopped" in way:
        return head + f"{way['stopped']} | | | | | |"
    means, ends = way["means"], way["saturation"]["ends"]
    gap = way["energy_gap"]["energy"] if way["energy_gap"] else None
    cells = [
        _percent(way["accuracy"]) if way["accuracy"] else "-",
        f"{_number(means['frechet'])} ({_number(means['floor'])})",
        _number(means["diversity"], "{:.2f}"),
        f"{100 * _value(ends['samples']):.1f} ({100 * _value(ends['real']):.1f})",
        "-" if gap is None or gap["value"] is None else f"{gap['value']:+.2f}",
        f"{way['seconds'] / way['count']:.2g}",
    ]
    return head + " | ".join(cells) + " |"


def _value(estimate: Any) -> float:
    return float(estimate["value"] if isinstance(estimate, dict) else estimate)


def _percent(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f} to {high:.0f})"


def _share(row: Mapping[str, Any]) -> str:
    return f"{100 * _value(row['accuracy']):.0f}"


def _number(value: float | None, form: str = "{:.3g}") -> str:
    return "-" if value is None else form.format(value)


def _nearest(rows: Sequence[Mapping[str, Any]], t: int) -> int:
    return min(range(len(rows)), key=lambda i: abs(rows[i]["t"] - t))
