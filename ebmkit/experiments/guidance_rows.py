"""What the target ``guidance`` is made of: networks, ways to guide, and how much of each.

The networks stand in four groups, all trained on one data set: a *diffusion model* whose labels are
hidden from it a tenth of the time, so that its unconditional and its conditional prediction are one
network's; the *guides*, classifiers and joint models, plain, robust (l2 0.25, 0.5, 1.0 as in RCG
section 4.2) or trained on noise; the two *rivals* that the thesis argues against, a time-dependent
classifier and a robust one of Kawar et al. 2023; and the *judge*, a classifier of another
architecture that guides nothing and says which class it sees.

The ways are the thesis's, with its schedules and eta where it gives them, and one common setting
(`COMMON`) in which guides, and what they see, are compared with each other. Scales are the thesis's
times the `Amount.strength` of a scale of reproduction, for what moves an image of another size, and
classifiers trained for minutes, is another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ebmkit.experiments.rows import Row

__all__ = [
    "AMOUNTS",
    "DIFFUSION",
    "EVALUATION_CLASSIFIER",
    "GUIDES",
    "NETWORKS",
    "ON_GRID",
    "ON_PATH",
    "TABLE_2_1",
    "WAYS",
    "Amount",
    "GuidanceMethod",
]

_CLEAN = {"streams": {"classify": {"noise": {"kind": "none", "min": 0.0, "max": 0.0}}}}
_OF_TIME = {
    "streams": {"classify": {"noise": {"kind": "diffusion"}}},
    "model": {"noise_conditional": True},
}


def _row(name: str, label: str, task: str, layer: Mapping[str, Any]) -> Row:
    """A network; the tables of the other paper have some of the names."""
    return Row(name, label, task, layer, within="guidance")


def _attack(eps: float, **more: Any) -> dict[str, Any]:
    return {"terms": {"adv": {"norm": "l2", "eps": eps, **more}}}


def _robust(eps: float) -> Row:
    layer = {"objective": "adv"} | _attack(eps) | _CLEAN
    return _row(f"robust-{eps:g}", f"robust classifier, l2 {eps:g}", "robust", layer)


DIFFUSION = _row(
    "diffusion",
    "diffusion model",
    "diffusion",
    {"objective": "ddpm", "terms": {"ddpm": {"class_dropout": 0.1}}},
)
EVALUATION_CLASSIFIER = _row(
    "judge", "judge: ResNet18, cross-entropy", "judge", {"objective": "ce"} | _CLEAN
)
PLAIN = _row("plain", "plain classifier", "guide", {"objective": "ce"} | _CLEAN)
ROBUST = tuple(_robust(eps) for eps in (0.25, 0.5, 1.0))
ROBUST_DSM = _row(
    "robust-dsm",
    "robust classifier, l2 0.5, that denoises too (adv+dsm)",
    "robust",
    {"objective": "adv+dsm"} | _attack(0.5) | _CLEAN,
)
JOINT = _row("joint", "joint CDN (ce+dsm)", "cdn", {"objective": "ce+dsm"})
JEM = _row("jem", "JEM", "jem", {"objective": "jem"})
OF_TIME = _row("of-time", "time-dependent classifier", "guide", {"objective": "ce"} | _OF_TIME)
KAWAR = _row(
    "kawar",
    "time-dependent robust classifier (Kawar et al.)",
    "robust",
    {"objective": "adv"}
    | _attack(0.5, early_stop=True, variance_preserving=True, random_start=False)
    | _OF_TIME,
)

OWN = _row(
    "own-diffusion",
    "joint GradResNet told the noise, by noise prediction alone, in the UNet's place",
    "own-diffusion",
    {
        "objective": "ddpm",
        "terms": {"ddpm": {"class_dropout": 0.1}},
        "model": {"noise_conditional": True},
    },
)

ON_GRID = (PLAIN, *ROBUST, ROBUST_DSM)
"""Rows of the robustness grid."""

ON_PATH = (PLAIN, *ROBUST, ROBUST_DSM, JOINT, OF_TIME, KAWAR)
"""Rows of the curves along the diffusion."""

GUIDES = (PLAIN, *ROBUST, ROBUST_DSM, JOINT, JEM, OF_TIME, KAWAR)

NETWORKS = (DIFFUSION, OWN, EVALUATION_CLASSIFIER, *GUIDES)
"""All networks, in the order in which they are trained."""


@dataclass(frozen=True)
class GuidanceMethod:
    """One way to draw images of a wanted class.

    Attributes:
        name: short, unique.
        about: in words.
        guide: name of the network that guides; None: none does.
        settings: fields of `ebmkit.guidance.GuidanceConfig`; empty: unguided.
        eta: of DDIM.
        base: name of the network that is guided.
        group: of the report.
        fixed: whether the scale is not multiplied with `Amount.strength`.
    """

    name: str
    description: str
    guide: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.8
    base: str = "diffusion"
    group: str = "thesis"
    fixed: bool = False

    def times(self, strength: float) -> GuidanceMethod:
        """The same with its scale multiplied, unless it is fixed."""
        if self.fixed or not self.settings:
            return self
        return replace(self, settings={**self.settings, "scale": strength * self.settings["scale"]})


COMMON: dict[str, Any] = {
    "guidance": "energy",
    "scale": 4.0,
    "schedule": "exact",
    "view": "shrunk",
}
"""In which guides and views are compared."""

SIGMOID: dict[str, Any] = {"schedule": "sigmoid:t0=500,y0=0.05,k=0.02"}
"""RCG figure 4.13, with which the thesis ends."""


def _way(
    name: str, description: str, guide: str = "robust-1", eta: float = 0.8, **own: Any
) -> GuidanceMethod:
    return GuidanceMethod(name, description, guide, COMMON | own, eta)


def _guided_by(row: Row, **own: Any) -> GuidanceMethod:
    return GuidanceMethod(f"by {row.name}", row.label, row.name, COMMON | own, group="guides")


def _free(w: float) -> GuidanceMethod:
    settings = {"guidance": "classifier-free", "scale": w}
    return GuidanceMethod(
        f"free {w:g}", f"classifier-free, w = {w:g}", None, settings, group="rivals", fixed=True
    )


def _of_time(row: Row, exact: bool) -> GuidanceMethod:
    own = {"guidance": "classifier", "scale": 1.0 if exact else 4.0, "view": "noisy"}
    name = f"{row.name}{' exact' if exact else ''}"
    return GuidanceMethod(name, row.label, row.name, COMMON | own, group="rivals", fixed=exact)


def _seen(name: str, description: str, guide: str = "robust-0.5", **own: Any) -> GuidanceMethod:
    return GuidanceMethod(f"sees {name}", description, guide, COMMON | own, group="views")


def _part(row: Row, high: bool) -> GuidanceMethod:
    """Guidance above t = 100 alone, or below: about where noise takes robust classifiers away."""
    own: dict[str, Any] = {"schedule": "step:at=100,low=0"} if high else {"late": 0.9}
    own["view"] = "noisy" if row is JOINT else "shrunk"
    name, description = ("high", "above t = 100") if high else ("low", "below t = 100")
    settings = COMMON | own | {"guidance": "classifier"}
    return GuidanceMethod(
        f"{row.name} {name}", f"{row.label}, {description} alone", row.name, settings, group="noise"
    )


WAYS: tuple[GuidanceMethod, ...] = (
    GuidanceMethod("unguided", "no guidance: the label is not known"),
    _way("classifier", "log p(y|x)", guidance="classifier"),
    _way(
        "accumulated",
        "5 gradients summed, after 20 % of the steps (figure 4.4)",
        guidance="accumulated",
        options={"n": 5},
        scale=10.0,
        late=0.2,
        eta=1.0,
    ),
    _way(
        "step",
        "log p(y|x), 11/30 of the scale below t = 500 (figure 4.7)",
        guidance="classifier",
        scale=30.0,
        schedule="step:at=500,low=0.3667",
        eta=0.5,
    ),
    _way("energy", "E(x, y)"),
    _way("power 2", "E(x, y), (1 - abar)^2 (figure 4.10)", schedule="power:k=2"),
    _way("power 8", "E(x, y), (1 - abar)^8 (figure 4.10)", schedule="power:k=8"),
    _way(
        "sigmoid 650",
        "E(x, y), sigmoid of (650, 0.1, 0.01) (figure 4.11)",
        scale=12.0,
        schedule="sigmoid:t0=650,y0=0.1,k=0.01",
        eta=1.0,
    ),
    _way("sigmoid 500", "E(x, y), sigmoid of (500, 0.05, 0.02) (figure 4.13)", **SIGMOID),
    _way(
        "dual",
        "E(x, y) + 0.15 |mean - E(x)|, same sigmoid (figure 4.14)",
        guidance="dual",
        **SIGMOID,
    ),
    _way(
        "pgd",
        "E(x, y) after 10 steps of 0.01, linear (figure 4.17)",
        guidance="pgd",
        options={"n": 10},
        schedule="linear",
    ),
    *(_guided_by(row) for row in (PLAIN, *ROBUST[:2], ROBUST_DSM, JEM)),
    _guided_by(JOINT, view="noisy"),
    _seen("shrunk", "x_t brought to the range of images, as in the thesis"),
    _seen("noisy", "y = x + sigma eps", view="noisy"),
    _seen("clean", "the predicted clean image", view="clean"),
    _seen("through", "the same, gradient through the denoiser", view="clean", through=True),
    _seen("shrunk (joint)", "joint CDN: x_t brought to the range", "joint"),
    _seen("clean (joint)", "joint CDN: the predicted clean image", "joint", view="clean"),
    *(_part(row, high) for row in (ROBUST[1], JOINT) for high in (True, False)),
    *(_of_time(row, exact) for row in (OF_TIME, KAWAR, OWN) for exact in (True, False)),
    _free(1.0),
    _free(3.0),
    GuidanceMethod("own", "the joint model, unguided", base="own-diffusion", group="own"),
    GuidanceMethod(
        "own free 1",
        "the joint model by its own score of the label",
        None,
        {"guidance": "classifier-free", "scale": 1.0},
        base="own-diffusion",
        group="own",
        fixed=True,
    ),
    GuidanceMethod(
        "own robust",
        "the joint model guided by the robust classifier",
        "robust-0.5",
        COMMON,
        base="own-diffusion",
        group="own",
    ),
)


@dataclass(frozen=True)
class Amount:
    """How much is trained, drawn and measured at a scale.

    Attributes:
        per_class: images of each class that a way draws.
        steps: of DDIM.
        strength: what scales of guidance are multiplied with.
        real: test images that measures compare with, at the most.
        etas: of the table of DDIM.
        lengths: its numbers of steps.
        path: settings of the suite ``diffusion-path``.
        grid: settings of the suite ``robustness-grid``.
        path_images: test images of the first.
        networks: names of those trained; empty: all.
        ways: names of those drawn; empty: all.
    """

    per_class: int
    steps: int
    strength: float
    real: int
    etas: tuple[float, ...]
    lengths: tuple[int, ...]
    path: Mapping[str, Any]
    grid: Mapping[str, Any]
    path_images: int | None = None
    networks: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()


AMOUNTS: dict[str, Amount] = {
    "smoke": Amount(
        per_class=10,
        steps=20,
        strength=5.0,
        real=360,
        etas=(0.0, 1.0),
        lengths=(5, 20),
        path={"step": 100},
        grid={"images": 200, "steps": 10},
        path_images=200,
        networks=("diffusion", "judge", "plain", "robust-0.5", "robust-1", "joint", "of-time"),
        ways=(
            *("unguided", "classifier", "step", "energy", "sigmoid 500", "dual", "pgd"),
            *("by plain", "by robust-0.5", "by joint", "sees noisy", "sees clean"),
            *("of-time exact", "of-time", "free 1"),
        ),
    ),
    "cpu": Amount(
        per_class=12,
        steps=25,
        strength=2.5,
        real=2000,
        etas=(0.0, 0.2, 0.5, 1.0),
        lengths=(10, 20, 50),
        path={"step": 100},
        grid={"images": 500},
        path_images=1000,
    ),
    "full": Amount(
        per_class=1000,
        steps=100,
        strength=1.0,
        real=10_000,
        etas=(0.0, 0.2, 0.5, 1.0),
        lengths=(10, 20, 50, 100),
        path={"step": 10},
        grid={"images": 10_000},
    ),
}
"""By the name of a scale."""

TABLE_2_1 = {
    0.0: {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16},
    0.2: {10: 14.04, 20: 7.11, 50: 4.77, 100: 4.25},
    0.5: {10: 16.66, 20: 8.35, 50: 5.25, 100: 4.46},
    1.0: {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78},
}
"""FID of DDIM on CIFAR-10 by eta and steps (RCG table 2.1, of Song et al. 2021)."""
