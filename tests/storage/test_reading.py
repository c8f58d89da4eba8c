"""YAML and JSON are read with line and column, and without surprises of YAML 1.1."""

import pytest

from ebmkit import UserError
from ebmkit.storage.reading import parse_yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\noptimizer:\n\tlr: 1", "line 3, column 1: found character .* indent by spaces"),
        ("a: [1,\n  2", "line 2, column 4: expected"),
        ("a: 1\nb: \x01", "line 2, column 4: the character"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: it has 'a' twice"),
        ("a: 1\nseed: 010", "line 2, column 7: 010 starts with 0"),
        ("[1, -0_7]", "line 1, column 5: -0_7 starts with 0"),
        ("a: !!python/name:os.system x", "line 1, column 4: could not determine a constructor"),
    ],
)
def test_yaml_errors_name_line_and_column(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "configuration 'a.yaml'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["on", "off", "yes", "No", "1:30", "1:30.5", "2026-01-01", "="])
def test_what_only_yaml_1_1_converts_is_text(text):
    assert parse_yaml(text, "a") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("10", 10),
        ("0", 0),
        ("0.5", 0.5),
        ("0x1F", 31),
        ("~", None),
        ("'010'", "010"),
    ],
)
def test_plain_values_are_unchanged(text, value):
    found = parse_yaml(text, "a")
    assert (found, type(found)) == (value, type(value))
