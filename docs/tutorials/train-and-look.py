# %% [markdown]
# # 2. Train a model and look at it
#
# The first notebook had points in a plane. Here the data are images of handwritten digits, and one network classifies
# them, removes noise from them, and draws new ones. Training takes well under a minute on two CPU cores; nothing is
# downloaded, because scikit-learn contains the digits.

# %%
import matplotlib.pyplot as plt
import torch

import ebmkit

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## Train
#
# Three choices define a run: a network, a data set, and an objective. `gradresnet18` is a residual network with smooth
# activations, since its gradient is used too. `ce+dsm` is the sum that you know from the first notebook:
# cross-entropy and denoising score matching, on separate batches with noise levels of their own. Everything else comes
# from a *recipe* for the data set. `steps=120` is a third of the recipe's, for this page.

# %%
result = ebmkit.train(
    "gradresnet18", "digits", "ce+dsm", steps=120, out="runs/digits", progress=False
)
result

# %% [markdown]
# The shell command for the same run is `ebmkit train --steps 120 --out runs/digits`. It shows a progress bar, evaluates
# the model at the end, and gives the same weights.
#
# ## Learning curves
#
# `result.history` has the rows of the file `metrics.jsonl`. "dsm" is the denoising loss per pixel in units of the
# noise: 1 means that no noise is removed.

# %%
rows = [row for row in result.history if row["kind"] == "train"]
figure, axes = plt.subplots(figsize=(6, 3))
for name in ("ce", "dsm"):
    axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
axes.legend()
plt.show()

# %% [markdown]
# ## Classify
#
# The test images were not used for training. Images are tensors (B, C, H, W) with values in [0, 1].

# %%
from ebmkit.data import load_dataset

test = load_dataset("digits", None, "test")
model = ebmkit.load("runs/digits")
x, c = test.floats(), test.labels
with torch.no_grad():
    correct = model.logits(x).argmax(1) == c
print(
    f"{int(correct.sum())} of {len(x)} test images are classified correctly: {correct.float().mean():.1%}"
)

# %% [markdown]
# The same forward pass gives the log-density, in nats, up to a constant of the model. It is high for images like those
# of the training data. So it tells digits from things that are no digits, which the classifier cannot do: its
# probabilities sum to 1 for any image.

# %%
upside_down, noise = x[:100].flip(2), torch.rand(100, 1, 8, 8)
with torch.no_grad():
    for name, images in (("digits", x[:100]), ("upside down", upside_down), ("noise", noise)):
        energies = model(images)
        confidence = energies.log_posterior().exp().amax(1).mean()
        print(
            f"{name:12} log p(x) = {energies.log_density.mean():8.1f} nats, "
            f"probability of the likeliest class {confidence:.0%}"
        )

# %% [markdown]
# ## Denoise
#
# The denoiser is $D(y) = y + \sigma^2\,\nabla_y \log p(y)$: nothing was added to the network for it. With a label the
# denoiser is that of $p(y \mid c)$.

# %%
sigma = 50 / 255
some = x[:8]
y = some + sigma * torch.randn(some.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    plain, by_label = model.denoise(y, sigma), model.denoise(y, sigma, c[:8])


def show(rows):
    """Rows of images, with a name for each."""
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, 1.1 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for cell, image in zip(line, images):
            cell.imshow(image.clamp(0, 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")


show({"clean": some, "noisy": y, "denoised": plain, "with label": by_label})

# %% [markdown]
# How good is it? PSNR, in decibels, is the usual measure; 3 dB more is half the squared error.

# %%
from ebmkit.metrics import psnr

for name, images in (("noisy", y), ("denoised", plain), ("with label", by_label)):
    print(f"{name:11} {psnr(images.clamp(0, 1), some).mean():.2f} dB")

# %% [markdown]
# The noise level may be left out. The network is *blind*: it was trained on noise of all levels up to 100/255 without
# being told the level, which it knows by the length of its score, about $\sqrt d / \sigma$ for images of d pixels. The
# estimate is rough after so few steps, and on so few pixels:

# %%
with torch.no_grad():
    print("estimated, of 255:", (255 * model.estimate_sigma(y)).round().tolist())

# %% [markdown]
# ## What is in the run folder
#
# A run folder holds all that is needed to use, resume and check a run. `ebmkit.load` reads `model.json` and
# `model.safetensors`, and executes no code.

# %%
from pathlib import Path

for path in sorted(Path("runs/digits").glob("[!.]*")):
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "folder"
    print(f"{path.name:32} {size}")

# %% [markdown]
# In a shell, these commands take the run folder from here:
#
# ```
# ebmkit evaluate runs/digits            # accuracy, denoising, calibration: intervals, JSON, plots
# ebmkit report runs/digits              # everything about the run on one page, report.html
# ebmkit sample runs/digits              # draws digits, into runs/digits/samples
# ebmkit classify runs/digits photo.png  # or denoise, restore
# ebmkit train --resume runs/digits      # continues an interrupted run
# ```
#
# `ebmkit.load("digits-joint")` loads a model of the whole recipe that comes with the package; `ebmkit models` lists all
# of these.
#
# The measurements of `ebmkit evaluate` come with 95 % intervals. On 360 images the accuracy is known to about one per
# cent, whatever its decimals say.

# %%
from ebmkit.evaluation.statistics import accuracy

print(accuracy(correct))

# %% [markdown]
# ## Exercise
#
# 1. Train with `"ce"` alone, and denoise with that model. Why does `ebmkit denoise RUN IMAGE` warn you?
# 2. Train with `steps=360`, the recipe's own length. Which improves more, accuracy or PSNR?
#
# Next: [denoise and restore photographs](photographs.md).
