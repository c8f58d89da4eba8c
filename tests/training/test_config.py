"""Resolving a configuration from layers, recipes and presets, and its error messages."""

import pytest
import yaml

import ebmkit
from ebmkit.objectives import TrainingLoss, parse_objective
from ebmkit.training import RECIPES, TrainConfig, parse_assignments, read_config, resolve
from ebmkit.training.cost import step_flops
from ebmkit.training.optim import optimizer_flops


def test_later_layers_win():
    file = {"optimizer": {"lr": 1e-2}, "steps": 7, "seed": 3}
    named = {"steps": 8, "seed": 4}
    assigned = parse_assignments(["seed=5"])
    config = resolve(file, named, assigned)
    assert (config.optimizer.lr, config.steps, config.seed) == (1e-2, 8, 5)
    assert config.optimizer.weight_decay == 0.05  # the recipe's


def test_explicit_settings_override_the_preset():
    assert resolve({"backbone": "gradresnet34"}).model.backbone.depth == 34
    recipe_width = resolve({}).model.backbone.width
    assert resolve({"backbone": "gradresnet34"}).model.backbone.width == recipe_width
    config = resolve(
        {"backbone": "gradresnet18-imagenet", "model": {"backbone": {"stem_kernel": 3}}}
    )
    assert config.model.backbone.stem_kernel == 3
    assert config.model.backbone.strides == (2, 1, 2, 2, 2)
    assert resolve({"head": "logit"}).model.head.kind == "logit"


def test_objective_settings_are_set_by_objective_name():
    assigned = parse_assignments(["objective.adv.norm=linf", "objective.adv.eps=0.1"])
    config = resolve({"objective": "ce"}, assigned)
    assert (config.objective, config.terms.adv.norm, config.terms.adv.eps) == ("ce", "linf", 0.1)
    both = parse_assignments(["objective=ce", "objective.adv.eps=0.1"])
    assert resolve({}, both).objective == "ce"
    assert resolve({}, both).terms.adv.eps == 0.1
    file = {"objective": {"name": "ce", "adv": {"eps": 0.2}}}
    assert resolve(file).terms.adv.eps == 0.2
    with pytest.raises(ebmkit.UserError, match=r"terms\.avd.*'adv'"):
        resolve(parse_assignments(["objective.avd.eps=1"]))


def test_label_smoothing_requires_cross_entropy():
    assigned = parse_assignments(["objective.ce.label_smoothing=0.1"])
    assert resolve({"objective": "ce+dsm"}, assigned).terms.ce.label_smoothing == 0.1
    assert resolve({}).terms.ce.label_smoothing == 0
    with pytest.raises(ebmkit.UserError, match=r"label_smoothing = 0\.1 does nothing.*no term ce"):
        resolve({"objective": "dsm"}, assigned)
    with pytest.raises(ebmkit.UserError, match=r"terms\.ce\.label_smoothing = .*1.* is not legal"):
        resolve(parse_assignments(["objective.ce.label_smoothing=1"]))


def test_a_resolved_configuration_resolves_to_itself():
    config = resolve({"dataset": {"name": "cifar10"}, "backbone": "gradresnet34"})
    again = resolve(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_recipe_sets_the_data_set_unless_another_is_named():
    assert resolve(recipe="cifar10-short").dataset.name == "cifar10"
    assert resolve({"dataset": {"name": "hdf5"}}, recipe="cifar10-short").dataset.name == "hdf5"
    assert resolve({}).dataset.name == "digits"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name):
    assert isinstance(resolve(recipe=name), TrainConfig)


def test_another_optimiser_does_not_inherit_muon_rates():
    ours = resolve(recipe="digits").optimizer
    assert (ours.kind, ours.lr) == ("muon", 1e-2)
    plain = resolve({"optimizer": {"kind": "adamw"}}, recipe="digits").optimizer
    assert (plain.kind, plain.lr, plain.adamw_lr, plain.nesterov) == ("adamw", 3e-4, None, None)
    assert plain.schedule == ours.schedule  # fields of every optimiser are kept
    named = resolve({"optimizer": {"kind": "sgd", "lr": 0.1}}, recipe="digits").optimizer
    assert (named.kind, named.lr, named.momentum) == ("sgd", 0.1, 0.9)
    linear = resolve({"optimizer": {"schedule": "linear", "ema": None}}, recipe="digits").optimizer
    assert (linear.decay_share, linear.ema_warmup, linear.lr) == (None, False, 1e-2)
    own_rate = resolve({"optimizer": {"lr": 5e-3}}, recipe="digits").optimizer
    assert (own_rate.kind, own_rate.lr, own_rate.momentum) == ("muon", 5e-3, 0.9)


