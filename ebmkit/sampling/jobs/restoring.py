"""Restored pictures and the files about them: ``ebmkit restore``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.data.images import Picture, read_image, write_image
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.metrics import psnr
from ebmkit.plots.sampling import Panel, restorations
from ebmkit.sampling.config import StochasticAscentConfig
from ebmkit.sampling.jobs.baselines import baselines_of
from ebmkit.sampling.jobs.restore import restore
from ebmkit.sampling.jobs.results import far_from_images
from ebmkit.sampling.jobs.tasks import Degraded, Task, TaskOptions, degrade
from ebmkit.storage import write_atomically
from ebmkit.training.run_folder import environment

__all__ = ["RestoreJob", "read_mask"]


class RestoreJob(NamedTuple):
    """How pictures are restored.

    Attributes:
        model: a blind denoiser, frozen.
        task: what is known of each picture.
        options: of the measurement.
        config: of the sampler.
        measured: whether the pictures are the measured ones, so that nobody knows the clean ones.
        samples: restorations of each.
        seed: of the noise.
        c: a label, or None.
        run: name of the run, written down.
    """

    model: ScoreModel
    task: Task
    options: TaskOptions
    config: StochasticAscentConfig
    measured: bool = False
    samples: int = 1
    seed: int = 0
    c: int | None = None
    run: str = ""

    def check(self, pictures: Sequence[Path], out: Path) -> None:
        """Whether all ``pictures`` can be restored into ``out``, before the first one is.

        Raises:
            UserError: if not: one cannot be read or measured, or a file is there already.
        """
        for i, path in enumerate(pictures):
            if path.stem in [p.stem for p in pictures[:i]]:
                raise UserError(f"two pictures are called {path.stem!r}: restore them separately")
            for target in self.targets(path, out):
                if target.exists():
                    raise UserError(
                        f"{str(target)!r} exists: choose another --out, or move it away"
                    )
            self.degraded(read_image(path, self._channels))

    def targets(self, path: Path, out: Path) -> list[Path]:
        """The files that are written about the picture ``path``."""
        kinds = ["measured.png", "comparison.png", *self._names()]
        return [out / f"{path.stem}.json", *(out / f"{path.stem}-{kind}" for kind in kinds)]

    def degraded(self, picture: Picture) -> Degraded:
        """What is known of a picture.

        Raises:
            UserError: as `degrade`.
        """
        return degrade(self.task, picture.image, self.options, self.measured)

    def run_on(
        self, path: Path, out: Path, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Restore one picture and write its files into ``out``; what the JSON file holds.

        Raises:
            UserError: if it cannot be read or measured, a file cannot be written, or every chain
                left the finite numbers.
        """
        begun = time.perf_counter()
        known = self.degraded(read_image(path, self._channels))
        found = restore(
            self.model,
            known.measurement,
            known.measured,
            self.config,
            samples=self.samples,
            seed=self.seed,
            c=self.c,
            progress=progress,
        )
        images, finite = found.images[0], found.finite[0]
        if not bool(finite.any()):
            raise UserError(
                f"every chain of {path.name!r} left the finite numbers: lower beta or first_step, "
                "or look whether the model's training diverged"
            )
        kept = images[finite].clamp(0, 1)
        baselines = baselines_of(known.measurement, known.measured)
        restored = {"restored": kept[0]} if self.samples == 1 else {"mean": kept.mean(0)}
        clean = known.clean
        document: dict[str, Any] = {
            "picture": str(path),
            "run": self.run,
            "task": self.task.name,
            "options": _written(self.options, self.task),
            "size": list(known.measurement.shape),
            "measured_numbers": known.measurement.count,
            "settings": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "samples": self.samples,
            "label": self.c,
            "psnr": None,
            "consistency_error": [_number(float(e)) for e in found.error[0]],
            "lost": torch.nonzero(~finite).flatten().tolist(),
            "steps": found.steps,
            "sigmas": found.sigmas,
            "warnings": self._warnings(known, images, finite),
            "seconds": round(time.perf_counter() - begun, 3),
            "model": None if self.model.card is None else self.model.card.model_dump(mode="json"),
            "environment": environment(),
        }
        if clean is not None:
            document["psnr"] = {
                "samples": [_psnr(x, clean) for x in images],
                **({"mean_of_samples": _psnr(restored["mean"], clean)} if len(images) > 1 else {}),
                "baselines": {name: _psnr(x, clean) for name, x in baselines.items()},
            }
        write_image(known.look, out / f"{path.stem}-measured.png")
        for name, image in zip(self._names(), [*images, *restored.values()], strict=False):
            write_image(image.clamp(0, 1), out / f"{path.stem}-{name}")
        panels = _panels(known, baselines, kept, clean)
        title = f"{self.task.name}: {path.name}"
        restorations([panels], out / f"{path.stem}-comparison.png", title)
        text = json.dumps(document, indent=1, allow_nan=False)
        write_atomically(out / f"{path.stem}.json", text.encode())
        return document

    def _warnings(self, known: Degraded, images: Tensor, finite: Tensor) -> list[str]:
        found = []
        size, shape = self.model.card and self.model.card.image_size, known.measurement.shape[1:]
        if size and tuple(size) != tuple(shape):
            found.append(
                f"a picture of {shape[0]}x{shape[1]} by a model trained at {size[0]}x{size[1]}: it "
                "restores best at its own size"
            )
        far = torch.nonzero(far_from_images(images)).flatten().tolist()
        if far:
            found.append(
                f"restorations {[k + 1 for k in far]} have pixels where no image is: their chains "
                "ran away, as they do where a model was trained too little; lower beta or "
                "largest_step may help"
            )
        lost = torch.nonzero(~finite).flatten().tolist()
        if lost:
            found.append(f"chains {lost} left the finite numbers; the others are kept")
        return found

    def _names(self) -> list[str]:
        if self.samples == 1:
            return ["restored.png"]
        return [*(f"restored-{k + 1}.png" for k in range(self.samples)), "mean.png"]

    @property
    def _channels(self) -> int | None:
        return self.model.card.channels if self.model.card else None


