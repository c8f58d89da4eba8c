"""The package has layers: modules import only their own layer and those below, without cycles."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    ("errors", "registry", "randomness", "terminal", "__init__"),
    ("noise", "storage", "metrics"),
    ("distributed", "compute", "card"),
    ("energy", "analytic"),
    ("compile",),
    ("models", "data"),
    ("sampling", "attacks"),
    ("objectives",),
    ("inference", "guidance", "plots"),
    ("training",),
    ("evaluation", "export"),
    ("sampling.jobs", "bench"),
    ("experiments",),
    ("cli", "__main__"),
]
"""From the lowest. Objectives are above samplers, because maximum likelihood samples the model;
sampling jobs are above the runs, guides and metrics that they use."""


@functools.cache
def imports():
    """Module -> the modules of the package that it imports, also for type checkers or in functions.

    `ebmkit/__init__.py` is not read, because it imports public names lazily.
    """
    paths = {_name(path): path for path in (ROOT / "ebmkit").rglob("*.py")}
    found = {"__init__": set()}
    for module, path in paths.items():
        if module == "__init__":
            continue
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ebmkit"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}".removeprefix("ebmkit.")
                    outer = node.module.removeprefix("ebmkit").removeprefix(".") or "__init__"
                    found[module].add(inner if inner in paths else outer)
            elif isinstance(node, ast.Import):
                named = (a.name.removeprefix("ebmkit.") for a in node.names)
                found[module] |= {name for name in named if name in paths}
        found[module].discard(module)
    return found


def _name(path):
    parts = path.relative_to(ROOT / "ebmkit").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _layer(module):
    names = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    while module not in names:
        outer, _, _ = module.rpartition(".")
        assert outer, f"ebmkit/{module}.py stands in no layer: add it to LAYERS"
        module = outer
    return names[module]


def test_a_module_imports_its_own_layer_and_those_below():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if _layer(other) > _layer(module)
    ]
    assert not upward, "\n".join(upward)


def test_there_are_no_import_cycles():
    graph = imports()
    cycles = [sorted(c) for c in _components(graph) if len(c) > 1]
    assert not cycles, "\n".join(map(" <-> ".join, cycles))


def _components(graph):
    """Strongly connected components (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = set()
            while node not in component:
                component.add(stack.pop())
            found.append(component)

    for node in graph:
        if node not in index:
            visit(node)
    return found
