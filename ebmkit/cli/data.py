"""``ebmkit data pack``: convert image folders and torchvision data sets to one HDF5 file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ebmkit.cli.console import console
from ebmkit.cli.options import IMAGE_SIZE


def pack(
    src: Annotated[str, Argument(help="image folder, CIFAR folder, or torchvision:NAME[:FOLDER]")],
    out: Annotated[Path, Argument(help="HDF5 file to write")],
    image_size: Annotated[int | None, IMAGE_SIZE] = None,
    skip_unreadable: Annotated[
        bool, Option("--skip-unreadable", help="skip images that cannot be read")
    ] = False,
    follow_links: Annotated[
        bool, Option("--follow-links", help="follow links that lead out of the folder")
    ] = False,
) -> None:
    """Pack a folder of images, or a torchvision data set, into one HDF5 file.

    Train on it with --dataset hdf5 --data-dir OUT.h5.
    """
    from ebmkit.data import Faults
    from ebmkit.data.pack import pack as pack_file

    faults = Faults(skip_unreadable, follow_links)
    pack_file(src, out, image_size=image_size, progress=console.is_terminal, faults=faults)
    console.say(f"wrote {out}")
