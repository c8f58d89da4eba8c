"""Image folders with links out, circular links, special files, or names with escape sequences."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import torchvision  # noqa: F401  (its import is not part of a case)
from ebmkit_tests.hostile.case import Case, outside
from ebmkit_tests.hostile.files_hdf5 import external_link
from ebmkit_tests.hostile.making import GIGAPIXEL, Make, encoded, png
from torchvision.transforms.v2 import functional  # noqa: F401

from ebmkit.data import load_dataset
from ebmkit.data.imagesets import FaultPolicy
from ebmkit.evaluation.ood import find_set


def folder_with(change: Callable[[Path, Path], None], classes: int = 2, count: int = 12) -> Make:
    """A folder of small images in ``classes`` classes, changed by ``change(root, outside)``."""

    def make(folder: Path) -> Path:
        root = folder / "set"
        for part in ("train", "test"):
            for number in range(classes):
                place = root / part / f"class{number}"
                place.mkdir(parents=True)
                for i in range(count):
                    (place / f"{i}.png").write_bytes(encoded("PNG"))
        change(root, outside(folder))
        return root

    return make


def link_outside(root: Path, where: Path) -> None:
    (where / "theirs.png").write_bytes(encoded("PNG"))
    (root / "train" / "class0" / "x.png").symlink_to(where / "theirs.png")


def link_to_an_outside_text(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to(where / "secret.txt")


def relative_link(root: Path, where: Path) -> None:
    (where / "theirs.png").write_bytes(encoded("PNG"))
    place = root / "train" / "class0"
    (place / "x.png").symlink_to(os.path.relpath(where / "theirs.png", place))


def link_to_a_link(root: Path, where: Path) -> None:
    link_outside(root, where)
    place = root / "train" / "class0"
    (place / "x.png").rename(place / "hidden")
    (place / "x.png").symlink_to("hidden")


def class_folder_is_a_link(root: Path, where: Path) -> None:
    (where / "theirs").mkdir()
    (root / "train" / "class2").symlink_to(where / "theirs")


def training_link(root: Path, where: Path) -> None:
    (root / "train").rename(where / "train")
    (root / "train").symlink_to(where / "train")


def link_to_the_parent(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "again").symlink_to(root / "train")


def circular_links(root: Path, where: Path) -> None:
    place = root / "train" / "class0"
    (place / "x.png").symlink_to("y.png")
    (place / "y.png").symlink_to("x.png")


def links_inside(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to("0.png")
    (root / "train" / "class1" / "y.png").symlink_to(root / "train" / "class0" / "1.png")


def broken_link(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to("nothing.png")


def pipe_among_images(root: Path, where: Path) -> None:
    os.mkfifo(root / "train" / "class0" / "x.png")


def folder_called_png(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").mkdir()


def deep_folders(root: Path, where: Path) -> None:
    here = os.open(root / "train" / "class0", os.O_RDONLY)
    for _ in range(500):  # nested: the full path exceeds the limit of the system
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def bomb_among_images(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "5.png").write_bytes(png(10**5, 10**5, GIGAPIXEL))


def large_image(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "5.png").write_bytes(png(10_000, 10_000, zlib.compress(bytes(9))))


def names_with_escapes(root: Path, where: Path) -> None:
    for name in ("\x1b]0;owned\x07", "two\nlines", "\u202egnp.exe", "[red]", "$\\frac{$"):
        for part in ("train", "test"):
            place = root / part / name
            place.mkdir()
            for i in range(4):
                (place / f"{i}\x1b[2J\n.png").write_bytes(encoded("PNG"))


def names_not_utf8(root: Path, where: Path) -> None:
    place = os.path.join(os.fsencode(root), b"train", b"\xff\xfe")
    os.mkdir(place)
    Path(os.fsdecode(os.path.join(place, b"\x80.png"))).write_bytes(encoded("PNG"))


def damaged_image_with_escapes(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "a\x1b[2J\rb\n.png").write_bytes(b"nothing")


def loose_names_not_utf8(folder: Path) -> Path:
    """The split of each file depends on the bytes of its name."""
    root = folder / "set"
    root.mkdir()
    for i in range(60):
        name = os.path.join(os.fsencode(root), b"\xff%d.png" % i)
        Path(os.fsdecode(name)).write_bytes(encoded("PNG"))
    return root


def cifar(first: Callable[[Path, Path], None]) -> Make:
    """A CIFAR-10 folder in torchvision's layout; ``first(path, outside)`` writes one batch."""

    def make(folder: Path) -> Path:
        place = folder / "cifar-10-batches-py"
        place.mkdir()
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
        for name in names:
            (place / name).write_bytes(b"")
        (place / "data_batch_1").unlink()
        first(place / "data_batch_1", outside(folder))
        return folder

    return make


