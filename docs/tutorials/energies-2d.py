# %% [markdown]
# # 1. Energies in two dimensions
#
# An energy-based model is one function of the data. From it follow a density, a classifier, a denoiser and a sampler.
# In two dimensions you can look at all of them, and compare them with the truth. You need PyTorch, and nothing about
# energy-based models. The notebook runs in about a minute on two CPU cores.
#
# Words used below: the *log-density* $\log p(y)$ is high where data are; the *energy* is $-\log p(y)$; the *score* is
# the gradient $\nabla_y \log p(y)$, an arrow at each point that leads towards more data.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import ebmkit

torch.manual_seed(0)
plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## A distribution whose density is known
#
# The data are points of two classes, each a mixture of two Gaussians. ebmkit treats a point as an "image" of two
# channels and one pixel, so its shape is (2, 1, 1).

# %%
means = torch.tensor([[0.2, 0.25], [0.75, 0.7], [0.25, 0.75], [0.7, 0.2]])
truth = ebmkit.GaussianMixture(
    means[:, :, None, None], torch.tensor([0.004, 0.008, 0.006, 0.003]), labels=[0, 0, 1, 1]
)
x, c = truth.sample(1000, torch.Generator().manual_seed(0))
print(x.shape, c.shape)

# %% [markdown]
# Add Gaussian noise of standard deviation `sigma`. The noisy points $y = x + \sigma\epsilon$ have a density too. It is
# smoother, and it is the one that we learn: a score must be defined everywhere, also where there are no data.

# %%
sigma = 0.1
y = x + sigma * torch.randn_like(x)

axis = torch.linspace(-0.3, 1.3, 65)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2, 1, 1)


def show(axes, model, title):
    """Energy of the model in colours, its score as arrows."""
    with torch.no_grad():
        energy = -model.log_density(grid, sigma).reshape(65, 65)
        score = model.score(grid, sigma).reshape(65, 65, 2)[::6, ::6]
    energy = (energy - energy.min()).clamp(max=10)
    axes.imshow(energy, origin="lower", extent=(-0.3, 1.3) * 2, cmap="viridis_r")
    axes.quiver(axis[::6], axis[::6], score[..., 0], score[..., 1], color="white", scale=250)
    axes.set_title(title)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
left.scatter(*x.flatten(1).T, c=c, cmap="coolwarm", s=5, label="clean")
left.scatter(*y.flatten(1).T, color="gray", s=2, alpha=0.4, label="noisy")
left.set(title="points of two classes", aspect="equal")
left.legend()
show(right, truth, "true energy (yellow: low) and score")
plt.show()

# %% [markdown]
# ## The score denoises
#
# Given a noisy point y, the best guess of the clean one is the mean $E[x \mid y]$. Tweedie's formula says that it takes
# one step along the score:
#
# $$E[x \mid y] = y + \sigma^2\, \nabla_y \log p(y).$$
#
# The mixture computes the mean directly, without any gradient. Both agree up to rounding:

# %%
by_score = y + sigma**2 * truth.score(y, sigma)
directly = truth.posterior_mean(y, sigma)
print("largest difference:", float((by_score - directly).abs().max()))

for name, points in (("noisy", y), ("denoised", by_score)):
    error = (points - x).square().sum(dim=(1, 2, 3)).mean().sqrt()
    print(f"root mean square distance to the clean points, {name}: {float(error):.3f}")

# %% [markdown]
# With a label the guess improves: $\nabla_y \log p(y \mid c)$ leads to points of class c only. The difference of the two
# scores is the gradient of the classifier, $\nabla_y \log p(c \mid y)$. So **a classifier is the difference of two
# denoisers**; the whole library rests on this.

# %%
by_label = truth.denoise(y, sigma, c)
difference = (by_label - by_score) / sigma**2
print(torch.allclose(difference, truth.label_score(y, c, sigma), atol=1e-3))

# %% [markdown]
# ## Learn it
#
# Now pretend that only samples are known. The model has two outputs: class logits, and a log-density. A small
# perceptron computes features, and a *head* maps them to both.

