"""The tables of "Classification-denoising networks" (CDN), ours beside the paper's figures.

A cell is "ours (the paper's)"; a dash stands where the paper has no figure, and where a variant did
not run its cells say so. Below come the circumstances, and each ordering that the paper reports
with whether ours has it. An ordering is called open where the 95 % intervals of the two accuracies
overlap, or the PSNRs are within 0.1 dB: all is from one seed.

Table 1 has rows beside the paper's: what the denoisers know of the noise level differs (Tweedie's
formula needs sigma, a blind DnCNN does not), so GradResNet stands there with the level that it
estimates itself as well, and DRUNet with its published noise map; and the gradient-step denoisers
that the paper argues against. JEM's row is the published recipe at full scale; below, a small
network and five Langevin steps. Nothing trains it to denoise, and its PSNR says so.

``claims`` holds each variant of the paper's side claims against the joint model, and denoises
beyond the noise of training, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from ebmkit.evaluation import SIGMAS
from ebmkit.evaluation.suite import number
from ebmkit.experiments.report import (
    Experiment,
    Report,
    Result,
    circumstances,
    line,
    run_grid,
    table_head,
)
from ebmkit.experiments.runs import ExperimentRuns, Protocol, Variant
from ebmkit.noise import in_255ths
from ebmkit.registry import find
from ebmkit.training import RECIPES

METRICS: dict[str, str] = {
    "accuracy": "accuracy, %",
    "15": "PSNR at 15/255, dB",
    "25": "PSNR at 25/255, dB",
    "50": "PSNR at 50/255, dB",
    "hours": "training, hours",
}
"""Figures of a variant, in the order of the paper's columns, with their units."""

PSNR = ("15", "25", "50")

CLOSE = 0.1
"""PSNRs that are no further apart, in dB, are called open: one seed cannot tell them apart."""

SUITES_OF = {
    "classification": ("classify",),
    "denoising": ("denoise",),
    "joint": ("classify", "denoise"),
}
"""What a variant is measured by, by its task."""

CLAIM_SIGMAS = tuple(s / 255 for s in (15, 25, 50, 75, 100, 150, 200))
"""Noise levels of ``claims``: training ends at 100/255."""


class Ordering(NamedTuple):
    """An ordering that the paper reports: ``better`` above ``worse`` in ``metric``."""

    better: str
    worse: str
    metric: str


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: as on the command line.
        title: one line.
        variants: in the paper's order.
        expected: the orderings of the paper that ours are held against.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    expected: tuple[Ordering, ...] = ()

    def variant(self, name: str) -> Variant:
        """The variant called ``name``.

        Raises:
            UserError: if there is none; it names the nearest.
        """
        return find(f"row of {self.name}", {v.name: v for v in self.variants}, name)


# --- the grids -----------------------------------------------------------------------------------


def _paper(accuracy: float | None = None, *psnr: float, hours: float | None = None) -> Any:
    figures = {"accuracy": accuracy, "hours": hours, **dict(zip(PSNR, psnr, strict=False))}
    return {name: value for name, value in figures.items() if value is not None}


def _backbone(**fields: Any) -> dict[str, Any]:
    return {"model": {"backbone": fields}}


def _named(backbone: str) -> dict[str, Any]:
    return {"backbone": backbone}


def _above(better: str, worse: str, *metrics: str) -> tuple[Ordering, ...]:
    return tuple(Ordering(better, worse, metric) for metric in metrics)


_DSM, _CE, _JOINT = {"objective": "dsm"}, {"objective": "ce"}, {"objective": "ce+dsm"}
_LOGIT_HEAD: dict[str, Any] = {"head": "logit", "model": {"head": {"bias": True}}}
_LITTLE_NOISE = {"noise": {"kind": "fixed", "min": 0.0, "max": 0.015}}

# fmt: off
JOINT = Variant("joint", "GradResNet", "joint", _JOINT,
                _paper(96.3, 31.90, 29.00, 25.25, hours=1.3))
