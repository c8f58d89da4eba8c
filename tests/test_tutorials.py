"""The tutorials run, and their pages and downloads are those of their sources."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
MOST_BYTES = 150_000  # of an image


@pytest.fixture(scope="module")
def make():
    pytest.importorskip("jupytext")
    pytest.importorskip("nbconvert")
    spec = importlib.util.spec_from_file_location("make_tutorials", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_source_is_a_tutorial(make):
    assert {path.stem for path in FOLDER.glob("*.py")} == {*make.NAMES, "make"}


def test_downloads_are_the_sources(make):
    """`docs/tutorials/make.py` writes them."""
    for name in make.NAMES:
        assert (FOLDER / f"{name}.ipynb").read_text() == make.download(make.read(name)), name


def test_pages_have_the_cells_of_the_sources_in_order(make):
    """`docs/tutorials/make.py` writes them; lines may differ in spaces at their ends."""
    for name in make.NAMES:
        text = re.sub(r"[ \t]+\n", "\n", (FOLDER / f"{name}.md").read_text())
        at = 0
        for cell in make.read(name).cells:
            first, _, rest = cell.source.partition("\n")
            for part in (first, rest) if cell.cell_type == "markdown" else (cell.source,):
                found = text.find(re.sub(r"[ \t]+\n", "\n", part.strip()), at)
                assert found >= 0, f"run docs/tutorials/make.py {name}: {part[:60]!r}"
                at = found


def test_pages_have_their_images_and_no_errors(make):
    named = set()
    for name in make.NAMES:
        text = (FOLDER / f"{name}.md").read_text()
        named |= {*re.findall(r"\(images/(.+?)\)", text)}
        assert "Traceback" not in text
        assert "Warning:" not in text
    assert named == {path.name for path in (FOLDER / "images").iterdir()}
    assert max(path.stat().st_size for path in (FOLDER / "images").iterdir()) <= MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["energies-2d", "train-and-look", "photographs", "robust-and-guided", "your-own-part"]
)
def test_tutorial_runs(make, name, tmp_path):
    """In a folder of its own, without a warning."""
    notebook = make.read(name)
    make.execute(notebook, tmp_path)
    streams = [
        one["text"]
        for cell in notebook.cells
        for one in cell.get("outputs", ())
        if one.get("name") == "stderr"
    ]
    assert not streams
