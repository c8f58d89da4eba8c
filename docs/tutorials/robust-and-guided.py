# %% [markdown]
# # 4. Robust classifiers and guidance
#
# The gradient of a classifier with respect to the image says how to change an image so that it is recognised as
# another class. For an ordinary classifier the answer looks like noise: an *adversarial attack*. For a robust
# classifier it looks like the class. That makes robust classifiers useful for something else: to guide a sampler.

# %%
import matplotlib.pyplot as plt
import torch

import ebmkit
from ebmkit.data import load_dataset

plt.rcParams["figure.dpi"] = 80

test = load_dataset("digits", None, "test")
x, c = test.floats()[:100], test.labels[:100]

# %% [markdown]
# ## Two classifiers
#
# `joint` is the model of the second notebook, trained by `ce+dsm`. `robust` is trained by `adv`: at each step the
# images of the batch are first attacked, in a ball of l2 radius 0.5, and the network learns to classify the attacked
# images. A warm-up lets the radius grow from 0.

# %%
joint = ebmkit.train("gradresnet18", "digits", "ce+dsm", steps=120, progress=False).model

attack = {"eps": 0.5, "steps": 3, "warmup_steps": 100}
robust = ebmkit.train(
    "gradresnet18",
    "digits",
    "adv",
    recipe="digits-robust",
    steps=350,
    terms={"adv": attack},
    progress=False,
).model

# %% [markdown]
# ## Attack them
#
# Projected gradient descent: follow the gradient of $-\log p(c \mid y)$ away from the true class, and stay within
# epsilon of the clean image.

# %%
from ebmkit.attacks import projected_gradient_descent


def accuracy_under_attack(model, epsilon):
    def away(y):
        return -model.label_score(y, c)

    with torch.no_grad():
        y = x
        if epsilon:
            y = projected_gradient_descent(
                away, x, epsilon, "l2", steps=10, step_size=2.5 * epsilon / 10
            )
        return float((model.logits(y).argmax(1) == c).float().mean())


radii = (0.0, 0.25, 0.5, 1.0)
for name, model in (("joint", joint), ("robust", robust)):
    print(f"{name:7}", *(f"l2 {r}: {accuracy_under_attack(model, r):4.0%}  " for r in radii))

# %% [markdown]
# The accuracies are of 100 images, with ten attack steps from one start; a stronger attack finds a few more. The suite
# for a serious evaluation is `ebmkit evaluate RUN --suite robustness`.
#
# ## Look at the gradients
#
# For a joint model the gradient of the classifier is a difference of denoisers, $D_c(y) - D_u(y) = \sigma^2\,\nabla_y
# \log p(c \mid y)$: "what would you remove if you knew that this is a 3?" minus "what would you remove?".

# %%
sigma, target = 25 / 255, 3
with torch.no_grad():
    difference = joint.denoise(x, sigma, target) - joint.denoise(x, sigma)
    gradient = joint.label_score(x, target)
print("equal up to rounding:", torch.allclose(difference, sigma**2 * gradient, atol=1e-5))

# %% [markdown]
# Gray is 0, white says "brighter". Each image is scaled by its largest entry. The rows ask both models how to turn these
# digits into a 3.


# %%
def show(rows, scaled=()):
    """Rows of images; those named in `scaled` are gradients."""
    figure, axes = plt.subplots(len(rows), 8, figsize=(8, 1.1 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items()):
        for cell, image in zip(line, images):
            if name in scaled:
                image = 0.5 + 0.5 * image / image.abs().max()
            cell.imshow(image.clamp(0, 1).permute(1, 2, 0), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")


some = x[c != target][:8]
with torch.no_grad():
    by_joint, by_robust = (model.label_score(some, target) for model in (joint, robust))
show({"image": some, "joint": by_joint, "robust": by_robust}, scaled=("joint", "robust"))

# %% [markdown]
# Now take many steps along these gradients, with a large radius. The sampler `ascent` does that: projected gradient
# ascent of $\log p(c \mid y)$.


# %%
def towards(model, images, label, epsilon=2.5):
    def gradient(y):
        return model.label_score(y, label)

    with torch.no_grad():
        return projected_gradient_descent(gradient, images, epsilon, "l2", steps=30, step_size=0.2)


show({"image": some, "joint": towards(joint, some, 3), "robust": towards(robust, some, 3)})

# %% [markdown]
# ## Guide a sampler
#
# A sampler that goes down in noise needs a score at each step. To draw images of a class, add the gradient of a
# classifier to it, times a scale λ and a weight w of the noise level:
#
# $$s(y) + \lambda\,w(\sigma)\,\nabla_y \log p(c \mid y).$$
#
# The base is the joint model *without* its labels. It starts from the Gaussian of all digits, so that the class can only
# come from the guide. `guided_model` returns a model like any other, which every sampler takes.

# %%
from ebmkit.guidance import GuidanceConfig, guided_model
from ebmkit.sampling import SAMPLERS, Chains

entry = SAMPLERS["ddim"]
wanted = torch.arange(10).repeat_interleave(8)


def sample(scale):
    guided = guided_model(joint, robust, GuidanceConfig(guidance="classifier", scale=scale))
    config = entry.config(steps=100)
    sampler = entry.build(guided, wanted, config)
    generator = torch.Generator().manual_seed(0)
    shape = (len(wanted), 1, 8, 8)
    start = entry.start(joint, sampler, config, shape, generator)  # no labels here
    with torch.no_grad():
        end = Chains(sampler, sampler.init(start)).run(sampler.steps, generator).x
        return entry.finish(guided, sampler, end, wanted)


drawn, shares = {}, {}
for scale in (0, 4, 16, 64):
    drawn[scale] = sample(scale)
    with torch.no_grad():
        right = joint.logits(drawn[scale].clamp(0, 1)).argmax(1) == wanted
    shares[scale] = float(right.float().mean())
    print(f"scale {scale:2}: the joint model recognises the wanted digit in {shares[scale]:.0%}")

# %% [markdown]
# The share is counted with the labels of the joint model, which were not used to draw the images. One row for each
# digit, at the scale with the highest share:

# %%
best = max(shares, key=shares.get)
show({f"{digit}": drawn[best][wanted == digit] for digit in range(10)})

# %% [markdown]
# A larger scale gives more recognisable and less varied images, up to a point: far too large a scale leaves the images
# that the base knows.
# [Guided sampling](../guide/guided-sampling.md) has the other guides, schedules of the scale, and diffusion models as a
# base.
#
# ## Exercise
#
# 1. Guide with `joint` in place of `robust`. At which scale are as many digits recognised, and how do they look?
# 2. Train `robust` with `eps=1.0`. What happens to its accuracy on clean images, and to its gradients?
#
# Next: [your own part](your-own-part.md).
