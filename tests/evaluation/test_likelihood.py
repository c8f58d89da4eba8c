"""Suite ``likelihood``: the three methods against a mixture, bits, OOD scores, files, errors."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from ebmkit_tests.support.mixture_world import Drawn
from rich.console import Console

from ebmkit import UserError, evaluation
from ebmkit.evaluation import tables
from ebmkit.likelihood import dequantize

QUICK = {"images": 24, "draws": 16, "sets": ["shuffled"], "flow_images": 2}


def evaluate(model, data, folder, **settings):
    options = {"likelihood": QUICK | settings}
    return evaluation.evaluate(model, data, ["likelihood"], folder, options=options)


@pytest.fixture
def rounded(mixture_samples):
    """Samples of the mixture, rounded to 8 bits."""
    return replace(mixture_samples, images=(mixture_samples.images * 255).round() / 255)


def test_ways_agree_with_the_mixture(mixture, rounded, tmp_path):
    """Bits are -log2 of the mixture's density on a cell of width 1/255."""
    found = evaluate(mixture, rounded, tmp_path)
    document = found["likelihood"].document
    assert document == json.loads((tmp_path / "likelihood.json").read_text())
    assert document["pictures"] == ["likelihood-images.png", "likelihood.png"]
    assert (document["levels"], document["dimensions"], document["images"]) == (256, 16, 24)
    methods = document["methods"]
    assert list(methods) == ["denoising", "denoising_label", "energy", "flow", "gaussian"]
    images = dequantize(rounded.first(24).images, torch.arange(256) / 255)
    assert document["sigma"] == pytest.approx(1 / 255 / 4)
    exact = mixture.log_density(images.images, 1 / 255 / 4)
    assert methods["energy"]["nats"]["value"] == pytest.approx(float(exact.mean()), rel=1e-6)
    bits = -float(exact.mean()) / 16 / math.log(2) + math.log2(255)
    assert methods["energy"]["bits"]["value"] == pytest.approx(bits)
    error = methods["denoising"]["standard_error"]
    assert 0 < error < 0.5
    assert methods["denoising"]["nats"]["value"] == pytest.approx(
        float(exact.mean()), abs=4 * error
    )
    assert methods["flow"]["count"] == 2
    own = float(exact[:2].mean())
    assert methods["flow"]["nats"]["value"] == pytest.approx(own, abs=0.05)
    # the classes overlap: the label tells less than its entropy
    gain = methods["denoising_label"]["nats"]["value"] - methods["denoising"]["nats"]["value"]
    assert -4 * error < gain < math.log(3) + 4 * error
    assert sum(c["count"] for c in document["classes"]) == 24
    assert document["sets"]["shuffled"]["scores"]["log-density"]["auroc"]["value"] > 0.7
    assert sum(document["histogram"]["counts"]["in"]) == 24
    most, least = (document["extremes"][name][0] for name in ("most", "least"))
    assert exact[most] > exact.median() > exact[least]
    assert any("fitted to the evaluated images" in line for line in document["warnings"])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tables(found)[0])
    text = console.export_text()
    assert "AUROC against shuffled" in text
    assert f"{bits:.3f}" in text


def test_the_reason_of_a_failed_integration_is_recorded(mixture, rounded, tmp_path, monkeypatch):
    monkeypatch.setattr("ebmkit.likelihood.MAX_EVALUATIONS", 5)
    document = evaluate(mixture, rounded.first(4), tmp_path, sets=[])["likelihood"].document
    assert document["methods"]["flow"]["nats"]["value"] is None
    reasons = [line for line in document["warnings"] if "ODE" in line]
    assert reasons == ["the probability-flow ODE did not converge: more than 5 evaluations"]


def test_images_of_no_levels_have_no_bits(mixture, mixture_samples, tmp_path):
    document = evaluate(mixture, mixture_samples, tmp_path, sets=[])["likelihood"].document
    assert document["levels"] is None
    assert document["methods"]["denoising"]["bits"] is None
    exact = mixture.log_density(mixture_samples.first(24).images)
    assert document["methods"]["energy"]["nats"]["value"] == pytest.approx(float(exact.mean()))
    assert any("not of 8 bits" in line for line in document["warnings"])


def test_blind_network_has_the_ways_that_it_allows(network, random_images, tmp_path):
    """An untrained network does not converge with 4 draws, which the document says."""
    images = replace(random_images, images=(random_images.images * 16).round() / 16)
    document = evaluate(network, images, tmp_path, images=4, draws=4)["likelihood"].document
    assert list(document["methods"]) == ["denoising", "denoising_label", "gaussian"]
    assert document["sigma"] == pytest.approx(1 / 255)
    assert any("did not converge" in line for line in document["warnings"])
    assert document["methods"]["denoising"]["range_error"] > 0


def test_models_and_levels_without_a_likelihood_are_refused(network, random_images, tmp_path):
    with pytest.raises(UserError, match=r"sigma 0.5/255 is outside the range"):
        evaluate(network, random_images, tmp_path, sigma="0.5/255")
    outside = Drawn(random_images.images + 1, random_images.labels)
    with pytest.raises(UserError, match="not trained to denoise"):
        network.card = network.card.model_copy(update={"sigma_range": None})
        evaluate(network, outside, tmp_path)
