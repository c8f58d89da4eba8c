"""Sampling jobs: bit-identical resume, diverged chains, files and errors."""

import hashlib
import itertools
import json
import math

import h5py
import pytest
import torch
from ebmkit_tests.support.sampling_runs import SHAPE, BlindMixture, mixture, small_network
from PIL import Image

import ebmkit
from ebmkit import UserError
from ebmkit.data import load_dataset
from ebmkit.errors import Interrupted
from ebmkit.sampling.base import Chain, Info, PositionSampler, next_state
from ebmkit.sampling.diagnostics import chain_diagnostics
from ebmkit.sampling.entry import (
    SAMPLERS,
    ReplayBuffer,
    SamplerConfig,
    SamplerEntry,
    default_sampler,
)
from ebmkit.sampling.jobs.chains import MAX_FRAMES, JobFolder, Record
from ebmkit.sampling.jobs.job import SamplingJob, write_results
from ebmkit.sampling.jobs.settings import SamplingSettings, default_folder, make_settings
from ebmkit.sampling.jobs.sources import Sources


def job_at(path, model, settings, sources=None, **how):
    folder = JobFolder(path)
    folder.begin(settings)
    return SamplingJob(model, settings, folder, sources, **how)


def stored_batches(job):
    """All finished batches, without their durations."""
    batches = [job.finished(number) for number in range(job.settings.batches)]
    return [{k: v for k, v in batch.items() if k != "seconds"} for batch in batches]


def assert_identical(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)


class Killed(Exception):
    pass


def kill_at(at):
    def hook(done, total):
        if done == at:
            raise Killed

    return hook


# --- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "at"),
    [
        ("hmc", 14),
        ("annealed-langevin", 4),
        ("ais", 14),
        *(
            pytest.param(name, at, marks=pytest.mark.slow)
            for name, at in (("mala", 4), ("langevin", 14), ("heun", 4))
        ),
    ],
)
def test_killed_job_resumes_bit_identically(tmp_path, sampler, at):
    """Killed in the first or second batch; the steps after the last save are repeated."""
    model = mixture()
    settings = make_settings(model, sampler, count=5, batch_size=3, label="all", steps=10)
    whole = job_at(tmp_path / "whole", model, settings)
    whole.run()
    broken = job_at(tmp_path / "broken", model, settings, save_seconds=0)
    with pytest.raises(Killed):
        broken.run(kill_at(at))
    later = job_at(tmp_path / "broken", model, settings)
    steps = []
    later.run(lambda done, total: steps.append(done))
    first = next(step for step in steps if step % 10)  # of the unfinished batch
    assert at - 1 <= first <= at + 1  # no step is skipped, and at most two are repeated
    assert 20 in steps
    assert_identical(stored_batches(whole), stored_batches(later))


def test_stopped_job_of_a_network_resumes_bit_identically(tmp_path):
    model = ebmkit.optimize(small_network(tmp_path / "run"))
    settings = make_settings(
        model, "kadkhodaie_simoncelli", count=3, label="dog", steps=8, options={"beta": 0.5}
    )
    whole = job_at(tmp_path / "whole", model, settings)
    whole.run()
    calls = []
    broken = job_at(tmp_path / "broken", model, settings)
    with pytest.raises(Interrupted, match="after step 5 of 8"):
        broken.run(stop=lambda: calls.append(1) or len(calls) > 4)
    later = job_at(tmp_path / "broken", model, settings)
    later.run()
    assert_identical(stored_batches(whole), stored_batches(later))


def test_diverged_chains_stay_diverged_after_resume(tmp_path):
    model = mixture(edge=0.75)
    settings = make_settings(model, "langevin", count=8, steps=12, options={"step_size": 0.004})
    whole = job_at(tmp_path / "whole", model, settings)
    whole.run()
    assert 0 < int((whole.finished(0)["died"] >= 0).sum()) < 8
    broken = job_at(tmp_path / "broken", model, settings, save_seconds=0)
    with pytest.raises(Killed):
        broken.run(kill_at(10))
    later = job_at(tmp_path / "broken", model, settings)
    later.run()
    assert_identical(stored_batches(whole), stored_batches(later))


