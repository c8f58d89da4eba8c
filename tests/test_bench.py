"""`ebmkit bench`: timing, equal work of both implementations, and the files of the command."""

import importlib
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ebmkit.bench import (
    INFERENCES,
    OURS,
    PLAIN,
    SCALING,
    SIGMA,
    BenchmarkSetting,
    LibraryStep,
    PlainStep,
    Ratio,
    Row,
    interleave,
    library_inference,
    make_batch,
    network,
    peak_memory,
    plain_inference,
    plain_loss,
    ratio_to,
    scaling,
    scaling_settings,
    timed_terms,
)
from ebmkit.cli import main
from ebmkit.compute import ComputeConfig
from ebmkit.errors import UserError

CPU = torch.device("cpu")
TINY = BenchmarkSetting("tiny", width=8, image_size=8, batch=4)
EAGER = ComputeConfig(precision="fp32", compile="off")


class Machine:
    """A clock that candidates advance, by an amount that may change between calls."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def clock(self):
        return self.now

    def candidate(self, name, seconds):
        def step():
            self.ran.append(name)
            self.now += seconds(self)

        return step


def test_interleave_alternates_the_order_of_candidates():
    machine = Machine()
    candidates = {name: machine.candidate(name, lambda m: 1.0) for name in "abc"}
    seconds = interleave(candidates, rounds=3, warmup=1, clock=machine.clock)
    assert "".join(machine.ran) == "abc" + "abc" + "cba" + "abc"  # warm-up, then three rounds
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)


def test_ratio_is_robust_to_a_machine_that_slows_down():
    machine = Machine()
    drift = 0.03  # of the first call's time, per second
    slow = machine.candidate("slow", lambda m: 2.0 * (1 + drift * m.now))
    fast = machine.candidate("fast", lambda m: 1.0 * (1 + drift * m.now))
    seconds = interleave({"slow": slow, "fast": fast}, rounds=8, clock=machine.clock)
    assert seconds["slow"][-1] > 1.5 * seconds["slow"][0]
    ratio = ratio_to(seconds["slow"], seconds["fast"])
    # the second candidate of a round is slower by up to 2 * drift; the order alternates
    assert ratio.median == pytest.approx(2.0, rel=drift)
    assert ratio.low == pytest.approx(2.0, rel=2 * drift)
    assert ratio.high == pytest.approx(2.0, rel=2 * drift)


def test_the_ratio_is_the_median_over_rounds():
    base, own = [2.0, 20.0, 3.0], [1.0, 10.0, 2.0]  # the ratio of the medians would be 1.5
    assert ratio_to(base, own) == Ratio(2.0, 1.75, 2.0)


def test_fast_steps_are_repeated_and_all_candidates_equally_often():
    machine = Machine()
    candidates = {
        "slow": machine.candidate("slow", lambda m: 0.04),
        "fast": machine.candidate("fast", lambda m: 0.01),
    }
    seconds = interleave(candidates, rounds=2, warmup=1, shortest=0.05, clock=machine.clock)
    assert machine.ran.count("slow") == machine.ran.count("fast") == 1 + 2 * 5
    assert seconds["fast"] == pytest.approx([0.01, 0.01])


def test_peak_memory_is_the_largest_simultaneous_allocation():
    megabyte = 250_000  # float32

    def sequential():
        weight = torch.zeros(megabyte)

        def step():
            float(torch.zeros(megabyte).sum())
            float(torch.zeros(megabyte).sum())
            return weight

        return step

    def simultaneous():
        weight = torch.zeros(megabyte)
        return lambda: [torch.zeros(megabyte), torch.zeros(megabyte), weight]

    assert peak_memory(sequential, CPU)[1] == pytest.approx(2e6, rel=0.01)
    assert peak_memory(simultaneous, CPU)[1] == pytest.approx(3e6, rel=0.01)


@pytest.mark.parametrize("objective", ["ce", "dsm", "0.5*ce+dsm-sum+cdsm"])
def test_library_and_plain_step_have_equal_losses_and_gradients(objective):
    model = network(TINY, 3, CPU)
    with torch.no_grad():  # the initial score is too small to influence the loss
        model.head.density.weight.mul_(30)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: make_batch(count, 3, 8, CPU, generator)
        for name, count in {"classify": 8, "denoise": 4}.items()
    }
    ours = LibraryStep(model, objective, lambda: drawn, EAGER)
    plain = PlainStep(model, objective, lambda: drawn)
    ours()
    loss = plain()
    total = ours.step.loss(drawn).total
    after = plain_loss(plain.model, timed_terms(objective), drawn)
    names = [name for name, _ in model.named_parameters()]
    mine, theirs = dict(ours.model.named_parameters()), dict(plain.model.named_parameters())
    assert after.item() != pytest.approx(loss.item(), rel=1e-4)  # the update has an effect
    # float32; AdamW's first update is the sign of the gradient, so entries near 0 may differ
    assert total.item() == pytest.approx(after.item(), rel=1e-3)
    compared = 0
    for name in names:
        if theirs[name].grad is None:  # the classifier, if no term uses labels
            assert mine[name].grad is None or not mine[name].grad.any()
            continue
        difference = (mine[name].grad - theirs[name].grad).norm()
        assert difference <= 1e-4 * theirs[name].grad.norm() + 1e-9, name
        compared += 1
    assert compared >= len(names) - 1


@pytest.mark.parametrize("what", INFERENCES)
def test_library_and_plain_inference_are_equal(what):
    model = network(TINY, 3, CPU)
    y = make_batch(4, 3, 8, CPU, torch.Generator().manual_seed(0)).y
    ours, plain = library_inference(model, what, y, EAGER)(), plain_inference(model, what, y)()
    assert not ours.requires_grad
    torch.testing.assert_close(ours, plain.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_scaling_skips_points_that_do_not_fit_in_memory(monkeypatch):
    base = TINY._replace(what=SCALING)
    points = scaling_settings(base, widths=(8,), image_sizes=(8,), batches=(4, 8, 4096))
    assert [point.batch for point in points] == [4, 8, 4096]  # the base point once
    monkeypatch.setattr("ebmkit.bench.available_memory", lambda device: 10**9)
    with pytest.warns(UserWarning, match="b4096 is skipped: it needs about"):
        found = list(scaling(points, 3, CPU, rounds=1, compute=EAGER))
    assert [len(rows) for rows in found] == [2, 2, 0]
    names = [row.name for rows in found for row in rows]
    assert names[0] == "scaling dsm gradresnet18 w8 8x8 b4: ebmkit"
    assert [BenchmarkSetting.read(name) for name in names] == [
        points[0],
        points[0],
        points[1],
        points[1],
    ]


def script(name):
    """The module ``benchmarks/NAME.py``; ``peers.py`` imports peers in functions."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return importlib.import_module(name)


