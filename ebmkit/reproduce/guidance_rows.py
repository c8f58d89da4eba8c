"""What the target ``guidance`` is made of: networks, ways to guide, and how much of each.

The networks stand in four groups, all trained on one data set: a *diffusion model* whose labels are
hidden from it a tenth of the time, so that its unconditional and its conditional prediction are one
network's; the *guides*, classifiers and joint models, plain, robust (l2 0.25, 0.5, 1.0 as in RCG
section 4.2) or trained on noise; the two *rivals* that the thesis argues against, a time-dependent
classifier and a robust one of Kawar et al. 2023; and the *judge*, a classifier of another
architecture that guides nothing and says which class it sees.

The ways are the thesis's, with its scales, schedules and eta where it gives them, and one common
setting (`COMMON`) in which guides, and what they see, are compared with each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ebmkit.reproduce.rows import Row

__all__ = [
    "AMOUNTS",
    "DIFFUSION",
    "GUIDES",
    "JUDGE",
    "NETWORKS",
    "ON_GRID",
    "WAYS",
    "Amount",
    "Way",
]

_CLEAN = {"streams": {"classify": {"noise": {"kind": "none", "min": 0.0, "max": 0.0}}}}
_OF_TIME = {
    "streams": {"classify": {"noise": {"kind": "diffusion"}}},
    "model": {"noise_conditional": True},
}


def _attack(eps: float, **more: Any) -> dict[str, Any]:
    return {"terms": {"adv": {"norm": "l2", "eps": eps, **more}}}


def _robust(eps: float) -> Row:
    layer = {"objective": "adv"} | _attack(eps) | _CLEAN
    return Row(f"robust-{eps:g}", f"robust classifier, l2 {eps:g}", "robust", layer)


DIFFUSION = Row(
    "diffusion",
    "diffusion model",
    "diffusion",
    {"objective": "ddpm", "terms": {"ddpm": {"class_dropout": 0.1}}},
)
JUDGE = Row("judge", "judge: ResNet18, cross-entropy", "judge", {"objective": "ce"} | _CLEAN)
PLAIN = Row("plain", "plain classifier", "guide", {"objective": "ce"} | _CLEAN)
ROBUST = tuple(_robust(eps) for eps in (0.25, 0.5, 1.0))
ROBUST_DSM = Row(
    "robust-dsm",
    "robust classifier, l2 0.5, that denoises too (adv+dsm)",
    "robust",
    {"objective": "adv+dsm"} | _attack(0.5) | _CLEAN,
)
JOINT = Row("joint", "joint CDN (ce+dsm)", "cdn", {"objective": "ce+dsm"})
JEM = Row("jem", "JEM", "jem", {"objective": "jem"})
OF_TIME = Row("of-time", "time-dependent classifier", "guide", {"objective": "ce"} | _OF_TIME)
KAWAR = Row(
    "kawar",
    "time-dependent robust classifier (Kawar et al.)",
    "robust",
    {"objective": "adv"}
    | _attack(0.5, early_stop=True, variance_preserving=True, random_start=False)
    | _OF_TIME,
)

OWN = Row(
    "own-diffusion",
    "joint GradResNet told the noise (ce+ddpm), in the UNet's place",
    "own-diffusion",
    {"objective": "ce+ddpm"} | _OF_TIME,
)

ON_GRID = (PLAIN, *ROBUST, ROBUST_DSM)
"""Rows of the robustness grid."""

GUIDES = (PLAIN, *ROBUST, ROBUST_DSM, JOINT, JEM, OF_TIME, KAWAR)

NETWORKS = (DIFFUSION, OWN, JUDGE, *GUIDES)
"""All networks, in the order in which they are trained."""


@dataclass(frozen=True)
class Way:
    """One way to draw images of a wanted class.

    Attributes:
        name: short, unique.
        about: in words.
        guide: name of the network that guides; None: none does.
        settings: fields of `ebmkit.guidance.GuidanceConfig`; empty: unguided.
        eta: of DDIM.
        base: name of the network that is guided.
        group: of the report.
    """

    name: str
    about: str
    guide: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.8
    base: str = "diffusion"
    group: str = "thesis"


COMMON: dict[str, Any] = {
    "guidance": "energy",
    "scale": 4.0,
    "schedule": "sigmoid:t0=500,y0=0.05,k=0.02",
    "view": "shrunk",
}
"""RCG figure 4.13: the setting that the thesis ends with."""


def _way(name: str, about: str, guide: str = "robust-1", eta: float = 0.8, **own: Any) -> Way:
    return Way(name, about, guide, COMMON | own, eta)


def _guided_by(row: Row, **own: Any) -> Way:
    settings = COMMON | own
    return Way(f"by {row.name}", row.label, row.name, settings, group="guides")


def _free(w: float) -> Way:
    settings = {"guidance": "classifier-free", "scale": w}
    return Way(f"free {w:g}", f"classifier-free, w = {w:g}", None, settings, group="rivals")


def _of_time(row: Row, scale: float) -> Way:
    own = {"guidance": "classifier", "scale": scale, "schedule": "exact", "view": "noisy"}
    return Way(
        f"{row.name} {scale:g}", f"{row.label}, s = {scale:g}", row.name, own, group="rivals"
    )


def _seen(name: str, about: str, **own: Any) -> Way:
    return Way(f"sees {name}", about, "robust-1", COMMON | own, group="views")


def _early(row: Row, low: float, name: str, about: str) -> Way:
    own: dict[str, Any] = {"schedule": "step:at=100,low=0"}
    if low:
        own = {"schedule": "exact", "late": 0.9}
    own |= {"guidance": "classifier", "view": "noisy" if row is JOINT else "shrunk"}
    return Way(f"{row.name} {name}", f"{row.label}, {about}", row.name, COMMON | own, group="noise")


WAYS: tuple[Way, ...] = (
    Way("unguided", "no guidance: the label is not known"),
    _way("classifier", "log p(y|x), s = 4", guidance="classifier"),
    _way(
        "accumulated",
        "5 gradients summed, s = 10 after 20 % of the steps (figure 4.4)",
        guidance="accumulated",
        options={"n": 5},
        scale=10.0,
        schedule="exact",
        late=0.2,
        eta=1.0,
    ),
    _way(
        "step",
        "s = 30, then 11 (figure 4.7)",
        guidance="classifier",
        scale=30.0,
        schedule="step:at=500,low=0.3667",
        eta=0.5,
    ),
    _way("energy exact", "E(x, y), sqrt(1 - abar), s = 4", schedule="exact"),
    _way("power 2", "E(x, y), (1 - abar)^2, s = 4", schedule="power:k=2"),
    _way("power 8", "E(x, y), (1 - abar)^8, s = 4", schedule="power:k=8"),
    _way(
        "sigmoid 650",
        "E(x, y), sigmoid (650, 0.1, 0.01), s = 12 (figure 4.11)",
        scale=12.0,
        schedule="sigmoid:t0=650,y0=0.1,k=0.01",
        eta=1.0,
    ),
    _way("sigmoid 500", "E(x, y), sigmoid (500, 0.05, 0.02), s = 4 (figure 4.13)"),
    _way("dual", "E(x, y) + 0.15 |mean - E(x)|, the same (figure 4.14)", guidance="dual"),
    _way(
        "pgd",
        "E(x, y) after 10 normalised steps of 0.01, linear, s = 4",
        guidance="pgd",
        options={"n": 10},
        schedule="linear",
    ),
    *(_guided_by(row) for row in (PLAIN, *ROBUST[:2], ROBUST_DSM, JEM)),
    _guided_by(JOINT, view="noisy"),
    _seen("noisy", "the guide sees y = x + sigma eps", view="noisy"),
    _seen("clean", "the guide sees the predicted clean image", view="clean"),
    _seen(
        "clean-through",
        "the same, and its gradient goes back through the denoiser",
        view="clean",
        through=True,
    ),
    _early(ROBUST[-1], 0.0, "early", "above t = 100 alone"),
    _early(ROBUST[-1], 1.0, "late", "below t = 100 alone"),
    _early(JOINT, 0.0, "early", "above t = 100 alone"),
    _early(JOINT, 1.0, "late", "below t = 100 alone"),
    *(_of_time(row, scale) for row in (OF_TIME, KAWAR, OWN) for scale in (1.0, 4.0)),
    _free(1.0),
    _free(3.0),
    Way("own", "the joint GradResNet alone, unguided", base="own-diffusion", group="own"),
    Way(
        "own free 1",
        "the joint GradResNet alone, its own score of the label",
        None,
        {"guidance": "classifier-free", "scale": 1.0},
        base="own-diffusion",
        group="own",
    ),
    Way(
        "own robust",
        "the joint GradResNet guided by the robust classifier",
        "robust-1",
        COMMON,
        base="own-diffusion",
        group="own",
    ),
)


@dataclass(frozen=True)
class Amount:
    """How much is drawn and measured at a scale.

    Attributes:
        per_class: images of each class that a way draws.
        steps: of DDIM.
        real: real images that measures compare with.
        etas: of the table of DDIM.
        lengths: its numbers of steps.
        drawn: images of each of its cells.
        path: settings of the suite ``diffusion-path``.
        grid: settings of the suite ``robustness-grid``.
    """

    per_class: int
    steps: int
    real: int
    etas: tuple[float, ...]
    lengths: tuple[int, ...]
    drawn: int
    path: Mapping[str, Any]
    grid: Mapping[str, Any]


AMOUNTS: dict[str, Amount] = {
    "smoke": Amount(
        10, 20, 360, (0.0, 1.0), (5, 20), 100, {"step": 100}, {"images": 100, "steps": 10}
    ),
    "cpu": Amount(
        12, 50, 2000, (0.0, 0.2, 0.5, 1.0), (10, 20, 50), 120, {"step": 50}, {"images": 500}
    ),
    "full": Amount(
        1000, 100, 10_000, (0.0, 0.2, 0.5, 1.0), (10, 20, 50, 100), 10_000, {"step": 10}, {}
    ),
}
"""By the name of a scale."""
