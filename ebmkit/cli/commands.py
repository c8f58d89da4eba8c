"""All commands; importing this registers them."""

from ebmkit.cli import bench, data, evaluate, export, list, published, reproduce, train, use

__all__ = ["bench", "data", "evaluate", "export", "list", "published", "reproduce", "train", "use"]
