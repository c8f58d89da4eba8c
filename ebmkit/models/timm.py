r"""timm networks as backbones: ``--backbone timm:NAME``.

Any model of `timm.list_models` without its classifier computes features f(y) for our head,
:math:`\log p(y, c) = h_c(f(y))`. Score matching differentiates the features
twice. Fused attention has only one derivative, so attention is computed by separate operations:
:math:`\operatorname{softmax}(q k^\top / \sqrt d)\, v`.

The layers determine how well the gradient denoises. Batch normalisation in training mode couples
the images of a batch, and autograd's second derivative misses the kinks of ReLU, Hardswish and the
like; ebmkit warns of scores through either (`ebmkit.EnergyModel.warn_about_layers`). Networks with
GELU or SiLU and layer or group normalisation, such as ConvNeXt and vision transformers, have
neither.

A saved model contains its weights. timm's pretrained weights are downloaded only if ``pretrained``
is set, and only at the start of training.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator
from torch import Tensor

from ebmkit.errors import UserError, first_line, shown
from ebmkit.models.base import BackboneConfig, Features, PooledBackbone

INSTALL = "pip install 'ebmkit-vision[timm]'"

OWN_ARGUMENTS = frozenset(
    {"model_name", "pretrained", "in_chans", "num_classes", "features_only", "out_indices"}
    | {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    | {"scriptable", "exportable", "no_jit", "global_pool"}
)
"""Arguments of `timm.create_model` that are illegal in ``options``: they are set here, change the
output or read other files, and a configuration may be untrusted."""

SIZE_ERRORS = ("input size", "output size", "expected more than 1 value per channel")
"""Parts of PyTorch's errors, in lower case, for images that are too small for a network."""


class TimmConfig(BackboneConfig):
    """Configuration of a timm model."""

    kind: Literal["timm"] = "timm"
    name: str = Field(
        description="name of a timm model, from timm.list_models(), for example convnext_atto"
    )
    pretrained: bool = Field(
        False,
        description="start from timm's pretrained weights, which are downloaded; false: "
        "random weights",
    )
    options: dict[str, Any] = Field(
        {}, description="further arguments of timm.create_model, for example {img_size: 32}"
    )

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        own = sorted(OWN_ARGUMENTS & options.keys())
        if own:
            raise ValueError(f"{own[0]} cannot be set here: leave it out")
        return options

    def without_pretrained(self) -> Self:
        """This configuration, to be built without downloading weights."""
        return self.model_copy(update={"pretrained": False})

    def build(self, in_channels: int) -> TimmBackbone:
        """Build the network, newly initialised or pretrained, for images of C channels.

        Raises:
            UserError: if timm is not installed, has no such model, refuses an option or the number
                of channels, or its weights cannot be fetched.
        """
        return TimmBackbone(in_channels, self)


class TimmBackbone(PooledBackbone):
    """A timm model without its classifier; K is the number of features before the classifier.

    Args:
        in_channels: 1 for gray, 3 for colour.
        config: name and options of the model.
    """

    def __init__(self, in_channels: int, config: TimmConfig) -> None:
        try:
            import timm
        except ImportError:
            raise UserError(f"backbone timm:{config.name} needs timm: {INSTALL}") from None
        if not timm.is_model(config.name):  # also refuses names of files and of the hub
            near = timm.list_models(f"*{config.name[:20]}*")[:5] or timm.list_models("convnext_*")
            raise UserError(
                f"timm {timm.__version__} has no model {shown(config.name)}: names are those of "
                f"timm.list_models(), as {', '.join(near[:5])}"
            )
        try:
            network = timm.create_model(
                config.name,
                pretrained=config.pretrained,
                in_chans=in_channels,
                num_classes=0,
                **config.options,
            )
        except UserError:
            raise
        except Exception as error:  # from an option, a shape or the download
            raise UserError(
                f"timm cannot build {config.name} of {in_channels} channel(s) with options "
                f"{shown(config.options)}: {first_line(error)}"
            ) from None
        width: Any = getattr(network, "head_hidden_size", None) or network.num_features
        super().__init__(network, int(width))
        self.name = config.name

    def forward(self, y: Tensor) -> Features:
        """Features of images ``y`` (B, C, H, W), of a size that the network accepts.

        Raises:
            UserError: if the network does not accept their size.
        """
        try:
            return super().forward(y)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            too_small = any(words in reason.lower() for words in SIZE_ERRORS)
            if not too_small and not isinstance(error, AssertionError):
                raise
            raise UserError(
                f"timm's {self.name} takes no batch of {len(y)} image(s) of {y.shape[-2]}x"
                f"{y.shape[-1]} ({reason}): set dataset.image_size, or for a network of fixed size "
                "model.backbone.options.img_size"
            ) from None
