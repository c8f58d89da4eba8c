"""A joint CIFAR-10 recipe on one GPU: correctness, speed and profile of the training step.

    uv run python benchmarks/joint_gpu.py --data-dir DIR --work WORK --out OUT --seconds 540

Each stage writes a JSON file to OUT; finished stages are skipped, so repeat the command until all
are done:

1. ``check``: parameter gradients of each compute setting against eager float32.
2. ``speed``: the joint step against the plain eager one, float32 and TF32 (`ebmkit.bench`).
3. ``profile``: device time by kind of kernel over some steps, and idle time of the device.
4. ``train``: the recipe, in WORK/run; interrupted after --seconds and resumed by the next call.
5. ``evaluate``: accuracy and PSNR of the result.

The default recipe is our `cifar10`; the paper's is ``--recipe cdn-cifar10``.

``step`` runs only with ``--stages step`` and needs no data: the joint steps of widths 64 and 16,
eager in TF32, eager in bf16 and compiled, each against the plain eager step in the same minute.

``--quick`` runs everything at a tiny size on any device.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ebmkit.bench import BenchmarkSetting, comparison, document, measure
from ebmkit.compute import ComputeConfig, describe, environment, pick_device
from ebmkit.data import Batch
from ebmkit.data.streams import prefetch
from ebmkit.objectives import TrainingLoss
from ebmkit.storage import write_atomically
from ebmkit.training import TrainConfig, Trainer, resolve
from ebmkit.training.loop import assemble
from ebmkit.training.optim import make_optimizer
from ebmkit.training.step import TrainingStep

KINDS = {
    "compiled pointwise and reductions": r"^triton",
    "matrix product": r"gemm|nvjet|addmm|aten::mm|bmm|cublas",
    "change of layout": r"nchwtonhwc|nhwctonchw|transpose",
    "convolution": r"conv|cudnn|implicit|xmma|cutlass|winograd|wgrad|dgrad",
    "optimiser": r"adam|multi_tensor|foreach",
    "random numbers": r"distribution|philox|rand",
    "copies": r"memcpy|memset|copy|cat|fill",
}
PROFILED = 20
STAGES = ["check", "speed", "profile", "train", "evaluate"]
WAYS = {
    "eager tf32": ComputeConfig(precision="tf32", compile="off"),
    "eager bf16": ComputeConfig(precision="bf16", compile="off"),
    "compiled bf16": ComputeConfig(precision="bf16", compile="on"),
    "compiled tf32": ComputeConfig(precision="tf32", compile="on"),
}


def main() -> None:
    """Run the remaining stages within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10, as `ebmkit train` takes it")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="time for this call")
    parser.add_argument("--steps", type=int, help="default: the recipe's")
    parser.add_argument("--recipe", default="cifar10", help="cifar10, or the paper's cdn-cifar10")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES, "step"], default=STAGES)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], help="of step")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    if "step" in options.stages:
        steps_by_way(options, end)
    if options.stages == ["step"]:
        return
    config = configuration(options)
    stages = {"check": check, "speed": speed, "profile": kernels}
    for name, stage in stages.items():
        path = options.out / f"{name}.json"
        if name in options.stages and not path.exists():
            begun = time.perf_counter()
            found = stage(config, options.quick)
            found |= {"seconds": time.perf_counter() - begun, "environment": environment()}
            write_atomically(path, json.dumps(found, indent=2).encode())
    run = options.work / "run"
    if "train" not in options.stages:
        return summary(options.out)
    if not (options.out / "train.json").exists() and end - time.monotonic() > 60:
        train(config, run, options, end - time.monotonic())
    left = end - time.monotonic()
    evaluated = (options.out / "denoise.json").exists()
    if (options.out / "train.json").exists() and not evaluated and left > 30:
        command = [sys.executable, "-m", "ebmkit", "evaluate", str(run), "--suite"]
        subprocess.run([*command, "classify,denoise"], check=True, timeout=left)
        for name in ("classify", "denoise"):
            found = json.loads((run / "evaluation" / f"{name}.json").read_text())
            write_atomically(options.out / f"{name}.json", json.dumps(found, indent=2).encode())
    summary(options.out)


