"""Settings of the suite robustness: strengths, defences, noise levels, effort."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ebmkit.evaluation.attacks import Norm
from ebmkit.evaluation.defences import Defence, DefenceName, Refinement
from ebmkit.noise import Radius, Sigma, SigmaOrZero
from ebmkit.sampling.langevin import JEM_NOISE, JEM_STEP

__all__ = ["Radii", "RobustnessConfig"]


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted({0.0, *values}))


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


Strengths = Annotated[tuple[SigmaOrZero, ...], AfterValidator(_ascending)]
Radii = Annotated[tuple[Radius, ...], AfterValidator(_ascending)]


class RobustnessConfig(BaseModel):
    """Settings of the suite, as in ``--set robustness.steps=100``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(200, ge=1, description="number of attacked images, from the first")
    norms: Annotated[tuple[Norm, ...], AfterValidator(_distinct)] = Field(
        ("linf", "l2"), min_length=1, description="norms of the attacks: linf, l2"
    )
    linf: Strengths = Field(
        tuple(e / 255 for e in (0, 0.5, 1, 2, 4, 8, 16)),
        description="attack strengths in l_inf, image units, for example 8/255; 0 is always "
        "included",
    )
    l2: Radii = Field(
        (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0),
        description="attack strengths in l2, image units; 0 is always included",
    )
    defences: Annotated[tuple[DefenceName, ...], AfterValidator(_distinct)] = Field(
        ("direct", "noise"),
        min_length=1,
        description="defences, one curve each: direct, noise, denoise, denoise+noise, refine",
    )
    sigma: Sigma = Field(
        20 / 255,
        description="noise level that the defences noise and denoise+noise add, image units",
    )
    noise_levels: Strengths = Field(
        tuple(s / 255 for s in (0, 20, 50)),
        description="noise levels of the map, image units; 0 is always included; [0]: no map",
    )
    steps: int = Field(40, ge=1, description="number of PGD steps")
    restarts: int = Field(
        2, ge=1, description="number of random starts of PGD; the strongest counts"
    )
    stepsize: float | None = Field(
        None,
        gt=0,
        description="PGD step size relative to the strength; null: 0.2, or 2.5 / steps if larger",
    )
    eot: int = Field(
        4, ge=1, description="number of noise draws averaged in each gradient of the attack (EOT)"
    )
    draws: int = Field(16, ge=1, description="number of noise draws averaged by a defence")
    refine_steps: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_distinct)] = (
        Field(
            (0, 1, 10),
            min_length=1,
            description="numbers of Langevin steps of the defence refine, one curve each",
        )
    )
    refine_chains: int = Field(4, ge=1, description="number of chains that refine averages over")
    refine_step_size: float = Field(
        JEM_STEP,
        gt=0,
        description="step size of refine (factor of the score), squared image units; "
        "default: JEM's",
    )
    refine_noise: SigmaOrZero = Field(
        JEM_NOISE,
        description="standard deviation of the noise in a step of refine, image units; "
        "default: JEM's",
    )
    checks: bool = Field(True, description="run the gradient-masking checks")
    autoattack: bool = Field(
        False, description="also run AutoAttack, at the strength of the checks (needs pyautoattack)"
    )

    def strengths(self, norm: Norm) -> tuple[float, ...]:
        """The grid of ``norm``, from 0 up."""
        return self.linf if norm == "linf" else self.l2

    def curve(self) -> dict[str, Defence]:
        """The defences that get a curve, by name; refine gets one for each number of steps."""
        found: dict[str, Defence] = {}
        for name in self.defences:
            if name == "refine":
                found |= {f"refine-{k}": self._refine(k) for k in self.refine_steps}
            else:
                found[name] = Defence(name, 0.0 if name == "direct" else self.sigma)
        return found

    def rows(self) -> list[Defence]:
        """The rows of the map; none if there is but one noise level."""
        levels = self.noise_levels if len(self.noise_levels) > 1 else ()
        return [Defence("noise", sigma) if sigma else Defence("direct") for sigma in levels]

    def averaged(self, defence: Defence) -> int:
        """How many draws of noise, or chains, an image is judged on."""
        return self.refine_chains if defence.name == "refine" else self.draws

    def _refine(self, steps: int) -> Defence:
        return Defence(
            "refine", refinement=Refinement(steps, self.refine_step_size, self.refine_noise)
        )

    def attacked(self) -> list[Defence]:
        """All that is attacked, once each."""
        return list(dict.fromkeys([*self.curve().values(), *self.rows()]))
