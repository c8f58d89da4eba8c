r"""Search for training recipes: many short joint runs on CIFAR-10, on one GPU.

    python benchmarks/recipe_search.py TRIALS.json --images DIR --out OUT --seconds 300

Training minimises :math:`L_{ce} + \lambda \log \bar L_{dsm}` of a GradResNet. The script needs only
PyTorch, NumPy and Pillow, and contains a minimal implementation of the network, in which a trial
can change anything; `tests/benchmarks` compares it with the library. On CUDA a whole step
(sampling, augmentation, noise, loss, both derivatives, update, averaging) is one captured graph,
and ``--streams`` trials run concurrently in each of ``--workers`` processes.

TRIALS.json is a list of mappings of `Trial` fields. DIR contains ``train_*.webp``, ``test_*.webp``
(strips of 32x32 images) and their ``*_labels.npz``. Each finished trial is a line of
OUT/trials.jsonl: its fields, FLOPs, seconds, accuracy, PSNR and loss curves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Trial:
    """Settings of one run; the defaults are like the library's recipe `cifar10-short` with Muon."""

    name: str = "base"
    seed: int = 0
    steps: int = 1000
    # network
    width: int = 16
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    strides: tuple[int, ...] = (1, 1, 2, 2, 2)
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    norm: str = "group"  # group, scale
    shortcut_norm: bool = True
    rms_classifier: bool = False  # the classifier gets rms-normalised features
    zero_init: bool = False  # initialise the last convolution of each block to 0
    orthogonal_init: bool = False
    whiten: bool = False  # initialise the stem to whitening filters of image patches
    logit_scale: float = 1.0
    channels_per_group: int = 8
    # streams
    classify_batch: int = 128
    denoise_batch: int = 64
    flip: str = "random"  # random, alternating, none
    crop: int = 0
    crop_mode: str = "reflect"
    cutout: int = 0
    mix: float = 0.0  # probability that a batch is mixed
    mix_kind: str = "mixup"  # mixup, cutmix, both
    ce_sigma: float = 20.0
    dsm_sigma: tuple[float, float] = (1.0, 100.0)
    dsm_law: float = 2.0  # sigma = uniform ** dsm_law, within dsm_sigma
    dsm_crop: int = 0
    dsm_until: float = 0.0  # share of the steps with dsm_crop; then full images
    dsm_crop_batch: int = 0
    dsm_after: float = 0.0  # share of the steps before the denoising stream starts
    ce_small: int = 0  # side of classified images in the first share of the steps
    ce_small_until: float = 0.0
    ce_on_denoise: float = 0.0  # weight of cross-entropy on the denoising stream
    stem_by_ce: bool = False  # no gradient of the denoising loss for the stem
    # loss
    balance: float = 2.0
    label_smoothing: float = 0.0
    form: str = "log"  # log: balance * log mean; mean: balance * mean
    # optimiser
    optimizer: str = "muon"
    lr: float = 1e-2
    lr_rest: float = 3e-3
    lr_head: float | None = None
    weight_decay: float = 0.05
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.999
    nesterov: bool = True
    scaling: str = "max"  # max: 0.2 sqrt(max); ratio: sqrt(max(1, rows/columns))
    ns_steps: int = 5
    per_objective: bool = False  # sum of each objective's orthogonalised momentum
    schedule: str = "cosine"
    decay_share: float = 1.0
    warmup: int = 0
    final: float = 0.0
    ema: float = 0.99
    lookahead: int = 0  # interval in steps of averaging with the slow weights; 0: off
    # measurement
    train: int = 0  # images to train on; 0: all
    test: int = 4000
    psnr: int = 1000
    extra: dict[str, Any] = field(default_factory=dict)


# -- layers ---------------------------------------------------------------------------------------


