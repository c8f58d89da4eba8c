"""The paper's figures 1, 3 and 4, and its side claims, each as a target.

- ``fig1``: bias and variance of generative and discriminative fits; no
  networks.
- ``fig3``: of the joint model, the pictures and spectra of the suite ``jacobian``; of a grid of
  networks, {plain, scale-keeping norm} x {GELU, ReLU} x {no bias, biases}, the suite ``linearity``.
- ``fig4``: accuracy under attack of ResNet18 and the joint model, by the suite ``robustness``.
- ``claims``: each variant beside the joint model, denoising also beyond the noise trained on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ebmkit.evaluation.attacks import STEPSIZE
from ebmkit.evaluation.tables import number
from ebmkit.experiments.keeping import Protocol
from ebmkit.experiments.report import Found, is_open, markdown
from ebmkit.experiments.rows import Row
from ebmkit.experiments.runs import Rows
from ebmkit.experiments.tables import CLAIMS, GRID, JEM, JOINT, TABLE1
from ebmkit.experiments.tabulate import circumstances, measured, table_report
from ebmkit.experiments.theory import figure1
from ebmkit.experiments.theory import markdown as figure1_markdown
from ebmkit.noise import in_255ths
from ebmkit.storage import write_atomically
from ebmkit.storage.reading import read_json
from ebmkit.training.run_folder import environment

__all__ = ["CLAIM_SIGMAS", "FIG4", "run_claims", "run_fig1", "run_fig3", "run_fig4"]

CLAIM_SIGMAS = tuple(s / 255 for s in (15, 25, 50, 75, 100, 150, 200))
"""Noise levels of ``claims``: training ends at 100/255."""

FIG4 = (TABLE1.row("resnet18"), TABLE1.row("gradresnet-ce"), JEM, JOINT)

OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {
        "jacobian": {"images": 1},
        "linearity": {"images": 8},
        "robustness": {
            "images": 20,
            "steps": 4,
            "restarts": 1,
            "draws": 2,
            "eot": 2,
            "noise_levels": ["0", "20/255"],
            "linf": ["2/255", "8/255", "16/255"],
            "l2": [0.25, 0.5, 1.0],
        },
    },
    "cpu": {
        "jacobian": {"images": 2},
        "linearity": {"images": 32},
        "robustness": {"images": 50, "draws": 8, "eot": 4, "restarts": 1},
    },
    "full": {
        "jacobian": {"images": 3},
        "linearity": {"images": 256},
        "robustness": {"images": 1000, "restarts": 5},
    },
}
"""By scale, settings of the suites behind the figures."""


def run_fig1(rows: Rows, only: Sequence[str]) -> list[Path]:
    """Figure 1: constants of real families, computed and measured; their tables and panels."""
    from ebmkit.plots.theory import draw_figure1

    document = _figure1(rows)
    made = document["made"]
    text = (
        "## Figure 1: bias and variance of generative and discriminative fits (CDN figure 1)\n\n"
        "Computed from the constants of equation (4), and measured over many training sets.\n\n"
        f"{figure1_markdown(document)}\n"
        f"- the paper's constants, illustrations of no family: {_caption(document)}\n"
        f"- command: `{rows.command('fig1')}`\n- seed: {rows.seed}\n"
        f"- hardware: CPU, {made['threads']} of {made['cores']} cores, {made['hours']:.2f} hours; "
        f"PyTorch {made['torch']}; commit {made['git_commit']}\n"
        "- data: drawn from each family\n"
    )
    paths = _write(rows, "fig1", text, document)
    draw_figure1(document, rows.out / "fig1.png")
    return [*paths, rows.out / "fig1.png"]


def _figure1(rows: Rows) -> dict[str, Any]:
    """The document of figure 1: the one that is there if it is of this scale and seed, or anew."""
    wanted = {"scale": rows.scale.name, "seed": rows.seed}
    try:
        old = read_json(rows.out / "fig1.json")
        if {key: old["made"][key] for key in wanted} == wanted:
            return dict(old)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    begun = time.perf_counter()
    document = figure1(rows.scale.name, rows.seed)  # type: ignore[arg-type]
    names = ("git_commit", "torch", "threads", "cores", "platform")
    found = environment()
    hours = (time.perf_counter() - begun) / 3600
    made = wanted | {"hours": hours} | {name: found[name] for name in names}
    return {**document, "made": made}


def _caption(document: dict[str, Any]) -> str:
    return "; ".join(
        ", ".join(f"{name} = {curve[name]:g}" for name in ("b_gen", "b_dis", "v_gen", "v_dis"))
        for curve in document["paper"]
    )


def run_fig3(rows: Rows, only: Sequence[str]) -> list[Path]:
    """Figures 3 and 5, and the local linearity of the grid."""
    from ebmkit.plots.jacobian import linearity_grid

    options = OPTIONS[rows.scale.name]
    protocol = Protocol("fig3", ("linearity",), options=options)
    rows.check([JOINT], "cifar10")
    grid = _run(rows, GRID, only, lambda row: protocol)
    spectra = rows.measure(JOINT, "cifar10", Protocol("fig3", ("jacobian",), options=options))
    cells, found = [], []
    for row in grid:
        document = rows.measure(row, "cifar10", protocol)["linearity"]
        config = rows.config(row, "cifar10").model.model_dump()["backbone"]
        cells.append(
            {"name": row.name, "label": row.label}
            | {key: config[key] for key in ("norm", "activation", "bias")}
            | {key: document[key] for key in ("levels", "theory")}
        )
        found.append(_found(rows, row, document))
    report = {
        "jacobian": spectra["jacobian"],
        "cells": cells,
        **circumstances(rows, "fig3", found),
    }
    paths = _write(rows, "fig3", _fig3_text(report), report)
    linearity_grid(cells, rows.out / "fig3-linearity.png", report["dataset"])
    own = rows.folder(JOINT) / "evaluation" / "fig3"
    for source, name in (("jacobian", "fig3"), ("spectrum", "fig3-spectrum")):
        if (own / f"{source}.png").exists():  # of no spectrum that is not dense
            shutil.copyfile(own / f"{source}.png", rows.out / f"{name}.png")
            paths.append(rows.out / f"{name}.png")
    return [*paths, rows.out / "fig3-linearity.png"]


def run_fig4(rows: Rows, only: Sequence[str]) -> list[Path]:
    """Figure 4: accuracy against the strength of attacks."""
    from ebmkit.plots.robustness import compare

    chosen = _run(rows, FIG4, only, lambda row: _attacks(rows, row))
    documents: dict[str, dict[str, Any]] = {}
    found = []
    for row in chosen:
        document = rows.measure(row, "cifar10", _attacks(rows, row))["robustness"]
        documents[f"{row.label} ({row.task})"] = document
        found.append(_found(rows, row, document))
    description = circumstances(rows, "fig4", found)
    report = {"documents": documents, **description}
    paths = _write(rows, "fig4", _fig4_text(documents, description["notes"]), report)
    compare(documents, rows.out / "fig4.png")
    paths.append(rows.out / "fig4.png")
    for row in chosen:
        drawn = rows.folder(row) / "evaluation" / "fig4" / "robustness-map.png"
        if drawn.exists():
            shutil.copyfile(drawn, rows.out / f"fig4-map-{row.name}.png")
            paths.append(rows.out / f"fig4-map-{row.name}.png")
    return paths


def _attacks(rows: Rows, row: Row) -> Protocol:
    """How ``row`` is attacked: a network that denoises defends itself by that, too."""
    options = OPTIONS[rows.scale.name]
    if row.task == "joint" and row is not JEM:
        defences = {"defences": ["direct", "noise", "denoise"]}
        options = options | {"robustness": options["robustness"] | defences}
    return Protocol("fig4", ("robustness",), options=options)


def run_claims(rows: Rows, only: Sequence[str]) -> list[Path]:
    """The side claims: a table like the others, denoising at more noise levels."""
    from ebmkit.experiments.report import write
    from ebmkit.plots.experiments import beyond_training

    report = table_report(CLAIMS, rows, only, CLAIM_SIGMAS)
    paths = write(report, rows.out)
    text = f"{markdown(report)}\n{_against_joint(report)}\n{_beyond(report)}"
    write_atomically(paths[0], text.encode())
    beyond_training(report, rows.out / "claims-beyond.png")
    return [*paths, rows.out / "claims-beyond.png"]


def _run(
    rows: Rows, every: Sequence[Row], only: Sequence[str], protocol: Callable[[Row], Protocol]
) -> list[Row]:
    """Measure the rows that are wanted; all that are finished, these and earlier ones."""
    wanted = [row for row in every if not only or row.name in only]
    rows.check(wanted, "cifar10")
    for row in wanted:
        rows.try_measure(row, "cifar10", protocol(row))
    return [row for row in every if rows.finished(row, "cifar10", protocol(row))]


def _found(rows: Rows, row: Row, document: dict[str, Any]) -> Found:
    facts = rows.facts(row, "cifar10")
    facts |= measured([document])
    return Found(row, {}, facts, "done")


def _write(rows: Rows, name: str, text: str, document: dict[str, Any]) -> list[Path]:
    paths = [rows.out / f"{name}.md", rows.out / f"{name}.json"]
    write_atomically(paths[0], text.encode())
    write_atomically(paths[1], json.dumps(document, indent=2, allow_nan=False).encode())
    return paths


def _fig3_text(report: dict[str, Any]) -> str:
    found = report["jacobian"]
    lines = [
        "## Figure 3: the Jacobian of the denoiser (CDN figures 3 and 5)",
        "",
        f"Eigenvalues at sigma {in_255ths(found['sigma'])}/255, three largest and two smallest in "
        "magnitude. The paper's, on an image of its own: "
        + ", ".join(f"{v:g}" for v in [*found["paper"]["largest"], *found["paper"]["smallest"]])
        + ".",
        "",
        "| image | largest | smallest in magnitude | trace | above 1/2 | asymmetry |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for index, image in enumerate(found["per_image"]):
        cells = [", ".join(f"{p['value']:.3g}" for p in image[k]) for k in ("largest", "smallest")]
        above = image.get("above_half", "-")
        lines.append(
            f"| {image.get('label') or index} | {cells[0]} | {cells[1]} | {image['trace']:.1f} "
            f"| {above} | {image['asymmetry']:.1e} |"
        )
    lines += [
        "",
        "Local linearity, D(y) = J(y) y: the error |D - Jy| / |D|, and the degree k of homogeneity "
        "of log p that fits best (the claim holds exactly at k = 2).",
        "",
        "| network | k in theory | sigma | error | k measured |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for cell in report["cells"]:
        degree = (cell["theory"] or {}).get("degree")
        for i, level in enumerate(cell["levels"]):
            label = "" if i else cell["label"]
            predicted = "" if i else "none" if degree is None else f"{degree:g}"
            error = number(level["error"]["value"], "{:.1e}")
            k = number(level["degree"]["value"], "{:.2f}")
            at = f"{in_255ths(level['sigma'])}/255"
            lines.append(f"| {label} | {predicted} | {at} | {error} | {k} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"])]) + "\n"


def _fig4_text(documents: dict[str, dict[str, Any]], notes: Sequence[str]) -> str:
    lines = ["## Figure 4: accuracy under attack (CDN figure 4)", ""]
    for name, document in documents.items():
        lines += [
            f"{name}, the first {document['images']} of {document['of']:,} {document['split']} "
            "images, accuracy in % (95 % interval):",
            "",
        ]
        for norm, curves in document["curves"].items():
            strengths = document["epsilons"][norm]
            shown = [in_255ths(e) + "/255" if norm == "linf" else f"{e:g}" for e in strengths]
            lines.append(f"| {norm} | " + " | ".join(shown) + " |")
            lines.append("| --- |" + " ---: |" * len(shown))
            for defence, curve in curves.items():
                cells = [
                    f"{100 * e['value']:.0f} ({100 * e['low']:.0f} to {100 * e['high']:.0f})"
                    for e in curve
                ]
                lines.append(f"| {defence} | " + " | ".join(cells) + " |")
            lines.append("")
        for key, defence in document["defences"].items():
            lines.append(f"- {key}: {defence['description']}")
        lines += [f"- warning: {warning}" for warning in document["warnings"]]
        lines += [f"- attack: {_effort(document['options'])}", ""]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _effort(options: dict[str, Any]) -> str:
    size = options["stepsize"] or max(STEPSIZE, 2.5 / options["steps"])
    return (
        f"PGD, {options['steps']} steps of {size:g} of the strength, {options['restarts']} random "
        f"start(s); where noise is added, gradients over {options['eot']} draws and labels over "
        f"{options['draws']}"
    )


def _against_joint(report: dict[str, Any]) -> str:
    """Each variant minus the joint network, and whether that is a difference."""
    rows = {row["name"]: row for row in report["rows"]}
    base = rows[JOINT.name]["ours"]
    lines = [
        "Each variant minus the joint network (*: a difference by the rule for orderings, of one "
        "seed; the paper found none for ce+cdsm and ce+dsm+cdsm):",
        "",
        "| variant | accuracy, % | PSNR at 15/255 | at 25/255 | at 50/255 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        if name != JOINT.name and row["status"] == "done" and base:
            cells = [_change(row["ours"], base, m) for m in ("accuracy", "15", "25", "50")]
            lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _change(ours: dict[str, Any], base: dict[str, Any], metric: str) -> str:
    a, b = ours[metric], base[metric]
    if a["value"] is None or b["value"] is None:
        return "not finite"
    return f"{a['value'] - b['value']:+.2f}{'' if is_open(a, b, metric) else ' *'}"


def _beyond(report: dict[str, Any]) -> str:
    """PSNR of every row at every noise level; training ends at 100/255."""
    levels = [in_255ths(s) for s in CLAIM_SIGMAS]
    lines = [
        "PSNR in dB by noise level, in 255ths; the denoising stream ends at 100:",
        "",
        "| network | " + " | ".join(levels) + " |",
        "| --- |" + " ---: |" * len(levels),
    ]
    for row in report["rows"]:
        if row["status"] == "done":
            cells = [number(row["ours"][level]["value"], "{:.2f}") for level in levels]
            lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
