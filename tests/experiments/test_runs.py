"""Rows of tables: training, resume, reuse of results, and damaged files."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ebmkit import UserError, load
from ebmkit.errors import Interrupted
from ebmkit.experiments import (
    EXPERIMENTS,
    SCALES,
    TABLES,
    ExperimentRuns,
    ExperimentScale,
    Protocol,
    Variant,
    write,
)
from ebmkit.experiments.report import run_grid
from ebmkit.experiments.tables import run_table, table_text
from ebmkit.models.saving import weights_file
from ebmkit.storage import Claim, FolderLocked
from ebmkit.training import RunFolder

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

TINY = ExperimentScale(
    "tiny",
    "four steps",
    "smoke",
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
    by_task={"denoising": {"objective": "dsm"}},
    recipe_of_task={"jem": "digits-jem"},
)
ROW = Variant("joint", "GradResNet", "joint", {"objective": "ce+dsm"}, {"accuracy": 96.3})
DIVERGING = {"objective": "ce+dsm", "optimizer": {"lr": 1e30}}
PROTOCOL = Protocol("table", ("classify", "denoise"), (25 / 255,), TINY.images)


class Log(list):
    """Collects messages, and trainings as (row, first step)."""

    def __init__(self):
        super().__init__()
        self.trained = []

    def fit(self, trainer, name):
        self.trained.append((name, trainer.step))
        trainer.fit()


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def runs(tmp_path, log):
    return ExperimentRuns(tmp_path, TINY, fit=log.fit, log=log.append)


@pytest.fixture(scope="module")
def finished_folder(tmp_path_factory):
    """A folder with the finished row; tests that write use a copy."""
    out = tmp_path_factory.mktemp("finished")
    ExperimentRuns(out, TINY).measure(ROW, PROTOCOL)
    return out


@pytest.fixture
def finished_runs(finished_folder, tmp_path, log):
    """The finished row, in a copy of the folder."""
    shutil.copytree(finished_folder, tmp_path, dirs_exist_ok=True)
    return ExperimentRuns(tmp_path, TINY, fit=log.fit, log=log.append)


def write_table(table, runs, only=()):
    write(table.name, EXPERIMENTS[table.name], run_table(table, runs, only), runs.out)


def test_a_finished_row_is_neither_trained_nor_measured_again(finished_runs, log):
    before = {p: p.stat().st_mtime_ns for p in finished_runs.out.rglob("*") if p.is_file()}
    found = finished_runs.measure(ROW, PROTOCOL)
    assert log.trained == []
    assert log == []
    assert found["classify"]["images"] == 20
    assert {p: p.stat().st_mtime_ns for p in finished_runs.out.rglob("*") if p.is_file()} == before


def test_interrupted_row_resumes_bit_identically(runs, log, finished_folder):
    def stop(trainer, name):
        trainer.config = trainer.config.model_copy(update={"steps": 4})
        advance = trainer._advance

        def advance_and_stop(batches, stop_requested):
            advance(batches, stop_requested)
            if trainer.step == 2:
                trainer.save()
                raise Interrupted(2, 4)

        trainer._advance = advance_and_stop
        trainer.fit()

    runs.fit = stop
    with pytest.raises(Interrupted):
        runs.train(ROW)
    runs.fit = log.fit
    runs.train(ROW)
    assert log.trained == [("joint", 2)]
    state, expected = (load(out / "rows/joint").state_dict() for out in (runs.out, finished_folder))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def first_bytes(content):
    return content[:3]


def first_half(content):
    return content[: len(content) // 2]


def flipped_bit(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def empty_list(content):
    return b"[]"


DAMAGES = [
    ("config.yaml", first_half),
    ("checkpoints/*.pt", first_bytes),
    ("checkpoints/*.pt", flipped_bit),
    ("environment.json", empty_list),
]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "damage"), DAMAGES)
def test_damaged_row_is_moved_aside_and_trained_again(finished_runs, log, pattern, damage):
    for path in finished_runs.folder(ROW).glob(pattern):
        path.write_bytes(damage(path.read_bytes()))
    finished_runs.train(ROW)
    assert log.trained == [("joint", 0)]
    assert list((finished_runs.out / "rows/joint.broken-1").glob(pattern))
    assert "moved to joint.broken-1" in log[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*step-00000004.pt. is damaged.*going back to step 2")
def test_row_with_damaged_last_checkpoint_resumes_from_the_previous_one(finished_runs, log):
    folder = finished_runs.folder(ROW)
    whole = load(folder).state_dict()
    path = folder / "checkpoints" / "step-00000004.pt"
    path.write_bytes(flipped_bit(path.read_bytes()))
    finished_runs.train(ROW)
    assert log.trained == [("joint", 2)]
    again = load(folder).state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "damage",
    [
        flipped_bit,
        None,
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in (first_bytes, first_half)),
    ],
)
def test_missing_or_damaged_weights_are_written_from_the_checkpoint(finished_runs, log, damage):
    """The checkpoint contains the weights, so nothing is trained."""
    path = finished_runs.folder(ROW) / "model.safetensors"
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(whole))
    finished_runs.train(ROW)
    assert log.trained == []
    assert path.read_bytes() == whole


def test_weights_of_an_earlier_step_are_replaced_from_the_checkpoint(finished_runs, log):
    """A run killed between its last checkpoint and its weights leaves this state."""
    folder = finished_runs.folder(ROW)
    whole = (folder / "model.safetensors").read_bytes()
    stale = load(folder)
    with torch.no_grad():
        next(stale.parameters()).add_(1)
    document = json.loads((folder / "model.json").read_text())
    (folder / "model.safetensors").write_bytes(weights_file(stale))
    document["card"]["steps"] = 2
    (folder / "model.json").write_text(json.dumps(document))
    finished_runs.train(ROW)
    assert log.trained == []
    assert (folder / "model.safetensors").read_bytes() == whole
    assert load(folder).card.steps == 4


def test_claimed_row_is_not_trained(finished_runs, log):
    with Claim(finished_runs.folder(ROW)).held():
        finished_runs.train(ROW)  # finished: only read
        (finished_runs.folder(ROW) / "model.safetensors").unlink()
        with pytest.raises(FolderLocked, match=rf"process {os.getpid()} on .* works on .*joint"):
            finished_runs.train(ROW)
    finished_runs.train(ROW)


@pytest.mark.slow
def test_results_without_networks_give_the_same_table(finished_runs, log, tmp_path):
    """`benchmarks/row_results.py` copies results; the row is not trained again."""
    script = Path(__file__).parents[2] / "benchmarks" / "row_results.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    row_results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(row_results)
    table = replace(TABLES["table3"], variants=(ROW,))
    write_table(table, finished_runs)
    copy = tmp_path / "copy"
    row_results.copy(finished_runs.out, copy)
    own = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert not any("checkpoints" in name or "model" in name for name in own)
    assert str(tmp_path) not in "".join(p.read_text() for p in copy.rglob("*.[yj]*") if p.is_file())
    again = ExperimentRuns(copy, TINY, fit=log.fit, log=log.append)
    write_table(table, again)
    assert log.trained == []
    assert (copy / "table3.md").read_text() == (finished_runs.out / "table3.md").read_text()
    more = Protocol("table", (*PROTOCOL.suites, "calibration"))
    with pytest.raises(UserError, match=r"model\.json"):
        again.measure(ROW, more)


@pytest.mark.slow
def test_diverged_row_is_reported_and_other_rows_are_measured(finished_runs, log):
    """The table has the reason in place of numbers, also when it is written again."""
    table = replace(TABLES["table3"], variants=(ROW, replace(ROW, name="relu", layer=DIVERGING)))
    write_table(table, finished_runs)
    assert "loss" in finished_runs.stopped["relu"]
    text = (finished_runs.out / "table3.md").read_text()
    assert "GradResNet: stopped: " in text
    again = ExperimentRuns(finished_runs.out, TINY)
    write_table(table, again, ["joint"])
    assert (finished_runs.out / "table3.md").read_text() == text


def truncated_document(path):
    path.write_text(path.read_text()[:100])


def document_without_accuracy(path):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"accuracy": None}))


@pytest.mark.parametrize(
    "damage", [truncated_document, pytest.param(document_without_accuracy, marks=pytest.mark.slow)]
)
def test_incomplete_result_is_measured_again(finished_runs, log, damage):
    path = finished_runs.folder(ROW) / "evaluation/table/classify.json"
    whole = json.loads(path.read_text())
    damage(path)
    found = finished_runs.measure(ROW, PROTOCOL)
    assert log == ["joint: measuring classify"]
    assert log.trained == []
    assert found["classify"]["accuracy"] == whole["accuracy"]


def test_other_noise_levels_are_measured(finished_runs, log):
    other = Protocol("table", ("denoise",), (50 / 255,), TINY.images)
    assert list(finished_runs.measure(ROW, other)["denoise"]["psnr"]) == ["50"]


@pytest.mark.slow
def test_another_number_of_images_is_measured(finished_runs):
    fewer = Protocol("table", PROTOCOL.suites, PROTOCOL.sigmas, {"classify": 7, "denoise": 6})
    found = finished_runs.measure(ROW, fewer)
    assert {suite: document["images"] for suite, document in found.items()} == {
        "classify": 7,
        "denoise": 6,
    }


def test_a_document_from_before_its_suite_had_settings_is_not_measured_again(finished_runs, log):
    path = finished_runs.folder(ROW) / "evaluation" / "table" / "denoise.json"
    document = json.loads(path.read_text())
    del document["options"]
    path.write_text(json.dumps(document))
    finished_runs.measure(ROW, PROTOCOL)
    assert log == []


def test_run_of_another_configuration_is_refused_and_kept(finished_runs):
    folder = finished_runs.folder(ROW)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = replace(ROW, layer={"objective": "ce"})
    with pytest.raises(
        UserError, match=r"another configuration: objective was 'ce\+dsm' and would"
    ):
        finished_runs.train(other)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_report_is_written_beside_a_row_of_another_configuration(finished_runs):
    """The row was not asked for: it is kept, and the report says what differs."""
    other = replace(ROW, name="old", layer={"objective": "ce"})
    shutil.copytree(finished_runs.folder(ROW), finished_runs.folder(other))
    table = replace(TABLES["table3"], variants=(ROW, other), orderings=())
    report = run_table(table, finished_runs, ["joint"])
    joint, old = report.document["rows"]
    assert joint["status"] == "done"
    assert "another configuration: objective was 'ce+dsm' and would be 'ce'" in old["status"]


def states(runs):
    return {
        p.name: RunFolder.open(p).config()["seed"]
        for p in (runs.out / "rows").iterdir()
        if p.is_dir()
    }


@pytest.mark.slow
def test_every_seed_has_a_folder_and_all_rows_run_with_the_first_seed_first(runs, log):
    runs.seeds = (0, 3)
    other = replace(ROW, name="other", layer={"objective": "ce"})
    results = run_grid(runs, [ROW, other], [], lambda variant: None)
    assert log.trained == [
        ("joint", 0),
        ("other", 0),
        ("joint, seed 3", 0),
        ("other, seed 3", 0),
    ]
    assert states(runs) == {"joint": 0, "joint-seed-3": 3, "other": 0, "other-seed-3": 3}
    assert [list(one.by_seed) for one in results] == [[0, 3], [0, 3]]
    weights = [load(one.folder(ROW)).state_dict() for one in runs.each_seed()]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_folder_of_an_earlier_version_belongs_to_its_seed(finished_runs, log):
    """Earlier versions trained every seed in rows/NAME."""
    folder = finished_runs.folder(ROW)
    early = replace(finished_runs, seeds=(3,))
    shutil.rmtree(folder)
    early.train(ROW)
    early.folder(ROW).rename(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    log.trained.clear()
    assert early.train(ROW).path == folder
    assert log.trained == []
    finished_runs.train(ROW)
    assert log.trained == [("joint", 0)]
    assert states(finished_runs) == {"joint": 3, "joint-seed-0": 0}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_values_by_image_are_added_to_results_of_earlier_versions(finished_runs, log):
    """Shown as they are, and measured again by a command that compares rows."""
    needed = replace(PROTOCOL, image_values=("classify", "denoise"))
    found = finished_runs.measured(ROW, needed)
    assert finished_runs.image_values(ROW, needed, found) == {"classify": {}, "denoise": {}}
    again = finished_runs.measure(ROW, needed)
    assert log == ["joint: measuring classify", "joint: measuring denoise"]
    values = finished_runs.image_values(ROW, needed, again)
    right = values["classify"]["right/0"]
    assert float(right.double().mean()) == found["classify"]["accuracy"]
    psnr = values["denoise"]["unconditional/25"]
    assert len(right) == len(psnr) == 20
    assert float(psnr.double().mean()) == pytest.approx(found["denoise"]["psnr"]["25"])
    finished_runs.measure(ROW, needed)
    assert len(log) == 2
    path = finished_runs.folder(ROW) / "evaluation/table/classify.safetensors"
    path.write_bytes(flipped_bit(path.read_bytes()))
    finished_runs.measure(ROW, needed)
    assert log[2:] == ["joint: measuring classify"]


@pytest.mark.slow
def test_rows_that_stop_with_one_seed_are_reported_with_the_others(finished_runs):
    def stop(trainer, name):
        raise UserError("too hot")

    finished_runs.fit, finished_runs.seeds = stop, (0, 1)
    table = replace(TABLES["table3"], variants=(ROW,), orderings=())
    finished_runs.measure(ROW, Protocol("table", ("classify", "denoise"), images=TINY.images))
    write_table(table, finished_runs)
    assert finished_runs.stopped == {"joint, seed 1": "too hot"}
    text = (finished_runs.out / "table3.md").read_text()
    assert "GradResNet, 1 of 2 seeds" in text
    assert "- joint, seed 1: stopped: too hot" in text
    assert "`ebmkit reproduce table3 --scale tiny --seeds 0-1`" in text


@pytest.mark.slow
def test_table_of_one_row_reports_rows_that_did_not_run(finished_runs, capsys):
    """They have the paper's numbers and none of ours."""
    table = TABLES["table1"]
    shutil.rmtree(finished_runs.folder(ROW) / "evaluation/table")
    write_table(table, finished_runs, ["joint"])
    report = json.loads((finished_runs.out / "table1.json").read_text())
    assert [row["name"] for row in report["rows"]] == [
        row.name for row in finished_runs.distinct(table.variants)
    ]
    by_name = {row["name"]: row for row in report["rows"]}
    assert by_name["jem"]["status"] == "not run yet"
    assert by_name["jem"]["ours"] == {}
    assert by_name["jem"]["paper"] == {"accuracy": 92.9, "hours": 36}
    assert by_name["dncnn"]["status"] == "not run yet"
    assert by_name["dncnn"]["ours"] == {}
    assert set(by_name["joint"]["ours"]) == {"accuracy", "15", "25", "50", "hours"}
    assert by_name["joint-blind"]["knows_sigma"] == "estimated"
    blind = by_name["joint-blind"]["ours"]["25"]["value"]
    own = json.loads((finished_runs.folder(ROW) / "evaluation/table/denoise.json").read_text())
    assert blind == own["denoisers"]["blind"]["psnr"]["25"]["value"]
    text = table_text(report)
    assert "| - (92.9) |" in text
    assert "JEM (WideResNet): not run yet" in text
    assert (finished_runs.out / "table1.png").stat().st_size > 10_000
    assert str(finished_runs.out) not in json.dumps(report)


