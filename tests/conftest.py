"""Processes of the tests, and fixtures shared by all of them."""

import functools
import gc
import os
import sys
from pathlib import Path

# One thread in each process of the tests: two processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# About 100 processes import torch, which takes twice as long without cached bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

sys.dont_write_bytecode = False


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    """Number of processes for ``-n auto``: one per core, at most 4; none if files are named.

    The imports of another process take longer than it saves in a single file.
    """
    if any(".py" in argument for argument in config.args):
        return 0
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(4, len(available(0)))


@pytest.fixture(scope="session", autouse=True)
def _flush_denormals():
    """Commands do this, too; here it makes results independent of the order of tests."""
    from ebmkit.compute import flush_denormals

    flush_denormals()


@pytest.fixture(scope="session", autouse=True)
def _no_fsync():
    """Files survive the end of a process without fsync, which only a power cut needs; it takes
    milliseconds, thousands of times. Tests of disk errors replace it by functions of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_configure(config):
    """Ignore the warning of Python 3.12 about forks of a process with several threads.

    Workers of a data loader are forks. The second thread, of pytest-xdist, only waits for messages.
    """
    config.addinivalue_line(
        "filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning"
    )


@pytest.fixture(autouse=True, scope="module")
def freeze_garbage_collector():
    """Exclude objects of imported modules, which live to the end, from garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed_torch():
    """Random numbers of a test do not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the repository")
    return folder


@pytest.fixture(autouse=True, scope="session")
def count_cost_once_per_process():
    """Count memory and FLOPs of a step once for each network, loss and shapes.

    Counting (`tests/training/test_cost.py` tests it) takes longer than a few steps of a small
    network. The rate of matrix products is measured once for the same reason.
    """
    from ebmkit.training import cost

    def once(count):
        found = {}

        def counted(loss, shapes, *arguments):
            tensors = [*loss.named_parameters(), *loss.named_buffers()]
            key = (
                str([(n, type(m).__name__, m.extra_repr()) for n, m in loss.named_modules()]),
                tuple((name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors),
                str([(t.name, t.weight, t.settings, loss.stream_of[t.name]) for t in loss.terms]),
                loss.separate,
                tuple(shapes.items()),
                *arguments,
            )
            if key not in found:
                found[key] = count(loss, shapes, *arguments)
            return found[key]

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "step_memory", once(cost.step_memory))
        patch.setattr(cost, "step_flops", once(cost.step_flops))
        patch.setattr(cost, "matrix_rate", functools.cache(cost.matrix_rate))
        yield


@pytest.fixture(scope="session")
def first_costs():
    """Memory of the first step, and FLOPs by terms, that a module with `count_cost_roughly` met."""
    return {}


@pytest.fixture(scope="module")
def count_cost_roughly(count_cost_once_per_process, first_costs):
    """For modules with small runs: the memory of another small run, and the FLOPs of another run of
    the same terms, instead of their own; they are printed and stored, but not compared."""
    from ebmkit.training import cost

    memory, flops = cost.step_memory, cost.step_flops

    def first_memory(*arguments):
        if "memory" not in first_costs:
            first_costs["memory"] = memory(*arguments)
        return first_costs["memory"]

    def first_flops(loss, shapes, *arguments):
        key = (tuple(loss.streams), tuple(term.name for term in loss.terms), arguments)
        if key not in first_costs:
            first_costs[key] = flops(loss, shapes, *arguments)
        return first_costs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "step_memory", first_memory)
        patch.setattr(cost, "step_flops", first_flops)
        yield


@pytest.fixture(scope="module")
def few_resamples():
    """For tests of evaluations that do not test confidence intervals: few bootstrap resamples."""
    from ebmkit.evaluation import ood, statistics

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((statistics, "bootstrap"), (ood, "detection")):
            few = functools.partial(getattr(module, name), resamples=40)
            patch.setattr(module, name, few)
        yield
