"""Run folders with damaged files, disk errors and older formats."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command

import ebmkit
from ebmkit.errors import UserError
from ebmkit.storage import DamagedFile, write_atomically
from ebmkit.storage.manifest import read_manifest
from ebmkit.storage.verify import accept_files, verify_run
from ebmkit.training import RunFolder, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.metrics import whole_rows

pytestmark = pytest.mark.usefixtures("count_cost_roughly")

SMALL = {
    "backbone": "gradresnet10",
    "model": {"backbone": {"width": 4, "channels_per_group": 4}},
    "optimizer": {"ema": 0.9},
    "steps": 6,
    "log_every": 1,
    "validate_every": 2,
    "validation_images": 16,
    "checkpoint_every": 2,
    "device": "cpu",
    "streams": {"classify": {"batch_size": 8}, "denoise": {"batch_size": 8}},
}

CHECKPOINTS = ("checkpoints/step-00000004.pt", "checkpoints/step-00000006.pt")
FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "model.json",
    "model.safetensors",
    "checkpoints/best.safetensors",
    "evaluation/classify.json",
    *CHECKPOINTS,
)


def train(root, seed=0):
    run = RunFolder.create(root, resolve(SMALL, {"seed": seed}))
    assemble(resolve(SMALL, {"seed": seed}), run).fit()
    (root / "evaluation").mkdir()
    write_atomically(root / "evaluation" / "classify.json", json.dumps({"seed": seed}).encode())
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs with different seeds. Tests must not change them."""
    place = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context():
        return [train(place / str(seed), seed) for seed in (0, 1)]


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def resume(root, **layer):
    folder = RunFolder.open(root)
    trainer = assemble(resolve(folder.config(), layer), folder)
    trainer.fit()
    return trainer


def weights(root):
    return {k: v.tolist() for k, v in ebmkit.load(root).state_dict().items()}


def rows_of(root):
    rows = RunFolder(root).metrics()
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def flip_bit(content, place):
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


def flip_in_a_tensor(content):
    """Flip a bit in the tensors, where safetensors and torch.load verify no checksum."""
    return flip_bit(content, len(content) * 3 // 4)


DAMAGES = {
    "empty": lambda content, other: b"",
    "truncated": lambda content, other: content[: len(content) // 2],
    "first bit": lambda content, other: flip_bit(content, 0),
    "bit in a tensor": lambda content, other: flip_in_a_tensor(content),
    "last bit": lambda content, other: flip_bit(content, len(content) - 1),
    "of another run": lambda content, other: other,
    "missing": None,
}


def damage(root, name, how, other):
    path = root / name
    if DAMAGES[how] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes(), (other / name).read_bytes()))


def test_manifest_lists_every_file_of_a_run(trained):
    assert set(FILES) == set(read_manifest(trained[0]).files)
    assert all(found.state == "whole" for found in verify_run(trained[0]))


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_detected(run, trained, name, how):
    """`verify_run` detects it, and the function that reads the file names the file."""
    if how == "of another run" and name in ("environment.json", "model.json"):
        pytest.skip("the file is the same in both runs")
    damage(run, name, how, trained[1])
    assert [found.name for found in verify_run(run) if found.state != "whole"] == [name]
    file = name.rpartition("/")[2]
    if name == "config.yaml" and how == "missing":
        with pytest.raises(UserError, match=r"config\.yaml. is missing: this was a run"):
            RunFolder.open(run)
    elif name == "config.yaml":
        with pytest.raises(DamagedFile, match=rf"{file}' is damaged"):
            RunFolder.open(run).config()
    elif name.startswith("model."):
        with pytest.raises(UserError, match=file):
            ebmkit.load(run)
    elif name == "checkpoints/best.safetensors":
        with pytest.raises(UserError, match=file):
            ebmkit.load(run, weights="best")
    elif name == "metrics.jsonl":
        with pytest.warns(UserWarning, match=rf"{file}' is damaged: it is kept as"):
            RunFolder.open(run).truncate_metrics(6)
    elif name == CHECKPOINTS[1]:
        with pytest.warns(UserWarning, match=rf"{file}' is damaged: .*; going back to step 4"):
            assert RunFolder.open(run).load_checkpoint()["step"] == 4


@pytest.mark.parametrize(
    "how",
    [
        how if how in ("bit in a tensor", "missing") else pytest.param(how, marks=pytest.mark.slow)
        for how in DAMAGES
    ],
)
def test_run_resumes_from_its_newest_intact_checkpoint(run, trained, how):
    """It ends with bit-identical weights and the same metrics; the damaged files are replaced."""
    damage(run, CHECKPOINTS[1], how, trained[1])
    damage(run, "model.safetensors", how, trained[1])
    with pytest.warns(UserWarning, match="going back to step 4"):
        assert resume(run).first_step == 4
    assert weights(run) == weights(trained[0])
    assert all(found.state == "whole" for found in verify_run(run))
    assert rows_of(run) == rows_of(trained[0])


