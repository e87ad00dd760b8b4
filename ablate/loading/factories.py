"""A user's own functions, `module:function`, that make a model or a data set."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ablate.data.examples import Examples
from ablate.errors import DataError, LoadError, UnknownNameError
from ablate.loading.transforms import Transform


def factory_model(path: str) -> tuple[nn.Module, Transform | None]:
    """Returns what a user's function makes: a model, or (model, transform from a PIL image to its input)."""
    made = _call(path, _function(path, "a function without arguments"))
    transform = None
    if isinstance(made, tuple) and len(made) == 2:
        made, transform = made
    if not isinstance(made, nn.Module):
        raise LoadError(f"factory {path!r} returned a {type(made).__name__}, expected an nn.Module.")
    if transform is not None and not callable(transform):
        raise LoadError(
            f"factory {path!r} returned a model and a {type(transform).__name__}, expected the transform of its images."
        )
    return made, transform


def factory_data(path: str, transform: Transform | None) -> Examples:
    """Returns what a user's function makes, as Examples; the function may take the model's `transform`."""
    function = _function(path, "a function")
    try:
        wants_transform = "transform" in inspect.signature(function).parameters
    except ValueError:  # written in C, without a signature
        wants_transform = False
    made = _call(path, function, transform=transform) if wants_transform else _call(path, function)
    try:
        return Examples.of(made)
    except (DataError, TypeError) as error:
        raise DataError(
            f"factory {path!r} returned a {type(made).__name__} that cannot be examples: {error} "
            "Return a Dataset, (inputs, targets) or ablate.Examples."
        ) from error


def _function(path: str, expected: str) -> Callable[..., Any]:
    module_name, _, function = path.partition(":")
    if not module_name or not function:
        raise LoadError(f"factory is {path!r}, expected 'module:function'.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise LoadError(
            f"factory {path!r}: module {module_name!r} cannot be imported: {error}. Install it, or name its folder in "
            "PYTHONPATH."
        ) from error
    if not hasattr(module, function):
        known = [name for name in vars(module) if not name.startswith("_")]
        raise UnknownNameError(f"function in {module_name}", function, known)
    factory = getattr(module, function)
    if not callable(factory):
        raise LoadError(f"factory {path!r} is a {type(factory).__name__}, expected {expected}.")
    return factory  # type: ignore[no-any-return]


def _call(path: str, function: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        how = "with the model's transform" if arguments else "without arguments"
        error.add_note(f"This happened in factory {path!r}, which is called {how}.")
        raise
