"""All commands; importing this registers them."""

from ebmkit.cli import bench, data, evaluate, export, list, train, use

__all__ = ["bench", "data", "evaluate", "export", "list", "train", "use"]
