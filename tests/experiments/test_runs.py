"""Rows are runs: trained once, gone on with, measured once, never half-read."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from ebmkit import UserError, load
from ebmkit.experiments import SCALES, TABLES, ExperimentRuns, Protocol, Scale, Variant, write
from ebmkit.experiments.runs import exclusive
from ebmkit.experiments.tables import run_table, table_text
from ebmkit.models.saving import weights_file
from ebmkit.training import Interrupted

pytestmark = pytest.mark.usefixtures("count_memory_once")

TINY = Scale(
    "tiny",
    "four steps",
    {"cifar10": "digits", "imagenet": "digits"},
    {
        "cifar10": {
            "model": {"backbone": {"width": 8}},
            "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 4}},
            "steps": 4,
            "validation_images": 0,
            "checkpoint_every": 2,
        }
    },
    {"classify": 20, "denoise": 20},
)
ROW = Variant("joint", "GradResNet", "joint", {"objective": "ce+dsm"}, {"accuracy": 96.3})
DIVERGING = {"objective": "ce+dsm", "optimizer": {"lr": 1e30}}
PROTOCOL = Protocol("table", ("classify", "denoise"), (25 / 255,), TINY.images)


class Told(list):
    """Collects the sentences, and the trainings."""

    def __init__(self):
        super().__init__()
        self.trained = []

    def fit(self, trainer, name):
        self.trained.append((name, trainer.step))
        trainer.fit()


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def runs(tmp_path, told):
    return ExperimentRuns(tmp_path, TINY, fit=told.fit, log=told.append)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the finished row, to be copied."""
    out = tmp_path_factory.mktemp("finished")
    ExperimentRuns(out, TINY).measure(ROW, PROTOCOL)
    return out


