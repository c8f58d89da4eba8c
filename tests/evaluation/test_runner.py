"""`evaluate`: files, folders and refused input."""

import copy
import json
from functools import partial

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from rich.console import Console
from torch._dynamo.backends.debugging import aot_eager

from ebmkit import ModelCard, UserError, evaluation
from ebmkit.compile import Inference
from ebmkit.data import ImageSet
from ebmkit.evaluation import SUITES, evaluation_folder, parse_options, parse_suites, tables
from ebmkit.evaluation.suite import noisy_batches

pytestmark = pytest.mark.usefixtures("few_resamples")

STANDARD = [name for name, suite in SUITES.items() if suite.standard]

COMMON = {"suite", "dataset", "split", "images", "of", "seed", "sigmas", "model", "environment"}
COMMON |= {"device", "seconds", "warnings", "weights", "precision", "compiled", "processes"}


evaluate = partial(evaluation.evaluate, plots=False)  # no plots by default


def numbers(value):
    """All numbers in a document except those that may differ between two runs."""
    if isinstance(value, dict):
        skip = ("seconds", "environment", "batch_size", "compiled")
        return [n for k, v in value.items() if k not in skip for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) else []


def test_json_documents_have_required_fields_and_figures_are_written(
    mixture, mixture_samples, tmp_path
):
    results = evaluate(mixture, mixture_samples, STANDARD, tmp_path, limit=50, plots=True)
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STANDARD}
    for name, document in read.items():
        assert document.keys() >= COMMON
        assert (document["images"], document["of"], document["split"]) == (50, 400, "test")
        assert results[name].document == document
        assert document["environment"]["torch"] == torch.__version__
    assert 0 <= read["classify"]["accuracy"] <= 1
    for key in ("psnr", "psnr_noisy"):
        assert list(read["denoise"][key]) == ["15", "25", "50"]
        assert all(isinstance(v, float) for v in read["denoise"][key].values())
    low, high = read["denoise"]["psnr_interval"]["25"]
    assert low < read["denoise"]["psnr"]["25"] < high
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {
        "accuracy-against-noise", "confusion", "denoising", "psnr", "reliability",
    }  # fmt: skip


