"""The tables of "Classification-denoising networks" (CDN), with the paper's figures.

Table 1 has rows beside the paper's: what the denoisers know of the noise level differs (Tweedie's
formula needs sigma, a blind DnCNN does not), so GradResNet stands there with the level that it
estimates itself as well, and DRUNet with its published noise map; and the gradient-step denoisers
that the paper argues against. JEM's row is the published recipe at full scale; below, a small
network and five Langevin steps. Nothing trains it to denoise, and its PSNR says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ebmkit.experiments.rows import Expectation, Row, Table
from ebmkit.training import RECIPES

__all__ = ["CLAIMS", "GRID", "JEM", "JOINT", "TABLE1", "TABLES"]


def _paper(accuracy: float | None = None, *psnr: float, hours: float | None = None) -> Any:
    figures = {"accuracy": accuracy, "hours": hours}
    figures |= dict(zip(("15", "25", "50"), psnr, strict=False))
    return {name: value for name, value in figures.items() if value is not None}


def _backbone(**fields: Any) -> dict[str, Any]:
    return {"model": {"backbone": fields}}


_DSM, _CE = {"objective": "dsm"}, {"objective": "ce"}

JOINT = Row(
    "joint",
    "GradResNet",
    "joint",
    {"objective": "ce+dsm"},
    _paper(96.3, 31.90, 29.00, 25.25, hours=1.3),
)

_LITTLE_NOISE = {"noise": {"kind": "fixed", "min": 0.0, "max": 0.015}}

JEM = Row(
    "jem",
    "JEM (WideResNet)",
    "joint",
    {
        "backbone": "wideresnet10-jem",
        "head": "logit",
        "objective": "jem",
        "streams": {"classify": _LITTLE_NOISE, "generate": {"batch_size": 32, **_LITTLE_NOISE}},
        "optimizer": {"lr": 3e-4, "weight_decay": 0.0, "warmup_steps": 30},
        "negatives": {"steps": 5, "buffer_size": 1000},
    }
    | _backbone(width=8),
    _paper(92.9, hours=36),
    at_full=RECIPES["jem"].config,
)

NOISY = Row("noisy", "nothing: the noisy image, clipped", "denoising", run="joint", reads="clipped")

_RESNET = {"backbone": "resnet18", "head": "logit", "model": {"head": {"bias": True}}}

TABLE1 = Table(
    "table1",
    "CIFAR-10: one network for both tasks against a network for each (CDN table 1)",
    (
        Row("resnet18", "ResNet18", "classification", _RESNET | _CE, _paper(96.5, hours=0.7)),
        Row("gradresnet-ce", "GradResNet", "classification", _CE, _paper(96.1, hours=0.7)),
        NOISY,
        Row(
            "dncnn",
            "DnCNN, 20 layers",
            "denoising",
            {"backbone": "dncnn20"} | _DSM,
            _paper(None, 32.05, 29.07, 25.23, hours=0.8),
        ),
        Row(
            "drunet",
            "DRUNet, blind",
            "denoising",
            {"backbone": "drunet-blind"} | _DSM,
            _paper(None, 32.12, 29.20, 25.52, hours=0.9),
        ),
        Row("drunet-map", "DRUNet, noise map", "denoising", {"backbone": "drunet"} | _DSM),
        Row(
            "gradresnet-dsm",
            "GradResNet",
            "denoising",
            _DSM,
            _paper(None, 32.21, 29.28, 25.51, hours=1.3),
        ),
        Row(
            "gradresnet-dsm-blind",
            "GradResNet, own sigma",
            "denoising",
            run="gradresnet-dsm",
            reads="blind",
        ),
        Row("gs-drunet", "GS-DRUNet", "denoising", {"backbone": "gs-drunet"} | _DSM),
        Row(
            "gradncnn",
            "GraDnCNN",
            "denoising",
            {"backbone": "gradncnn"}
            | _backbone(width=32)
            | _DSM,  # twice the others', as published
            at_full=_backbone(width=128),
        ),
        JEM,
        JOINT,
        Row("joint-blind", "GradResNet, own sigma", "joint", run="joint", reads="blind"),
        Row("joint-mean", "GradResNet, plain loss (mean)", "joint", {"objective": "ce+dsm-mean"}),
        Row("joint-sum", "GradResNet, plain loss (sum)", "joint", {"objective": "ce+dsm-sum"}),
    ),
    (
        Expectation("resnet18", "gradresnet-ce", "accuracy"),
        Expectation("resnet18", "joint", "accuracy"),
        Expectation("joint", "gradresnet-ce", "accuracy"),
        Expectation("drunet", "dncnn", "15"),
        Expectation("drunet", "dncnn", "25"),
        Expectation("drunet", "dncnn", "50"),
        Expectation("gradresnet-dsm", "drunet", "15"),
        Expectation("gradresnet-dsm", "drunet", "25"),
        Expectation("drunet", "gradresnet-dsm", "50"),
        Expectation("gradresnet-dsm", "joint", "15"),
        Expectation("gradresnet-dsm", "joint", "25"),
        Expectation("gradresnet-dsm", "joint", "50"),
        Expectation("dncnn", "joint", "15"),
        Expectation("dncnn", "joint", "25"),
        Expectation("joint", "dncnn", "50"),
    ),
)

TABLE2 = Table(
    "table2",
    "ImageNet (CDN table 2)",
    (
        Row(
            "imagenet-resnet18",
            "ResNet18",
            "classification",
            {"backbone": "resnet18-imagenet", "head": "logit", "model": {"head": {"bias": True}}}
            | _CE,
            _paper(69.8, hours=96),
        ),
        Row(
            "imagenet-joint",
            "GradResNet",
            "joint",
            {"objective": "ce+dsm"},
            _paper(68.6, 34.59, 31.94, 27.17, hours=208),
        ),
    ),
    (Expectation("imagenet-resnet18", "imagenet-joint", "accuracy"),),
    family="imagenet",
)

_NO_SIDE = Row(
    "no-side",
    "no side connections",
    "joint",
    _backbone(side_connections=False),
    _paper(94.0, 31.86, 28.95, 25.17),
)
_RELU = Row(
    "relu", "ReLU", "joint", _backbone(activation="relu"), _paper(92.0, 29.59, 24.90, 17.11)
)
_BIAS = Row(
    "bias",
    "biases",
    "joint",
    {"model": {"backbone": {"bias": True}, "head": {"bias": True}}},
    _paper(95.9, 31.95, 29.03, 25.30),
)

TABLE3 = Table(
    "table3",
    "CIFAR-10: what each change to the ResNet is worth (CDN table 3)",
    (
        JOINT,
        _RELU,
        Row(
            "batch",
            "BatchNorm",
            "joint",
            _backbone(norm="batch"),
            _paper(11.9, 24.33, 20.84, 18.06),
        ),
        _BIAS,
        _NO_SIDE,
        NOISY,
    ),
    (
        *(Expectation("joint", "relu", metric) for metric in ("accuracy", "15", "25", "50")),
        *(Expectation("joint", "batch", metric) for metric in ("accuracy", "15", "25", "50")),
        Expectation("joint", "bias", "accuracy"),
        *(Expectation("bias", "joint", metric) for metric in ("15", "25", "50")),
        *(Expectation("joint", "no-side", metric) for metric in ("accuracy", "15", "25", "50")),
    ),
)

TABLES: dict[str, Table] = {table.name: table for table in (TABLE1, TABLE2, TABLE3)}
"""By name."""

_SCALE = Row("scale-norm", "scale-keeping norm", "joint", _backbone(norm="scale"))
_SHARED_LAW = {"kind": "squared-uniform", "min": "1/255", "max": "100/255"}

CLAIMS = Table(
    "claims",
    "what the paper says in passing",
    (
        JOINT,
        Row("ce-cdsm", "ce+cdsm", "joint", {"objective": "ce+cdsm"}),
        Row("ce-dsm-cdsm", "ce+dsm+cdsm", "joint", {"objective": "ce+dsm+cdsm"}),
        Row(
            "mix",
            "MixUp/CutMix on below full, off at full",
            "joint",
            {"streams": {"classify": {"augmentation": {"mix": "both"}}}},
            at_full={"streams": {"classify": {"augmentation": {"mix": "none"}}}},
        ),
        Row(
            "equal-noise",
            "both streams with noise 1 to 100/255",
            "joint",
            {"streams": {"classify": {"noise": _SHARED_LAW}}},
        ),
        Row(
            "norm-everywhere",
            "a norm after every convolution",
            "joint",
            _backbone(norm_everywhere=True),
        ),
        _BIAS,
        _SCALE,
    ),
)

_SHARED = {
    ("group", "gelu", False): JOINT,
    ("group", "relu", False): _RELU,
    ("group", "gelu", True): _BIAS,
    ("scale", "gelu", False): _SCALE,
}


ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU"}


def _cell(norm: str, activation: str, bias: bool) -> Row:
    fields = {"norm": norm, "activation": activation, "bias": bias}
    layer = {"model": {"backbone": fields, "head": {"bias": bias}}}
    end = "bias" if bias else "none"
    label = f"{norm} norm, {ACTIVATIONS[activation]}, {'biases' if bias else 'no bias'}"
    shared = _SHARED.get((norm, activation, bias))
    if shared is not None:
        return replace(shared, label=label)
    return Row(f"{norm}-{activation}-{end}", label, "joint", layer)


GRID: tuple[Row, ...] = tuple(
    _cell(norm, activation, bias)
    for norm in ("group", "scale")
    for activation in ("gelu", "relu")
    for bias in (False, True)
)
"""{plain, scale-keeping norm} x {GELU, ReLU} x {no bias, biases}, for the local linearity."""
