"""What a report shows of each suite, besides its table: key numbers and plots.

`VIEWS` has a line per suite; a suite without one is shown by its table and all its plots. The
functions read the JSON document of an evaluation (docs/guide/evaluation-json.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebmkit.evaluation.robustness import norm_name, strength
from ebmkit.evaluation.suite import interval, number
from ebmkit.noise import in_255ths
from ebmkit.plots import SIGMA
from ebmkit.report.figures import Line, Panel

Document = Mapping[str, Any]
Documents = Sequence[tuple[str, Document]]
"""Names of runs, and the document of each."""


@dataclass(frozen=True)
class Metric:
    """A key number: its name, value and 95 % interval as text, and what it was measured on."""

    name: str
    value: str
    interval: str
    note: str = ""


@dataclass(frozen=True)
class View:
    """Key numbers of a document, plots of the documents of one or more runs, and the PNG files
    that the plots replace."""

    metrics: Callable[[Document], list[Metric]] = lambda document: []
    panels: Callable[[Documents], list[Panel]] = lambda documents: []
    replaces: tuple[str, ...] = ()


def metric(name: str, estimate: Mapping[str, Any], form: str, note: str = "") -> Metric:
    """A `Metric` of an estimate, in the number format ``form``; those in % without the sign."""
    span = interval(estimate, form)
    return Metric(name, number(estimate, form), "" if span == "-" else span, note)


def curve(
    label: str,
    x: Sequence[float],
    estimates: Sequence[Mapping[str, Any]],
    scale: float = 1,
    **look: Any,
) -> Line:
    """A `Line` of ``estimates`` at ``x`` with their intervals; missing estimates are skipped."""
    known = [(at, e) for at, e in zip(x, estimates, strict=True) if e["value"] is not None]

    def end(name: str) -> list[float]:
        return [math.nan if e[name] is None else scale * e[name] for _, e in known]

    look = {"marker": "o", "low": end("low"), "high": end("high")} | look
    return Line(label, [at for at, _ in known], end("value"), **look)


def _joined(run: str, label: str, documents: Documents) -> str:
    """Name of a line: with several runs, also the run's."""
    return label if len(documents) == 1 else f"{run}: {label}" if label else run


def _classify(document: Document) -> list[Metric]:
    return [metric("Accuracy", document["against_noise"][0]["accuracy"], "{:.2%}")]


def _against_noise(documents: Documents) -> list[Panel]:
    lines = [
        curve(
            _joined(run, "accuracy", documents),
            [255 * level["sigma"] for level in document["against_noise"]],
            [level["accuracy"] for level in document["against_noise"]],
            100,
            colour=i,
        )
        for i, (run, document) in enumerate(documents)
    ]
    return [Panel("Accuracy against noise (%)", SIGMA, lines, y_range=(0, 102))]


def _calibration(document: Document) -> list[Metric]:
    note = "calibration error, clean images"
    return [metric("ECE", document["levels"][0]["ece"], "{:.2%}", note)]


def _reliability(documents: Documents) -> list[Panel]:
    panels = []
    for k, level in enumerate(documents[0][1]["levels"]):
        lines = [Line("calibrated", [0, 100], [0, 100], colour=None, style=":")]
        for i, (run, document) in enumerate(documents):
            if k < len(document["levels"]):
                bins = [own for own in document["levels"][k]["bins"] if own["count"]]
                x = [100 * own["confidence"] for own in bins]
                label = _joined(run, "accuracy", documents)
                lines.append(
                    curve(label, x, [own["accuracy"] for own in bins], 100, colour=i, style="")
                )
        where = f"sigma {in_255ths(level['sigma'])}/255" if level["sigma"] else "clean images"
        panels.append(
            Panel(f"Reliability, {where}: accuracy (%)", "confidence (%)", lines, y_range=(-2, 102))
        )
    return panels


DENOISERS = ("unconditional", "conditional_predicted", "blind")
"""Denoisers in the plot; the table has all."""


def _denoise(document: Document) -> list[Metric]:
    found = []
    noisy, own = document["denoisers"]["noisy"], document["denoisers"]["unconditional"]
    for key, estimate in own["psnr"].items():
        note = f"noisy image: {number(noisy['psnr'][key], '{:.2f}')} dB"
        found.append(metric(f"PSNR at {key}/255 (dB)", estimate, "{:.2f}", note))
    return found