def test_each_batch_and_step_has_different_random_numbers(tmp_path):
    job = SamplingJob(mixture(), make_settings(mixture(), "mala"), JobFolder(tmp_path))
    keys = [(batch, step) for batch in range(3) for step in range(3)]
    drawn = {float(torch.rand((), generator=job._generator(*key))) for key in keys}
    assert len(drawn) == len(keys)


def test_unusable_job_folders_are_refused(tmp_path):
    """Other settings, damaged or foreign states, locked or finished folders, other files."""
    model = mixture()
    settings = make_settings(model, "mala", count=2, steps=4)
    out = tmp_path / "out"
    job = job_at(out, model, settings, save_seconds=0)
    with pytest.raises(Killed):
        job.run(kill_at(2))
    other = make_settings(model, "mala", count=2, steps=4, options={"step_size": 0.5})
    with pytest.raises(UserError, match=r"options\.step_size was 0\.0001 and is now 0\.5"):
        JobFolder(out).begin(other)
    state = out / "unfinished" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        job_at(out, model, settings).run()
    content[-1] ^= 1
    state.write_bytes(content)
    whole = JobFolder(out).load("state")
    for name, value in {"stride": torch.tensor(0), "finished": torch.ones(9) > 0}.items():
        JobFolder(out).save("state", whole | {name: value})
        with pytest.raises(UserError, match="a state that is not of this job"):
            job_at(out, model, settings).run()
    state.unlink()
    again = job_at(out, model, settings)
    refused = pytest.raises(UserError, match="has been sampling")
    with again.folder.alone(), refused, JobFolder(out).alone():
        pass
    again.run()
    write_results(again, "run")
    assert not (out / "unfinished").exists()
    with pytest.raises(UserError, match="finished samples"):
        JobFolder(out).begin(settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="other files than samples"):
        JobFolder(tmp_path / "mine").begin(settings)


def test_job_with_earlier_setting_names_is_resumed(tmp_path):
    """Its folder name and settings are those of an earlier version."""
    settings = make_settings(mixture(), "sgld", data_available=True, start="class_gaussian")
    old = settings.model_dump(mode="json")
    old["start"] = old["options"]["start"] = "seeds"
    old["options"] = {
        {"drift_clip": "largest_drift"}.get(key, key): value
        for key, value in old["options"].items()
    }
    assert SamplingSettings.model_validate(old) == settings
    text = json.dumps(old, separators=(",", ":"))
    name = f"sgld-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    home = tmp_path / "samples" / name / "unfinished"
    assert default_folder(tmp_path, settings).name != name
    home.mkdir(parents=True)
    (home / "settings.json").write_text(json.dumps(old))
    folder = default_folder(tmp_path, settings)
    assert folder.name == name
    JobFolder(folder).begin(settings)
    other = make_settings(mixture(), "sgld", start="uniform")
    with pytest.raises(UserError, match="was 'class_gaussian' and is now 'uniform'"):
        JobFolder(folder).begin(other)
    blind = make_settings(mixture(BlindMixture), "kadkhodaie_simoncelli")
    renamed = blind.model_dump(mode="json") | {"sampler": "ks"}
    assert SamplingSettings.model_validate(renamed) == blind


# --- files ---------------------------------------------------------------------------------------


