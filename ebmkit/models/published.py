"""Published weights of DnCNN and DRUNet as models of ours.

Files are read by `torch.load` with ``weights_only``: tensors in dictionaries, nothing is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.errors import UserError
from ebmkit.models.config import ModelConfig
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.dncnn import convert_dncnn
from ebmkit.models.drunet import convert_drunet
from ebmkit.models.saving import save_model

__all__ = ["import_weights", "read_state"]

NESTED = ("state_dict", "params", "model", "net")
"""Under which names training codes keep the weights in a checkpoint."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.pth`` or ``.safetensors`` file, by name.

    Raises:
        UserError: if it cannot be read, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        KeyError,
        safetensors.SafetensorError,
    ):
        raise UserError(
            f"{str(path)!r} holds no weights that can be read safely: it must be a state dict "
            "saved by torch.save, or safetensors"
        ) from None
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{str(path)!r} holds no state dict: names of parameters with tensors")
    odd = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise UserError(f"{odd!r} in {str(path)!r} is no tensor: give the network's state dict")
    return {str(name): value for name, value in content.items()}


def import_weights(
    path: Path, folder: Path, sigma_range: tuple[float, float] | None = None
) -> DirectDenoiser:
    """Make of published weights a folder that `ebmkit.load` and the command line take.

    Args:
        path: a state dict of a DnCNN or DRUNet (`convert_dncnn`, `convert_drunet`).
        folder: a new folder.
        sigma_range: the noise levels it was trained for, image units, if known.

    Raises:
        UserError: if the weights are of neither network, or the folder is not empty.
    """
    state = read_state(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists: choose another --out")
    convert = convert_drunet if any("m_head" in name for name in state) else convert_dncnn
    backbone, channels, weights = convert(state)
    config = ModelConfig(backbone=backbone, in_channels=1 if channels == 1 else 3)
    model = config.build()
    assert isinstance(model, DirectDenoiser)
    model.network.load_state_dict(weights)
    card = ModelCard(
        dataset="", objective=f"published: {path.name}", channels=channels, sigma_range=sigma_range
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(folder)!r}: {error.strerror}") from None
    save_model(folder, model, config, card)
    model.card = card
    return model
