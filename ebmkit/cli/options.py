"""Options from signatures and docstrings, and help with standard metavars: RUN, INTEGER, PATH.

A command is a function. Its parameters before ``*`` are arguments, those after it are options.
Their help is in the section ``Args`` of the docstring, or in `SHARED` for parameters of several
commands. Further settings, such as a range or another flag, are annotations for Typer:
``top: Annotated[int, Option(min=1)] = 3``. The docstring's section ``Example`` ends the help.

The error for an unknown option names the option that was meant, or the setting: ``--learning-rate``
is ``--lr`` here, ``--weight-decay 0.1`` is ``--set optimizer.weight_decay=0.1``. Only a search in
the settings imports PyTorch.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, get_args, get_origin

from typer import Argument, Option
from typer.core import TyperCommand

SHARED = {
    "run": Argument(help="run folder"),
    "images": Argument(
        metavar="IMAGE", help="images (PNG, JPEG, TIFF), folders, or patterns such as 'in/*.png'"
    ),
    "weights": Option(help="which weights: last, or best (lowest validation loss)"),
    "device": Option(help="device: auto, cpu, cuda, cuda:1"),
    "precision": Option(help="precision: fp32, tf32, bf16; auto: fp32"),
    "compile_": Option(help="compile the score: on, off; auto: off"),
    "dataset": Option(
        help="data set, from `ebmkit list datasets` [default: the training data set]"
    ),
    "data_dir": Option(help="folder or file of the data set"),
    "image_size": Option(
        min=1,
        help="image height and width, in pixels; images in a folder are resized and cropped to it",
    ),
    "label": Option(help="class (name or number), to use the class-conditional denoiser"),
    "seed": Option(min=0, max=2**63 - 1, help="random seed"),
}
"""Help shared by several commands, by parameter name."""

SYNONYMS = {
    "lr": "learning-rate lr0 base-lr",
    "batch-size": "batch bs b",
    "workers": "num-workers n-workers j",
    "epochs": "epoch num-epochs max-epochs num-train-epochs",
    "steps": "iterations iters num-steps max-steps n-steps step",
    "ema": "ema-decay model-ema",
    "backbone": "model arch network net",
    "objective": "loss criterion",
    "data-dir": "data root data-root data-path dataset-dir path",
    "dataset": "data dataset-name",
    "out": "output output-dir out-dir save-dir o",
    "resume": "checkpoint ckpt resume-from",
    "image-size": "imgsz img-size size resolution",
    "device": "gpu cuda accelerator",
    "precision": "amp fp16 bf16 half dtype",
    "config": "cfg c yaml",
    "sigma": "noise noise-level std level",
    "label": "class class-label c y",
    "count": "num-samples samples number",
    "suite": "metrics task tasks",
    "limit": "num-images max-images subset",
    "top": "topk top-k k",
    "quiet": "silent q",
    "verbose": "debug v",
    "scale": "guidance-scale cfg-scale",
}
"""Option -> names that other programs have for it."""

KEYS = {
    "optimizer": "optimizer.kind",
    "opt": "optimizer.kind",
    "wd": "optimizer.weight_decay",
    "scheduler": "optimizer.schedule",
    "lr-scheduler": "optimizer.schedule",
    "warmup": "optimizer.warmup_steps",
    "grad-clip": "optimizer.clip_norm",
    "clip-grad": "optimizer.clip_norm",
    "max-grad-norm": "optimizer.clip_norm",
    "accumulate-grad-batches": "compute.accumulate",
    "val-images": "validation_images",
    "save-every": "checkpoint_every",
    "eval-every": "validate_every",
    "limit": "dataset.limit",
}
"""Name that other programs have for a setting -> the key of ``ebmkit train --set``."""

_HELP = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_TYPE = re.compile(r"<(?:list\[)?(\w+)[^|>]*>")
_CHOICES = re.compile(r"<([\w-]+(?:\|[\w-]+)+)>")
_HYPHEN = "\N{NON-BREAKING HYPHEN}"
"""Stands for a hyphen while help is wrapped, so that names are not broken."""

VALUES = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "path": "PATH"}
"""Metavars by the types that Typer shows: ``<str>``, ``<list[Path]>``."""


class Command(TyperCommand):
    """A command of ``ebmkit``, with standard metavars in its help."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.arguments = [p for p in self.params if p.param_type_name == "argument"]
        for argument in self.arguments:
            argument.metavar = argument.metavar or (argument.name or "").upper()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args``; the error for an unknown option suggests the right one."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # Typer's own copy of Click has no public name for it
            name = getattr(error, "option_name", None)
            if type(error).__name__ == "NoSuchOption" and (hint := _hint(self, str(name), given)):
                error.message, error.possibilities = f"No such option: {name}. {hint}", None  # type: ignore[attr-defined]
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line after the command name."""
        return ["[OPTIONS]", *map(argument_name, self.arguments)]

    def get_help(self, ctx: Any) -> str:
        """The help, in which no name is broken at a hyphen."""
        return str(super().get_help(ctx)).replace(_HYPHEN, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write the description."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text((self.help or "").replace("-", _HYPHEN))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example, unwrapped."""
        if self.epilog:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the tables of arguments and options."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            names, meaning = param.get_help_record(ctx) or ("", "")
            meaning = meaning.replace("<=x<=9223372036854775807", "<=x").replace("-", _HYPHEN)
            if param in self.arguments:
                arguments.append((argument_name(param), meaning))
            else:
                names = _CHOICES.sub(r"[\1]", names)
                names = _TYPE.sub(lambda found: VALUES.get(found[1].lower(), found[0]), names)
                options.append((names, meaning))
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _hint(command: Command, option: str, given: list[str]) -> str:
    """What to write in place of the unknown ``option``; empty if nothing is similar."""
    own = {flag.lstrip("-"): flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    name = option.lstrip("-").replace("_", "-").lower()
    meant = [name, *(known for known, others in SYNONYMS.items() if name in others.split())]
    exact = next((known for known in meant if known in own), None)
    if exact is not None:
        return f"Did you mean {own[exact]}?"
    key = KEYS.get(name) if command.name in ("train", "cost") else None
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
    if near and key is None:
        return f"Did you mean {own[near[0]]}?"
    leaf = name.replace("-", "_")
    keys = [key] if key else [k for k in setting_keys(command.name) if k.split(".")[-1] == leaf]
    if not keys:
        return ""
    after = [a for a in given if a == option or a.startswith(f"{option}=")][:1]
    value = after[0].partition("=")[2] if after else ""
    if not value and option in given[:-1] and not given[given.index(option) + 1].startswith("--"):
        value = given[given.index(option) + 1]
    shown = [f"--set {k}={shlex.quote(value) if value else 'VALUE'}" for k in keys[:3]]
    return f"Write {' or '.join(shown)}"


def setting_keys(command: str | None) -> list[str]:
    """Keys that ``--set`` of ``command`` accepts, such as ``optimizer.lr``."""
    found: list[tuple[Any, str]] = []
    if command in ("train", "cost"):
        from ebmkit.models.config import NETWORKS
        from ebmkit.objectives import OBJECTIVES
        from ebmkit.training import TrainConfig

        found = [(TrainConfig, ""), *((network, "model.backbone.") for network in NETWORKS)]
        found += [(own.config, f"objective.{name}.") for name, own in OBJECTIVES.items()]
    elif command == "evaluate":
        from ebmkit.evaluation import SUITES

        found = [(suite.options, f"{name}.") for name, suite in SUITES.items()]
    elif command in ("sample", "restore"):
        from ebmkit.sampling import SAMPLERS

        found = [(sampler.config, "") for sampler in SAMPLERS.values()]
    keys = [key for model, prefix in found if model for key in _keys(model, prefix)]
    return [key for key in dict.fromkeys(keys) if not key.startswith("terms.")]


def _keys(model: Any, prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _sections(function: Callable[..., None]) -> tuple[str, str, str]:
    """Description, example and arguments in the docstring of a command."""
    text, _, arguments = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")
    description, _, example = text.partition("\n\nExample:\n")
    return description, inspect.cleandoc(example), arguments


def example_of(function: Callable[..., None]) -> str:
    """The example of a command: lines for a shell."""
    return _sections(function)[1]


def options_of(function: Callable[..., None]) -> tuple[str, list[inspect.Parameter]]:
    """The description of a command, and its parameters with help from the docstring."""
    description, _, arguments = _sections(function)
    helps = {name: " ".join(text.split()) for name, text in _HELP.findall(arguments)}
    found = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        name, kind, own = parameter.name, parameter.annotation, None
        if get_origin(kind) is Annotated:
            kind, own = get_args(kind)
        flag = name.endswith("_") or (own is None and parameter.default is False)
        if own is None and name not in helps:
            own = SHARED.get(name)  # None only under -OO, which removes docstrings
        if own is None:
            own = Option() if parameter.kind is parameter.KEYWORD_ONLY else Argument()
        own = copy.copy(own)
        own.help = helps.get(name, own.help)
        if name == "set_":
            own.metavar = "KEY=VALUE"
        if flag and not own.param_decls and own.default is ...:  # where Typer stores the first flag
            own.param_decls = (f"--{name.rstrip('_').replace('_', '-')}",)
        found.append(parameter.replace(annotation=Annotated[kind, own]))
    return description, found


def declare(function: Any, parameters: Iterable[inspect.Parameter]) -> None:
    """Set the signature of ``function``, from which Typer reads its options."""
    found = list(parameters)
    function.__signature__ = inspect.Signature(found)
    function.__annotations__ = {p.name: p.annotation for p in found} | {"return": None}


def argument_name(argument: Any) -> str:
    """Format an argument for the usage line: ``RUN``, ``IMAGE...``, ``[ROW]...``."""
    name = argument.metavar if argument.required else f"[{argument.metavar}]"
    return name if argument.nargs == 1 else f"{name}..."
