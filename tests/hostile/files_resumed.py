"""Untrusted runs that are resumed: valid archives with invalid contents.

The cases need a trained run and are all slow.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ebmkit_tests.hostile.case import Case
from ebmkit_tests.hostile.making import Make

from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.run_folder import pack_state

LAYER = """
objective: jem
backbone: gradresnet18
model: {backbone: {width: 4, channels_per_group: 4}}
negatives: {buffer_size: 20, steps: 1}
streams: {classify: {batch_size: 2}, denoise: {batch_size: 2}, generate: {batch_size: 2}}
validation_images: 0
checkpoint_every: 1
keep_checkpoints: 3
device: cpu
steps: 3
"""

CHECKPOINT = "checkpoints/step-00000002.pt"


@cache
def stopped_run() -> Path:
    """A run with only its checkpoint of step 2 of 3."""
    root = Path(tempfile.mkdtemp()) / "run"
    layer = root.parent / "layer.yaml"
    layer.write_text(LAYER)
    # in another process: the cases are forks of this one, and a fork loses autograd's threads
    words = [sys.executable, "-m", "ebmkit", "train", "--no-evaluate", "--config", layer]
    words += ["--out", root]
    subprocess.run(words, check=True, capture_output=True, cwd=root.parent)
    for step in (1, 3):
        (root / f"checkpoints/step-{step:08}.pt").unlink()
    (root / "manifest.json").unlink()
    return root


def with_state(change: Callable[[dict[str, Any]], object], name: str = CHECKPOINT) -> Make:
    """The run with a checkpoint changed by ``change``, and without a manifest."""

    def make(folder: Path) -> Path:
        root = shutil.copytree(stopped_run(), folder / "run")
        state = torch.load(root / CHECKPOINT, weights_only=True)
        change(state)
        (root / CHECKPOINT).unlink()
        (root / name).write_bytes(pack_state(state))
        return root

    return make


def moments(state: dict[str, Any], **new: torch.Tensor) -> None:
    for own in state["optimizer"]["state"].values():
        own |= new


def groups(state: dict[str, Any], **new: object) -> None:
    for group in state["optimizer"]["param_groups"]:
        group |= new


def weights(state: dict[str, Any], value: float) -> None:
    for tensor in state["model"].values():
        tensor.fill_(value)


def resume(root: Path) -> None:
    """Resume training as `ebmkit train --resume` does."""
    run = RunFolder.open(root)
    assemble(resolve(run.config()), run).fit()


CASES = [
    Case("resumed: unchanged", "resumed", with_state(lambda s: None), None, 500, 20, True),
    *(
        Case(f"resumed: {name}", "resumed", with_state(change), message, 500, 20, True)
        for name, change, message in (
            ("empty moments", lambda s: moments(s, exp_avg=torch.ones(0)), "'exp_avg' is"),
            ("moments of 2^40 elements",
             lambda s: moments(s, exp_avg_sq=torch.ones(1).as_strided((2**20, 2**20), (0, 0))),
             "damaged"),
            ("an unknown moment", lambda s: moments(s, evil=torch.ones(1)), "another optim"),
            ("an unknown parameter",
             lambda s: s["optimizer"]["state"].update({10**9: {}}), "of another optim"),
            ("other options in parameter groups",
             lambda s: groups(s, lr=1e30, maximize=True, params=[10**6] * 9, foreach=[0]), None),
            ("momentum beside moments",
             lambda s: moments(s, momentum_buffer=torch.ones(0)), "another optim"),
            ("NaN weights", lambda s: weights(s, float("nan")), None),
            ("weights of 10^38", lambda s: weights(s, 1e38), None),
            ("Langevin steps of 2^62",
             lambda s: s["rollback"]["remedies"].update(steps=2.0**62), "remedies.steps"),
            ("attempt number 10^4000",
             lambda s: s["rollback"].update(attempt=10**4000), None),
            ("an invalid history", lambda s: s["rollback"].update(history=[["\x1b"]]), "history"),
            ("chains of another shape",
             lambda s: s["rollback"]["kept"][0].__setitem__(2, torch.ones(1)), "chains kept at"),
            ("an empty rollback", lambda s: s.update(rollback={}), "the checkpoint: rollback"),
            ("running means of another shape", lambda s: s.update(running=torch.ones(99)), "runn"),
            ("infinite seconds", lambda s: s.update(seconds=float("inf")), "seconds"),
        )
    ),
    Case("resumed: a step of 10^15", "resumed",
         with_state(lambda s: s.update(step=10**15), f"checkpoints/step-{10**15}.pt"),
         "the run ends at 3", 500, 20, True),
]  # fmt: skip

OPENERS = {"resumed": resume}
