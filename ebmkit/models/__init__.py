"""Networks: backbones, heads, and the joint model made of one of each."""

from ebmkit.models.config import BackboneConfig, ModelConfig, create_denoiser, create_model
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.diffusion import DiffusionModel
from ebmkit.models.dncnn import DnCNN, DnCNNConfig
from ebmkit.models.drunet import DRUNet, DRUNetConfig
from ebmkit.models.gradientstep import GradientStep, GraDnCNNConfig, GSDRUNetConfig
from ebmkit.models.gradresnet import GradResNet, GradResNetConfig
from ebmkit.models.heads import HEADS, HeadConfig, LinearQuadraticHead, LogitHead
from ebmkit.models.joint import JointModel
from ebmkit.models.mlp import MLP, MLPConfig
from ebmkit.models.parts import (
    Backbone,
    Features,
    Head,
    NoiseConditionalBackbone,
    WindowedBackbone,
)
from ebmkit.models.pipelines import import_unet
from ebmkit.models.presets import BACKBONES, DENOISERS
from ebmkit.models.published import import_checkpoint, load_checkpoint
from ebmkit.models.resnet import ResNet, ResNetConfig
from ebmkit.models.saving import load, save_model, save_weights, weights_digest
from ebmkit.models.unet import UNetConfig
from ebmkit.models.wideresnet import WideResNet, WideResNetConfig

__all__ = [
    "BACKBONES",
    "DENOISERS",
    "HEADS",
    "MLP",
    "Backbone",
    "BackboneConfig",
    "DRUNet",
    "DRUNetConfig",
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
    "JointModel",
    "LinearQuadraticHead",
    "LogitHead",
    "MLPConfig",
    "ModelConfig",
    "NoiseConditionalBackbone",
    "ResNet",
    "ResNetConfig",
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
