"""Processes of the tests, and fixtures shared by all of them."""

import functools
import gc
import os
import sys
from pathlib import Path

# One thread in each process of the tests and in each they start: two of them share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Some 100 processes are started, and importing torch takes twice as long without cached bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

sys.dont_write_bytecode = False


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    """How many processes ``-n auto`` is: one for each core, up to 4; where files are named, none.

    Each process imports everything once, which costs more than a file of tests saves.
    """
    if any(".py" in argument for argument in config.args):
        return 0
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(4, len(available(0)))


@pytest.fixture(scope="session", autouse=True)
def _flush_denormals():
    """As the first command of a test would do, so that the order of tests changes no bit."""
    from ebmkit.compute import flush_denormals

    flush_denormals()


def pytest_configure(config):
    """Workers of a data loader are forked, from Python 3.12 on with a warning beside a thread.

    The processes of pytest-xdist have one, which only waits for messages.
    """
    config.addinivalue_line(
        "filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning"
    )


@pytest.fixture(autouse=True, scope="module")
def settled():
    """What was imported by now lives to the end, so that looking for garbage can pass over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/ beside the repository")
    return folder


@pytest.fixture(autouse=True, scope="session")
def counted_once_a_process():
    """Memory and FLOPs of a step are counted once for each network, loss and shapes.

    Counting them (`tests/training/test_cost.py`) takes longer than a few steps of a small network.
    So does the machine's rate of matrix products, which is measured once.
    """
    from ebmkit.training import cost

    def once(count):
        found = {}

        def counted(loss, shapes, *arguments):
            tensors = [*loss.named_parameters(), *loss.named_buffers()]
            key = (
                repr(loss),
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


@pytest.fixture(scope="module")
def counted_once(counted_once_a_process):
    """For tests of runs that are alike: the memory of the first one's step stands for all."""
    from ebmkit.training import cost

    count, found = cost.step_memory, []

    def first(*arguments):
        if not found:
            found.append(count(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "step_memory", first)
        yield


@pytest.fixture(scope="module")
def few_resamples():
    """For tests of evaluation that are not of its intervals: bootstraps of few draws."""
    from ebmkit.evaluation import ood, statistics

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((statistics, "bootstrap"), (ood, "detection")):
            few = functools.partial(getattr(module, name), resamples=40)
            patch.setattr(module, name, few)
        yield
