"""The network and the optimiser step of the recipe search match those of the library."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ebmkit import create_model
from ebmkit.training.optim import orthogonalize

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def search():
    spec = importlib.util.spec_from_file_location("recipe_search", BENCHMARKS / "recipe_search.py")
    module = importlib.util.module_from_spec(spec)
    monkey = pytest.MonkeyPatch()
    monkey.setitem(sys.modules, spec.name, module)  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    monkey.undo()


def gradients(forward, parameters):
    """Parameter gradients of the joint loss in its mean form."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 16, 16, dtype=torch.double, generator=generator)
    eps = torch.randn(x.shape, dtype=torch.double, generator=generator)
    y = (x + 0.1 * eps).requires_grad_()
    logits, density = forward(y)
    (score,) = torch.autograd.grad(density.sum(), y, create_graph=True)
    loss = 2 * (0.1 * score + eps).square().mean() + F.cross_entropy(logits, torch.arange(3))
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(
    ("blocks", "name"), [((1,) * 4, "gradresnet10"), ((2,) * 4, "gradresnet18")]
)
@pytest.mark.parametrize("norm", ["group", "scale"])
def test_network_matches_the_library_up_to_second_derivatives(search, blocks, name, norm):
    ours = search.Net(search.Trial(width=8, blocks=blocks, norm=norm)).double()
    theirs = create_model(name, 10, in_channels=3, width=8, norm=norm).double()
    own = dict(ours.named_parameters())
    names = [
        n.replace("backbone.", "").replace("head.", "").replace("shortcut.0", "project")
        for n, _ in theirs.named_parameters()
    ]
    names = [n.replace("shortcut.1", "project_norm") for n in names]
    assert sorted(names) == sorted(own)
    with torch.no_grad():
        for n, p in zip(names, theirs.parameters(), strict=True):
            p.copy_(own[n])
    expected = gradients(theirs, list(theirs.parameters()))
    found = gradients(ours, [own[n] for n in names])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_orthogonalisation_matches_the_library(search):
    x = torch.randn(3, 6, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(search.orthogonalize(x, 5), orthogonalize(x), rtol=1e-5, atol=1e-5)
