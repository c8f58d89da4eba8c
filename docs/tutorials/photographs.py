# %% [markdown]
# # 3. Denoise and restore photographs
#
# A denoiser knows what photographs look like. So it also fills in missing pixels and sharpens enlarged images, tasks for
# which it was never trained. This notebook trains a small denoiser on patches of two photographs that scikit-learn
# contains, in less than a minute, and uses it on a part of them that it has not seen.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images

import ebmkit
from ebmkit.inference import denoise_image
from ebmkit.metrics import psnr

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The photographs
#
# Train on the flower and the right half of the pagoda, test on its left half.

# %%
china, flower = (
    torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in load_sample_images().images
)


def show(images, titles, width=3.0):
    """Colour images (3, H, W) side by side."""
    figure, axes = plt.subplots(1, len(images), figsize=(width * len(images), width + 0.4))
    for cell, image, title in zip(axes, images, titles):
        cell.imshow(image.clamp(0, 1).permute(1, 2, 0))
        cell.set_title(title, fontsize=9)
        cell.axis("off")
    figure.tight_layout()


unseen = china[:, 40:168, 64:192]
show([china[:, :, 320:], flower, unseen], ["trained on", "trained on", "unseen"])

# %% [markdown]
# Images to train on may be a tensor, here of overlapping patches of 20 x 20 pixels:

# %%
patches = torch.cat(
    [
        photograph.unfold(1, 20, 10).unfold(2, 20, 10).flatten(1, 2).transpose(0, 1)
        for photograph in (china[:, :, 320:], flower)
    ]
)
print(patches.shape)

# %% [markdown]
# ## Train a denoiser
#
# The model is a plain denoiser: a convolutional network that gives the denoised image, without an energy. By Tweedie's
# formula it has a score all the same, $(D(y) - y) / \sigma^2$. It trains several times faster than a model whose score is
# a gradient, and needs no second derivative.
#
# It is DnCNN, a stack of convolutions, with 6 layers in place of 20. Without additive constants ("bias-free") it
# treats weak and strong noise alike, which helps it with noise levels that it was not trained for. The objective is
# `dsm` alone: no labels. Noise levels are drawn at random, up to 100/255, and the network is *blind*: it is not told
# the level.

# %%
result = ebmkit.train(
    "dncnn20-bias-free",
    patches,
    "dsm",
    recipe="patches",
    width=32,
    batch_size=32,
    steps=250,
    progress=False,
    **{"model.backbone.depth": 6},
)
model = result.model
result

# %% [markdown]
# ## Denoise
#
# `denoise_image` takes an image of any size and processes it in overlapping crops. It estimates the noise level; the
# true one here is 25/255.

# %%
sigma = 25 / 255
generator = torch.Generator().manual_seed(0)
clean = unseen
noisy = clean + sigma * torch.randn(clean.shape, generator=generator)
found = denoise_image(model, noisy)
print(f"estimated noise level: {255 * found.sigma:.1f}/255")


def quality(image, reference):
    return f"{psnr(image[None].clamp(0, 1), reference[None]).item():.1f} dB"


show(
    [clean, noisy, found.image],
    ["clean", f"noisy, {quality(noisy, clean)}", f"denoised, {quality(found.image, clean)}"],
)

# %% [markdown]
# Is that good? A simple method for comparison: the mean over a small window, in the best of several widths.

# %%
best = max(
    (
        torch.nn.functional.avg_pool2d(noisy[None], k, 1, k // 2, count_include_pad=False)[0]
        for k in (1, 3, 5, 7)
    ),
    key=lambda image: psnr(image[None].clamp(0, 1), clean[None]).item(),
)
print("best mean filter:", quality(best, clean), "- the model:", quality(found.image, clean))

# %% [markdown]
# ## Fill in missing pixels
#
# Seven tenths of the pixels are missing. We want an image that agrees with the known pixels and that the model finds likely. The
# sampler of Kadkhodaie and Simoncelli walks along the residual of the denoiser, $D(y) - y$, which is $\sigma^2$ times the
# score, and puts the measured values back at each step. It needs only the denoiser and a *linear measurement*.

# %%
from ebmkit.sampling import Chains
from ebmkit.sampling.ascent import StochasticAscentConfig, make_restorer
from ebmkit.sampling.inverse import BlockAverage, random_pixels

picture = unseen[:, 32:96, 32:96]


def restore(measurement, image):
    measured = measurement.measure(image[None])
    config = StochasticAscentConfig(beta=0.2, steps=100)
    sampler = make_restorer(model, measurement, measured, config)
    generator = torch.Generator().manual_seed(0)
    start = sampler.start((1, *image.shape), generator)
    with torch.no_grad():
        restored = Chains(sampler, sampler.init(start)).run(100, generator).x[0]
    simple = measurement.baselines(measured)
    name, other = max(simple.items(), key=lambda one: psnr(one[1][None], image[None]).item())
    return measurement.on_gray(measured), name, other, restored


seen, name, other, restored = restore(random_pixels(picture.shape, share=0.3), picture)
show(
    [picture, seen, other, restored],
    [
        "original",
        "30 % of the pixels",
        f"{name}, {quality(other, picture)}",
        f"restored, {quality(restored, picture)}",
    ],
)

# %% [markdown]
# ## Enlarge
#
# Only the measurement changes: now it is the mean of each block of 2 x 2 pixels.

# %%
seen, name, other, restored = restore(BlockAverage(picture.shape, factor=2), picture)
show(
    [picture, seen, other, restored],
    [
        "original",
        "half the size",
        f"{name}, {quality(other, picture)}",
        f"restored, {quality(restored, picture)}",
    ],
)

# %% [markdown]
# The restored image is one sample of many that agree with the measurement: its details are likely, not known. In the
# shell, `ebmkit restore RUN IMAGE --task superres` does the same and compares with simple methods
# ([Image restoration](../guide/restore.md)).
#
# This network trained for seconds on two photographs; it is no match for one that trained for days on many.
# `ebmkit models` lists pretrained ones, and [DnCNN on Train400](../results/dncnn.md) has measurements.
#
# ## Exercise
#
# 1. Denoise at 50/255 and at 10/255. Where does the mean filter come closest to the model?
# 2. Draw three restorations with other seeds, and average them. Is the PSNR of the mean above or below theirs? Why?
#
# Next: [robust classifiers and guidance](robust-and-guided.md).
