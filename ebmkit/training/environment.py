"""What a run runs on: versions, device, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ebmkit.parallel import launch

__all__ = ["environment"]


def environment() -> dict[str, Any]:
    """Versions, device, git commit and command of this process."""
    from importlib.metadata import version

    import ebmkit

    cuda = torch.cuda.is_available()
    return {
        "ebmkit": ebmkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "git_commit": _git_commit(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "launch": launch(),
        "command": ["ebmkit", *sys.argv[1:]],
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, if it runs from a checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
