"""Networks that samples are judged by: the standard Inception, or a classifier of the user's.

The Inception network is that of torch-fidelity, converted from the TensorFlow weights of 2015 that
FID was defined by: uint8 images, resized to 299x299 as TensorFlow 1 did, features of the last
pooling (2048), logits without bias. Its package is an extra, ``pip install
'ebmkit-vision[generation]'``, and its weights are a file of 95 MB.

Of a classifier, the features are those that its head gets, averaged over positions. What is
measured by it has names of its own, as nothing makes it comparable with another's.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.compile import unwrapped
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.models import load
from ebmkit.storage.torchfile import read_torch_file

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INSTEAD = "or measure by a classifier of your own, --set generation.extractor=RUN"


@dataclass(frozen=True)
class Extractor:
    """A network that images are judged by.

    Attributes:
        kind: ``inception`` or ``classifier``.
        run: name of the classifier's run; "" for Inception.
        names: what its measures are called, by ``frechet``, ``kernel``, ``score``, ``precision``
            and ``recall``.
        extract: images (B, C, H, W) in [0, 1] to ``features`` (B, d) and class ``logits`` (B, C).
        model: the classifier, if it is one.
    """

    kind: str
    run: str
    names: dict[str, str]
    extract: Callable[[Tensor], dict[str, Tensor]]
    model: EnergyModel | None = None


def find_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """``inception``, or the classifier in the run folder ``name``.

    Raises:
        UserError: if there is no such thing, or what it needs is missing.
    """
    if name == "inception":
        return inception(weights, device)
    if weights is not None:
        raise UserError("generation.weights is the file of Inception's: leave it out for a run")
    return classifier(name, device)


def inception(weights: Path | None, device: torch.device) -> Extractor:
    """torch-fidelity's Inception.

    Args:
        weights: its file; None: fetched, or found in PyTorch's cache.
        device: where to put it.

    Raises:
        UserError: if the package is not installed, or there are no weights.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(
            "the Inception network needs the package torch-fidelity, which is not installed: pip "
            f"install 'ebmkit-vision[generation]', {INSTEAD}"
        )
    network = _network(weights).to(device)

    def extract(x: Tensor) -> dict[str, Tensor]:
        pixels = (255 * x).round().clamp(0, 255).byte()
        features, logits = network(pixels.expand(-1, 3, -1, -1))
        return {"features": features.float(), "logits": logits.float()}

    names = {"frechet": "FID", "kernel": "KID", "score": "IS"}
    names |= {name: name for name in ("precision", "recall")}
    return Extractor("inception", "", names, extract)


def classifier(run: str, device: torch.device) -> Extractor:
    """The classifier in the folder ``run``.

    Raises:
        UserError: if there is no run, or its model has no labels or no head.
    """

    model = load(run, device=str(device))
    if not classifies(model):
        raise UserError(
            f"generation.extractor: the model in {run!r} was trained without labels: name a run "
            "with ce in its objective"
        )
    return classifier_of(model, Path(os.path.abspath(run)).name)


def classifier_of(model: EnergyModel, run: str) -> Extractor:
    """The classifier ``model`` of the run called ``run``.

    Raises:
        UserError: if it has no features and head.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, torch.nn.Module):
        raise UserError(
            f"generation.extractor: the model in {run!r} has no features and head: name the run of "
            "a network with a backbone"
        )

    def extract(x: Tensor) -> dict[str, Tensor]:
        inputs: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        try:
            logits = model.energies(x).logits
        finally:
            hook.remove()
        if len(inputs) != 1 or len(inputs[0]) != len(x):
            raise UserError(
                f"generation.extractor: images of {x.shape[-2]}x{x.shape[-1]} are larger than the "
                f"classifier in {run!r} was trained on, and have no one feature there: name another"
            )
        return {"features": inputs[0].float(), "logits": logits.float()}

    names = {"frechet": "FD", "kernel": "KD"}
    names |= {name: name for name in ("score", "precision", "recall")}
    return Extractor(
        "classifier", run, {k: f"classifier-{v}" for k, v in names.items()}, extract, model
    )


def same_weights(extractor: Extractor, model: ScoreModel) -> bool:
    """Whether the classifier is ``model`` itself."""
    if extractor.model is None:
        return False
    own, other = extractor.model.state_dict(), unwrapped(model).state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[k], v) for k, v in other.items())


def _network(weights: Path | None) -> Any:
    """torch-fidelity's network with the weights of the file, or those that it fetches."""
    if weights is not None:
        if not weights.is_file():
            raise UserError(
                f"generation.weights: there is no file {str(weights)!r}; it is {WEIGHTS}"
            )
        state: Any = None
        with contextlib.suppress(UserError):
            state = read_torch_file(weights)
        if not isinstance(state, dict) or "fc.weight" not in state:
            raise UserError(
                f"generation.weights: {str(weights)!r} does not hold the weights of "
                f"torch-fidelity's Inception; they are {WEIGHTS}"
            )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        with contextlib.redirect_stderr(io.StringIO()):  # its download bar
            return FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
    except (OSError, RuntimeError) as error:
        if weights is not None:
            raise UserError(
                f"generation.weights: {str(weights)!r} does not fit torch-fidelity's Inception; "
                f"the file is {WEIGHTS}"
            ) from None
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise UserError(
            f"the weights of the Inception network cannot be fetched ({reason}): get {WEIGHTS} and "
            f"name the file by --set generation.weights=PATH, {INSTEAD}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
