"""Which warnings are errors in the tests (`filterwarnings` in pyproject.toml)."""

import warnings

import pytest

FUTURE = [DeprecationWarning, PendingDeprecationWarning, FutureWarning]


def warn(category, module):
    """A warning as ``module`` would cause it."""
    warnings.warn_explicit("of its future", category, "file.py", 1, module=module)


@pytest.mark.parametrize("category", FUTURE)
@pytest.mark.parametrize("module", ["ebmkit.energy", "ebmkit.training.step"])
def test_what_ebmkit_uses_is_not_deprecated(category, module):
    with pytest.raises(category):
        warn(category, module)


@pytest.mark.parametrize("category", FUTURE)
def test_deprecations_between_other_packages_are_no_errors(category):
    with warnings.catch_warnings(record=True) as found:
        warn(category, "torch.utils.data")
    assert [one.category for one in found] == [category]


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning])
def test_other_warnings_are_errors_wherever_they_arise(category):
    """Ours name their caller; those of PyTorch and NumPy are about our use of them."""
    with pytest.raises(category):
        warn(category, "torch.nn.modules.conv")
