"""Files that outlive crashes: written whole, noticed when damaged, one writer at a time."""

from ebmkit.storage.locks import Busy, held
from ebmkit.storage.manifest import DamagedFile
from ebmkit.storage.together import (
    read_together,
    remove_file,
    write_atomically,
    write_together,
)

__all__ = [
    "Busy",
    "DamagedFile",
    "held",
    "read_together",
    "remove_file",
    "write_atomically",
    "write_together",
]
