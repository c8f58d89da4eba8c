"""Initial weights of a training: of a run, a pretrained model, a file or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, plain
from ebmkit.hub import PREFIX, is_hub_name
from ebmkit.models.importing import SHOWN, is_recognised, read_checkpoint, read_plain_state
from ebmkit.models.saving import digest, load
from ebmkit.pretrained import list_models

PREFIXES = ("", "backbone.", "network.")
"""Where the weights of a file can belong in a model."""


class Initialization(NamedTuple):
    """What of a source was loaded into a model.

    Attributes:
        source: run, pretrained model, file or name on the hub.
        sha256: digest of all its tensors.
        loaded: names of the parameters and buffers that were loaded.
        reshaped: names -> (shape in the source, shape in the model), not loaded: of the head.
        missing: names of the model that the source lacks; they keep their random values.
        unused: names of the source that the model lacks.
    """

    source: str
    sha256: str
    loaded: list[str]
    reshaped: dict[str, tuple[list[int], list[int]]]
    missing: list[str]
    unused: list[str]

    def sentence(self) -> str:
        """What was loaded and what was not."""
        total = len(self.loaded) + len(self.missing) + len(self.reshaped)
        parts = [f"{len(self.loaded)} of {total} tensors are loaded from {self.source}"]
        if self.reshaped:
            shapes = [f"{n} {old} there, {new} here" for n, (old, new) in self.reshaped.items()]
            parts.append(f"not loaded, of another size: {', '.join(shapes)}")
        for what, names in (("not in it", self.missing), ("not used", self.unused)):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                parts.append(f"{what}: {', '.join(map(plain, names[:SHOWN]))}{more}")
        return "; ".join(parts)


def read_weights(source: str) -> dict[str, Tensor]:
    """Weights of ``source``: a run folder, the name of a pretrained model, ``hub:owner/name``, a
    checkpoint that `read_checkpoint` recognises, or a state dict.

    Raises:
        UserError: if there are none.
    """
    named = source.startswith(PREFIX) or (source in list_models() and not Path(source).exists())
    if named or (Path(source) / "model.json").is_file():
        return load(source).state_dict()
    if Path(source).is_dir() or (is_hub_name(source) and ":" not in source):
        return read_checkpoint(source)[0].state_dict()
    state = read_plain_state(source)
    return read_checkpoint(source)[0].state_dict() if is_recognised(state) else state


def initialize(model: ScoreModel, source: str, state: dict[str, Tensor]) -> Initialization:
    """Load the weights ``state`` of ``source`` into ``model``, where names and shapes agree.

    Names without ``backbone.`` or ``network.`` are those of the backbone. The head may differ.

    Raises:
        UserError: if no weight of the backbone fits, or one has another shape.
    """
    own = model.state_dict()
    prefix = max(PREFIXES, key=lambda start: sum(start + name in own for name in state))
    named = {prefix + name: value for name, value in state.items()}
    common = {name: value for name, value in named.items() if name in own}
    reshaped = {
        name: (list(value.shape), list(own[name].shape))
        for name, value in common.items()
        if value.shape != own[name].shape
    }
    loaded = {name: value for name, value in common.items() if name not in reshaped}
    wrong = next((name for name in reshaped if not name.startswith("head.")), None)
    if wrong is not None:
        old, new = reshaped[wrong]
        raise UserError(
            f"the weights in {source!r} do not fit: {wrong} is {old} there and {new} here; choose "
            "the same --backbone and --width (only the head may differ)"
        )
    if all(name.startswith("head.") or own[name].ndim == 0 for name in loaded):
        shown = ", ".join(plain(name) for name in list(state)[:4])
        raise UserError(
            f"no weight in {source!r} ({shown}, ...) belongs to this backbone: choose the "
            "--backbone that it was trained with"
        )
    model.load_state_dict(loaded, strict=False)
    missing = [n for n in own if n not in common and not n.endswith("num_batches_tracked")]
    unused = [name for name in named if name not in own]
    return Initialization(source, digest(state), list(loaded), reshaped, missing, unused)
