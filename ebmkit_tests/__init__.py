"""The folder `tests` as a package: ``python -m ebmkit_tests.golden``, ``ebmkit_tests.soak.kills``.

A name of our own, because other distributions install a top-level package called `tests`. The
modules stay in their folder, to which the search path of this package points.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[1] / "tests")]
