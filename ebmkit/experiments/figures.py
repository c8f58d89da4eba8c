"""The figures of "Classification-denoising networks" (CDN).

- ``fig1``: bias and variance of generative and discriminative fits; no networks.
- ``fig3``: the suite ``jacobian`` on the joint model, and the suite ``linearity`` on a grid of
  networks, {plain, scale-keeping norm} x {GELU, ReLU} x {no bias, biases}.
- ``fig4``: the suite ``robustness`` on ResNet18, GradResNet, JEM and the joint model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebmkit.compute import environment
from ebmkit.evaluation.attacks import STEPSIZE
from ebmkit.evaluation.suite import number
from ebmkit.experiments.report import (
    Experiment,
    Report,
    VariantResult,
    circumstances,
    mean_and_deviation,
    percent,
    run_grid,
    table_lines,
    text_of,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant
from ebmkit.experiments.seeds import compare_rows, p_value, rule
from ebmkit.experiments.tables import GRID, JEM, JOINT, TABLES
from ebmkit.experiments.theory import draw_figure1, figure1, markdown
from ebmkit.noise import in_255ths
from ebmkit.storage.reading import read_document
from ebmkit.terminal import counting

ATTACKED = (*(TABLES["table1"].variant(name) for name in ("resnet18", "gradresnet-ce")), JEM, JOINT)
"""The networks of ``fig4``."""

ORDERINGS = (
    ("joint", "resnet18", "the paper"),
    ("jem", "joint", "the paper"),
    ("joint", "gradresnet-ce", "same network, one objective less: not in the paper"),
)
"""Rows of `ATTACKED`, the more robust one first, and who says so (CDN section 4.3)."""

PARTS = {
    "fig4": "Direct attacks",
    "fig4-map": "Defences, and attack strength against noise level",
    "fig4-autoattack": "AutoAttack",
}
"""Parts of ``fig4``, each on its own number of images: options of the suite ``robustness`` in
``scales.yaml``. A scale without options of a part leaves it out."""


def run_fig1(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Figure 1; a document of the same scale and seed is not computed again."""
    expected = {"scale": runs.scale.size, "seed": runs.seed}
    document = read_document(runs.out / "fig1.json")
    made = document.get("made")
    if not isinstance(made, dict) or not expected.items() <= made.items():
        begun, own = time.perf_counter(), environment()
        with counting("fig1", runs.progress) as progress:
            document = figure1(runs.scale.size, runs.seed, progress)
        hours = (time.perf_counter() - begun) / 3600
        names = ("git_commit", "torch", "threads", "cores", "platform")
        document["made"] = expected | {"hours": hours} | {name: own[name] for name in names}
    document["made"]["command"] = runs.command("fig1")
    return Report(document, {"fig1.png": partial(draw_figure1, document)})


def _fig1_text(document: Mapping[str, Any]) -> str:
    made = document["made"]
    constants = "; ".join(
        ", ".join(f"{name} = {curve[name]:g}" for name in ("b_gen", "b_dis", "v_gen", "v_dis"))
        for curve in document["paper"]
    )
    title = "Figure 1: bias and variance of generative and discriminative fits (CDN figure 1)"
    head = "Computed from the constants of equation (4), and measured over many training sets."
    notes = [
        f"the paper's constants, assumed for illustration: {constants}",
        f"command: `{made['command']}`",
        f"seed: {made['seed']}",
        f"hardware: CPU, {made['threads']} of {made['cores']} cores, {made['hours']:.2f} hours; "
        f"PyTorch {made['torch']}; commit {made['git_commit']}",
        "data: drawn from each family",
    ]
    return text_of(title, [head, "", *markdown(document).splitlines()], notes)


