"""Save and load models: weights as safetensors, everything else as JSON; no code is executed.

A saved model is two or three files in one folder. ``model.safetensors`` contains the weights and
their SHA-256, so that damaged files are refused. ``model.json`` contains the configuration of the
network and the *model card*: image size, noise levels and labels of the training, so that uses
outside these can warn or fail. ``class_gaussians.safetensors``, of blind joint models, contains the
Gaussians that chains start from (`ebmkit.class_gaussians`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ebmkit.card import ModelCard
from ebmkit.class_gaussians import ClassGaussians
from ebmkit.compute import pick_device
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, validated
from ebmkit.hub import FileFormat, HubMixin, cache_of
from ebmkit.models.config import ModelConfig
from ebmkit.pretrained import locate
from ebmkit.registry import check_plugins, load_plugins
from ebmkit.storage import make_folder, read_together, write_atomically
from ebmkit.storage.reading import check_links, parse_json
from ebmkit.storage.tensors import LimitedSize, parse_tensors

AnyScoreModel = TypeVar("AnyScoreModel", bound=ScoreModel)

FORMAT = 1

FILES = {"last": "model.safetensors", "best": "checkpoints/best.safetensors"}

GAUSSIANS = "class_gaussians.safetensors"


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int
    model: ModelConfig | None  # None: a custom network, an argument of load()
    card: ModelCard


def save_model(
    folder: Path, model: ScoreModel, config: ModelConfig | None, card: ModelCard
) -> None:
    """Write the files of a saved model into ``folder``, each atomically.

    Args:
        folder: an existing folder.
        model: the model; only its state is written.
        config: configuration of the model; None for a model composed by hand.
        card: model card.

    Raises:
        UserError: if the disk is full or not writable; existing files then remain unchanged.
    """
    for name, content in model_files(model, config, card).items():
        write_atomically(folder / name, content)


def save_as_run(
    folder: Path, read: Callable[[], tuple[AnyScoreModel, ModelConfig]]
) -> AnyScoreModel:
    """Write the model and configuration that ``read`` returns into a new or empty ``folder``.

    Raises:
        UserError: if the folder is not empty or cannot be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists: choose another --out")
    model, config = read()
    make_folder(folder)
    assert model.card is not None
    save_model(folder, model, config, model.card)
    return model


def model_files(model: ScoreModel, config: ModelConfig | None, card: ModelCard) -> dict[str, bytes]:
    """Files of a saved model (see `save_model`): name -> content."""
    document = _Document(format=FORMAT, model=config, card=card)
    text = json.dumps(document.model_dump(mode="json"), indent=2)
    files = {"model.safetensors": weights_file(model), "model.json": text.encode()}
    if model.class_gaussians is not None:
        files[GAUSSIANS] = model.class_gaussians.to_bytes()
    return files


