"""Images: data sets, augmentation, training streams, and reading and writing image files."""

from ebmkit.data.augment import Augmentation
from ebmkit.data.images import LoadedImage, read_image, write_image
from ebmkit.data.imagesets import (
    AnyImages,
    DatasetRequest,
    FaultPolicy,
    ImageSet,
    Split,
    StreamedSet,
    fingerprint,
)
from ebmkit.data.schedule import Phase, StreamConfig
from ebmkit.data.sets import DATASETS, DatasetEntry, as_images, load_dataset
from ebmkit.data.streams import Batch, Stream
from ebmkit.noise import NoiseLaw

__all__ = [
    "DATASETS",
    "AnyImages",
    "Augmentation",
    "Batch",
    "DatasetEntry",
    "DatasetRequest",
    "FaultPolicy",
    "ImageSet",
    "LoadedImage",
    "NoiseLaw",
    "Phase",
    "Split",
    "Stream",
    "StreamConfig",
    "StreamedSet",
    "as_images",
    "fingerprint",
    "load_dataset",
    "read_image",
    "write_image",
]
