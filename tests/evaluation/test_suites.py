"""Which suites a list of names means."""

import pytest
from ebmkit_tests.support.mixture_world import Drawn

from ebmkit import UserError
from ebmkit.evaluation import SUITES, evaluate, parse_options, parse_suites, tables

STANDARD = [name for name, suite in SUITES.items() if suite.standard]


def test_all_means_those_that_apply(mixture, drawn):
    unasked = [name for name, suite in SUITES.items() if not suite.needs]
    assert parse_suites("all", mixture, drawn) == unasked
    assert parse_suites("standard", mixture, drawn) == STANDARD
    assert parse_suites("standard", mixture, Drawn(drawn.images, None)) == ["denoise"]
    assert parse_suites("denoise, classify,denoise", mixture, drawn) == ["denoise", "classify"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clasify", "did you mean 'classify'"),
        ("all,denoise", "stands alone"),
        (" , ", "name some of standard, all, classify"),
    ],
)
def test_names_of_suites_are_checked(text, words, mixture, drawn):
    with pytest.raises(UserError, match=words):
        parse_suites(text, mixture, drawn)


def test_the_former_name_of_a_suite_is_refused_with_the_new_one(mixture, drawn, tmp_path):
    with pytest.raises(UserError, match=r"'shift' is now called 'corruptions': .*corruptions"):
        parse_suites("classify,shift", mixture, drawn)
    with pytest.raises(UserError, match="now called 'corruptions'"):
        parse_options({"shift": {"strengths": [1]}}, ["shift"])
    options = {"corruptions": {"strengths": [1], "corruptions": ["blur"]}}
    found = evaluate(mixture, drawn, ["corruptions"], tmp_path, limit=8, options=options)
    (former,) = tables({"shift": found["corruptions"]})  # an older document
    assert former.row_count == tables(found)[0].row_count > 1
