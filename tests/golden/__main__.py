"""Short runs with stored metrics and hashes: ``python -m ebmkit_tests.golden [--write]``.

The bits of a run depend on the order of sums, which differs between processors. The runs therefore
use ATen's default kernels, no oneDNN, MKL's compatible branch and one thread (`FIXED`, set before
PyTorch is imported). The networks are below the thresholds of `ebmkit.models.convolution` and
`ebmkit.models.layers`, so they use PyTorch's derivatives. The bits still depend on PyTorch's
version and the type of machine, which are the key of the stored hashes; elsewhere the metrics agree
up to rounding.

``--write`` stores the results; without it they are printed as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

FIXED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

STORED_FILE = Path(__file__).resolve().parent / "golden.json"

SMALL: dict[str, Any] = {
    "model": {"backbone": {"width": 4, "channels_per_group": 4}},
    "steps": 6,
    "log_every": 1,
    "validate_every": 3,
    "validation_images": 20,
    "checkpoint_every": 4,
    "device": "cpu",
    "compute": {"compile": "off"},
    "streams": {
        "classify": {"batch_size": 8},
        "denoise": {"batch_size": 8},
        "generate": {"batch_size": 8},
    },
}

RUNS: dict[str, dict[str, Any]] = {
    "ce+dsm": {
        "optimizer": {"ema": 0.9, "clip_norm": 1.0},
        "streams": {"classify": {"augmentation": {"mix": "both", "crop_padding": 1}}},
    },
    "jem": {
        "objective": "jem",
        "backbone": "gradresnet18",
        "negatives": {"buffer_size": 20, "steps": 2},
        "rollback": {"every": 2},
    },
    "adv+dsm": {"objective": "adv+dsm", "terms": {"adv": {"eps": 0.5, "steps": 2}}},
    "ce+dsm-muon": {
        "optimizer": {
            "kind": "muon",
            "lr": 3e-3,
            "schedule": "warmup-stable-decay",
            "ema": 0.99,
            "ema_warmup": True,
        },
        "terms": {"ce": {"label_smoothing": 0.1}},
    },
    "cdsm-sgd": {
        "objective": "ce+cdsm",
        "optimizer": {"kind": "sgd", "lr": 3e-3, "sharpness": 0.05},
    },
}


def machine() -> str:
    """PyTorch's version and the type of machine, the key of the stored hashes."""
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}"


def run_all() -> dict[str, Any]:
    """The metrics of each run, and the SHA-256 of all tensors of its last checkpoint."""
    import torch

    from ebmkit.training import RunFolder, resolve
    from ebmkit.training.cost import Budget
    from ebmkit.training.loop import assemble

    Budget.check = lambda self: None  # the memory estimate takes longer than the run
    torch.backends.mkldnn.enabled = False
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, layer in RUNS.items():
            plain = layer.get("objective") not in ("jem", "adv+dsm")  # which have their own recipe
            config = resolve(SMALL, layer, recipe="digits-adamw" if plain else None)
            run = RunFolder.create(Path(place) / name, config)
            assemble(config, run).fit()
            digest = hashlib.sha256()
            _digest(digest, run.load_checkpoint())
            rows = [{k: v for k, v in r.items() if k != "images_per_s"} for r in run.metrics()]
            found[name] = {"metrics": rows, "sha256": digest.hexdigest()}
    return found


def _digest(digest: Any, value: Any) -> None:
    """Add a nested state to the digest, without the entries ``seconds`` and ``buffer``."""
    import torch

    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in ("seconds", "buffer"):
                digest.update(repr(key).encode())
                _digest(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            _digest(digest, part)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def main() -> None:
    """Compute all runs; print or store the results."""
    if any(os.environ.get(name) != value for name, value in FIXED.items()):
        command = [sys.executable, "-m", "ebmkit_tests.golden", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | FIXED)
    found = run_all()
    if "--write" in sys.argv:
        stored = json.loads(STORED_FILE.read_text()) if STORED_FILE.exists() else {"bits": {}}
        bits = {**stored["bits"], machine(): {name: own["sha256"] for name, own in found.items()}}
        metrics = {name: own["metrics"] for name, own in found.items()}
        document = {"made_on": machine(), "metrics": metrics, "bits": bits}
        STORED_FILE.write_text(json.dumps(document, indent=1) + "\n")
    else:
        print(json.dumps({"machine": machine(), "runs": found}))


if __name__ == "__main__":
    main()
