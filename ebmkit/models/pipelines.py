"""Import of diffusion models trained with `diffusers`.

A pipeline is a folder, or a repository on the Hugging Face hub, with a UNet and a scheduler:

- ``unet/config.json`` and ``unet/diffusion_pytorch_model.safetensors``: the network;
- ``scheduler/scheduler_config.json``: the noise schedule and the prediction type;

or the same files in one folder. Without a scheduler, the linear schedule of DDPM is assumed.
Weights are read as tensors only; no code is executed. The result is a folder like that of a run,
for `ebmkit.load` and the command line.

A repository on the hub is ``owner/name`` (`ebmkit.hub`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebmkit.card import ModelCard
from ebmkit.errors import UserError, validated
from ebmkit.hub import cache_of, locate_folder
from ebmkit.models.config import ModelConfig
from ebmkit.models.diffusion import DiffusionModel, UNetConfig, unet_class
from ebmkit.models.saving import load_weights, save_as_run
from ebmkit.storage.reading import MIB, check_links, read_json
from ebmkit.storage.tensors import LimitedSize, read_state

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SETTINGS = ("model_index.json", "config.json", "scheduler_config.json")
# names of self-attention before diffusers 0.17, and since
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def import_unet(
    path_or_name: str | Path,
    out: str | Path,
    image_range: tuple[float, float] = (-1.0, 1.0),
    null_label: bool = False,
) -> DiffusionModel:
    """Convert a `diffusers` UNet to a folder for `ebmkit.load` and the command line.

    Args:
        path_or_name: folder of a pipeline or of a UNet alone, or ``owner/name`` on the hub.
        out: a new or empty folder.
        image_range: range of clean images in the network's coordinates.
        null_label: whether the last label of a class-conditional network means no label.

    Returns:
        The model, frozen and in evaluation mode.

    Raises:
        UserError: if the folder or repository does not exist, the files are not those of an image
            UNet that predicts noise over timesteps, or ``out`` is not empty.

    >>> import_unet("google/ddpm-cifar10-32", "runs/ddpm-cifar10")       # doctest: +SKIP
    """
    return save_as_run(Path(out), lambda: read_unet(path_or_name, image_range, null_label))


def read_unet(
    path_or_name: str | Path,
    image_range: tuple[float, float] = (-1.0, 1.0),
    null_label: bool = False,
) -> tuple[DiffusionModel, ModelConfig]:
    """The model of `import_unet` and its configuration, without writing files; the same errors."""
    places = ("", "unet/")
    source = locate_folder(
        path_or_name,
        [*(f"{place}{file}" for place in places for file in SETTINGS), "scheduler/*.json"],
        [[f"{place}{file}" for place in places] for file in WEIGHTS],
    )
    check_links(source, cache_of(source))
    network = source / "unet" if (source / "unet" / "config.json").is_file() else source
    if not (network / "config.json").is_file():
        raise UserError(
            f"{str(path_or_name)!r} holds no unet/config.json nor config.json: it is no diffusers "
            "pipeline, nor a UNet's folder"
        )
    weights = next((network / name for name in WEIGHTS if (network / name).is_file()), None)
    if weights is None:
        raise UserError(f"{str(network)!r} holds none of {', '.join(WEIGHTS)}: no weights")
    shape = _read(network / "config.json")
    folders = (source / "scheduler", source, network, network.parent / "scheduler")
    schedulers = [folder / "scheduler_config.json" for folder in folders]
    scheduler = next((path for path in schedulers if path.is_file()), None)
    diffusion = _diffusion(_read(scheduler) if scheduler else {})
    config = _config(shape, {**diffusion, "image_range": image_range, "null_label": null_label})
    old = re.compile(rf"(attentions\.\d+)\.({'|'.join(_ATTENTION)})\.")
    state = {
        old.sub(lambda m: f"{m[1]}.{_ATTENTION[m[2]]}.", name): value
        for name, value in read_state(weights).items()
    }
    with LimitedSize.of(state):
        model = config.build()
    assert isinstance(model, DiffusionModel)
    load_weights(model.network, state, weights, "config.json")
    model.card = ModelCard(
        objective=f"published: {Path(path_or_name).name}",
        energies="model",
        image_size=_size(shape.get("sample_size")),
        channels=config.in_channels,
        sigma_range=model.schedule.sigma_range,
    )
    return model.eval().requires_grad_(False), config


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path, MIB, finite=True)
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} is damaged: it is not a JSON object")
    return {str(key): value for key, value in values.items()}


def _diffusion(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Noise schedule and prediction type, as fields of `UNetConfig`."""
    known = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
    name = str(scheduler.get("beta_schedule", "linear"))
    if name not in known or scheduler.get("trained_betas") is not None:
        raise UserError(
            f"the scheduler's beta_schedule {name!r} is not known: {', '.join(known)} are"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError("a schedule that ends in pure noise (rescale_betas_zero_snr) has no sigma")
    return {
        "schedule": known[name],
        "betas": (scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)),
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "prediction": scheduler.get("prediction_type", "epsilon"),
    }


def _config(shape: Mapping[str, Any], diffusion: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the network that a ``config.json`` describes."""
    kind = str(shape.get("_class_name", "UNet2DModel"))
    if kind != "UNet2DModel":
        raise UserError(f"config.json is of a {kind}: only UNet2DModel (images only) is supported")
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(unet_class().__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    given = {key: value for key, value in shape.items() if not key.startswith("_")}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(f"diffusers does not know {', '.join(unknown)} of config.json")
    values = defaults | given
    channels = values["in_channels"]
    if channels not in (1, 3) or values["out_channels"] not in (channels, 2 * channels):
        raise UserError(
            f"this UNet takes {channels} channels and returns {values['out_channels']}: it must "
            "take 1 or 3, and return as many, or twice as many with variances"
        )
    if values["time_embedding_type"] == "fourier" or values["class_embed_type"] is not None:
        raise UserError("this UNet does not take timesteps and labels as integers: not supported")
    widths, labels = values["block_out_channels"], values["num_class_embeds"]
    fields = {
        "kind": "unet",
        "width": widths[0],
        "multipliers": [max(1, width // widths[0]) for width in widths],
        "blocks": values["layers_per_block"],
        "attention": [i for i, name in enumerate(values["down_block_types"]) if "Attn" in name],
        "head_channels": values["attention_head_dim"],
        "norm_groups": values["norm_num_groups"],
        "dropout": values["dropout"],
        "class_conditional": labels is not None,
        **diffusion,
    }
    handled = {"num_class_embeds", "in_channels", "sample_size", "num_train_timesteps"}
    plain = validated(UNetConfig, fields, "UNet")
    made = {**defaults, **plain.arguments(channels, 0)}

    def listed(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    options = {
        key: value
        for key, value in given.items()
        if key not in handled and listed(value) != listed(made[key])
    }
    if values["time_embedding_type"] == "learned":
        options["num_train_timesteps"] = values["num_train_timesteps"]
    backbone = plain.model_dump() | {"options": options}
    count = 0 if labels is None else labels - int(plain.null_label)
    raw = {"backbone": backbone, "in_channels": channels, "num_classes": count}
    return validated(ModelConfig, raw, "UNet")


def _size(sample: Any) -> tuple[int, int] | None:
    if isinstance(sample, int):
        return (sample, sample)
    return (int(sample[0]), int(sample[1])) if isinstance(sample, list) else None
