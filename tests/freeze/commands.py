"""The commands of all entries. A word such as ``a.b=c`` stands for ``--set a.b=c``.

When options or values are renamed, change them here and keep the names of the entries.
"""

from __future__ import annotations

from itertools import product

JOINT = "train/ce+dsm/linear-quadratic"
DIFFUSION, LABELLED = "train/ddpm/unet", "train/ddpm/unet-labels"
NEGATIVES, ROBUST = "train/jem/wideresnet10-jem", "train/adv/logit"
NOISY = "train/recipe/digits-noisy-classifier"
"""Training runs used by samples, evaluations and exports."""

TRAIN = (
    "train --steps 20 --device cpu --compile off --no-evaluate --out run log_every=1 "
    "validate_every=20 validation_images=8 checkpoint_every=20 streams.classify.batch_size=4 "
    "streams.denoise.batch_size=4 streams.generate.batch_size=4"
)
RESUME = "train --resume run --no-evaluate"
SAMPLE = "sample {run} --out drawn --device cpu --seed 3"
FEW = "-n 4 --batch-size 2"
GUIDE = "--guide {guide} --scale 3"
DENOISE = "denoise {run} picture.png --out out --device cpu"
CLASSIFY = "classify {run} picture.png --top 10 --device cpu"
RESTORE = (
    "restore {run} picture.png --out out --device cpu --task {name} --steps 8 --samples 2 beta=0.5"
)
EVALUATE = "evaluate run --suite {name} --device cpu"
EXPORT = "export {run} --out {file} --what {what}"
SMOKE = "reproduce {name} --scale smoke --out ../smoke --device cpu"

_NET = "--backbone gradresnet10 --width 2 model.backbone.channels_per_group=2"
_UNET = (
    "--objective ddpm --backbone unet --width 8 model.backbone.multipliers=[1,2] "
    "model.backbone.blocks=1"
)
_CHAINS = "negatives.steps=2 negatives.buffer_size=20"
_ATTACK = "objective.adv.steps=2 objective.trades.steps=2"
_DENSITY = (
    "--head linear model.preconditioned=true streams.denoise.noise.kind=log-uniform "
    "streams.denoise.noise.max=40/1"
)
_JEM = f"--backbone wideresnet10-jem --width 4 {_CHAINS}"

_OBJECTIVES = {
    **dict.fromkeys(("ce", "dsm", "dsm-mean", "dsm-sum", "cdsm", "cdsm-mean", "cdsm-sum"), ""),
    **dict.fromkeys(("ism", "ddpm", "ce+dsm", "ce+cdsm", "ce+0.5*dsm"), ""),
    **dict.fromkeys(("adv", "trades", "adv+dsm", "trades+cdsm"), _ATTACK),
    **dict.fromkeys(("ml", "cml", "jem", "ce+dsm+ml"), _CHAINS),
}

TRAINED = {
    f"train/{name}/{head}": f"{_NET} --objective {name} head={head} {words}"
    for (name, words), head in product(_OBJECTIVES.items(), ("linear-quadratic", "logit"))
}
"""Training runs by name; first each objective with each head, on one small network."""

