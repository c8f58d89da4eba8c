"""The command line: output, files, errors and exit codes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import yaml
from ebmkit_tests.support.command_line import ebmkit_command
from PIL import Image

import ebmkit
from ebmkit.cli.tools import tables
from ebmkit.storage import Claim
from ebmkit.training import RunFolder

pytestmark = pytest.mark.usefixtures("count_cost_roughly", "few_resamples")

SMALL = [
    "--backbone", "gradresnet10", "--width", "8", "--set", "log_every=1",
    "--set", "validation_images=16", "--set", "streams.classify.batch_size=16",
    "--set", "streams.denoise.batch_size=16", "--device", "cpu",
]  # fmt: skip
LIMIT = 40
"""Test images in the evaluation at the end of training."""


def assert_refused(result, *messages):
    """Check for one sentence on stderr, exit code 2 and no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in messages:
        assert text in result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with images and a small run on digits, trained by the command line."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebmkit.cli.train.FINAL_IMAGES", LIMIT)
        result = ebmkit_command(
            "train", "--objective", "ce+dsm", "--steps", 4, "--out", "run", *SMALL, cwd=folder,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder / "train.txt").write_text(result.stdout)
    digit = np.clip(np.kron(np.eye(4), np.ones((3, 3))) * 255, 0, 255).astype(np.uint8)
    Image.fromarray(digit).save(folder / "gray.png")
    Image.fromarray(np.stack([digit, 255 - digit, digit], -1)).save(folder / "colour.png")
    return folder


def test_training_ends_with_a_table_and_plots(home):
    printed = (home / "train.txt").read_text()
    for word in ("accuracy", "PSNR", "15", "25", "50", "run folder: run"):
        assert word in printed
    run = home / "run"
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "learning_curves.png",
        "report.html",
        "manifest.json",
        "checkpoints/best.safetensors",
    ):
        assert (run / name).is_file(), name
    assert list((run / "evaluation").glob("*.png"))
    classify = json.loads((run / "evaluation" / "classify.json").read_text())
    assert 0 <= classify["accuracy"] <= 1
    denoise = json.loads((run / "evaluation" / "denoise.json").read_text())
    assert list(denoise["psnr"]) == list(denoise["psnr_noisy"]) == ["15", "25", "50"]


@pytest.mark.slow
def test_evaluate_reproduces_the_metrics_of_training(home):
    path = home / "run" / "evaluation" / "denoise.json"
    before = json.loads(path.read_text())
    options = ["--suite", "classify,denoise", "--limit", LIMIT]
    result = ebmkit_command("evaluate", "run", *options, cwd=home)
    assert result.returncode == 0, result.stderr
    after = json.loads(path.read_text())
    assert after["psnr"] == pytest.approx(before["psnr"], abs=1e-4)
    limited = ebmkit_command("evaluate", "run", "--suite", "classify", "--limit", 20, cwd=home)
    assert limited.returncode == 0, limited.stderr
    assert json.loads(path.read_text()) == after  # a limited evaluation writes to another folder


def test_classify_prints_classes_probabilities_and_density(home):
    result = ebmkit_command("classify", "run", "gray.png", cwd=home)
    assert result.returncode == 0, result.stderr
    assert "%" in result.stdout
    assert "nats" in result.stdout
    assert "resized to 8x8" in result.stderr


