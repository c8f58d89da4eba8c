"""Which warnings are errors in the tests (`filterwarnings` in pyproject.toml)."""

import warnings

import pytest

FUTURE = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]


def warn(category, module):
    """Issue a warning attributed to ``module``."""
    warnings.warn_explicit("of its future", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", FUTURE)
@pytest.mark.parametrize("module", ["ebmkit.energy", "ebmkit.training.step"])
def test_deprecation_warnings_caused_by_ebmkit_are_errors(category, module):
    with pytest.raises(category):
        warn(category, module)


@pytest.mark.parametrize("category", FUTURE)
def test_deprecation_warnings_between_other_packages_are_not_errors(category):
    with warnings.catch_warnings(record=True) as found:
        warn(category, "torch.utils.data")
    assert [one.category for one in found] == [category]


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning])
def test_other_warnings_are_errors_in_any_module(category):
    """Warnings of ebmkit name their caller; those of PyTorch and NumPy concern its calls."""
    with pytest.raises(category):
        warn(category, "torch.nn.modules.conv")
