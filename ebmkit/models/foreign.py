r"""Weights of other programs in our names: what each kind of checkpoint is, and how it converts.

============== ===============================================================================
kind           names in the state dict
============== ===============================================================================
``robustness`` ``module.model.*`` (or ``module.attacker.model.*``) and the normalisation
               ``module.normalizer.new_mean``, ``new_std`` (Engstrom et al. 2019). The network is
               a ResNet with ``shortcut`` and ``linear`` (CIFAR) or torchvision's (ImageNet)
``jem``        ``f.conv1``, ``f.layer1.0.conv1`` ..., ``class_output`` (Grathwohl et al.,
               arXiv 1912.03263); images in [-1, 1]; ``energy_output`` and ``f.linear``, which
               no class logit uses, are left out
``denoiser``   a published DnCNN or DRUNet (`convert_dncnn`, `convert_drunet`)
``state``      those of a backbone of the table BACKBONES, by a map of prefixes
============== ===============================================================================

Each becomes a configuration and a state of ours. The classifiers get the head ``logit``, with a
bias: log p(x) = logsumexp of the logits, E(x, y) = -logit_y.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.models.config import ModelConfig
from ebmkit.models.dncnn import convert_dncnn
from ebmkit.models.drunet import convert_drunet
from ebmkit.models.presets import BACKBONES
from ebmkit.models.resnet import BLOCKS
from ebmkit.registry import find
from ebmkit.validation import validated

__all__ = [
    "KINDS",
    "Converted",
    "convert_denoiser",
    "convert_jem",
    "convert_robustness",
    "convert_state",
    "kind_of",
    "renamed",
]

KINDS = {
    "robustness": "adversarially trained ResNet of the robustness package",
    "jem": "JEM's released WideResNet",
    "denoiser": "published DnCNN or DRUNet",
    "state": "state dict of a backbone, with --backbone and --map",
    "diffusers": "noise-predicting UNet of diffusers",
}
"""Kinds of checkpoints: name to one line."""

State = Mapping[str, Tensor]
Numbers = float | tuple[float, ...]
SHOWN = 8


class Converted(NamedTuple):
    """A checkpoint in our names.

    Attributes:
        config: builds the model.
        state: what it loads, without ``num_batches_tracked``.
        image_size: height and width of the images it was trained on, if that is known.
        classifies: whether its logits were trained.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    image_size: int | None
    classifies: bool


def kind_of(state: State) -> str | None:
    """Which of `KINDS` the names in ``state`` are; None: they do not tell."""
    names = [name.removeprefix("module.") for name in state]
    if any(name.startswith(("normalizer.new_mean", "attacker.model.")) for name in names):
        return "robustness"
    if {"class_output.weight", "f.conv1.weight"} <= set(names):
        return "jem"
    if all(name.startswith(("model.", "dncnn.", "in_conv", "conv_list", "out_conv", "m_"))
           for name in names):  # fmt: skip
        return "denoiser"
    return None