def test_row_without_its_data_folder_raises_an_error(tmp_path):
    runs = ExperimentRuns(tmp_path, SCALES["full"], imagenet_dir=tmp_path / "absent")
    with pytest.raises(UserError, match="absent"):
        write_table(TABLES["table2"], runs, ["imagenet-joint"])
    assert not (tmp_path / "rows").exists()


@pytest.mark.slow
def test_row_beyond_available_memory_is_refused(tmp_path, monkeypatch):
    from ebmkit.training import cost

    monkeypatch.setattr(cost, "available_memory", lambda device: 2**10)
    runs = ExperimentRuns(tmp_path, TINY)
    with pytest.raises(UserError, match="memory"):
        runs.check([ROW])
    assert not (tmp_path / "rows").exists()


# --- several processes ---------------------------------------------------------------------------

WORKER = """
import pickle, sys, time
from pathlib import Path
from ebmkit.experiments import EXPERIMENTS, ExperimentRuns, write
from ebmkit.experiments.tables import run_table

out, hangs = Path(sys.argv[1]), sys.argv[2] == "hangs"
scale, table = pickle.loads((out / "work.pickle").read_bytes())

def fit(trainer, name):
    print("trained", name, flush=True)
    save = trainer.save
    def save_and_hang(*given, **named):
        save(*given, **named)
        print("saved", flush=True)
        time.sleep(60)
    if hangs:
        trainer.save = save_and_hang
    time.sleep(0.5)
    trainer.fit()

runs = ExperimentRuns(out, scale, fit=fit, log=lambda sentence: print(sentence, flush=True))
print("ready", flush=True)
sys.stdin.readline()
write(table.name, EXPERIMENTS[table.name], run_table(table, runs), out)
print("report", (out / "table3.md").read_bytes(), flush=True)
"""


