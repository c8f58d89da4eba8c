"""HDF5 files with false sizes, links to other files, or entries that are not arrays."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from ebmkit_tests.hostile.case import Case, outside
from ebmkit_tests.hostile.making import Make, fifo, link

from ebmkit.data import load_dataset
from ebmkit.evaluation.generation import read_samples
from ebmkit.sampling.entry import ReplayBuffer


def hdf5(fill: Callable[[h5py.File, Path], None], name: str = "set.h5", **options: object) -> Make:
    """A file written by ``fill(file, outside)``."""

    def make(folder: Path) -> Path:
        with h5py.File(folder / name, "w", **options) as file:
            fill(file, outside(folder))
        return folder / name

    return make


def valid(file: h5py.File, count: int = 40) -> None:
    file["images"] = np.zeros((count, 8, 8, 1), np.uint8)


def target(where: Path) -> Path:
    """A data set in the forbidden folder."""
    path = where / "theirs.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            valid(file)
            file["labels"] = np.zeros(40, np.int64)
            file["class_names"] = ["theirs"]
    return path


def external_link(name: str) -> Make:
    def fill(file: h5py.File, where: Path) -> None:
        if name != "images":
            valid(file)
        if name == "class_names":
            file["labels"] = np.zeros(40, np.int64)
        file[name] = h5py.ExternalLink(str(target(where)), f"/{name}")

    return hdf5(fill)


def external_group(file: h5py.File, where: Path) -> None:
    file["train"] = h5py.ExternalLink(str(target(where)), "/")


def external_labels_of_the_test_set(file: h5py.File, where: Path) -> None:
    group = file.create_group("train")
    valid(group)
    group["labels"] = np.zeros(40, np.int64)
    file["test"] = h5py.ExternalLink(str(target(where)), "/")


def soft_link_out(file: h5py.File, where: Path) -> None:
    file["theirs"] = h5py.ExternalLink(str(target(where)), "/images")
    file["images"] = h5py.SoftLink("/theirs")


def soft_link_loop(file: h5py.File, where: Path) -> None:
    file["images"] = h5py.SoftLink("/others")
    file["others"] = h5py.SoftLink("/images")


def external_storage(file: h5py.File, where: Path) -> None:
    raw = where / "secret.txt"
    file.create_dataset("images", (40, 1, 1, 1), np.uint8, external=[(str(raw), 0, 40)])


def virtual(file: h5py.File, where: Path) -> None:
    layout = h5py.VirtualLayout((40, 8, 8, 1), np.uint8)
    layout[:] = h5py.VirtualSource(str(target(where)), "images", (40, 8, 8, 1))
    file.create_virtual_dataset("images", layout)


def virtual_labels(file: h5py.File, where: Path) -> None:
    valid(file)
    layout = h5py.VirtualLayout((40,), np.int64)
    layout[:] = h5py.VirtualSource(str(target(where)), "labels", (40,))
    file.create_virtual_dataset("labels", layout)


def references(file: h5py.File, where: Path) -> None:
    file["other"] = np.zeros(4, np.uint8)
    file.create_dataset("images", (4,), h5py.ref_dtype)[:] = [file["other"].ref] * 4


def region_references(file: h5py.File, where: Path) -> None:
    valid(file)
    rows = file.create_dataset("labels", (40,), h5py.regionref_dtype)
    rows[:] = [file["images"].regionref[:4]] * 40


def petabytes(file: h5py.File, where: Path) -> None:
    file.create_dataset("images", (10**9, 1024, 1024, 1), np.uint8, chunks=(1, 1024, 1024, 1))


def petabytes_contiguous(file: h5py.File, where: Path) -> None:
    file.create_dataset("images", (10**6, 10**6, 1000, 1), np.uint8)


def a_trillion_rows(file: h5py.File, where: Path) -> None:
    file.create_dataset("images", (2**40, 1, 1, 1), np.uint8, chunks=(2**20, 1, 1, 1))


def gigapixels(file: h5py.File, where: Path) -> None:
    images = file.create_dataset(
        "images", (2, 20_000, 20_000, 1), np.uint8, chunks=(1, 5000, 5000, 1), compression="gzip"
    )
    images[0, :5000, :5000] = 1


def huge_chunks(file: h5py.File, where: Path) -> None:
    file.create_dataset(
        "images", (600, 1024, 1024, 1), np.uint8, chunks=(600, 1024, 1024, 1), compression="gzip"
    )


def sparse(file: h5py.File, where: Path) -> None:
    images = file.create_dataset(
        "images", (4000, 1000, 1000, 1), np.uint8, chunks=(1, 1000, 1000, 1), compression="gzip"
    )
    images[0] = 0


def raw_chunk(content: bytes, *filters: str, shape: tuple[int, ...] = (64, 8, 8, 1)) -> Make:
    """One chunk with the bytes ``content``, in an array with a small shape."""

    def fill(file: h5py.File, where: Path) -> None:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk(shape)
        for name in filters:
            if name == "lzf":
                plan.set_filter(32000, h5py.h5z.FLAG_OPTIONAL, ())
            else:
                getattr(plan, f"set_{name}")(*([9] if name == "deflate" else []))
        space = h5py.h5s.create_simple(shape)
        made = h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, plan)
        made.write_direct_chunk((0, 0, 0, 0), content, 0)

    return hdf5(fill)


def zeros_packed(mib: int, times: int = 1) -> bytes:
    """``mib`` MiB of zeros compressed ``times`` times by zlib, made by repeating one block."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (mib * 2**20 % 65521) << 16 | 1
    content = b"\x78\xda" + block * mib + packer.flush() + struct.pack(">I", adler)
    for _ in range(times - 1):
        content = zlib.compress(content, 9)
    return content


