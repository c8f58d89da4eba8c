"""What the experiment ``guidance`` is made of: networks, guidance methods, and how much of each.

The networks are of four groups, all trained on one data set: a *diffusion model* with label dropout
of a tenth, so that its unconditional and its conditional prediction are one network's; the
*guides*, classifiers and joint models, plain, robust (l2 0.25, 0.5, 1.0 as in RCG section 4.2) or
trained on noise; the two *rivals* that the thesis argues against, a time-dependent classifier and a
robust one of Kawar et al. 2023; and the *evaluation classifier* (``judge``), of another
architecture, which guides nothing.

The methods are the thesis's, with its schedules and eta where it gives them, and one common setting
(`COMMON`) in which guides, and their input, are compared with each other. Scales are the thesis's
times the `Amount.strength` of a scale of reproduction, for what moves an image of another size, and
classifiers trained for minutes, is another number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ebmkit.experiments.runs import Variant

_CLEAN = {"streams": {"classify": {"noise": {"kind": "none", "min": 0.0, "max": 0.0}}}}
_OF_TIME = {
    "streams": {"classify": {"noise": {"kind": "diffusion"}}},
    "model": {"noise_conditional": True},
}
_CE = {"objective": "ce"}
_DDPM = {"objective": "ddpm", "terms": {"ddpm": {"class_dropout": 0.1}}}

_network = partial(Variant, family="guidance")


def _attack(objective: str, eps: float, **more: Any) -> dict[str, Any]:
    return {"objective": objective, "terms": {"adv": {"norm": "l2", "eps": eps, **more}}}


# fmt: off
DIFFUSION = _network("diffusion", "diffusion model", "diffusion", _DDPM)
OWN = _network("own-diffusion",
               "joint GradResNet told the noise, by noise prediction alone, in the UNet's place",
               "own-diffusion", _DDPM | {"model": {"noise_conditional": True}})
EVALUATION_CLASSIFIER = _network("judge", "judge: ResNet18, cross-entropy", "judge", _CE | _CLEAN)
PLAIN = _network("plain", "plain classifier", "guide", _CE | _CLEAN)
ROBUST = tuple(
    _network(f"robust-{eps:g}", f"robust classifier, l2 {eps:g}", "robust",
             _attack("adv", eps) | _CLEAN)
    for eps in (0.25, 0.5, 1.0)
)
ROBUST_DSM = _network("robust-dsm", "robust classifier, l2 0.5, that denoises too (adv+dsm)",
                      "robust", _attack("adv+dsm", 0.5) | _CLEAN)
JOINT = _network("joint", "joint CDN (ce+dsm)", "cdn", {"objective": "ce+dsm"})
JEM = _network("jem", "JEM", "jem", {"objective": "jem"})
OF_TIME = _network("of-time", "time-dependent classifier", "guide", _CE | _OF_TIME)
KAWAR = _network(
    "kawar", "time-dependent robust classifier (Kawar et al.)", "robust",
    _attack("adv", 0.5, early_stop=True, variance_preserving=True, random_start=False) | _OF_TIME,
)
# fmt: on

ON_GRID = (PLAIN, *ROBUST, ROBUST_DSM)
"""Networks of the robustness grid."""

ON_PATH = (*ON_GRID, JOINT, OF_TIME, KAWAR)
"""Networks of the curves along the diffusion."""

NETWORKS = (DIFFUSION, OWN, EVALUATION_CLASSIFIER, *ON_GRID, JOINT, JEM, OF_TIME, KAWAR)
"""All networks, in the order in which they are trained."""


@dataclass(frozen=True)
class GuidanceMethod:
    """One way to draw images of a label.

    Attributes:
        name: short, unique; of its files, too.
        description: in words.
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


COMMON: dict[str, Any] = {"guidance": "energy", "scale": 4.0, "schedule": "exact", "view": "x_t"}
"""In which guides and views are compared."""


def _method(
    name: str,
    description: str,
    guide: str = "robust-1",
    group: str = "thesis",
    eta: float = 0.8,
    fixed: bool = False,
    **own: Any,
) -> GuidanceMethod:
    settings = COMMON | own
    return GuidanceMethod(name, description, guide, settings, eta, group=group, fixed=fixed)


def _classifier_free(name: str, description: str, w: float, **more: Any) -> GuidanceMethod:
    settings = {"guidance": "classifier-free", "scale": w}
    return GuidanceMethod(name, description, settings=settings, fixed=True, **more)


def _in_part(network: Variant, high: bool) -> GuidanceMethod:
    """Guidance above t = 100 alone, or below: about where noise makes robust classifiers fail."""
    name, description = ("high", "above t = 100") if high else ("low", "below t = 100")
    part: dict[str, Any] = {"schedule": "step:at=100,low=0"} if high else {"start": 0.9}
    return _method(
        f"{network.name} {name}",
        f"{network.label}, {description} alone",
        network.name,
        "noise",
        guidance="classifier",
        view="noisy" if network is JOINT else "x_t",
        **part,
    )


def _rival(network: Variant, exact: bool) -> GuidanceMethod:
    return _method(
        f"{network.name}{' exact' if exact else ''}",
        network.label,
        network.name,
        "rivals",
        fixed=exact,
        guidance="classifier",
        scale=1.0 if exact else 4.0,
        view="noisy",
    )