def _psnr(documents: Documents) -> list[Panel]:
    lines = []
    for i, (run, document) in enumerate(documents):
        denoisers = document["denoisers"]
        names = DENOISERS if len(documents) == 1 else DENOISERS[:1]
        for k, name in enumerate(name for name in names if name in denoisers):
            lines.append(
                _psnr_line(
                    _joined(run, denoisers[name]["about"], documents), denoisers[name], i + k
                )
            )
    noisy = documents[0][1]["denoisers"].get("noisy")
    if noisy:
        lines.append(_psnr_line("noisy image", noisy, None))
    return [Panel("PSNR (dB)", SIGMA, lines)]


def _psnr_line(label: str, denoiser: Document, colour: int | None) -> Line:
    psnr = denoiser["psnr"]
    style = ":" if colour is None else "-"
    return curve(label, [float(k) for k in psnr], list(psnr.values()), colour=colour, style=style)


STRENGTHS = {"linf": 8 / 255, "l2": 0.5}
"""Strengths of attacks usual in the literature, image units."""


def _robustness(document: Document) -> list[Metric]:
    found = []
    for norm, curves in document["curves"].items():
        epsilons, defence = document["epsilons"][norm], next(iter(curves))
        wanted = STRENGTHS.get(norm, epsilons[-1])
        i = min(range(len(epsilons)), key=lambda k: abs(epsilons[k] - wanted))
        name = f"Accuracy, {norm_name(norm)} {strength(norm, epsilons[i])}"
        note = f"PGD attack, classifier: {defence}"
        found.append(metric(name, curves[defence][i], "{:.1%}", note))
    return found


def _robustness_panels(documents: Documents) -> list[Panel]:
    panels = []
    for norm in documents[0][1]["curves"]:
        lines: list[Line] = []
        for run, document in documents:
            if norm not in document["curves"]:
                continue
            scale = 255 if norm == "linf" else 1
            x = [scale * epsilon for epsilon in document["epsilons"][norm]]
            curves = list(document["curves"][norm].items())
            for name, own in curves if len(documents) == 1 else curves[:1]:
                label = _joined(run, name, documents)
                lines.append(curve(label, x, own, 100, colour=len(lines)))
        x_label = "strength (1/255)" if norm == "linf" else "strength (image units)"
        title = f"Accuracy under {norm_name(norm)} PGD attacks (%)"
        panels.append(Panel(title, x_label, lines, y_range=(0, 102)))
    return panels


def _corruptions(document: Document) -> list[Metric]:
    if "mean_corruption_error" not in document:
        return []
    return [metric("Corruption error", document["mean_corruption_error"], "{:.1%}")]


def _ood(document: Document) -> list[Metric]:
    """Of the first score: its AUROC against the set that is hardest to detect."""
    score = next(iter(document["scores"]))
    areas = {name: own["scores"][score] for name, own in document["sets"].items()}
    known = {name: own["auroc"] for name, own in areas.items() if own}
    if not known:
        return []
    worst = min(known, key=lambda name: float(known[name]["value"]))
    note = f"score {score}; hardest set of {len(known)}"
    return [metric(f"AUROC, {worst}", known[worst], "{:.3f}", note)]


def _likelihood(document: Document) -> list[Metric]:
    own = next(iter(document["methods"].items()))
    form, unit = ("{:.3f}", "bits") if own[1]["bits"] else ("{:.1f}", "nats")
    name = "Bits per dimension" if unit == "bits" else "log p (nats)"
    return [metric(name, own[1][unit], form, f"by {own[0]}")]


def _generation(document: Document) -> list[Metric]:
    return [
        metric(name, estimate, "{:.2f}", f"{document['samples']['count']} samples")
        for name, estimate in document["measures"].items()
    ][:1]


VIEWS = {
    "classify": View(_classify, _against_noise, ("accuracy-against-noise.png",)),
    "denoise": View(_denoise, _psnr, ("psnr.png",)),
    "calibration": View(_calibration, _reliability, ("reliability.png",)),
    "robustness": View(_robustness, _robustness_panels, ("robustness.png",)),
    "corruptions": View(_corruptions),
    "ood": View(_ood),
    "likelihood": View(_likelihood),
    "generation": View(_generation),
}
"""Views by suite name."""