def configuration(options: argparse.Namespace) -> TrainConfig:
    """Configuration of the recipe, or of a tiny run on digits."""
    layer: dict[str, Any] = {"device": options.device}
    if options.quick:
        layer |= {"model": {"backbone": {"width": 8}}, "steps": 40, "checkpoint_every": 10}
        recipe = "digits"
    else:
        layer |= {"dataset": {"data_dir": str(options.data_dir.absolute())}}
        layer |= {"checkpoint_every": 3000, "validate_every": 3000, "log_every": 100}
        recipe = options.recipe
    if options.steps:
        layer["steps"] = options.steps
    return resolve(layer, recipe=recipe)


def check(config: TrainConfig, quick: bool) -> dict[str, Any]:
    """Relative differences of the parameter gradient of the joint loss to eager float32."""
    trainer = assemble(config)
    drawn = next(first_batches(trainer, 1))
    ways = {
        "eager float32": ComputeConfig(precision="fp32", compile="off"),
        "compiled float32": ComputeConfig(precision="fp32", compile="auto"),
        "eager bf16": ComputeConfig(precision="bf16", compile="off"),
        "default": ComputeConfig(),
    }
    found = {name: gradient(trainer, way, drawn) for name, way in ways.items()}
    exact = found["eager float32"]
    return {
        "relative_difference_to_eager_float32": {
            name: float((g - exact).norm() / exact.norm()) for name, g in found.items()
        }
    }


def first_batches(trainer: Trainer, steps: int) -> Iterator[dict[str, Batch]]:
    """Training batches of the first ``steps`` steps."""
    streams = {name: stream.batches(0, steps) for name, stream in trainer.streams.items()}
    return prefetch(streams, trainer.device)


def gradient(trainer: Trainer, way: ComputeConfig, drawn: dict[str, Any]) -> torch.Tensor:
    """Gradient of all parameters on one batch."""
    model = copy.deepcopy(trainer.model)
    loss = TrainingLoss(model, trainer.loss.terms, trainer.config.balance)
    optimizer = make_optimizer(model, trainer.config.optimizer)
    TrainingStep(loss.to(trainer.device), optimizer, way)(drawn, rate=0.0)
    parts = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts)


def speed(config: TrainConfig, quick: bool) -> dict[str, Any]:
    """Results of `ebmkit.bench` for the joint step and its two parts."""
    width, size, batch = (8, 8, 4) if quick else (64, 32, 64)
    device = pick_device(config.device)
    rows = []
    for objective in ("ce", "dsm", "ce+dsm"):
        setting = BenchmarkSetting(f"train {objective}", "gradresnet18", width, size, batch)
        found = comparison(setting, 3, device, config.compute, objective)
        rows += measure(found, device, 3 if quick else 15)
    return document(rows)