class RunsCommand:
    """A pickle that runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def pickled_command(path: Path, where: Path) -> None:
    path.write_bytes(pickle.dumps(RunsCommand(where / "marker")))


def all_pickled_commands(folder: Path) -> Path:
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        pickled_command(place / name, outside(folder))
    return folder


CASES = [
    Case("link to an outside image", "folder", folder_with(link_outside), "out of the fol"),
    Case("link to an outside text", "folder", folder_with(link_to_an_outside_text), "out of"),
    Case("relative link outside", "folder", folder_with(relative_link), "link out of the folder"),
    Case("link to a link outside", "folder", folder_with(link_to_a_link), "link out of the folder"),
    Case("class folder outside", "folder", folder_with(class_folder_is_a_link), "out of the fol"),
    Case("training folder outside", "folder", folder_with(training_link), "out of the folder"),
    Case(
        "class folder links to its parent",
        "folder",
        folder_with(link_to_the_parent),
        "link to a folder that contains it",
    ),
    Case("circular links", "folder", folder_with(circular_links), "cannot be opened"),
    Case("links inside the folder", "folder", folder_with(links_inside), None),
    Case("broken link", "folder", folder_with(broken_link), "there is no file"),
    Case("pipe among images", "folder", folder_with(pipe_among_images), "not an ordinary file"),
    Case("folder called png", "folder", folder_with(folder_called_png), None),
    Case("folders 500 deep", "folder", folder_with(deep_folders), "more than 64 deep"),
    Case("bomb among images", "folder", folder_with(bomb_among_images), "89 megapixels"),
    Case("100 megapixels among images", "folder", folder_with(large_image), "89 megapixels"),
    Case("bomb among images, skipped", "folder, skip", folder_with(bomb_among_images), None),
    Case("pipe among images, skipped", "folder, skip", folder_with(pipe_among_images), None),
    Case("link outside, not skipped", "folder, skip", folder_with(link_outside), "out of the fol"),
    Case("names with escape sequences", "folder", folder_with(names_with_escapes), None),
    Case("names not in UTF-8", "folder", folder_with(names_not_utf8), None),
    Case("loose images with names not in UTF-8", "folder", loose_names_not_utf8, None),
    Case(
        "damaged image whose name has escape sequences",
        "folder",
        folder_with(damaged_image_with_escapes),
        r"a\\x1b\[2J\\rb\\n\.png' is not an image",
    ),
    Case(
        "images of several sizes with a link outside",
        "pictures",
        lambda f: (
            link_outside(folder_with(lambda r, w: None)(f), outside(f))
            or f / "set" / "train" / "class0"
        ),
        "out of",
    ),
    Case("OOD images with a link outside", "ood", folder_with(link_outside), "out"),
    Case("OOD images with a pipe", "ood", folder_with(pipe_among_images), "ord"),
    Case("cifar folder whose pickle runs a command", "cifar", cifar(pickled_command), "damaged"),
    Case("cifar folder of pickles that run commands", "cifar", all_pickled_commands, "damaged"),
    Case(
        "cifar folder with a pipe",
        "cifar",
        cifar(lambda path, where: os.mkfifo(path)),
        "no file of the published",
    ),
    Case(
        "cifar folder with /dev/zero",
        "cifar",
        cifar(lambda path, where: path.symlink_to("/dev/zero")),
        "no file of the published",
    ),
    Case(
        "cifar file that is a link outside",
        "cifar",
        lambda f: external_link("images")(f).rename(f / "cifar10-train.h5").parent,
        "link to another file",
    ),
]

OWN = load_dataset("digits", split="test")


def first_images(name: str, **options: object) -> Callable[[Path], object]:
    """Load the training images of a data set, and read the first batch."""

    def load(path: Path) -> object:
        images = load_dataset(name, path, "train", download=False, progress=False, **options)
        return next(iter(images.batches(8)))

    return load


def pictures(path: Path) -> object:
    return list(load_dataset("pictures", path, "test", progress=False).batches(1))


OPENERS = {
    "folder": first_images("folder", image_size=8),
    "folder, skip": first_images("folder", image_size=8, faults=FaultPolicy(skip=True)),
    "pictures": pictures,
    "ood": lambda path: list(find_set(str(path), OWN, None, 0).images.batches(50)),
    "cifar": first_images("cifar10"),
}