# %%
from ebmkit.models import LinearQuadraticHead, MLPConfig

backbone = MLPConfig(kernel=1, width=64).build(in_channels=2)
head = LinearQuadraticHead(backbone.num_features, num_classes=2, bias=True)
nn.init.normal_(head.density.weight, std=0.01)
nn.init.constant_(head.density.bias, 4.0)  # log p = -u^2 / 2 with u well above 0 at first
model = ebmkit.JointModel(backbone, head, input_mean=0.5, input_std=0.25)
print(model)

# %% [markdown]
# The loss has two parts, and neither needs the normalising constant of the density:
#
# - **ce**: cross-entropy of the logits.
# - **dsm**, denoising score matching: the score times sigma should predict minus the noise,
#   $\|\sigma s(y) + \epsilon\|^2$. By Tweedie's formula this is the squared error of the denoiser, divided by
#   $\sigma^2$.
#
# The score is a gradient with respect to the input; `loss.backward()` then differentiates it once more with respect to
# the weights. ebmkit builds that graph whenever a parameter needs a gradient. The network does not get the noise level as
# an input, because here it is always the same.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
generator = torch.Generator().manual_seed(1)
history = []
for _ in range(800):
    clean, labels = truth.sample(256, generator)
    eps = torch.randn(clean.shape, generator=generator)
    noisy = clean + sigma * eps
    ce = nn.functional.cross_entropy(model.logits(noisy), labels)
    dsm = (sigma * model.score(noisy) + eps).square().mean()
    optimizer.zero_grad()
    (ce + dsm).backward()
    optimizer.step()
    schedule.step()
    history.append((float(ce.detach()), float(dsm.detach())))
model.requires_grad_(False)

figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(history, lw=0.7, label=["ce", "dsm"])
axes.set(xlabel="step", ylabel="loss", ylim=(0, 1.2))
axes.legend()
plt.show()

# %% [markdown]
# `dsm` does not fall to 0: the noise in a point cannot be known exactly. What matters is the distance to the truth:

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
show(left, truth, "true energy and score")
show(right, model, "learned energy and score")

test, labels = truth.sample(2000, torch.Generator().manual_seed(2))
noisy = test + sigma * torch.randn(test.shape, generator=torch.Generator().manual_seed(3))
for name, one in (("truth", truth), ("learned", model)):
    error = (one.denoise(noisy, sigma) - test).square().sum(dim=(1, 2, 3)).mean().sqrt()
    right_class = (one.logits(noisy, sigma).argmax(1) == labels).float().mean()
    print(f"{name}: denoised to a distance of {float(error):.4f}, {float(right_class):.1%} correct")

# %% [markdown]
# ## Sample it
#
# Langevin dynamics follows the score and adds noise at each step, so that its points are distributed as the model's
# density. A sampler of ebmkit is a pure step function, and `Chains` runs many chains at once:

# %%
from ebmkit.sampling import SAMPLERS, Chains

entry = SAMPLERS["mala"]  # Langevin steps that are accepted or rejected, so that they are exact
sampler = entry.build(model, config=entry.config(step_size=0.005))
start = torch.rand(1000, 2, 1, 1)
chains = Chains(sampler, sampler.init(start))
points = chains.run(150, torch.Generator().manual_seed(4)).x

figure, axes = plt.subplots(figsize=(4.5, 4.5))
axes.scatter(*noisy[:1000].flatten(1).T, s=3, color="gray", label="noisy data")
axes.scatter(*points.flatten(1).T, s=3, color="tab:orange", label="samples of the model")
axes.set_aspect("equal")
axes.legend()
plt.show()

# %% [markdown]
# ## Exercise
#
# 1. Train with `dsm` alone: leave `ce` out of the sum. The energy stays about as good. What happens to `logits`?
# 2. Train at `sigma = 0.02`. Where is the learned score wrong, and why are there few training points to correct it?
#    ([Objectives on a 2-D mixture](../concepts/objectives-2d.md) measures eight objectives on these data.)
#
# Next: [train a model of images and look at it](train-and-look.md).
