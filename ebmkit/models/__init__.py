"""Networks: backbones, heads, and the joint model made of one of each."""

from ebmkit.models.base import (
    Backbone,
    BackboneConfig,
    DenoiserConfig,
    Features,
    Head,
    NoiseConditionalBackbone,
    WindowedBackbone,
)
from ebmkit.models.config import (
    BACKBONES,
    DENOISERS,
    NETWORKS,
    ModelConfig,
    create_denoiser,
    create_model,
)
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.diffusion import DiffusionModel, UNetConfig
from ebmkit.models.dncnn import DnCNN, DnCNNConfig
from ebmkit.models.drunet import DRUNet, DRUNetConfig
from ebmkit.models.gradientstep import GradientStep, GraDnCNNConfig, GSDRUNetConfig
from ebmkit.models.gradresnet import GradResNet, GradResNetConfig
from ebmkit.models.heads import HEADS, HeadConfig, HeadEntry, LinearQuadraticHead, LogitHead
from ebmkit.models.importing import import_checkpoint, load_checkpoint
from ebmkit.models.joint import JointModel
from ebmkit.models.mlp import MLP, MLPConfig
from ebmkit.models.pipelines import import_unet
from ebmkit.models.resnet import ResNet, ResNetConfig
from ebmkit.models.saving import load, save_model, save_weights, weights_digest
from ebmkit.models.timm import TimmBackbone, TimmConfig
from ebmkit.models.wideresnet import WideResNet, WideResNetConfig

__all__ = [
    "BACKBONES",
    "DENOISERS",
    "HEADS",
    "MLP",
    "NETWORKS",
    "Backbone",
    "BackboneConfig",
    "DRUNet",
    "DRUNetConfig",
    "DenoiserConfig",
    "DiffusionModel",
    "DirectDenoiser",
    "DnCNN",
    "DnCNNConfig",
    "Features",
    "GSDRUNetConfig",
    "GraDnCNNConfig",
    "GradResNet",
    "GradResNetConfig",
    "GradientStep",
    "Head",
    "HeadConfig",
    "HeadEntry",
    "JointModel",
    "LinearQuadraticHead",
    "LogitHead",
    "MLPConfig",
    "ModelConfig",
    "NoiseConditionalBackbone",
    "ResNet",
    "ResNetConfig",
    "TimmBackbone",
    "TimmConfig",
    "UNetConfig",
    "WideResNet",
    "WideResNetConfig",
    "WindowedBackbone",
    "create_denoiser",
    "create_model",
    "import_checkpoint",
    "import_unet",
    "load",
    "load_checkpoint",
    "save_model",
    "save_weights",
    "weights_digest",
]