def plugin_filter(file: h5py.File, where: Path) -> None:
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((40, 8, 8, 1))
    plan.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (2, 2, 1, 64))  # blosc, an external plugin
    space = h5py.h5s.create_simple((40, 8, 8, 1))
    h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, plan)


def scale_offset(file: h5py.File, where: Path) -> None:
    file.create_dataset("images", data=np.zeros((40, 8, 8, 1), np.uint8), scaleoffset=4)


def compound(file: h5py.File, where: Path) -> None:
    file["images"] = np.zeros((40, 8, 8, 1), np.dtype([("r", "u1"), ("g", "u1")]))


def ragged(file: h5py.File, where: Path) -> None:
    kind = h5py.vlen_dtype(np.dtype("u1"))
    rows = file.create_dataset("images", (4, 1, 1, 1), kind)
    rows[0, 0, 0, 0] = np.zeros(10, np.uint8)


def group_for_images(file: h5py.File, where: Path) -> None:
    file.create_group("images")


def group_for_labels(file: h5py.File, where: Path) -> None:
    valid(file)
    file.create_group("labels")


def hard_link_loop(file: h5py.File, where: Path) -> None:
    file["train"] = file["/"]


def with_labels(values: object, dtype: object = np.int64) -> Make:
    def fill(file: h5py.File, where: Path) -> None:
        valid(file)
        file.create_dataset("labels", data=np.asarray(values), dtype=dtype)

    return hdf5(fill)


def with_names(names: Callable[[h5py.File], None]) -> Make:
    def fill(file: h5py.File, where: Path) -> None:
        valid(file)
        file["labels"] = np.zeros(40, np.int64)
        names(file)

    return hdf5(fill)


def a_million_names(file: h5py.File) -> None:
    file.create_dataset("class_names", data=np.full(10**6, b"x"), compression="gzip")


def a_long_name(file: h5py.File) -> None:
    file.create_dataset("class_names", data=["x" * 10**7], dtype=h5py.string_dtype())


def long_names_that_share_a_heap(file: h5py.File) -> None:
    """All 1000 entries refer to the same text of a megabyte."""
    names = file.create_dataset("class_names", (1000,), h5py.string_dtype(), chunks=(1000,))
    names[0] = "x" * 10**6
    file.flush()
    _, chunk = names.id.read_direct_chunk((0,))
    names.id.write_direct_chunk((0,), chunk[:16] * 1000, 0)


def wide_names(file: h5py.File) -> None:
    file.create_dataset("class_names", (10,), "S100000000", chunks=(1,), compression="gzip")


def names_that_are_numbers(file: h5py.File) -> None:
    file["class_names"] = np.arange(10)


