"""Where a checkpoint is: a local file or folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from ebmkit.errors import UserError

__all__ = ["is_hub_name", "locate"]

SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors", ".zip")

NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>[^:]+))?")


def is_hub_name(source: str) -> bool:
    """Whether ``source``, which is no local path, reads ``owner/name`` or ``owner/name:file``."""
    match = NAME.fullmatch(source)
    return match is not None and (bool(match["file"]) or not source.endswith(SUFFIXES))


def locate(source: str) -> Path:
    """The local path of ``source``; a file on the hub is fetched, or taken from the cache.

    Args:
        source: a path, or ``owner/name:file``.

    Raises:
        UserError: if it is neither, huggingface_hub is not installed, or it cannot be fetched.
    """
    if Path(source).exists():
        return Path(source)
    match = NAME.fullmatch(source)
    if not is_hub_name(source) or match is None:
        raise UserError(f"cannot read {source!r}: no such file or folder")
    if not match["file"]:
        raise UserError(
            f"{source!r} is no local path; of a repository on the hub say the file too, as in "
            f"{source}:model.pt"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "fetching from the hub needs huggingface_hub: pip install 'ebmkit-vision[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.hf_hub_download(match["repository"], match["file"]))
    except Exception as error:  # of the network, the hub and its cache: it has no common class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot fetch {source!r} from the hub: {reason}") from None
