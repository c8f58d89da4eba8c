"""Arguments of the public methods: converted or refused, the same in every method."""

import numpy as np
import pytest
import torch
from PIL import Image

import ebmkit
from ebmkit import UserError
from ebmkit.inference import denoise_image
from ebmkit.models import create_denoiser

METHODS = {
    "score": lambda m, y: m.score(y),
    "denoise": lambda m, y: m.denoise(y, 0.1),
    "denoise_blind": lambda m, y: m.denoise_blind(y)[0],
    "estimate_sigma": lambda m, y: m.estimate_sigma(y),
    "energy": lambda m, y: m.energy(y),
    "log_density": lambda m, y: m.log_density(y),
    "density_and_score": lambda m, y: m.density_and_score(y)[1],
    "energies": lambda m, y: m.energies(y).logits,
    "logits": lambda m, y: m.logits(y),
    "log_joint": lambda m, y: m.log_joint(y),
    "label_score": lambda m, y: m.label_score(y, 1),
    "optimized": lambda m, y: ebmkit.optimize(m).score(y),
}
LEVELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
CHW = torch.from_numpy(LEVELS).movedim(-1, 1)


def inference_tensor():
    with torch.inference_mode():
        return CHW / 255


IMAGES = {
    "uint8": lambda: CHW,
    "float64": lambda: CHW.double() / 255,
    "bfloat16": lambda: CHW.bfloat16() / 255,
    "numpy levels (B, H, W, C)": lambda: LEVELS,
    "numpy levels (B, C, H, W)": lambda: CHW.numpy(),
    "numpy float64": lambda: LEVELS / 255,
    "inference mode": inference_tensor,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ebmkit.create_model("gradresnet10", num_classes=3, in_channels=3, width=8)
    model.card = ebmkit.ModelCard(
        class_names=["cat", "dog", "eel"], classifies=True, sigma_range=(0.0, 0.4)
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_other_types_give_the_values_of_float_tensors(model, method, kind):
    expected = METHODS[method](model, CHW / 255)
    found = METHODS[method](model, IMAGES[kind]()).float()
    error = 0.02 if kind == "bfloat16" else 1e-4  # of 8 bits of mantissa, and of rounding
    assert (found - expected).norm() <= error * expected.norm()


def test_pil_images_and_single_arrays_are_batches_of_one(model):
    expected = model.logits(CHW[:1])
    for one in (Image.fromarray(LEVELS[0]), LEVELS[0], CHW[0].numpy()):
        torch.testing.assert_close(model.logits(one), expected)
    gray = Image.fromarray(LEVELS[0, :, :, 0], mode="L")
    torch.testing.assert_close(model.logits(gray), model.logits(CHW[:1, :1].expand(-1, 3, -1, -1)))
    deep = LEVELS[0].astype(np.uint16) * 257
    torch.testing.assert_close(model.logits(deep), expected)


GRAY = Image.fromarray(LEVELS[0, :, :, 0])
COLOUR = Image.fromarray(LEVELS[0])
PICTURES = {
    "L": GRAY, "LA": GRAY.convert("LA"), "1": GRAY.convert("1"), "RGB": COLOUR,
    "RGBA": COLOUR.convert("RGBA"), "P": COLOUR.quantize(), "CMYK": COLOUR.convert("CMYK"),
    "I;16": Image.fromarray(LEVELS[0, :, :, 0].astype(np.uint16) * 257),
    "I;16B": Image.frombytes("I;16B", (8, 8), (LEVELS[0, :, :, 0].astype(">u2") * 257).tobytes()),
    "bool array": LEVELS[0, :, :, 0] > 99, "uint16 array": LEVELS[0].astype(np.uint16) * 257,
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_the_same_to_a_model_and_to_training(kind):
    """Opaque alpha, palettes and 16 bits; independently, Pillow's conversion to RGB."""
    picture = PICTURES[kind]
    expected = ebmkit.data.as_images([picture, picture]).images[:1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(ebmkit.inputs.image_batch(picture, 3), expected / 255)
    if isinstance(picture, Image.Image) and not kind.startswith("I"):
        levels = torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)[None]
        assert torch.equal(expected, levels)


def test_pictures_in_colour_without_a_pixel_in_colour_fit_a_gray_model():
    gray = ebmkit.inputs.image_batch(GRAY, 1)
    assert torch.equal(ebmkit.inputs.image_batch(GRAY.convert("RGBA"), 1), gray)


def test_denoise_image_takes_arrays(model):
    expected = denoise_image(model, CHW[0] / 255, 0.1).image
    for one in (CHW[0], LEVELS[0], Image.fromarray(LEVELS[0])):
        torch.testing.assert_close(denoise_image(model, one, 0.1).image, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([1, 2], "not list"),
        ("photo.png", "not str"),
        (CHW.long(), "not torch.int64"),
        (LEVELS.astype(np.int64), "not int64"),
        (LEVELS.astype(np.float64), "levels of 8 bits.*divide it by 255"),
        (CHW[0] / 255, r"not \(3, 8, 8\): a batch of one is y\[None\]"),
        (CHW.movedim(1, -1) / 255, r"3 channel.s., not 8: move the channels by y.movedim"),
        (Image.new("RGBA", (8, 8)), "the image is partly transparent: flatten it"),
        (Image.new("I", (8, 8)), "32 bits per pixel: convert it"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_other_images_are_refused_in_one_sentence(model, method, images, message):
    with pytest.raises(UserError, match=message):
        METHODS[method](model, images)


@pytest.mark.parametrize("images", [CHW, LEVELS])
def test_forward_converts_nothing_and_names_what_does(model, images):
    with pytest.raises(UserError, match=r"forward takes a tensor of floats.*logits, score"):
        model(images)


# --- noise levels --------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [25, 25.0, np.int64(25), np.float32(25), "25"])
@pytest.mark.parametrize("name", ["gradresnet10", "dncnn", "optimized", "image"])
def test_sigma_in_255ths_is_refused_with_the_unit(model, name, sigma):
    y = torch.rand(1, 3, 8, 8)
    if name == "dncnn":
        model = create_denoiser("dncnn", width=4)
        model.card = ebmkit.ModelCard(published_denoiser=True)
    calls = [model.denoise, model.score]
    if name == "optimized":
        calls = [ebmkit.optimize(model).denoise]
    if name == "image":
        calls = [lambda y, sigma: denoise_image(model, y[0], sigma)]
    for call in calls:
        with pytest.raises(UserError, match="did you mean 25/255"):
            call(y, sigma)


@pytest.mark.parametrize("sigma", ["25/255", np.float64(25 / 255), np.full(2, 25 / 255)])
def test_sigma_may_be_text_or_of_numpy(model, sigma):
    y = CHW / 255
    torch.testing.assert_close(model.denoise(y, sigma), model.denoise(y, 25 / 255))


def test_number_of_levels_must_be_one_or_that_of_images(model):
    with pytest.raises(UserError, match="2 images need a number as sigma, or one per image"):
        model.denoise(CHW / 255, torch.full((3,), 0.1))


# --- labels --------------------------------------------------------------------------------------


def test_labels_may_be_class_names(model):
    y = CHW / 255
    assert torch.equal(model.score(y, 0.1, "dog"), model.score(y, 0.1, 1))
    names = model.score(y, 0.1, ["eel", "cat"])
    assert torch.equal(names, model.score(y, 0.1, torch.tensor([2, 0])))
    with pytest.raises(UserError, match="label 'dgo' is unknown: this model knows 0 to 2 or cat"):
        model.score(y, 0.1, "dgo")


def test_all_arguments_may_be_made_in_inference_mode(model):
    with torch.inference_mode():
        y, sigma, c = torch.rand(2, 3, 8, 8), torch.full((2,), 0.1), torch.tensor([0, 2])
        inside = model.denoise(y, sigma, c)
    torch.testing.assert_close(model.denoise(y, sigma, c), inside)


# --- device, precision, transforms ---------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "mps", 0, "cuda:64"])
def test_device_of_load_is_checked(device, tmp_path):
    with pytest.raises(UserError, match="device"):
        ebmkit.load(tmp_path, device=device)


def build(name):
    torch.manual_seed(0)
    if name in ("gradresnet10", "wideresnet10-jem", "mlp-sigma"):
        small = {} if name == "mlp-sigma" else {"width": 8}
        model = ebmkit.create_model(name, num_classes=3, in_channels=3, **small)
    else:
        model = create_denoiser(name, width=8)
    return model.eval().requires_grad_(False)


NAMES = ["gradresnet10", "wideresnet10-jem", "mlp-sigma", "dncnn", "gs-drunet"]


@pytest.mark.filterwarnings("ignore:a score is differentiated through")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_half_precision_denoise_alike(name, dtype):
    """bfloat16 has 8 bits of mantissa: each layer rounds by 0.4 %."""
    model, y = build(name), torch.rand(2, 3, 8, 8)
    expected = model.denoise(y, 0.1) - y
    found = model.to(dtype).denoise(y, 0.1)
    assert found.dtype == torch.float32
    assert (found - y - expected).norm() <= 0.1 * expected.norm() + 0.01 * y.norm()


@pytest.mark.filterwarnings("ignore:a score is differentiated through")
@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_images_gives_the_values_of_the_batch(name):
    model, y = build(name), torch.rand(3, 3, 8, 8)
    found = torch.func.vmap(lambda one: model.denoise(one[None], 0.1)[0])(y)
    torch.testing.assert_close(found, model.denoise(y, 0.1), rtol=1e-4, atol=1e-5)


def test_vmap_over_labels_and_stacks_of_batches(model):
    y, c = torch.rand(2, 3, 8, 8), torch.tensor([0, 2])
    found = torch.func.vmap(lambda one, label: model.score(one[None], 0.1, label[None])[0])(y, c)
    torch.testing.assert_close(found, model.score(y, 0.1, c), rtol=1e-4, atol=1e-4)
    stacked = torch.func.vmap(model.logits)(y[:, None])
    torch.testing.assert_close(stacked[:, 0], model.logits(y))
    with pytest.raises(UserError, match=r"a batch of one is y\[None\]"):
        torch.func.vmap(model.score)(y)
