"""Data and model of a run fit together before it starts."""

import pytest
import torch

from ebmkit import UserError
from ebmkit.data import ImageSet
from ebmkit.training.setup import check_classes, check_test_images


def make(channels=1, names=("cat", "dog"), split="train"):
    images = torch.zeros(4, channels, 8, 8, dtype=torch.uint8)
    labels = torch.arange(4) % 2 if names else None
    return ImageSet(images, labels, names, "pets", split)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"channels": 3}, "the channels 1 and its test images 3"),
        ({"names": ("ant", "cat")}, r"the classes \['cat', 'dog'\] and its test images \['ant'"),
        ({"names": ()}, r"and its test images \[\]: .*--no-evaluate"),
    ],
)
def test_test_images_that_do_not_fit_are_refused(test, message):
    check_test_images(make(), make(split="test"))
    with pytest.raises(UserError, match=message):
        check_test_images(make(), make(**test, split="test"))


def test_classes_that_changed_since_the_start_are_refused():
    check_classes({"card": {"class_names": ["cat", "dog"]}}, make())
    check_classes({}, make())  # a run without a card
    with pytest.raises(UserError, match=r"\['cat', 'dog'\].*started with \['bee', 'cat'\]"):
        check_classes({"card": {"class_names": ["bee", "cat"]}}, make())