def run_fig3(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Figures 3 and 5, and the local linearity of the grid."""
    from ebmkit.evaluation.linearity import linearity_grid

    options = runs.scale.options
    runs.check([JOINT])
    linearity = Protocol("fig3", ("linearity",), options=options)
    results = run_grid(runs, GRID, only, lambda v: linearity)
    done = [one for one in results if runs.seed in one.by_seed]
    jacobian = Protocol("fig3", ("jacobian",), options=options)
    spectra = runs.share([(JOINT.name, partial(runs.measure, JOINT, jacobian))])[JOINT.name]
    cells = []
    for one in done:
        config = runs.config(one.variant).model.model_dump()["backbone"]
        cells.append(
            {"name": one.variant.name, "label": one.variant.label}
            | {key: config[key] for key in ("norm", "activation", "bias")}
            | {key: one.documents["linearity"][key] for key in ("levels", "theory")}
        )
    about = circumstances(runs, "fig3", done, first_seed_shown=True)
    report = {"jacobian": spectra["jacobian"], "cells": cells, **about}
    own = runs.folder(JOINT) / "evaluation" / "fig3"
    sources = {"fig3.png": own / "jacobian.png", "fig3-spectrum.png": own / "spectrum.png"}
    plots = {"fig3-linearity.png": lambda path: linearity_grid(cells, path, about["dataset"])}
    copies = {name: path for name, path in sources.items() if path.exists()}  # spectra are rare
    return Report(report, plots, copies)


def _fig3_text(report: Mapping[str, Any]) -> str:
    found, images, cells = report["jacobian"], [], []
    for index, image in enumerate(found["per_image"]):
        pairs = [", ".join(f"{p['value']:.3g}" for p in image[k]) for k in ("largest", "smallest")]
        numbers = [f"{image['trace']:.1f}", image.get("above_half", "-")]
        name = image.get("label") or index
        images.append([name, *pairs, *numbers, f"{image['asymmetry']:.1e}"])
    for cell in report["cells"]:
        degree = (cell["theory"] or {}).get("degree")
        first = [cell["label"], "none" if degree is None else f"{degree:g}"]
        for level in cell["levels"]:
            error = number(level["error"]["value"], "{:.1e}")
            k = number(level["degree"]["value"], "{:.2f}")
            cells.append([*first, f"{in_255ths(level['sigma'])}/255", error, k])
            first = ["", ""]
    lines = [
        f"Eigenvalues at sigma {in_255ths(found['sigma'])}/255, three largest and two smallest in "
        "magnitude. The paper's, for another image: "
        + ", ".join(f"{v:g}" for v in [*found["paper"]["largest"], *found["paper"]["smallest"]])
        + ".",
        "",
        *table_lines(
            ["image", "largest", "smallest in magnitude", "trace", "above 1/2", "asymmetry"],
            images,
            left=3,
        ),
        "",
        "Local linearity, D(y) = J(y) y: the error |D - Jy| / |D|, and the degree k of homogeneity "
        "of log p that fits best (the claim holds exactly at k = 2).",
        "",
        *table_lines(["network", "k in theory", "sigma", "error", "k measured"], cells),
    ]
    title = "Figure 3: the Jacobian of the denoiser (CDN figures 3 and 5)"
    return text_of(title, lines, report["notes"])


def run_fig4(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """Figure 4: accuracy against attack strength, in the `PARTS` of the scale."""
    from ebmkit.evaluation.robustness import plot_comparison

    parts = {name: own for name in PARTS if (own := runs.scale.options.get(name))}
    found: dict[str, list[VariantResult]] = {}
    for part, options in parts.items():

        def protocol(
            variant: Variant, part: str = part, options: Mapping[str, Any] = options
        ) -> Protocol:
            """Protocol of this part; the joint network is also defended by denoising."""
            own = dict(options)
            if variant.task == "joint" and "defences" not in own:
                own["defences"] = ["direct", "noise", "denoise"]
            values = ("robustness",) if part == "fig4" else ()
            return Protocol(part, ("robustness",), options={"robustness": own}, image_values=values)

        found[part] = [r for r in run_grid(runs, ATTACKED, only, protocol) if r.status == "done"]
    documents = {
        part: {
            f"{one.variant.label} ({one.variant.shown_task})": _over_seeds(
                [documents["robustness"] for documents in one.by_seed.values()]
            )
            for one in results
        }
        for part, results in found.items()
    }
    results = found["fig4"]
    about = circumstances(runs, "fig4", results, first_seed_shown=True)
    several = any("seeds" in document for document in documents["fig4"].values())
    bands = "standard deviation over seeds" if several else "95 %"
    plots = {"fig4.png": partial(plot_comparison, documents["fig4"], bands=bands)}
    maps = {
        f"fig4-map-{one.variant.name}.png": path
        for part, some in found.items()
        for one in some
        if (path := runs.folder(one.variant) / f"evaluation/{part}/robustness-map.png").exists()
    }
    orderings = [] if runs.scale.size == "smoke" else _orderings(results)
    return Report({**documents, "orderings": orderings, **about}, plots, maps)


def _orderings(results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """Test `ORDERINGS` at every strength of the direct attacks, in points of accuracy."""
    by_name, found = {one.variant.name: one for one in results}, []
    for better, worse, source in ORDERINGS:
        if not {better, worse} <= by_name.keys():
            continue
        document = by_name[better].documents["robustness"]
        for norm, strengths in document["epsilons"].items():
            for epsilon in strengths:
                rows = (_unbroken(by_name[name], norm, epsilon) for name in (better, worse))
                own = {"better": better, "worse": worse, "source": source, "norm": norm}
                if tested := compare_rows(*rows):
                    found.append(own | {"epsilon": epsilon, **tested})
    return found


def _unbroken(result: VariantResult, norm: str, epsilon: float) -> dict[int, NDArray[np.float64]]:
    """By seed, 100 for each image (N,) that the direct attack of ``epsilon`` leaves right, or 0.

    Seeds whose values by image are missing or damaged are left out.
    """
    column = f"{norm}/direct"
    return {
        seed: 100.0 * (values["robustness"][column] > epsilon).double().numpy()
        for seed, values in result.image_values.items()
        if column in values.get("robustness", {})
    }


def _over_seeds(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of ``documents``, of several seeds with curves of `mean_and_deviation`."""
    if len(documents) < 2:
        return documents[0]
    curves = {
        norm: {
            name: [
                mean_and_deviation([d["curves"][norm][name][k]["value"] for d in documents])
                for k in range(len(curve))
            ]
            for name, curve in named.items()
        }
        for norm, named in documents[0]["curves"].items()
    }
    return {**documents[0], "curves": curves, "seeds": len(documents)}


def _fig4_text(report: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for part in (name for name in PARTS if name in report):
        lines += [f"### {PARTS[part]}", ""]
        for name, document in report[part].items():
            lines += _attacked_lines(name, document)
    if report["orderings"]:
        rows = (
            [
                *(one["better"], one["worse"], one["source"]),
                _strength(one["norm"], one["epsilon"]),
                *(f"{one['ours']:+.1f}", p_value(one), one["verdict"]),
            ]
            for one in report["orderings"]
        )
        names = ["better", "worse", "says", "attack", "difference", "p", "verdict"]
        lines += [
            "### Orderings",
            "",
            "Accuracy under direct attacks, first network minus second, in points:",
            "",
            *table_lines(names, rows, left=4),
            "",
            rule(report["orderings"]),
        ]
    return text_of("Figure 4: accuracy under attack (CDN figure 4)", lines, report["notes"])


def _strength(norm: str, epsilon: float) -> str:
    return f"{norm} {in_255ths(epsilon)}/255" if norm == "linf" else f"{norm} {epsilon:g}"


def _attacked_lines(name: str, document: Mapping[str, Any]) -> list[str]:
    """Results of one network: curves by norm and defence, AutoAttack, and settings."""
    seeds = document.get("seeds")
    spread = f"± standard deviation over {seeds} seeds" if seeds else "(95 % interval)"
    lines = [
        f"{name}, the first {document['images']} of {document['of']:,} {document['split']} "
        f"images, accuracy in % {spread}:",
        "",
    ]
    for norm, curves in document["curves"].items():
        strengths = document["epsilons"][norm]
        shown = [_strength(norm, epsilon).removeprefix(f"{norm} ") for epsilon in strengths]
        rows = ([defence, *map(percent, curve)] for defence, curve in curves.items())
        lines += [*table_lines([norm, *shown], rows), ""]
    for key, defence in document["defences"].items():
        lines.append(f"- {key}: {defence['about']}")
    for norm, checks in document["checks"].items():
        for key, check in checks.items():
            if "autoattack" in check:
                at, share = _strength(norm, check["epsilon"]), percent(check["autoattack"])
                lines.append(f"- AutoAttack against {key}, {at}: {share} % accuracy")
    lines += [f"- warning: {warning}" for warning in document["warnings"]]
    options = document["options"]
    size = options["stepsize"] or max(STEPSIZE, 2.5 / options["steps"])
    return [
        *lines,
        f"- attack: PGD, {options['steps']} steps of {size:g} of the strength, "
        f"{options['restarts']} random start(s); where noise is added, gradients over "
        f"{options['eot']} draws and labels over {options['draws']}",
        "",
    ]


FIGURE_EXPERIMENTS = {
    "fig1": Experiment(
        "bias and variance of generative and discriminative fits", run_fig1, _fig1_text
    ),
    "fig3": Experiment("Jacobian of the denoiser, local linearity", run_fig3, _fig3_text, GRID),
    "fig4": Experiment("accuracy under attack", run_fig4, _fig4_text, ATTACKED),
}
