"""Tables 2.1 and 4.2 of the thesis: its values, its samplers, and what is printed beside what."""

import math
from types import SimpleNamespace

import pytest
import torch

from ebmkit.card import ModelCard
from ebmkit.cli.train import reproduce as command
from ebmkit.data import load_dataset
from ebmkit.errors import Interrupted, UserError
from ebmkit.evaluation.features import Extractor, cached_inception
from ebmkit.evaluation.generation import measures
from ebmkit.experiments import EXPERIMENTS, thesis
from ebmkit.experiments.thesis import (
    TABLE_2_1,
    TABLE_4_2,
    TABLE_4_2_SAMPLERS,
    ThesisSize,
    inception_weights,
    quadratic_timesteps,
    table21_text,
    table42_text,
    table_2_1_samplers,
)
from ebmkit.models import create_denoiser
from ebmkit.noise import linear_betas, make_schedule
from ebmkit.sampling import DDIM
from ebmkit.storage import FolderLocked

THESIS_2_1 = """
0.0 13.36 6.84 4.67 4.16 4.04
0.2 14.04 7.11 4.77 4.25 4.09
0.5 16.66 8.35 5.25 4.46 4.29
1.0 41.07 18.36 8.01 5.78 4.73
sigma-hat 367.43 133.37 32.72 9.99 3.17
"""
"""RCG table 2.1, CIFAR-10, for 10, 20, 50, 100 and 1000 steps."""

THESIS_4_2 = "DDPM 8.68 16.49 0.68 0.59\nDDIM 8.40 14.79 0.64 0.59"
"""RCG table 4.2: IS, FID, precision, recall."""


def test_values_are_those_of_the_thesis():
    lines = [line.split() for line in THESIS_2_1.strip().split("\n")]
    rows = {row: list(map(float, values)) for row, *values in lines}
    assert {row: list(values.values()) for row, values in TABLE_2_1.items()} == rows
    assert all(list(values) == [10, 20, 50, 100, 1000] for values in TABLE_2_1.values())
    kinds = ("score", "frechet", "precision", "recall")
    lines = [line.split() for line in THESIS_4_2.split("\n")]
    table = {row: dict(zip(kinds, map(float, v), strict=True)) for row, *v in lines}
    assert table == TABLE_4_2


# --- samplers ------------------------------------------------------------------------------------


def test_quadratic_timesteps_are_those_of_song_et_al():
    schedule = make_schedule("linear")
    assert quadratic_timesteps(schedule, 5) == (800, 450, 200, 50, 0)
    assert quadratic_timesteps(schedule, 1000) == tuple(range(999, -1, -1))
    found = quadratic_timesteps(schedule, 100)
    assert found[:2] == (800, int(0.8 * 1000 * (98 / 99) ** 2))
    assert len(found) == len(set(found)) < 100  # 0.08, 0.33 and 0.73 are 0


def stub(u, t):
    return 0.8 * torch.tanh(u * (1 + t / 500)) + 0.1 * u.flip(-1) - 0.05 * t / 1000


@pytest.mark.parametrize("row", ["0.2", "1.0", "sigma-hat"])
def test_rows_of_table_2_1_take_the_steps_of_song_et_al(row, monkeypatch):
    """Written in the scaled coordinates of Song et al. 2021 (eq. 12, 16 and appendix D.3)."""
    sampler = next(s for s in table_2_1_samplers([10]) if s.row == row)
    schedule = make_schedule("linear")
    monkeypatch.setattr(thesis, "denoiser_of", lambda model: None)
    monkeypatch.setattr(thesis, "noise_predictor_of", lambda denoiser, schedule: stub)
    chain = sampler.build(SimpleNamespace(schedule=schedule))
    alpha = [*(1 - linear_betas()).cumprod(0).tolist(), 1.0]  # the last one is at t = -1
    u = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    state = chain.init(schedule.to_image_units(u, chain.timesteps[0]))
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    for t, after in zip(chain.timesteps, [*chain.timesteps[1:], -1], strict=True):
        a, b, noise = alpha[t], alpha[after], stub(u, t)
        clean = (u - math.sqrt(1 - a) * noise) / math.sqrt(a)
        if row == "sigma-hat":
            clean = clean.clamp(-1, 1)
            noise = (u - math.sqrt(a) * clean) / math.sqrt(1 - a)
        eta = 1.0 if row == "sigma-hat" else float(row)
        spread = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        drawn = math.sqrt(1 - a / b) if row == "sigma-hat" else spread
        u = math.sqrt(b) * clean + math.sqrt(max(0, 1 - b - spread**2)) * noise
        if after >= 0:
            u = u + drawn * torch.randn(u.shape, generator=one, dtype=u.dtype)
        state, _ = chain.step(state, other)
        torch.testing.assert_close(
            schedule.from_image_units(state.x, after), u, rtol=1e-9, atol=1e-9
        )


def test_table_4_2_is_ddpm_at_all_timesteps_and_deterministic_ddim_at_100():
    ddpm, ddim = TABLE_4_2_SAMPLERS
    assert (ddpm.steps, ddpm.eta, ddpm.variance) == (1000, 1.0, "fixed_large")
    assert (ddim.steps, ddim.eta) == (100, 0.0)


# --- drawing -------------------------------------------------------------------------------------


