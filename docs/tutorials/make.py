"""Execute the tutorials: of each ``NAME.py``, write ``NAME.md`` with its output, and ``NAME.ipynb``.

    uv run python docs/tutorials/make.py [NAME ...]

The sources are notebooks in jupytext's percent format. ``NAME.md`` is the page of the site: prose,
code, output, and plots as PNG in ``images/``. ``NAME.ipynb`` is for download and has no output.
`tests/test_tutorials.py` checks that all three belong together.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from PIL import Image

FOLDER = Path(__file__).parent
NAMES = ("energies-2d", "train-and-look", "photographs", "robust-and-guided", "your-own-part")
"""The tutorials, in their order."""

COLOURS = 128
"""Number of colours of a plot, so that its file is small."""


def read(name: str) -> nbformat.NotebookNode:
    """The notebook of ``NAME.py``, with the same cell ids each time."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", nbformat.from_dict({})
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 1800) -> None:
    """Run all cells in a new process in ``folder``, which adds their output.

    Raises:
        CellExecutionError: if a cell fails.
    """
    settings = {"timeout": timeout, "kernel_name": "python3", "coalesce_streams": True}
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources, **settings).execute()


def page(notebook: nbformat.NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown page of an executed notebook, and its images by file name."""
    body, resources = MarkdownExporter().from_notebook_node(notebook)
    images = {}
    for number, (key, content) in enumerate(resources["outputs"].items(), 1):
        target = f"{name}-{number}.png"
        body = re.sub(
            rf"!\[[^\]]*\]\({re.escape(key)}\)", f"![Output of the cell](images/{target})", body
        )
        buffer = io.BytesIO()
        picture = Image.open(io.BytesIO(content)).convert("RGB").quantize(COLOURS, dither=0)
        picture.save(buffer, "PNG", optimize=True)
        images[target] = buffer.getvalue()
    body = body.replace("```python\n%%", "``` python\n%%")  # no Python by itself
    link = f"[Download this notebook]({name}.ipynb) · made from [{name}.py]({name}.py)"
    title, _, rest = body.strip().partition("\n")
    lines = [line.rstrip() for line in f"{title}\n\n{link}\n{rest}".splitlines()]
    return "\n".join(lines) + "\n", images


def download(notebook: nbformat.NotebookNode) -> str:
    """The notebook without output, as the text of an ``.ipynb`` file."""
    return str(nbformat.writes(notebook)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    for name in parser.parse_args().names:
        notebook = read(name)
        (FOLDER / f"{name}.ipynb").write_text(download(notebook))
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        text, images = page(notebook, name)
        (FOLDER / f"{name}.md").write_text(text)
        (FOLDER / "images").mkdir(exist_ok=True)
        for old in (FOLDER / "images").glob(f"{name}-*.png"):
            old.unlink()
        for target, content in images.items():
            (FOLDER / "images" / target).write_bytes(content)
        print(f"{name}: {len(images)} images, {sum(map(len, images.values())):,} bytes", flush=True)


if __name__ == "__main__":
    main()
