"""Networks by name: the tables that `ebmkit list`, the command line and the tests read.

`BACKBONES` make features, and a head energies of them (`ebmkit.models.JointModel`). `DENOISERS` are
whole models: plain denoisers without a density, gradient-step denoisers, whose density has no
labels, and diffusion models.
"""

from __future__ import annotations

from pydantic import BaseModel

from ebmkit.models.dncnn import DnCNNConfig
from ebmkit.models.drunet import DRUNetConfig
from ebmkit.models.gradientstep import GraDnCNNConfig, GSDRUNetConfig
from ebmkit.models.gradresnet import GradResNetConfig
from ebmkit.models.mlp import MLPConfig
from ebmkit.models.resnet import ResNetConfig
from ebmkit.models.unet import UNetConfig
from ebmkit.models.wideresnet import WideResNetConfig
from ebmkit.registry import Preset, find

__all__ = ["BACKBONES", "DENOISERS", "find_network"]

BACKBONES: dict[str, Preset[GradResNetConfig | ResNetConfig | WideResNetConfig | MLPConfig]] = {
    "gradresnet18": Preset(GradResNetConfig(depth=18), "the paper's network for 32x32 images"),
    "gradresnet10": Preset(
        GradResNetConfig(depth=10),
        "the same with one block per stage: twice the steps for the same FLOPs",
    ),
    "gradresnet34": Preset(GradResNetConfig(depth=34), "the same, deeper (3-4-6-3 blocks)"),
    "gradresnet18-imagenet": Preset(
        GradResNetConfig(depth=18, stem_kernel=7, strides=(2, 1, 2, 2, 2)),
        "the paper's network for 224x224 images: 7x7 stem of stride 2, no max-pool",
    ),
    "resnet18": Preset(
        ResNetConfig(depth=18, stem="cifar"),
        "classifier (He et al. 2016) adapted to 32x32 images: 3x3 stem, no max-pool",
    ),
    "resnet18-imagenet": Preset(
        ResNetConfig(depth=18, stem="imagenet"), "classifier (He et al. 2016) for 224x224 images"
    ),
    "resnet50": Preset(
        ResNetConfig(depth=50, stem="cifar"),
        "classifier (He et al. 2016), 50 layers, adapted to 32x32 images like resnet18",
    ),
    "resnet50-imagenet": Preset(
        ResNetConfig(depth=50, stem="imagenet"), "classifier (He et al. 2016) for 224x224 images"
    ),
    "wideresnet28-10": Preset(
        WideResNetConfig(depth=28, width=160), "classifier (Zagoruyko and Komodakis 2016)"
    ),
    "wideresnet28-10-jem": Preset(
        WideResNetConfig(
            depth=28, width=160, norm="none", activation="leaky_relu", bias=True, block="jem"
        ),
        "the variant of JEM: no norm, leaky ReLU, biases",
    ),
    "wideresnet10-jem": Preset(
        WideResNetConfig(
            depth=10, width=32, norm="none", activation="leaky_relu", bias=True, block="jem"
        ),
        "the variant of JEM, small enough to train on a CPU",
    ),
    "mlp": Preset(
        MLPConfig(width=128, kernel=7),
        "perceptron on 7x7 patches (kernel=1: on points), blind to sigma",
    ),
    "mlp-sigma": Preset(
        MLPConfig(width=128, kernel=7, noise_conditional=True),
        "the same with sigma as an input; with dsm an NCSN (Song & Ermon 2019)",
    ),
}

DENOISERS: dict[
    str, Preset[DnCNNConfig | DRUNetConfig | GSDRUNetConfig | GraDnCNNConfig | UNetConfig]
] = {
    "dncnn": Preset(DnCNNConfig(depth=17), "Zhang et al. 2017: 17 layers, residual, blind"),
    "dncnn20": Preset(DnCNNConfig(depth=20), "the same with 20 layers, as for colour"),
    "dncnn20-bias-free": Preset(
        DnCNNConfig(depth=20, bias=False), "BF-CNN of Mohan et al. 2020: no additive constant"
    ),
    "drunet": Preset(DRUNetConfig(), "Zhang et al. 2021: UNet of residual blocks, told sigma"),
    "drunet-blind": Preset(DRUNetConfig(noise_map=False), "the same without the noise map"),
    "gs-drunet": Preset(
        GSDRUNetConfig(), "Hurault et al. 2022: y - grad |y - DRUNet(y)|^2 / 2, an energy model"
    ),
    "gs-drunet-blind": Preset(GSDRUNetConfig(noise_map=False), "the same without the noise map"),
    "gradncnn": Preset(
        GraDnCNNConfig(width=128),
        "Cohen et al. 2021: y - gradient of a scalar network, an energy model",
    ),
    "unet": Preset(
        UNetConfig(width=32, multipliers=(1, 2, 2)),
        "a small diffusion UNet that predicts noise, told the timestep; by diffusers",
    ),
    "unet-cifar10": Preset(
        UNetConfig(
            width=128,
            multipliers=(1, 2, 2, 2),
            attention=(1,),
            norm_groups=32,
            dropout=0.1,
            options={
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
            },
        ),
        "Ho et al. 2020 for 32x32 images: 35.7 M parameters, attention at 16x16; by diffusers",
    ),
}


def find_network(name: str) -> Preset[BaseModel]:
    """The backbone or denoiser called ``name``.

    Raises:
        UserError: if there is none.
    """
    table: dict[str, Preset[BaseModel]] = {**BACKBONES, **DENOISERS}
    return find("backbone", table, name)