class _InputGradient(torch.autograd.Function):
    """conv^T(g, w), the gradient for the input, with a single-kernel weight gradient."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.stride, ctx.padding = stride, padding
        return _backward(g, x, w, stride, padding, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, w = ctx.saved_tensors
        by_g = F.conv2d(v, w, None, ctx.stride, ctx.padding)
        by_w = _backward(g, v, w, ctx.stride, ctx.padding, (False, True))[1]
        return by_g, by_w, None, None, None


def _backward(
    g: Tensor, x: Tensor, w: Tensor, stride: int, padding: int, mask: tuple[bool, bool]
) -> tuple[Tensor, ...]:
    where = (*mask, False)
    args = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, where)
    return aten.convolution_backward(g, x, w, None, *args)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, w, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        by_x = by_w = None
        if torch.is_grad_enabled():  # for the score, only the gradient of the input is needed
            by_x = _InputGradient.apply(g, w, x.detach(), ctx.stride, ctx.padding)
        else:
            mask = (ctx.needs_input_grad[0], True)
            by_x, by_w = _backward(g, x, w, ctx.stride, ctx.padding, mask)[:2]
        return by_x, by_w, None, None


def conv(x: Tensor, w: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return _Conv.apply(x, w, stride, padding)


class GroupNorm(nn.Module):
    def __init__(self, channels: int, per_group: int, keep_scale: bool) -> None:
        super().__init__()
        self.groups, self.keep_scale = channels // per_group, keep_scale
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x, self.groups, self.weight, None, 1e-5)
        if self.keep_scale:
            variance = x.reshape(len(x), self.groups, -1).var(2, unbiased=False)
            y = y * (variance + 1e-5).sqrt().mean(1).reshape(-1, 1, 1, 1)
        return y


class Conv(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        like = nn.Conv2d(channels, out, kernel, bias=False)
        self.weight = like.weight

    def forward(self, x: Tensor, fixed: bool = False) -> Tensor:
        weight = self.weight.detach() if fixed else self.weight
        return conv(x, weight, self.stride, self.padding)


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, t: Trial) -> None:
        super().__init__()
        keep = t.norm == "scale"
        self.conv1 = Conv(channels, out, 3, stride)
        self.conv2 = Conv(out, out, 3, 1)
        self.project = self.project_norm = None
        if stride != 1 or channels != out:
            self.project = Conv(channels, out, 1, stride)
            if t.shortcut_norm:
                self.project_norm = GroupNorm(out, t.channels_per_group, keep)
        self.norm = GroupNorm(out, t.channels_per_group, keep)
        if t.zero_init:
            nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv2(F.gelu(self.conv1(x)))
        if self.project is not None:
            x = self.project(x)
            if self.project_norm is not None:
                x = self.project_norm(x)
        return self.norm(F.gelu(x + residual))


class Net(nn.Module):
    def __init__(self, t: Trial) -> None:
        super().__init__()
        self.t = t
        widths = [t.width * m for m in t.multipliers]
        self.stem = Conv(3, t.width, 3, t.strides[0])
        self.stages = nn.ModuleList()
        channels = t.width
        for w, count, stride in zip(widths, t.blocks, t.strides[1:], strict=True):
            rows = [Block(channels, w, stride, t)]
            rows += [Block(w, w, 1, t) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(*rows))
            channels = w
        self.side = nn.ModuleList(nn.Linear(w, w // 2, bias=False) for w in widths[:-1])
        features = widths[-1] + sum(w // 2 for w in widths[:-1])
        self.classifier = nn.Linear(features, 10, bias=False)
        self.density = nn.Linear(features, 1, bias=False)
        nn.init.normal_(self.density.weight, std=features**-0.5)
        if t.orthogonal_init:
            for p in self.matrices():
                gain = p.flatten(1).norm() / math.sqrt(min(p.flatten(1).shape))
                nn.init.orthogonal_(p, float(gain.detach()))

    def forward(self, y: Tensor, fixed_stem: bool = False) -> tuple[Tensor, Tensor]:
        h = F.gelu(self.stem(y, fixed_stem))
        pooled = []
        for i, stage in enumerate(self.stages):
            h = stage(h)
            mean = h.mean((2, 3))
            pooled.append(self.side[i](mean) if i < len(self.side) else mean)
        f = torch.cat(pooled, 1)
        seen = f
        if self.t.rms_classifier:
            seen = f * (f.square().mean(1, keepdim=True) + 1e-12).rsqrt()
        return self.t.logit_scale * self.classifier(seen), -0.5 * self.density(f)[:, 0].square()

    def matrices(self) -> list[Tensor]:
        convs = [m.weight for m in self.modules() if isinstance(m, Conv)]
        return convs + [m.weight for m in self.side]


def flops_per_image(net: Net, side: int) -> float:
    """FLOPs of a forward pass (two per multiply-add)."""
    total = 0.0
    with torch.no_grad():
        hooks = []

        def count(module: Conv, args: Any, out: Tensor) -> None:
            nonlocal total
            kernel = module.weight[0].numel()
            total += 2.0 * kernel * out.numel()

        for m in net.modules():
            if isinstance(m, Conv):
                hooks.append(m.register_forward_hook(count))
        device = net.stem.weight.device
        net(torch.zeros(1, 3, side, side, device=device))
        for h in hooks:
            h.remove()
    return total


# -- the optimiser --------------------------------------------------------------------------------


def orthogonalize(stack: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration on matrices (N, rows, columns), to singular values near 1."""
    a, b, c = COEFFICIENTS
    x = stack.bfloat16() if stack.is_cuda else stack
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * (s @ s)) @ x
    return (x.mT if tall else x).to(stack.dtype)


