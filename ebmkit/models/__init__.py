"""Networks: backbones, heads, and the joint model made of one of each."""

from ebmkit.models.config import BackboneConfig, ModelConfig, create_model
from ebmkit.models.gradresnet import BACKBONES, GradResNet, GradResNetConfig
from ebmkit.models.heads import HEADS, HeadConfig, LinearQuadraticHead, LogitHead
from ebmkit.models.joint import JointModel
from ebmkit.models.parts import Backbone, Features, Head, WindowedBackbone
from ebmkit.models.saving import load, save_model, save_weights

__all__ = [
    "BACKBONES",
    "HEADS",
    "Backbone",
    "BackboneConfig",
    "Features",
    "GradResNet",
    "GradResNetConfig",
    "Head",
    "HeadConfig",
    "JointModel",
    "LinearQuadraticHead",
    "LogitHead",
    "ModelConfig",
    "WindowedBackbone",
    "create_model",
    "load",
    "save_model",
    "save_weights",
]