_SIGMOID = "sigmoid:t0=500,y0=0.05,k=0.02"
"""RCG figure 4.13, with which the thesis ends."""


def _input(name: str, description: str, guide: str = "robust-0.5", **own: Any) -> GuidanceMethod:
    return _method(f"sees {name}", description, guide, "views", **own)


# fmt: off
METHODS: tuple[GuidanceMethod, ...] = (
    GuidanceMethod("unguided", "no guidance: the label is not known"),
    _method("classifier", "log p(y|x)", guidance="classifier"),
    _method("accumulated", "5 gradients summed, after 20 % of the steps (figure 4.4)",
            guidance="accumulated", options={"n": 5}, scale=10.0, start=0.2, eta=1.0),
    _method("step", "log p(y|x), 11/30 of the scale below t = 500 (figure 4.7)",
            guidance="classifier", scale=30.0, schedule="step:at=500,low=0.3667", eta=0.5),
    _method("energy", "E(x, y)"),
    _method("power 2", "E(x, y), (1 - abar)^2 (figure 4.10)", schedule="power:k=2"),
    _method("power 8", "E(x, y), (1 - abar)^8 (figure 4.10)", schedule="power:k=8"),
    _method("sigmoid 650", "E(x, y), sigmoid of (650, 0.1, 0.01) (figure 4.11)",
            scale=12.0, schedule="sigmoid:t0=650,y0=0.1,k=0.01", eta=1.0),
    _method("sigmoid 500", "E(x, y), sigmoid of (500, 0.05, 0.02) (figure 4.13)",
            schedule=_SIGMOID),
    _method("dual", "E(x, y) + 0.15 |mean - E(x)|, same sigmoid (figure 4.14)",
            guidance="dual", schedule=_SIGMOID),
    _method("pgd", "E(x, y) after 10 steps of 0.01, linear (figure 4.17)",
            guidance="pgd", options={"n": 10}, schedule="linear"),
    *(_method(f"by {network.name}", network.label, network.name, "guides")
      for network in (PLAIN, *ROBUST[:2], ROBUST_DSM, JEM)),
    _method("by joint", JOINT.label, "joint", "guides", view="noisy"),
    _input("shrunk", "x_t brought to the range of images, as in the thesis"),
    _input("noisy", "y = x + sigma eps", view="noisy"),
    _input("clean", "the predicted clean image", view="x0_hat"),
    _input("through", "the same, gradient through the denoiser", view="x0_hat",
           backpropagate=True),
    _input("shrunk (joint)", "joint CDN: x_t brought to the range", "joint"),
    _input("clean (joint)", "joint CDN: the predicted clean image", "joint", view="x0_hat"),
    *(_in_part(network, high) for network in (ROBUST[1], JOINT) for high in (True, False)),
    *(_rival(network, exact) for network in (OF_TIME, KAWAR, OWN) for exact in (True, False)),
    _classifier_free("free 1", "classifier-free, w = 1", 1.0, group="rivals"),
    _classifier_free("free 3", "classifier-free, w = 3", 3.0, group="rivals"),
    GuidanceMethod("own", "the joint model, unguided", base=OWN.name, group="own"),
    _classifier_free("own free 1", "the joint model by its own score of the label", 1.0,
                     base=OWN.name, group="own"),
    GuidanceMethod("own robust", "the joint model guided by the robust classifier", "robust-0.5",
                   COMMON, base=OWN.name, group="own"),
)
# fmt: on


@dataclass(frozen=True)
class Amount:
    """How much is trained, drawn and measured at a scale.

    Attributes:
        per_class: images of each class that a method draws.
        steps: of DDIM.
        strength: what scales of guidance are multiplied with.
        real: test images that measures compare with, at the most.
        etas: of the table of DDIM.
        lengths: its numbers of steps.
        path: settings of the suite ``diffusion-path``.
        grid: settings of the suite ``robustness-grid``.
        path_images: test images of the first.
        networks: names of those trained; empty: all.
        methods: names of those drawn; empty: all.
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
    methods: tuple[str, ...] = ()


# fmt: off
AMOUNTS: dict[str, Amount] = {
    "smoke": Amount(
        per_class=10, steps=20, strength=5.0, real=360, etas=(0.0, 1.0), lengths=(5, 20),
        path={"step": 100}, grid={"images": 200, "steps": 10}, path_images=200,
        networks=("diffusion", "judge", "plain", "robust-0.5", "robust-1", "joint", "of-time"),
        methods=("unguided", "classifier", "step", "energy", "sigmoid 500", "dual", "pgd",
                 "by plain", "by robust-0.5", "by joint", "sees noisy", "sees clean",
                 "of-time exact", "of-time", "free 1"),
    ),
    "cpu": Amount(
        per_class=12, steps=25, strength=2.5, real=2000, etas=(0.0, 0.2, 0.5, 1.0),
        lengths=(10, 20, 50), path={"step": 100}, grid={"images": 500}, path_images=1000,
    ),
    "full": Amount(
        per_class=1000, steps=100, strength=1.0, real=10_000, etas=(0.0, 0.2, 0.5, 1.0),
        lengths=(10, 20, 50, 100), path={"step": 10}, grid={"images": 10_000},
    ),
}
# fmt: on
"""By the name of a scale."""
