"""Imports are declared as dependencies, and dependencies are pinned."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
REQUIRED = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
OPTIONAL = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
EXTRA = {canonicalize_name(Requirement(r).name) for r in OPTIONAL}

DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}
"""Modules whose distribution has another name."""

PIN = r"^([\w.-]+)==(\S+)(?: ; .*)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+$"
"""Name, version, and at least one digest."""

OF_TORCH = {"triton"}
"""Installed with PyTorch on some platforms; the package only checks for it."""


@functools.cache
def imported():
    """Each import in the package: its distribution, whether at the top of a module, and where."""
    found = []
    for path in sorted((ROOT / "ebmkit").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            for module in modules(node):
                root = module.split(".")[0]
                if root not in sys.stdlib_module_names and root != "ebmkit":
                    name = canonicalize_name(DISTRIBUTIONS.get(root, root))
                    found.append((name, id(node) in top, str(path.relative_to(ROOT))))
    return found


def modules(node):
    """Modules that a statement imports or checks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.level == 0 else []
    looked_for = ("find_spec", "import_module")
    called = getattr(node, "func", None)  # a name, or an attribute of a module
    if getattr(called, "attr", getattr(called, "id", "")) in looked_for:
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    return []


def test_every_import_is_declared_and_every_dependency_imported():
    from ebmkit.export import ONNX_PACKAGES

    found = imported()
    undeclared = {(n, where) for n, _, where in found if n not in REQUIRED | EXTRA | OF_TORCH}
    assert not undeclared
    names = {name for name, _, _ in found} | set(ONNX_PACKAGES)
    assert (REQUIRED | EXTRA) - names == set()


def test_optional_packages_are_not_imported_at_module_level():
    """All modules can be imported without the extras."""
    assert {(n, where) for n, top, where in imported() if top and n not in REQUIRED} == set()


def test_every_dependency_is_pinned_with_hashes():
    """Pins are within the declared bounds, and the file names no host."""
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    pins = re.findall(PIN, text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE))
    pinned = {}
    for name, version in pins:
        pinned.setdefault(canonicalize_name(name), []).append(version)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *OPTIONAL]):
        versions = pinned[canonicalize_name(requirement.name)]
        assert all(v in requirement.specifier for v in versions), (requirement, versions)


def pins_of(lines):
    """Name -> the exact versions that it is pinned to, with their markers."""
    found = {}
    for requirement in map(Requirement, lines):
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        pins = found.setdefault(canonicalize_name(requirement.name), set())
        pins.add((pin.version, str(requirement.marker or "")))
    return found


def test_a_clone_and_constraints_txt_have_the_same_pins():
    """`.ci/constraints` writes both; pyproject.toml also pins the tools, without hashes."""
    clone = pins_of(PYPROJECT["tool"]["uv"]["constraint-dependencies"])
    lines = re.findall(r"^[\w.-]+==[^\\\n]+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    users = pins_of(lines)
    assert {name: {v for v, _ in clone.get(name, ())} for name in users} == {
        name: {v for v, _ in pins} for name, pins in users.items()
    }
    tools = map(Requirement, PYPROJECT["dependency-groups"]["dev"])
    assert {canonicalize_name(tool.name) for tool in tools} - clone.keys() == set()
    assert {"griffelib", "pluggy", "mkdocs-autorefs"} <= clone.keys()  # dependencies of the tools


def test_newest_versions_are_tried_without_the_pins():
    """uv uses the constraints of the project in its working folder."""
    text = (ROOT / ".ci" / "dependencies").read_text()
    (install,) = re.findall(r"run\(\[\*install.*", text)
    assert "cwd=place" in install
