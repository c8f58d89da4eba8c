"""Folders of pictures that lead elsewhere, run in circles, or whose names speak to the terminal."""

from __future__ import annotations

import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import torchvision  # noqa: F401  (so that no case pays for importing it)
from ebmkit_tests.hostile.case import Case, outside
from ebmkit_tests.hostile.files_hdf5 import external_link
from ebmkit_tests.hostile.making import GIGAPIXEL, Make, encoded, png
from torchvision.transforms.v2 import functional  # noqa: F401

from ebmkit.data import load_dataset
from ebmkit.data.imagesets import FaultPolicy
from ebmkit.evaluation.ood import find_set


def folder_with(change: Callable[[Path, Path], None], classes: int = 2, count: int = 12) -> Make:
    """A folder of small pictures, two classes of them, changed by ``change(root, outside)``."""

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


def link_to_a_secret(root: Path, where: Path) -> None:
    (where / "theirs.png").write_bytes(encoded("PNG"))
    (root / "train" / "class0" / "x.png").symlink_to(where / "theirs.png")


def link_to_a_file_of_any_kind(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to(where / "secret.txt")


def relative_link_out(root: Path, where: Path) -> None:
    (where / "theirs.png").write_bytes(encoded("PNG"))
    place = root / "train" / "class0"
    (place / "x.png").symlink_to(os.path.relpath(where / "theirs.png", place))


def link_to_a_link(root: Path, where: Path) -> None:
    link_to_a_secret(root, where)
    place = root / "train" / "class0"
    (place / "x.png").rename(place / "hidden")
    (place / "x.png").symlink_to("hidden")


def class_folder_is_a_link(root: Path, where: Path) -> None:
    (where / "theirs").mkdir()
    (root / "train" / "class2").symlink_to(where / "theirs")


def part_is_a_link(root: Path, where: Path) -> None:
    (root / "train").rename(where / "train")
    (root / "train").symlink_to(where / "train")


def class_folder_is_its_parent(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "again").symlink_to(root / "train")


def links_in_a_circle(root: Path, where: Path) -> None:
    place = root / "train" / "class0"
    (place / "x.png").symlink_to("y.png")
    (place / "y.png").symlink_to("x.png")


def honest_links(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to("0.png")
    (root / "train" / "class1" / "y.png").symlink_to(root / "train" / "class0" / "1.png")


def broken_link(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").symlink_to("nothing.png")


def pipe_among_pictures(root: Path, where: Path) -> None:
    os.mkfifo(root / "train" / "class0" / "x.png")


def folder_called_png(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "x.png").mkdir()


def deep_folders(root: Path, where: Path) -> None:
    here = os.open(root / "train" / "class0", os.O_RDONLY)
    for _ in range(500):  # one into the other: their path is longer than the system takes
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)


def bomb_among_pictures(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "5.png").write_bytes(png(10**5, 10**5, GIGAPIXEL))


def large_picture(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "5.png").write_bytes(png(10_000, 10_000, zlib.compress(bytes(9))))


def names_that_speak(root: Path, where: Path) -> None:
    for name in ("\x1b]0;owned\x07", "two\nlines", "\u202egnp.exe", "[red]", "$\\frac{$"):
        for part in ("train", "test"):
            place = root / part / name
            place.mkdir()
            for i in range(4):
                (place / f"{i}\x1b[2J\n.png").write_bytes(encoded("PNG"))


def names_that_are_no_text(root: Path, where: Path) -> None:
    place = os.path.join(os.fsencode(root), b"train", b"\xff\xfe")
    os.mkdir(place)
    Path(os.fsdecode(os.path.join(place, b"\x80.png"))).write_bytes(encoded("PNG"))


def damaged_among_names_that_speak(root: Path, where: Path) -> None:
    (root / "train" / "class0" / "a\x1b[2J\rb\n.png").write_bytes(b"nothing")


def loose_names_that_are_no_text(folder: Path) -> Path:
    """Whether such a file is of the test set hangs on its name's bytes."""
    root = folder / "set"
    root.mkdir()
    for i in range(60):
        name = os.path.join(os.fsencode(root), b"\xff%d.png" % i)
        Path(os.fsdecode(name)).write_bytes(encoded("PNG"))
    return root


def cifar(first: Callable[[Path, Path], None]) -> Make:
    """A folder as torchvision has it, whose first batch is ``first(path, outside)``."""

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


class Runs:
    """A pickle that runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def pickled_command(path: Path, where: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(where / "marker")))


def all_pickled_commands(folder: Path) -> Path:
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        pickled_command(place / name, outside(folder))
    return folder


CASES = [
    Case("link to a picture elsewhere", "folder", folder_with(link_to_a_secret), "out of the fol"),
    Case("link to a file elsewhere", "folder", folder_with(link_to_a_file_of_any_kind), "out of"),
    Case("relative link out", "folder", folder_with(relative_link_out), "link out of the folder"),
    Case("link to a link out", "folder", folder_with(link_to_a_link), "link out of the folder"),
    Case("class folder elsewhere", "folder", folder_with(class_folder_is_a_link), "out of the fol"),
    Case("training set elsewhere", "folder", folder_with(part_is_a_link), "out of the folder"),
    Case("class folder in itself", "folder", folder_with(class_folder_is_its_parent), "lie"),
    Case("links in a circle", "folder", folder_with(links_in_a_circle), "cannot be opened"),
    Case("links inside the folder", "folder", folder_with(honest_links), None),
    Case("link to nothing", "folder", folder_with(broken_link), "there is no file"),
    Case("pipe among pictures", "folder", folder_with(pipe_among_pictures), "not an ordinary file"),
    Case("folder called png", "folder", folder_with(folder_called_png), None),
    Case("folders 500 deep", "folder", folder_with(deep_folders), "more than 64 deep"),
    Case("bomb among pictures", "folder", folder_with(bomb_among_pictures), "89 megapixels"),
    Case("100 megapixels among pictures", "folder", folder_with(large_picture), "89 megapixels"),
    Case("bomb among pictures, left out", "folder, skip", folder_with(bomb_among_pictures), None),
    Case("pipe among pictures, left out", "folder, skip", folder_with(pipe_among_pictures), None),
    Case("link out, not left out", "folder, skip", folder_with(link_to_a_secret), "out of the fol"),
    Case("names that speak to the terminal", "folder", folder_with(names_that_speak), None),
    Case("names that are no text", "folder", folder_with(names_that_are_no_text), None),
    Case("loose names that are no text", "folder", loose_names_that_are_no_text, None),
    Case(
        "damaged picture whose name speaks",
        "folder",
        folder_with(damaged_among_names_that_speak),
        r"a\\x1b\[2J\\rb\\n\.png' is not an image",
    ),
    Case(
        "pictures with a link out",
        "pictures",
        lambda f: (
            link_to_a_secret(folder_with(lambda r, w: None)(f), outside(f))
            or f / "set" / "train" / "class0"
        ),
        "out of",
    ),
    Case("images out of distribution with a link out", "ood", folder_with(link_to_a_secret), "out"),
    Case("images out of distribution with a pipe", "ood", folder_with(pipe_among_pictures), "ord"),
    Case("cifar folder whose pickle runs a command", "cifar", cifar(pickled_command), "damaged"),
    Case("cifar folder of pickles that run commands", "cifar", all_pickled_commands, "damaged"),
    Case(
        "cifar folder with a pipe",
        "cifar",
        cifar(lambda path, where: os.mkfifo(path)),
        "no file of the published",
    ),
    Case(
        "cifar folder with a file that never ends",
        "cifar",
        cifar(lambda path, where: path.symlink_to("/dev/zero")),
        "no file of the published",
    ),
    Case(
        "cifar file that is a link out",
        "cifar",
        lambda f: external_link("images")(f).rename(f / "cifar10-train.h5").parent,
        "link to another file",
    ),
]

OWN = load_dataset("digits", split="test")


def opened(name: str, **options: object) -> Callable[[Path], object]:
    """Loads the training images of a data set, and looks at the first."""

    def load(path: Path) -> object:
        images = load_dataset(name, path, "train", download=False, progress=False, **options)
        return next(iter(images.batches(8)))

    return load


def pictures(path: Path) -> object:
    return list(load_dataset("pictures", path, "test", progress=False).batches(1))


OPENERS = {
    "folder": opened("folder", image_size=8),
    "folder, skip": opened("folder", image_size=8, faults=FaultPolicy(skip=True)),
    "pictures": pictures,
    "ood": lambda path: list(find_set(str(path), OWN, None, 0).images.batches(50)),
    "cifar": opened("cifar10"),
}
