"""Images: data sets, augmentation, noise laws, training streams, and pictures of the user's."""

from ebmkit.data.augment import Augmentation
from ebmkit.data.images import Picture, read_image, write_image
from ebmkit.data.imagesets import ImageSet, Split
from ebmkit.data.schedule import Phase, StreamConfig
from ebmkit.data.sets import DATASETS, DatasetEntry, load_dataset
from ebmkit.data.streamed import AnyImages, StreamedSet
from ebmkit.data.streams import Batch, Stream
from ebmkit.noise import NoiseLaw

__all__ = [
    "DATASETS",
    "AnyImages",
    "Augmentation",
    "Batch",
    "DatasetEntry",
    "ImageSet",
    "NoiseLaw",
    "Phase",
    "Picture",
    "Split",
    "Stream",
    "StreamConfig",
    "StreamedSet",
    "load_dataset",
    "read_image",
    "write_image",
]