def test_denoise_command_equals_the_python_call(home):
    result = ebmkit_command(
        "denoise", "run", "gray.png", "--sigma", "25/255", "--label", "3", "--out", "out", cwd=home
    )
    assert result.returncode == 0, result.stderr
    written = np.asarray(Image.open(home / "out" / "gray.png"))
    y = torch.from_numpy(np.asarray(Image.open(home / "gray.png")) / 255).float()[None, None]
    expected = ebmkit.load(home / "run").denoise(y, 25 / 255, 3).clamp(0, 1)[0, 0]
    assert np.abs(written / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-5  # 8-bit rounding
    again = ebmkit_command("denoise", "run", "gray.png", "--out", "out", cwd=home)
    assert_refused(again, "exists")
    estimated = ebmkit_command("denoise", "run", "gray.png", "--out", "blind", cwd=home)
    assert "(estimated)" in estimated.stdout


def test_several_images_continue_after_a_bad_one(home):
    """Files, folders and patterns; results and errors of all images are in the tables."""
    folder = home / "many" / "sub"
    folder.mkdir(parents=True)
    for path in (folder / "b.png", home / "many" / "a.png", home / "c1.png"):
        shutil.copy(home / "gray.png", path)
    (home / "many" / "0.png").write_bytes(b"no image")
    named = ["many", "c*.png", "gray.png", "--device", "cpu"]  # c*: c1.png and colour.png
    good = ["many/a.png", "many/sub/b.png", "c1.png", "gray.png"]

    found = ebmkit_command("classify", "run", *named, "--top", 2, "--csv", "c.csv", cwd=home)
    assert found.returncode == 2
    assert "2 of 6 images could not be classified" in found.stderr.splitlines()[-1]
    with (home / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-1] == "error"  # also if the first image is a bad one
    assert [row["image"] for row in rows if row["rank"] == "1"] == good
    assert {r["image"] for r in rows if r["error"]} == {"many/0.png", "colour.png"}
    assert len(rows) == 2 * len(good) + 2
    assert sum(float(r["probability"]) for r in rows[1:3]) <= 1

    cleaned = ebmkit_command("denoise", "run", *named, "--out", "all", "--json", "d.json", cwd=home)
    assert cleaned.returncode == 2
    assert "2 of 6 images could not be denoised" in cleaned.stderr.splitlines()[-1]
    rows = json.loads((home / "d.json").read_text())
    outputs = ["all/a.png", "all/sub/b.png", "all/c1.png", "all/gray.png"]
    assert [row["output"] for row in rows if "output" in row] == outputs
    assert all((home / output).is_file() for output in outputs)
    again = ebmkit_command("denoise", "run", "many", "--out", "all", "--json", "d.json", cwd=home)
    assert_refused(again, "d.json", "exists")


def test_epochs_and_short_options_set_fields_of_the_configuration(tmp_path):
    """Two passes over 100 images in batches of 16 are 13 steps."""
    done = ebmkit_command(
        "train", "--epochs", 2, "--batch-size", 16, "--lr", 0.002, "--ema", 0.9, "--workers", 0,
        "--backbone", "gradresnet10", "--width", 8, "--set", "dataset.limit=100", "--device", "cpu",
        "--set", "validation_images=0", "--out", "run", "--no-evaluate", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["steps"], config["optimizer"]["lr"], config["optimizer"]["ema"]) == (
        13,
        0.002,
        0.9,
    )
    assert {stream["batch_size"] for stream in config["streams"].values()} == {16}
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 0
    both = ebmkit_command("train", "--epochs", 2, "--steps", 9, cwd=tmp_path)
    assert_refused(both, "--epochs 2", "give one")
    assert_refused(ebmkit_command("train", "--epochs", 0, cwd=tmp_path), "--epochs 0")


@pytest.mark.slow
@pytest.mark.filterwarnings("always:a score is differentiated through")
def test_batch_norm_with_a_trained_score_is_said_at_the_start_and_in_the_table(tmp_path):
    trained = ebmkit_command(
        "train", "--backbone", "resnet18", "--objective", "ce+dsm", "--steps", 2, "--out", "run",
        "--width", 2, *SMALL[4:], cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "BatchNorm" in trained.stderr
    suites = ["--suite", "classify,calibration", "--limit", 16, "--device", "cpu"]
    again = ebmkit_command("evaluate", "run", *suites, cwd=tmp_path)
    for shown, table in ((trained.stdout, "denoise: "), (again.stdout, "classify: ")):
        above, _, below = " ".join(shown.split()).partition(table)
        assert "known not to work" not in above
        assert below.count("a pair known not to work") == 1


def test_list_without_a_kind_is_an_overview(home):
    shown = ebmkit_command("list", cwd=home, COLUMNS="1000")
    assert shown.returncode == 0
    for kind, found in tables().items():
        assert f" {kind} " in shown.stdout
        assert ", ".join(found) in shown.stdout
    kinds = {kind: set(tables()[kind]) for kind in ("backbones", "denoisers", "diffusion")}
    assert {"resnet50", "timm:NAME"} <= kinds["backbones"]
    assert "drunet" in kinds["denoisers"]
    assert kinds["diffusion"] == {"unet", "unet-cifar10"}
    assert not kinds["denoisers"] & kinds["diffusion"]
    for kind in ("guidance", "schedules"):  # each is a value of one option
        assert not any(name.startswith("-") for name in tables()[kind])


@pytest.mark.parametrize("kind", ["backbones", "heads", "objectives", "datasets", "recipes"])
def test_list_shows_the_tables(home, kind):
    result = ebmkit_command("list", kind, cwd=home)
    assert result.returncode == 0
    for name in tables()[kind]:
        assert name in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "gradresnet81"], "did you mean 'gradresnet18'"),
        (["--objective", "ce+dms"], "did you mean 'dsm'"),
        (["--objective", "ce++dsm"], "does not parse"),
        (["--dataset", "cifar"], "did you mean 'cifar10'"),
        (["--recipe", "digit"], "did you mean 'digits'"),
        (["--set", "optimizer.rl=1"], "did you mean 'lr'"),
        (["--set", "streams.denoise.noise.max=0"], "needs max above 0"),
        (["--set", "nonsense"], "key=value"),
        (["--config", "absent.yaml"], "cannot read"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--dataset", "patches", "--objective", "ce+dsm"], "needs labels"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
        (["--out", "run"], "exists"),
        (["--resume", "nowhere"], "no run folder"),
        (["--resume", "run", "--seed", "5"], "seed was 0 and is now 5"),
        (["--resume", "run", "--out", "other"], "leave out --out"),
        (["--resume", "run", "--init", "run"], "leave out one of them"),
        (["--init", "nowhere"], "nowhere"),
        (["--log", "csv,wand"], "unknown logger 'wand': did you mean 'wandb'"),
    ],
)
def test_train_refuses_invalid_options_in_one_sentence(home, arguments, message):
    before = sorted(home.rglob("*"))
    assert_refused(ebmkit_command("train", *arguments, cwd=home), message)
    assert sorted(home.rglob("*")) == before  # no file was created


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "nowhere", "gray.png"], "no run folder"),
        (["classify", "run", "absent.png"], "absent.png"),
        (["classify", "run", "colour.png"], "colour.png"),
        (["classify", "run", "train.txt"], "train.txt"),
        (["denoise", "run", "gray.png", "--out", "x", "--sigma", "0"], "sigma '0'"),
        (["denoise", "run", "gray.png", "--out", "x", "--sigma", "-5/255"], "sigma '-5/255'"),
        (["denoise", "run", "gray.png", "--out", "x", "--sigma", "strong"], "sigma 'strong'"),
        (["denoise", "run", "gray.png", "--out", "x", "--label", "10"], "out of range"),
        (["denoise", "run", "gray.png", "--out", "x", "--label", "cat"], "label 'cat'"),
        (["denoise", "run", "gray.png", "--out", "gray.png"], "gray.png"),
        (["evaluate", "run", "--suite", "clasify"], "did you mean 'classify'"),
        (["data", "pack", "nowhere", "out.h5"], "nowhere"),
    ],
)
def test_other_commands_refuse_invalid_arguments_in_one_sentence(home, arguments, message):
    before = sorted(home.rglob("*"))
    assert_refused(ebmkit_command(*arguments, cwd=home), message)
    assert sorted(home.rglob("*")) == before