def renamed(state: State, rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """``state`` with prefixes replaced, each rule applied to what the one before it left.

    Raises:
        UserError: if two names become one.

    >>> list(renamed({"module.fc.bias": 0}, [("module.", ""), ("fc.", "head.classifier.")]))
    ['head.classifier.bias']
    """
    result: dict[str, Tensor] = {}
    rules = list(rules)
    for name, value in state.items():
        new = name
        for old, replacement in rules:
            if new.startswith(old):
                new = replacement + new[len(old) :]
        if new in result:
            raise UserError(f"the map makes two parameters {new!r}, one of them of {name!r}")
        result[new] = value
    return result


def convert_robustness(state: State, mean: Numbers | None, std: Numbers | None) -> Converted:
    """A ResNet of the ``robustness`` package, with its normalisation.

    Raises:
        UserError: if it is another network, or a parameter is missing or left over.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    named: dict[str, Tensor] = {}
    for prefix in ("model.", "attacker.model."):
        named = named or {n[len(prefix) :]: v for n, v in plain.items() if n.startswith(prefix)}
    statistics = []
    for given, part in ((mean, "new_mean"), (std, "new_std")):
        found = plain.get(f"normalizer.{part}", plain.get(f"attacker.normalize.{part}"))
        if given is None and found is None:
            raise UserError(f"the checkpoint has no normalizer.{part}: give --mean and --std")
        statistics.append(given if found is None or given is not None else _numbers(found))
    rules = {".shortcut.": ".downsample.", "linear.": "fc."}
    ours = {}
    for name, value in named.items():
        new = name
        for old, replacement in rules.items():
            starts = old.startswith(".") or new.startswith(old)
            new = new.replace(old, replacement, 1) if starts else new
        new = f"head.classifier.{new[3:]}" if new.startswith("fc.") else f"backbone.{new}"
        ours[new] = value
    shape = _resnet(ours)
    config = {
        "backbone": shape,
        "head": {"kind": "logit", "bias": True},
        "num_classes": _rows(ours, "head.classifier.weight"),
        "input_mean": statistics[0],
        "input_std": statistics[1],
    }
    size = 32 if shape["stem"] == "cifar" else 224
    return _fitted("a ResNet of the robustness package", config, ours, size)


def _resnet(ours: State) -> dict[str, Any]:
    """Depth, width and stem of a ResNet, by its parameters."""
    first = ours.get("backbone.conv1.weight")
    counts = tuple(
        len({n.split(".")[2] for n in ours if n.startswith(f"backbone.layer{stage}.")})
        for stage in (1, 2, 3, 4)
    )
    deep = "backbone.layer1.0.conv3.weight" in ours
    depth = next((d for d, c in BLOCKS.items() if c == counts and (d >= 50) == deep), None)
    if first is None or first.ndim != 4 or depth is None:
        raise UserError(
            f"the network is none of ResNet {', '.join(map(str, BLOCKS))}: its stages have "
            f"{counts} blocks; import it by --as state with --backbone and --map"
        )
    return {
        "kind": "resnet",
        "depth": depth,
        "width": len(first),
        "stem": "cifar" if first.shape[-1] == 3 else "imagenet",
    }


def convert_jem(state: State, mean: Numbers | None, std: Numbers | None) -> Converted:
    """JEM's WideResNet with head ``logit``; without a norm, or with batch normalisation.

    Raises:
        UserError: if it is another network, or a parameter is missing or left over.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    blocks = {int(m[1]) for n in plain if (m := re.match(r"f\.layer1\.(\d+)\.", n))}
    width = plain.get("f.layer1.0.conv1.weight")
    if not blocks or width is None:
        raise UserError("'f.layer1.0.conv1.weight' is missing from the weights: JEM's have it")
    count = len(blocks)
    ours = {}
    for name, value in plain.items():
        if name.startswith(("f.linear.", "energy_output.")):
            continue
        match = re.fullmatch(r"f\.layer([123])\.(\d+)\.(.+)", name)
        if match:
            index = (int(match[1]) - 1) * count + int(match[2])
            part = match[3].replace("shortcut.0.", "shortcut.").replace("bn", "norm")
            ours[f"backbone.blocks.{index}.{part}"] = value
        elif name.startswith("class_output."):
            ours[name.replace("class_output", "head.classifier")] = value
        else:
            new = name.removeprefix("f.").replace("conv1.", "stem.").replace("bn1.", "norm.")
            ours[f"backbone.{new}"] = value
    config = {
        "backbone": {
            "kind": "wideresnet",
            "depth": 6 * count + 4,
            "width": len(width),
            "norm": "batch" if "backbone.norm.running_mean" in ours else "none",
            "activation": "leaky_relu",
            "bias": True,
            "block": "jem",
        },
        "head": {"kind": "logit", "bias": True},
        "num_classes": _rows(ours, "head.classifier.weight"),
        "input_mean": 0.5 if mean is None else mean,
        "input_std": 0.5 if std is None else std,
    }
    return _fitted("JEM's WideResNet", config, ours, 32)


def convert_denoiser(state: State) -> Converted:
    """A published DnCNN or DRUNet.

    Raises:
        UserError: if it is neither.
    """
    convert = convert_drunet if any("m_head" in name for name in state) else convert_dncnn
    backbone, channels, weights = convert(state)
    config = ModelConfig(backbone=backbone, in_channels=1 if channels == 1 else 3)
    ours = {f"network.{name}": value for name, value in weights.items()}
    return Converted(config, ours, None, False)


def convert_state(
    state: State,
    backbone: str,
    rules: Sequence[tuple[str, str]] = (),
    classes: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Converted:
    """The state dict of ``backbone``, a name of BACKBONES, with a head.

    Args:
        state: names to tensors.
        rules: prefixes to replace, in order. What then begins with neither ``backbone.`` nor
            ``head.`` is the backbone's.
        classes: labels C; None: as many as the classifier has rows.
        settings: fields of `ModelConfig` that differ from the preset's, nested.

    Raises:
        UserError: if parameters are missing or left over: it lists them and offers a map.
    """
    preset = find("backbone", BACKBONES, backbone).config
    ours = {
        name if name.startswith(("backbone.", "head.")) else f"backbone.{name}": value
        for name, value in renamed(state, rules).items()
    }
    settings = dict(settings or {})
    shape = {**preset.model_dump(), **settings.pop("backbone", {})}
    head = {
        "kind": "linear-quadratic" if "head.density.weight" in ours else "logit",
        "bias": "head.classifier.bias" in ours or "head.classifier.weight" not in ours,
        **settings.pop("head", {}),
    }
    last = [v for n, v in ours.items() if v.ndim == 2 and not n.startswith("head.density")]
    rows = ours.get("head.classifier.weight")
    if rows is None and last and "head.density.weight" not in ours:
        rows = last[-1]  # the classifier under its own name, which the map lacks
    first = next((v for v in ours.values() if v.ndim == 4), None)
    config = {
        "backbone": shape,
        "head": head,
        "num_classes": classes if classes is not None else 0 if rows is None else len(rows),
        "in_channels": 1 if first is not None and first.shape[1] == 1 else 3,
        **settings,
    }
    if not config["num_classes"] and head["kind"] == "logit":
        raise UserError("the weights have no classifier, so the number of labels: give --classes")
    return _fitted(f"backbone {backbone!r}", config, ours, None)


def _rows(ours: State, name: str) -> int:
    if name not in ours or ours[name].ndim != 2:
        raise UserError("the checkpoint has no linear classifier on its features")
    return len(ours[name])


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in values.flatten())


def _fitted(what: str, values: dict[str, Any], ours: State, size: int | None) -> Converted:
    """Check that the state is that of the configuration, name by name and shape by shape."""
    config = validated(ModelConfig, values, what)
    with torch.device("meta"):
        wanted = _without_counts(config.build().state_dict())
    state = _without_counts(ours)
    unknown, missing = [n for n in state if n not in wanted], [n for n in wanted if n not in state]
    if unknown or missing:
        raise UserError(_misfit(what, unknown, missing, state, wanted))
    for name, value in wanted.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{name.removeprefix('backbone.')!r} is {tuple(state[name].shape)} and would be "
                f"{tuple(value.shape)} in {what}: set its shape, as in "
                "--set model.backbone.width=32, or take another"
            )
    config = config.model_copy(update={"reference_size": (size, size)}) if size else config
    return Converted(config, state, size, config.num_classes > 0)


