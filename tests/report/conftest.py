"""Fixtures: results of suites, and run folders with them."""

import json
from dataclasses import asdict

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn, make_mixture
from ebmkit_tests.support.sampling_runs import save_run

from ebmkit.evaluation import evaluate
from ebmkit.training import RunFolder, resolve
from ebmkit.training.cost import RunStats

STEPS = 40


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """JSON files of three suites, measured on a mixture with known density."""
    folder = tmp_path_factory.mktemp("evaluation")
    mixture = make_mixture()
    images = Drawn(*mixture.sample(40, torch.Generator().manual_seed(2)))
    evaluate(mixture, images, ["classify", "denoise", "calibration"], folder, plots=False)
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture
def make_run(tmp_path, documents):
    """Function that writes a run folder, as at the end of a training of ``steps`` of 40 steps."""

    def make(name="run", steps=STEPS, evaluated=True, **config):
        run = RunFolder.create(tmp_path / name, resolve({"steps": STEPS} | config))
        for step in range(1, steps + 1):
            run.log({"kind": "train", "step": step, "ce": 2 / step, "lr": 0.01})
            if step % 10 == 0:
                run.log({"kind": "validation", "step": step, "ce": 3 / step, "accuracy": 0.5})
        save_run(run.path, steps=steps)
        if steps == STEPS:
            counted = {"flops": {"ce": 10**9}, "matrix_rate": 1e11, "share": 0.2}
            machine = {"precision": "fp32", "compiled": False, "processes": 1, "device": "a CPU"}
            cost = RunStats(steps, 0.1, 640.0, 0.01, 10**9, **counted, **machine)
            run.write_document("cost.json", asdict(cost))
        if evaluated:
            (run.path / "evaluation").mkdir()
            for file, document in documents.items():
                (run.path / "evaluation" / file).write_text(json.dumps(document))
        return run.path

    return make