class Updater:
    """Muon for matrices, Adam for the rest; learning rates from a table on the device."""

    def __init__(self, net: Net, t: Trial, rates: Tensor) -> None:
        self.t, self.rates = t, rates
        own = net.matrices() if t.optimizer == "muon" else []
        ids = {id(p) for p in own}
        heads = {id(net.classifier.weight), id(net.density.weight)}
        self.rest = [p for p in net.parameters() if id(p) not in ids]
        self.rest_scale = [
            (t.lr_head or t.lr_rest) / t.lr if id(p) in heads else t.lr_rest / t.lr
            for p in self.rest
        ]
        if t.optimizer == "adamw":
            self.rest_scale = [1.0] * len(self.rest)
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in own:
            shapes.setdefault(tuple(p.flatten(1).shape), []).append(p)
        self.groups = list(shapes.values())
        self.parameters = [p for group in self.groups for p in group] + self.rest
        self.count = len(self.parameters) - len(self.rest)
        self.moments = [
            [torch.zeros_like(p) for p in self.parameters[: self.count]]
            for _ in range(2 if t.per_objective else 1)
        ]
        self.flat = torch.cat([p.detach().flatten() for p in self.rest])
        self.views = [
            v.reshape(p.shape)
            for v, p in zip(self.flat.split([p.numel() for p in self.rest]), self.rest, strict=True)
        ]
        scale = [
            torch.full((p.numel(),), k) for p, k in zip(self.rest, self.rest_scale, strict=True)
        ]
        self.rest_scale = torch.cat(scale).to(rates.device)
        self.first, self.second = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.average = [p.detach().clone() for p in self.parameters]
        self.slow = [p.detach().clone() for p in self.parameters] if t.lookahead else []
        self.step_number = torch.zeros((), dtype=torch.long, device=rates.device)

    def state(self) -> list[Tensor]:
        moments = [m for own in self.moments for m in own]
        state = [*self.parameters, *moments, *self.average, *self.slow, self.step_number]
        return [*state, self.flat, self.first, self.second]

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor], apart: list[list[Tensor]] | None = None) -> None:
        """Update by ``gradients``, the sum of each objective's gradients ``apart``, if given."""
        t = self.t
        rate = self.rates.index_select(0, self.step_number[None])[0]
        number = (self.step_number + 1).float()
        n = self.count
        if n:
            for own, moment in zip(apart or [gradients], self.moments, strict=True):
                torch._foreach_lerp_(moment, own[:n], 1 - t.momentum)
            i = 0
            for group in self.groups:
                rows, columns = group[0].flatten(1).shape
                u = torch.zeros(())
                for own, moment in zip(apart or [gradients], self.moments, strict=True):
                    parts = []
                    for k in range(i, i + len(group)):
                        g, m = own[k], moment[k]
                        parts.append(torch.lerp(g, m, t.momentum) if t.nesterov else m)
                    stack = torch.stack([p.reshape(rows, columns) for p in parts])
                    u = u.to(stack.device) + orthogonalize(stack, t.ns_steps)
                i += len(group)
                if t.scaling == "max":
                    u = u * (0.2 * math.sqrt(max(rows, columns)))
                else:
                    u = u * math.sqrt(max(1.0, rows / columns))
                for p, own in zip(group, u, strict=True):
                    if t.weight_decay:
                        p.mul_(1 - rate * t.weight_decay)
                    p.sub_(rate * own.reshape(p.shape))
        g = torch.cat([own.flatten() for own in gradients[n:]])
        self.first.lerp_(g, 1 - t.beta1)
        self.second.lerp_(g * g, 1 - t.beta2)
        first, second = self.first / (1 - t.beta1**number), self.second / (1 - t.beta2**number)
        own = rate * self.rest_scale
        self.flat.mul_(1 - own * t.weight_decay).sub_(own * first / (second.sqrt() + 1e-8))
        torch._foreach_copy_(self.rest, self.views)
        if t.lookahead:
            now = (self.step_number + 1) % t.lookahead == 0
            for p, slow in zip(self.parameters, self.slow, strict=True):
                middle = torch.lerp(slow, p, 0.5)
                slow.copy_(torch.where(now, middle, slow))
                p.copy_(torch.where(now, middle, p))
            self.flat.copy_(torch.cat([p.flatten() for p in self.rest]))
        if t.ema:
            keep = torch.minimum(torch.full_like(number, t.ema), (1 + number) / (10 + number))
            torch._foreach_mul_(self.average, keep)
            torch._foreach_add_(self.average, torch._foreach_mul(self.parameters, 1 - keep))
        self.step_number += 1


