"""Seeds on the command line."""

import pytest
from ebmkit_tests.support.command_line import ebmkit_command

from ebmkit import UserError
from ebmkit.experiments.seeds import format_seeds, parse_seeds


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
