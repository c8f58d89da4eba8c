"""Registries of named components, and plugins: Python files that register custom components.

Registries are dictionaries, defined next to their components. `ebmkit list` and the tests iterate
over them, so every registered component is tested. A plugin registers its components when it is
imported, with one line each::

    from ebmkit.objectives import OBJECTIVES
    OBJECTIVES["huber"] = Objective(...)

Only the user names plugins: ``--plugin my_parts.py`` on the command line,
``ebmkit.load(run, plugins=["my_parts.py"])`` in Python. A plugin can also be an installed module or
an entry point in the group ``ebmkit.plugins``: a module, or a function ``module:function`` that
registers components when it is called without arguments. A run records its plugins and the SHA-256
of their files. If one is not loaded, an error names it. Plugins are never imported automatically,
so a downloaded run cannot execute code. The registrations of a plugin that fails are undone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ebmkit.errors import UserError, shown, unknown_name, validated

C = TypeVar("C", bound=BaseModel, covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Preset(Generic[C]):
    """A named configuration with a one-line description."""

    config: C
    description: str


_ADDED: list[tuple[dict[str, Any], str]] = []
"""Table and name of each registration by a plugin or user, oldest first."""


class Table(dict[str, T]):
    """Registry: components of one ``kind`` by name. Existing names cannot be replaced.

    A plugin adds a component by ``TABLE["name"] = component``.
    """

    def __init__(self, kind: str, parts: Mapping[str, T]) -> None:
        super().__init__(parts)
        self.kind = kind

    def __setitem__(self, name: str, part: T) -> None:
        """Add a component.

        Raises:
            UserError: if the name exists.
        """
        if name in self:
            raise UserError(f"there is a {self.kind} {name!r} already: choose another name")
        record_addition(self, name)
        super().__setitem__(name, part)


def record_addition(table: dict[str, Any], name: str) -> None:
    """Have entry ``name`` of ``table`` removed if the plugin that is being imported fails."""
    _ADDED.append((table, name))


def find(kind: str, table: dict[str, T], name: str) -> T:
    """The entry of ``table`` called ``name``.

    Raises:
        UserError: if there is none, with the most similar name.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    return table[name]


GROUP = "ebmkit.plugins"
"""Entry point group for plugins of installed packages."""

NAME = r"^[\w.-]{1,100}$"
"""Pattern of the names of plugins."""


class Plugin(BaseModel):
    """Record of a plugin that a run was trained with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME)
    """Name of the file without ``.py``, of the module or of the entry point."""
    sha256: str = ""
    """SHA-256 of its file; empty for a plugin without a single file."""


class _Recorded(BaseModel):
    plugins: tuple[Plugin, ...]


_LOADED: dict[str, Plugin] = {}


def loaded_plugins() -> tuple[Plugin, ...]:
    """The plugins of this process, in the order of loading."""
    return tuple(_LOADED.values())


def load_plugin(named: str | os.PathLike[str]) -> Plugin:
    """Import the plugin ``named``, unless it is already loaded.

    Args:
        named: Python file, installed module, or entry point of the group `GROUP`.

    Raises:
        UserError: if there is no such plugin, its name is illegal, its import fails (what it has
            registered is then removed), or another plugin of the same name is loaded.
    """
    text = str(named)
    path = Path(text)
    is_file = text.endswith(".py")
    if is_file and not path.is_file():
        raise UserError(f"there is no plugin file {shown(text)}: name a Python file")
    name, plugin = path.stem if is_file else text, None
    if re.fullmatch(NAME, name) is None:
        raise UserError(
            f"plugin {shown(text)} cannot be recorded by this name: use 1 to 100 letters, digits, "
            "'_', '-' and '.', as in my_parts.py"
        )
    if is_file:
        plugin = Plugin(name=name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    if (old := _LOADED.get(name)) is not None:
        if plugin is not None and plugin != old:
            raise UserError(
                f"another plugin called {name!r} is already loaded: rename the file {text!r}"
            )
        return old
    start, modules, loaded = len(_ADDED), set(sys.modules), set(_LOADED)
    try:
        module = _import_file(path) if plugin is not None else _import_name(name)
    except BaseException as error:
        while len(_ADDED) > start:
            table, added = _ADDED.pop()
            table.pop(added, None)
        for nested in _LOADED.keys() - loaded:
            del _LOADED[nested]
        for new in sys.modules.keys() - modules:  # to be executed again at the next attempt
            if new.partition(".")[0] == name.partition(".")[0]:
                sys.modules.pop(new)
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            raise
        raise UserError(
            f"plugin {shown(text)} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return _LOADED.setdefault(name, plugin or Plugin(name=name, sha256=_digest(module)))


def check_plugins(recorded: Any, where: str) -> None:
    """Check that the plugins that a run was trained with are loaded; warn if their files changed.

    Args:
        recorded: plugins recorded in the run's files.
        where: name of the run, for messages.

    Raises:
        UserError: if a plugin is not loaded, or ``recorded`` is not a list of plugins.
    """
    recorded = validated(_Recorded, {"plugins": recorded}, f"the plugins of {where}").plugins
    missing = [plugin.name for plugin in recorded if plugin.name not in _LOADED]
    if missing:
        files = " ".join(f"--plugin {name}.py" for name in missing)
        one = len(missing) == 1
        raise UserError(
            f"{where} needs the plugin{'' if one else 's'} {' and '.join(map(repr, missing))}, "
            f"which {'is' if one else 'are'} not loaded: add {files}, with the path where the file "
            "lies now (from Python: plugins=[...]), if you trust it; it is not part of the run"
        )
    for plugin in recorded:
        if plugin.sha256 != _LOADED[plugin.name].sha256:
            warnings.warn(
                f"plugin {plugin.name!r} is not the file that {where} was trained with: results "
                "may differ",
                stacklevel=3,
            )


def _import_file(path: Path) -> ModuleType:
    """Import the file ``path`` as a module; from then on it can be imported by name."""
    if path.stem in sys.modules:
        raise UserError(
            f"plugin {str(path)!r} has the name of a module that is imported already: rename it"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _import_name(name: str) -> ModuleType:
    """Import the entry point called ``name``, or else the module of that name.

    An entry point ``module:function`` is called.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name in points:
        return _import_entry_point(points[name])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        known = f"; entry points installed: {', '.join(sorted(points))}" if points else ""
        raise UserError(
            f"there is no plugin {shown(name)}: name a Python file, as in my_parts.py, an "
            f"installed module, or an entry point of the group {GROUP}{known}"
        ) from None


def _import_entry_point(point: EntryPoint) -> ModuleType:
    is_new = point.module not in sys.modules
    try:
        register = point.load()
        if point.attr and not callable(register):
            raise UserError(
                f"entry point {point.name!r} of the group {GROUP} is {shown(point.value)}, which "
                "is no function: name a module, or a function without arguments"
            )
        if point.attr:
            register()
    except BaseException:
        if is_new:  # to be executed again at the next attempt
            sys.modules.pop(point.module, None)
        raise
    return sys.modules[point.module]


def _digest(module: ModuleType) -> str:
    path = getattr(module, "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def load_plugins(named: Sequence[str | os.PathLike[str]]) -> None:
    """Call `load_plugin` for each of ``named``."""
    for name in named:
        load_plugin(name)