def test_files_contain_samples_densities_labels_and_settings(tmp_path):
    model = mixture()
    settings = make_settings(model, "mala", count=6, batch_size=4, label="all", steps=20, seed=3)
    held_out = torch.full((5, *SHAPE), 0.3)
    job = job_at(tmp_path, model, settings, Sources(held_out=held_out))
    job.run()
    document = write_results(job, "some-run")
    with h5py.File(tmp_path / "samples.h5") as file:
        x = torch.from_numpy(file["samples"][()])
        torch.testing.assert_close(
            torch.from_numpy(file["log_joint"][()]), model.log_joint(x, 0.001)
        )
        density = torch.from_numpy(file["log_density"][()])
        torch.testing.assert_close(density, model.log_density(x, 0.001))
        assert file["labels"][()].tolist() == [0, 1, 0, 1, 0, 1]
        assert file["finite"][()].all()
        assert {k: file.attrs[k] for k in ("source", "sampler", "seed", "run")} == {
            "source": "fresh", "sampler": "mala", "seed": 3, "run": "some-run",
        }  # fmt: skip
        assert json.loads(file.attrs["settings"]) == settings.model_dump(mode="json")
    read = load_dataset("hdf5", tmp_path / "samples.h5", "test")  # as a data set
    assert read.class_names == ("dark", "bright")
    assert bool(
        (x.clamp(0, 1)[:, None] - read.floats()).abs().flatten(2).amax(2).amin() < 0.5 / 254
    )
    assert document == json.loads((tmp_path / "sampling.json").read_text())
    assert len(document["traces"]["acceptance"]) == 20
    energies = document["diagnostics"]["energies"]
    gap = model.log_density(held_out, 0.001).mean() - density.mean()
    assert energies["gap"] == pytest.approx(float(gap), rel=1e-4)
    for name in ("samples.png", "path.png", "path.gif"):
        with Image.open(tmp_path / name) as image:
            image.load()
    with Image.open(tmp_path / "path.gif") as animation:
        assert animation.n_frames > 2


def test_diverged_chains_are_reported_and_all_stored_samples_are_finite(tmp_path):
    model = mixture(edge=0.75)
    settings = make_settings(model, "langevin", count=8, steps=12, options={"step_size": 0.004})
    job = job_at(tmp_path, model, settings)
    job.run()
    document = write_results(job, "run")
    lost = {entry["chain"] for entry in document["lost"]}
    assert 0 < len(lost) < 8
    assert f"chain {min(lost)} at step" in document["warnings"][-1]
    with h5py.File(tmp_path / "samples.h5") as file:
        assert set((~file["finite"][()]).nonzero()[0].tolist()) == lost
        assert torch.from_numpy(file["samples"][()]).isfinite().all()


def test_replay_buffer_provides_samples_and_starts(tmp_path):
    model = mixture()
    buffer = ReplayBuffer(torch.rand(6, *SHAPE), num_classes=2)
    settings = make_settings(model, "buffer", count=4, label="bright")
    with pytest.raises(UserError, match="4 chains of a label are requested, and it has 3"):
        job_at(tmp_path / "many", model, settings, Sources(buffer=buffer))
    settings = make_settings(model, "buffer", count=3, label="bright")
    job = job_at(tmp_path / "as-is", model, settings, Sources(buffer=buffer))
    job.run()
    document = write_results(job, "run")
    with h5py.File(tmp_path / "as-is" / "samples.h5") as file:
        found = {tuple(x.ravel().tolist()) for x in file["samples"][()]}
        assert file.attrs["source"] == "buffer"
    assert found == {tuple(x.flatten().tolist()) for x in buffer.images[3:]}
    assert "undefined" in document["diagnostics"]["chains"]["meaning"]
    settings = make_settings(
        model, "sgld", count=2, steps=1, start="buffer", options={"step_size": 1e-9, "noise": 0}
    )
    job = job_at(tmp_path / "on", model, settings, Sources(buffer=buffer))
    job.run()
    x = job.finished(0)["samples"]
    near = (x[:, None] - buffer.images).abs().flatten(2).amax(2).amin(1)
    assert float(near.max()) < 1e-5