def rate_table(t: Trial) -> list[float]:
    rows = []
    for k in range(t.steps):
        warm = min(1.0, (k + 1) / t.warmup) if t.warmup else 1.0
        if t.schedule == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * k / t.steps))
        elif t.schedule == "linear":
            shape = 1 - k / t.steps
        elif t.schedule == "wsd":
            start = t.steps * (1 - t.decay_share)
            shape = 1.0 if k < start else (t.steps - k) / (t.steps - start)
        elif t.schedule == "constant":
            shape = 1.0
        else:
            raise ValueError(t.schedule)
        rows.append(t.lr * warm * (t.final + (1 - t.final) * shape))
    return rows


# -- data -----------------------------------------------------------------------------------------


def read_images(folders: list[Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    strips = sorted(p for f in folders for p in f.glob(f"{split}_[0-9][0-9][0-9].webp"))
    labels = next(f for f in folders if (f / f"{split}_labels.npz").exists())
    every = np.load(labels / f"{split}_labels.npz")["labels"]
    images, chosen = [], []
    for path in strips:
        number = int(path.stem[-3:])
        own = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3)
        images.append(own)
        chosen.append(every[500 * number : 500 * number + len(own)])
    x = np.concatenate(images).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(x), np.concatenate(chosen).astype(np.int64)


class Data:
    def __init__(self, folders: list[Path], device: torch.device) -> None:
        def both(split: str) -> tuple[Tensor, Tensor]:
            x, c = read_images(folders, split)
            return torch.from_numpy(x).to(device), torch.from_numpy(c).to(device)

        self.train, self.labels = both("train")
        self.test, self.test_labels = both("test")


def order(count: int, batch: int, steps: int, generator: torch.Generator) -> Tensor:
    """Image indices of each step (steps, batch), drawn without replacement in each epoch."""
    wanted = steps * batch
    epochs = math.ceil(wanted / count)
    rows = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return rows[:wanted].reshape(steps, batch)


# -- one run --------------------------------------------------------------------------------------


class Run:
    """A running trial; ``advance`` launches a step without synchronising with the device."""

    def __init__(self, t: Trial, data: Data, device: torch.device) -> None:
        self.t, self.data, self.device = t, data, device
        torch.manual_seed(t.seed)
        cuda = device.type == "cuda"
        self.layout = torch.channels_last
        self.net = Net(t).to(device, memory_format=self.layout)
        if t.whiten:
            self._whiten()
        host = torch.Generator().manual_seed(t.seed)
        n = t.train or len(data.train)
        self.rows_ce = order(n, t.classify_batch, t.steps, host).to(device)
        self.flips = (torch.rand(n, generator=host) < 0.5).to(device)
        dsm_batch = max(t.denoise_batch, t.dsm_crop_batch, 1)
        self.rows_dsm = order(n, dsm_batch, t.steps, host).to(device)
        self.generator = torch.Generator(device).manual_seed(t.seed + 1)
        rates = torch.tensor(rate_table(t), device=device)
        self.update = Updater(self.net, t, rates)
        self.running = torch.ones((), device=device)
        self.curve = torch.zeros(t.steps, 2, device=device)
        self.stream = torch.cuda.Stream() if cuda else None
        self.graphs: list[tuple[int, Any]] = []
        self.done = 0
        self.phases = self._phases()
        self.capture_seconds, self.graph_error = 0.0, ""
        self.begun = time.time()

    def _whiten(self) -> None:
        x = self.data.train[:5000].float() / 255
        patches = x.unfold(2, 3, 1).unfold(3, 3, 1)[:, :, ::3, ::3]
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 27)
        values, vectors = torch.linalg.eigh((flat.mT @ flat / len(flat)).cpu().double())
        filters = (vectors / (values + 5e-4).sqrt()).mT.flip(0).float()
        half = self.t.width // 2
        both = torch.cat([filters[:half], -filters[:half]])[: self.t.width]
        both = both / both.norm() * self.net.stem.weight.norm().cpu()
        with torch.no_grad():
            self.net.stem.weight.copy_(both.reshape(-1, 3, 3, 3))

    def _phases(self) -> list[tuple[int, int, dict[str, Any]]]:
        t = self.t
        cuts = {0, t.steps}
        for share in (t.dsm_until, t.dsm_after, t.ce_small_until):
            cuts.add(round(share * t.steps))
        ends = sorted(cuts)
        rows = []
        for a, b in itertools.pairwise(ends):
            rows.append((a, b, {
                "dsm": a >= round(t.dsm_after * t.steps) and t.denoise_batch > 0,
                "dsm_crop": t.dsm_crop if a < round(t.dsm_until * t.steps) else 0,
                "ce_small": t.ce_small if a < round(t.ce_small_until * t.steps) else 0,
            }))  # fmt: skip
        return rows

    def flops(self) -> float:
        t, total = self.t, 0.0
        for a, b, own in self.phases:
            side = own["ce_small"] or 32
            ce = 3 * t.classify_batch * flops_per_image(self.net, side)
            dsm = 0.0
            if own["dsm"]:
                crop = own["dsm_crop"]
                images = (t.dsm_crop_batch or t.denoise_batch) if crop else t.denoise_batch
                dsm = 6 * images * flops_per_image(self.net, crop or 32)
            total += (b - a) * (ce + dsm)
        return total

    # drawing

    def _row(self, table: Tensor) -> Tensor:
        return table.index_select(0, self.update.step_number[None])[0]  # indexing would synchronise

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def _randn(self, like: Tensor) -> Tensor:
        shape = like.shape
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _window(self, x: Tensor, side: int) -> Tensor:
        """A random crop of each image (B, 3, H, W)."""
        b, c, h, w = x.shape
        top = (self._rand(b) * (h - side + 1)).long()
        left = (self._rand(b) * (w - side + 1)).long()
        span = torch.arange(side, device=self.device)
        down, across = top[:, None] + span, left[:, None] + span
        x = x.gather(2, down[:, None, :, None].expand(b, c, side, w))
        return x.gather(3, across[:, None, None, :].expand(b, c, side, side))

    def _flip(self, x: Tensor, rows: Tensor, kind: str, batch: int) -> Tensor:
        if kind == "none":
            return x
        if kind == "alternating":
            epoch = self.update.step_number * batch // len(self.flips)
            mirrored = self.flips[rows] ^ (epoch % 2).bool()
        else:
            mirrored = self._rand(len(x)) < 0.5
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)

    def _classify_batch(self, small: int) -> tuple[Tensor, Tensor]:
        t = self.t
        rows = self._row(self.rows_ce)
        x = self.data.train[rows].float() / 255
        x = self._flip(x, rows, t.flip, t.classify_batch)
        if t.crop:
            x = self._window(F.pad(x, (t.crop,) * 4, mode=t.crop_mode), 32)
        if t.cutout:
            where = (self._rand(len(x), 2) * (32 + t.cutout)).long() - t.cutout
            span = torch.arange(32, device=self.device)
            inside = (span >= where[..., None]) & (span < where[..., None] + t.cutout)
            hole = inside[:, 0, :, None] & inside[:, 1, None, :]
            x = torch.where(hole[:, None], x.mean((2, 3), keepdim=True), x)
        if small:
            x = F.interpolate(x, size=small, mode="bilinear", antialias=True)
        soft = (self.data.labels[rows][:, None] == torch.arange(10, device=self.device)).float()
        if t.label_smoothing:
            soft = soft * (1 - t.label_smoothing) + t.label_smoothing / 10
        if t.mix:
            kinds = {"mixup": 0.0, "cutmix": 1.0, "both": 0.5}
            weight = self._rand(1).expand(32, 32)
            cut = self._rand(1) < kinds[t.mix_kind]
            weight = torch.where(cut, self._outside_box(), weight)
            weight = torch.where(self._rand(1) < t.mix, weight, torch.ones_like(weight))
            lam = weight.mean()
            x = weight * x + (1 - weight) * x.roll(1, 0)
            soft = lam * soft + (1 - lam) * soft.roll(1, 0)
        if t.ce_sigma:
            sigma = (self._rand(len(x), 1, 1, 1) * math.sqrt(t.ce_sigma)).square() / 255
            x = x + sigma * self._randn(x)
        return x.contiguous(memory_format=self.layout), soft

    def _outside_box(self) -> Tensor:
        """CutMix weights (32, 32): 0 inside the box, 1 outside."""
        half = 16 * (1 - self._rand(1)).sqrt()
        centre = self._rand(2) * 32
        span = torch.arange(32, device=self.device) + 0.5
        down, across = ((span - c).abs() < half for c in centre.unbind())
        return 1.0 - (down[:, None] & across).float()

    def _denoise_batch(self, crop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = self.t
        count = (t.dsm_crop_batch or t.denoise_batch) if crop else t.denoise_batch
        rows = self._row(self.rows_dsm)[:count]
        x = self._flip(self.data.train[rows].float() / 255, rows, "random", count)
        if crop:
            x = self._window(x, crop)
        low, high = (s ** (1 / t.dsm_law) for s in t.dsm_sigma)
        sigma = (low + (high - low) * self._rand(len(x), 1, 1, 1)) ** t.dsm_law / 255
        eps = self._randn(x)
        y = (x + sigma * eps).contiguous(memory_format=self.layout)
        return y, sigma, eps, self.data.labels[rows]

    # stepping

    def step(self, own: dict[str, Any]) -> None:
        t, net = self.t, self.net
        x, soft = self._classify_batch(own["ce_small"])
        logits, _ = net(x)
        ce = -(soft * logits.log_softmax(1)).sum(1).mean()
        total, dsm, plain = ce, torch.zeros((), device=self.device), ce.detach()
        if own["dsm"]:
            y, sigma, eps, labels = self._denoise_batch(own["dsm_crop"])
            y.requires_grad_()
            logits, density = net(y, t.stem_by_ce)
            score = torch.autograd.grad(density.sum(), y, create_graph=True)[0]
            dsm = (sigma * score + eps).square().mean()
            factor = t.balance / self.running if t.form == "log" else t.balance
            if t.ce_on_denoise:
                ce = ce + t.ce_on_denoise * F.cross_entropy(logits, labels)
            total = ce + factor * dsm
        apart = None
        if t.per_objective and own["dsm"]:
            apart = [self._gradients(ce), self._gradients(factor * dsm)]
            gradients = [a + b for a, b in zip(*apart, strict=True)]
        else:
            gradients = self._gradients(total)
        with torch.no_grad():
            if own["dsm"]:
                self.running.lerp_(dsm.detach(), 0.1)
            row = torch.stack([plain, dsm.detach()])
            self.curve.index_copy_(0, self.update.step_number[None], row[None])
        self.update(gradients, apart)

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        parameters = self.update.parameters
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _state(self) -> list[Tensor]:
        return [*self.update.state(), self.running, self.curve]

    def capture(self, own: dict[str, Any]) -> Any:
        """Capture the step as a CUDA graph; restores the state afterwards."""
        begun = time.time()
        assert self.stream is not None
        torch.cuda.synchronize()
        with torch.no_grad():
            kept = [s.detach().clone() for s in self._state()]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.step(own)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, stream=self.stream):
            self.step(own)
        torch.cuda.synchronize()
        with torch.no_grad():
            for s, old in zip(self._state(), kept, strict=True):
                s.copy_(old)
        torch.cuda.synchronize()
        self.capture_seconds += time.time() - begun
        return graph

    def prepare(self) -> None:
        if self.device.type == "cuda":
            for a, _b, own in self.phases:
                try:
                    graph = self.capture(own)
                except Exception:
                    graph, self.graph_error = None, traceback.format_exc()
                self.graphs.append((a, graph))
        self.begun = time.time()

    def advance(self) -> None:
        if self.device.type == "cuda":
            graph = [g for a, g in self.graphs if a <= self.done][-1]
            with torch.cuda.stream(self.stream):
                if graph is None:
                    self.step([own for a, _b, own in self.phases if a <= self.done][-1])
                else:
                    graph.replay()
        else:
            self.step([own for a, _b, own in self.phases if a <= self.done][-1])
        self.done += 1

    # measurement

    def measure(self) -> dict[str, Any]:
        t = self.t
        if self.device.type == "cuda":
            self.stream.synchronize()
        seconds = time.time() - self.begun
        with torch.no_grad():
            last = [p.detach().clone() for p in self.update.parameters]
            if t.ema:
                for p, mean in zip(self.update.parameters, self.update.average, strict=True):
                    p.copy_(mean)
        found = self.qualities()
        if t.extra.get("save"):
            self.saved = {k: v.half().cpu() for k, v in self.net.state_dict().items()}
        with torch.no_grad():
            for p, own in zip(self.update.parameters, last, strict=True):
                p.copy_(own)
        curve = self.curve.cpu()
        stride = max(1, t.steps // 40)
        points = [
            [round(float(v), 4) for v in curve[k : k + stride].mean(0)]
            for k in range(0, t.steps, stride)
        ]
        return {
            **found,
            "tflop": round(self.flops() / 1e12, 2),
            "seconds": round(seconds, 2),
            "capture_seconds": round(self.capture_seconds, 2),
            "parameters": sum(p.numel() for p in self.update.parameters),
            "curve": points,
            **({"graph_error": self.graph_error} if self.graph_error else {}),
        }

    def qualities(self) -> dict[str, Any]:
        t, data, net = self.t, self.data, self.net
        test = data.test[: t.test].float() / 255
        labels = data.test_labels[: t.test]
        with torch.no_grad():
            logits = torch.cat([net(_laid(x))[0] for x in test.split(500)])
            mirrored = torch.cat([net(_laid(x.flip(-1)))[0] for x in test.split(500)])
        p = logits.softmax(1)
        both = (logits + mirrored).argmax(1)
        psnr = []
        generator = torch.Generator(self.device).manual_seed(99)
        for level in (15, 25, 50):
            rows = []
            for x in test[: t.psnr].split(250):
                eps = torch.randn(x.shape, generator=generator, device=self.device)
                y = _laid(x + level / 255 * eps).requires_grad_()
                density = net(y)[1].sum()
                score = torch.autograd.grad(density, y)[0]
                clean = (y + (level / 255) ** 2 * score).detach().clamp(0, 1)
                rows.append(-10 * (clean - x).square().mean((1, 2, 3)).log10())
            psnr.append(round(float(torch.cat(rows).mean()), 3))
        return {
            "accuracy": round(float((logits.argmax(1) == labels).float().mean()), 4),
            "accuracy_flips": round(float((both == labels).float().mean()), 4),
            "ce": round(float(F.cross_entropy(logits, labels)), 4),
            "confidence": round(float(p.max(1).values.mean()), 4),
            "psnr": psnr,
        }


def _laid(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last)


# -- many runs ------------------------------------------------------------------------------------


def take(out: Path, count: int, total: int) -> list[int]:
    """Reserve the next trials for this process; return their indices."""
    import fcntl

    with open(out / "next", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        start = int(file.read() or 0)
        stop = min(total, start + count)
        file.truncate(0)
        file.write(str(stop))
        file.flush()
    return list(range(start, stop))


def record(out: Path, row: dict[str, Any]) -> None:
    with open(out / "trials.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def work(trials: list[Trial], args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    data = Data([Path(p) for p in args.images], device)
    end = args.begun + args.seconds
    while time.time() < end:
        numbers = take(args.out, args.streams, len(trials))
        if not numbers:
            return
        runs = []
        for number in numbers:
            try:
                run = Run(trials[number], data, device)
                run.prepare()
                runs.append(run)
            except Exception:
                record(args.out, {"name": trials[number].name, "error": traceback.format_exc()})
        going = list(runs)
        k = 0
        while going:
            for run in list(going):
                run.advance()
                if run.done == run.t.steps:
                    going.remove(run)
                    finish(run, args.out)
            k += 1
            if k % 20 == 0:
                if device.type == "cuda":
                    for run in going:
                        run.stream.synchronize()
                if time.time() > end:
                    for run in going:
                        finish(run, args.out)
                    return


def finish(run: Run, out: Path) -> None:
    try:
        found = run.measure()
    except Exception:
        found = {"error": traceback.format_exc()}
    if getattr(run, "saved", None):
        torch.save(run.saved, out / f"{run.t.name.replace(' ', '-')}.pt")
    changed = {k: v for k, v in asdict(run.t).items() if v != asdict(Trial())[k]}
    record(out, {"name": run.t.name, "steps_done": run.done, **found, "trial": changed})
    line = {k: found.get(k) for k in ("accuracy", "accuracy_flips", "psnr", "tflop", "seconds")}
    print(
        run.t.name,
        run.t.seed,
        line,
        found.get("error", found.get("graph_error", ""))[-900:],
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", type=Path)
    parser.add_argument("--images", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=1)
    args = parser.parse_args()
    args.begun = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.trials.read_text())
    trials = [replace(Trial(), **{k: _tuple(v) for k, v in row.items()}) for row in rows]
    if args.workers == 1:
        return work(trials, args)
    children = []
    for _ in range(args.workers):
        pid = os.fork()
        if pid == 0:
            try:
                work(trials, args)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    print("seconds", round(time.time() - args.begun, 1))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