@pytest.fixture
def done(finished, tmp_path, told):
    """The finished row in a folder of its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return ExperimentRuns(tmp_path, TINY, fit=told.fit, log=told.append)


def write_table(table, runs, only=()):
    write(table.name, run_table(table, runs, only), runs.out)


def test_a_finished_row_is_neither_trained_nor_measured_again(done, told):
    before = {p: p.stat().st_mtime_ns for p in done.out.rglob("*") if p.is_file()}
    found = done.measure(ROW, PROTOCOL)
    assert told.trained == []
    assert told == []
    assert found["classify"]["images"] == 20
    assert {p: p.stat().st_mtime_ns for p in done.out.rglob("*") if p.is_file()} == before


def test_an_interrupted_row_goes_on_where_it_was_and_ends_the_same(runs, told, finished):
    def stop(trainer, name):
        trainer.config = trainer.config.model_copy(update={"steps": 4})
        advance = trainer._advance

        def advance_and_stop(batches, asked):
            advance(batches, asked)
            if trainer.step == 2:
                trainer.save()
                raise Interrupted(2)

        trainer._advance = advance_and_stop
        trainer.fit()

    runs.fit = stop
    with pytest.raises(Interrupted):
        runs.train(ROW)
    runs.fit = told.fit
    runs.train(ROW)
    assert told.trained == [("joint", 2)]
    state, expected = (load(out / "rows/joint").state_dict() for out in (runs.out, finished))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def cut(content):
    return content[:3]


def half(content):
    return content[: len(content) // 2]


def with_a_bit_flipped(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def no_list(content):
    return b"[]"


DAMAGES = [
    ("config.yaml", cut),
    ("config.yaml", half),
    ("checkpoints/*.pt", cut),
    ("checkpoints/*.pt", half),
    ("checkpoints/*.pt", with_a_bit_flipped),
    ("checkpoints/*.pt", no_list),
    ("environment.json", no_list),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "how"), DAMAGES)
def test_a_broken_row_is_moved_aside_and_trained_anew(done, told, damage, how):
    for path in done.folder(ROW).glob(damage):
        path.write_bytes(how(path.read_bytes()))
    done.train(ROW)
    assert told.trained == [("joint", 0)]
    assert list((done.out / "rows/joint.broken-1").glob(damage))
    assert "moved to joint.broken-1" in told[0]


@pytest.mark.filterwarnings("ignore:.*step-00000004.pt. is damaged.*going back to step 2")
def test_a_row_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(done, told):
    folder = done.folder(ROW)
    whole = load(folder).state_dict()
    path = folder / "checkpoints" / "step-00000004.pt"
    path.write_bytes(with_a_bit_flipped(path.read_bytes()))
    done.train(ROW)
    assert told.trained == [("joint", 2)]
    again = load(folder).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize("how", [cut, half, with_a_bit_flipped, None])
def test_a_lost_or_damaged_model_is_written_again_from_the_checkpoint(done, told, how):
    """The checkpoint has all of it, so nothing is trained."""
    path = done.folder(ROW) / "model.safetensors"
    whole = path.read_bytes()
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(whole))
    done.train(ROW)
    assert told.trained == []
    assert path.read_bytes() == whole


def test_a_model_of_an_earlier_step_than_the_checkpoint_is_not_the_finished_one(done, told):
    """As a run leaves it that was killed between the last checkpoint and its model."""
    folder = done.folder(ROW)
    whole = (folder / "model.safetensors").read_bytes()
    stale = load(folder)
    with torch.no_grad():
        next(stale.parameters()).add_(1)
    document = json.loads((folder / "model.json").read_text())
    (folder / "model.safetensors").write_bytes(weights_file(stale))
    document["card"]["steps"] = 2
    (folder / "model.json").write_text(json.dumps(document))
    done.train(ROW)
    assert told.trained == []
    assert (folder / "model.safetensors").read_bytes() == whole
    assert load(folder).card.steps == 4


def test_a_row_that_another_process_trains_is_left_to_it(done, told):
    with exclusive(done.folder(ROW)):
        done.train(ROW)  # finished: only read
        (done.folder(ROW) / "model.safetensors").unlink()
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* has been training"):
            done.train(ROW)
    done.train(ROW)


@pytest.mark.slow
def test_a_row_that_diverges_stops_alone_and_says_why(done, told):
    """The table is written, with the reason where figures would stand; so it is the next time."""
    table = replace(TABLES["table3"], variants=(ROW, replace(ROW, name="relu", layer=DIVERGING)))
    write_table(table, done)
    assert "loss" in done.stopped["relu"]
    text = (done.out / "table3.md").read_text()
    assert "GradResNet: stopped: " in text
    again = ExperimentRuns(done.out, TINY)
    write_table(table, again, ["joint"])
    assert (done.out / "table3.md").read_text() == text


def half_a_document(path):
    path.write_text(path.read_text()[:100])


def a_document_without_its_figure(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"accuracy": None}))


@pytest.mark.parametrize("damage", [half_a_document, a_document_without_its_figure])
def test_half_a_result_is_measured_again(done, told, damage):
    path = done.folder(ROW) / "evaluation/table/classify.json"
    whole = json.loads(path.read_text())
    damage(path)
    found = done.measure(ROW, PROTOCOL)
    assert told == ["joint: measuring classify"]
    assert told.trained == []
    assert found["classify"]["accuracy"] == whole["accuracy"]


def test_other_noise_levels_are_measured_anew(done, told):
    other = Protocol("table", ("denoise",), (50 / 255,), TINY.images)
    assert list(done.measure(ROW, other)["denoise"]["psnr"]) == ["50"]


def test_a_run_of_another_configuration_is_left_exclusive(done):
    done.seed = 1
    with pytest.raises(UserError, match=r"another configuration: seed was 0 and would be 1"):
        done.train(ROW)
    assert load(done.folder(ROW)) is not None


@pytest.mark.slow
def test_a_table_of_one_row_says_what_did_not_run(done, capsys):
    """No number is made up: other rows say that they did not run, beside the paper's figures."""
    table = TABLES["table1"]
    shutil.rmtree(done.folder(ROW) / "evaluation/table")
    write_table(table, done, ["joint"])
    report = json.loads((done.out / "table1.json").read_text())
    assert [row["name"] for row in report["rows"]] == [row.name for row in table.variants]
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["jem"]["status"] == "not run yet"
    assert by_name["jem"]["ours"] == {}
    assert by_name["jem"]["paper"] == {"accuracy": 92.9, "hours": 36}
    assert by_name["dncnn"]["status"] == "not run yet"
    assert by_name["dncnn"]["ours"] == {}
    assert set(by_name["joint"]["ours"]) == {"accuracy", "15", "25", "50", "hours"}
    assert by_name["joint-blind"]["knows_sigma"] == "estimated"
    blind = by_name["joint-blind"]["ours"]["25"]["value"]
    own = json.loads((done.folder(ROW) / "evaluation/table/denoise.json").read_text())
    assert blind == own["denoisers"]["blind"]["psnr"]["25"]["value"]
    text = table_text(report)
    assert "| - (92.9) |" in text
    assert "JEM (WideResNet): not run yet" in text
    assert (done.out / "table1.png").stat().st_size > 10_000
    assert str(done.out) not in json.dumps(report)


def test_rows_that_need_a_data_folder_say_so(tmp_path):
    runs = ExperimentRuns(tmp_path, SCALES["full"], imagenet_dir=tmp_path / "absent")
    with pytest.raises(UserError, match="absent"):
        write_table(TABLES["table2"], runs, ["imagenet-joint"])
    assert not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_a_scale_the_machine_cannot_hold_says_what_it_needs(tmp_path, monkeypatch):
    from ebmkit.training import cost

    monkeypatch.setattr(cost, "available_memory", lambda device: 2**20)
    runs = ExperimentRuns(tmp_path, TINY)
    with pytest.raises(UserError, match="B"):
        runs.check([ROW])
    assert not (tmp_path / "rows").exists()