def test_importance_weights_and_log_z_are_in_the_files(tmp_path):
    """With a label, log Z of a normalised density is the log of its probability."""
    model = mixture()
    settings = make_settings(
        model, "ais", count=60, batch_size=40, label="all", steps=60, data_available=True
    )
    assert settings.start == "noise"
    job = job_at(tmp_path / "all", model, settings)
    job.run()
    found = write_results(job, "run")["diagnostics"]["importance"]
    with h5py.File(tmp_path / "all" / "samples.h5") as file:
        weights = torch.from_numpy(file["log_weight"][()])
    assert found["sigma"] == pytest.approx(0.01)
    assert list(found["estimates"]) == ["dark", "bright"]
    for c, own in enumerate(found["estimates"].values()):
        assert own["samples"] == 30
        assert abs(own["log_z"] - math.log(0.5)) < 4 * own["standard_error"] < 0.8
        assert own["log_z"] == pytest.approx(float(weights[c::2].exp().mean().log()))
    job = job_at(tmp_path / "few", model, make_settings(model, "ais", count=3, steps=2))
    job.run()
    document = write_results(job, "run")
    assert list(document["diagnostics"]["importance"]["estimates"]) == ["all"]
    assert "dominated by few chains" in document["warnings"][-1]


def test_number_of_frames_is_bounded_and_their_spacing_even():
    record = Record(1000, None, 2)
    record.frame(torch.zeros(3, *SHAPE), 0)
    info = Info(torch.ones(3))
    for step in range(1, 1001):
        record.note(Chain(torch.zeros(3, *SHAPE), step), info, torch.ones(3, dtype=torch.bool))
    moments = record.tensors()["moments"].tolist()
    assert MAX_FRAMES / 2 - 1 <= len(moments) <= MAX_FRAMES
    assert len({b - a for a, b in itertools.pairwise(moments)}) == 1
    assert moments[0] == 0


def test_diagnostics_are_undefined_without_stationary_distribution():
    draws = torch.randn(400, 8, dtype=torch.float64)
    finite = torch.ones(8, dtype=torch.bool)
    found = chain_diagnostics(SAMPLERS["mala"], [draws[:, :5], draws[:, 5:]], finite, 1)
    assert found["split_rhat"] < 1.02  # independent draws
    assert 0.7 * 1600 < found["effective_size"] < 1.4 * 1600
    assert "undefined" in chain_diagnostics(SAMPLERS["ddim"], [draws], finite, 1)["meaning"]


class TowardsGray(PositionSampler):
    """A sampler defined outside the package."""

    steps = None

    def step(self, state, generator):
        return next_state(state, 0.5 + 0.9 * (state.x - 0.5))


def test_table_entry_suffices_to_add_a_sampler(tmp_path, monkeypatch):
    """It has settings, jobs, files and diagnostics; the highest priority makes it the default."""
    entry = SamplerEntry(
        name="towards-gray",
        description="shrinks contrast",
        config=SamplerConfig,
        needs=("score",),
        make=lambda model, c, config: TowardsGray(),
        no_stationary_distribution="shrinks contrast",
        priority=9,
    )
    model = mixture()
    with monkeypatch.context() as patch:
        patch.setitem(SAMPLERS, entry.name, entry)
        assert default_sampler(model) is entry
        settings = make_settings(model, None, count=3, steps=40)
        assert settings.sampler == "towards-gray"
        job = job_at(tmp_path, model, settings)
        job.run()
        document = write_results(job, "run")
    assert "shrinks contrast: they are undefined" in document["diagnostics"]["chains"]["meaning"]
    assert document["steps"] == 40
    assert float((job_samples(tmp_path) - 0.5).abs().max()) < 0.1


def job_samples(path):
    with h5py.File(path / "samples.h5") as file:
        return torch.from_numpy(file["samples"][()])