def test_run_without_manifest_resumes_and_rebuilds_it(run, trained):
    (run / "manifest.json").unlink()
    path = run / CHECKPOINTS[1]
    path.write_bytes(flip_in_a_tensor(path.read_bytes()))
    message = r"manifest\.json. is missing; it is rebuilt|going back to step 4"
    # the checksums of the zip archive detect the damage
    with pytest.warns(UserWarning, match=message) as caught:
        resume(run)
    assert len(caught) == 2
    assert weights(run) == weights(trained[0])
    assert all(found.state == "whole" for found in verify_run(run))


def test_damaged_manifest_is_renamed_and_rebuilt(run, trained):
    path = run / "manifest.json"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DamagedFile, match=r"manifest\.json"):
        ebmkit.load(run)
    with pytest.warns(UserWarning, match=r"manifest\.json' is damaged"):
        resume(run)
    assert (run / "manifest.json.damaged").is_file()
    assert weights(run) == weights(trained[0])


def test_checkpoint_named_after_another_step_is_not_loaded(run):
    shutil.copy(run / CHECKPOINTS[1], run / "checkpoints/step-00000009.pt")
    assert RunFolder.open(run).load_checkpoint()["step"] == 6
    (run / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"step-00000009.pt' is damaged: it holds step 6"):
        assert RunFolder.open(run).load_checkpoint()["step"] == 6


def test_resume_without_an_intact_checkpoint_is_refused(run):
    for name in CHECKPOINTS:
        (run / name).write_bytes(b"")
    with pytest.raises(DamagedFile, match="no intact checkpoint is left"):
        resume(run)
    assert RunFolder(run).metrics()[-1]["step"] == 6


@pytest.mark.filterwarnings("ignore:.*manifest.json. is missing; it is rebuilt")
def test_truncated_metrics_are_read_and_continued(run, trained):
    """Cut at every seventh byte of the last two rows; a new row follows the complete ones."""
    whole = (run / "metrics.jsonl").read_bytes()
    (run / CHECKPOINTS[1]).unlink()
    (run / "manifest.json").unlink()
    folder = RunFolder.open(run)
    with folder.held():
        pass
    rows = folder.metrics()
    ends = [end for _, end in whole_rows(whole)]
    for cut in range(ends[-3], len(whole) + 1, 7):
        (run / "manifest.json").unlink()
        (run / "metrics.jsonl").write_bytes(whole[:cut])
        folder = RunFolder.open(run)
        assert folder.metrics() == rows[: sum(end <= cut for end in ends)]
        with folder.held():
            folder.truncate_metrics(6)
            folder.log({"step": 7, "kind": "train"})
        assert folder.metrics()[-1] == {"step": 7, "kind": "train"}
        assert folder.metrics()[:-1] == rows[: sum(end <= cut for end in ends)]


def test_the_configured_number_of_checkpoints_is_kept(tmp_path):
    for keep, kept in ((1, [6]), (3, [2, 4, 6])):
        root = tmp_path / str(keep)
        config = resolve(SMALL, {"keep_checkpoints": keep, "validation_images": 0})
        assemble(config, RunFolder.create(root, config)).fit()
        names = sorted(p.name for p in (root / "checkpoints").glob("step-*"))
        assert names == [f"step-{step:08}.pt" for step in kept]


def test_run_of_format_1_is_converted_to_format_2(run, trained):
    (run / "manifest.json").unlink()
    (run / CHECKPOINTS[1]).unlink()
    (run / CHECKPOINTS[0]).rename(run / "checkpoints" / "last.pt")
    assert resume(run).first_step == 4
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.safetensors",
        "step-00000006.pt",
    ]
    assert weights(run) == weights(trained[0])


@pytest.mark.parametrize("remains", [(), ("checkpoints/",), ("checkpoints/", ".lock")])
def test_run_killed_before_its_first_file_can_start_again(tmp_path, remains):
    root = tmp_path / "run"
    root.mkdir()
    for name in remains:
        (root / name).mkdir() if name.endswith("/") else (root / name).touch()
    assert RunFolder.is_empty_or_aborted(root)
    RunFolder.create(root, resolve(SMALL))
    assert not RunFolder.is_empty_or_aborted(root)


def test_folder_with_other_hidden_files_is_not_an_aborted_run(tmp_path):
    (tmp_path / ".bashrc").touch()
    assert not RunFolder.is_empty_or_aborted(tmp_path)


