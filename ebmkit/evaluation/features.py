r"""Metrics that compare samples with real images in the feature space of any network: FID, KID, IS,
precision and recall or their analogues, in total and by label.

With features :math:`a_1, \dots, a_n` of samples and :math:`b_1, \dots, b_m` of real images, in d
dimensions,

- the *Frechet distance* is that of two Gaussians with the features' means and covariances,

  .. math:: \|\mu_a - \mu_b\|^2
      + \operatorname{tr}\bigl(\Sigma_a + \Sigma_b - 2(\Sigma_a \Sigma_b)^{1/2}\bigr)

  (Heusel et al., arXiv 1706.08500). It has an upward bias of about 1/n, large unless n is well
  above d;
- the *kernel distance* is the unbiased estimate of the squared maximum mean discrepancy (MMD) with
  :math:`k(a, b) = (a^\top b/d + 1)^3` (Binkowski et al., arXiv 1801.01401). Above 2000 images it is
  the mean over ten or more disjoint blocks of at most 1000 images per set. It has mean 0 if the
  distributions are equal, and may be negative;
- *precision* is the share of samples within a ball around a real image whose radius is the distance
  to its third nearest real neighbour. *Recall* is the share of real images within such balls around
  samples (Kynkaanniemi et al., arXiv 1904.06991). Both sets are cut to the same size;
- the *score* is :math:`\exp \frac1n \sum_i \mathrm{KL}(p(c \mid a_i) \,\|\, \bar p(c))` (Salimans
  et al., arXiv 1606.03498), from 1 to the number of classes, over all samples at once.

All computations are in float64.

The Inception network is torch-fidelity's, converted from the TensorFlow weights of 2015 that define
FID: uint8 images, resized to 299x299 as in TensorFlow 1, features of the last pooling (2048),
logits without bias. The package is an extra, ``pip install 'ebmkit-vision[generation]'``; its
weights are 95 MB. The features of a classifier are the inputs of its head, averaged over positions.
Its metrics have their own names: they are comparable only for one classifier.

`measure_guided` computes for samples of given labels, in total and by label:

- ``accuracy``: the share of samples that the extractor classifies as the requested label, with
  Wilson's interval;
- ``frechet`` and ``kernel``: the distances between samples and real images of one label. ``floor``
  is the distance of the same number of other real images of that label (``count`` if there are
  fewer);
- *diversity*: the mean feature distance between two samples divided by that between two real images
  of the label;
- *saturation*: ``ends``, the share of pixel values of at most 1/255 or at least 254/255, and, for
  colour images, ``colour``, the mean HSV saturation :math:`(\max - \min)/\max` over the channels.
  Both are means over images. Floats are first rounded to 255ths, like real images;
- *energy gap*: the mean energy of the samples under a model minus that of real images of the same
  label, in nats; far below 0 in RCG section 4.8. In total each sample is compared with its own
  label, so the number of samples per label does not matter. Intervals are Welch's for one label;
  over all labels Student's of the samples, with the error of the real means added.

Without labels, all images form one class, and there are no values by class.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebmkit.compile import device_of
from ebmkit.data import ImageSet
from ebmkit.energy import EnergyModel, classifies
from ebmkit.errors import UserError
from ebmkit.evaluation import statistics
from ebmkit.evaluation.statistics import Estimate, to_json
from ebmkit.evaluation.suite import Images
from ebmkit.metrics import predict
from ebmkit.models import load
from ebmkit.models.heads import EnergySource, LogitEnergy, energy_source
from ebmkit.storage.tensors import read_torch_file

KINDS = ("frechet", "kernel", "score", "precision", "recall")

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
ALTERNATIVE_HINT = "or use your own classifier, --set generation.extractor=RUN"

BLOCK = 1000
"""Maximum number of features per set in a block."""

MAX_UNBLOCKED = 2000
"""Size of the smaller set up to which the kernel distance is computed without blocks."""

NEIGHBOURS = 3
MAX_PRECISION_RECALL = 10_000
"""Maximum number of images per set for precision and recall."""

MAX_PAIRWISE = 1000
"""Maximum number of real images per label for mean distances."""

MAX_INTERVAL_FEATURES = 512
"""Maximum feature dimension for an interval of the Frechet distance (20 evaluations)."""

Columns = dict[str, Tensor]


@dataclass(frozen=True)
class Extractor:
    """A network that computes features and class logits of images.

    Attributes:
        kind: ``inception`` or ``classifier``.
        run: name of the classifier's run; "" for Inception.
        names: names of its metrics, by `KINDS`.
        extract: maps images (B, C, H, W) in [0, 1] to ``features`` (B, d) and class ``logits``
            (B, K).
        model: the classifier; None for Inception.
    """

    kind: str
    run: str
    names: dict[str, str]
    extract: Callable[[Tensor], dict[str, Tensor]]
    model: EnergyModel | None = None


def find_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """Return the extractor ``inception``, or the classifier in the run folder ``name``.

    Raises:
        UserError: if the run, the package torch-fidelity or the weights are missing.
    """
    if name == "inception":
        return inception(weights, device)
    if weights is not None:
        raise UserError("generation.weights is only for Inception: leave it out for a run")
    return classifier(name, device)


def inception(weights: Path | None, device: torch.device) -> Extractor:
    """Load torch-fidelity's Inception network.

    Args:
        weights: path of the weights; None: PyTorch's cache, or a download.
        device: device of the network.

    Raises:
        UserError: if the package is not installed, or the weights cannot be loaded.
    """
    if find_spec("torch_fidelity") is None:
        raise UserError(
            "the Inception network needs the package torch-fidelity, which is not installed: pip "
            f"install 'ebmkit-vision[generation]', {ALTERNATIVE_HINT}"
        )
    wrong = UserError(
        f"generation.weights: {str(weights)!r} does not hold the weights of torch-fidelity's "
        f"Inception; they are {INCEPTION_URL}"
    )
    if weights is not None:
        if not weights.is_file():
            raise UserError(
                f"generation.weights: there is no file {str(weights)!r}; it is {INCEPTION_URL}"
            )
        state: Any = None
        with contextlib.suppress(UserError):
            state = read_torch_file(weights)
        if not isinstance(state, dict) or "fc.weight" not in state:
            raise wrong
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)
        with contextlib.redirect_stderr(io.StringIO()):  # its download bar
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
    except (OSError, RuntimeError) as error:
        if weights is not None:
            raise wrong from None
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise UserError(
            f"the weights of the Inception network cannot be fetched ({reason}): get "
            f"{INCEPTION_URL} and name the file by --set generation.weights=PATH, "
            f"{ALTERNATIVE_HINT}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    network.to(device)

    def extract(x: Tensor) -> dict[str, Tensor]:
        pixels = (255 * x).round().clamp(0, 255).byte()
        features, logits = network(pixels.expand(-1, 3, -1, -1))
        return {"features": features.float(), "logits": logits.float()}

    names = dict(zip(KINDS, ("FID", "KID", "IS", "precision", "recall"), strict=True))
    return Extractor("inception", "", names, extract)


def cached_inception() -> Path | None:
    """File of the Inception weights that an earlier use downloaded; None without it or without
    torch-fidelity."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(INCEPTION_URL).name
    return path if find_spec("torch_fidelity") is not None and path.is_file() else None


