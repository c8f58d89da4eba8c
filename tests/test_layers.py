"""Modules import only their own layer and those below, without cycles; few differentiate."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    ("errors", "registry", "randomness", "synonyms", "terminal", "__init__"),
    ("noise", "storage", "metrics"),
    ("distributed", "compute", "card", "blind", "class_gaussians", "hub", "pretrained"),
    ("inputs",),
    ("energy", "analytic"),
    ("compile",),
    ("models.*", "data"),
    ("models.heads", "models.joint"),
    ("models.config", "models.saving", "models.importing", "models.pipelines", "models"),
    ("models.initial",),
    ("sampling", "attacks"),
    ("objectives",),
    ("inference", "guidance", "likelihood", "plots"),
    ("training",),
    ("evaluation", "export"),
    ("sampling.jobs", "bench", "report", "demo"),
    ("experiments",),
    ("cli", "__main__"),
]
"""From the lowest; the most specific name of a module counts, where ``models.*`` are the modules in
``models`` without a name of their own. Objectives are above samplers, because maximum likelihood
samples the model; sampling jobs are above the runs, guides and metrics that they use."""

DIFFERENTIATING = {
    "energy",  # all derivatives by images
    "models.recompute",  # the vector-Jacobian product of a block that is run again
    "training.step",  # the gradient of the loss by the parameters
    "training.cost",  # the same, of a step on fake tensors
    "training.nonfinite",  # the same, to find the loss and parameters with NaN or Inf
    "bench",  # the plain PyTorch step that ours is compared with
    "experiments.theory.fits",  # derivatives of risks by parameters, without a network
}
"""The modules that call PyTorch's differentiation."""

DERIVATIVE = re.compile(
    r"torch\.autograd\.(grad$|backward|functional)|torch\.func\.(grad|vjp|jvp|jac|hess|linearize)"
)


@functools.cache
def nodes():
    """Module -> all nodes of its syntax tree."""
    paths = (ROOT / "ebmkit").rglob("*.py")
    return {_name(path): list(ast.walk(ast.parse(path.read_text()))) for path in paths}


@functools.cache
def imports():
    """Module -> the modules of the package that it imports, also for type checkers or in functions.

    `ebmkit/__init__.py` is not read, because it imports public names lazily.
    """
    paths = nodes()
    found = {"__init__": set()}
    for module, tree in paths.items():
        if module == "__init__":
            continue
        found[module] = set()
        for node in tree:
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
    found, outer = names.get(module), module
    while found is None:
        outer, _, _ = outer.rpartition(".")
        assert outer, f"ebmkit/{module}.py stands in no layer: add it to LAYERS"
        found = names.get(f"{outer}.*", names.get(outer))
    return found


def test_a_module_imports_its_own_layer_and_those_below():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in sorted(others)
        if _layer(other) > _layer(module)
    ]
    assert not upward, "\n".join(upward)


def test_only_the_command_line_imports_names_of_the_package_itself():
    """The lazy names of ``ebmkit`` are of any layer; the command line reads the version."""
    found = {module for module, others in imports().items() if "__init__" in others}
    assert found <= {"cli.app"}


def test_only_listed_modules_differentiate():
    found = {module for module, tree in nodes().items() if any(map(_differentiates, tree))}
    assert found == DIFFERENTIATING


def _differentiates(node):
    """Whether ``node`` calls or imports a function of PyTorch that differentiates."""
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        # of a module under a name of its own, the functions would go unseen
        return any(map(DERIVATIVE.match, names)) or bool(names & {"torch.autograd", "torch.func"})
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
    return torch and bool(DERIVATIVE.match(ast.unparse(node)))


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
