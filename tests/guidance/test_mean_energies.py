"""Mean energies of the images of each label: values, storage and errors."""

import pytest
import torch
from ebmkit_tests.support.guidance_world import generator, image_mixture

from ebmkit import GaussianMixture, UserError
from ebmkit.guidance import class_energies, guided_model, make_guidance, stored_energies


class Images:
    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def batches(self, size):
        for at in range(0, len(self), size):
            part = slice(at, at + size)
            yield self.x[part], None if self.labels is None else self.labels[part]


def test_mean_energies_match_the_images_of_each_label():
    model = image_mixture(dtype=torch.float64)
    x, labels = model.sample(100, generator())
    progress = []
    found = class_energies(model, Images(x, labels), lambda *p: progress.append(p), batch_size=40)
    for c in range(2):
        own = x[labels == c]
        assert found.energy[c] == pytest.approx(float(-model(own).log_density.mean()))
        assert found.joint[c] == pytest.approx(float(-model(own).log_joint()[:, c].mean()))
        spread = float(model(own).log_density.std(correction=0))
        assert found.energy_std[c] == pytest.approx(spread, rel=1e-6)
    assert sum(found.images) == 100
    assert progress == [(40, 100), (80, 100), (100, 100)]


def test_mean_energy_of_a_gaussian_is_its_entropy():
    """d/2 log(2 pi e v), within 4 standard errors; the variance of the energy is d/2."""
    model = GaussianMixture(torch.zeros(1, 1, 4, 4, dtype=torch.float64), 0.01)
    x, labels = model.sample(2000, generator())
    found = class_energies(model, Images(x, labels))
    theory = 8 * float(torch.log(torch.tensor(2 * torch.pi * torch.e * 0.01)))
    assert abs(found.energy[0] - theory) < 4 * (8 / 2000) ** 0.5


def test_stored_energies_are_recomputed_for_other_weights_data_or_damage(tmp_path):
    model = image_mixture(dtype=torch.float64)
    images = Images(*model.sample(20, generator()))
    calls = []

    def compute():
        calls.append(1)
        return class_energies(model, images)

    def stored(data="abc", digest="1"):
        return stored_energies(tmp_path, "digits", data, digest, compute)

    first = stored()
    assert stored().energy == first.energy
    assert len(calls) == 1
    stored(data="xyz")
    stored()
    assert len(calls) == 2
    stored(digest="2")
    stored(digest="2")
    assert len(calls) == 3
    path = tmp_path / "energies" / "digits-abc.json"
    path.write_text(path.read_text()[:50])
    stored(digest="2")
    assert len(calls) == 4


def test_data_without_required_labels_is_refused():
    model = image_mixture()
    x, labels = model.sample(20, generator())
    with pytest.raises(UserError, match="need images with labels"):
        class_energies(model, Images(x, None))
    with pytest.raises(UserError, match=r"labels \[1\] have no image"):
        class_energies(model, Images(x, torch.zeros_like(labels)))
    with pytest.raises(UserError, match="out of range"):
        class_energies(model, Images(x, labels + 5))
    with pytest.raises(UserError, match="give means"):
        guided_model(model, model, make_guidance(guidance="dual"))