def test_scaling_plot_has_one_line_per_implementation(tmp_path, monkeypatch):
    speed = script("speed")

    def row(width, who, seconds):
        name = f"{BenchmarkSetting(SCALING, width=width)}: {who}"
        return Row(name, "cpu", seconds, 1.0, 10.0 * seconds, 1.0, None, {}, "")

    figures = []
    monkeypatch.setattr(speed, "save_figure", lambda figure, path: figures.append(figure))
    rows = [row(w, who, w / k) for who, k in ((OURS, 2), (PLAIN, 1)) for w in (16, 8)]
    speed.scaling_plot(rows, tmp_path / "curve.png")
    lines = {line.get_label(): line for line in figures[0].axes[0].lines}
    assert lines[OURS].get_xydata().tolist() == [[8, 4], [16, 8]]
    assert lines[PLAIN].get_xydata().tolist() == [[8, 8], [16, 16]]
    with pytest.raises(UserError, match="--scaling"):
        speed.scaling_plot([], tmp_path / "empty.png")


KEYS = {
    "name", "device", "median_s", "images_per_s", "peak_mb",
    "ratio", "ratio_range", "ratios", "note",
}  # fmt: skip


def bench_command(*arguments):
    """Run ``ebmkit bench`` with ``arguments`` in this process; its exit code."""
    shown = warnings.showwarning
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["ebmkit", "bench", *map(str, arguments)])
        main()
    warnings.showwarning = shown
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_bench_command_writes_rows_and_overwrites_nothing(tmp_path, capsys):
    path = tmp_path / "bench.json"
    tiny = ("--width", 8, "--image-size", 8, "--batch", 2, "--rounds", 2, "--device", "cpu")
    assert bench_command(*tiny, "--objective", "ce,ce+dsm", "--json", path) == 0
    document = json.loads(path.read_text())
    assert {"torch", "ebmkit", "threads", "git_commit", "peers"} <= set(document["environment"])
    rows = {row["name"]: row for row in document["rows"]}
    work = ["train ce", "train ce+dsm", "logits", "score", "denoise"]
    assert list(rows) == [
        f"{what} gradresnet18 w8 8x8 b2: {who}" for what in work for who in (OURS, PLAIN)
    ]
    for name, row in rows.items():
        assert set(row) == KEYS
        images = 6 if "ce+dsm" in name else 2  # a joint step classifies twice as many
        assert row["images_per_s"] * row["median_s"] == pytest.approx(images)
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        assert row["peak_mb"] > 0.7  # 176,000 float32 parameters
    assert rows["score gradresnet18 w8 8x8 b2: plain eager"]["ratio"] == 1
    assert "train ce+dsm: ebmkit" in capsys.readouterr().out
    before = path.read_bytes()
    assert bench_command(*tiny, "--json", path) == 2
    message = capsys.readouterr().err
    assert "exists" in message
    assert len(message.strip().splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "ce,dms"], "unknown objective 'dms': did you mean 'dsm'?"),
        (["--backbone", "gradresnet81"], "unknown backbone 'gradresnet81'"),
        (["--width", "12"], "width 12"),
        (["--precision", "fp8", "--device", "cpu"], "unknown precision 'fp8'"),
        (["--json", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_invalid_options_are_refused_before_measurements(arguments, message, capsys):
    assert bench_command(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def peers():
    return script("peers")


def peer_loss(peers, sign):
    """Vincent's loss as in peers, or with a wrong sign of the noise (``sign`` -1)."""

    def make(model):
        def loss(x):
            noise = SIGMA * torch.randn_like(x)
            y = (x + noise).requires_grad_()
            (gradient,) = torch.autograd.grad(model.energy(y).sum(), y, create_graph=True)
            return 0.5 * (gradient - sign * noise / SIGMA**2).square().flatten(1).sum(1).mean()

        return loss

    return make


def test_peer_with_another_gradient_is_refused(peers):
    model = network(TINY, 3, CPU)
    x = make_batch(4, 3, 8, CPU, torch.Generator().manual_seed(0)).x
    assert "ours" in peers.check_same(peer_loss(peers, 1), model, x)
    with pytest.raises(RuntimeError, match="gradient"):
        peers.check_same(peer_loss(peers, -1), model, x)


@pytest.mark.parametrize("name", ["torchebm", "ebm"])
def test_installed_peers_compute_the_same_loss(peers, name):
    pytest.importorskip(name)
    make = {"torchebm": peers.torchebm_loss, "ebm": peers.registry_loss}[name]
    x = make_batch(4, 3, 8, CPU, torch.Generator().manual_seed(0)).x
    assert "ours" in peers.check_same(make, network(TINY, 3, CPU), x)
