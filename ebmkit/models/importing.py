"""Import of checkpoints from other programs.

`load_checkpoint` returns the model; `import_checkpoint` saves it in a folder for `ebmkit.load` and
the command line. No code in a file is executed (`ebmkit.storage.tensors`). The docs, "Import
checkpoints", list the kinds and the parameter names that identify them. Classifiers get the head
``logit`` with a bias: log p(x) = logsumexp of the logits, E(x, y) = -logit_y. The parameters
``energy_output`` and ``f.linear`` of JEM (Grathwohl et al., arXiv 1912.03263), which no class logit
uses, are dropped.

>>> model = load_checkpoint("cifar_l2_0_5.pt")                           # doctest: +SKIP
>>> model.log_joint(images)                                              # doctest: +SKIP
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, plain, validated
from ebmkit.hub import is_hub_name, locate_file
from ebmkit.models.config import ModelConfig, find_backbone
from ebmkit.models.dncnn import convert_dncnn
from ebmkit.models.drunet import convert_drunet
from ebmkit.models.pipelines import read_unet
from ebmkit.models.resnet import BLOCKS
from ebmkit.models.saving import save_as_run
from ebmkit.registry import find
from ebmkit.storage.tensors import read_state

KINDS = {
    "robustness": "adversarially trained ResNet of the robustness package",
    "jem": "JEM's released WideResNet",
    "denoiser": "published DnCNN or DRUNet",
    "state": "state dict of a backbone, with --backbone and --map",
    "diffusers": "noise-predicting UNet of diffusers",
}
"""Kinds of checkpoints: name -> description."""

State = Mapping[str, Tensor]
Numbers = float | tuple[float, ...]
SHOWN = 8
"""Maximum number of parameter names in a message."""


Converted = tuple[ModelConfig, dict[str, Tensor], int | None]
"""Configuration of the model, its state dict without ``num_batches_tracked``, and the height and
width of the training images (None: unknown)."""


def load_checkpoint(source: str | Path, kind: str | None = None, **options: Any) -> ScoreModel:
    """Load a checkpoint of another program as a model, frozen and in evaluation mode.

    Its ``card`` contains what is known about its training. Arguments: see `read_checkpoint`.

    Raises:
        UserError: if the file cannot be read or would run code, or the weights do not fit.
    """
    return read_checkpoint(source, kind, **options)[0]


def import_checkpoint(
    source: str | Path, folder: Path, kind: str | None = None, **options: Any
) -> ScoreModel:
    """Convert a checkpoint to a folder for `ebmkit.load` and the command line.

    Args:
        source: as for `read_checkpoint`.
        folder: a new or empty folder.
        kind: as for `read_checkpoint`.
        **options: other arguments of `read_checkpoint`.

    Raises:
        UserError: as `load_checkpoint` does, or if the folder is not empty.
    """
    return save_as_run(folder, lambda: read_checkpoint(source, kind, **options))


def read_checkpoint(
    source: str | Path,
    kind: str | None = None,
    *,
    backbone: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    classes: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    dataset: str = "",
    class_names: Sequence[str] = (),
    sigma_range: tuple[float, float] | None = None,
    averaged: bool = True,
) -> tuple[ScoreModel, ModelConfig]:
    """The model in a checkpoint, frozen and in evaluation mode, and its configuration.

    Args:
        source: a file, or ``owner/name:file`` on the Hugging Face hub; for diffusers a folder, or
            ``owner/name``.
        kind: a name of `KINDS`; None: detected from the parameter names.
        backbone: for ``state``, a name from `ebmkit list backbones`.
        rename: prefixes of parameter names to replace, (old, new), in order, before all else.
        classes: number of labels C; None: that of the classifier.
        mean: mean that the network subtracts from images in [0, 1], one number or one per channel;
            None: the checkpoint's, else 0.
        std: standard deviation that they are then divided by; None: the checkpoint's, else 1.
        image_size: height and width of the training images; None: those of the kind, if known.
        settings: for ``state``, nested fields of `ModelConfig` that override the preset's.
        dataset: name of the training set.
        class_names: class names in label order.
        sigma_range: lowest and highest noise level of the training, image units.
        averaged: of a file with raw and averaged weights, take the averaged ones.

    Raises:
        UserError: if the file cannot be read or would run code, or the weights do not fit.
    """
    if kind is not None:
        find("kind of checkpoint", KINDS, kind)
    path = Path(source)
    if (path / "model.json").is_file():
        raise UserError(f"{str(source)!r} is a model's folder already: use it as it is")
    repository = not path.exists() and is_hub_name(str(source)) and ":" not in str(source)
    if kind == "diffusers" or (kind is None and (path.is_dir() or repository)):
        given: dict[str, object] = {"backbone": backbone, "rename": rename, "classes": classes}
        given |= {"mean": mean, "std": std, "image_size": image_size, "settings": settings}
        if other := next((name for name, value in given.items() if value), None):
            raise UserError(
                f"the files of a diffusers UNet define its configuration: leave {other} out"
            )
        unet, config = read_unet(source)
        assert unet.card is not None
        if class_names and config.num_classes == len(class_names):
            unet.card.class_names = list(class_names)
        unet.card.dataset = dataset
        return unet, config
    if path.is_dir():
        raise UserError(f"{str(source)!r} is a folder: name the file of weights in it")
    state = read_plain_state(source, averaged, rename)
    kind = kind or ("state" if backbone else _kind_of(state))
    if kind is None:
        names = ", ".join(plain(name) for name in list(state)[:4])
        raise UserError(
            f"the names in {str(source)!r} ({names}, ...) do not identify the network: set "
            f"--backbone, or --as {', '.join(KINDS)}"
        )
    if kind != "state" and (backbone or settings):
        raise UserError(f"--backbone and --set belong to --as state, not to {kind!r}")
    if kind == "state":
        if backbone is None:
            raise UserError("--as state needs --backbone, a name from `ebmkit list backbones`")
        chosen: dict[str, Any] = {"input_mean": mean, "input_std": std, **(settings or {})}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        config, weights, size = _convert_state(state, backbone, classes, chosen)
    else:
        config, weights, size = _CONVERTED[kind](state, mean, std)
    size = image_size or size
    if classes is not None and classes != config.num_classes:
        raise UserError(
            f"the classifier has {config.num_classes} labels, not {classes}: leave --classes out"
        )
    if class_names and len(class_names) != config.num_classes:
        raise UserError(
            f"{dataset or 'the data set'} has {len(class_names)} classes and this classifier "
            f"{config.num_classes}"
        )
    if image_size is not None and config.num_classes:
        config = config.model_copy(update={"reference_size": (image_size, image_size)})
    model = config.without_pretrained().build()
    counts = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
    model.load_state_dict({**counts, **weights})
    model.card = ModelCard(
        dataset=dataset,
        objective=f"published: {str(source).rpartition('/')[2]}",
        channels=config.in_channels,
        image_size=(size, size) if size else None,
        class_names=list(class_names),
        sigma_range=sigma_range,
        classifies=config.num_classes > 0,
        energies="model",
        published_denoiser=kind == "denoiser",
    )
    return model.eval().requires_grad_(False), config


# --- kinds ---------------------------------------------------------------------------------------


def _kind_of(state: State) -> str | None:
    """The name in `KINDS` that the parameter names identify; None: unknown."""
    names = list(state)
    if any(name.startswith(("normalizer.new_mean", "attacker.model.")) for name in names):
        return "robustness"
    if {"class_output.weight", "f.conv1.weight"} <= set(names):
        return "jem"
    return "denoiser" if all(map(_DENOISER.match, names)) else None


_DENOISER = re.compile(r"(model|dncnn)\.\d+\.|in_conv|conv_list|out_conv|m_")
"""Parameter names of published DnCNNs and DRUNets."""


def is_recognised(state: State) -> bool:
    """Whether the parameter names identify the network."""
    return _kind_of(state) is not None


def read_plain_state(
    source: str | Path, averaged: bool = True, rename: Sequence[tuple[str, str]] = ()
) -> dict[str, Tensor]:
    """Weights of a file, without the prefixes ``module.`` of DataParallel and ``model.`` of
    Lightning modules (unless a rule is for them), renamed by the rules (`read_checkpoint`)."""
    state = read_state(locate_file(str(source)), averaged)
    if not any(old.startswith(_WRAPPERS) for old, _ in rename):
        state = _unwrapped(state)
    return _renamed(state, rename)


_WRAPPERS = ("module.", "model.")


def _unwrapped(state: State) -> dict[str, Tensor]:
    names = [name.removeprefix("module.") for name in state]
    while all(name.startswith("model.") for name in names) and not all(map(_DENOISER.match, names)):
        names = [name.removeprefix("model.") for name in names]
    return dict(zip(names, state.values(), strict=True))


def _renamed(state: State, rules: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """``state`` with prefixes of names replaced; each rule applies to the result of the previous.

    Raises:
        UserError: if two names become equal.

    >>> list(_renamed({"module.fc.bias": 0}, [("module.", ""), ("fc.", "head.classifier.")]))
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
            raise UserError(f"--map renames two parameters to {new!r}, one of them {name!r}")
        result[new] = value
    return result


