"""Suite ``generative-classifier``: Bayes' rule on a mixture, cost, files."""

import io
import json

from rich.console import Console

from ebmkit import evaluation
from ebmkit.evaluation import tables

QUICK = {"images": 12, "draws": 16, "steps": 2}


def evaluate(model, data, folder, **settings):
    options = {"generative-classifier": QUICK | settings}
    return evaluation.evaluate(model, data, ["generative-classifier"], folder, options=options)


def test_generative_classifier_agrees_with_bayes_where_it_is_decided(
    mixture, mixture_samples, tmp_path
):
    """The exact model is its own Bayes classifier, so both agree but for the undecided images
    and 2 of 40, for the Monte Carlo error beyond two standard errors."""
    found = evaluate(mixture, mixture_samples, tmp_path, images=40, draws=64)
    document = found["generative-classifier"].document
    stored = json.loads((tmp_path / "generative-classifier.json").read_text())
    assert document == stored
    assert document["pictures"] == ["generative-classifier.png"]
    for kind in ("clean", "noisy", "attacked"):
        one, two = (document["conditions"][kind][n] for n in ("one_pass", "generative"))
        undecided = document["conditions"][kind]["undecided"]["value"]
        gap = abs(one["accuracy"]["value"] - two["accuracy"]["value"])
        assert gap <= undecided + 0.06
    clean, attacked = (document["conditions"][k]["one_pass"] for k in ("clean", "attacked"))
    assert attacked["accuracy"]["value"] < clean["accuracy"]["value"]
    assert document["conditions"]["clean"]["generative"]["ece"]["value"] < 0.35
    cost = document["cost"]
    assert (cost["one_pass"]["forward"], cost["one_pass"]["gradients"]) == (1, 0)
    assert (cost["generative"]["forward"], cost["generative"]["gradients"]) == (64, 192)
    assert cost["generative"]["seconds"] > cost["one_pass"]["seconds"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables(found)[0])
    assert "64 forward passes and 192 gradients" in console.export_text()


def test_network_is_classified_in_both_ways(network, random_images, tmp_path):
    document = evaluate(network, random_images, tmp_path, images=4, draws=4)
    document = document["generative-classifier"].document
    assert document["cost"]["generative"]["gradients"] == 12
    assert document["images"] == 4
