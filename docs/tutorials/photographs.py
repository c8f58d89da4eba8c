# %% [markdown]
# # 3. Denoise and restore photographs
#
# A model that knows what photographs look like removes noise from them. It also fills in missing pixels and sharpens
# enlarged images, tasks for which it was never trained. To see how, one does not need a large network: this notebook
# uses a mixture of Gaussians, the model of the first notebook, on patches of 8 x 8 pixels. Its score is exact at every
# noise level.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture as FittedMixture

import ebmkit
from ebmkit.inference import denoise_image
from ebmkit.metrics import psnr

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The photographs
#
# scikit-learn contains two photographs. Learn from the flower and the right half of the pagoda, test on its left half.

# %%
china, flower = (
    torch.from_numpy(p.copy()).permute(2, 0, 1).float().mean(0, keepdim=True) / 255
    for p in load_sample_images().images
)


def show(images, titles, width=3.0):
    """Gray images (1, H, W) side by side."""
    figure, axes = plt.subplots(1, len(images), figsize=(width * len(images), width + 0.4))
    for cell, image, title in zip(axes, images, titles):
        cell.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        cell.set_title(title, fontsize=9)
        cell.axis("off")
    figure.tight_layout()


seen = [china[:, :, 320:], flower]
clean = china[:, 64:160, 80:176]
show([*seen, clean], ["learned from", "learned from", "unseen"])

# %% [markdown]
# ## A model of patches
#
# Cut out all patches, take every ninth, and fit 20 Gaussians. scikit-learn has the algorithm; ebmkit's mixture adds
# the density of *noisy* patches: at noise level $\sigma$ each covariance grows by $\sigma^2$.

# %%
patches = torch.cat([one.unfold(1, 8, 3).unfold(2, 8, 3).reshape(-1, 64) for one in seen])
fitted = FittedMixture(20, reg_covar=1e-5, max_iter=20, tol=0.05, random_state=0).fit(patches)
model = ebmkit.GaussianMixture(
    torch.from_numpy(fitted.means_).float().reshape(-1, 1, 8, 8),
    torch.from_numpy(fitted.covariances_).float(),
    torch.from_numpy(fitted.weights_).float(),
)
print(f"{len(patches):,} patches, {len(fitted.weights_)} Gaussians in 64 dimensions")

# %% [markdown]
# ## Denoise
#
# `denoise_image` takes an image of any size: it adds up the scores of overlapping crops, here of 8 x 8 pixels at every
# position, and takes the step of Tweedie's formula, $y + \sigma^2\,\nabla \log p(y)$.

# %%
sigma = 25 / 255
noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))


def denoise(image, level):
    return denoise_image(model, image, level, tile=8, overlap=7).image


def quality(image):
    return f"{psnr(image[None].clamp(0, 1), clean[None]).item():.1f} dB"


# %% [markdown]
# For comparison a simple method: the mean over a small window, of the best width.

# %%
means = [
    torch.nn.functional.avg_pool2d(noisy[None], k, 1, k // 2, count_include_pad=False)[0]
    for k in (1, 3, 5)
]
best = max(means, key=lambda image: psnr(image[None].clamp(0, 1), clean[None]).item())
denoised = denoise(noisy, sigma)
show(
    [clean, noisy, best, denoised],
    [
        "clean",
        f"noisy, {quality(noisy)}",
        f"mean filter, {quality(best)}",
        f"denoised, {quality(denoised)}",
    ],
)

# %% [markdown]
# ## Fill in missing pixels
#
# Half of the pixels are missing. We want an image that agrees with the known pixels and that the model finds likely. A
# plain method alternates two steps, at noise levels that decrease: denoise, then put the known pixels back. In ebmkit
# the known numbers are a *linear measurement*, an object that can `measure` an image and `impose` measured values.

# %%
from ebmkit.sampling.inverse import BlockAverage, random_pixels


def restore(measurement):
    """Measure the clean image; return the measurement, a simple solution, and ours."""
    measured = measurement.measure(clean[None])
    simple = measurement.baselines(measured)
    name = max(simple, key=lambda one: psnr(simple[one][None], clean[None]).item())
    image = simple[name]
    for level in torch.logspace(-1, -2, 8).tolist():
        image = measurement.impose(denoise(image, level)[None], measured)[0]
    images = clean, measurement.on_gray(measured), simple[name], image
    show(
        images,
        ["original", "measured", f"{name}, {quality(simple[name])}", f"ours, {quality(image)}"],
    )


restore(random_pixels(clean.shape, share=0.5))

# %% [markdown]
# ## Enlarge
#
# Only the measurement changes: now it is the mean of each block of 2 x 2 pixels.

# %%
restore(BlockAverage(clean.shape, factor=2))

# %% [markdown]
# ## With a network
#
# A network sees more than 8 x 8 pixels, and estimates the noise level by itself. `ebmkit models` lists pretrained ones (`ebmkit.load("photos-gray")`),
# [DnCNN on Train400](../results/dncnn.md) measures one, and `ebmkit train --dataset patches` trains a small one in
# minutes. The calls are the same: `denoise_image(model, noisy)`. In a shell, `ebmkit denoise RUN IMAGE` and
# `ebmkit restore RUN IMAGE --task superres` do it; the latter draws samples of all images that agree with the
# measurement, by the stochastic ascent of Kadkhodaie and Simoncelli ([Image restoration](../guide/restore.md)).
#
# ## Exercise
#
# 1. Denoise at 10/255 and at 50/255. Where does the mean filter come closest?
# 2. Fit a single Gaussian in place of 20. How much is lost, and where in the image?
#
# Next: [robust classifiers and guidance](robust-and-guided.md).