def _substituted(
    state: State, *rules: tuple[str, str | Callable[[re.Match[str]], str]]
) -> dict[str, Tensor]:
    """Replace regular expressions in names; prefix all but ``head.*`` by ``backbone.``."""
    ours = {}
    for name, value in state.items():
        new = name
        for old, replacement in rules:
            new = re.sub(old, replacement, new, count=1)
        ours[new if new.startswith("head.") else f"backbone.{new}"] = value
    return ours


def _convert_robustness(state: State, mean: Numbers | None, std: Numbers | None) -> Converted:
    """Convert a ResNet of the ``robustness`` package, with its normalisation."""
    named: dict[str, Tensor] = {}
    for prefix in ("model.", "attacker.model."):
        named = named or {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
    statistics = []
    for given, part in ((mean, "new_mean"), (std, "new_std")):
        found = state.get(f"normalizer.{part}", state.get(f"attacker.normalize.{part}"))
        if given is None and found is None:
            raise UserError(f"the checkpoint has no normalizer.{part}: give --mean and --std")
        numbers = tuple(found.flatten().tolist()) if found is not None else ()
        statistics.append(numbers if given is None else given)
    ours = _substituted(
        named, (r"\.shortcut\.", ".downsample."), (r"^(linear|fc)\.", "head.classifier.")
    )
    shape = _resnet(ours)
    config = {
        "backbone": shape,
        **_classifier(ours),
        "input_mean": statistics[0],
        "input_std": statistics[1],
    }
    size = 32 if shape["stem"] == "cifar" else 224
    return _check_fit("a ResNet of the robustness package", config, ours, size)


def _resnet(ours: State) -> dict[str, Any]:
    """Configuration of a ResNet from its parameters: depth, width and stem."""
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


def _convert_jem(state: State, mean: Numbers | None, std: Numbers | None) -> Converted:
    """Convert JEM's WideResNet, without norms or with batch normalisation, to head ``logit``."""
    blocks = {int(m[1]) for n in state if (m := re.match(r"f\.layer1\.(\d+)\.", n))}
    width = state.get("f.layer1.0.conv1.weight")
    if not blocks or width is None:
        raise UserError("'f.layer1.0.conv1.weight' is missing from the weights: JEM's have it")
    count = len(blocks)
    unused = ("f.linear.", "energy_output.")
    ours = _substituted(
        {name: value for name, value in state.items() if not name.startswith(unused)},
        (r"^f\.layer([123])\.(\d+)", lambda m: f"blocks.{(int(m[1]) - 1) * count + int(m[2])}"),
        (r"(?<=\.)shortcut\.0\.", "shortcut."),
        (r"(?<=\.)bn(?=[12]\.)", "norm"),
        (r"^f\.conv1\.", "stem."),
        (r"^f\.norm1\.", "norm."),
        (r"^class_output\.", "head.classifier."),
        (r"^f\.", ""),
    )
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
        **_classifier(ours),
        "input_mean": 0.5 if mean is None else mean,
        "input_std": 0.5 if std is None else std,
    }
    return _check_fit("JEM's WideResNet", config, ours, 32)


