"""Crash-safe files: atomic writes, detection of damage, one writer at a time."""

from ebmkit.storage.atomic import FolderLocked, held, make_folder
from ebmkit.storage.claims import Claim
from ebmkit.storage.manifest import commit_files, read_together, remove_file, write_atomically
from ebmkit.storage.reading import DamagedFile

__all__ = [
    "Claim",
    "DamagedFile",
    "FolderLocked",
    "commit_files",
    "held",
    "make_folder",
    "read_together",
    "remove_file",
    "write_atomically",
]