@pytest.mark.parametrize("other", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_batch_size_changes_only_rounding(network, random_images, tmp_path, other):
    documents = [
        {
            n: r.document
            for n, r in evaluate(network, random_images, STANDARD, tmp_path, **o).items()
        }
        for o in ({"batch_size": 30}, {"batch_size": other})
    ]
    whole = numbers(documents[0])
    assert len(whole) > 300
    # the batch size changes the order of sums in float32 convolutions
    assert numbers(documents[1]) == pytest.approx(whole, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_compiled_evaluation_equals_eager_evaluation(network, random_images, tmp_path, monkeypatch):
    """The denoisers and the classifier are one graph each, for all noise levels."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(
        "ebmkit.evaluation.runner.make_inference",
        lambda device, precision, compile: Inference(
            mode="on" if compile == "on" else "off", backend=backend
        ),
    )
    options = {"batch_size": 8, "sigmas": [0.1, 0.2], "noise_levels": [0.1]}
    eager = evaluate(network, random_images, STANDARD, tmp_path / "eager", **options)
    compiled = evaluate(network, random_images, STANDARD, tmp_path, compile="on", **options)
    assert len(graphs) == 2
    for name in STANDARD:
        expected, found = eager[name].document, compiled[name].document
        assert (found["compiled"], found["precision"]) == (True, "fp32")
        assert not expected["compiled"]
        # the same operations, except that noise levels are squared in float32
        assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_auto_compile_gets_estimates_of_remaining_seconds(
    network, random_images, tmp_path, monkeypatch
):
    monkeypatch.setattr("ebmkit.compile.pick_compile", lambda mode, device: True)
    estimates = []
    monkeypatch.setattr(Inference, "expect", lambda self, seconds: estimates.append(seconds))
    evaluate(network, random_images, ["denoise"], tmp_path, batch_size=8)
    # after each of 4 batches at 3 levels except the first, a warm-up
    assert len(estimates) == 3 * 3
    assert estimates[-1] == 0
    assert estimates[0] > estimates[-2] > 0


def test_precision_is_applied_and_reported(network, random_images, tmp_path):
    plain = evaluate(network, random_images, ["denoise"], tmp_path)["denoise"].document
    rounded = evaluate(network, random_images, ["denoise"], tmp_path, precision="bf16")
    assert (plain["precision"], plain["compiled"]) == ("fp32", False)
    document = rounded["denoise"].document
    assert document["precision"] == "bf16"
    # bf16 changes PSNR, by less than 0.5 dB
    shown = document["denoisers"]["blind"]["psnr"], plain["denoisers"]["blind"]["psnr"]
    for key in ("15", "25", "50"):
        difference = abs(shown[0][key]["value"] - shown[1][key]["value"])
        assert 0 < difference < 0.5
    with pytest.raises(UserError, match="precision 'fp16'"):
        evaluate(network, random_images, ["denoise"], tmp_path, precision="fp16")


def test_noise_does_not_depend_on_the_batch():
    # 15 values: torch draws normal numbers in blocks of 16
    odd = Drawn(torch.rand(7, 1, 3, 5), None)
    whole, ones, twos = (
        torch.cat([batch.y for batch in noisy_batches(odd, 0.1, 0, size)]) for size in (7, 1, 2)
    )
    assert torch.equal(whole, ones)
    assert torch.equal(whole, twos)


def test_limit_does_not_change_noise_of_remaining_images(network, random_images, tmp_path):
    limited = evaluate(network, random_images, ["denoise"], tmp_path / "a", limit=4)[
        "denoise"
    ].document
    alone = evaluate(network, random_images.first(4), ["denoise"], tmp_path / "b")[
        "denoise"
    ].document
    assert limited["psnr_noisy"] == alone["psnr_noisy"]
    other = evaluate(network, random_images, ["denoise"], tmp_path / "c", seed=1, limit=4)[
        "denoise"
    ]
    assert other.document["psnr_noisy"] != limited["psnr_noisy"]


def test_weights_and_training_mode_of_model_are_unchanged(network, random_images, tmp_path):
    network.train()
    modes = []
    network.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    evaluate(network, random_images, ["classify"], tmp_path)
    assert network.training
    assert modes
    assert not any(modes)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_tables_show_values_of_documents(mixture, mixture_samples, tmp_path):
    results = evaluate(mixture, mixture_samples, STANDARD, tmp_path, limit=50)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(results):
        console.print(table)
    console.file.close()
    text = console.export_text()
    denoise = results["denoise"].document
    assert f"{denoise['psnr']['25']:.2f}" in text
    assert f"{denoise['denoisers']['unconditional']['gain']['25']['value']:+.2f}" in text
    assert f"{results['classify'].document['accuracy']:.2%}" in text
    assert "50 of 400 images" in text
    assert "…" not in text  # nothing is cut off at 80 columns


def card(**fields):
    return ModelCard(dataset="mixture", channels=1, classifies=True, **fields)


def test_results_that_cannot_be_compared_have_separate_folders(mixture, mixture_samples, tmp_path):
    default_folder = tmp_path / "evaluation"
    # no card
    assert evaluation_folder(tmp_path, mixture, mixture_samples) == default_folder / "mixture-test"
    mixture.card = card()
    folders = [
        evaluation_folder(tmp_path, mixture, mixture_samples),
        evaluation_folder(tmp_path, mixture, mixture_samples, weights="best"),
        evaluation_folder(tmp_path, mixture, Drawn(mixture_samples.images, None, split="train")),
        evaluation_folder(tmp_path, mixture, Drawn(mixture_samples.images, None, name="../a b")),
    ]
    assert folders[0] == default_folder
    assert len(set(folders)) == len(folders)
    assert all(f == default_folder or f.parent == default_folder for f in folders)


def test_results_of_fewer_images_do_not_replace_those_of_more(mixture, mixture_samples, tmp_path):
    mixture.card = card()
    default_folder = tmp_path / "evaluation"
    for limit in (10, 20):  # the first result uses the default folder, a larger one replaces it
        assert evaluation_folder(tmp_path, mixture, mixture_samples, limit=limit) == default_folder
        evaluate(mixture, mixture_samples, ["classify"], default_folder, limit=limit)
    aside = evaluation_folder(tmp_path, mixture, mixture_samples, limit=10)
    assert aside == default_folder / "mixture-test-limit10"
    assert evaluation_folder(tmp_path, mixture, mixture_samples) == default_folder


def test_results_with_changed_settings_have_separate_folders(mixture, mixture_samples, tmp_path):
    mixture.card = card()

    def folder(options):
        own = parse_options(options, ["robustness", "corruptions"])
        return evaluation_folder(tmp_path, mixture, mixture_samples, options=own)

    default_folder = tmp_path / "evaluation"
    assert folder({}) == default_folder
    assert folder({"robustness": {"steps": 40}}) == default_folder  # the default
    quick = folder({"robustness": {"steps": 2, "images": 5}})
    assert quick == default_folder / "mixture-test-images=5-steps=2"
    several = {"robustness": {"linf": [n / 255 for n in range(9)]}}
    assert folder(several) == folder(several)
    assert folder(several) != folder({"robustness": {"linf": [n / 255 for n in range(8)]}})
    assert len(folder(several).name) < 100


def test_settings_of_a_suite_that_does_not_run_are_refused(mixture, mixture_samples, tmp_path):
    with pytest.raises(UserError, match="settings of suite 'corruptions', which does not run"):
        evaluate(
            mixture,
            mixture_samples,
            ["classify"],
            tmp_path,
            options={"corruptions": {"strengths": [1]}},
        )


@pytest.mark.slow
def test_stale_figures_of_an_earlier_result_are_removed(mixture, mixture_samples, tmp_path):
    few = {"images": 4, "steps": 1, "restarts": 1, "draws": 2, "checks": False, "norms": ["linf"]}
    for levels, map_there in (([0, 0.1], True), ([0], False)):
        options = {"robustness": few | {"noise_levels": levels}}
        found = evaluation.evaluate(
            mixture, mixture_samples, ["robustness"], tmp_path, options=options
        )
        assert (tmp_path / "robustness-map.png").exists() == map_there
        pictures = sorted(path.name for path in tmp_path.glob("*.png"))
        assert found["robustness"].document["pictures"] == pictures
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_figure_names_in_a_document_do_not_delete_files_outside_folder(
    mixture, mixture_samples, tmp_path
):
    outside = tmp_path / "kept.png"
    outside.write_bytes(b"")
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "denoise.json").write_text(json.dumps({"pictures": ["../kept.png", str(outside), 3]}))
    evaluation.evaluate(mixture, mixture_samples, ["denoise"], folder, limit=1)
    assert outside.exists()


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_refuses_a_diverged_model(network, random_images, tmp_path, suite):
    broken = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(UserError, match="NaN or Inf: its training diverged"):
        evaluate(broken, random_images, [suite], tmp_path)


def test_different_images_of_the_same_name_have_separate_folders(
    mixture, mixture_samples, tmp_path
):
    mixture.card = card()
    default_folder = evaluation_folder(tmp_path, mixture, mixture_samples)
    evaluate(mixture, mixture_samples, ["classify"], default_folder)
    others = Drawn(mixture_samples.images.flip(0), mixture_samples.labels.flip(0))
    elsewhere = evaluation_folder(tmp_path, mixture, others)
    assert elsewhere.parent == default_folder
    assert elsewhere.name.startswith("mixture-test-")
    assert evaluation_folder(tmp_path, mixture, mixture_samples) == default_folder
    evaluate(mixture, others, ["classify"], elsewhere)
    assert evaluation_folder(tmp_path, mixture, others) == elsewhere


def test_evaluating_again_replaces_only_its_own_files(mixture, mixture_samples, tmp_path):
    evaluate(mixture, mixture_samples, ["classify"], tmp_path, limit=20)
    before = (tmp_path / "classify.json").read_bytes()
    evaluate(mixture, mixture_samples, ["denoise"], tmp_path, limit=20, seed=3)
    assert (tmp_path / "classify.json").read_bytes() == before
    evaluate(mixture, mixture_samples, ["classify"], tmp_path, limit=30)
    assert json.loads((tmp_path / "classify.json").read_text())["images"] == 30


@pytest.mark.parametrize(
    ("change", "suite", "words"),
    [
        ({"images": torch.rand(4, 3, 8, 8)}, "denoise", "3 channel.*takes 1"),
        ({"images": torch.rand(0, 1, 8, 8)}, "denoise", "no images in split 'test'"),
        ({"labels": None}, "classify", "no labels to compare"),
        ({"labels": None}, "calibration", "no labels to compare"),
        ({"class_names": ("a", "b")}, "classify", "2 classes and this model has 3"),
    ],
)
def test_incompatible_images_are_refused(change, suite, words, network, tmp_path):
    fields = {"images": torch.rand(4, 1, 8, 8), "labels": torch.zeros(4, dtype=torch.long)}
    folder = tmp_path / "evaluation"
    with pytest.raises(UserError, match=words):
        evaluate(network, Drawn(**{**fields, **change}), [suite], folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "limit 0 leaves no images"),
        ({"batch_size": 0}, "batch size 0"),
        ({"sigmas": [0.0]}, "sigmas: 0.0 is not legal"),
        ({"sigmas": []}, "sigmas: none is not legal"),
        ({"noise_levels": [float("inf")]}, "noise levels: inf is not legal"),
    ],
)
def test_illegal_numbers_are_refused(options, words, network, random_images, tmp_path):
    with pytest.raises(UserError, match=words):
        evaluate(network, random_images, ["classify"], tmp_path, **options)


def test_a_model_without_labels_cannot_classify(network, random_images, tmp_path):
    network.card.classifies = False
    with pytest.raises(UserError, match="trained without labels and cannot classify"):
        evaluate(network, random_images, ["classify"], tmp_path)


def test_different_class_names_give_warning(network, random_images, tmp_path):
    network.card.class_names = ["up", "right", "both"]
    (line,) = evaluate(network, random_images, ["classify"], tmp_path)["classify"].document[
        "warnings"
    ]
    assert "'left' against 'up'" in line


def test_folder_that_cannot_be_created_is_refused(network, random_images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make folder"):
        evaluate(network, random_images, ["classify"], tmp_path / "file" / "evaluation")


def test_all_and_standard_select_applicable_suites(mixture, mixture_samples):
    without_needs = [name for name, suite in SUITES.items() if not suite.needs]
    assert parse_suites("all", mixture, mixture_samples) == without_needs
    assert parse_suites("standard", mixture, mixture_samples) == STANDARD
    assert parse_suites("standard", mixture, Drawn(mixture_samples.images, None)) == ["denoise"]
    assert parse_suites("denoise, classify,denoise", mixture, mixture_samples) == [
        "denoise",
        "classify",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clasify", "did you mean 'classify'"),
        ("all,denoise", "cannot be combined"),
        (" , ", "name some of standard, all, classify"),
    ],
)
def test_illegal_suite_names_are_refused(text, words, mixture, mixture_samples):
    with pytest.raises(UserError, match=words):
        parse_suites(text, mixture, mixture_samples)


def test_old_suite_name_error_gives_new_name(mixture, mixture_samples, tmp_path):
    with pytest.raises(UserError, match=r"'shift' is now called 'corruptions': .*corruptions"):
        parse_suites("classify,shift", mixture, mixture_samples)
    with pytest.raises(UserError, match="now called 'corruptions'"):
        parse_options({"shift": {"strengths": [1]}}, ["shift"])
    options = {"corruptions": {"strengths": [1], "corruptions": ["blur"]}}
    found = evaluate(mixture, mixture_samples, ["corruptions"], tmp_path, limit=8, options=options)
    (former,) = tables({"shift": found["corruptions"]})  # an older document
    assert former.row_count == tables(found)[0].row_count > 1


def test_labels_are_matched_to_the_models_classes_by_name(network, tmp_path):
    """Images labelled by the model's own predictions, with the classes in another order."""
    pixels = torch.randint(256, (30, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    predicted = network.logits(pixels).argmax(1)
    order = ("both", "left", "right")  # the model's: left, right, both
    labels = (predicted + 1) % 3
    images = ImageSet(pixels, labels, order, "own", "test")
    found = evaluate(network, images, ["classify"], tmp_path)["classify"].document
    assert found["accuracy"] == 1