def _convert_denoiser(state: State, *_: Numbers | None) -> Converted:
    """Convert a published DnCNN or DRUNet."""
    convert = convert_drunet if any("m_head" in name for name in state) else convert_dncnn
    backbone, channels, weights = convert(state)
    config = ModelConfig(backbone=backbone, in_channels=1 if channels == 1 else 3)
    ours = {f"network.{name}": value for name, value in weights.items()}
    return config, ours, None


_CONVERTED: dict[str, Callable[[State, Numbers | None, Numbers | None], Converted]] = {
    "robustness": _convert_robustness,
    "jem": _convert_jem,
    "denoiser": _convert_denoiser,
}


def _convert_state(
    state: State, backbone: str, classes: int | None, settings: dict[str, Any]
) -> Converted:
    """Convert a state dict of ``backbone``, a name of BACKBONES, with a head.

    Names that begin with neither ``backbone.`` nor ``head.`` belong to the backbone.
    """
    preset = find_backbone(backbone).config
    ours = {
        name if name.startswith(("backbone.", "head.")) else f"backbone.{name}": value
        for name, value in state.items()
    }
    shape = {**preset.model_dump(), **settings.pop("backbone", {})}
    head = {
        "kind": "linear-quadratic" if "head.density.weight" in ours else "logit",
        "bias": "head.classifier.bias" in ours or "head.classifier.weight" not in ours,
        **settings.pop("head", {}),
    }
    last = [v for n, v in ours.items() if v.ndim == 2 and not n.startswith("head.density")]
    rows = ours.get("head.classifier.weight")
    if rows is None and last and "head.density.weight" not in ours:
        rows = last[-1]  # the classifier, not yet renamed
    first = next((v for v in ours.values() if v.ndim == 4), None)
    config = {
        "backbone": shape,
        "head": head,
        "num_classes": classes if classes is not None else 0 if rows is None else len(rows),
        "in_channels": 1 if first is not None and first.shape[1] == 1 else 3,
        **settings,
    }
    if not config["num_classes"] and head["kind"] == "logit":
        raise UserError("the weights contain no classifier to count the labels: give --classes")
    return _check_fit(f"backbone {backbone!r}", config, ours, None)