def test_model_without_labels_refuses_classify_and_labels(tmp_path):
    result = ebmkit_command(
        "train", "--dataset", "patches", "--steps", 3, "--out", "run", "--no-evaluate", *SMALL,
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "black.png")
    assert_refused(ebmkit_command("classify", "run", "black.png", cwd=tmp_path), "without labels")
    labelled = ["denoise", "run", "black.png", "--out", "x", "--label", "0"]
    assert_refused(ebmkit_command(*labelled, cwd=tmp_path), "without labels")


@pytest.mark.parametrize(
    ("signum", "quiet"),
    [(signal.SIGINT, []), (signal.SIGINT, ["--quiet"]), (signal.SIGTERM, ["--quiet"])],
)
def test_signal_saves_prints_the_resume_command_and_sets_the_exit_code(tmp_path, signum, quiet):
    metrics, ended = tmp_path / "run" / "metrics.jsonl", threading.Event()

    def press():
        while not ended.wait(0.02):
            if metrics.is_file() and metrics.stat().st_size:
                return os.kill(os.getpid(), signum)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        steps = ["--steps", 100_000, "--out", "run"]
        stopped = ebmkit_command("train", *steps, *SMALL, *quiet, cwd=tmp_path)
    finally:
        ended.set()
        thread.join()
    assert stopped.returncode == 128 + signum, stopped.stderr
    assert "ebmkit train --resume run" in (stopped.stderr if quiet else stopped.stdout)
    assert not quiet or stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_reproduce_that_waits_for_another_process_can_be_stopped(
    tmp_path, monkeypatch, signum, code
):
    monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signum))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # parallel tests ignore it
    command = ("reproduce", "table3", "--scale", "smoke", "--only", "joint", "--out", "out")
    (tmp_path / "out/rows").mkdir(parents=True)
    try:
        with Claim(tmp_path / "out/rows/joint").held():
            stopped = ebmkit_command(*command, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.returncode == code, stopped.stderr
    assert f"waiting for joint: process {os.getpid()}" in stopped.stdout
    assert "run the same command to resume out" in stopped.stdout
    assert not (tmp_path / "out/table3.md").exists()


@pytest.mark.slow
def test_training_on_a_packed_folder(tmp_path):
    g = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(20):
            image = g.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "pictures" / label / f"{i}.png")
    packed = ebmkit_command("data", "pack", "pictures", "set.h5", cwd=tmp_path)
    assert packed.returncode == 0, packed.stderr
    assert_refused(ebmkit_command("data", "pack", "pictures", "set.h5", cwd=tmp_path), "exists")
    trained = ebmkit_command(
        "train", "--dataset", "hdf5", "--data-dir", "set.h5", "--steps", 2, "--out", "run", *SMALL,
        "--no-evaluate", cwd=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert ebmkit.load(tmp_path / "run").card.class_names == ["cats", "dogs"]


@pytest.mark.slow
def test_diverging_run_reports_each_rollback_and_exits_with_2(tmp_path):
    arguments = [
        "--set=rollback.max_rollbacks=1",
        "--set=optimizer.lr=3",
        "--set=validation_images=0",
    ]
    arguments += ["--set=negatives.steps=2", "--set=negatives.buffer_size=128", "--width=8"]
    ended = ebmkit_command(
        "train", "--objective=jem", "--steps=40", "--no-evaluate", *arguments, cwd=tmp_path
    )
    assert ended.returncode == 2
    assert "rollback: step " in ended.stderr
    assert "back to step 0, learning rate times 0.3" in ended.stderr
    assert "diverged 2 times and is given up" in ended.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list((run / "rollbacks").iterdir())) == 2


@pytest.mark.slow
def test_evaluation_shows_progress_without_terminal(home, monkeypatch):
    monkeypatch.setattr("ebmkit.terminal.FIRST_LINE", 0)
    command = ["evaluate", "run", "--suite", "calibration", "--limit", 8, "--device", "cpu"]
    result = ebmkit_command(*command, cwd=home)
    assert result.returncode == 0, result.stderr
    assert "calibration  16/16 images" in result.stdout


@pytest.mark.slow
def test_run_continues_if_the_reader_of_its_output_ends(tmp_path):
    """As with ``| head -1``; the path has a letter that cp1252 lacks."""
    command = [sys.executable, "-m", "ebmkit", "train", "--steps", "4", "--no-evaluate", *SMALL]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "cp1252"}
    with subprocess.Popen(
        [*command, "--out", "\u017elu\u0165"], cwd=tmp_path, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert b"lu?" in process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert RunFolder.open(tmp_path / "\u017elu\u0165").load_checkpoint()["step"] == 4
