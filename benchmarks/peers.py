"""Denoising score matching and denoising by other libraries, on our network and batch.

No other library is a dependency: each is imported where it is used. The timing covers its loss
class, and its training loop if it has one. With one noise level sigma, all of them minimise

    1/2 mean_images ||grad log p(x + sigma eps) + eps / sigma||^2 = d / (2 sigma^2) * (dsm-mean),

which `check_same` verifies: loss and gradient must be ours times that factor.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ebmkit.bench import (
    OURS,
    PLAIN,
    SIGMA,
    BenchmarkSetting,
    Build,
    Comparison,
    LibraryStep,
    PlainStep,
    Step,
    library_inference,
    make_batch,
    network,
    plain_inference,
    plain_loss,
    timed_terms,
)
from ebmkit.compute import ComputeConfig, set_tf32
from ebmkit.data import Batch
from ebmkit.energy import EnergyModel

TORCHEBM, REGISTRY, DRUNET = "torchebm", "registry's ebmkit", "deepinv DRUNet"
TOLERANCE = 1e-3

Loss = Callable[[Tensor], Tensor]


def installed(name: str) -> bool:
    """Whether the package with import name ``name`` is installed."""
    return importlib.util.find_spec(name) is not None


class Energy(nn.Module):
    """A model as the scalar energy that other libraries train, (B, C, H, W) -> (B,)."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.energy(x)


