"""Names imported by Python examples of the documentation exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def imports(page):
    """(module, name) of each import from ebmkit in the page's Python blocks; None for a module."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("ebmkit"):
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((a.name, None) for a in node.names if a.name.startswith("ebmkit"))


@pytest.mark.parametrize("page", [p for p in PAGES if any(imports(p))], ids=lambda p: p.stem)
def test_imports_of_examples_exist(page):
    for module, name in imports(page):
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"from {module} import {name}"
