r"""Features of images, and distances between sets of images by them: what IS, FID, KID, precision
and recall are made of, for any network that gives features.

With features :math:`a_1, \dots, a_n` of samples and :math:`b_1, \dots, b_m` of real images, in d
dimensions,

- the *Frechet distance* is that of two Gaussians with their means and covariances,

  .. math:: \|\mu_a - \mu_b\|^2
      + \operatorname{tr}\bigl(\Sigma_a + \Sigma_b - 2(\Sigma_a \Sigma_b)^{1/2}\bigr)

  (Heusel et al., arXiv 1706.08500). Of n samples it is biased upwards by about 1/n, and much so
  where n is not well above d;
- the *kernel distance* is the unbiased estimate of the squared maximum mean discrepancy with
  :math:`k(a, b) = (a^\top b/d + 1)^3` (Binkowski et al., arXiv 1801.01401); above 2000 images the
  mean over ten or more disjoint blocks of up to 1000 of either set. It has mean 0 where the
  distributions are equal, and may be negative;
- *precision* is the share of samples that lie in a ball about a real image, of a radius that
  reaches its third nearest real neighbour, and *recall* the share of real images that lie in such
  balls about samples (Kynkaanniemi et al., arXiv 1904.06991). Both sets are cut to equal numbers;
- the *score* is :math:`\exp \frac1n \sum_i \mathrm{KL}(p(c \mid a_i) \,\|\, \bar p(c))` (Salimans
  et al., arXiv 1606.03498), 1 to the number of classes, over all samples at once.

Everything is computed in float64.

The Inception network is that of torch-fidelity, converted from the TensorFlow weights of 2015 that
FID was defined by: uint8 images, resized to 299x299 as TensorFlow 1 did, features of the last
pooling (2048), logits without bias. Its package is an extra, ``pip install
'ebmkit-vision[generation]'``, and its weights are a file of 95 MB.

Of a classifier, the features are those that its head gets, averaged over positions. What is
measured by it has names of its own, as nothing makes it comparable with another's.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebmkit.compile import unwrapped
from ebmkit.energy import EnergyModel, ScoreModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate
from ebmkit.models import load
from ebmkit.storage.tensors import read_torch_file

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INSTEAD = "or measure by a classifier of your own, --set generation.extractor=RUN"

BLOCK = 1000
"""Features of either set in a block, at most."""

WHOLE = 2000
"""Features of the smaller set, up to which the kernel distance is of all at once."""

NEIGHBOURS = 3
MOST = 10_000
"""Images of either set in precision and recall, at most."""


@dataclass(frozen=True)
class Extractor:
    """A network that images are judged by.

    Attributes:
        kind: ``inception`` or ``classifier``.
        run: name of the classifier's run; "" for Inception.
        names: what its measures are called, by ``frechet``, ``kernel``, ``score``, ``precision``
            and ``recall``.
        extract: images (B, C, H, W) in [0, 1] to ``features`` (B, d) and class ``logits`` (B, C).
        model: the classifier, if it is one.
    """

    kind: str
    run: str
    names: dict[str, str]
    extract: Callable[[Tensor], dict[str, Tensor]]
    model: EnergyModel | None = None


def find_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """``inception``, or the classifier in the run folder ``name``.

    Raises:
        UserError: if there is no such thing, or what it needs is missing.
    """
    if name == "inception":
        return inception(weights, device)
    if weights is not None:
        raise UserError("generation.weights is the file of Inception's: leave it out for a run")
    return classifier(name, device)


def inception(weights: Path | None, device: torch.device) -> Extractor:
    """torch-fidelity's Inception.

    Args:
        weights: its file; None: fetched, or found in PyTorch's cache.
        device: where to put it.

    Raises:
        UserError: if the package is not installed, or there are no weights.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(
            "the Inception network needs the package torch-fidelity, which is not installed: pip "
            f"install 'ebmkit-vision[generation]', {INSTEAD}"
        )
    network = _network(weights).to(device)

    def extract(x: Tensor) -> dict[str, Tensor]:
        pixels = (255 * x).round().clamp(0, 255).byte()
        features, logits = network(pixels.expand(-1, 3, -1, -1))
        return {"features": features.float(), "logits": logits.float()}

    names = {"frechet": "FID", "kernel": "KID", "score": "IS"}
    names |= {name: name for name in ("precision", "recall")}
    return Extractor("inception", "", names, extract)


def classifier(run: str, device: torch.device) -> Extractor:
    """The classifier in the folder ``run``.

    Raises:
        UserError: if there is no run, or its model has no labels or no head.
    """

    model = load(run, device=str(device))
    if not classifies(model):
        raise UserError(
            f"generation.extractor: the model in {run!r} was trained without labels: name a run "
            "with ce in its objective"
        )
    return classifier_of(model, Path(os.path.abspath(run)).name)