def read_mask(path: Path) -> Tensor:
    """A mask (H, W) bool, true where the picture ``path`` is white: what is to be filled in.

    Raises:
        UserError: if it cannot be read, or has other values than black and white.
    """
    image = read_image(path).image.mean(0)
    middle = (image > 0.1) & (image < 0.9)
    if bool(middle.any()):
        raise UserError(
            f"mask {str(path)!r} has {int(middle.sum())} pixels that are neither black nor white: "
            "save it as PNG, white where the picture is to be filled in"
        )
    return image > 0.5


def _panels(
    known: Degraded, baselines: dict[str, Tensor], kept: Tensor, clean: Tensor | None
) -> list[Panel]:
    """Original, measured, the best baseline, a restored one, and the mean of several."""
    best = max(baselines, key=lambda name: _order(baselines[name], clean))
    panels = [] if clean is None else [Panel(clean, "original", "")]
    panels.append(Panel(known.look, "measured", _below(known.look, clean)))
    panels.append(Panel(baselines[best], best, _below(baselines[best], clean)))
    panels.append(Panel(kept[0], "restored", _below(kept[0], clean)))
    if len(kept) > 1:
        mean = kept.mean(0)
        panels.append(Panel(mean, f"mean of {len(kept)}", _below(mean, clean)))
    return panels


def _order(image: Tensor, clean: Tensor | None) -> float:
    return 0.0 if clean is None else float(psnr(image[None], clean[None]))


def _below(image: Tensor, clean: Tensor | None) -> str:
    value = None if clean is None else _psnr(image, clean)
    return "" if value is None else f"{value:.2f} dB"


def _psnr(image: Tensor, clean: Tensor) -> float | None:
    return _number(float(psnr(image.clamp(0, 1)[None].cpu(), clean[None].cpu())))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _written(options: TaskOptions, task: Task) -> dict[str, Any]:
    mask = options.mask
    return {
        "mask": None if mask is None else f"{int(mask.sum())} of {mask.numel()} pixels",
        "share": task.share if options.share is None else options.share,
        "factor": options.factor or (2 if task.name == "superres" else None),
        "seed": options.seed,
    }


def make_folder(path: Path) -> None:
    """Make ``path`` unless it is there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(path)!r}: {error.strerror}") from None
