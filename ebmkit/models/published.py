"""Checkpoints that people have as models of ours: read, converted, and kept like a run.

`load_checkpoint` gives the model, `import_checkpoint` makes a folder of it that `ebmkit.load` and
the command line take. `ebmkit.models.foreign` knows the kinds, `ebmkit.models.torchfile` reads the
files: nothing in them is executed.

>>> model = load_checkpoint("cifar_l2_0_5.pt")                           # doctest: +SKIP
>>> model.log_joint(images)                                              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebmkit.card import ModelCard
from ebmkit.energy import ScoreModel
from ebmkit.errors import UserError, plain
from ebmkit.models.config import ModelConfig
from ebmkit.models.denoisers import DirectDenoiser
from ebmkit.models.foreign import (
    KINDS,
    Converted,
    Numbers,
    convert_denoiser,
    convert_jem,
    convert_robustness,
    convert_state,
    kind_of,
    renamed,
)
from ebmkit.models.hub import is_hub_name, locate
from ebmkit.models.saving import save_model
from ebmkit.models.torchfile import read_torch_file
from ebmkit.registry import find
from ebmkit.storage.tensors import read_tensors

__all__ = ["import_checkpoint", "import_weights", "load_checkpoint", "read_state"]

NESTED = ("model_state_dict", "state_dict", "params", "model", "net")
"""Under which names training codes keep the weights in a checkpoint."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.pth`` or ``.safetensors`` file, by name.

    Raises:
        UserError: if it cannot be read, asks for what may run code, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    content = read_torch_file(path)
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{str(path)!r} holds no state dict: names of parameters with tensors")
    odd = next(
        (plain(str(name)) for name, value in content.items() if not isinstance(value, Tensor)), None
    )
    if odd is not None:
        raise UserError(f"{odd} in {str(path)!r} is no tensor: give the network's state dict")
    return {str(name): value for name, value in content.items()}


def load_checkpoint(
    source: str | Path,
    kind: str | None = None,
    *,
    backbone: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    classes: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
    dataset: str = "",
    class_names: Sequence[str] = (),
    sigma_range: tuple[float, float] | None = None,
) -> ScoreModel:
    """The model in a checkpoint of another program, frozen and in evaluation mode.

    Args:
        source: a file, or ``owner/name:file`` on the Hugging Face hub; of diffusers a folder, or
            ``owner/name``.
        kind: a name of `KINDS`; None: as the names of its parameters tell.
        backbone: for ``state``, a name from `ebmkit list backbones`.
        rename: prefixes to replace in the names, (old, new), in order, before all else.
        classes: labels C; None: as many as the classifier has.
        mean: what the network subtracts from images in [0, 1], one number or one per channel;
            None: what the checkpoint tells, else 0.
        std: what it divides them by then; None: what the checkpoint tells, else 1.
        image_size: height and width of the images it was trained on, if the kind does not tell.
        settings: for ``state``, fields of `ModelConfig` that differ from the preset's, nested.
        dataset: name of the set it was trained on.
        class_names: by label.
        sigma_range: the noise levels it was trained for, image units.

    Returns:
        The model; its ``card`` says what is known of its training.

    Raises:
        UserError: if the file cannot be read or would run code, or the weights do not fit.
    """
    conversion = {
        "backbone": backbone,
        "rename": rename,
        "classes": classes,
        "mean": mean,
        "std": std,
        "image_size": image_size,
        "settings": settings,
    }
    return _made(source, kind, conversion, dataset, class_names, sigma_range)[0]


