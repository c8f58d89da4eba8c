"""ebmkit: joint energy-based models of images and labels.

One network classifies, denoises, scores and samples. A backbone gives features, a head turns
features into a log-density and class logits, everything else is derived.

>>> import ebmkit
>>> model = ebmkit.create_model("gradresnet18", num_classes=10, in_channels=3, width=16)
"""

from ebmkit.analytic import Gaussian, GaussianMixture
from ebmkit.card import ModelCard
from ebmkit.compile import optimize
from ebmkit.energy import Denoiser, Energies, EnergyModel, ScoreModel
from ebmkit.errors import UserError
from ebmkit.models import JointModel, create_model, load, save_model

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Energies",
    "EnergyModel",
    "Gaussian",
    "GaussianMixture",
    "JointModel",
    "ModelCard",
    "ScoreModel",
    "UserError",
    "__version__",
    "create_model",
    "load",
    "optimize",
    "save_model",
]
