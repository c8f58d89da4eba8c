r"""Images drawn in one way of guiding, all ways from the same starts and the same noise.

Chain n of every way starts from the same numbers and takes the same draws at each step, keyed by
(seed, batch, step). What differs between two ways is then what guidance does, not luck.

::

    OUT/guidance/WAY.h5      images (N, H, W, C) uint8 and the wanted labels (N,)
    OUT/guidance/WAY.json    how they were drawn, and what was measured

A way is drawn again where its settings, or the weights of the networks, are others than before.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.energy import EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.evaluation.context import Images
from ebmkit.experiments.guidance_rows import GuidanceMethod
from ebmkit.guidance import class_energies, guided_model, make_guidance
from ebmkit.randomness import keyed_generator
from ebmkit.sampling import SAMPLERS, Chains
from ebmkit.storage import write_atomically
from ebmkit.storage.hdf5 import find_array, open_hdf5, read_array, read_attribute

__all__ = ["Drawing", "Drawn", "keep_drawing"]

BATCH = 100
"""Chains that are moved together."""


@dataclass
class Drawing:
    """Draws images by DDIM.

    Args:
        models: trained networks by name.
        digests: of their weights, by name.
        classes: number of labels.
        per_class: images of each.
        seed: of starts and steps.
        train: labelled training images, for mean energies of labels.
        means: mean energies by network, worked out when they are needed.
    """

    models: Callable[[str], ScoreModel]
    digests: Callable[[str], str]
    classes: int
    per_class: int
    seed: int
    train: Images
    means: dict[str, list[float]] = field(default_factory=dict)

    @property
    def labels(self) -> Tensor:
        """Wanted labels (N,), in turn: 0, 1, ..., C - 1, 0, ..."""
        return torch.arange(self.classes * self.per_class) % self.classes

    def settings(self, way: GuidanceMethod, steps: int, eta: float, count: int) -> dict[str, Any]:
        """All that the images of ``way`` depend on."""
        names = [way.base, *([way.guide] if way.guide else [])]
        return {
            "guidance": make_guidance(**way.settings).model_dump() if way.settings else None,
            "guide": way.guide,
            "base": way.base,
            "steps": steps,
            "eta": eta,
            "count": count,
            "seed": self.seed,
            "digests": [self.digests(name) for name in names],
        }

    def draw(
        self,
        way: GuidanceMethod,
        steps: int,
        eta: float | None = None,
        count: int | None = None,
        advance: Callable[[int], None] = lambda chains: None,
    ) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of `labels`.

        Args:
            way: how.
            steps: of DDIM.
            eta: of DDIM; None: the way's own.
            count: only the first so many.
            advance: told of chains that are done.

        Raises:
            UserError: if networks do not fit, or chains leave the finite numbers.
        """
        model = self.model(way)
        base = self.models(way.base)
        labels = self.labels[:count]
        card = base.card
        assert card is not None
        assert card.image_size is not None
        entry = SAMPLERS["ddim"]
        config = entry.config(steps=steps, eta=way.eta if eta is None else eta)
        found = []
        for number, at in enumerate(range(0, len(labels), BATCH)):
            own = labels[at : at + BATCH]
            c = own if way.settings else None
            sampler = entry.build(model, c, config)
            shape = (len(own), card.channels, *card.image_size)
            begin = keyed_generator("cpu", self.seed, "guidance", number, 0)
            x = entry.start(model, sampler, config, shape, begin, c)
            chains = Chains(sampler, sampler.init(x))
            while not chains.done:
                step = keyed_generator("cpu", self.seed, "guidance", number, chains.state.step + 1)
                chains.advance(step)
            if chains.died:
                raise UserError(
                    f"{len(chains.died)} of {len(own)} chains of {way.name!r} left the finite "
                    "numbers: lower its scale"
                )
            found.append(chains.state.x.clamp(0, 1))
            advance(len(own))
        return torch.cat(found)

    def model(self, way: GuidanceMethod) -> ScoreModel:
        """The model that ``way`` samples: guided, or the base itself."""
        base = self.models(way.base)
        if not way.settings:
            return base
        config = make_guidance(**way.settings)
        guide = self.models(way.guide) if way.guide else None
        if guide is not None and not isinstance(guide, EnergyModel):
            raise UserError(f"network {way.guide!r} has no energies and cannot guide")
        means = None
        if config.needs_means:
            assert isinstance(guide, EnergyModel)
            means = self._means(str(way.guide), guide)
        return guided_model(base, guide, config, means)

    def _means(self, name: str, guide: EnergyModel) -> Sequence[float]:
        if name not in self.means:
            self.means[name] = class_energies(guide, self.train).energy
        return self.means[name]


@dataclass(frozen=True)
class Drawn:
    """Images of a way, uint8 (N, C, H, W), their labels (N,), and seconds that they took."""

    images: Tensor
    labels: Tensor
    seconds: float


def _read_kept(path: Path, key: str, count: int) -> tuple[Tensor, float] | None:
    """The images in ``path`` and the seconds they took; None if there are none of this ``key``."""
    what = repr(str(path))
    with contextlib.suppress(UserError), open_hdf5(path) as file:
        if read_attribute(file, "key", what) != key:
            return None
        images, seconds = find_array(file, "images", what), read_attribute(file, "seconds", what)
        if images is None or images.dtype != "uint8" or images.ndim != 4 or len(images) != count:
            return None
        pixels = torch.from_numpy(read_array(images, what))
        return pixels.permute(0, 3, 1, 2).contiguous(), float(seconds)
    return None


def keep_drawing(
    drawing: Drawing,
    way: GuidanceMethod,
    folder: Path,
    steps: int,
    eta: float | None = None,
    count: int | None = None,
    name: str | None = None,
    advance: Callable[[int], None] = lambda chains: None,
) -> Drawn:
    """The images of ``way`` kept in ``folder``, or drawn and kept now.

    Raises:
        UserError: as `Drawing.draw` does, or if a file cannot be written.
    """
    import h5py

    labels = drawing.labels[:count]
    used = way.eta if eta is None else eta
    settings = drawing.settings(way, steps, used, len(labels))
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = folder / f"{re.sub(r'[^0-9a-z.]+', '-', (name or way.name).lower())}.h5"
    kept = _read_kept(path, key, len(labels))
    if kept is not None:
        advance(len(labels))
        return Drawn(kept[0], labels, kept[1])
    begun = time.perf_counter()
    with torch.no_grad():
        x = drawing.draw(way, steps, eta, count, advance)
    seconds = time.perf_counter() - begun
    pixels = (255 * x).round().byte()
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        file.create_dataset("images", data=rows, compression="gzip")
        file.create_dataset("labels", data=labels.numpy())
        description = {"key": key, "seconds": seconds, "source": "fresh", "sampler": "ddim"}
        description |= {"settings": json.dumps(settings), "seed": drawing.seed, "run": way.base}
        file.attrs.update(description)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return Drawn(pixels, labels, seconds)
