"""Which warnings fail a test, whatever the version of torch: the filters in pyproject.toml, tried out."""

from __future__ import annotations

import warnings

import pytest
import torch

CPLUSPLUS = "Converting a tensor may lead to\nunexpected behavior. (Triggered internally at /pytorch/a.cpp:8.)"


def _say(module: str, text: str, category: type[Warning]) -> None:
    """Warns as a line of that module would."""
    warnings.warn_explicit(text, category, filename=f"{module}.py", lineno=1, module=module, registry={})


@pytest.mark.parametrize("module", ["ablate.engine", "coar.report", "stores.errors", "test_engine", "numpy.linalg"])
def test_a_warning_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="strange"):
        _say(module, "strange", UserWarning)


@pytest.mark.parametrize("module", ["ablate.engine", "test_engine", "torch.nn.functional", "timm.layers"])
@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_a_deprecation_is_an_error_wherever_it_is_said(
    module: str, category: type[Warning], pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("pythonwarnings"):
        pytest.skip(
            "filters of the command line are in front of those of pyproject.toml, as `make test-oldest` has them"
        )
    with pytest.raises(category, match="will go"):
        _say(module, "will go", category)


@pytest.mark.parametrize("module", ["ablate.engine", "coar", "stores.errors"])
def test_what_torch_says_about_our_line_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="Triggered internally"):
        _say(module, CPLUSPLUS, UserWarning)


@pytest.mark.parametrize(
    ("module", "text"),
    [("torch.nn.functional", "strange"), ("torchvision", "strange"), ("timm.layers", "strange"), ("test_a", CPLUSPLUS)],
)
def test_what_a_library_says_about_itself_is_shown(module: str, text: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        _say(module, text, UserWarning)
    assert [str(warning.message) for warning in shown] == [text]


def test_a_library_whose_name_begins_like_ours_is_not_ours() -> None:
    with warnings.catch_warnings(record=True) as shown:
        _say("coarse_grained", CPLUSPLUS, UserWarning)
    assert len(shown) == 1


def test_torch_warns_every_time() -> None:
    """Else a warning would fail the first test of a process, whichever that is."""
    assert torch.is_warn_always_enabled()
