"""Importing checkpoints of other programs: the outputs are equal, invalid input is refused."""

import itertools
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import ebmkit
from ebmkit import UserError
from ebmkit.cli.tools import import_
from ebmkit.data.sets import CIFAR
from ebmkit.errors import validated
from ebmkit.models import ModelConfig, create_model, load_checkpoint
from ebmkit.models.importing import import_checkpoint

WIDTH, COUNTS, CLASSES = 2, (3, 4, 6, 3), 10
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights, scaled to keep activations near 1; variances of norms are positive."""
    made = {}
    for name, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape) / fan**0.5
        made[name] = value.abs() + 0.5 if "running_var" in name or "bn" in name else value
    return made


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{part}": (channels,) for part in parts} | {f"{name}.num_batches_tracked": ()}


def kuangliu(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """State of the CIFAR ResNet-50 of the robustness package, without prefixes."""
    shapes = {"conv1.weight": (width, 3, 3, 3)} | norm("bn1", width)
    channels = width
    for stage, count in enumerate(COUNTS):
        planes = width * 2**stage
        for i in range(count):
            at = f"layer{stage + 1}.{i}"
            shapes[f"{at}.conv1.weight"] = (planes, channels, 1, 1)
            shapes[f"{at}.conv2.weight"] = (planes, planes, 3, 3)
            shapes[f"{at}.conv3.weight"] = (4 * planes, planes, 1, 1)
            for k, out in ((1, planes), (2, planes), (3, 4 * planes)):
                shapes |= norm(f"{at}.bn{k}", out)
            if i == 0:
                shapes[f"{at}.shortcut.0.weight"] = (4 * planes, channels, 1, 1)
                shapes |= norm(f"{at}.shortcut.1", 4 * planes)
            channels = 4 * planes
    return weights(shapes | {"linear.weight": (CLASSES, channels), "linear.bias": (CLASSES,)})


def resnet_logits(s: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The forward pass of that network in evaluation mode, by its definition."""

    def bn(h, name):
        parts = (s[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(h, *parts, eps=1e-5)

    h = F.relu(bn(F.conv2d((x - MEAN[:, None, None]) / STD[:, None, None], s["conv1.weight"],
                           padding=1), "bn1"))  # fmt: skip
    for stage, count in enumerate(COUNTS):
        for i in range(count):
            at, stride = f"layer{stage + 1}.{i}", 2 if stage and i == 0 else 1
            out = F.relu(bn(F.conv2d(h, s[f"{at}.conv1.weight"]), f"{at}.bn1"))
            out = F.conv2d(out, s[f"{at}.conv2.weight"], stride=stride, padding=1)
            out = bn(F.conv2d(F.relu(bn(out, f"{at}.bn2")), s[f"{at}.conv3.weight"]), f"{at}.bn3")
            if i == 0:
                short = F.conv2d(h, s[f"{at}.shortcut.0.weight"], stride=stride)
                h = bn(short, f"{at}.shortcut.1")
            h = F.relu(out + h)
    return F.linear(F.avg_pool2d(h, 4).flatten(1), s["linear.weight"], s["linear.bias"])


def robust_file(path, state, legacy: bool = True, **more):
    """A file as the trainer of robustness writes it, with an object that only ``dill`` can load."""
    module = types.ModuleType("dill._dill")

    def restored():
        raise AssertionError("called")

    restored.__module__, restored.__qualname__ = "dill._dill", "_create_function"
    module._create_function = restored

    class Pickled:
        def __reduce__(self):
            return restored, ()

    flat = {"module.normalizer.new_mean": MEAN[:, None, None],
            "module.normalizer.new_std": STD[:, None, None]}  # fmt: skip
    flat |= {f"module.model.{name}": value for name, value in state.items()}
    flat |= {f"module.attacker.model.{name}": value for name, value in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "dill", types.ModuleType("dill"))
        patch.setitem(sys.modules, "dill._dill", module)
        content = {"model": flat, "optimizer": {"f": Pickled()}, "epoch": 153, **more}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.fixture
def robust(tmp_path):
    state = kuangliu()
    return state, robust_file(tmp_path / "cifar_l2_0_5.pt", state)


def test_imported_robustness_resnet50_gives_the_same_logits(tmp_path, robust):
    """Float32 rounding in another order: a few units in the last place per layer."""
    state, path = robust
    import_(str(path), out=tmp_path / "run", dataset="cifar10")
    model = ebmkit.load(tmp_path / "run")
    x = torch.rand(3, 3, 32, 32)
    expected = resnet_logits(state, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(model.logits(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.log_density(x), expected.logsumexp(1), rtol=1e-4, atol=1e-4)
    assert model.card.objective == "published: cifar_l2_0_5.pt"
    assert model.card.classifies
    assert model.card.image_size == (32, 32)
    assert tuple(model.card.class_names) == CIFAR["cifar10"].class_names
    assert model.input_mean == pytest.approx(MEAN.tolist())


def test_scores_are_gradients_by_the_unnormalised_image(robust):
    state, path = robust
    model = load_checkpoint(path)
    model._warned = True  # of ReLU and BatchNorm
    x = torch.rand(2, 3, 32, 32)
    copy = x.clone().requires_grad_(True)
    resnet_logits(state, copy)[:, 3].sum().backward()
    expected = copy.grad
    found = model.score(x, c=3)
    error = (found - expected).norm() / expected.norm()  # float32, 50 layers back
    assert error < 1e-3


@pytest.mark.slow
def test_zip_format_and_files_with_one_copy_of_the_weights_are_read(tmp_path, robust):
    state, path = robust
    robust_file(tmp_path / "zip.pt", state, legacy=False)
    x = torch.rand(1, 3, 32, 32)
    expected = load_checkpoint(path).logits(x)
    assert torch.equal(load_checkpoint(tmp_path / "zip.pt").logits(x), expected)
    inner = {f"module.attacker.model.{name}": value for name, value in state.items()}
    inner |= {"module.attacker.normalize.new_mean": MEAN[:, None, None],
              "module.attacker.normalize.new_std": STD[:, None, None]}  # fmt: skip
    torch.save({"state_dict": inner}, tmp_path / "old.pt")
    assert torch.equal(load_checkpoint(tmp_path / "old.pt").logits(x), expected)


def test_other_robustness_networks_are_refused(tmp_path):
    state = kuangliu()
    odd = {name: value for name, value in state.items() if not name.startswith("layer3.5.")}
    with pytest.raises(UserError, match=r"none of ResNet 18, 34, 50.* \(3, 4, 5, 3\) blocks"):
        load_checkpoint(robust_file(tmp_path / "a.pt", odd))
    lacking = {name: value for name, value in state.items() if name != "layer2.1.bn2.weight"}
    with pytest.raises(UserError, match=r"missing: layer2.1.bn2.weight;"):
        load_checkpoint(robust_file(tmp_path / "b.pt", lacking))


def jem(depth: int = 16, k: int = 2) -> dict[str, torch.Tensor]:
    """State of JEM's ``CCF`` without a norm."""
    count, channels, shapes = (depth - 4) // 6, 16, {"f.conv1.weight": (16, 3, 3, 3)}
    shapes["f.conv1.bias"] = (16,)
    for stage, planes in enumerate((16 * k, 32 * k, 64 * k)):
        for i in range(count):
            at = f"f.layer{stage + 1}.{i}"
            for name, inner in (("conv1", channels), ("conv2", planes)):
                shapes[f"{at}.{name}.weight"] = (planes, inner, 3, 3)
                shapes[f"{at}.{name}.bias"] = (planes,)
            if i == 0:
                shapes[f"{at}.shortcut.0.weight"] = (planes, channels, 1, 1)
                shapes[f"{at}.shortcut.0.bias"] = (planes,)
            channels = planes
    shapes |= {"f.linear.weight": (10, channels), "f.linear.bias": (10,)}
    shapes |= {"energy_output.weight": (1, channels), "energy_output.bias": (1,)}
    return weights(shapes | {"class_output.weight": (10, channels), "class_output.bias": (10,)})


def jem_logits(s: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """JEM's forward pass; images in [-1, 1], stride in the second convolution."""

    def conv(h, name, **options):
        return F.conv2d(h, s[f"{name}.weight"], s[f"{name}.bias"], **options)

    h = conv(2 * x - 1, "f.conv1", padding=1)
    for stage in (1, 2, 3):
        i = 0
        while f"f.layer{stage}.{i}.conv1.weight" in s:
            at, stride = f"f.layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = conv(F.leaky_relu(h, 0.2), f"{at}.conv1", padding=1)
            out = conv(F.leaky_relu(out, 0.2), f"{at}.conv2", padding=1, stride=stride)
            h = out + (conv(h, f"{at}.shortcut.0", stride=stride) if i == 0 else h)
            i += 1
    pooled = F.avg_pool2d(F.leaky_relu(h, 0.2), 8).flatten(1)
    return F.linear(pooled, s["class_output.weight"], s["class_output.bias"])


def test_imported_jem_checkpoint_gives_the_same_logits(tmp_path):
    state = jem()
    content = {"model_state_dict": state, "replay_buffer": torch.rand(10, 3, 32, 32)}
    torch.save(content, tmp_path / "CIFAR10_MODEL.pt")
    model = import_checkpoint(tmp_path / "CIFAR10_MODEL.pt", tmp_path / "run")
    x = torch.rand(2, 3, 32, 32)
    expected = jem_logits(state, x)
    assert expected.std() > 0.01
    for found in (model, ebmkit.load(tmp_path / "run")):
        torch.testing.assert_close(found.logits(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.log_density(x), expected.logsumexp(1), rtol=1e-4, atol=1e-4)


def torchvision_state(tmp_path):
    """Save a state dict with torchvision's names; returns its model and the bias of ``fc``."""
    model = create_model("resnet18", num_classes=5, head="logit", width=4).eval()
    names = {"backbone.": "module.", "head.classifier.": "module.fc."}
    state = {}
    for name, value in model.state_dict().items():
        old = next(o for o in names if name.startswith(o))
        state[names[old] + name.removeprefix(old)] = value
    state["module.fc.bias"] = torch.randn(5)
    torch.save(state, tmp_path / "net.pth")
    return model, state["module.fc.bias"]


def test_plain_state_dict_is_imported_with_renamed_parameters(tmp_path):
    model, bias = torchvision_state(tmp_path)
    import_(
        str(tmp_path / "net.pth"),
        out=tmp_path / "run",
        backbone="resnet18",
        rename=["module.=", "fc.=head.classifier."],
        mean="0.5,0.4,0.3",
        std="0.2",
        image_size=16,
        set_=["model.backbone.width=4"],
    )
    x = torch.rand(2, 3, 16, 16)
    loaded = ebmkit.load(tmp_path / "run")
    normalised = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2
    torch.testing.assert_close(loaded.logits(x), model.logits(normalised) + bias)
    assert loaded.card.image_size == (16, 16)
    document = json.loads((tmp_path / "run/model.json").read_text())
    assert document["model"]["input_mean"] == [0.5, 0.4, 0.3]


def test_wrong_renaming_error_lists_names_and_suggests_a_map(tmp_path):
    torchvision_state(tmp_path)
    options = {"backbone": "resnet18", "settings": {"backbone": {"width": 4}}}
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "net.pth", **options, rename=[("module.", "net.")])
    message = str(caught.value)
    assert "unknown: net.conv1.weight, net.bn1.weight" in message
    assert "missing: conv1.weight, bn1.weight" in message
    assert message.count("and 94 more") == 2  # of 102 parameters and statistics
    assert "--map 'net.='" in message
    assert "\n" not in message
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "net.pth", **options, rename=[("module.", "")])
    message = str(caught.value)
    assert "unknown: fc.weight, fc.bias; missing: head.classifier.weight" in message
    assert "--map 'fc.=head.classifier.'" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "madry"}, "unknown kind of checkpoint 'madry'"),
        ({"kind": "state"}, "needs --backbone"),
        ({"kind": "jem", "backbone": "resnet18"}, "belong to --as state"),
        ({}, "do not identify the network: set --backbone"),
        ({"backbone": "resnet81"}, "did you mean 'resnet18'"),
        ({"kind": "robustness"}, "has no normalizer.new_mean: give --mean and --std"),
        ({"kind": "jem"}, "'f.layer1.0.conv1.weight' is missing"),
        ({"backbone": "resnet18", "rename": [("module.", ""), ("fc.", "head.classifier.")]},
         r"'conv1.weight' is \(4, 3, 3, 3\) and would be \(64, 3, 3, 3\)"),
        ({"backbone": "resnet18", "classes": 7, "settings": {"backbone": {"width": 4}},
          "rename": [("module.", ""), ("fc.", "head.classifier.")]}, "head.classifier.weight"),
    ],
)  # fmt: skip
def test_invalid_options_are_refused(tmp_path, options, message):
    torchvision_state(tmp_path)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "net.pth", **options)


