"""Importing diffusion models from folders that diffusers saved."""

import json

import pytest
import torch

import ebmkit
from ebmkit.errors import UserError
from ebmkit.models import import_unet

diffusers = pytest.importorskip("diffusers")

SHAPE = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
ODD = {
    "block_out_channels": (8, 12),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "resnet_time_scale_shift": "scale_shift",
    "out_channels": 6,
}


def unet(**options):
    torch.manual_seed(2)
    return diffusers.UNet2DModel(**{**SHAPE, **options}).eval()


def save_pipeline(network, folder, scheduler=None, safe=True):
    pipeline = diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler())
    pipeline.save_pretrained(folder, safe_serialization=safe)
    return folder


@pytest.mark.parametrize("options", [{}, ODD], ids=["plain", "odd"])
def test_imported_pipeline_predicts_the_same_noise(tmp_path, options):
    """The tolerance covers float32 rounding: u is converted to image units and back."""
    network = unet(**options)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=100)
    import_unet(save_pipeline(network, tmp_path / "theirs", scheduler), tmp_path / "ours")
    model = ebmkit.load(tmp_path / "ours")
    assert len(model.schedule) == 100
    assert model.card.image_size == (8, 8)
    assert model.card.channels == 3
    assert model.card.sigma_range == pytest.approx(model.schedule.sigma_range)
    abar = torch.tensor([model.schedule.abar(t) for t in range(100)])
    torch.testing.assert_close(abar, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    u = torch.randn(2, 3, 8, 8)
    for t in (0, 57, 99):
        y, sigma = model.schedule.to_image_units(u, t), model.schedule.sigma(t)
        with torch.no_grad():
            expected = network(u, t).sample[:, :3]
        torch.testing.assert_close(model(y, sigma), expected, rtol=1e-3, atol=1e-4)


def test_unet_folder_with_and_without_a_scheduler_is_imported(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path / "alone")
    linear = import_unet(tmp_path / "alone", tmp_path / "ours")
    assert torch.equal(linear.schedule.betas, ebmkit.noise.linear_betas())
    diffusers.DDPMScheduler(beta_end=0.01, prediction_type="v_prediction").save_pretrained(
        tmp_path / "alone"
    )
    flat = import_unet(tmp_path / "alone", tmp_path / "flat")
    assert flat.prediction == "v_prediction"
    assert float(flat.schedule.betas[-1]) == pytest.approx(0.01)


def test_weights_of_earlier_diffusers_releases_are_imported(tmp_path):
    """Old files name self-attention differently and are pickles; only tensors are loaded."""
    network = unet()
    save_pipeline(network, tmp_path / "theirs", safe=False)
    path = tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.bin"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = torch.load(path, weights_only=True)
    for now, old in old_names.items():
        state = {name.replace(f".{now}.", f".{old}."): value for name, value in state.items()}
    assert any(".query." in name for name in state)
    torch.save(state, path)
    model = import_unet(tmp_path / "theirs", tmp_path / "ours")
    for name, value in network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)


def test_labels_with_and_without_a_null_label(tmp_path):
    network = unet(num_class_embeds=4)
    network.save_pretrained(tmp_path / "theirs")
    plain = import_unet(tmp_path / "theirs", tmp_path / "four")
    assert plain.num_classes == 4
    y = torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="trained with labels only"):
        plain.score(y, sigma=0.5)
    free = import_unet(tmp_path / "theirs", tmp_path / "three", null_label=True)
    assert free.num_classes == 3
    assert torch.equal(free.score(y, 0.5, 2), plain.score(y, 0.5, 2))
    assert torch.equal(free.score(y, sigma=0.5), plain.score(y, 0.5, 3))
    assert ebmkit.load(tmp_path / "three").num_classes == 3


def test_refused_imports_write_nothing(tmp_path):
    unet().save_pretrained(tmp_path / "theirs")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(UserError, match="exists: choose another"):
        import_unet(tmp_path / "theirs", tmp_path / "full")
    config = tmp_path / "theirs" / "config.json"
    shape = json.loads(config.read_text())
    for change, message in [
        ({"_class_name": "UNet2DConditionModel"}, "of a UNet2DConditionModel: only UNet2DModel"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 channels"),
        ({"time_embedding_type": "fourier"}, "does not take timesteps"),
        ({"colour": 1}, "does not know colour"),
        ({"layers_per_block": 2}, "do not fit config.json"),
    ]:
        config.write_text(json.dumps(shape | change))
        with pytest.raises(UserError, match=message):
            import_unet(tmp_path / "theirs", tmp_path / "ours")
    config.write_text("{")
    with pytest.raises(UserError, match="is damaged: it is not JSON"):
        import_unet(tmp_path / "theirs", tmp_path / "ours")
    config.write_text(json.dumps(shape))
    odd = {"beta_schedule": "scaled_linear"}
    (tmp_path / "theirs" / "scheduler_config.json").write_text(json.dumps(odd))
    with pytest.raises(UserError, match="'scaled_linear' is not known: linear, squaredcos_cap_v2"):
        import_unet(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_folders_and_files_are_named_in_the_error(tmp_path):
    with pytest.raises(UserError, match="a name on the hub is like owner/name"):
        import_unet(tmp_path / "nothing", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no unet/config\.json"):
        import_unet(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        import_unet(tmp_path / "empty", tmp_path / "ours")


def test_pipeline_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    """The request covers both layouts, and no pickle where safetensors exist."""
    import huggingface_hub

    downloads = []

    def fetch(name, allow_patterns):
        downloads.append((name, allow_patterns))
        return str(tmp_path / "theirs")

    save_pipeline(unet(), tmp_path / "theirs")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = import_unet("someone/ddpm", tmp_path / "ours")
    assert model.card.objective == "published: ddpm"
    ((name, patterns),) = downloads
    assert name == "someone/ddpm"
    assert "unet/diffusion_pytorch_model.safetensors" in patterns
    assert not any(pattern.endswith(".bin") for pattern in patterns)

    def fail(name, allow_patterns):
        raise OSError("no route to the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"the download failed: no route to the hub$"):
        import_unet("someone/ddpm", tmp_path / "other")