def torchebm_loss(model: EnergyModel) -> Loss:
    """`torchebm.losses.DenoisingScoreMatching`. Its "score" is grad E = -grad log p, and its target
    is +noise / sigma^2, so the two signs cancel."""
    from torchebm.core import BaseModel
    from torchebm.losses import DenoisingScoreMatching

    class OwnEnergy(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model.energy(x)

    loss: Loss = DenoisingScoreMatching(
        OwnEnergy(), noise_scale=SIGMA, device=next(model.parameters()).device
    )
    return loss


def torchebm_step(model: EnergyModel, x: Tensor) -> Step:
    """The loop of torchebm's documentation: its loss, backward, AdamW with default arguments."""
    model = copy.deepcopy(model).train()
    loss_function = torchebm_loss(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        set_tf32(x.device, "fp32")
        optimizer.zero_grad()
        loss_function(x).backward()
        optimizer.step()

    return step


def registry_loss(model: EnergyModel) -> Loss:
    """`ebm.DenoisingScoreMatching` of the registry's ``ebmkit``."""
    import ebm

    energy, loss = Energy(model), ebm.losses.DenoisingScoreMatching(sigma=SIGMA)
    return lambda x: loss(energy, x).loss


def registry_step(model: EnergyModel, x: Tensor) -> Step:
    """One step of `ebm.Trainer.fit`, with its own optimiser (Adam)."""
    import ebm

    loss = ebm.losses.DenoisingScoreMatching(sigma=SIGMA)
    trainer = ebm.Trainer(Energy(copy.deepcopy(model)), loss, device=x.device)

    def step() -> None:
        set_tf32(x.device, "fp32")
        trainer.fit(itertools.repeat(x), steps=1, verbose=False)  # x itself, not random rows of it

    return step


def check_same(make: Callable[[EnergyModel], Loss], model: EnergyModel, x: Tensor) -> str:
    """Check that another library's loss and gradient are ours times d / (2 sigma^2).

    Both use the same noise.

    Args:
        make: function from a model to the loss of the other library.
        model: network.
        x: clean images (B, C, H, W).

    Returns:
        One line of text with the relative differences.

    Raises:
        RuntimeError: if they differ, because the timings would not be comparable.
    """
    found = []
    factor = x[0].numel() / (2 * SIGMA**2)
    for peer in (True, False):
        own = copy.deepcopy(model).train()
        torch.manual_seed(0)
        if peer:
            loss = make(own)(x)
        else:
            batch = {"denoise": with_noise(x)}
            loss = factor * plain_loss(own, timed_terms("dsm"), batch)
        loss.backward()
        gradients = [p.grad.flatten() for p in own.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    (theirs, their_gradient), (ours, our_gradient) = found
    value = float((theirs - ours).abs() / ours.abs())
    gradient = float((their_gradient - our_gradient).norm() / our_gradient.norm())
    if max(value, gradient) > TOLERANCE:
        raise RuntimeError(
            f"the peer's loss is not ours times d / (2 sigma^2): value off by {value:.1e}, "
            f"gradient by {gradient:.1e}"
        )
    return f"loss is d/(2 sigma^2) x ours, value within {value:.0e}, gradient within {gradient:.0e}"


def with_noise(x: Tensor) -> Batch:
    """Batch of clean images with new noise of level `SIGMA`, as the other libraries draw it."""
    eps = torch.randn_like(x)
    sigma = x.new_full((len(x),), SIGMA)
    return Batch(x, x + SIGMA * eps, sigma, eps, None, None)


def score_matching(
    setting: BenchmarkSetting, device: torch.device, compute: ComputeConfig | None = None
) -> Comparison:
    """DSM step, comparison (b): each candidate gets clean images and draws noise of one level."""
    model = network(setting, 3, device)
    generator = torch.Generator().manual_seed(0)
    x = make_batch(setting.batch, 3, setting.image_size, device, generator).x
    candidates: dict[str, Build] = {
        OURS: lambda: LibraryStep(model, "dsm", lambda: {"denoise": with_noise(x)}, compute),
        PLAIN: lambda: PlainStep(model, "dsm", lambda: {"denoise": with_noise(x)}),
    }
    notes = {OURS: "fixed sigma 25/255, noise drawn in the step"}
    if installed("torchebm"):
        set_tf32(device, "fp32")
        candidates[TORCHEBM] = lambda: torchebm_step(model, x)
        notes[TORCHEBM] = f"{check_same(torchebm_loss, model, x)}; fixed sigma; AdamW"
    if installed("ebm"):
        set_tf32(device, "fp32")
        candidates[REGISTRY] = lambda: registry_step(model, x)
        same = check_same(registry_loss, model, x)
        notes[REGISTRY] = f"{same}; fixed sigma; its Trainer with Adam, loss read each step"
    return Comparison(str(setting), setting.batch, candidates, notes)


def drunet(device: torch.device, y: Tensor) -> Step:
    """deepinv's DRUNet with random weights, under `torch.no_grad`."""
    from deepinv.models import DRUNet

    channels = y.shape[1]
    model = DRUNet(in_channels=channels, out_channels=channels, pretrained=None)
    model = model.to(device).eval().requires_grad_(False)

    def step() -> Tensor:
        set_tf32(device, "fp32")
        with torch.no_grad():
            denoised: Tensor = model(y, SIGMA)
        return denoised

    return step


def denoising(
    setting: BenchmarkSetting,
    device: torch.device,
    compute: ComputeConfig | None = None,
    trained_at: int = 32,
) -> Comparison:
    """Denoising at a given sigma for comparison (c): our network and DRUNet on the same images.

    Args:
        setting: network and sizes.
        device: device of the computation.
        compute: precision of our network.
        trained_at: reference size of our model, pixels. Larger images are measured with the size
            scalings "tiles" (the default; processes every pixel four times) and "factor" (once).
    """
    generator = torch.Generator().manual_seed(0)
    y = make_batch(setting.batch, 3, setting.image_size, device, generator).y
    model = network(setting._replace(image_size=trained_at), 3, device)
    candidates: dict[str, Build] = {}
    notes = {}
    if setting.image_size > trained_at:
        tiled, model = model, copy.deepcopy(model)
        model.size_scaling = "factor"
        candidates[f"{OURS}, tiles"] = lambda: library_inference(tiled, "denoise", y, compute)
        notes[OURS] = 'size_scaling "factor"'
    candidates[OURS] = lambda: library_inference(model, "denoise", y, compute)
    candidates[PLAIN] = lambda: plain_inference(model, "denoise", y)
    if installed("deepinv"):
        candidates[DRUNET] = lambda: drunet(device, y)
        notes[DRUNET] = "random weights, float32"
    return Comparison(str(setting), setting.batch, candidates, notes)
