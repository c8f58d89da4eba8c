"""ebmkit: joint energy-based models of images and labels.

One network classifies and denoises images, computes their score, and samples. A backbone computes
features, a head maps them to a log-density and class logits; all else is derived from these.

>>> import ebmkit
>>> model = ebmkit.create_model("gradresnet18", num_classes=10, in_channels=3, width=16)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebmkit.analytic import Gaussian, GaussianMixture
    from ebmkit.card import ModelCard
    from ebmkit.compile import optimize
    from ebmkit.energy import Denoiser, Energies, EnergyModel, ScoreModel
    from ebmkit.errors import UserError
    from ebmkit.models import JointModel, create_model, load, save_model
    from ebmkit.pretrained import list_models
    from ebmkit.training.train import train

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
    "list_models",
    "load",
    "optimize",
    "save_model",
    "train",
]

_PUBLIC_MODULES = (
    "errors", "card", "pretrained", "energy", "compile", "analytic", "models", "training.train"
)  # fmt: skip
"""Modules that define the names in `__all__`."""


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, at first use (PEP 562).

    Importing PyTorch takes seconds, which `ebmkit --help` avoids.
    """
    if name in __all__:
        for home in _PUBLIC_MODULES:
            module = import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                value = globals()[name] = getattr(module, name)
                return value
    elif not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
