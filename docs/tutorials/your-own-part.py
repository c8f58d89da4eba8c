# %% [markdown]
# # 5. Your own part
#
# Backbones, heads, objectives, samplers, guides, data sets and evaluations are entries in tables. A *plugin* is a Python
# file that adds entries of its own; then every command and function takes them by name. This notebook writes a plugin
# with a backbone and an objective, trains with both, and loads the run again.

# %%
import matplotlib.pyplot as plt
import torch

import ebmkit

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## A backbone
#
# A backbone maps images (B, C, H, W) to `Features`, a vector (B, K) for each image. It must be smooth, for the model's
# score is its gradient: GELU or SiLU, not ReLU. Its configuration is a pydantic class, so that a run can store it and
# build the network again.
#
# ## An objective
#
# An objective is a function from the model's output and the batch to a loss for each image. This one is the loss of a
# support vector machine: the right logit should exceed all others by 1. The declaration says which batches it needs.
#
# The first line of the next cell writes the cell to a file instead of running it.

# %%
# %%writefile my_parts.py
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import multi_margin_loss

from ebmkit.data import Batch
from ebmkit.models import BACKBONES, BackboneConfig, Features
from ebmkit.objectives import OBJECTIVES, ModelOutput, Objective
from ebmkit.registry import Preset


class ThreeLayers(nn.Module):
    """Three smooth convolutions, and the mean over positions."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.num_features = width
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )

    def forward(self, y: Tensor) -> Features:
        maps = self.layers(y)
        return Features(maps.mean(dim=(2, 3)), (maps,))


class ThreeLayersConfig(BackboneConfig):
    kind: Literal["three-layers"] = "three-layers"
    width: int = Field(32, ge=1, description="channels of every layer")

    def build(self, in_channels: int) -> nn.Module:
        return ThreeLayers(in_channels, self.width)


def margin(output: ModelOutput, batch: Batch) -> Tensor:
    return multi_margin_loss(output.energies.logits, batch.labels, reduction="none")


BACKBONES["three-layers"] = Preset(ThreeLayersConfig(), "three smooth convolutions")
OBJECTIVES["margin"] = Objective(
    "hinge loss of the logits",
    "classify",
    margin,
    family="classification",
    needs_labels=True,
    needs_hard_labels=True,
)

# %% [markdown]
# ## Use it
#
# `load_plugins` imports the file. In a shell, `--plugin my_parts.py` does the same for any command.

# %%
from ebmkit.registry import load_plugins

load_plugins(["my_parts.py"])

result = ebmkit.train(
    "three-layers", "digits", "margin+dsm", width=48, steps=300, out="runs/own", progress=False
)
result

# %% [markdown]
# Head, optimiser, data streams, balance of the two losses and averaging of the weights are those of the recipe. So the
# model does what every model of ebmkit does:

# %%
from ebmkit.data import load_dataset
from ebmkit.metrics import psnr

test = load_dataset("digits", None, "test")
x, c = test.floats(), test.labels
model = result.model
sigma = 50 / 255
y = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    accuracy = (model.logits(x).argmax(1) == c).float().mean()
    clean = model.denoise(y, sigma).clamp(0, 1)
print(
    f"accuracy {accuracy:.1%}; PSNR {psnr(y.clamp(0, 1), x).mean():.1f} dB noisy, {psnr(clean, x).mean():.1f} dB denoised"
)

figure, axes = plt.subplots(3, 8, figsize=(8, 3.3))
for line, images in zip(axes, (x, y, clean)):
    for cell, image in zip(line, images):
        cell.imshow(image.clamp(0, 1)[0], cmap="gray", vmin=0, vmax=1)
        cell.axis("off")

# %% [markdown]
# ## Load it again
#
# The run records name and checksum of its plugins, but never runs them by itself: a folder that you downloaded must not
# run code. So loading asks for the plugin. In a new process, without it:

# %%
import subprocess
import sys

code = "import ebmkit; ebmkit.load('runs/own')"
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
print(done.stderr.strip().splitlines()[-1])

# %%
again = ebmkit.load("runs/own", plugins=["my_parts.py"])
with torch.no_grad():
    print(torch.equal(again.logits(x), model.logits(x)))

# %% [markdown]
# The commands take it too: `ebmkit evaluate runs/own --plugin my_parts.py`, `ebmkit sample runs/own --plugin
# my_parts.py`, and `ebmkit list backbones --plugin my_parts.py` shows the new entry.
#
# [Custom components](../guide/compose.md) lists what else can be added; CONTRIBUTING.md in the repository has a complete
# example for each kind: heads, samplers, guides, data sets, evaluation suites.
#
# ## Exercise
#
# 1. Replace SiLU by ReLU and train again. What happens to the PSNR, and which warning explains it?
# 2. Add a setting `gap` to the objective, the margin that is now 1. (CONTRIBUTING.md, "An objective", has an objective
#    with settings.)