def start_worker(out, behaviour="works"):
    command = [sys.executable, "-c", WORKER, str(out), behaviour]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def give_work(out, rows):
    table = replace(TABLES["table3"], variants=rows, orderings=())
    (out / "work.pickle").write_bytes(pickle.dumps((TINY, table)))


@pytest.mark.slow
def test_processes_share_the_rows_and_write_the_same_report(tmp_path):
    layers = [{"objective": "ce+dsm", "optimizer": {"lr": 1e-3 / n}} for n in range(1, 5)]
    rows = tuple(replace(ROW, name=f"row-{n}", layer=layer) for n, layer in enumerate(layers))
    give_work(tmp_path, rows)
    workers = [start_worker(tmp_path) for _ in range(2)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    ended = [worker.communicate(timeout=900) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    lines = [output.splitlines() for output, _ in ended]
    trained = [line for own in lines for line in own if line.startswith("trained")]
    measured = [line for own in lines for line in own if ": measuring" in line]
    assert sorted(trained) == [f"trained row-{n}" for n in range(4)]
    assert len(measured) == len(set(measured)) == 8
    assert sum(any(line.startswith("trained") for line in own) for own in lines) > 1
    assert len({own[-1] for own in lines}) == 1
    assert "not run yet" not in (tmp_path / "table3.md").read_text()
    assert not list(tmp_path.glob("rows/*.claim"))


@pytest.mark.slow
def test_row_of_a_killed_process_resumes_bit_identically(runs, log, finished_folder):
    give_work(runs.out, (ROW,))
    worker = start_worker(runs.out, "hangs")
    worker.stdin.write("go\n")
    worker.stdin.flush()
    assert [worker.stdout.readline() for _ in range(3)] == ["ready\n", "trained joint\n", "saved\n"]
    with pytest.raises(FolderLocked, match=rf"process {worker.pid} on .* works on .*joint"):
        runs.try_run(ROW, PROTOCOL)
    worker.kill()
    worker.communicate()
    runs.share([("joint", partial(runs.try_run, ROW, PROTOCOL))])
    assert log.trained == [("joint", 2)]
    state, expected = (load(out / "rows/joint").state_dict() for out in (runs.out, finished_folder))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_row_that_failed_in_another_process_is_tried_again_only_by_a_later_command(runs, log):
    row = replace(ROW, layer=DIVERGING)
    waiting = ExperimentRuns(runs.out, TINY, fit=log.fit)
    runs.try_run(row, None)
    assert [name for name, _ in log.trained] == ["joint"]
    waiting.try_run(row, None)
    assert waiting.stopped == runs.stopped != {}
    assert len(log.trained) == 1
    ExperimentRuns(runs.out, TINY, fit=log.fit).try_run(row, None)
    assert len(log.trained) == 2


def test_taken_work_is_done_last_and_waited_for(runs, log, monkeypatch):
    done, attempts, pauses = [], iter([FolderLocked("by 7"), FolderLocked("by 7"), None]), []

    def taken_twice():
        error = next(attempts)
        if error:
            raise error
        done.append("a")
        return 1

    monkeypatch.setattr("time.sleep", pauses.append)
    found = runs.share([("a", taken_twice), ("b", lambda: done.append("b"))])
    assert found == {"a": 1, "b": None}
    assert done == ["b", "a"]
    assert log == ["waiting for a: by 7"]
    assert pauses == [0.1, 0.2]


def test_without_waiting_the_free_work_is_done_once(runs):
    done, runs.waits = [], False

    def taken():
        raise FolderLocked("by 7")

    with pytest.raises(FolderLocked, match="by 7"):
        runs.share([("a", taken), ("b", lambda: done.append("b"))])
    assert done == ["b"]