JEM = Variant(
    "jem", "JEM (WideResNet)", "joint",
    {
        "backbone": "wideresnet10-jem",
        "head": "logit",
        "objective": "jem",
        "streams": {"classify": _LITTLE_NOISE, "generate": {"batch_size": 32, **_LITTLE_NOISE}},
        "optimizer": {"lr": 3e-4, "weight_decay": 0.0, "warmup_steps": 30},
        "negatives": {"steps": 5, "buffer_size": 1000},
    } | _backbone(width=8),
    _paper(92.9, hours=36),
    at_full=RECIPES["jem"].config,
)
_NOISY = Variant("noisy", "nothing: the noisy image, clipped", "denoising", run=JOINT,
                 reads="clipped")
_DENOISING = Variant("gradresnet-dsm", "GradResNet", "denoising", _DSM,
                     _paper(None, 32.21, 29.28, 25.51, hours=1.3))
_OWN_SIGMA = "GradResNet, own sigma"

TABLE1 = Table(
    "table1",
    "CIFAR-10: one network for both tasks against a network for each (CDN table 1)",
    (
        Variant("resnet18", "ResNet18", "classification", _LOGIT_HEAD | _CE | _named("resnet18"),
                _paper(96.5, hours=0.7)),
        Variant("gradresnet-ce", "GradResNet", "classification", _CE, _paper(96.1, hours=0.7)),
        _NOISY,
        Variant("dncnn", "DnCNN, 20 layers", "denoising", _named("dncnn20") | _DSM,
                _paper(None, 32.05, 29.07, 25.23, hours=0.8)),
        Variant("drunet", "DRUNet, blind", "denoising", _named("drunet-blind") | _DSM,
                _paper(None, 32.12, 29.20, 25.52, hours=0.9)),
        Variant("drunet-map", "DRUNet, noise map", "denoising", _named("drunet") | _DSM),
        _DENOISING,
        Variant("gradresnet-dsm-blind", _OWN_SIGMA, "denoising", run=_DENOISING, reads="blind"),
        Variant("gs-drunet", "GS-DRUNet", "denoising", _named("gs-drunet") | _DSM),
        Variant("gradncnn", "GraDnCNN", "denoising",  # twice the others' width, as published
                _named("gradncnn") | _backbone(width=32) | _DSM, at_full=_backbone(width=128)),
        JEM,
        JOINT,
        Variant("joint-blind", _OWN_SIGMA, "joint", run=JOINT, reads="blind"),
        *(Variant(f"joint-{reduction}", f"GradResNet, plain loss ({reduction})", "joint",
                  {"objective": f"ce+dsm-{reduction}"})
          for reduction in ("mean", "sum")),
    ),
    (
        *_above("resnet18", "gradresnet-ce", "accuracy"),
        *_above("resnet18", "joint", "accuracy"),
        *_above("joint", "gradresnet-ce", "accuracy"),
        *_above("drunet", "dncnn", *PSNR),
        *_above("gradresnet-dsm", "drunet", "15", "25"),
        *_above("drunet", "gradresnet-dsm", "50"),
        *_above("gradresnet-dsm", "joint", *PSNR),
        *_above("dncnn", "joint", "15", "25"),
        *_above("joint", "dncnn", "50"),
    ),
)

TABLE2 = Table(
    "table2",
    "ImageNet (CDN table 2)",
    (
        Variant("imagenet-resnet18", "ResNet18", "classification",
                _LOGIT_HEAD | _CE | _named("resnet18-imagenet"),
                _paper(69.8, hours=96), family="imagenet"),
        Variant("imagenet-joint", "GradResNet", "joint", _JOINT,
                _paper(68.6, 34.59, 31.94, 27.17, hours=208), family="imagenet"),
    ),
    _above("imagenet-resnet18", "imagenet-joint", "accuracy"),
)
# fmt: on


def _change(name: str, label: str, layer: Mapping[str, Any], *paper: float) -> Variant:
    """The joint network with something changed."""
    return Variant(name, label, "joint", layer, _paper(*paper))