def _classifier(ours: State) -> dict[str, Any]:
    """Head and number of labels, from the classifier on the features."""
    rows = ours.get("head.classifier.weight")
    if rows is None or rows.ndim != 2:
        raise UserError("the checkpoint has no linear classifier on its features")
    return {"head": {"kind": "logit", "bias": True}, "num_classes": len(rows)}


def _check_fit(what: str, values: dict[str, Any], ours: State, size: int | None) -> Converted:
    """Check the names and shapes of the state against the configuration."""
    config = validated(ModelConfig, values, what)
    with torch.device("meta"):
        network = config.without_pretrained().build()
    expected, state = (
        {n: v for n, v in each.items() if not n.endswith("num_batches_tracked")}
        for each in (network.state_dict(), ours)
    )
    unknown = [name for name in state if name not in expected]
    missing = [name for name in expected if name not in state]
    if unknown or missing:
        raise UserError(_mismatch_message(what, unknown, missing, state, expected))
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise UserError(
                f"{name.removeprefix('backbone.')!r} is {tuple(state[name].shape)} and would be "
                f"{tuple(value.shape)} in {what}: set its shape, as in "
                "--set model.backbone.width=32, or choose another network"
            )
    config = config.model_copy(update={"reference_size": (size, size)}) if size else config
    return config, state, size


def _mismatch_message(
    what: str, unknown: list[str], missing: list[str], state: State, expected: State
) -> str:
    parts = [f"the weights are not those of {what}"]
    for kind, names in (("unknown", unknown), ("missing", missing)):
        if names:
            shown = ", ".join(name.removeprefix("backbone.") for name in names[:SHOWN])
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{kind}: {shown}{more}")
    example = _suggest_rename(unknown, missing, state, expected)
    parts.append(f"rename prefixes by --map OLD=NEW, for example --map '{example}'")
    return "; ".join(parts)


def _suggest_rename(unknown: list[str], missing: list[str], state: State, expected: State) -> str:
    """A rule for --map that turns an unknown name into a missing one."""
    for name in unknown:
        alike = [m for m in missing if expected[m].shape == state[name].shape]
        near = difflib.get_close_matches(name, alike, n=1, cutoff=0.3)
        if near:
            old = name.removeprefix("backbone.").split(".")
            new = near[0].removeprefix("backbone.").split(".")
            while len(old) > 1 and len(new) > 1 and old[-1] == new[-1]:
                old.pop(), new.pop()
            if old[-1] == new[-1]:  # only the prefix differs
                return f"{'.'.join(old[:-1])}.={'.'.join([*new[:-1], ''])}"
            return f"{'.'.join(old)}.={'.'.join(new)}."
    return "module.="
