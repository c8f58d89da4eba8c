r"""Image restoration by stochastic ascent under linear measurements, and its output files.

Images with the same measurement are restored together, each in S chains. A chain returns a sample
that satisfies the measurements. The mean of the S samples is nearer to the posterior mean, so it
has a higher PSNR, but it is smoother than an image.

Images up to twice the training size are processed whole. Larger ones are denoised in overlapping
crops (`ebmkit.inference`) to bound memory; the noise level is that of the whole image, as the
ascent requires.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.compute import environment
from ebmkit.data.images import read_image, write_image
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError
from ebmkit.inference import TILE, denoise_image
from ebmkit.metrics import psnr
from ebmkit.models.saving import digest
from ebmkit.plots import image_rows
from ebmkit.randomness import keyed_generator
from ebmkit.sampling.ascent import StochasticAscentConfig, make_restorer
from ebmkit.sampling.base import trained_range
from ebmkit.sampling.diagnostics import finite_or_none, is_out_of_range
from ebmkit.sampling.inverse import Measurement, Task, TaskOptions
from ebmkit.sampling.jobs.chains import STATE, Hook, JobFolder, Record, means_of, run_chains
from ebmkit.storage import write_atomically
from ebmkit.storage.reading import read_json

MAX_PIXELS = 1024 * 1024
"""Maximum number of pixels of an image: a restoration takes hundreds of forward passes."""

MAX_WHOLE_SCALE = 2
"""Maximum size of images that are processed whole, relative to the training size."""


class Restored(NamedTuple):
    """Restorations of B images with S chains each."""

    images: Tensor  # (B, S, C, H, W), not clipped
    finite: Tensor  # (B, S) bool, chains that did not diverge
    error: Tensor  # (B, S) root mean square error of the measurements, image units
    sigmas: list[float | None]  # mean noise level that the chains estimated at each step
    steps: int  # number of steps of the longest chain
    seconds: float  # time of the chains, including the time before an interruption


@torch.no_grad()
def restore(
    model: ScoreModel,
    measurement: Measurement,
    measured: Tensor,
    config: StochasticAscentConfig | None = None,
    *,
    samples: int = 1,
    seed: int = 0,
    c: int | None = None,
    progress: Hook = lambda step, steps: None,
    **saving: Any,
) -> Restored:
    """Draw S ``samples`` of each image with the measurements ``measured`` (B, n).

    ``model`` is a frozen blind denoiser, conditional on the label ``c`` if given; ``config`` are
    the settings of ``kadkhodaie_simoncelli``. ``progress`` is called with (step, maximum steps).
    ``saving`` are ``folder``, ``batch``, ``stop`` and ``save_seconds`` of
    `ebmkit.sampling.jobs.chains.run_chains`, to resume after an interruption.

    Raises:
        UserError: if the sampler does not support the model, the image is too large, or
            ``samples`` is below 1.
    """
    _check(measurement, samples)
    device = device_of(model)

    def generator(step: int) -> torch.Generator:
        return keyed_generator(device, seed, "restore", step)

    numbers = measured.to(device).repeat_interleave(samples, 0)
    ascent = make_restorer(model, measurement, numbers, config, c)
    size = model.card.image_size if model.card else None
    if max(measurement.shape[1:]) > (MAX_WHOLE_SCALE * max(size) if size else TILE):
        ascent.denoiser = lambda y, sigma=None: torch.stack(
            [_denoise_in_crops(model, image, c) for image in y]
        )
    shape, record = (len(numbers), *measurement.shape), Record(ascent.steps)
    chains, seconds = run_chains(
        ascent,
        lambda: ascent.start(shape, generator(0)),
        shape,
        ascent.steps,
        generator,
        record,
        lambda step: progress(step, ascent.steps),
        **saving,
    )
    finite = torch.ones(len(numbers), dtype=torch.bool)
    finite[list(chains.diverged)] = False
    images = chains.state.x
    off = (measurement.measure(images) - numbers).square().mean(1).sqrt()
    images, finite, off = (
        rearrange(x, "(b s) ... -> b s ...", s=samples).cpu() for x in (images, finite, off)
    )
    sigmas = means_of([torch.stack(record.sums)])["sigma"]
    return Restored(images, finite, off, sigmas, chains.state.step, seconds)


def _check(measurement: Measurement, samples: int) -> None:
    if samples < 1:
        raise UserError(f"{samples} samples of each image cannot be drawn: take 1 or more")
    _, height, width = measurement.shape
    if height * width > MAX_PIXELS:
        raise UserError(
            f"an image of {width}x{height} has more than {MAX_PIXELS // 1024**2} megapixel, too "
            "many to restore: cut it into parts, or make it smaller"
        )


def _denoise_in_crops(model: ScoreModel, y: Tensor, c: int | None) -> Tensor:
    """Denoise an image (C, H, W) of any size blindly; the level is at most the highest trained."""
    found, limits = denoise_image(model, y, c=c), trained_range(model)
    if limits is None or not model.is_energy_based or found.sigma <= limits[1]:
        return found.image
    return y + (limits[1] / found.sigma) ** 2 * (found.image - y)


class DivergedError(UserError):
    """Every chain of an image diverged."""


class RestoreJob(NamedTuple):
    """Settings of a restoration job."""

    model: ScoreModel  # a blind denoiser, frozen
    task: Task  # restoration task
    options: TaskOptions  # options of the measurement
    config: StochasticAscentConfig
    measured: bool = False  # whether the images are measurements, so clean ones are unknown
    samples: int = 1  # number of restorations of each image
    seed: int = 0  # random seed of the noise
    c: int | None = None  # label
    run: str = ""  # name of the run, for the JSON files
    computed: str = ""  # device, precision and compilation; a resumed job must have the same

    def begin(self, images: Sequence[Path], out: Path) -> JobFolder:
        """Create the folder ``out``, or open it to resume an interrupted job.

        Raises:
            UserError: if an image cannot be read or measured, two have the same name, an output
                file exists, or the folder holds an unfinished job of other settings.
        """
        for i, path in enumerate(images):
            if path.stem in [p.stem for p in images[:i]]:
                raise UserError(f"two images are called {path.stem!r}: restore them separately")
            measurement, numbers, _ = self.degraded(path)
            _check(measurement, self.samples)
            make_restorer(self.model, measurement, numbers, self.config, self.c)
        mask = self.options.mask
        settings = {
            "task": self.task.name,
            "mask": None if mask is None else digest({"mask": mask.cpu()}),
            "share": self.options.share,
            "factor": self.options.factor,
            "task_seed": self.options.seed,
            "measured": self.measured,
            "sampler": self.config.model_dump(mode="json"),
            "samples": self.samples,
            "seed": self.seed,
            "label": self.c,
            "weights": self.model.weights_sha256,
            "computed": self.computed,
            "images": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in images},
        }
        folder = JobFolder(out, "restorations", done="")
        targets = (target for path in images for target in self.targets(path, out))
        if not folder.resumes(settings) and (there := next(filter(Path.exists, targets), None)):
            raise UserError(f"{str(there)!r} exists: choose another --out, or move it away")
        folder.begin(settings)
        return folder

    def targets(self, path: Path, out: Path) -> list[Path]:
        """Output files of the image ``path``: JSON, measured, comparison, restored images."""
        each = [*(f"restored-{k + 1}" for k in range(self.samples)), "mean"]
        kinds = ["measured", "comparison", *(["restored"] if self.samples == 1 else each)]
        return [out / f"{path.stem}.json", *(out / f"{path.stem}-{kind}.png" for kind in kinds)]

    def degraded(self, path: Path) -> tuple[Measurement, Tensor, Tensor | None]:
        """Apply `Task.degrade` to the image ``path``."""
        channels = self.model.card.channels if self.model.card else None
        return self.task.degrade(read_image(path, channels).image, self.options, self.measured)

    def run_on(
        self,
        images: Sequence[Path],
        number: int,
        folder: JobFolder,
        progress: Hook = lambda step, steps: None,
        **saving: Any,
    ) -> dict[str, Any]:
        """Restore image ``number`` if it is not done; return the content of its JSON file.

        The files are written to the ``folder`` of `begin`, the JSON file last. ``saving`` are
        ``stop`` and ``save_seconds`` of `run_chains`.

        Raises:
            Interrupted: if ``stop`` returned True; the state is saved.
            DivergedError: if every chain diverged.
            UserError: if the image cannot be read or measured, or a file cannot be written.
        """
        path, out, start_time = images[number], folder.path, time.perf_counter()
        if (out / f"{path.stem}.json").exists():
            done: dict[str, Any] = read_json(out / f"{path.stem}.json")
            return done
        measurement, numbers, clean = self.degraded(path)
        shape, look = measurement.shape, measurement.on_gray(numbers)
        found = restore(
            self.model, measurement, numbers, self.config, samples=self.samples, seed=self.seed,
            c=self.c, progress=progress, folder=folder, batch=number, **saving,
        )  # fmt: skip
        samples, finite = found.images[0], found.finite[0]
        if not bool(finite.any()):
            if len(images) == 1:
                folder.finish()  # there is nothing to resume
            raise DivergedError(
                f"every chain of {path.name!r} diverged to NaN or Inf: lower beta or first_step, "
                "or check whether the training of the model diverged"
            )
        restored = samples[finite].clamp(0, 1)
        baselines = measurement.baselines(numbers)
        options = self.task.resolved(self.options)._asdict()
        mask, card = options["mask"], self.model.card
        known = None if mask is None else f"{int(mask.sum())} of {mask.numel()} pixels"
        document: dict[str, Any] = {
            "picture": str(path),
            "run": self.run,
            "task": self.task.name,
            "options": options | {"mask": known},
            "size": list(shape),
            "measured_numbers": measurement.count,
            "settings": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "samples": self.samples,
            "label": self.c,
            "psnr": None,
            "consistency_error": [finite_or_none(float(e)) for e in found.error[0]],
            "lost": torch.nonzero(~finite).flatten().tolist(),
            "steps": found.steps,
            "sigmas": found.sigmas,
            "warnings": self._warnings(shape, samples, finite),
            "seconds": 0.0,
            "model": None if card is None else card.model_dump(mode="json"),
            "environment": environment(),
        }
        if clean is not None:
            document["psnr"] = {
                "samples": [_psnr(x, clean) for x in samples],
                **({"mean_of_samples": _psnr(restored.mean(0), clean)} if len(samples) > 1 else {}),
                "baselines": {name: _psnr(x, clean) for name, x in baselines.items()},
            }
        _, seen, comparison, *names = self.targets(path, out)
        shown = restored if self.samples == 1 else [*samples, restored.mean(0)]
        for name, image in zip([seen, *names], [look, *shown], strict=True):
            write_image(image.clamp(0, 1), name, overwrite=True)
        _plot(look, clean, baselines, restored, comparison, f"{self.task.name}: {path.name}")
        document["seconds"] = round(max(found.seconds, time.perf_counter() - start_time), 3)
        text = json.dumps(document, indent=1, allow_nan=False)
        write_atomically(out / f"{path.stem}.json", text.encode())
        folder.file(STATE).unlink(missing_ok=True)
        return document

    def _warnings(self, shape: tuple[int, ...], images: Tensor, finite: Tensor) -> list[str]:
        found = []
        size = self.model.card and self.model.card.image_size
        if size and tuple(size) != shape[1:]:
            found.append(
                f"an image of {shape[1]}x{shape[2]} by a model trained at {size[0]}x{size[1]}: "
                "results are best at the training size"
            )
        far = torch.nonzero(is_out_of_range(images)).flatten().tolist()
        if far:
            found.append(
                f"restorations {[k + 1 for k in far]} have pixels far outside [0, 1], as happens "
                "with models that were trained too little; a lower beta or largest_step may help"
            )
        diverged = torch.nonzero(~finite).flatten().tolist()
        if diverged:
            found.append(f"chains {diverged} diverged to NaN or Inf; the others are not affected")
        return found


def read_mask(path: Path) -> Tensor:
    """Read a mask (H, W) bool, true where the image ``path`` is white: the area to fill in.

    Raises:
        UserError: if it cannot be read, or has values other than black and white.
    """
    image = read_image(path).image.mean(0)
    middle = (image > 0.1) & (image < 0.9)
    if bool(middle.any()):
        raise UserError(
            f"mask {str(path)!r} has {int(middle.sum())} pixels that are neither black nor white: "
            "save it as PNG, white where the image is to be filled in"
        )
    return image > 0.5


def _plot(
    look: Tensor,
    clean: Tensor | None,
    baselines: dict[str, Tensor],
    restored: Tensor,
    path: Path,
    title: str,
) -> None:
    """Plot the original, measured, best baseline and restored image, and the mean of several."""
    quality = {name: _psnr(x, clean) for name, x in baselines.items()}
    best = max(baselines, key=lambda name: inf if (q := quality[name]) is None else q)
    shown = {"measured": look, best: baselines[best], "restored": restored[0]}
    if len(restored) > 1:
        shown[f"mean of {len(restored)}"] = restored.mean(0)
    heads, row = ([], []) if clean is None else (["original"], [(clean, "")])
    for image in shown.values():
        value = _psnr(image, clean)
        row.append((image, "" if value is None else f"{value:.2f} dB"))
    image_rows([row], [*heads, *shown], path, title=title)


def _psnr(image: Tensor, clean: Tensor | None) -> float | None:
    """PSNR in dB; None if it is infinite, or the clean image is unknown."""
    if clean is None:
        return None
    return finite_or_none(float(psnr(image.clamp(0, 1)[None].cpu(), clean[None].cpu())))