def test_options_that_contradict_the_weights_are_refused(tmp_path, robust):
    with pytest.raises(UserError, match="has 100 classes and this classifier 10"):
        import_(str(robust[1]), out=tmp_path / "run", dataset="cifar100")
    with pytest.raises(UserError, match="has 10 labels, not 7"):
        import_(str(robust[1]), out=tmp_path / "run", classes=7)
    with pytest.raises(UserError, match="is not of the form OLD=NEW"):
        import_(str(robust[1]), out=tmp_path / "run", rename=["module"])
    with pytest.raises(UserError, match="must be one number or one per channel"):
        import_(str(robust[1]), out=tmp_path / "run", mean="0.5;0.4")
    with pytest.raises(UserError, match="input_mean has 2 numbers and images have 3 channel"):
        import_(str(robust[1]), out=tmp_path / "run", mean="0.5,0.4")
    assert not (tmp_path / "run").exists()


def test_checkpoint_is_downloaded_from_the_hub(monkeypatch, robust):
    import huggingface_hub

    requests = []

    def download(repository, file):
        requests.append((repository, file))
        if file == "absent.pt":
            raise FileNotFoundError("404: there is no such file\nmore")
        return str(robust[1])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = load_checkpoint("madry/robust:cifar/l2.pt")
    assert requests == [("madry/robust", "cifar/l2.pt")]
    assert model.num_classes == 10
    with pytest.raises(UserError, match=r"cannot fetch 'madry/robust:absent.pt' .* no such file$"):
        load_checkpoint("madry/robust:absent.pt")
    with pytest.raises(UserError, match=r"name the file too, as in madry/robust:model.pt"):
        load_checkpoint("madry/robust", "robustness")
    with pytest.raises(UserError, match=r"cannot read 'weights/absent.pt': no such file"):
        load_checkpoint("weights/absent.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'ebmkit-vision\[hub\]'"):
        load_checkpoint("madry/robust:l2.pt")


