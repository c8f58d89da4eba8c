"""Files that outlive crashes: written whole, noticed when damaged, one writer at a time."""

from ebmkit.storage.atomic import write_atomically

__all__ = ["write_atomically"]