def steps_by_way(options: argparse.Namespace, end: float) -> None:
    """Time the joint step with each of `WAYS`; updates ``step.json`` after each result."""
    rows: list[Any] = []
    device = pick_device(options.device)
    sizes = [(8, 8, 4)] if options.quick else [(64, 32, 64), (16, 32, 64)]
    for way, (width, size, batch) in itertools.product(options.ways, sizes):
        if time.monotonic() > end or (options.quick and way != "eager bf16"):
            continue
        begun = time.monotonic()
        setting = BenchmarkSetting(f"train ce+dsm, {way},", "gradresnet18", width, size, batch)
        try:
            rows += measure(comparison(setting, 3, device, WAYS[way], "ce+dsm"), device, 5)
        except Exception as error:
            print(f"{way}, width {width}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        for row in rows[-3:]:
            print(row.name, f"{1e3 * row.median_s:.2f} ms, {row.peak_mb:.0f} MB", flush=True)
        print(f"{way}: {time.monotonic() - begun:.0f} s with what it takes to compile", flush=True)
        write_atomically(options.out / "step.json", json.dumps(document(rows)).encode())


def kernels(config: TrainConfig, quick: bool) -> dict[str, Any]:
    """Device time per step by kind of kernel, and the idle share."""
    trainer = assemble(config)
    trainer.try_steps(10)
    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    fixed = next(first_batches(trainer, 1))
    seconds = {"fresh batches": timed(trainer, None), "one batch": timed(trainer, fixed)}
    with profile(activities=activities) as recorded:
        begun = time.perf_counter()
        for drawn in first_batches(trainer, PROFILED):
            trainer.update(drawn, 1e-5)
        trainer.update.read()
        wall = (time.perf_counter() - begun) / PROFILED
    by_kind: dict[str, float] = {}
    busy = 0.0
    largest = []
    for event in recorded.key_averages():
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if time_us <= 0:
            continue
        kind = next((k for k, p in KINDS.items() if re.search(p, event.key, re.I)), "other")
        by_kind[kind] = by_kind.get(kind, 0.0) + time_us / PROFILED / 1e6
        busy += time_us / PROFILED / 1e6
        largest.append((time_us / PROFILED / 1e6, event.count / PROFILED, event.key[:120]))
    cost = trainer.budget.cost(config.steps)
    return {
        "step_seconds": seconds["fresh batches"],
        "step_seconds_on_one_batch": seconds["one batch"],
        "data_share": 1 - seconds["one batch"] / seconds["fresh batches"],
        "step_seconds_profiled": wall,
        "seconds_by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "idle_share_at_least": max(0.0, 1 - busy / wall),  # kernels may overlap
        "largest": sorted(largest, reverse=True)[:25],
        "flops": cost.flops,
        "matrix_rate": cost.rate,
        "share_of_matrix_rate": cost.mfu(seconds["fresh batches"]),
        "device": describe(trainer.device),
    }


def timed(trainer: Trainer, fixed: dict[str, Batch] | None, steps: int = 50) -> float:
    """Seconds per step, on new batches or always on ``fixed``."""
    batches = first_batches(trainer, steps)
    trainer.update.read()
    begun = time.perf_counter()
    for _ in range(steps):
        trainer.update(next(batches) if fixed is None else fixed, 1e-5)
    trainer.update.read()
    return (time.perf_counter() - begun) / steps


def train(config: TrainConfig, run: Path, options: argparse.Namespace, seconds: float) -> None:
    """Start or resume training within ``seconds``; write ``train.json`` when it is finished."""
    command = [sys.executable, "-m", "ebmkit", "train", "--no-evaluate"]
    if (run / "config.yaml").exists():
        command += ["--resume", str(run)]
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        path = options.work / "config.json"  # JSON is YAML
        path.write_text(json.dumps(config.model_dump(mode="json")))
        command += ["--config", str(path), "--out", str(run)]
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    try:
        process.wait(timeout=max(5.0, seconds - 25))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it saves and exits
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()  # its last checkpoint remains
            process.wait()
    with (options.work / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"seconds": time.perf_counter() - begun}) + "\n")
    if process.returncode not in (0, 130, -signal.SIGKILL):
        sys.exit(f"training failed with exit code {process.returncode}")
    if process.returncode == 0:
        calls = [json.loads(line)["seconds"] for line in (options.work / "calls.jsonl").open()]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        found = {
            "calls_seconds": calls,
            "cost": json.loads((run / "cost.json").read_text()),
            "last_validation": [row for row in rows if row["kind"] == "validation"][-1:],
            "environment": environment(),
        }
        write_atomically(options.out / "train.json", json.dumps(found, indent=2).encode())


def summary(folder: Path) -> None:
    """Print a table of the results so far."""
    table = Table("stage", "result")
    known = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    if "check" in known:
        for name, value in known["check"]["relative_difference_to_eager_float32"].items():
            table.add_row(f"gradient, {name}", f"{value:.1e}")
    for row in known.get("speed", {}).get("rows", []):
        table.add_row(row["name"], f"{1e3 * row['median_s']:.2f} ms, ratio {row['ratio']:.2f}")
    if "profile" in known:
        found = known["profile"]
        table.add_row("step", f"{1e3 * found['step_seconds']:.2f} ms")
        table.add_row("share of the matrix rate", f"{found['share_of_matrix_rate']:.0%}")
        table.add_row("share for data", f"{found['data_share']:.1%}")
        table.add_row("idle, at least", f"{found['idle_share_at_least']:.0%}")
        for kind, seconds in found["seconds_by_kind"].items():
            table.add_row(f"  {kind}", f"{1e3 * seconds:.3f} ms a step")
    if "train" in known:
        table.add_row("training", f"{sum(known['train']['calls_seconds']):.0f} s")
    if "classify" in known:
        table.add_row("accuracy", f"{known['classify']['accuracy']:.2%}")
    if "denoise" in known:
        table.add_row("PSNR", str(known["denoise"]["psnr"]))
    Console().print(table)


if __name__ == "__main__":
    main()
