"""Whether a copy of a model is a copy: what of the original it still reaches, by functions that no copy rebinds.

`copy.deepcopy` rebinds attributes, containers, bound methods and partial functions. It cannot rebind a function: its
closure, defaults and globals stay, and what they hold of the original is what the copy runs. So it is with weak
references. Changing the weights of such a copy changes nothing, or half of the model.
"""

from __future__ import annotations

import dis
import functools
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ablate.errors import GatingError
from ablate.models.sharing import Extent

_UNUSED = ("_backward", "_state_dict", "_load_state_dict", "_parameters", "_modules", "_buffers", "_compiled_call")
_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
_CACHED = type(functools.cache(len))
_CALLABLES = (types.FunctionType, *_METHODS, functools.partial, weakref.ref, _CACHED)
_RUN = ("__call__", "__getattr__", "__getattribute__")  # special methods that a forward may run; not __init__
_DEPTH = 6  # functions in functions; globals of globals
_ADVICE = (
    "Make it a method of a class that finds its layers on self (for another forward: a module of your own that holds "
    "this model and calls it), or remove it."
)


def require_own(model: nn.Module, copied: nn.Module) -> None:
    """Raises GatingError, naming where and what, if a copy of a model reaches the original's modules or weights.

    Cost: milliseconds; a look at every attribute and hook of every module, and into the functions found there.
    """
    search = _Search(model)
    reached = next(chain(search.proxies(model), search.found(copied)), None)
    if reached is not None:
        where, what = reached
        raise GatingError(
            f"A copy of this {type(model).__name__} would go on running the original's weights: {where} holds {what} "
            f"of the original, and no copy can rebind that. {_ADVICE}"
        )


class _Search:
    """A walk through a copy, looking for what belongs to the original."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module): name for name, module in model.named_modules()}
        tensors = list(chain(model.named_parameters(), model.named_buffers()))
        self._tensors = {id(tensor): name for name, tensor in tensors}
        self._storages = {e.storage: name for name, t in reversed(tensors) if (e := Extent.of(t)) is not None}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # what was seen: else another object could get its id

    def proxies(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Yields (where in the original, what of it): weak proxies, of which a copy holds a copy of its own."""
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                for item in _items(value):
                    if type(item) in weakref.ProxyTypes and id(_target(item)) in self._modules:
                        yield f"{key} of {_said(name, module)} (a weak proxy)", self._name(item)

    def found(self, copied: nn.Module) -> Iterator[tuple[str, str]]:
        """Yields (where in the copy, what of the original)."""
        for name, module in copied.named_modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            what = _said(name, module)
            if id(module) in self._modules:
                yield f"{what}, which is its own copy,", self._name(module)
            for key, value in vars(module).items():
                if not key.startswith(_UNUSED):
                    yield from self._attribute(f"{key} of {what}", value)
            for holder in type(module).__mro__:
                if not holder.__module__.startswith("torch."):
                    yield from self._class(holder)

    def _attribute(self, where: str, value: Any) -> Iterator[tuple[str, str]]:
        """Looks into an attribute: tensors and modules that it holds openly are copies by now, functions are not."""
        for item in _items(value):
            if isinstance(item, nn.Module):
                if id(item) in self._modules:
                    yield where, self._name(item)
                elif id(item) not in self._seen:  # one that the model does not list, in a list of its own
                    yield from self.found(item)
            elif isinstance(item, _CALLABLES):
                yield from self._function(where, item, _DEPTH)

    def _class(self, holder: type) -> Iterator[tuple[str, str]]:
        """Looks at what a class of modules holds itself, and what its functions hold."""
        if id(holder) in self._seen:
            return
        self._seen.add(id(holder))
        for key, value in vars(holder).items():
            if key.startswith("__") and key not in _RUN:
                continue
            where = f"{key} of class {holder.__name__}"
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(function, types.FunctionType):
                yield from self._function(where, function, 1)
            elif isinstance(value, (nn.Module, Tensor)):
                yield from self._value(where, value, 0)

    def _function(self, where: str, function: Any, depth: int) -> Iterator[tuple[str, str]]:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        self._alive.append(function)
        for how, value in _held(function):
            for item in _items(value):
                yield from self._value(f"{where} ({how})", item, depth - 1)

    def _value(self, where: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
        """Looks at what a function holds."""
        if isinstance(value, nn.Module):
            if id(_target(value)) in self._modules:
                yield where, self._name(value)
        elif isinstance(value, Tensor):
            extent = Extent.of(value)
            if id(value) in self._tensors or (extent is not None and extent.storage in self._storages):
                yield where, self._name(value)
        elif depth > 0 and isinstance(value, _CALLABLES):
            yield from self._function(where, value, depth)

    def _name(self, value: Any) -> str:
        value = _target(value)
        if isinstance(value, Tensor):
            extent = Extent.of(value)
            stored = "" if extent is None else self._storages.get(extent.storage, "")
            return repr(self._tensors.get(id(value), stored))
        name = self._modules.get(id(value))
        return f"module {name!r}" if name else "the whole" if name is not None else f"a {type(value).__name__}"


def _said(name: str, module: nn.Module) -> str:
    return f"module {name!r}" if name else f"the {type(module).__name__} itself"


def _target(value: Any) -> Any:
    """Returns the object that a weak proxy stands for."""
    return value.__repr__.__self__ if type(value) in weakref.ProxyTypes else value


def _items(value: Any, depth: int = 3) -> Iterator[Any]:
    """Yields a value, and what is in it if it is a container."""
    if depth and isinstance(value, Mapping):
        for item in list(value.values()):
            yield from _items(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in list(value):
            yield from _items(item, depth - 1)
    else:
        yield value


def _held(function: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a callable holds, and how: what it may run when it is called."""
    if isinstance(function, weakref.ref):
        yield "a weak reference", function()
        return
    if isinstance(function, functools.partial):
        yield "a partial function", (function.func, function.args, function.keywords)
        return
    if isinstance(function, _CACHED):
        yield "a cached function", function.__wrapped__
        return
    if isinstance(function, _METHODS):
        yield f"a method, {function.__name__}", function.__self__
        yield "a method", getattr(function, "__func__", None)
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"a function with a variable {name!r}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield "a default value", (function.__defaults__, function.__kwdefaults__)
    yield "a function that wraps another", vars(function)
    if _is_users(function):
        for name in _names(code):
            if name in function.__globals__:
                yield f"a function that uses the global {name!r}", function.__globals__[name]


def _is_users(function: types.FunctionType) -> bool:
    """Returns whether a function may know the model by a global name: those of torch and of Python do not."""
    root = (function.__module__ or "").partition(".")[0]
    return root != "torch" and root not in sys.stdlib_module_names - {"__main__"}


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Returns the globals that code reads, in functions within it, too; not attributes, which may be called alike."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(own.union(*map(_names, inner)))
