"""Names imported by Python examples of the documentation exist."""

import ast
import importlib
import importlib.util
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


def test_reports_of_committed_results_are_rendered_and_not_typed():
    """Pages of results have their tables from the JSON files that they name."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    pages = [p for p in (ROOT / "docs" / "results").glob("*.md") if "<!-- report" in p.read_text()]
    assert pages
    for page in pages:
        source = page.read_text()
        shown = hooks.on_page_markdown(source)
        assert "<!--" not in shown, page.name
        assert shown.count("\n## ") > source.count("\n## "), page.name
        assert "\n|" not in source, f"{page.name} has a table of its own"
