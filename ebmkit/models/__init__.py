"""Backbones, heads, joint models, denoisers and diffusion models; saving, loading, importing."""

from ebmkit.models.base import (
    Backbone,
    BackboneConfig,
    DenoiserConfig,
    Features,
    Head,
    NoiseConditionalBackbone,
    WindowedBackbone,
)
from ebmkit.models.config import BACKBONES, DENOISERS, ModelConfig, create_denoiser, create_model
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.diffusion import DiffusionModel, UNetConfig
from ebmkit.models.dncnn import DnCNN
from ebmkit.models.drunet import DRUNetConfig
from ebmkit.models.gradresnet import GradResNet, GradResNetConfig
from ebmkit.models.heads import (
    HEADS,
    HeadConfig,
    HeadEntry,
    LinearHead,
    LinearQuadraticHead,
    LogitHead,
)
from ebmkit.models.importing import import_checkpoint, load_checkpoint
from ebmkit.models.joint import JointModel
from ebmkit.models.mlp import MLP, MLPConfig
from ebmkit.models.noise_conditional import PreconditionedModel
from ebmkit.models.pipelines import import_unet
from ebmkit.models.saving import load, save_model, weights_digest
from ebmkit.models.timm import TimmConfig
from ebmkit.models.unet_energy import UNetEnergy, UNetEnergyConfig

__all__ = [
    "BACKBONES",
    "DENOISERS",
    "HEADS",
    "MLP",
    "Backbone",
    "BackboneConfig",
    "DRUNetConfig",
    "DenoiserConfig",
    "DiffusionModel",
    "DirectDenoiser",
    "DnCNN",
    "Features",
    "GradResNet",
    "GradResNetConfig",
    "Head",
    "HeadConfig",
    "HeadEntry",
    "JointModel",
    "LinearHead",
    "LinearQuadraticHead",
    "LogitHead",
    "MLPConfig",
    "ModelConfig",
    "NoiseConditionalBackbone",
    "PreconditionedModel",
    "TimmConfig",
    "UNetConfig",
    "UNetEnergy",
    "UNetEnergyConfig",
    "WindowedBackbone",
    "create_denoiser",
    "create_model",
    "import_checkpoint",
    "import_unet",
    "load",
    "load_checkpoint",
    "save_model",
    "weights_digest",
]
