"""Seeds on the command line; paired tests over seeds and images."""

import numpy as np
import pytest
from ebmkit_tests.support.command_line import ebmkit_command
from scipy import stats

from ebmkit import UserError
from ebmkit.experiments.seeds import compare, format_seeds, parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", (0,)), ("0-4", (0, 1, 2, 3, 4)), ("0,2,5-7", (0, 2, 5, 6, 7)), (" 3 , 1 ", (3, 1))],
)
def test_numbers_and_ranges_parse_and_are_formatted(text, seeds):
    assert parse_seeds(text) == seeds
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is no seed"),
        ("0-", "'0-' is no seed"),
        ("4-0", "'4-0' is no seed"),
        ("-1", "'-1' is no seed"),
        ("0,,1", "'' is no seed"),
        ("0-1e3", "'0-1e3' is no seed"),
        ("0-99999999999", "up to 1000"),
        ("9223372036854775808", "from 0 to 9223372036854775807"),
        ("0-2,0", "repeats seed 0"),
    ],
)
def test_illegal_seeds_are_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_seeds(text)


@pytest.mark.parametrize("given", [["--seeds", ""], ["--seeds", "0-"], ["--seed=1", "--seeds=0"]])
def test_illegal_seeds_end_the_command_with_one_sentence(given, tmp_path):
    ended = ebmkit_command("reproduce", "table3", "--show", *given, cwd=tmp_path)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "--seeds" in ended.stderr


def drawn(seeds, images, over_seeds, over_images, rest=1.0, mean=0.0, seed=0):
    """Differences with known variances of the seeds, the images and their interaction."""
    rng = np.random.default_rng(seed)
    return (
        mean
        + over_seeds * rng.standard_normal((seeds, 1))
        + over_images * rng.standard_normal((1, images))
        + rest * rng.standard_normal((seeds, images))
    )


def test_p_values_are_those_of_scipys_t_tests():
    d = drawn(4, 30, 0.3, 0.5, mean=0.2)
    found = compare(d)
    by_seed, by_image = d.mean(1), d.mean(0)
    assert found.p_seeds == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    assert found.p_images == pytest.approx(stats.ttest_1samp(by_image, 0).pvalue)
    both = stats.ttest_ind_from_stats(  # Welch's test of two means has the same form
        *(d.mean(), by_seed.std(ddof=1), 4),
        *(0, by_image.std(ddof=1), 30),
        equal_var=False,
    ).pvalue
    assert found.p == pytest.approx(max(found.p_seeds, found.p_images, both))
    assert found.difference == pytest.approx(d.mean())


def test_one_seed_is_tested_over_images_as_by_mcnemar_and_stays_open():
    """Of two classifiers, McNemar's statistic is (n10 - n01)^2 / (n10 + n01), chi-squared."""
    a, b = np.zeros(2000), np.zeros(2000)
    a[:700], b[40:720] = 1, 1
    found = compare((a - b)[None])
    one, other = int((a > b).sum()), int((b > a).sum())
    mcnemar = stats.chi2.sf((one - other) ** 2 / (one + other), 1)
    assert found.p_images == pytest.approx(mcnemar, rel=0.05)
    assert found.p_seeds is None
    assert found.p is None
    assert found.verdict == "open (one seed)"
    assert compare(drawn(1, 200, 0, 1)).verdict == "open"


@pytest.mark.parametrize(
    ("mean", "verdict"), [(1.0, "holds"), (-1.0, "reversed"), (0.0, "open"), (0.02, "open")]
)
def test_verdict_follows_sign_and_significance(mean, verdict):
    assert compare(drawn(3, 400, 0.05, 0.5, mean=mean)).verdict == verdict


def test_seeds_that_disagree_leave_a_difference_open_that_images_would_decide():
    found = compare(drawn(3, 10_000, 1.0, 0.5, mean=0.3))
    assert found.p_images < 1e-6
    assert found.verdict == "open"


def test_equal_results_are_open_and_equal_differences_of_all_seeds_are_not_divided_by_zero():
    assert compare(np.zeros((3, 10))).verdict == "open"
    assert compare(np.zeros((3, 10))).p == 1
    found = compare(np.tile([1.0, 0.0, 0.0, 1.0], (3, 1)))
    assert found.p_seeds == 0
    assert found.p == pytest.approx(found.p_images)
    assert compare(np.full((2, 1), 0.5)).verdict == "open (no values by image)"


@pytest.mark.parametrize(("seeds", "ratio"), [(2, 10), (10, 1)])
def test_true_null_is_rejected_in_about_five_percent_at_most(seeds, ratio):
    """Where Welch's test alone (two seeds) or both single tests (ratio 1) reject too often.

    ``ratio`` is the variance of the mean due to seeds, divided by that due to images.
    """
    images, count = 40, 600
    over_seeds = np.sqrt(ratio * seeds / images)
    found = [compare(drawn(seeds, images, over_seeds, 1.0, 0.1, seed=k)) for k in range(count)]
    rejected = np.mean([one.p < 0.05 for one in found])
    assert rejected < 0.057 + 2 * np.sqrt(0.05 * 0.95 / count)