TRAINED |= {
    f"train/{objective}/{name}": f"--objective {objective} --backbone {name} --width 4 {words}"
    for objective, name, words in (
        ("ce+dsm", "gradresnet18-imagenet", "model.backbone.channels_per_group=4"),
        ("ce+dsm", "resnet18", ""),
        ("ce+dsm", "wideresnet10-jem", ""),
        ("ce+dsm", "mlp", ""),
        ("ce+dsm", "mlp-sigma", ""),
        ("ce+dsm+tsm", "mlp-sigma", _DENSITY),
        ("ce+dsm+diffclf", "mlp-sigma", _DENSITY),
        ("dsm", "dncnn", "model.backbone.depth=4"),
        ("dsm", "dncnn20-bias-free", "model.backbone.depth=4"),
        ("dsm", "drunet", "model.backbone.blocks=1"),
        ("dsm", "gs-drunet", "model.backbone.blocks=1"),
        ("dsm", "gs-drunet-blind", "model.backbone.blocks=1"),
        ("dsm", "gradncnn", ""),
    )
}
TRAINED |= {
    DIFFUSION: _UNET,
    LABELLED: f"{_UNET} objective.ddpm.class_dropout=0.2",
    "train/ddpm/unet-cosine": f"{_UNET} objective.ddpm.schedule=cosine",
    NEGATIVES: f"--objective jem {_JEM} rollback.every=5",
    "train/jem/gaussian-start": f"--objective jem {_JEM} negatives.start=gaussian "
    "negatives.largest_drift=0.5 negatives.clip=true negatives.penalty=0.1 "
    "optimizer.sharpness=0.05",
    "train/optimizer/adamw": f"{_NET} --recipe digits-adamw optimizer.warmup_steps=5 "
    "optimizer.clip_norm=1 optimizer.ema=0.9 compute.accumulate=2",
    "train/optimizer/sgd-sharpness": f"{_NET} --recipe digits-adamw optimizer.kind=sgd "
    "optimizer.schedule=milestones optimizer.milestones=[10/20] optimizer.sharpness=0.5 "
    "optimizer.sharpness_adaptive=true",
    "train/streams/augmented": f"{_NET} --objective ce+dsm objective.ce.label_smoothing=0.1 "
    "streams.classify.augmentation.mix=both streams.denoise.augmentation.flip=true "
    "streams.denoise.augmentation.crop_size=6 streams.denoise.noise.kind=uniform",
    "train/streams/shared": f"{_NET} --objective ce+dsm draw_from.ce=denoise",
    "train/attack/linf-targeted": f"{_NET} --objective adv {_ATTACK} objective.adv.norm=linf "
    "objective.adv.eps=8/255 objective.adv.targeted=true",
    NOISY: f"{_NET} --recipe digits-noisy-classifier",
    "train/recipe/digits-wide": f"{_NET} --recipe digits-wide",
    "train/recipe/digits-robust": f"{_NET} --recipe digits-robust {_ATTACK}",
    "train/recipe/patches": f"{_NET} --recipe patches --dataset patches",
    "train/recipe/sada-jem": f"--recipe sada-jem --dataset digits {_JEM}",
}

SAMPLERS = {
    **dict.fromkeys(("langevin", "sgld", "mala", "hmc", "annealed-langevin", "pc", "ddpm", "ddim")),
    "ks": "kadkhodaie_simoncelli",
    "ascent": None,
}
"""Name in an entry -> name of the sampler, if it is different."""

SAMPLED = {
    **{
        f"sample/{name}/run": (JOINT, f"--sampler {SAMPLERS[name] or name} --steps {steps} {FEW}")
        for name, steps in (
            *(("langevin", 6), ("sgld", 6), ("mala", 6), ("hmc", 6), ("annealed-langevin", 20)),
            *(("pc", 6), ("ks", 12)),
        )
    },
    "sample/ascent/run": (JOINT, f"--sampler ascent --steps 6 --label 3 {FEW}"),
    "sample/ddpm/run": (DIFFUSION, f"--sampler ddpm --steps 6 {FEW}"),
    "sample/ddim/run": (DIFFUSION, f"--sampler ddim --steps 6 {FEW}"),
    "sample/ddim/joint": (JOINT, f"--sampler ddim --steps 10 {FEW}"),
    "sample/ddim/stochastic": (DIFFUSION, f"--sampler ddim --steps 6 eta=0.5 {FEW}"),
    "sample/label/langevin": (JOINT, f"--sampler langevin --steps 4 --label 3 {FEW}"),
    "sample/label/all": (JOINT, "--sampler sgld --steps 4 --label all -n 20"),
    "sample/label/ddim": (LABELLED, f"--sampler ddim --steps 6 --label 2 {FEW}"),
    "sample/buffer": (NEGATIVES, f"--sampler buffer {FEW}"),
    **{
        f"sample/start/{name}": (NEGATIVES, f"--sampler sgld --steps 4 --start {start} {FEW}")
        for name, start in (
            *((s, s) for s in ("noise", "uniform", "data", "mean", "buffer")),
            ("seeds", "class_gaussian"),
        )
    },
}
"""Name -> training run, words after `SAMPLE`."""

