"""Configurations: what a YAML file can do beside being one."""

from __future__ import annotations

from pathlib import Path

from ebmkit.training import resolve
from ebmkit.training.config import read_config
from tests.hostile.case import Case, outside


def yaml_with(text: str):
    def make(folder: Path) -> Path:
        text_here = text.replace("OUTSIDE", str(outside(folder)))
        (folder / "config.yaml").write_text(text_here)
        return folder / "config.yaml"

    return make


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    return "\n".join(lines)


CASES = [
    Case(
        "yaml tag that runs a command",
        "config",
        yaml_with("seed: !!python/object/apply:os.system ['touch OUTSIDE/marker']"),
        "is not YAML",
    ),
    Case(
        "yaml tag that opens a file",
        "config",
        yaml_with("seed: !!python/object/apply:builtins.open ['OUTSIDE/secret.txt']"),
        "is not YAML",
    ),
]

OPENERS = {"config": lambda path: resolve(read_config(path))}