def import_checkpoint(
    source: str | Path, folder: Path, kind: str | None = None, **options: Any
) -> ScoreModel:
    """Make of a checkpoint a folder that `ebmkit.load` and the command line take.

    Args:
        source: as for `load_checkpoint`.
        folder: a new folder, or an empty one.
        kind: as for `load_checkpoint`.
        **options: its other options.

    Raises:
        UserError: as `load_checkpoint` does, or if the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists: choose another --out")
    told = {n: options.pop(n) for n in ("dataset", "class_names", "sigma_range") if n in options}
    model, config = _made(source, kind, options, **told)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(folder)!r}: {error.strerror}") from None
    assert model.card is not None
    save_model(folder, model, config, model.card)
    return model


def import_weights(
    path: Path, folder: Path, sigma_range: tuple[float, float] | None = None
) -> DirectDenoiser:
    """`import_checkpoint` of a published DnCNN or DRUNet.

    Args:
        path: its state dict (`convert_dncnn`, `convert_drunet`).
        folder: a new folder.
        sigma_range: the noise levels it was trained for, image units, if known.

    Raises:
        UserError: if the weights are of neither network, or the folder is not empty.
    """
    model = import_checkpoint(path, folder, "denoiser", sigma_range=sigma_range)
    assert isinstance(model, DirectDenoiser)
    return model


def _made(
    source: str | Path,
    kind: str | None,
    conversion: Mapping[str, Any],
    dataset: str = "",
    class_names: Sequence[str] = (),
    sigma_range: tuple[float, float] | None = None,
) -> tuple[ScoreModel, ModelConfig]:
    """The model of a checkpoint, frozen, with its card, and what builds it."""
    if kind is not None:
        find("kind of checkpoint", KINDS, kind)
    if (Path(source) / "model.json").is_file():
        raise UserError(f"{str(source)!r} is a model's folder already: use it as it is")
    folder = Path(source).is_dir()
    named = not Path(source).exists() and is_hub_name(str(source)) and ":" not in str(source)
    if kind == "diffusers" or (kind is None and (folder or named)):
        from ebmkit.models.pipelines import read_unet

        other = next((name for name, value in conversion.items() if value), None)
        if other:
            raise UserError(f"a UNet of diffusers says itself what it is: leave {other} out")
        model, config = read_unet(source)
        assert model.card is not None
        if class_names and config.num_classes == len(class_names):
            model.card.class_names = list(class_names)
        model.card.dataset = dataset
        return model, config
    if folder:
        raise UserError(f"{str(source)!r} is a folder: name the file of weights in it")
    converted = _convert(source, kind, **conversion)
    return _loaded(converted, source, dataset, class_names, sigma_range)


def _convert(
    source: str | Path,
    kind: str | None,
    backbone: str | None = None,
    rename: Sequence[tuple[str, str]] = (),
    classes: int | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Converted:
    state = read_state(locate(str(source)))
    kind = kind or ("state" if backbone else kind_of(renamed(state, rename)))
    if kind is None:
        names = ", ".join(plain(name) for name in list(state)[:4])
        raise UserError(
            f"the names in {str(source)!r} ({names}, ...) do not tell what network it is: say "
            f"--backbone, or --as {', '.join(KINDS)}"
        )
    if kind != "state" and (backbone or settings):
        raise UserError(f"--backbone and --set belong to --as state, not to {kind!r}")
    if kind == "state":
        if backbone is None:
            raise UserError("--as state needs --backbone, a name from `ebmkit list backbones`")
        chosen: dict[str, Any] = {"input_mean": mean, "input_std": std, **(settings or {})}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        converted = convert_state(state, backbone, rename, classes, chosen)
    elif kind == "robustness":
        converted = convert_robustness(renamed(state, rename), mean, std)
    elif kind == "jem":
        converted = convert_jem(renamed(state, rename), mean, std)
    else:
        converted = convert_denoiser(renamed(state, rename))
    if classes is not None and classes != converted.config.num_classes:
        raise UserError(
            f"the classifier has {converted.config.num_classes} labels, not {classes}: leave "
            "--classes out"
        )
    if image_size is not None:
        config = converted.config
        if converted.classifies:
            config = config.model_copy(update={"reference_size": (image_size, image_size)})
        converted = converted._replace(config=config, image_size=image_size)
    return converted


def _loaded(
    converted: Converted,
    source: str | Path,
    dataset: str = "",
    class_names: Sequence[str] = (),
    sigma_range: tuple[float, float] | None = None,
) -> tuple[ScoreModel, ModelConfig]:
    config, size = converted.config, converted.image_size
    if class_names and len(class_names) != config.num_classes:
        raise UserError(
            f"{dataset or 'the data set'} has {len(class_names)} classes and this classifier "
            f"{config.num_classes}"
        )
    model = config.build()
    counts = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
    model.load_state_dict({**counts, **converted.state})
    model.card = ModelCard(
        dataset=dataset,
        objective=f"published: {str(source).rpartition('/')[2]}",
        channels=config.in_channels,
        image_size=(size, size) if size else None,
        class_names=list(class_names),
        sigma_range=sigma_range,
        classifies=converted.classifies,
    )
    return model.eval().requires_grad_(False), config