def test_missing_best_weights_are_reported_and_restored(run, trained):
    """The run resumes from an earlier checkpoint and repeats the validation."""
    (run / "checkpoints" / "best.safetensors").unlink()
    (run / CHECKPOINTS[1]).unlink()
    message = r"going back to step 4|best\.safetensors' is damaged: it is missing; the best weights"
    with pytest.warns(UserWarning, match=message) as caught:
        resume(run)
    assert len(caught) == 2
    assert (run / "checkpoints" / "best.safetensors").is_file()


@pytest.mark.filterwarnings("default:written again from the checkpoint")
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_damaged_model_of_a_finished_run_is_written_again(run, name):
    whole = (run / name).read_bytes()
    (run / name).write_bytes(flip_bit(whole, len(whole) - 2))
    ended = ebmkit_command("train", "--resume", run, "--no-evaluate", cwd=run.parent)
    assert ended.returncode == 0, ended.stderr
    assert f"written again from the checkpoint: {name}" in ended.stderr
    assert (run / name).read_bytes() == whole
    assert all(found.state == "whole" for found in verify_run(run))


FIELDS = {
    "buffer": [5, {"file": "a"}, {"file": 3, "sha256": 3}, {"file": "../x", "sha256": "0"}],
    "best": ["hello", None, [1.0]],
    "seconds": ["a"],
    "rollback": [3],
    "watch": [3],
    "step": [True, -1, 4.0, None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in FIELDS.items() for v in vs])
def test_checkpoint_with_invalid_fields_is_skipped(run, field, value):
    """The manifest lists it, as in a forged run. The previous checkpoint is loaded instead."""
    state = torch.load(run / CHECKPOINTS[1], weights_only=True)
    torch.save(state | {field: value}, run / CHECKPOINTS[1])
    accept_files(run, [CHECKPOINTS[1]])
    with pytest.warns(UserWarning, match="going back to step 4"):
        assert RunFolder.open(run).load_checkpoint()["step"] == 4


def test_folder_with_other_files_is_not_an_aborted_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").touch()
    assert not RunFolder.is_empty_or_aborted(tmp_path)
    with pytest.raises(UserError, match="exists: resume it by --resume"):
        RunFolder.create(tmp_path, resolve(SMALL))


def test_symbolic_link_in_a_run_folder_is_not_written_into(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.iterdir())
    with pytest.raises(UserError, match=r"checkpoints' is a link to .*elsewhere"):
        resume(run, steps=6)
    assert sorted(p.name for p in elsewhere.iterdir()) == before


def test_failed_save_reports_the_last_checkpoint(run, monkeypatch):
    """The error names the unsaved step and the checkpoint from which the run can resume."""
    folder = RunFolder.open(run)
    state = folder.load_checkpoint()

    def full(handle):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError,
        match=r"step 6 is not saved: .*No space left on device .* checkpoint is .*step-00000006",
    ):
        folder.save_checkpoint(state)
    monkeypatch.undo()
    assert RunFolder.open(run).load_checkpoint()["step"] == 6


RESUME_WITH_FILE_SIZE_LIMIT = """
import resource, sys
sys.argv = ["ebmkit", "train", "--resume", sys.argv[1], "--set", "keep_checkpoints=2"]
from ebmkit.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
main()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*step-00000006.pt. is damaged. it is missing")
def test_file_size_limit_keeps_the_previous_checkpoint(run):
    """The operating system refuses the write, as with a quota; nothing is mocked."""
    (run / CHECKPOINTS[1]).unlink()
    before = (run / CHECKPOINTS[0]).read_bytes()
    ended = subprocess.run(
        [sys.executable, "-c", RESUME_WITH_FILE_SIZE_LIMIT, str(run)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "step 6 is not saved" in ended.stderr
    assert "File too large" in ended.stderr
    assert (run / CHECKPOINTS[0]).read_bytes() == before
    assert RunFolder.open(run).load_checkpoint()["step"] == 4
    assert not list(run.rglob("*.partial"))


def test_deleted_folder_is_reported(tmp_path):
    class DeleteFolder:
        def report(self, row):
            if row["step"] == 3:
                shutil.rmtree(tmp_path / "run")

    config = resolve(SMALL)
    trainer = assemble(config, RunFolder.create(tmp_path / "run", config), [DeleteFolder()])
    with pytest.raises(UserError, match=r"cannot write .*No such file or directory"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


def test_resume_of_an_undamaged_run_does_not_warn(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(run)


def test_checkpoint_loads_with_weights_only(run):
    state = torch.load(run / CHECKPOINTS[1], weights_only=True)
    assert {"model", "optimizer", "average", "running", "step"} <= state.keys()
