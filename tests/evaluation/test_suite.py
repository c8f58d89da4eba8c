"""Evaluation in several processes gives the results of one process, written once."""

import copy
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import pytest
import torch
from ebmkit_tests.support.command_line import ebmkit_command
from ebmkit_tests.support.mixture_world import Drawn

from ebmkit.distributed import DistributedContext
from ebmkit.evaluation import SUITES, evaluate, ood, statistics
from ebmkit.evaluation.suite import EvaluationContext, noisy_batches

pytestmark = pytest.mark.usefixtures("few_resamples")

STANDARD = [name for name, suite in SUITES.items() if suite.standard]

VARYING_KEYS = ("seconds", "environment", "processes")


@dataclass(frozen=True)
class Threads(DistributedContext):
    """Threads in place of processes: ``gather`` exchanges objects through a shared list."""

    table: list = field(default_factory=list)
    barrier: threading.Barrier | None = None

    def gather(self, thing):
        self.table[self.rank] = thing
        self.barrier.wait(60)
        everything = list(self.table)
        self.barrier.wait(60)
        return everything

    def broadcast(self, thing):
        return self.gather(thing)[0]


def run_in_threads(size, work):
    """Results of ``work(world)`` in each of ``size`` threads, by rank."""
    table, barrier, found = [None] * size, threading.Barrier(size), {}

    def run(rank):
        try:
            found[rank] = work(Threads(rank, size, rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


def without_varying_keys(document):
    return {key: value for key, value in document.items() if key not in VARYING_KEYS}


@pytest.mark.parametrize(
    ("size", "batch_size"), [pytest.param(2, 7, marks=pytest.mark.slow), (5, 12)]
)
def test_every_process_returns_results_of_single_process(
    size, batch_size, network, random_images, tmp_path
):
    """30 images: 5 batches in 2 processes, and 3 batches in 5, two of which have no work."""
    options = {"batch_size": batch_size, "plots": False, "noise_levels": [0, 0.1]}

    def work(world):
        own = copy.deepcopy(network)
        return evaluate(
            own, random_images, STANDARD, tmp_path / str(world.rank), world=world, **options
        )

    alone = evaluate(network, random_images, STANDARD, tmp_path / "alone", **options)
    shared = run_in_threads(size, work)
    for results in shared:
        for name, result in results.items():
            assert without_varying_keys(result.document) == without_varying_keys(
                alone[name].document
            )
            assert result.document == shared[0][name].document
    assert json.loads((tmp_path / "0" / "classify.json").read_text())["processes"] == size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "alone"]  # only rank 0 writes


def test_processes_partition_images_without_changing_noise(random_images):
    whole = torch.cat([batch.y for batch in noisy_batches(random_images, 0.1, 0, 4)])
    own = [
        torch.cat(
            [
                batch.y
                for batch in noisy_batches(random_images, 0.1, 0, 4, world=DistributedContext(r, 3))
            ]
        )
        for r in range(3)
    ]
    assert sum(len(part) for part in own) == len(random_images)
    assert torch.equal(torch.cat([own[0][:4], own[1][:4], own[2][:4]]), whole[:12])


def test_progress_of_every_process_reaches_the_end(network, random_images):
    def work(world):
        seen = []
        context = EvaluationContext(
            network, random_images, batch_size=4, world=world, advance=seen.append
        )
        context.columns(0.1, lambda batch: {"x": batch.x.flatten(1).sum(1)})
        return seen

    for seen in run_in_threads(3, work):
        assert sum(seen) == len(random_images)
        assert min(seen) >= 0


@pytest.mark.parametrize(("count", "batches"), [(360, 8), (1000, 8), (10_000, 24)])
def test_default_batches_divide_among_eight_processes(count, batches, mixture, tmp_path):
    images = Drawn(torch.full((count, 1, 4, 4), 0.4), torch.arange(count) % 3)
    options = {"noise_levels": [0], "plots": False}
    document = evaluate(mixture, images, ["classify"], tmp_path, **options)["classify"].document
    assert math.ceil(count / document["batch_size"]) == batches


@pytest.mark.slow
def test_torchrun_writes_results_of_single_process(tmp_path, monkeypatch):
    """Two processes over gloo write the files of this one, and only rank 0 prints."""
    ended = ebmkit_command(
        "train", "--width", "8", "--steps", "2", "--device", "cpu", "--no-evaluate",
        "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    arguments = ("evaluate", "run", "--device", "cpu", "--limit", "40")
    for module, name in ((statistics, "bootstrap"), (ood, "detection")):  # not `few_resamples`
        monkeypatch.setattr(module, name, getattr(module, name).func)
    alone = ebmkit_command(*arguments, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    (folder,) = (p.parent for p in (tmp_path / "run" / "evaluation").rglob("classify.json"))
    before = {name: json.loads((folder / f"{name}.json").read_text()) for name in STANDARD}
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ebmkit")
    printed = subprocess.run(
        [sys.executable, "-m", *launch, *arguments],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    assert printed == alone.stdout
    for name in STANDARD:
        shared = json.loads((folder / f"{name}.json").read_text())
        assert shared["processes"] == 2
        assert without_varying_keys(shared) == without_varying_keys(before[name])