def test_scalar_and_per_channel_normalisation_agree():
    x = torch.rand(2, 3, 8, 8)
    values = {"num_classes": 3, "backbone": {"kind": "resnet", "width": 2}, "input_std": 0.25}
    one = ModelConfig.model_validate({**values, "input_mean": 0.5}).build().eval()
    each = ModelConfig.model_validate({**values, "input_mean": [0.5] * 3}).build().eval()
    each.load_state_dict(one.state_dict())  # the names are the same
    assert torch.equal(each.logits(x), one.logits(x))


def test_import_command_reads_a_diffusers_pipeline(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    import_(str(tmp_path / "pipe"), out=tmp_path / "run", dataset="cifar10")
    model = ebmkit.load(tmp_path / "run")
    u = torch.randn(2, 3, 8, 8)
    y, sigma = model.schedule.to_image_units(u, 300), model.schedule.sigma(300)
    with torch.no_grad():
        expected = network(u, 300).sample
    # float32: converting to image units and back divides and multiplies by sqrt(abar)
    torch.testing.assert_close(model(y, sigma), expected, rtol=1e-3, atol=1e-4)
    assert model.card.dataset == "cifar10"
    with pytest.raises(UserError, match="leave classes out"):
        import_(str(tmp_path / "pipe"), out=tmp_path / "other", classes=10)
    with pytest.raises(UserError, match="is a model's folder already"):
        import_(str(tmp_path / "run"), out=tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is no diffusers pipeline"):
        import_(str(tmp_path / "empty"), out=tmp_path / "other")
    with pytest.raises(UserError, match="is a folder: name the file"):
        import_(str(tmp_path / "empty"), out=tmp_path / "other", kind="jem")


@pytest.mark.parametrize("std", [0.0, -1.0, [0.2, 0.0, 0.2]])
def test_input_std_of_zero_or_below_is_refused(std):
    with pytest.raises(UserError, match=r"input_std = .* is not legal: .*above 0"):
        validated(ModelConfig, {"input_std": std}, "model")


def dncnn_state(scale=1.0):
    """A published DnCNN of width 4 without norms, with names as in KAIR's files."""
    channels, state = (1, *(4,) * 16, 1), {}
    for i, (before, after) in enumerate(itertools.pairwise(channels)):
        state[f"model.{2 * i}.weight"] = scale * torch.randn(after, before, 3, 3) / 6
        state[f"model.{2 * i}.bias"] = scale * torch.randn(after)
    return state


@pytest.mark.parametrize(
    ("raw", "mean"), [("params", "params_ema"), ("state_dict", "state_dict_ema")]
)
def test_averaged_weights_are_imported_by_default_with_a_warning(tmp_path, raw, mean):
    content, x = {raw: dncnn_state(), mean: dncnn_state(0.1)}, torch.rand(1, 1, 8, 8)
    for name in ("both", raw, mean):
        torch.save(content if name == "both" else {name: content[name]}, tmp_path / name)
    expected = {name: load_checkpoint(tmp_path / name).denoise_blind(x)[0] for name in (raw, mean)}
    with pytest.warns(
        UserWarning, match=f"raw .{raw}. and averaged weights .{mean}.*--no-averaged"
    ):
        found = load_checkpoint(tmp_path / "both")
    assert torch.equal(found.denoise_blind(x)[0], expected[mean])
    found = load_checkpoint(tmp_path / "both", averaged=False)
    assert torch.equal(found.denoise_blind(x)[0], expected[raw])


def test_lightning_prefix_is_removed(tmp_path):
    model, bias = torchvision_state(tmp_path)
    state = torch.load(tmp_path / "net.pth")
    state = {name.replace("module.", "model."): value for name, value in state.items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2"}, tmp_path / "lit.ckpt")
    with pytest.raises(UserError, match="do not identify the network: set --backbone"):
        load_checkpoint(tmp_path / "lit.ckpt")
    options = {"backbone": "resnet18", "settings": {"backbone": {"width": 4}}}
    rename, x = [("fc.", "head.classifier.")], torch.rand(1, 3, 8, 8)
    found = load_checkpoint(tmp_path / "lit.ckpt", **options, rename=rename)
    torch.testing.assert_close(found.logits(x), model.logits(x) + bias)


def test_lightning_module_around_a_denoiser_is_recognised(tmp_path):
    state = dncnn_state()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"model.{n}": v for n, v in state.items()}}, tmp_path / "lit.ckpt")
    x = torch.rand(1, 1, 8, 8)
    plain, lit = (load_checkpoint(tmp_path / name) for name in ("plain.pth", "lit.ckpt"))
    assert torch.equal(plain.denoise_blind(x)[0], lit.denoise_blind(x)[0])