def classifier_of(model: EnergyModel, run: str) -> Extractor:
    """The classifier ``model`` of the run called ``run``.

    Raises:
        UserError: if it has no features and head.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, torch.nn.Module):
        raise UserError(
            f"generation.extractor: the model in {run!r} has no features and head: name the run of "
            "a network with a backbone"
        )

    def extract(x: Tensor) -> dict[str, Tensor]:
        inputs: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        try:
            logits = model.energies(x).logits
        finally:
            hook.remove()
        if len(inputs) != 1 or len(inputs[0]) != len(x):
            raise UserError(
                f"generation.extractor: images of {x.shape[-2]}x{x.shape[-1]} are larger than the "
                f"classifier in {run!r} was trained on, and have no one feature there: name another"
            )
        return {"features": inputs[0].float(), "logits": logits.float()}

    names = {"frechet": "FD", "kernel": "KD"}
    names |= {name: name for name in ("score", "precision", "recall")}
    return Extractor(
        "classifier", run, {k: f"classifier-{v}" for k, v in names.items()}, extract, model
    )


def same_weights(extractor: Extractor, model: ScoreModel) -> bool:
    """Whether the classifier is ``model`` itself."""
    if extractor.model is None:
        return False
    own, other = extractor.model.state_dict(), unwrapped(model).state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[k], v) for k, v in other.items())


def _network(weights: Path | None) -> Any:
    """torch-fidelity's network with the weights of the file, or those that it fetches."""
    if weights is not None:
        if not weights.is_file():
            raise UserError(
                f"generation.weights: there is no file {str(weights)!r}; it is {WEIGHTS}"
            )
        state: Any = None
        with contextlib.suppress(UserError):
            state = read_torch_file(weights)
        if not isinstance(state, dict) or "fc.weight" not in state:
            raise UserError(
                f"generation.weights: {str(weights)!r} does not hold the weights of "
                f"torch-fidelity's Inception; they are {WEIGHTS}"
            )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        with contextlib.redirect_stderr(io.StringIO()):  # its download bar
            return FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
    except (OSError, RuntimeError) as error:
        if weights is not None:
            raise UserError(
                f"generation.weights: {str(weights)!r} does not fit torch-fidelity's Inception; "
                f"the file is {WEIGHTS}"
            ) from None
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise UserError(
            f"the weights of the Inception network cannot be fetched ({reason}): get {WEIGHTS} and "
            f"name the file by --set generation.weights=PATH, {INSTEAD}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Between the Gaussians of features ``a`` (n, d) and ``b`` (m, d).

    Of few, the trace of the root is the nuclear norm of :math:`A B^\top`, n by m, with the centred
    features A and B, as :math:`\Sigma_a = A^\top A`.
    """
    if len(a) * len(b) < a.shape[1] ** 2 and min(len(a), len(b)) > 1:
        (mean_a, few), (mean_b, others) = _centred(a), _centred(b)
        inner = torch.linalg.svdvals(few @ others.T).sum()
        spread = few.square().sum() + others.square().sum() - 2 * inner
        return float((mean_a - mean_b).square().sum() + spread)
    (mean_a, root), (mean_b, other) = _moments(a), _moments(b)
    values, axes = torch.linalg.eigh(root)
    root = axes * values.clamp_min(0).sqrt() @ axes.T
    inner = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    spread = values.sum() + other.trace() - 2 * inner
    return float((mean_a - mean_b).square().sum() + spread)


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """The squared MMD of features ``a`` (n, d) and ``b`` (m, d), with its interval.

    The interval is Student's over the blocks or, of all features at once, the jackknife's.
    """
    least = min(len(a), len(b))
    if least <= WHOLE:
        return statistics.jackknife(_mmd, a.double(), b.double())
    count = max(math.ceil(least / BLOCK), 10)
    size = least // count
    blocks = [slice(k * size, (k + 1) * size) for k in range(count)]
    found = statistics.mean(torch.tensor([_mmd(a[s].double(), b[s].double()) for s in blocks]))
    return replace(found, count=least)


def precision_recall(a: Tensor, b: Tensor) -> tuple[Estimate, Estimate]:
    """Precision and recall of samples ``a`` (n, d) against real features ``b`` (m, d).

    Wilson's intervals take the balls as given.

    Raises:
        UserError: if there are too few for a third nearest neighbour.
    """
    count = min(len(a), len(b), MOST)
    if count <= NEIGHBOURS:
        raise UserError(
            f"precision and recall need more than {NEIGHBOURS} samples and real images, and there "
            f"are {len(a)} and {len(b)}: make more"
        )
    a, b = a[:count].double(), b[:count].double()
    return _covered(a, b), _covered(b, a)


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL from the mean of class probabilities, of ``logits`` (n, C)."""
    log_p = logits.double().log_softmax(dim=1)
    mean = log_p.exp().mean(dim=0)
    information = (log_p.exp() * log_p).sum(1).mean() - torch.special.xlogy(mean, mean).sum()
    return float(information.exp())


def mean_distance(a: Tensor) -> float:
    """Mean Euclidean distance of two different ones of features ``a`` (n, d); nan of fewer than
    two."""
    return float(torch.pdist(a.double()).mean()) if len(a) > 1 else math.nan


def _moments(a: Tensor) -> tuple[Tensor, Tensor]:
    a = a.double()
    return a.mean(dim=0), torch.cov(a.T).reshape(a.shape[1], a.shape[1])


def _centred(a: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and what is left of features (n, d), whose squares are the covariance."""
    mean = a.double().mean(dim=0)
    return mean, (a.double() - mean) / math.sqrt(len(a) - 1)


def _mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    if len(a) < 2:
        return math.nan
    return float(off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


def _covered(points: Tensor, centres: Tensor) -> Estimate:
    """The share of ``points`` that lie in the ball of some of ``centres``."""
    # the nearest of all is the centre itself
    radii = torch.cat(
        [d.kthvalue(NEIGHBOURS + 1, dim=1).values for d in _distances(centres, centres)]
    )
    inside = torch.cat([(d <= radii).any(dim=1) for d in _distances(points, centres)])
    return statistics.proportion(int(inside.sum()), len(points))


def _distances(points: Tensor, centres: Tensor) -> Iterator[Tensor]:
    """Euclidean distances to ``centres``, of some points at a time."""
    for at in range(0, len(points), BLOCK):
        yield torch.cdist(points[at : at + BLOCK], centres)
