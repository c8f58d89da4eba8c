"""The files of a finished sampling job.

``samples.h5``, which is also a data set of kind ``hdf5`` (`ebmkit.data.hdf5`)::

    images       (N, H, W, C) uint8, clipped and rounded
    samples      (N, C, H, W) float32, as the sampler left them
    finite       (N,) bool, false of chains that left the finite numbers: their last finite image
    labels       (N,) int64, of samples that were asked for by label
    class_names  their names
    log_density  (N,) float32, nats, up to the model's constant
    log_joint    (N, C) float32, of models with labels

with attributes ``source`` (``fresh``, or ``buffer`` where chains go on from the replay buffer),
``sampler``, ``settings`` (JSON), ``seed``, ``run``. There is no attribute ``filter``, as nothing is
left out.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.errors import UserError
from ebmkit.plots.sampling import Sampled, path_animation, path_strip, sample_grid
from ebmkit.sampling.jobs.diagnose import chain_diagnostics, energy_diagnostics, lost_chains
from ebmkit.sampling.jobs.job import SamplingJob, density_level
from ebmkit.sampling.jobs.labels import class_names_of
from ebmkit.sampling.jobs.record import means_of
from ebmkit.sampling.jobs.settings import BUFFER
from ebmkit.training.run_folder import environment

__all__ = ["far_from_images", "source_of", "write_results"]

FAR = 1.5
"""Distance of a pixel from 0.5 beyond which a sample is no image, for whatever reason."""

GRID = 200
"""Samples on the picture, at the most."""


def write_results(job: SamplingJob, run: str) -> dict[str, Any]:
    """Write all files of a job that has run; ``sampling.json`` last. What that holds.

    Args:
        job: after `SamplingJob.run`.
        run: the run's name, written down.

    Raises:
        UserError: if a file cannot be written.
    """
    settings, folder = job.settings, job.folder.path
    small = _write_hdf5(job, run, folder / "samples.h5")
    first = job.finished(0)
    finite, died = small["finite"].bool(), small["died"]
    held = job.sources.held_out
    document: dict[str, Any] = {
        "run": run,
        "source": source_of(job),
        "settings": settings.model_dump(mode="json"),
        "model": None if job.model.card is None else job.model.card.model_dump(mode="json"),
        "samples": settings.count,
        "steps": small["steps"],
        "lost": lost_chains(died),
        "warnings": [*job.cautions, *_far(small["far"]), *_losses(died)],
        "diagnostics": {
            "acceptance": small["acceptance"],
            "chains": chain_diagnostics(
                settings.sampler, small["draws"], finite, max(1, job.length // 200)
            ),
            "energies": energy_diagnostics(
                small.get("log_density"),
                finite,
                None if held is None else job.log_density(held),
                job.sources.note,
                density_level(job.model),
            ),
        },
        "seconds": round(small["seconds"], 3),
        "traces": small["traces"]._asdict(),
        "environment": environment(),
    }
    pictures = _draw(job, small, first, document)
    document["files"] = ["samples.h5", *pictures]
    job.folder.finish(document)
    return document


def source_of(job: SamplingJob) -> str:
    """Whether chains began anew or in the replay buffer."""
    return "buffer" if job.settings.start == BUFFER else "fresh"


def _write_hdf5(job: SamplingJob, run: str, path: Path) -> dict[str, Any]:
    """Write the samples batch by batch, in one move; what is small is given back, joined."""
    import h5py

    settings = job.settings
    total, (channels, height, width) = settings.count, settings.shape
    small: dict[str, list[Any]] = {}
    shown: list[Tensor] = []
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        with h5py.File(temporary, "w") as file:
            images = file.create_dataset("images", (total, height, width, channels), "uint8")
            samples = file.create_dataset("samples", (total, channels, height, width), "float32")
            at, far = 0, 0
            for number in range(job.batches):
                batch = job.finished(number)
                x = batch.pop("samples").float()
                rows = slice(at, at + len(x))
                at += len(x)
                samples[rows] = x.numpy()
                far += int(far_from_images(x).sum())
                levels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
                images[rows] = levels.permute(0, 2, 3, 1).numpy()
                if sum(map(len, shown)) < GRID:
                    shown.append(x)
                batch.pop("frames", None)
                for key, kept in batch.items():
                    small.setdefault(key, []).append(kept)
            names = ("finite", "labels", "log_density", "log_joint")
            joined = {key: torch.cat(small[key]) for key in names if key in small}
            for key, column in joined.items():
                file[key] = column.numpy()
            if "labels" in joined:
                kind = h5py.string_dtype()
                file.create_dataset("class_names", data=class_names_of(job.model), dtype=kind)
            attributes = {
                "source": source_of(job),
                "sampler": settings.sampler,
                "settings": settings.model_dump_json(),
                "seed": settings.seed,
                "run": run,
            }
            for key, value in attributes.items():
                file.attrs[key] = value
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    traces = means_of(small.get("sums", []))
    known = [(a, n) for a, n in zip(traces.acceptance, traces.chains, strict=True) if a is not None]
    moves = sum(n for _, n in known)
    return {
        **joined,
        "died": torch.cat(small["died"]),
        "draws": small.get("draws", [None]),
        "seconds": float(sum(small["seconds"])),
        "traces": traces,
        "steps": len(traces.chains),
        "acceptance": sum(a * n for a, n in known) / moves if moves else None,
        "shown": torch.cat(shown),
        "far": far,
    }


def _draw(
    job: SamplingJob, small: dict[str, Any], first: dict[str, Tensor], document: dict[str, Any]
) -> list[str]:
    folder, settings = job.folder.path, job.settings
    labels = small.get("labels")
    sampled = Sampled(
        small["shown"],
        None if labels is None else labels[: len(small["shown"])],
        class_names_of(job.model),
        small["finite"].bool(),
    )
    start = f"from {settings.start}"
    steps = f", {document['steps']} steps {start}" if document["steps"] else ""
    how = settings.guidance
    guided = "" if how is None else f", guided by {how.guidance} at {how.scale:g}"
    title = f"{settings.sampler}{steps}{guided}, seed {settings.seed}"
    sample_grid(sampled, folder / "samples.png", title, settings.count)
    if "frames" not in first:
        return ["samples.png"]
    frames, moments = first["frames"], first["moments"].tolist()
    path_strip(frames, moments, small["traces"].sigma, folder / "path.png", title)
    path_animation(frames, folder / "path.gif")
    return ["samples.png", "path.png", "path.gif"]


def far_from_images(x: Tensor) -> Tensor:
    """Which of the samples (N, C, H, W) have pixels beyond `FAR` from the middle, (N,) bool."""
    return (x - 0.5).abs().flatten(1).amax(1) > FAR


def _far(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"{count} samples have pixels beyond {0.5 - FAR:g} or {0.5 + FAR:g}, where no image is: "
        "their chains ran away, as they do where a model was trained too little or for other "
        "noise, or steps are too long"
    ]


def _losses(died: Tensor) -> list[str]:
    lost = lost_chains(died)
    if not lost:
        return []
    told = ", ".join(f"{entry['chain']} at step {entry['step']}" for entry in lost[:8])
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    rest = "none is left" if len(lost) == len(died) else "the others are kept"
    return [
        f"{len(lost)} of {len(died)} chains left the finite numbers (chain {told}{more}); {rest}, "
        "and `finite` in samples.h5 says which are which: smaller steps may help"
    ]
