"""Imports of the package, its public names and its docstring examples."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import ebmkit

HEAVY = ["torchvision", "matplotlib", "foolbox", "sklearn", "torchmetrics", "h5py", "typer"]
MODULES = ["ebmkit", "ebmkit.models"] + [
    info.name
    for package in ("ebmkit", "ebmkit.models")
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    if not info.ispkg and not info.name.endswith("__main__")
]


def test_import_loads_no_heavy_module():
    code = f"""
import sys, ebmkit
print([m for m in {HEAVY} if m in sys.modules])
import ebmkit.plots
print("matplotlib" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == ["[]", "False"], ran.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_correct(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_public_names_exist():
    for name in MODULES:
        module = importlib.import_module(name)
        assert [n for n in getattr(module, "__all__", []) if not hasattr(module, n)] == [], name


def test_a_user_error_is_a_value_error():
    assert issubclass(ebmkit.UserError, ValueError)
