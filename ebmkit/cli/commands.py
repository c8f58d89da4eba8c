"""All commands; importing this registers them."""

from ebmkit.cli import data, evaluate, list, train, use

__all__ = ["data", "evaluate", "list", "train", "use"]