def labels_out_of_range_in_the_test_split(file: h5py.File, where: Path) -> None:
    for part, top in (("train", 1), ("test", 2**31)):
        group = file.create_group(part)
        valid(group)
        group["labels"] = np.full(40, top, np.int64)


def cut_at(share: float) -> Make:
    def make(folder: Path) -> Path:
        path = hdf5(lambda file, where: valid(file, 400))(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        return path

    return make


def holding(content: bytes, name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def samples(fill: Callable[[h5py.File], None]) -> Make:
    def write(file: h5py.File, where: Path) -> None:
        valid(file)
        fill(file)

    return hdf5(write)


def many_sources(file: h5py.File) -> None:
    file.attrs.create("source", ["x" * 1000] * 100)


def reference_for_a_source(file: h5py.File) -> None:
    file.attrs.create("source", file["images"].ref, dtype=h5py.ref_dtype)


def finite_is_a_link(file: h5py.File) -> None:
    file.attrs["source"] = "fresh"
    file["finite"] = h5py.SoftLink("/images")


def finite_of_billions(file: h5py.File) -> None:
    file.attrs["source"] = "fresh"
    file.create_dataset("finite", (2**33,), bool, chunks=(2**20,), compression="gzip")


def buffer_of_gigabytes(file: h5py.File, where: Path) -> None:
    file.create_dataset(
        "images", (2**16, 3, 64, 64), np.float32, chunks=(8, 3, 64, 64), compression="gzip"
    )


CASES = [
    Case("hdf5 images in another file by a link", "hdf5", external_link("images"), "link to an"),
    Case("hdf5 labels in another file by a link", "hdf5", external_link("labels"), "link to an"),
    Case("hdf5 names in another file by a link", "hdf5", external_link("class_names"), "link to"),
    Case("hdf5 training set in another file", "hdf5", hdf5(external_group), "link to another file"),
    Case(
        "hdf5 labels of the test set in another file",
        "hdf5",
        hdf5(external_labels_of_the_test_set),
        "link to another file",
    ),
    Case("hdf5 soft link to an external one", "hdf5", hdf5(soft_link_out), "link to another place"),
    Case("hdf5 soft links in a circle", "hdf5", hdf5(soft_link_loop), "link to another place"),
    Case("hdf5 raw data in another file", "hdf5", hdf5(external_storage), "lie in other files"),
    Case("hdf5 virtual images", "hdf5", hdf5(virtual), "lie in other files"),
    Case("hdf5 virtual labels", "hdf5", hdf5(virtual_labels), "lie in other files"),
    Case("hdf5 object references", "hdf5", hdf5(references), "not numbers or text"),
    Case("hdf5 region references", "hdf5", hdf5(region_references), "not numbers or text"),
    Case("hdf5 of a petabyte in chunks", "hdf5", hdf5(petabytes), "rows, more than|claims"),
    Case("hdf5 of a petabyte without chunks", "hdf5", hdf5(petabytes_contiguous), "claims"),
    Case("hdf5 of a trillion rows", "hdf5", hdf5(a_trillion_rows), "rows, more than"),
    Case("hdf5 images of gigapixels", "hdf5", hdf5(gigapixels), "claims|megapixels"),
    Case("hdf5 chunk of 600 megabytes", "hdf5", hdf5(huge_chunks), "larger than 64 MiB"),
    Case("hdf5 of four gigabytes without data", "hdf5", hdf5(sparse), "claims"),
    Case(
        "hdf5 small chunk that unpacks to a gigabyte",
        "hdf5",
        raw_chunk(zeros_packed(1024), "deflate"),
        "could unpack to more",
    ),
    Case(
        "hdf5 chunk packed twice, four gigabytes in 12 KB",
        "hdf5",
        raw_chunk(zeros_packed(4096, 2), "deflate", "deflate"),
        "could exhaust the memory",
    ),
    Case(
        "hdf5 chunk packed by gzip and lzf",
        "hdf5",
        raw_chunk(zeros_packed(64), "deflate", "lzf"),
        "could exhaust the memory",
    ),
    Case("hdf5 chunk that is not gzip", "hdf5", raw_chunk(b"x" * 999, "deflate"), "cannot be read"),
    Case("hdf5 chunk that is not lzf", "hdf5", raw_chunk(b"\xff" * 999, "lzf"), "cannot be read"),
    Case("hdf5 chunk that is too short", "hdf5", raw_chunk(zlib.compress(b"xy"), "deflate"), None),
    Case("hdf5 filter of a plugin", "hdf5", hdf5(plugin_filter), "filter 32001"),
    Case("hdf5 scaleoffset filter", "hdf5", hdf5(scale_offset), "filter 6"),
    Case("hdf5 compound type", "hdf5", hdf5(compound), "not numbers or text"),
    Case("hdf5 ragged images", "hdf5", hdf5(ragged), "not numbers or text"),
    Case("hdf5 group called images", "hdf5", hdf5(group_for_images), "is a group"),
    Case("hdf5 group called labels", "hdf5", hdf5(group_for_labels), "is a group"),
    Case("hdf5 group that contains itself", "hdf5", hdf5(hard_link_loop), "has no array"),
    Case("hdf5 label of two billion", "hdf5", with_labels([2 * 10**9] * 40), "out of range"),
    Case("hdf5 label below zero", "hdf5", with_labels([-1] * 40), "out of range"),
    Case(
        "hdf5 label of 2^64 - 1",
        "hdf5",
        with_labels(np.full(40, 2**64 - 1, np.uint64), np.uint64),
        "out of range",
    ),
    Case("hdf5 NaN labels", "hdf5", with_labels([float("nan")] * 40, float), "labels"),
    Case(
        "hdf5 label of two billion in the test split",
        "hdf5",
        hdf5(labels_out_of_range_in_the_test_split),
        "out of range",
    ),
    Case("hdf5 a million class names", "hdf5", with_names(a_million_names), "names of"),
    Case("hdf5 class name of ten megabytes", "hdf5", with_names(a_long_name), "characters"),
    Case(
        "hdf5 thousand names of a megabyte that share a heap",
        "hdf5",
        with_names(long_names_that_share_a_heap),
        "characters",
        mib=50,
    ),
    Case("hdf5 class names of 100 megabytes each", "hdf5", with_names(wide_names), "larger|claims"),
    Case("hdf5 class names that are numbers", "hdf5", with_names(names_that_are_numbers), "text"),
    Case("hdf5 truncated in its header", "hdf5", cut_at(0.01), "cannot be read as an HDF5 file"),
    Case("hdf5 truncated in its images", "hdf5", cut_at(0.6), "cannot be read as an HDF5 file"),
    Case("hdf5 behind a userblock", "hdf5", hdf5(lambda f, w: valid(f), userblock_size=512), None),
    Case("hdf5 that is text", "hdf5", holding(b"images = 5\n" * 99, "set.h5"), "cannot be read"),
    Case("hdf5 that is empty", "hdf5", holding(b"", "set.h5"), "cannot be read"),
    Case("hdf5 that is a pipe", "hdf5", fifo("set.h5"), "not an ordinary file"),
    Case("hdf5 that is /dev/zero", "hdf5", link("set.h5", "/dev/zero"), "not an ordinary file"),
    Case("samples with a list as source", "samples", samples(many_sources), "one number or"),
    Case(
        "samples with a reference as source",
        "samples",
        samples(reference_for_a_source),
        "one number or",
    ),
    Case("samples whose flags are a link", "samples", samples(finite_is_a_link), "link to another"),
    Case("samples with billions of flags", "samples", samples(finite_of_billions), "rows, more"),
    Case("replay buffer of gigabytes", "buffer", hdf5(buffer_of_gigabytes), "claims"),
    Case("replay buffer that is virtual", "buffer", hdf5(virtual), "lie in other files"),
    Case("replay buffer that is a link", "buffer", external_link("images"), "link to another file"),
]

OWN = load_dataset("digits", split="test")


def first_images(path: Path) -> object:
    images = load_dataset("hdf5", path, "train", progress=False)
    return next(iter(images.batches(8)))


OPENERS = {
    "hdf5": first_images,
    "samples": lambda path: read_samples(path, OWN),
    "buffer": lambda path: ReplayBuffer.read_images(path.read_bytes(), "the replay buffer"),
}
