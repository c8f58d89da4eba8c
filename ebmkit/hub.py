"""Files and models on the Hugging Face hub: download, save and upload.

A file on the hub is ``owner/name:file``, a repository ``owner/name``, and a model in the format of
ebmkit ``hub:owner/name``. Its repository holds the files of a saved model
(`ebmkit.models.save_model`). A download is read as tensors and JSON; nothing in it is executed.
Downloaded files are reused from the hub's cache.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from ebmkit.errors import UserError, first_line, shown
from ebmkit.storage import make_folder, write_atomically

PREFIX = "hub:"
"""Start of the name of a model on the hub, ``hub:owner/name``."""

MODEL_FILES = ["model.safetensors", "model.json", "class_gaussians.safetensors", "config.yaml"]
"""Files that are downloaded of a model."""

SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors", ".zip")
NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>[^:]+))?")


def is_hub_name(source: str) -> bool:
    """Whether ``source``, not a local path, has the form ``owner/name`` or ``owner/name:file``."""
    match = NAME.fullmatch(source)
    return match is not None and (bool(match["file"]) or not source.endswith(SUFFIXES))


def locate_file(source: str) -> Path:
    """The local path of ``source``, a path or ``owner/name:file``.

    Raises:
        UserError: if it is neither, huggingface_hub is not installed, or the download fails.
    """
    if Path(source).exists():
        return Path(source)
    match = NAME.fullmatch(source)
    if not is_hub_name(source) or match is None:
        raise UserError(f"cannot read {source!r}: no such file or folder")
    if not match["file"]:
        raise UserError(
            f"{source!r} is no local path; for a repository on the hub name the file too, as in "
            f"{source}:model.pt"
        )
    return _fetch(source, "hf_hub_download", match["repository"], match["file"])


def locate_folder(
    source: str | Path, patterns: Sequence[str], choices: Sequence[Sequence[str]]
) -> Path:
    """The local folder of ``source``, a path or ``owner/name``.

    Args:
        source: local path or ``owner/name``.
        patterns: patterns of the files to download from a repository.
        choices: lists of paths to download as well; each list only if the repository has no file of
            the lists before it.

    Raises:
        UserError: as `locate_file`.
    """
    folder, name = Path(source), str(source)
    if folder.is_dir():
        return folder
    if (match := NAME.fullmatch(name)) is None or match["file"]:
        raise UserError(f"there is no folder {name!r}, and a name on the hub is like owner/name")
    for paths in choices:
        folder = _fetch(name, "snapshot_download", name, allow_patterns=[*patterns, *paths])
        if any((folder / path).is_file() for path in paths):
            break
    return folder


def locate_model(source: str) -> Path:
    """The local folder of the model ``source``, ``hub:owner/name``.

    Raises:
        UserError: as `locate_file`.
    """
    name = source.removeprefix(PREFIX)
    _check_repository(name, f"{PREFIX}owner/name")
    return _fetch(source, "snapshot_download", name, allow_patterns=MODEL_FILES)


def cache_of(folder: Path) -> Path | None:
    """The hub's cache of the repository whose download is ``folder``; None for other folders.

    Files of a download are links into it.
    """
    folder = folder.absolute()
    return folder.parents[1] if folder.parent.name == "snapshots" else None


def _check_repository(name: str, form: str) -> None:
    if (match := NAME.fullmatch(name)) is None or match["file"]:
        raise UserError(f"{shown(name)} is no repository on the hub: its name is like {form}")


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'ebmkit-vision[hub]'") from None
    return huggingface_hub


def _fetch(source: str, function: str, *arguments: str, **options: Any) -> Path:
    download = getattr(_library(), function)
    try:
        return Path(download(*arguments, **options))
    except Exception as error:  # errors of network, hub and cache have no common class
        raise UserError(
            f"cannot fetch {source!r} (no local path): the download failed: {first_line(error)}"
        ) from None


class FileFormat(NamedTuple):
    """How models are stored, which `ebmkit.models.saving` defines.

    Attributes:
        files: model -> content of each of its files.
        load: run folder, name of a pretrained model or ``hub:owner/name`` -> model.
    """

    files: Callable[[Any], dict[str, bytes]]
    load: Callable[..., Any]


class HubMixin:
    """The methods `save_pretrained`, `push_to_hub` and `from_pretrained` of models."""

    file_format: ClassVar[FileFormat]

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model in a new or empty ``folder``, for `ebmkit.load` and the command line.

        Raises:
            UserError: if the folder is not empty or cannot be written, or the model has no card.
        """
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{str(path)!r} exists: choose a new or empty folder")
        files = _format(type(self)).files(self)
        make_folder(path)
        for name, content in files.items():
            write_atomically(path / name, content)

    def push_to_hub(
        self, repository: str, private: bool = False, message: str = "Upload model"
    ) -> str:
        """Upload the model to ``repository`` on the Hugging Face hub (extra ``hub``).

        Needs a token with write access, as huggingface_hub finds it: ``hf auth login`` or the
        variable HF_TOKEN.

        Args:
            repository: ``owner/name``; created if it does not exist.
            private: whether a new repository is private.
            message: message of the commit.

        Returns:
            The address of the commit.

        Raises:
            UserError: if the name is not of this form, the model has no card, huggingface_hub is
                not installed, or the upload fails.
        """
        _check_repository(repository, "owner/name")
        api = _library().HfApi()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            self.save_pretrained(path)
            (path / "README.md").write_text(_readme(self, repository), encoding="utf-8")
            try:
                api.create_repo(repository, private=private, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repository, folder_path=path, commit_message=message
                )
            except Exception as error:  # as in `_fetch`
                raise UserError(f"cannot upload to {repository!r}: {first_line(error)}") from None
        return str(done.commit_url)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Self:
        """Load the model ``name``: a folder, a pretrained model, or ``owner/name`` on the hub.

        Args:
            name: what `ebmkit.load` takes, or ``owner/name`` without ``hub:`` if there is no such
                folder.
            options: further arguments of `ebmkit.load`.

        Raises:
            UserError: as `ebmkit.load`, or if the model is of another class.
        """
        source = str(name)
        if not Path(source).exists() and NAME.fullmatch(source):
            source = PREFIX + source
        model = _format(cls).load(source, **options)
        if not isinstance(model, cls):
            raise UserError(
                f"{shown(str(name))} is a {type(model).__name__}, not a {cls.__name__}: load it by "
                "ebmkit.load"
            )
        return model


def _format(cls: type[HubMixin]) -> FileFormat:
    if not hasattr(cls, "file_format"):
        raise UserError("the format of saved models is not loaded: import ebmkit.models first")
    return cls.file_format


def _readme(model: object, repository: str) -> str:
    """The page of ``repository``: what the model is and how it is loaded."""
    name = repository.partition("/")[2]
    return (
        "---\nlibrary_name: ebmkit\ntags: [energy-based-model, denoising]\n---\n\n"
        f"# {name}\n\n`{model!r}`\n\n```python\nimport ebmkit\n\n"
        f'model = ebmkit.load("{PREFIX}{repository}")\n```\n'
    )
