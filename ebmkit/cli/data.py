"""``ebmkit data pack``: convert image folders and torchvision data sets to one HDF5 file."""

from __future__ import annotations

from pathlib import Path

from ebmkit.cli.console import console


def pack(
    src: str,
    out: Path,
    *,
    image_size: int | None = None,
    skip_unreadable: bool = False,
    follow_links: bool = False,
) -> None:
    """Pack a folder of images, or a torchvision data set, into one HDF5 file.

    Train on it with --dataset hdf5 --data-dir OUT.h5.

    Args:
        src: image folder, CIFAR folder, or torchvision:NAME[:FOLDER]
        out: HDF5 file to write
        skip_unreadable: skip images that cannot be read
        follow_links: follow links that lead out of the folder
    """
    from ebmkit.data import Faults
    from ebmkit.data.sets import pack as pack_file

    faults = Faults(skip_unreadable, follow_links)
    pack_file(src, out, image_size=image_size, progress=console.is_terminal, faults=faults)
    console.say(f"wrote {out}")