def classifier(run: str, device: torch.device) -> Extractor:
    """Load the classifier in the run folder ``run``.

    Raises:
        UserError: if there is no such run, or its model has no labels or no head.
    """
    model = load(run, device=str(device))
    if not classifies(model):
        raise UserError(
            f"generation.extractor: the model in {run!r} was trained without labels: name a run "
            "with ce in its objective"
        )
    return classifier_of(model, Path(os.path.abspath(run)).name)


def classifier_of(model: EnergyModel, run: str) -> Extractor:
    """Wrap the classifier ``model`` of the run named ``run``.

    Raises:
        UserError: if it has no head.
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
                f"training images of the classifier in {run!r}: name a classifier for this size"
            )
        return {"features": inputs[0].float(), "logits": logits.float()}

    names = zip(KINDS, ("FD", "KD", "score", "precision", "recall"), strict=True)
    return Extractor(
        "classifier", run, {kind: f"classifier-{n}" for kind, n in names}, extract, model
    )


# --- distances between sets of features -----------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Frechet distance of features ``a`` (n, d) and ``b`` (m, d); nan for fewer than two.

    With factors :math:`\Sigma_a = A^\top A` and :math:`\Sigma_b = B^\top B`, the trace of
    :math:`(\Sigma_a \Sigma_b)^{1/2}` is the nuclear norm of :math:`A B^\top`.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    (mean_a, root_a), (mean_b, root_b) = _moments(a.double()), _moments(b.double())
    inner = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * inner
    return float((mean_a - mean_b).square().sum() + spread)


def _moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and a factor of the covariance with at most d rows."""
    mean = a.mean(dim=0)
    centred = (a - mean) / math.sqrt(len(a) - 1)
    return mean, centred if len(a) <= a.shape[1] else torch.linalg.qr(centred, mode="r").R


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """`frechet_distance`; with an interval if d <= `MAX_INTERVAL_FEATURES` or if sets are small."""
    if a.shape[1] <= MAX_INTERVAL_FEATURES or len(a) * len(b) < a.shape[1] ** 2 / 10:
        return statistics.jackknife(frechet_distance, a, b, lowest=0.0)
    return statistics.without_interval(frechet_distance(a, b), len(a))


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """Squared MMD of features ``a`` (n, d) and ``b`` (m, d) with its interval; nan for fewer than
    two.

    The interval is Student's over blocks or, without blocks, the jackknife's.
    """
    least = min(len(a), len(b))
    if least <= MAX_UNBLOCKED:
        return statistics.jackknife(_mmd, a.double(), b.double())
    count = max(math.ceil(least / BLOCK), 10)
    size = least // count
    blocks = [slice(k * size, (k + 1) * size) for k in range(count)]
    found = statistics.mean(torch.tensor([_mmd(a[s].double(), b[s].double()) for s in blocks]))
    return replace(found, count=least)


