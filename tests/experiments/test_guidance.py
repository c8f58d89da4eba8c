"""The experiment ``guidance``: methods, networks, stored images and report."""

import json
from pathlib import Path

import h5py
import pytest
import torch

from ebmkit.card import ModelCard
from ebmkit.experiments import EXPERIMENTS, SCALES, ExperimentRuns
from ebmkit.experiments.guidance import AMOUNTS, METHODS, NETWORKS, GuidanceMethod, ImageDrawer
from ebmkit.experiments.guidance_report import guidance_text
from ebmkit.guidance import make_guidance
from ebmkit.models import create_denoiser, create_model

NAMES = {row.name for row in NETWORKS}


def test_every_method_has_valid_settings_and_known_networks():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for method in METHODS:
        assert {method.base, method.guide or method.base} <= NAMES
        if method.settings:
            make_guidance(**method.settings)
    for amount in AMOUNTS.values():
        assert set(amount.networks) <= NAMES
        assert set(amount.methods) <= {method.name for method in METHODS}


@pytest.mark.parametrize("scale", SCALES)
def test_every_network_has_a_configuration_at_every_scale(scale):
    runs = ExperimentRuns(Path("out"), SCALES[scale])
    for row in NETWORKS:
        config = runs.config(row)
        assert config.objective == row.layer["objective"], row.name
        if row.name.startswith("robust-0") or row.name == "robust-1":
            assert config.terms.adv.eps == float(row.name.removeprefix("robust-"))


def test_networks_share_no_folder_with_other_experiments():
    """Experiments may share --out, and "joint" of table 1 is another network than the guide."""
    every = [variant for one in EXPERIMENTS.values() for variant in one.variants]
    others = {variant.folder for variant in every if variant.family != "guidance"}
    assert "joint" in others
    assert not others & {row.folder for row in NETWORKS}


def test_scales_are_multiplied_unless_they_are_fixed():
    assert GuidanceMethod("w", "", "g", {"scale": 4.0}).times(5).settings["scale"] == 20
    assert GuidanceMethod("w", "", "g", {"scale": 1.0}, fixed=True).times(5).settings["scale"] == 1
    assert GuidanceMethod("w", "").times(5).settings == {}


@pytest.fixture
def drawer(tmp_path):
    torch.manual_seed(0)
    diffusion = create_denoiser("unet", 1, width=8, multipliers=(1, 1), blocks=1)
    diffusion.card = ModelCard(
        image_size=(8, 8), channels=1, sigma_range=diffusion.schedule.sigma_range
    )
    guide = create_model("gradresnet18", 3, 1, head="logit", image_size=8, width=8)
    models = {"diffusion": diffusion, "guide": guide}
    for model in models.values():
        model.eval().requires_grad_(False)
    return ImageDrawer(tmp_path, models.__getitem__, lambda name: f"{name} 1", 3, 2, 0, None)


GUIDED = GuidanceMethod("guided", "", "guide", {"guidance": "energy", "scale": 4.0, "view": "x_t"})


def test_methods_have_equal_starts_and_scale_0_is_unguided(drawer):
    plain = drawer.draw(GuidanceMethod("unguided", ""), 3)
    zero = GuidanceMethod("zero", "", "guide", GUIDED.settings | {"scale": 0.0})
    assert torch.equal(drawer.draw(zero, 3), plain)
    assert not torch.equal(drawer.draw(GUIDED, 3), plain)
    assert drawer.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_stored_images_are_redrawn_for_other_steps_weights_or_damage(drawer, tmp_path, monkeypatch):
    first = drawer.stored(GUIDED, 2)
    draw, calls = ImageDrawer.draw, []

    def counted(self, *arguments, **named):
        calls.append(arguments)
        return draw(self, *arguments, **named)

    monkeypatch.setattr(ImageDrawer, "draw", counted)
    again = drawer.stored(GUIDED, 2)
    assert not calls
    assert torch.equal(first.images, again.images)
    assert again.seconds == first.seconds
    drawer.stored(GUIDED, 3)
    assert len(calls) == 1
    drawer.digests = lambda name: f"{name} 2"
    drawer.stored(GUIDED, 3)
    assert len(calls) == 2
    (tmp_path / "guided.h5").write_bytes(b"cut short")
    drawer.stored(GUIDED, 3)
    assert len(calls) == 3


def test_images_stored_with_earlier_setting_names_are_read(drawer, tmp_path, monkeypatch):
    first = drawer.stored(GUIDED, 2)
    with h5py.File(tmp_path / "guided.h5", "r+") as file:
        settings = json.loads(file.attrs["settings"])
        own = settings["guidance"]
        own |= {"view": "shrunk", "through": own.pop("backpropagate"), "late": own.pop("start")}
        file.attrs["settings"] = json.dumps(settings)
    monkeypatch.setattr(ImageDrawer, "draw", None)
    assert torch.equal(drawer.stored(GUIDED, 2).images, first.images)


def test_report_without_results_has_its_notes():
    report = {
        "networks": [],
        "grid": None,
        "path": None,
        "ddim": [],
        "ways": [],
        "amount": {},
        "dataset": "digits",
        "about": "a test",
        "notes": ["command: none"],
    }
    assert "command: none" in guidance_text(json.loads(json.dumps(report)))
