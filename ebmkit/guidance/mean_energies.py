r"""Class-wise mean energies of a guide on a data set, computed once and stored with its run.

For images x with labels c, in nats,

.. math::
    \bar E_c = \text{mean of } E(x) = -\log p(x), \qquad
    \bar E_{c,c} = \text{mean of } E(x, c) = -\log p(x, c)

over the images of each label (RCG figure 4.12, and eq. 4.5 of the dual objective).

The file is ``RUN/energies/DATASET-FINGERPRINT.json``, of the images' fingerprint. It names the
digest of the weights; with other weights it is computed anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ebmkit.compile import device_of
from ebmkit.energy import EnergyModel
from ebmkit.errors import UserError
from ebmkit.guidance.guides import check_guide
from ebmkit.models.joint import LogitEnergy
from ebmkit.sampling.target import clean_level
from ebmkit.storage import make_folder, write_atomically
from ebmkit.storage.reading import read_json


class ClassEnergies(BaseModel):
    """Means and standard deviations over the images of each label, (C,), in nats."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    energy: list[float] = Field(description="mean of E(x)")
    joint: list[float] = Field(description="mean of E(x, c) with the image's own label c")
    energy_std: list[float] = Field(description="standard deviation of E(x)")
    joint_std: list[float] = Field(description="standard deviation of E(x, c)")
    images: list[int] = Field(description="number of images of the label")


@torch.no_grad()
def class_energies(
    model: EnergyModel,
    images: Any,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 256,
) -> ClassEnergies:
    """Energies of each label's images, at `ebmkit.sampling.target.clean_level`.

    Args:
        model: a guide.
        images: a data set, as of `ebmkit.data`: ``len`` and ``batches(size)``.
        progress: called with (images done, images in all).
        batch_size: images that the model takes at once.

    Raises:
        UserError: if model or images have no labels, an image's label is not the model's, one of
            the model's labels has no image, or an energy is NaN or Inf.
    """
    model = LogitEnergy.of(check_guide(model))
    device, sigma, done = device_of(model), clean_level(model), 0
    sums = torch.zeros(5, model.num_classes, dtype=torch.float64)
    for x, labels in images.batches(batch_size):
        if labels is None:
            raise UserError("mean energies of labels need images with labels, and these have none")
        c = model.check_labels(labels.to(device), x)
        energies = model.energies(x.to(device), sigma)
        free = -energies.log_density.double()
        joint = free - energies.at_label(c).double()
        columns = torch.stack([torch.ones_like(free), free, free**2, joint, joint**2])
        sums.index_add_(1, c.cpu(), columns.cpu())
        done += len(x)
        if progress is not None:
            progress(done, len(images))
    count = sums[0]
    empty = torch.nonzero(count == 0).flatten().tolist()
    if empty:
        raise UserError(f"labels {empty} have no image in this data set: take the one that the "
                        "guide was trained on")  # fmt: skip
    if not bool(sums.isfinite().all()):
        raise UserError("an energy of the guide is NaN or Inf: its training diverged")
    free, free2, joint, joint2 = sums[1:] / count
    return ClassEnergies(
        energy=free.tolist(),
        joint=joint.tolist(),
        energy_std=(free2 - free**2).clamp_min(0).sqrt().tolist(),
        joint_std=(joint2 - joint**2).clamp_min(0).sqrt().tolist(),
        images=count.long().tolist(),
    )


def stored_energies(
    run: Path,
    dataset: str,
    fingerprint: str,
    digest: str,
    compute: Callable[[], ClassEnergies],
    sigma: float | None = None,
) -> ClassEnergies:
    """The energies stored in the guide's folder ``run``, or those that ``compute`` gives, which are
    stored then: of a ``dataset`` with a ``fingerprint``, weights with a ``digest``, at ``sigma``.

    Raises:
        UserError: if ``compute`` does, or the file cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", f"{dataset}-{fingerprint}")
    path = run / "energies" / f"{name}.json"
    facts = {"dataset": dataset, "fingerprint": fingerprint, "digest": digest, "sigma": sigma}
    try:
        stored = read_json(path)
        if facts.items() <= stored.items():
            return ClassEnergies.model_validate(stored)
    except (OSError, ValueError, AttributeError):  # none yet, or damaged
        pass
    found = compute()
    make_folder(path.parent)
    write_atomically(path, json.dumps(facts | found.model_dump(), indent=1).encode())
    return found