@pytest.fixture
def unguided(tmp_path, monkeypatch):
    """A small untrained diffusion model, and features that need no network."""
    torch.manual_seed(0)
    model = create_denoiser("unet", 1, width=8, multipliers=(1, 1), blocks=1)
    model.card = ModelCard(image_size=(8, 8), channels=1, sigma_range=model.schedule.sigma_range)
    model.eval().requires_grad_(False)
    monkeypatch.setattr(thesis, "load", lambda folder, device: model)
    monkeypatch.setattr(thesis, "weights_digest", str)
    runs = SimpleNamespace(
        out=tmp_path,
        device="cpu",
        seed=0,
        progress=False,
        stopped={},
        log=lambda sentence: None,
        folder=lambda variant: variant.name,
        images=lambda variant, split: load_dataset("digits", None, split),
    )
    kinds = ("frechet", "kernel", "score", "precision", "recall")

    def extract(x):
        return {"features": x.flatten(1)[:, ::9], "logits": x.flatten(1)[:, :3]}

    extractor = Extractor("classifier", "judge", {k: f"classifier-{k}" for k in kinds}, extract)
    return thesis._Unguided(runs, ThesisSize(12, 40, (3,)), extractor)


def test_an_interrupted_sampler_resumes_and_finished_images_are_not_drawn_again(
    unguided, monkeypatch
):
    monkeypatch.setattr(thesis, "BATCH", 5)
    sampler = table_2_1_samplers((3,))[1]
    expected = unguided.row(sampler, measures)
    assert expected["measures"].keys() == set(unguided.extractor.names.values())
    step, calls = DDIM.step, []

    def stopping(self, state, generator):
        calls.append(1)
        if len(calls) == 5:  # in the second batch
            raise Interrupted(1, 3)
        return step(self, state, generator)

    monkeypatch.setattr(DDIM, "step", stopping)
    assert unguided.row(sampler, measures) == expected  # read
    assert not calls
    (unguided.runs.out / "rcg" / expected["folder"] / "samples.h5").unlink()
    with pytest.raises(Interrupted):
        unguided.row(sampler, measures)
    again = unguided.row(sampler, measures)
    assert len(calls) == 5 + 2 * 3  # the first batch is not drawn again
    assert again["measures"] == expected["measures"]


# --- reports -------------------------------------------------------------------------------------


def test_sampler_that_another_process_draws_is_taken_and_not_failed(unguided, monkeypatch):
    """`ExperimentRuns.share` waits for it; the report must not say that it stopped."""

    def drawn_elsewhere(sampler):
        raise FolderLocked("another process draws it")

    monkeypatch.setattr(unguided, "_drawn", drawn_elsewhere)
    with pytest.raises(FolderLocked):
        unguided.row(table_2_1_samplers((3,))[1], measures)
    assert not unguided.runs.stopped


def document(kind, comparable):
    """A report's document: values 1.25 everywhere."""
    kinds, own = ("score", "frechet", "precision", "recall"), ("IS", "FID", "precision", "recall")
    if kind == "classifier":
        own = tuple(f"classifier-{name}" for name in ("score", "FD", "precision", "recall"))
    names = dict(zip(kinds, own, strict=True))
    values = {name: {"value": 1.25, "low": None, "high": None, "count": 10} for name in own}
    return {
        "missing": [],
        "names": names,
        "extractor": {"kind": kind, "accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}},
        "count": 10,
        "real": 10,
        "comparable": comparable,
        "floor": values,
        "notes": [],
    } | {"values": values}


def texts(kind, comparable):
    """Both tables as Markdown."""
    one = document(kind, comparable)
    more = {"measures": one["values"], "seconds": 1.0}
    rows = [{"row": s.row, "steps": s.steps} | more for s in TABLE_4_2_SAMPLERS]
    grid = [{"row": s.row, "steps": s.steps} | more for s in table_2_1_samplers((10, 1000))]
    return table42_text(one | {"rows": rows}), table21_text(one | {"rows": grid})


def test_our_own_features_have_no_fid_and_no_value_of_the_thesis_beside_them():
    for text in texts("classifier", False):
        assert "FID" not in text
        assert "classifier-FD" in text
        assert not any(value in text for value in ("16.49", "14.79", "13.36", "3.17", "0.68"))


def test_the_thesis_is_shown_beside_the_same_quantity_alone():
    table42, table21 = texts("inception", True)
    assert "| DDPM | 1000 | 1.25 (8.68) | 1.25 (16.49) | 1.25 (0.68) | 1.25 (0.59) |" in table42
    assert "| sigma-hat | 1.25 (367.43) | 1.25 (3.17) |" in table21
    assert all("(16.49)" not in t and "(13.36)" not in t for t in texts("inception", False))
    assert thesis.is_comparable("inception", "cifar10", 10_000)
    assert not thesis.is_comparable("inception", "digits", 10_000)


def test_inception_is_never_downloaded_and_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert cached_inception() is None
    runs = SimpleNamespace(inception=None)
    assert inception_weights(runs) is None
    runs.inception = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=r"--inception: there is no file .*weights.pth"):
        inception_weights(runs)
    runs.inception.touch()
    monkeypatch.setattr(thesis, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package torch-fidelity"):
        inception_weights(runs)


def test_the_help_of_reproduce_names_every_target():
    text = command.__doc__
    assert all(name in text for name in EXPERIMENTS)