# --- errors and warnings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "mla"}, "did you mean 'mala'"),
        ({"count": 0}, "0 samples cannot be drawn"),
        ({"steps": 0}, "0 steps are too few.*--sampler buffer"),
        ({"label": "2"}, "label 2 is out of range: this model knows 0 to 1"),
        ({"label": "cow"}, "this model knows 0 to 1 or dark, bright"),
        (
            {"sampler": "kadkhodaie_simoncelli"},
            "simoncelli does not support this model: it takes the noise level.*mala",
        ),
        ({"sampler": "ks"}, "sampler 'ks' is now called 'kadkhodaie_simoncelli'"),
        ({"start": "seeds"}, "start 'seeds' is now called 'class_gaussian'"),
        ({"options": {"start": "seeds"}}, "start 'seeds' is now called 'class_gaussian'"),
        ({"options": {"largest_drift": 1}}, "'largest_drift' is now called 'drift_clip'"),
        ({"options": {"stepsize": 1}}, "did you mean 'step_size'"),
        ({"start": "bufer"}, "did you mean 'buffer'"),
        ({"options": {"sigma": "2/1"}}, "outside the range that this model was trained for"),
        ({"sampler": "buffer", "steps": 5}, "buffer takes no step"),
        ({"sampler": "heun", "steps": 1}, "steps = 1 is not legal.*greater than or equal to 2"),
        ({"sampler": "ais", "steps": 0}, "0 steps are too few"),
        ({"sampler": "ais", "start": "mean"}, "ais cannot start from 'mean': its weights need"),
        ({"sampler": "ais", "start": "data"}, "ais cannot start from 'data'.*take noise"),
        ({"sampler": "ais", "options": {"start": "uniform"}}, "cannot start from 'uniform'"),
    ],
)
def test_invalid_settings_raise_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        make_settings(mixture(), **({"sampler": "mala"} | arguments))


def test_labels_are_refused_for_a_model_without_labels(tmp_path):
    model = small_network(tmp_path, num_classes=0, objective="dsm")
    with pytest.raises(UserError, match="without labels"):
        make_settings(model, label="all")


def test_each_kind_of_model_has_a_default_sampler(tmp_path):
    assert default_sampler(small_network(tmp_path / "blind")).name == "kadkhodaie_simoncelli"
    wide = mixture()
    assert default_sampler(wide).name == "heun"  # noise of 1 hides an image of 4x4
    wide.card = wide.card.model_copy(update={"sigma_range": (0.001, 0.5)})
    assert default_sampler(wide).name == "ddim"
    jem = small_network(tmp_path / "jem", sigma_range=None, objective="jem")
    assert default_sampler(jem).name == "sgld"


def test_warnings_about_low_starting_noise_and_untrained_densities(tmp_path):
    model = small_network(tmp_path / "blind")
    folder = JobFolder(tmp_path / "out")
    near = SamplingJob(model, make_settings(model, "kadkhodaie_simoncelli"), folder)
    assert "noise of 100/255 about gray" in near.cautions[0]
    wide = small_network(tmp_path / "wide", sigma_range=(1 / 255, 50.0))
    assert SamplingJob(wide, make_settings(wide, "kadkhodaie_simoncelli"), folder).cautions == []
    plain = small_network(tmp_path / "ce", sigma_range=None, objective="ce")
    cautions = SamplingJob(plain, make_settings(plain, "sgld"), folder).cautions
    assert "trains no density" in cautions[0]
    assert "--start buffer" in cautions[1]
    jem = small_network(tmp_path / "jem", sigma_range=None, objective="jem")
    assert SamplingJob(jem, make_settings(jem, "sgld", steps=500), folder).cautions == []


def test_default_start_depends_on_sampler_and_data():
    """Class Gaussians if there is data, except for the stochastic ascent and SGLD."""
    assert make_settings(mixture(), "mala", data_available=True).start == "class_gaussian"
    assert make_settings(mixture(), "mala").start == "noise"
    ascent = make_settings(mixture(BlindMixture), "kadkhodaie_simoncelli", data_available=True)
    assert ascent.start == "noise"
    assert make_settings(mixture(), "sgld", data_available=True).start == "uniform"