def _mmd(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    if min(len(a), len(b)) < 2:
        return math.nan
    return float(off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())


def precision_recall(a: Tensor, b: Tensor) -> tuple[Estimate, Estimate]:
    """Precision and recall of samples' features ``a`` (n, d) against real features ``b`` (m, d).

    Wilson's intervals treat the balls as fixed.

    Raises:
        UserError: if there are too few images for a third nearest neighbour.
    """
    count = min(len(a), len(b), MAX_PRECISION_RECALL)
    if count <= NEIGHBOURS:
        raise UserError(
            f"precision and recall need more than {NEIGHBOURS} samples and real images, and there "
            f"are {len(a)} and {len(b)}: make more"
        )

    def covered(points: Tensor, centres: Tensor) -> Estimate:
        near, far = (
            (torch.cdist(part, centres) for part in torch.split(whole, BLOCK))
            for whole in (centres, points)
        )
        # the nearest neighbour is the centre itself
        radii = torch.cat([d.kthvalue(NEIGHBOURS + 1, dim=1).values for d in near])
        return statistics.accuracy(torch.cat([(d <= radii).any(dim=1) for d in far]))

    a, b = a[:count].double(), b[:count].double()
    return covered(a, b), covered(b, a)


def inception_score(logits: Tensor) -> float:
    """Inception score of ``logits`` (n, K): exp of the mean KL divergence of the class
    probabilities from their mean."""
    log_p = logits.double().log_softmax(dim=1)
    mean = log_p.exp().mean(dim=0)
    information = (log_p.exp() * log_p).sum(1).mean() - torch.special.xlogy(mean, mean).sum()
    return float(information.exp())


def mean_distance(a: Tensor) -> float:
    """Mean Euclidean distance of pairs of features ``a`` (n, d); nan for fewer than two."""
    return float(torch.pdist(a.double()).mean()) if len(a) > 1 else math.nan


# --- comparison of samples with real images -------------------------------------------------------


class FeatureColumns(NamedTuple):
    """Columns with one entry per image, and the labels (N,) or None."""

    columns: Columns
    labels: Tensor | None

    def among(self, labels: Tensor | None) -> FeatureColumns:
        """Return the images whose label is in ``labels``; all if either is None."""
        if self.labels is None or labels is None:
            return self
        own = torch.isin(self.labels, labels)
        return FeatureColumns({name: c[own] for name, c in self.columns.items()}, self.labels[own])


def measure_guided(
    samples: Tensor,
    labels: Tensor | None,
    real: Images,
    extractor: Extractor,
    energy_model: EnergyModel | None = None,
    *,
    others: Images | None = None,
    source: EnergySource = "auto",
    batch_size: int = 250,
    device: torch.device | str | None = None,
    by_image: bool = False,
) -> dict[str, Any]:
    """Compute the metrics of the module docstring for samples of given labels.

    Args:
        samples: (N, C, H, W), uint8 or floats in [0, 1] (clipped and rounded to 255ths).
        labels: requested labels (N,), or None.
        real: real images of the same shape, with labels if the samples have labels.
        extractor: feature extractor, from `find_extractor` or `classifier_of`.
        energy_model: model of the energies; None: no energy gap.
        others: other real images for the floor, ideally as many per label as there are samples;
            None: halves of ``real``.
        source: source of the energies; see `ebmkit.models.heads`.
        batch_size: images per batch.
        device: device of extractor and model; None: the classifier's, or the CPU.
        by_image: whether to return values by sample.

    Returns:
        A dictionary for JSON. Estimates are ``{"value", "low", "high", "count"}`` with 95 %
        intervals, None where undefined. Entries: ``count`` and ``real_count``, the numbers of
        samples and of real images of their labels; in total ``accuracy`` (None without labels, or
        if the extractor has other classes), ``frechet``, ``kernel``, ``floor`` (``count``,
        ``frechet``, ``kernel``), ``saturation`` (``ends``, and ``colour``, None for gray images,
        each with ``samples`` and ``real``) and ``energy_gap`` (``energy``, and ``joint_energy`` of
        E(x, y), None without labels of the model; None without a model); ``means`` and
        ``classes``, from `class_means` and `by_class`, None without labels. With ``by_image``, the
        entry ``by_image`` has lists of length N: ``accuracy`` (whether the label is recognised),
        ``ends`` and ``energy``, each only if its mean exists.

    Raises:
        UserError: if shapes or labels do not match, or a sample has NaN or Inf.
    """
    pixels, labels = _checked(samples, labels, real)
    device = device or ("cpu" if extractor.model is None else device_of(extractor.model))

    def features(images: Images, own: Tensor | None) -> FeatureColumns:
        with torch.no_grad():
            rows = [
                columns_of_images(x.to(device), extractor, energy_model, real.num_classes, source)
                for x, _ in images.batches(batch_size)
            ]
        joined = {name: torch.cat([row[name].cpu() for row in rows]) for name in rows[0]}
        return FeatureColumns(joined, None if own is None else own.cpu())

    made, known = features(ImageSet(pixels), labels), features(real, real.labels)
    baseline = None if others is None else features(others, others.labels)
    judged = extractor.model is not None and extractor.model.num_classes == real.num_classes
    same = known.among(labels)
    classes = None
    if labels is not None:
        classes = by_class(made, known, baseline, real.class_names, judged)
    document: dict[str, Any] = to_json(
        {
            "count": len(pixels),
            "real_count": len(same.columns["features"]),
            **_compared(made, same, None if baseline is None else baseline.among(labels), judged),
            "means": None if classes is None else class_means(classes),
            "classes": classes,
        }
    )
    if by_image:
        values = {n: column for n, column in made.columns.items() if n in ("ends", "energy")}
        if judged and labels is not None:
            values["accuracy"] = _recognised(made, labels)
        document["by_image"] = to_json({n: column.tolist() for n, column in values.items()})
    return document


def _recognised(samples: FeatureColumns, labels: Tensor) -> Tensor:
    """Whether each sample is classified as its label, (N,)."""
    return predict(samples.columns["logits"]) == labels


def _checked(samples: Tensor, labels: Tensor | None, real: Images) -> tuple[Tensor, Tensor | None]:
    """Return ``samples`` as uint8, and ``labels`` as int64 on the CPU."""
    if samples.ndim != 4 or not len(samples):
        raise UserError(
            f"samples must be (N, C, H, W) with N of 1 or more, not {tuple(samples.shape)}"
        )
    if bad := int((~samples.isfinite().flatten(1).all(dim=1)).sum()):
        raise UserError(f"{bad} of {len(samples)} samples have NaN or Inf: remove them")
    if samples.dtype != torch.uint8:
        samples = (255 * samples.clamp(0, 1)).round().byte()
    own, shape = tuple(samples.shape[1:]), (real.channels, *real.image_size)
    if own != shape:
        raise UserError(
            f"samples of shape {own} cannot be compared with images of {shape} "
            f"({real.name!r}): use a data set of the same shape"
        )
    if labels is None:
        return samples, None
    labels = labels.cpu().long()
    if labels.shape != (len(samples),):
        raise UserError(
            f"{len(samples)} samples need {len(samples)} labels, not {tuple(labels.shape)}"
        )
    if real.labels is None:
        raise UserError(
            f"the samples have labels and data set {real.name!r} has none: compare with a labelled "
            "one, or leave the labels out"
        )
    if missing := sorted(set(labels.tolist()) - set(real.labels.tolist())):
        raise UserError(
            f"data set {real.name!r} has no image of label {missing[0]}, which some samples have: "
            "use more images, or remove these samples"
        )
    return samples, labels


def by_class(
    samples: FeatureColumns,
    real: FeatureColumns,
    others: FeatureColumns | None,
    names: Sequence[str],
    judged: bool,
) -> list[dict[str, Any]]:
    """Compute the metrics of each label of the samples.

    Args:
        samples: columns of `columns_of_images`, with labels.
        real: the same of real images.
        others: the same of other real images, for the floor; None: halves of ``real``.
        names: class names.
        judged: whether the extractor has these classes.

    Returns:
        Per label ``label``, ``name``, the metrics of `measure_guided` (as `Estimate`), and the
        number ``diversity`` with ``diversity_interval``, which covers only the choice of samples.
    """
    assert samples.labels is not None
    found = []
    for label in torch.unique(samples.labels).tolist():
        own = torch.tensor(label)
        made, known = samples.among(own), real.among(own)
        baseline = None if others is None else others.among(own)
        spread = mean_distance(known.columns["features"][:MAX_PAIRWISE])

        def ratio(features: Tensor, spread: float = spread) -> float:
            return mean_distance(features) / spread if spread else math.nan

        diversity = statistics.jackknife(ratio, made.columns["features"], lowest=0.0)
        found.append(
            {
                "label": label,
                "name": names[label] if label < len(names) else str(label),
                "count": len(made.columns["features"]),
                "real_count": len(known.columns["features"]),
                **_compared(made, known, baseline, judged),
                "diversity": diversity.value,
                "diversity_interval": (diversity.low, diversity.high),
            }
        )
    return found


def class_means(classes: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of ``frechet``, ``kernel``, ``floor`` (its Frechet distance) and ``diversity`` over the
    entries of `by_class`, ignoring nan; nan if all are nan."""
    rows = [
        (c["frechet"].value, c["kernel"].value, c["floor"]["frechet"], c["diversity"])
        for c in classes
    ]
    means = torch.tensor(rows, dtype=torch.float64).nanmean(dim=0).tolist()
    return dict(zip(("frechet", "kernel", "floor", "diversity"), means, strict=True))


def _compared(
    samples: FeatureColumns, real: FeatureColumns, others: FeatureColumns | None, judged: bool
) -> dict[str, Any]:
    """Compute the metrics that are both in total and by label; see `measure_guided`."""
    made, known = samples.columns["features"], real.columns["features"]
    baseline, against = known[::2], known[1::2]
    if others is not None:
        baseline, against = others.columns["features"], known
    baseline = baseline[: len(made)]
    accuracy = None
    if judged and samples.labels is not None:
        accuracy = statistics.accuracy(_recognised(samples, samples.labels))
    return {
        "accuracy": accuracy,
        "frechet": frechet(made, known),
        "kernel": kernel_distance(made[:MAX_UNBLOCKED], known[:MAX_UNBLOCKED]),
        "floor": {
            "count": len(baseline),
            "frechet": frechet_distance(baseline, against),
            "kernel": kernel_distance(baseline[:MAX_UNBLOCKED], against[:MAX_UNBLOCKED]).value,
        },
        "saturation": saturation(samples.columns, real.columns),
        "energy_gap": energy_gap(samples, real),
    }


def columns_of_images(
    x: Tensor,
    extractor: Extractor,
    energy_model: EnergyModel | None,
    num_classes: int,
    source: EnergySource = "auto",
) -> Columns:
    """Columns (B, ...) of images ``x`` (B, C, H, W) in [0, 1], from which metrics are computed.

    ``features`` and ``logits`` of the extractor; those of `pixel_columns`; from the model
    ``energy`` E(x) in nats and, if it has ``num_classes`` labels, ``log_posterior``.
    """
    columns = extractor.extract(x) | pixel_columns(x)
    if energy_model is not None:
        if energy_source(energy_model, source) == "logits":
            energy_model = LogitEnergy(energy_model)
        found = energy_model.energies(x, 0.0)
        columns["energy"] = -found.log_density
        if num_classes and found.logits.shape[1] == num_classes:
            columns["log_posterior"] = found.log_posterior()
    return columns


def pixel_columns(x: Tensor) -> Columns:
    """``ends`` and, for colour images, ``colour`` of ``x`` (B, C, H, W) in [0, 1]; each (B,)."""
    values = (255 * x).round()
    columns = {"ends": ((values <= 1) | (values >= 254)).float().flatten(1).mean(dim=1)}
    if x.shape[1] == 3:
        high, low = x.amax(dim=1), x.amin(dim=1)
        share = torch.where(high > 0, (high - low) / high.clamp_min(1e-12), 0.0)
        columns["colour"] = share.flatten(1).mean(dim=1)
    return columns


def saturation(samples: Columns, real: Columns) -> dict[str, Any]:
    """Means of ``ends`` and ``colour`` (None for gray images) over ``samples`` and ``real``."""
    return {
        name: {
            k: statistics.bounded_mean(v[name]) for k, v in (("samples", samples), ("real", real))
        }
        if name in samples
        else None
        for name in ("ends", "colour")
    }


def energy_gap(samples: FeatureColumns, real: FeatureColumns) -> dict[str, Any] | None:
    """``energy`` and ``joint_energy``: mean of the samples minus that of real images by label.

    Without labels, all images form one class. None without energies; ``joint_energy`` is None
    without labels of the model.
    """
    (made, requested), (known, labels) = samples, real
    if "energy" not in made:
        return None
    labelled = requested is not None and labels is not None
    if requested is None or labels is None:
        requested, labels = (
            torch.zeros(len(c["energy"]), dtype=torch.int64) for c in (made, known)
        )
    joint = None
    if labelled and "log_posterior" in made:
        a, b = (
            c["energy"] - c["log_posterior"].gather(1, own[:, None]).squeeze(1)
            for c, own in ((made, requested), (known, labels))
        )
        joint = _stratified(a, requested, b, labels)
    gap = _stratified(made["energy"], requested, known["energy"], labels)
    return {"energy": gap, "joint_energy": joint}


def _stratified(made: Tensor, requested: Tensor, known: Tensor, labels: Tensor) -> Estimate:
    """Mean over samples of their value minus the real mean of their label, with an interval."""
    made, known, total = made.double(), known.double(), len(made)
    rest, error, inner = torch.empty_like(made), 0.0, 0.0
    groups = sorted(set(requested.tolist()))
    for label in groups:
        own, base = requested == label, known[labels == label]
        if not len(base):
            return statistics.without_interval(math.nan, total)
        rest[own] = made[own] - base.mean()
        variance = float(base.var()) if len(base) > 1 else math.nan
        error += (int(own.sum()) / total) ** 2 * variance / len(base)
        inner = variance / len(base)
    value = float(rest.mean())
    if total < 2:
        return statistics.without_interval(value, total)
    spread, degrees_of_freedom = float(rest.var()) / total, float(total - 1)
    if len(groups) == 1 and spread + inner > 0:  # Welch's
        count = int((labels == groups[0]).sum())
        degrees_of_freedom = (spread + inner) ** 2 / (
            spread**2 / (total - 1) + inner**2 / max(1, count - 1)
        )
    return statistics.student(value, math.sqrt(spread + error), degrees_of_freedom, total)