def _without_counts(state: State) -> dict[str, Tensor]:
    return {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}


def _misfit(what: str, unknown: list[str], missing: list[str], state: State, wanted: State) -> str:
    parts = [f"the weights are not those of {what}"]
    for kind, names in (("unknown", unknown), ("missing", missing)):
        if names:
            shown = ", ".join(name.removeprefix("backbone.") for name in names[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{kind}: {shown}{more}")
    example = _example(unknown, missing, state, wanted)
    parts.append(f"rename prefixes by --map OLD=NEW, for example --map '{example}'")
    return "; ".join(parts)


def _example(unknown: list[str], missing: list[str], state: State, wanted: State) -> str:
    """A rule that makes a missing name of an unknown one."""
    for name in unknown:
        alike = [m for m in missing if wanted[m].shape == state[name].shape]
        near = difflib.get_close_matches(name, alike, n=1, cutoff=0.3)
        if near:
            old = name.removeprefix("backbone.").split(".")
            new = near[0].removeprefix("backbone.").split(".")
            while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
                old.pop(), new.pop()
            if old[-1] == new[-1]:  # only what stands before it differs
                return f"{'.'.join(old[:-1])}.={'.'.join([*new[:-1], ''])}"
            return f"{'.'.join(old)}.={'.'.join(new)}."
    return "module.="
