"""Networks of timm as backbones: training, saving, loading and errors, without downloads."""

import json
import re
import sys

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit import UserError, create_model
from ebmkit.errors import validated
from ebmkit.models import JointModel, ModelConfig, TimmConfig
from ebmkit.models.config import find_network
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble

pytest.importorskip("timm")

TINY = {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "patch_size": 1}
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Any download fails."""
    import timm.models._builder as builder

    def refuse(*_arguments, **_options):
        raise OSError("no network")

    monkeypatch.setattr(builder, "load_pretrained", refuse)


def tiny(name="timm:convnext_atto", options=TINY, **more):
    return create_model(name, 3, in_channels=1, options=options, **more)


@pytest.mark.slow
def test_trained_run_loads_bit_identically(tmp_path):
    config = resolve(
        {
            "backbone": "timm:convnext_atto",
            "model": {"backbone": {"options": TINY}},
            "objective": "ce+dsm",
            "steps": 2,
            "device": "cpu",
            "validation_images": 0,
            "optimizer": {"ema": None},
            "dataset": {"limit": 64},
        }
    )
    run = RunFolder.create(tmp_path / "run", config)
    trainer = assemble(config, run)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    model = ebmkit.load(tmp_path / "run")
    assert isinstance(model, JointModel)
    assert model.card.energies == "model"
    y = torch.rand(2, 1, 8, 8)
    trained = trainer.model.eval()
    assert torch.equal(model.score(y), trained.score(y))
    assert torch.equal(model.logits(y), trained.logits(y))
    changed = {n for n, p in trained.named_parameters() if not torch.equal(p, before[n])}
    assert len(changed) == len(before)


@pytest.mark.parametrize(
    ("name", "options"), [("convnext_atto", TINY), ("vit_tiny_patch16_224", VIT)]
)
def test_weight_gradients_of_the_score_match_finite_differences(name, options):
    """Reference: central differences in float64. Fused attention has no second derivative."""
    torch.manual_seed(0)
    model = tiny(f"timm:{name}", options).double()
    y, v = torch.rand(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double()
    weight = next(p for n, p in model.named_parameters() if p.ndim > 1 and "head" not in n)
    along = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad((model.score(y) * v).sum(), weight)
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * along
            ends.append((model.score(y) * v).sum())
            weight -= step * along
    torch.testing.assert_close((gradient * along).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5,
                               atol=1e-9)  # fmt: skip


def test_batch_norm_and_relu_give_warnings():
    model = create_model("timm:resnet10t", 3, in_channels=1)
    with pytest.warns(UserWarning, match="BatchNorm|ReLU") as caught:
        model.eval().score(torch.rand(2, 1, 32, 32))
    assert len(caught) == 2


@pytest.mark.parametrize(
    ("name", "activation"),
    [("mobilenetv3_small_050", "Hardswish|ReLU"), ("mobilenetv2_035", "ReLU6")],
)
def test_other_activations_with_kinks_give_a_warning(name, activation):
    model = create_model(f"timm:{name}", 3, in_channels=1)
    with pytest.warns(UserWarning, match="BatchNorm|derivative") as caught:
        model.eval().score(torch.rand(1, 1, 32, 32))
    assert re.search(f"through ({activation}), whose derivative", str(caught[-1].message))


@pytest.mark.slow
def test_command_line_trains_a_timm_network(tmp_path):
    words = ["--backbone=timm:convnext_atto", "--steps=2", "--device=cpu", "--no-evaluate"]
    words += [f"--set=model.backbone.options={json.dumps(TINY)}", "--set=dataset.limit=64"]
    ended = ebmkit_command("train", *words, "--out=run", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    model = ebmkit.load(tmp_path / "run")
    assert (model.backbone.name, model.card.steps) == ("convnext_atto", 2)


def test_wrong_sizes_and_channels_are_refused():
    with pytest.raises(UserError, match="images of 1 channel"):
        tiny()(torch.rand(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"takes no batch of 2 image\(s\) of 16x16.*img_size"):
        tiny("timm:vit_tiny_patch16_224", VIT)(torch.rand(2, 1, 16, 16))
    with pytest.raises(UserError, match=r"takes no batch of 2 image\(s\) of 2x2"):
        tiny()(torch.rand(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "convnext_attto"}, "has no model 'convnext_attto'"),
        ({"name": "hf-hub:somebody/net"}, "has no model 'hf-hub:"),
        ({"name": "local-dir:/etc"}, "has no model 'local-dir:"),
        ({"name": "convnext_atto", "options": {"depht": 1}}, "timm cannot build convnext_atto"),
    ],
)
def test_unknown_names_and_options_are_refused(settings, message):
    config = ModelConfig(backbone=TimmConfig(**settings))
    with pytest.raises(UserError, match=message) as caught:
        config.build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "num_classes"])
def test_options_that_read_files_are_refused(name):
    with pytest.raises(UserError, match=f"{name} cannot be set here"):
        validated(TimmConfig, {"name": "convnext_atto", "options": {name: "/etc/passwd"}}, "timm")


def test_loading_a_saved_model_downloads_nothing(tmp_path):
    config = ModelConfig(
        backbone=TimmConfig(name="convnext_atto", pretrained=True, options=TINY), in_channels=1
    )
    with pytest.raises(UserError, match=r"timm cannot build convnext_atto.*no network"):
        config.build()
    model = config.without_pretrained().build()
    ebmkit.save_model(tmp_path, model, config, ebmkit.ModelCard(image_size=(8, 8), channels=1))
    y = torch.rand(1, 1, 8, 8)
    assert torch.equal(ebmkit.load(tmp_path).log_density(y), model.eval().log_density(y))


def test_size_scaling_by_windows_is_refused():
    with pytest.raises(UserError, match=r"has no method pool\(maps, grid\)"):
        tiny(image_size=8, size_scaling="windows")


def test_network_names_and_missing_timm(monkeypatch):
    assert find_network("timm:convnext_atto").config == TimmConfig(name="convnext_atto")
    with pytest.raises(UserError, match="timm:NAME"):
        find_network("convnext_atto")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'ebmkit-vision\[timm\]'"):
        tiny()