_DDIM = "--sampler ddim --steps 6"

GUIDED = {
    f"guided/{name}": (DIFFUSION, guide, f"--label 3 {_DDIM} {words} {FEW}")
    for name, guide, words in (
        ("classifier", ROBUST, "--guidance classifier"),
        ("energy", ROBUST, "--guidance energy"),
        ("dual", ROBUST, "--guidance dual --guide-set lambda=0.15"),
        ("pgd", ROBUST, "--guidance pgd --guide-set n=2"),
        ("accumulated", ROBUST, "--guidance accumulated --guide-set n=2"),
        ("view-shrunk", JOINT, "--guidance energy --view x_t"),
        ("view-clean", JOINT, "--guidance energy --view x0_hat"),
        ("view-clean-through", JOINT, "--guidance energy --view x0_hat-backpropagate"),
        ("view-noisy", NOISY, "--guidance classifier --view noisy"),
        ("schedule-constant", ROBUST, "--guidance energy --schedule constant"),
        ("schedule-step", ROBUST, "--guidance energy --schedule step:at=500,low=0.37"),
        ("schedule-linear", ROBUST, "--guidance energy --schedule linear"),
        ("schedule-power", ROBUST, "--guidance energy --schedule power:k=2"),
        ("schedule-sigmoid", ROBUST, "--guidance energy --schedule sigmoid:t0=500,y0=0.05,k=0.02"),
        ("late", ROBUST, "--guide-start 0.3"),
    )
}
GUIDED |= {
    "guided/langevin": (JOINT, ROBUST, f"--label 3 --sampler annealed-langevin --steps 20 {FEW}"),
    "guided/classifier-free": (
        *(LABELLED, ""),
        f"--label 3 {_DDIM} --guidance classifier-free --scale 1.5 {FEW}",
    ),
}
"""Name -> training run, training run of the guide, words after `SAMPLE` and `GUIDE`."""

RESTORED = ("inpaint", "random-pixels", "superres", "deblur", "compressed")

EXPORTED = (
    *(("classifier", ".pt2"), ("denoiser", ".pt2"), ("blind-denoiser", ".pt2")),
    *(("classifier", ".onnx"), ("denoiser", ".onnx")),
)

SUITES = {
    "classify": (JOINT, "--limit 24"),
    "denoise": (JOINT, "--limit 24"),
    "calibration": (JOINT, "--limit 24"),
    "robustness": (
        JOINT,
        "--limit 24 robustness.images=4 robustness.steps=2 robustness.restarts=1 "
        "robustness.draws=2 robustness.eot=2 robustness.linf=[0,8/255] robustness.l2=[0,0.5] "
        "robustness.noise_levels=[0,20/255]",
    ),
    "robustness-grid": (
        ROBUST,
        "--limit 24 robustness-grid.images=12 robustness-grid.steps=2 "
        "robustness-grid.epsilons=[0,0.5]",
    ),
    "certify": (
        JOINT,
        "--limit 24 certify.images=4 certify.samples=20 certify.selection=5 certify.sigmas=[0.12]",
    ),
    "shift": (JOINT, "--limit 24 corruptions.strengths=[1,5]"),
    "jacobian": (JOINT, "--limit 24 jacobian.images=2"),
    "linearity": (JOINT, "--limit 24 linearity.images=6"),
    "adversarial": (JOINT, "--limit 24 adversarial.images=6"),
    "ood": (NEGATIVES, "--limit 24 ood.draws=2"),
    "generation": (
        NEGATIVES,
        "generation.samples=drawn/samples.h5 generation.extractor={extractor}",
    ),
    "diffusion-path": (NOISY, "--limit 24 diffusion-path.step=250"),
}
"""Suite -> training run, words after `EVALUATE`."""

GENERATED = "--sampler sgld --steps 2 --label all -n 40"
"""Samples for the suite ``generation``."""

TARGETS = ("table1", "table2", "table3", "fig1", "fig3", "fig4", "guidance", "claims", "efficiency")
