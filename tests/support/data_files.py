"""Files of small data sets in their official layouts."""

import hashlib
import pickle

import h5py
import numpy as np
from PIL import Image

from ebmkit.data import load_dataset
from ebmkit.data.sets import CIFAR

SPLITS = ("train", "validation", "test")


def keys(images):
    """Bytes of each image of a set."""
    return [(x * 255).round().byte().numpy().tobytes() for x, _ in images.batches(1)]


def load_all(name, data_dir=None, **options):
    return [load_dataset(name, data_dir, split, **options) for split in SPLITS]


def write_h5(path, count, seed=0, classes=10, group="", **replaced):
    rng = np.random.default_rng(seed)
    arrays = {
        "images": rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        "labels": np.arange(count) % classes,
    }
    with h5py.File(path, "a") as file:
        for name, values in {**arrays, **replaced}.items():
            if values is not None:
                file[f"{group}/{name}"] = values
    return arrays


def fake_torchvision(root, name, monkeypatch, count=40):
    """Write random images in torchvision's layout, and patch torchvision's checksums."""
    import torchvision

    kind = getattr(torchvision.datasets, CIFAR[name].torchvision_name)
    base = root / CIFAR[name].folder
    base.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    rng = np.random.default_rng(0)

    def dump(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / file).read_bytes()).hexdigest()

    written = {}
    for listed in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(kind, listed):
            data = rng.integers(0, 256, (count, 3072)).astype(np.uint8)
            content = {"data": data, key: list(np.arange(count).tolist())}
            content[key] = [c % len(CIFAR[name].class_names) for c in content[key]]
            entries.append([file, dump(file, content)])
            written[file] = content
        monkeypatch.setattr(kind, listed, entries)
    names = {"label_names": CIFAR[name].class_names, "fine_label_names": CIFAR[name].class_names}
    meta = {**kind.meta, "md5": dump(kind.meta["filename"], names)}
    monkeypatch.setattr(kind, "meta", meta)
    return base, written


def image_folder(root, count=12, size=(8, 8), classes=("ant", "bee"), mode="RGB", seed=0):
    """Write ``count`` random PNG files per class; the first red pixel is the label."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
            pixels[0, 0] = label
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i:03}.png")
    return root
