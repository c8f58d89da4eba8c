"""All commands; importing this registers them."""

from ebmkit.cli import (
    bench,
    data,
    evaluate,
    export,
    list,
    published,
    reproduce,
    restore,
    sample,
    train,
    use,
    verify,
)

__all__ = [
    "bench",
    "data",
    "evaluate",
    "export",
    "list",
    "published",
    "reproduce",
    "restore",
    "sample",
    "train",
    "use",
    "verify",
]
