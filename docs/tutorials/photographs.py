# %% [markdown]
# # 3. Denoise and restore photographs
#
# A denoiser knows what photographs look like. So it also fills holes and sharpens enlarged images, tasks for which it
# was never trained. This notebook trains a small denoiser on patches of two photographs that scikit-learn contains, in
# well under a minute, and uses it on a part of them that it has not seen.

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
# The data set `patches` cuts its training patches from the left part of each photograph. The right fifth, from column
# 512 on, is for tests.

# %%
photographs = [
    torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in load_sample_images().images
]
unseen = [photograph[:, 100:228, 512:640] for photograph in photographs]


def show(images, titles, width=3.0):
    """Colour images (3, H, W) side by side."""
    figure, axes = plt.subplots(1, len(images), figsize=(width * len(images), width + 0.4))
    for cell, image, title in zip(axes, images, titles):
        cell.imshow(image.clamp(0, 1).permute(1, 2, 0))
        cell.set_title(title, fontsize=9)
        cell.axis("off")
    figure.tight_layout()


show([*photographs, *unseen], ["china", "flower", "china, unseen part", "flower, unseen part"])

# %% [markdown]
# ## Train a denoiser
#
# The objective is `dsm` alone: no labels. Noise levels are drawn at random, up to 100/255. The network is *blind*: it
# is not told the level. A network that is differentiated with respect to its input costs about three times as much
# per step as a plain one; this one is small.

# %%
result = ebmkit.train(
    "gradresnet10",
    "patches",
    "dsm",
    width=8,
    image_size=16,
    batch_size=32,
    steps=200,
    progress=False,
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
clean = unseen[1]
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
# ## Fill a hole
#
# Some pixels are missing. We want an image that agrees with the known pixels and that the model finds likely. The
# sampler of Kadkhodaie and Simoncelli walks along the residual of the denoiser, which is $\sigma^2$ times the score,
# and after each step puts the measured values back. It needs only the denoiser and a *linear measurement*.

# %%
from ebmkit.sampling import Chains
from ebmkit.sampling.ascent import StochasticAscentConfig, make_restorer
from ebmkit.sampling.inverse import BlockAverage, random_pixels

picture = unseen[1][:, 40:72, 40:72]


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
# This network trained for seconds on two photographs. Beyond the textures that it knows it is no match for a network
# that trained for days; [DnCNN on Train400](../results/dncnn.md) has measurements.
#
# ## Exercise
#
# 1. Denoise at 50/255 and at 10/255. Where does the mean filter come closest to the model?
# 2. Draw three restorations with other seeds, and average them. Is the PSNR of the mean above or below theirs? Why?
#
# Next: [robust classifiers and guidance](robust-and-guided.md).
