"""Devices, precisions, available memory and the rate of matrix products."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils import benchmark

import ebmkit
from ebmkit import compute
from ebmkit.compute import (
    available_memory,
    matrix_rate,
    pick_compile,
    pick_device,
    pick_precision,
)

CPU = torch.device("cpu")


def test_unsupported_precision_mode_and_device_are_refused(monkeypatch):
    with pytest.raises(ebmkit.UserError, match=r"'tf32' needs an NVIDIA GPU.*device is a CPU: use"):
        pick_precision("tf32", CPU)
    with pytest.raises(ebmkit.UserError, match=r"unknown precision 'fp8'.*auto, bf16, fp32, tf32"):
        pick_precision("fp8", CPU)
    with pytest.raises(ebmkit.UserError, match=r"unknown compile mode 'yes'.*auto, off, on"):
        pick_compile("yes", CPU)
    with pytest.raises(ebmkit.UserError, match="'cuda:99' is not on this machine"):
        pick_device("cuda:99")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ebmkit.UserError, match=r"--compile on needs a C\+\+ compiler"):
        pick_compile("on", CPU)
    assert not pick_compile("auto", CPU)
    assert pick_precision("auto", CPU) == "fp32"


@pytest.mark.slow
@pytest.mark.skipif(not torch.set_flush_denormal(True), reason="this processor has no such setting")
def test_commands_flush_denormal_numbers_in_all_threads():
    """The command sets it before PyTorch starts a second thread, which computes half the tensor."""
    code = """
import torch
from ebmkit import UserError
from ebmkit.cli import app
try:
    app(["classify", "no-such-run", "image.png"], standalone_mode=False)
except UserError:
    torch.set_num_threads(2)
    print(torch.full((1 << 20,), 1e-30).mul(1e-10).count_nonzero().item())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"


def test_available_memory_is_that_of_the_tightest_control_group(tmp_path, monkeypatch):
    inner = tmp_path / "root" / "a" / "b"
    inner.mkdir(parents=True)

    def write(folder, limit, used, cache):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")

    write(inner, "max", 10, 0)
    write(inner.parent, 1000, 600, 50)
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    found = compute._group_free(tmp_path / "cgroup", tmp_path / "root")
    monkeypatch.setattr(compute, "_group_free", lambda: found)
    assert available_memory(torch.device("cpu")) == 450


def test_the_matrix_rate_is_in_flops_per_second(monkeypatch):
    # the timer reports 10 ms per product
    timed = SimpleNamespace(median=0.01)
    monkeypatch.setattr(benchmark.Timer, "blocked_autorange", lambda self, min_run_time: timed)
    assert matrix_rate(torch.device("cpu")) == pytest.approx(2 * 1024**3 / 0.01)