def test_optimiser_kind_missing_in_the_recipe_has_its_own_rate_and_momentum():
    def chosen(kind, recipe, *layers):
        own = resolve({"optimizer": {"kind": kind}}, *layers, recipe=recipe).optimizer
        return own.lr, own.momentum

    assert chosen("muon", "jem++") == chosen("muon", "cdn-cifar10") == (1e-2, 0.95)
    assert chosen("sgd", "digits") == chosen("sgd", "digits-adamw") == (0.1, 0.9)
    assert chosen("adamw", "jem++") == (3e-4, 0.9)
    assert chosen("sgd", "jem++", {"optimizer": {"momentum": 0.8}}) == (0.1, 0.8)
    file = {"optimizer": {"lr": 1e-3}}  # applies to every kind
    later = {"optimizer": {"kind": "adamw"}}
    assert resolve(file, later, recipe="digits").optimizer.lr == 1e-3
    of_sgd = {"optimizer": {"kind": "sgd", "lr": 0.2, "momentum": 0.8, "betas": [0.9, 0.999]}}
    assert resolve(of_sgd, later, recipe="digits").optimizer.lr == 3e-4


def test_run_of_an_earlier_version_may_set_fields_without_effect():
    run = resolve({"steps": 5}, recipe="digits-adamw").model_dump(mode="json")
    run["optimizer"] |= {"momentum": 0.5, "milestones": [0.5], "warmup_steps": 9}
    again = resolve(run)
    assert again.model_dump(mode="json") == run
    with pytest.raises(ebmkit.UserError, match=r"momentum = 0\.4 does nothing"):
        resolve(run, {"optimizer": {"momentum": 0.4}})


@pytest.mark.parametrize(
    ("recipe", "fields", "message"),
    [
        ("digits", {"milestones": ["1/2"]}, "milestones = .*schedule=milestones"),
        ("digits", {"milestone_factor": 0.1}, "milestone_factor = 0.1 does .*schedule=milestones"),
        ("digits-adamw", {"momentum": 0.5}, "momentum = 0.5 does nothing.*kind=muon or sgd"),
        ("jem++", {"betas": [0.5, 0.9]}, "betas = .* does nothing.*kind=adamw or muon"),
        ("digits", {"sharpness_adaptive": True}, "sharpness_adaptive = True .*optimizer.sharpness"),
        ("digits", {"decay_share": 0}, "decay_share = 0 is not legal.*above 0 and at most 1.*'0'"),
        ("digits", {"decay_share": 1.5}, "decay_share = 1.5 is not legal.*above 0 and at most 1"),
    ],
)
def test_optimiser_fields_without_effect_are_refused(recipe, fields, message):
    with pytest.raises(ebmkit.UserError, match=message) as error:
        resolve({"optimizer": fields}, recipe=recipe)
    assert "milestones begin" not in str(error.value)


def test_decay_share_may_be_one():
    chosen = {"optimizer": {"decay_share": "360/360"}}
    assert resolve(chosen, recipe="digits").optimizer.decay_share == 1


def test_configuration_of_an_earlier_run_takes_nothing_from_the_recipe():
    old = resolve(recipe="digits-adamw").model_dump(mode="json")
    for name in ("kind", "ema", "ema_warmup", "adamw_lr", "decay_share"):
        old["optimizer"].pop(name)
    assert resolve(old) == resolve(recipe="digits-adamw")


@pytest.mark.slow
def test_without_validation_images_nothing_is_held_out():
    none, some = {"validation_images": 0}, {"validation_images": 9}
    held, all_images = {"dataset": {"hold_out": True}}, {"dataset": {"hold_out": False}}

    def holds_out(*layers):
        return resolve(*layers).dataset.hold_out

    assert holds_out()
    assert holds_out(some)
    assert not holds_out(none)
    assert not holds_out(none, {"dataset": {"limit": 100}})
    assert holds_out(none, some)
    assert holds_out(none | held)
    assert holds_out(none, held)
    for count in (none, some):  # a run's configuration as a layer of a new run
        saved = resolve(count).model_dump(mode="json")
        assert holds_out(saved) == holds_out(count)
        assert not holds_out(saved, none)
        assert holds_out(saved, some)
    with pytest.raises(ebmkit.UserError, match=r"validation_images = 9 .*hold_out is false: set"):
        resolve(some, all_images)


def test_run_of_an_earlier_version_always_holds_images_out():
    saved = resolve({"validation_images": 0}).model_dump(mode="json")
    del saved["dataset"]["hold_out"]
    assert resolve(saved).dataset.hold_out
    assert resolve(saved, {"validation_images": 0}).dataset.hold_out  # repeated on resuming
    assert TrainConfig.model_validate(saved).dataset.hold_out
    recipe = {**RECIPES["cifar10-robust"].config, "validation_images": 0}
    assert not resolve(recipe).dataset.hold_out  # complete, but not of a run


