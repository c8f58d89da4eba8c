"""``ebmkit data pack``: convert image folders and torchvision data sets to one HDF5 file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ebmkit.cli.console import console

__all__ = ["pack"]


def pack(
    src: Annotated[
        str, typer.Argument(help="image folder, CIFAR folder, or torchvision:NAME[:FOLDER]")
    ],
    out: Annotated[Path, typer.Argument(help="HDF5 file to write")],
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="image height and width, in pixels; images in a folder are resized and "
            "cropped to it",
        ),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="skip images that cannot be read")
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="follow links that lead out of the folder")
    ] = False,
) -> None:
    """Pack a folder of images, or a torchvision data set, into one HDF5 file.

    Train on it with --dataset hdf5 --data-dir OUT.h5.
    """
    from ebmkit.data.imagesets import Faults
    from ebmkit.data.pack import pack as pack_file

    pack_file(
        src,
        out,
        image_size=image_size,
        progress=console.is_terminal,
        faults=Faults(skip_unreadable, follow_links),
    )
    console.say(f"wrote {out}")
