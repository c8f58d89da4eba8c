"""Scenarios: training commands with the length of their long and quick forms."""

from __future__ import annotations

from pathlib import Path

from ebmkit_tests.soak.kills import Training

SMALL = (
    "--set=streams.classify.batch_size=16",
    "--set=streams.denoise.batch_size=16",
    "--set=checkpoint_every=7",
    "--set=validate_every=10",
    "--set=validation_images=16",
    "--set=log_every=1",
)
MLP = ("--backbone", "mlp", "--set=model.backbone.width=16")
AVERAGED = ("--set=optimizer.ema=0.9",)
PLUGIN = Path(__file__).resolve().parents[1] / "support" / "zero_thresholds.py"
"""Without it, networks of this size use PyTorch's derivatives instead of those of our layers."""

CHAINS = ("--set=negatives.buffer_size=100", "--set=negatives.steps=2", "--set=rollback.every=10")

TRAININGS = {
    t.name: t
    for t in (
        Training(
            "ce+dsm",
            "ce+dsm with averaged weights, MixUp and CutMix",
            (
                *MLP,
                *SMALL,
                *AVERAGED,
                "--set=streams.classify.augmentation.mix=both",
            ),
            (6000, 600),
        ),
        Training(
            "gradresnet18",
            "ce+dsm with the network of the paper, width 8",
            ("--width", "8", *SMALL),
            (2000, 300),
        ),
        Training(
            "muon",
            "ce+dsm with Muon, averaged weights with warm-up, and our layers' derivatives",
            (
                "--width",
                "8",
                *SMALL,
                *AVERAGED,
                "--set=optimizer.kind=muon",
                "--set=optimizer.ema_warmup=true",
                f"--plugin={PLUGIN}",
            ),
            (2000, 70),
        ),
        Training(
            "jem",
            "jem with its replay buffer and rollback snapshots",
            (*MLP, *SMALL, *CHAINS, "--objective", "jem"),
            (3000, 350),
        ),
        Training(
            "jem-diverging",
            "jem that diverges repeatedly and rolls back",
            (
                *MLP,
                *SMALL,
                *CHAINS,
                "--objective",
                "jem",
                "--set=rollback.gap=0.3",
                "--set=rollback.max_rollbacks=1000",
                "--set=rollback.order=[rate]",
            ),
            (1500, 150),
        ),
        Training(
            "two-ranks",
            "ce+dsm with two processes under torchrun; all killed, or one",
            (*MLP, *SMALL, *AVERAGED),
            (4000, 350),
            ranks=2,
        ),
        Training(
            "control-randomness",
            "control: random state is not restored",
            (*MLP, *SMALL),
            (900, 400),
            defect="randomness",
        ),
        Training(
            "control-optimizer",
            "control: the optimiser's state is not restored",
            (*MLP, *SMALL),
            (900, 400),
            defect="optimizer",
        ),
    )
}