def weights_file(model: ScoreModel) -> bytes:
    """The state of ``model`` as a safetensors file."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return safetensors.torch.save(state, metadata={"sha256": digest(state)})


@torch.inference_mode(False)
def load(
    run: str | os.PathLike[str],
    model: ScoreModel | None = None,
    device: str | torch.device = "cpu",
    weights: str = "last",
    plugins: Sequence[str | os.PathLike[str]] = (),
) -> ScoreModel:
    """Load the trained model ``run``, frozen and in evaluation mode.

    Args:
        run: a run folder, or any folder with ``model.safetensors`` and ``model.json``; the name of
            a pretrained model (`ebmkit.list_models`); or ``hub:owner/name``, a model on the Hugging
            Face hub that `ScoreModel.push_to_hub` uploaded.
        model: the network to load weights into; needed only for a model composed by hand.
        device: device of the model: cpu, cuda, cuda:1, or auto.
        weights: ``last``, or ``best`` by validation.
        plugins: plugins to import first (`ebmkit.registry`), for a model with components of them.

    Returns:
        The model, with its model card as ``card``. A warning names weights that are NaN or Inf.

    Raises:
        UserError: if there is no such folder or name, the folder contains no such model, the files
            are damaged or do not fit together, the download fails, or there is no such device.

    >>> model = load("digits-joint")
    >>> model = load("runs/digits")                                      # doctest: +SKIP
    >>> model.denoise(y, sigma=25 / 255)                                 # doctest: +SKIP
    """
    load_plugins(plugins)
    folder, place = locate(run), pick_device(str(device))
    if weights not in FILES:
        raise UserError(f"weights {weights!r} must be one of {', '.join(FILES)}")
    for name in ("model.json", FILES[weights]):
        if not (folder / name).is_file():
            raise UserError(
                f"{str(folder)!r} holds no {name}: it is no run folder, or training never saved a "
                "model there (`ebmkit train --resume` resumes an interrupted run)"
            )
    check_links(folder, cache_of(folder))
    names = ["model.json", FILES[weights], *([GAUSSIANS] if (folder / GAUSSIANS).is_file() else [])]
    content = read_together(folder, names)
    document = _read_document(content["model.json"], folder / "model.json")
    path = folder / FILES[weights]
    state, metadata = parse_tensors(content[FILES[weights]], path)
    if "sha256" in metadata and metadata["sha256"] != digest(state):
        raise UserError(f"{str(path)!r} is damaged: its tensors are not those that were written")
    if model is None:
        if document.model is None:
            raise UserError(
                f"{str(folder)!r} holds a network composed by hand: give it, as in "
                "ebmkit.load(run, model=JointModel(...))"
            )
        with LimitedSize.of(state):
            model = document.model.without_pretrained().build()
    load_weights(model, state, folder, "the model")
    _warn_non_finite(model, path)
    model.card = document.card
    if GAUSSIANS in content:
        model.class_gaussians = ClassGaussians.from_bytes(content[GAUSSIANS], folder / GAUSSIANS)
    model.weights_sha256 = hashlib.sha256(content[FILES[weights]]).hexdigest()
    return model.eval().requires_grad_(False).to(place)


def read_card(folder: Path) -> ModelCard:
    """Read the model card in ``folder/model.json``, without the weights.

    Raises:
        UserError: if the file is missing or damaged, or needs a plugin.
    """
    content = read_together(folder, ["model.json"])["model.json"]
    return _read_document(content, folder / "model.json").card


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path, what: str) -> None:
    """Load the ``state`` from ``path`` into ``network``, which errors call ``what``.

    Raises:
        UserError: if it does not fit.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights in {str(path)!r} do not fit {what}: {reason}") from None


def _warn_non_finite(model: ScoreModel, path: Path) -> None:
    """Warn of weights that are NaN or Inf; buffers may be Inf, as masks are."""
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    bad += [name for name, b in model.named_buffers() if bool(b.isnan().any())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"{str(path)!r} holds weights that are NaN or Inf ({', '.join(bad[:3])}{more}): "
            "training diverged, and the model's outputs have no meaning",
            stacklevel=3,
        )


def weights_digest(run: Path, weights: str = "last") -> str:
    """SHA-256 of the weights file that `load` reads."""
    return hashlib.sha256((run / FILES[weights]).read_bytes()).hexdigest()


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in order of names."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _own_files(model: ScoreModel) -> dict[str, bytes]:
    """`model_files` of a model as it was built or loaded."""
    if model.card is None:
        raise UserError(
            "a model is stored with its model card: set it, as in model.card = ebmkit.ModelCard()"
        )
    config = model.built_from
    return model_files(model, config if isinstance(config, ModelConfig) else None, model.card)


HubMixin.file_format = FileFormat(_own_files, load)


def _read_document(content: bytes, path: Path) -> _Document:
    values = parse_json(content, repr(str(path)), finite=True)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{str(path)!r} is not of format {FORMAT}: made by another version?")
    card = values.get("card")
    check_plugins(card.get("plugins", ()) if isinstance(card, dict) else (), repr(str(path.parent)))
    return validated(_Document, values, str(path))