@pytest.mark.slow
def test_short_recipes_stay_within_their_flop_budget():
    def joint_flops(name):
        config = resolve(recipe=name)
        model = ebmkit.create_model(
            config.backbone, 10, in_channels=3, width=config.model.backbone.width
        )
        shapes = {
            name: (getattr(config.streams, name).batch_size, 3, 32, 32)
            for name in ("classify", "denoise")
        }
        update = optimizer_flops(model, config.optimizer)
        loss = TrainingLoss(model, parse_objective(config.objective))
        return sum(step_flops(loss, shapes, update_flops=update).values()) * config.steps

    plain = joint_flops("cifar10-adamw")
    assert joint_flops("cifar10-short") <= plain
    assert joint_flops("cifar10-cpu") <= 2.6e15


def test_backbone_sets_its_own_depth_and_width():
    """They replace those of the recipe and of earlier layers."""
    sizes = {"wideresnet28-10": (28, 160), "wideresnet10-jem": (10, 32)}
    for name, size in sizes.items():
        backbone = resolve({"backbone": name}, recipe="digits").model.backbone
        assert (backbone.depth, backbone.width) == size
    assert resolve({"backbone": "mlp"}, recipe="cifar10").model.backbone.width == 128
    for name, width in {"resnet50": 64, "drunet": 64, "gradresnet34": 16}.items():
        assert resolve({"backbone": name}, recipe="digits").model.backbone.width == width
    own = {"backbone": "resnet50", "model": {"backbone": {"width": 16}}}
    assert resolve(own, recipe="digits").model.backbone.width == 16
    later = resolve({"backbone": "gradresnet10"}, {"backbone": "gradresnet18"})
    assert later.model.backbone.depth == 18
    resnet = resolve({"backbone": "gradresnet10"}, {"backbone": "resnet18"}).model.backbone
    assert (resnet.kind, resnet.depth) == ("resnet", 18)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"backbone": "gradresnet81"}, "did you mean 'gradresnet18'"),
        ({"head": "logits"}, "did you mean 'logit'"),
        ({"objective": "ce+dms"}, "did you mean 'dsm'"),
        ({"optimizer": {"learning_rate": 1}}, "no field 'optimizer.learning_rate'"),
        ({"objective": {"dsm": {"gap": 2}}}, "objective 'dsm' has no settings"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr = -1"),
        ({"steps": 0}, "steps = 0"),
        ({"optimizer": {"betas": [2, 3]}}, r"betas.0 = 2"),
        ({"optimizer": {"lr": float("inf")}}, "lr = inf"),
        ({"seed": 2**80}, "seed"),
        ({"draw_from": {"dms": "classify"}}, "did you mean 'dsm'"),
        ({"model": {"backbone": {"width": 12}}}, "width 12 is no multiple"),
        ({"model": {"backbone": {"norm": "layer"}}}, "norm = 'layer'"),
        ({"streams": {"denoise": {"noise": {"max": "x"}}}}, "sigma 'x' is not a noise level"),
        ({"streams": {"denoise": {"noise": {"max": "-1/255"}}}}, "-1/255"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(layer, message):
    with pytest.raises(ebmkit.UserError, match=message) as caught:
        resolve(layer)
    assert "\n" not in str(caught.value)


def test_data_folder_is_absolute_wherever_it_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("dataset: {data_dir: x}")
    assigned = parse_assignments(["dataset.data_dir=~/x"])
    for layer in (read_config(tmp_path / "a.yaml"), assigned, {"dataset": {"data_dir": "x"}}):
        assert resolve(layer).dataset.data_dir == tmp_path / "x"
    (tmp_path / "net.pt").touch()
    (tmp_path / "b.yaml").write_text("init: net.pt")
    assert resolve(read_config(tmp_path / "b.yaml")).init == str(tmp_path / "net.pt")
    for source, found in (("net.pt", tmp_path / "net.pt"), ("owner/name:net.pt",) * 2):
        assert resolve({"init": source}).init == str(found)


def test_assignments_and_files_that_do_not_parse_are_refused(tmp_path):
    for text in ("lr", "=1", "a..b=1"):
        with pytest.raises(ebmkit.UserError, match="key=value"):
            parse_assignments([text])
    with pytest.raises(ebmkit.UserError, match="not YAML"):
        parse_assignments(["a=[1"])
    with pytest.raises(ebmkit.UserError, match="cannot read"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ebmkit.UserError, match="must hold fields"):
        read_config(tmp_path / "list.yaml")


def test_former_names_of_the_rollback_settings_are_read():
    layers = [parse_assignments([text]) for text in ("watch.breaches=3", "rollback.every=7")]
    config = resolve(*layers)
    assert (config.rollback.max_rollbacks, config.rollback.every) == (3, 7)
    stored = config.model_dump(mode="json")
    own = stored.pop("rollback")
    stored["watch"] = {"breaches": own.pop("max_rollbacks"), **own}
    assert TrainConfig.model_validate(stored) == config == resolve(stored)
