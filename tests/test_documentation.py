"""The documentation: examples, navigation, values from JSON, formulas, docstrings, options."""

import ast
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ebmkit.experiments.tables import result_table

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


def load(name):
    """The module docs/``name``.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reports_of_committed_results_are_rendered_and_not_typed():
    """Pages of results have their tables from the JSON files that they name."""
    hooks = load("hooks")
    pages = [p for p in (ROOT / "docs" / "results").glob("*.md") if "<!-- report" in p.read_text()]
    assert pages
    for page in pages:
        source = page.read_text()
        shown = hooks.on_page_markdown(source)
        assert "<!--" not in shown, page.name
        assert shown.count("\n## ") > source.count("\n## "), page.name
        assert "\n|" not in source, f"{page.name} has a table of its own"


def test_navigation_reaches_every_page():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    existing = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(existing)


def test_readme_has_the_values_that_the_landing_page_reads():
    """The captions of the images, and the repository of `[project.urls]`."""
    hooks, readme = load("hooks"), (ROOT / "README.md").read_text()
    captions = hooks.strip_caption(), hooks.photograph_caption()
    for expected in (*captions, hooks.repository()):
        assert expected in readme, f"README.md must contain:\n{expected}"


def test_readme_has_the_rows_of_table_3():
    report = json.loads((ROOT / "docs" / "results" / "table3.json").read_text())
    assert "\n".join(result_table(report)) in (ROOT / "README.md").read_text()


def test_formulas_become_mathml():
    page = r'<p><span class="arithmatex">\(a &lt; \log p\)</span></p>'
    page += r'<div class="arithmatex">\[\frac{1}{2}\]</div>'
    shown = load("hooks").on_page_content(page)
    assert shown.count("<math") == shown.count("</math>") == 2
    assert shown.count('display="block"') == 1
    assert "arithmatex" not in shown
    assert "<mfrac>" in shown
    assert "<mi>log</mi><mspace" in shown  # log p, not logp


DOCSTRING = r"""First line with :math:`a
\cdot b`.

.. math::
    c = d
      + e .

Raises:
    UserError: never.

    >>> double(2)   # doctest: +SKIP
    4

>>> 1 + 1
2
"""
MARKDOWN = r"""First line with \(a \cdot b\).

\[ c = d + e . \]

Raises:
    UserError: never.

    ```pycon
    >>> double(2)
    4
    ```

```pycon
>>> 1 + 1
2
```
"""


def test_docstrings_become_markdown():
    assert load("docstrings").to_markdown(DOCSTRING) == MARKDOWN


def test_command_reference_has_types_and_defaults():
    """As in the help: a plain default, one that contains a semicolon, a range, a flag, RUN."""
    lines = load("hooks").command_reference().splitlines()
    cells = {tuple(c.strip() for c in line.strip("| ").split(" | ")) for line in lines}
    found = {(c[0], *c[2:]) for c in cells if len(c) == 4}
    assert ("`-n, --count`", "INTEGER", "64") in found
    assert any(c[0] == "`--sampler`" and c[-1].endswith("sgld for other models") for c in found)
    assert ("`--batch-size`", "INTEGER, `x>=1`", "set by the recipe") in found
    assert ("`--evaluate / --no-evaluate`", "flag", "evaluate") in found
    assert ("`RUN...`", "", "required") in found


@pytest.mark.slow
def test_pages_render_without_network(tmp_path):
    """In a browser: formulas, examples as code, links between objects; nothing is requested."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium")
    docs = tmp_path / "docs"
    docs.mkdir()
    for file in ("hooks.py", "docstrings.py", "stylesheets", "concepts/mathematics.md"):
        source = ROOT / "docs" / file
        (shutil.copytree if source.is_dir() else shutil.copy)(source, docs / source.name)
    (docs / "index.md").write_text("# Start\n\n::: ebmkit.energy\n::: ebmkit.load\n")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text()) | {"strict": False}
    del config["nav"]
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    build = [sys.executable, "-m", "mkdocs", "build", "-q"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=900)
    requested = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.goto(f"file://{tmp_path}/site/mathematics/index.html")
        assert page.locator("math").count() > 30
        assert page.locator("mtable, mfrac, msqrt").first.bounding_box()["height"] > 10
        page.goto(f"file://{tmp_path}/site/index.html")
        assert page.locator("math").count() > 5
        assert page.locator("blockquote").count() == 0
        assert ">>> model" in page.locator("pre", has_text=">>>").first.inner_text()
        assert page.locator("a.autorefs-internal").count() > 5
        browser.close()
    assert all(url.startswith("file:") for url in requested)