_RELU = _change("relu", "ReLU", _backbone(activation="relu"), 92.0, 29.59, 24.90, 17.11)
_BATCH = _change("batch", "BatchNorm", _backbone(norm="batch"), 11.9, 24.33, 20.84, 18.06)
_BIAS = _change("bias", "biases", {"model": {"backbone": {"bias": True}, "head": {"bias": True}}},
                95.9, 31.95, 29.03, 25.30)  # fmt: skip
_NO_SIDE = _change("no-side", "no side connections", _backbone(side_connections=False),
                   94.0, 31.86, 28.95, 25.17)  # fmt: skip
_SCALE = _change("scale-norm", "scale-keeping norm", _backbone(norm="scale"))

TABLE3 = Table(
    "table3",
    "CIFAR-10: what each change to the ResNet is worth (CDN table 3)",
    (JOINT, _RELU, _BATCH, _BIAS, _NO_SIDE, _NOISY),
    (
        *_above("joint", "relu", "accuracy", *PSNR),
        *_above("joint", "batch", "accuracy", *PSNR),
        *_above("joint", "bias", "accuracy"),
        *_above("bias", "joint", *PSNR),
        *_above("joint", "no-side", "accuracy", *PSNR),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in (TABLE1, TABLE2, TABLE3)}
"""By name."""


def _mix(mix: str) -> dict[str, Any]:
    return {"streams": {"classify": {"augmentation": {"mix": mix}}}}


_SHARED_LAW = {"kind": "squared-uniform", "min": "1/255", "max": "100/255"}

CLAIMS = Table(
    "claims",
    "what the paper says in passing",
    (
        JOINT,
        _change("ce-cdsm", "ce+cdsm", {"objective": "ce+cdsm"}),
        _change("ce-dsm-cdsm", "ce+dsm+cdsm", {"objective": "ce+dsm+cdsm"}),
        replace(
            _change("mix", "MixUp/CutMix on below full, off at full", _mix("both")),
            at_full=_mix("none"),
        ),
        _change(
            "equal-noise",
            "both streams with noise 1 to 100/255",
            {"streams": {"classify": {"noise": _SHARED_LAW}}},
        ),
        _change(
            "norm-everywhere", "a norm after every convolution", _backbone(norm_everywhere=True)
        ),
        _BIAS,
        _SCALE,
    ),
)

_IN_TABLES = {
    ("group", "gelu", False): JOINT,
    ("group", "relu", False): _RELU,
    ("group", "gelu", True): _BIAS,
    ("scale", "gelu", False): _SCALE,
}


def _cell(norm: str, activation: str, bias: bool) -> Variant:
    layer = _backbone(norm=norm, activation=activation, bias=bias)
    layer["model"]["head"] = {"bias": bias}
    name = f"{norm}-{activation}-{'bias' if bias else 'none'}"
    words = {"gelu": "GELU", "relu": "ReLU"}[activation]
    label = f"{norm} norm, {words}, {'biases' if bias else 'no bias'}"
    known = _IN_TABLES.get((norm, activation, bias), Variant(name, label, "joint", layer))
    return replace(known, label=label)


GRID = tuple(
    itertools.starmap(_cell, itertools.product(("group", "scale"), ("gelu", "relu"), (False, True)))
)
"""{plain, scale-keeping norm} x {GELU, ReLU} x {no bias, biases}, for the local linearity."""


# --- the reports ---------------------------------------------------------------------------------


def run_table(
    table: Table, runs: ExperimentRuns, only: Sequence[str] = (), sigmas: Sequence[float] = SIGMAS
) -> Report:
    """Train and measure the variants of ``table`` that are ``only``, all if empty.

    Variants that are left out now but were finished before stay in the report.

    Raises:
        Interrupted: if training was; calling again resumes it.
        UserError: if a variant does not exist or does not suit this machine. One that stops later
            is named in ``runs.stopped`` and in the report.
    """
    from ebmkit.experiments.plots import compare_with_paper

    for name in only:
        table.variant(name)
    folder = "table" if tuple(sigmas) == SIGMAS else "claims"
    results = run_grid(
        runs,
        table.variants,
        only,
        lambda v: Protocol(folder, SUITES_OF[v.task], tuple(sigmas), runs.scale.images),
    )
    for one in results:
        if "denoise" in one.documents:
            knows = one.documents["denoise"]["knows_sigma"]
            one.facts["knows_sigma"] = knows[one.variant.reads]
    about = circumstances(runs, table.name, results)
    document = table_document(table, runs.scale.name, results, about)
    plots = {f"{table.name}.png": partial(compare_with_paper, document)}
    return Report(document, table_text(document), plots)


def figures_of(result: Result) -> dict[str, dict[str, float]]:
    """The figures of a variant by `METRICS`, with ``low`` and ``high`` where there is an interval.

    Accuracies in percent, PSNR in dB; PSNR only of variants that were trained to denoise.
    """
    variant, documents, figures = result.variant, result.documents, {}
    if "classify" in documents and variant.task != "denoising":
        found = documents["classify"]
        values = (found["accuracy"], *found["accuracy_interval"])
        figures["accuracy"] = {
            key: 100 * v for key, v in zip(("value", "low", "high"), values, strict=True)
        }
    if "denoise" in documents and variant.task != "classification":
        for level, estimate in documents["denoise"]["denoisers"][variant.reads]["psnr"].items():
            figures[level] = {key: estimate[key] for key in ("value", "low", "high")}
    seconds = result.facts.get("seconds")
    if seconds is not None and variant.run is None:
        figures["hours"] = {"value": seconds / 3600}
    return figures


def table_document(
    table: Table, scale: str, results: Sequence[Result], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about ``table``, as JSON has it."""
    heading, data = table.title, about["dataset"]
    if scale != "full" and data and data not in heading.lower().replace("-", ""):
        heading = f"{heading}, here on {data}"
    rows: list[dict[str, Any]] = [
        {
            "name": one.variant.name,
            "label": one.variant.label,
            "task": one.variant.task,
            "status": one.status,
            "knows_sigma": one.facts.get("knows_sigma"),
            "ours": figures_of(one),
            "paper": dict(one.variant.paper),
            "facts": one.facts,
        }
        for one in results
    ]
    by_name = {row["name"]: row for row in rows}
    orderings = [] if scale == "smoke" else [_ordering(one, by_name) for one in table.expected]
    return {
        "table": table.name,
        "title": table.title,
        "heading": heading,
        "scale": scale,
        **about,
        "rows": rows,
        "orderings": [one for one in orderings if one is not None],
    }


def _ordering(expected: Ordering, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """How ours stand in an ordering of the paper; None where a figure is missing."""
    metric, names = expected.metric, (expected.better, expected.worse)
    pair = [rows[name] for name in names if name in rows]
    figures = [row["ours"].get(metric, {"value": None}) for row in pair]
    if len(pair) < 2 or any(one["value"] is None for one in figures):
        return None
    a, b = figures
    gap = a["value"] - b["value"]
    return {
        **expected._asdict(),
        "paper": pair[0]["paper"][metric] - pair[1]["paper"][metric],
        "ours": gap,
        "verdict": "open" if _is_open(a, b, metric) else "holds" if gap > 0 else "reversed",
    }


def _is_open(a: Mapping[str, float], b: Mapping[str, float], metric: str) -> bool:
    """Whether two figures are too close to be told apart by one seed."""
    if metric == "accuracy":
        return a["low"] <= b["high"] and b["low"] <= a["high"]
    return abs(a["value"] - b["value"]) <= CLOSE


def table_text(report: Mapping[str, Any]) -> str:
    """`table_document` as Markdown."""
    shown = [m for m in METRICS if any(m in {**r["ours"], **r["paper"]} for r in report["rows"])]
    lines = [
        f"## {report['heading']}",
        "",
        f"Scale `{report['scale']}`: {report['about']}. Each cell: ours (the paper's).",
        "",
        *table_head(["task", "network", "sigma", *(METRICS[m] for m in shown)], left=3),
    ]
    for row in report["rows"]:
        label = row["label"] if row["status"] == "done" else f"{row['label']}: {row['status']}"
        cells = [_ours_and_paper(metric, row) for metric in shown]
        lines.append(line([row["task"], label, row["knows_sigma"] or "", *cells]))
    lines += ["", "Column sigma: what the denoiser is told of the noise level.", ""]
    if report["orderings"]:
        lines += [
            "Orderings of the paper (difference, ours and the paper's):",
            "",
            line(["better", "worse", "figure", "ours", "paper", "here it"]),
            line(["---", "---", "---", "---:", "---:", "---"]),
        ]
        words = {"open": "is open", "holds": "holds", "reversed": "is reversed"}
        lines += [
            line([o["better"], o["worse"], METRICS[o["metric"]], f"{o['ours']:+.2f}",
                  f"{o['paper']:+.2f}", words[o["verdict"]]])
            for o in report["orderings"]
        ]  # fmt: skip
        rule = "*open*: the 95 % intervals of accuracies overlap, or PSNRs are within"
        lines += ["", f"One seed. {rule} {CLOSE} dB.", ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in report["notes"])]) + "\n"


def _ours_and_paper(metric: str, row: Mapping[str, Any]) -> str:
    ours, paper = row["ours"].get(metric), row["paper"].get(metric)
    if ours is None and paper is None:
        return ""
    value = None if ours is None else ours["value"]
    if metric == "hours":
        form = "{:.2f}" if value is None or value >= 0.095 else "{:.4f}"
        return f"{number(value, form)} ({number(paper, '{:g}')})"
    form = "{:.1f}" if metric == "accuracy" else "{:.2f}"
    return f"{number(value, form)} ({number(paper, form)})"


def run_claims(runs: ExperimentRuns, only: Sequence[str]) -> Report:
    """The side claims: a table like the others, with differences and more noise levels."""
    from ebmkit.experiments.plots import beyond_training

    report = run_table(CLAIMS, runs, only, CLAIM_SIGMAS)
    plots = dict(report.plots)
    plots["claims-beyond.png"] = partial(beyond_training, report.document)
    return Report(report.document, claims_text(report.document), plots)


def claims_text(report: Mapping[str, Any]) -> str:
    """`table_text`, differences to the joint network, and PSNR at every noise level."""
    rows = {row["name"]: row for row in report["rows"]}
    done = [row for row in rows.values() if row["status"] == "done"]
    base = rows[JOINT.name]["ours"]
    levels = [in_255ths(s) for s in CLAIM_SIGMAS]
    lines = [
        table_text(report),
        "Each variant minus the joint network (*: a difference by the rule for orderings, of one "
        "seed; the paper found none for ce+cdsm and ce+dsm+cdsm):",
        "",
        *table_head(["variant", "accuracy, %", "PSNR at 15/255", "at 25/255", "at 50/255"]),
    ]
    for row in done if base else ():
        if row["name"] != JOINT.name:
            changes = [_difference(row["ours"], base, m) for m in ("accuracy", *PSNR)]
            lines.append(line([row["label"], *changes]))
    lines += [
        "",
        "PSNR in dB by noise level, in 255ths; the denoising stream ends at 100:",
        "",
        *table_head(["network", *levels]),
    ]
    for row in done:
        cells = [number(row["ours"][level]["value"], "{:.2f}") for level in levels]
        lines.append(line([row["label"], *cells]))
    return "\n".join(lines) + "\n"


def _difference(ours: Mapping[str, Any], base: Mapping[str, Any], metric: str) -> str:
    a, b = ours[metric], base[metric]
    if a["value"] is None or b["value"] is None:
        return "not finite"
    return f"{a['value'] - b['value']:+.2f}{'' if _is_open(a, b, metric) else ' *'}"


TABLE_EXPERIMENTS: dict[str, Experiment] = {
    name: Experiment(table.title, partial(run_table, table), table.variants)
    for name, table in TABLES.items()
}
CLAIMS_EXPERIMENT = Experiment(CLAIMS.title, run_claims, CLAIMS.variants)
