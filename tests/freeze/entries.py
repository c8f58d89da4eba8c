"""The entries: each runs the command line and reads the files that it writes.

Only `_outputs` and `_mixture` use the Python interface.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ebmkit_tests.freeze import commands as c
from ebmkit_tests.freeze.summary import Weights


class Entry(NamedTuple):
    """A result to record.

    Attributes:
        compute: runs in the entry's own folder; returns nested results for `summary.summarize`.
        runs: entries of training runs whose folders it reads.
    """

    compute: Callable[[], dict[str, Any]]
    runs: tuple[str, ...] = ()


def ebmkit(command: str) -> None:
    """Run the command line; ends this process if the command fails."""
    words: list[str] = []
    for word in shlex.split(command):
        setting = re.match(r"[a-z][\w.-]*=", word) and words[-1] != "--guide-set"
        words += ["--set", word] if setting else [word]
    sys.argv = ["ebmkit", *words]
    try:
        runpy.run_module("ebmkit", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            sys.stderr.flush()
            os._exit(1)


def run_path(name: str) -> str:
    """The run folder of a training entry, seen from the folder of another."""
    return f"../{name.replace('/', '~')}/run" if name else ""


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _train(words: str) -> dict[str, Any]:
    ebmkit(f"{c.TRAIN} {words}")
    return _trained(Path("run"))


def _resume(name: str) -> dict[str, Any]:
    """Resume a training run of an older version to its end."""
    shutil.copytree(Path(__file__).resolve().parents[1] / "old_runs" / name, "run")
    ebmkit(c.RESUME)
    return _trained(Path("run"))


def _trained(run: Path) -> dict[str, Any]:
    """Losses and weights of a run, and outputs of its model.

    Losses of the first steps are recorded one by one: the effect of rounding is still small there.
    """
    import safetensors.numpy

    curves: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "images_per_s"):
                curves.setdefault(f"{row['kind']}.{key}", []).append(value)
    return {
        "first": {key: values[:3] for key, values in curves.items()},
        "last": {key: values[-1] for key, values in curves.items()},
        "curves": {key: np.array(values) for key, values in curves.items()},
        "weights": Weights(safetensors.numpy.load_file(run / "model.safetensors").values()),
        "outputs": _outputs(run),
    }


def _outputs(run: Path) -> dict[str, Any]:
    """Scores, denoised images and energies of fixed images, by the public Python interface."""
    import torch

    import ebmkit as package

    model = package.load(run)
    channels = 3 if "patches" in (run / "config.yaml").read_text() else 1
    y = torch.linspace(0, 1, 3 * channels * 64).sin().reshape(3, channels, 8, 8)
    sigma = 25 / 255
    energies = model(y, sigma)
    found = {name: getattr(energies, name, None) for name in ("logits", "log_density")}
    found = {name: value for name, value in found.items() if value is not None and value.numel()}
    return {"score": model.score(y, sigma=sigma), "denoised": model.denoise(y, sigma=sigma)} | found


def _mixture(name: str) -> dict[str, Any]:
    """Chains on a labelled mixture of 4x4 images, with labels and without."""
    import torch

    from ebmkit import GaussianMixture
    from ebmkit.sampling import SAMPLERS, Chains

    class Blind(GaussianMixture):
        noise_conditional = False

        def denoise_blind(self, y: Any, c: Any = None, sigma_range: Any = None) -> Any:
            squares = (y[:, None] - self.means).flatten(2).square().mean(2).amin(1)
            sigma = (squares - 0.01).clamp_min(1e-8).sqrt()
            return self.posterior_mean(y, sigma, c), sigma

    means = torch.stack([torch.full((1, 4, 4), level) for level in (0.3, 0.7, 0.3)])
    means[2, :, :2] = 0.7
    kind = Blind if name == "kadkhodaie_simoncelli" else GaussianMixture
    model = kind(means, 0.01, weights=[0.5, 0.3, 0.2], labels=[0, 1, 1])
    entry = SAMPLERS[name]
    found = {}
    for key, labels in (("plain", None), ("labelled", torch.tensor([0, 1, 1, 0]))):
        if labels is None and name == "ascent":
            continue
        config = entry.config(steps=20)
        sampler = entry.build(model, labels, config)
        generator = torch.Generator().manual_seed(5)
        x = entry.start(model, sampler, config, (4, 1, 4, 4), generator, labels)
        x = Chains(sampler, sampler.init(x)).run(entry.length(sampler, config), generator).x
        found[key] = {"chains": x, "finished": entry.finish(model, sampler, x, labels)}
    return found


def _sample(run: str, guide: str, words: str) -> dict[str, Any]:
    import h5py

    by = c.GUIDE.format(guide=run_path(guide)) if guide else ""
    ebmkit(f"{c.SAMPLE.format(run=run_path(run))} {by} {words}")
    with h5py.File("drawn/samples.h5") as file:
        arrays = {k: v[()] for k, v in file.items() if v.dtype.kind in "fiub"}
    return {"samples": arrays, "document": _json(Path("drawn/sampling.json"))}


def _run_on_image(command: str) -> None:
    """Run a command on a small gray image."""
    from PIL import Image

    rows, columns = np.mgrid[0:20, 0:12]
    values = 127 + 90 * np.sin(rows / 3) * np.cos(columns / 2)
    Image.fromarray(values.astype(np.uint8)).save("picture.png")
    ebmkit(command.format(run=run_path(c.JOINT)))


def _images() -> dict[str, Any]:
    """Images that a command wrote, without plots."""
    from PIL import Image

    paths = [p for p in sorted(Path("out").glob("*.png")) if "comparison" not in p.stem]
    return {path.stem: np.array(Image.open(path)) for path in paths}


def _denoise(words: str) -> dict[str, Any]:
    _run_on_image(f"{c.DENOISE} {words}")
    return _images()


def _restore(task: str) -> dict[str, Any]:
    _run_on_image(c.RESTORE.replace("{name}", task))
    return {"images": _images(), "document": _json(Path("out/picture.json"))}


def _classify() -> dict[str, Any]:
    """The numbers of the printed table."""
    _run_on_image(c.CLASSIFY)
    sys.stdout.flush()
    return {"table": [float(n) for n in re.findall(r"-?\d+\.\d+", Path("stdout").read_text())]}


def _export(what: str, suffix: str) -> dict[str, Any]:
    """Outputs of an exported file, run without the package."""
    import torch

    file = what + suffix
    ebmkit(c.EXPORT.format(run=run_path(c.JOINT), file=file, what=what))
    y = torch.linspace(0, 1, 2 * 64).sin().reshape(2, 1, 8, 8)
    inputs = [y, torch.tensor([0.1, 0.2])] if what == "denoiser" else [y]
    if suffix == ".pt2":
        outputs = torch.export.load(file).module()(*inputs)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        keys = [argument.name for argument in session.get_inputs()]
        outputs = session.run(None, {k: v.numpy() for k, v in zip(keys, inputs, strict=True)})
    return {"outputs": list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]}


def _evaluate(suite: str) -> dict[str, Any]:
    run, words = c.SUITES[suite]
    name = "corruptions" if suite == "shift" else suite  # the entry keeps its old name
    shutil.copytree(run_path(run), "run")
    if suite == "generation":
        _sample(run, "", c.GENERATED)
    words = words.replace("{extractor}", run_path(c.ROBUST))
    ebmkit(f"{c.EVALUATE.format(name=name)} {words}")
    found = {path.stem: _json(path) for path in sorted(Path("run/evaluation").rglob("*.json"))}
    return {suite if stem == name else stem: document for stem, document in found.items()}


def _reproduce(target: str) -> dict[str, Any]:
    """Numbers of a table; rows that other tables share are trained once."""
    ebmkit(c.SMOKE.format(name=target))
    return {path.stem: _json(path) for path in sorted(Path("../smoke").glob(f"{target}*.json"))}


OLD_RUNS = sorted(p.name for p in Path(__file__).resolve().parents[1].glob("old_runs/20*"))
LABEL = "--sigma 25/255 --label 3"

ENTRIES: dict[str, Entry] = {
    **{name: Entry(partial(_train, words)) for name, words in c.TRAINED.items()},
    **{f"resume/{name}": Entry(partial(_resume, name)) for name in OLD_RUNS},
    **{
        f"sample/{name}/mixture": Entry(partial(_mixture, sampler_name or name))
        for name, sampler_name in c.SAMPLERS.items()
    },
    **{n: Entry(partial(_sample, run, "", words), (run,)) for n, (run, words) in c.SAMPLED.items()},
    **{
        name: Entry(partial(_sample, *own), tuple(run for run in own[:2] if run))
        for name, own in c.GUIDED.items()
    },
    "use/denoise-blind": Entry(partial(_denoise, ""), (c.JOINT,)),
    "use/denoise-label": Entry(partial(_denoise, LABEL), (c.JOINT,)),
    "use/classify": Entry(_classify, (c.JOINT,)),
    **{f"restore/{task}": Entry(partial(_restore, task), (c.JOINT,)) for task in c.RESTORED},
    **{
        f"export/{what}{suffix}": Entry(partial(_export, what, suffix), (c.JOINT,))
        for what, suffix in c.EXPORTED
    },
    **{
        f"suite/{name}": Entry(partial(_evaluate, name), tuple(dict.fromkeys((run, *more))))
        for name, (run, _) in c.SUITES.items()
        for more in [(c.ROBUST,) if name == "generation" else ()]
    },
    **{f"smoke/{target}": Entry(partial(_reproduce, target)) for target in c.TARGETS},
}
"""All entries by name."""
