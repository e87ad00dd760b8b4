"""What a component is, and the ordered, hashed table of all components of one model.

A component is a slice of one module's port that can be switched off. `ComponentIndex` is the only thing in the project
that enumerates a model. It is made of ports; row `id` follows from the ports' order, so the index of a network with a
million components is a page of JSON.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor, nn

from ablate.errors import ModelMismatchError, SelectionError, UnknownNameError, nearest
from stores import content_hash

if TYPE_CHECKING:
    from ablate.selection import Selection

JSON_FORMAT = "component-index"
JSON_VERSION = 1


@dataclass(frozen=True)
class Port:
    """A run of components in one module: `count` equal slices of `parameter` along `axis`, each `width` wide.

    Attributes:
      kind: The component kind, e.g. `conv_filter`.
      layer: Position of the module among the indexed ones, from 0.
      module: The module's name in `model.named_modules()`.
      parameter: The tensor's name in `model.named_parameters()`.
      port: `out` (output channels before the bias) or `in` (input channels).
      axis: The axis of `parameter` that is sliced.
      count: Number of components.
      width: Length of one slice.
      n_parameters: Number of parameters in one slice.
    """

    kind: str
    layer: int
    module: str
    parameter: str
    port: str
    axis: int
    count: int
    width: int
    n_parameters: int


@dataclass(frozen=True)
class Component:
    """One row of the index: `parameter.narrow(axis, start, stop - start)` is what zero-ablation clears."""

    id: int
    name: str
    kind: str
    layer: int
    module: str
    parameter: str
    port: str
    axis: int
    start: int
    stop: int
    n_parameters: int


def _rows_of(model_type: type[nn.Conv2d] | type[nn.Linear], kind: str) -> Callable[[str, nn.Module], Port | None]:
    """Returns the rule for one component per row of the weight of every module of a type."""

    def rule(name: str, module: nn.Module) -> Port | None:
        if not isinstance(module, model_type):
            return None
        weight: Tensor = module.weight
        count = int(weight.shape[0])
        return Port(kind, 0, name, _join(name, "weight"), "out", 0, count, 1, weight.numel() // count)

    return rule


# A kind is a rule from a module to its port, by type and structure, never by name.
_KINDS: dict[str, Callable[[str, nn.Module], Port | None]] = {
    "conv_filter": _rows_of(nn.Conv2d, "conv_filter"),
    "linear_neuron": _rows_of(nn.Linear, "linear_neuron"),
}


def component_kinds() -> tuple[str, ...]:
    """Returns the names of the component kinds."""
    return tuple(_KINDS)


class ComponentIndex:
    """The ordered table of all components of one model. Immutable; equal indices have equal hashes."""

    def __init__(self, ports: Sequence[Port], left_out: Sequence[tuple[str, int, str]] = ()) -> None:
        self.ports: tuple[Port, ...] = tuple(ports)
        self._left_out = tuple(left_out)
        self._offsets = np.concatenate([[0], np.cumsum([port.count for port in self.ports], dtype=np.int64)])

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        kinds: Sequence[str] | None = None,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> ComponentIndex:
        """Returns the index of a model's components, in the order of `model.named_modules()`. Mutates nothing.

        Args:
          model: Any module. A weight that several modules share is listed once, under the first.
          kinds: Component kinds (see `component_kinds()`). None: `conv_filter` where convolutions outnumber hidden
            linear layers, else `linear_neuron` without the last linear layer, which holds the classes themselves.
          include, exclude: Patterns of module names (`layer4.*`).

        Raises:
          UnknownNameError: A kind or a pattern that fits nothing.
          SelectionError: No component is left.
        """
        names = [name for name, _ in model.named_modules()]
        for argument, value in (("kinds", kinds), ("include", include), ("exclude", exclude)):
            if isinstance(value, str):
                raise SelectionError(f"{argument} is the string {value!r}, expected a list: {argument}=[{value!r}].")
        for pattern in (*include, *exclude):
            _require_match(pattern, names, "module")
        exclude = tuple(exclude)
        if kinds is None:
            kinds, last = _default_kinds(model)
            exclude += last
        for kind in kinds:
            if kind not in _KINDS:
                raise UnknownNameError("component kind", kind, _KINDS)

        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        ports: list[Port] = []
        left_out: list[tuple[str, int, str]] = []
        seen: dict[str, str] = {}
        for name, module in model.named_modules():
            port = next((p for kind in kinds if (p := _KINDS[kind](name, module)) is not None), None)
            wanted = any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
            if port is None or not wanted:
                own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                if own:
                    reason = "excluded by name" if port else f"a {type(module).__name__} is none of {', '.join(kinds)}"
                    left_out.append((name, own, reason))
                continue
            parameter = canonical.get(id(module.weight))
            if parameter is None:
                raise ModelMismatchError(
                    f"Module {name!r}: its weight is computed (a parametrization?) and no parameter of the model, so "
                    "it cannot be gated. Remove the parametrization, or leave the module out with exclude=[...]."
                )
            if parameter in seen:
                left_out.append((name, 0, f"shares its weight with {seen[parameter]!r}, which is listed"))
                continue
            seen[parameter] = name
            ports.append(Port(**{**asdict(port), "layer": len(ports), "parameter": parameter}))
        if not ports:
            raise SelectionError(
                f"{type(model).__name__} has no component of kind {', '.join(kinds)} in the modules asked for. "
                f"Kinds: {', '.join(_KINDS)}. Give other kinds, or widen include/exclude."
            )
        return cls(ports, left_out)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, component: SupportsIndex) -> Component:
        component = operator.index(component)
        if not -len(self) <= component < len(self):
            raise IndexError(f"Component {component} does not exist; ids are 0 to {len(self) - 1}.")
        component %= len(self)
        at = int(np.searchsorted(self._offsets, component, side="right")) - 1
        port = self.ports[at]
        unit = component - int(self._offsets[at])
        return Component(
            id=component,
            name=f"{port.module}[{unit}]",
            kind=port.kind,
            layer=port.layer,
            module=port.module,
            parameter=port.parameter,
            port=port.port,
            axis=port.axis,
            start=unit * port.width,
            stop=(unit + 1) * port.width,
            n_parameters=port.n_parameters,
        )

    def __iter__(self) -> Iterator[Component]:
        return (self[component] for component in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ComponentIndex) and self.ports == other.ports

    def __hash__(self) -> int:
        return hash(self.ports)

    def __repr__(self) -> str:
        return f"<ComponentIndex: {len(self):,} components in {len(self.ports)} modules, {self.hash[:12]}>"

    @cached_property
    def hash(self) -> str:
        """The sha256 (hex) of the ports: what a store, an attribution or an edit is bound to."""
        return content_hash([asdict(port) for port in self.ports])

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The table as numpy columns, one value per component, in DESIGN's order."""
        counts = [port.count for port in self.ports]
        units = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])

        def column(field: str) -> npt.NDArray[Any]:
            values = [getattr(port, field) for port in self.ports]
            dtype: Any = object if isinstance(values[0], str) else np.int64
            return np.repeat(np.array(values, dtype=dtype), counts)

        width = column("width")
        module = column("module")
        return {
            "id": np.arange(len(self), dtype=np.int64),
            "name": np.array([f"{m}[{u}]" for m, u in zip(module, units, strict=True)], dtype=object),
            "kind": column("kind"),
            "layer": column("layer"),
            "module": module,
            "parameter": column("parameter"),
            "port": column("port"),
            "axis": column("axis"),
            "start": units * width,
            "stop": (units + 1) * width,
            "n_parameters": column("n_parameters"),
        }

    def table(self) -> pd.DataFrame:
        """Returns the index as a DataFrame, one row per component."""
        return pd.DataFrame(self.columns)

    def modules(self) -> pd.DataFrame:
        """Returns one row per indexed module: module, kind, layer, port, components, parameters."""
        return pd.DataFrame(
            [(p.module, p.kind, p.layer, p.port, p.count, p.count * p.n_parameters) for p in self.ports],
            columns=["module", "kind", "layer", "port", "components", "parameters"],
        )

    def left_out(self) -> pd.DataFrame:
        """Returns the modules with parameters that hold no component of this index: module, parameters, reason.

        Known for an index made by `from_model`; empty for one read from a file or store.
        """
        return pd.DataFrame(list(self._left_out), columns=["module", "parameters", "reason"])

    def expect(self, count: int) -> ComponentIndex:
        """Returns this index, or raises SelectionError with the count per module if it has not `count` components."""
        if len(self) != count:
            raise SelectionError(f"Expected {count:,} components, found {len(self):,}:\n{self.modules().to_string()}")
        return self

    def select(self, ids: Iterable[int]) -> Selection:
        """Returns the selection of these component ids. Raises SelectionError for ids outside the index."""
        from ablate.selection import Selection

        return Selection(self, ids)

    def everything(self) -> Selection:
        """Returns the selection of all components."""
        return self.select(range(len(self)))

    def where(self, *, module: str | None = None, kind: str | None = None, layer: int | None = None) -> Selection:
        """Returns the components whose module name fits a pattern (`layer4.*`) and whose kind and layer are as given.

        Raises:
          UnknownNameError: The pattern, kind or layer fits nothing in this index.
        """
        return self.everything().where(module=module, kind=kind, layer=layer)

    def to_json(self) -> str:
        """Returns the index as JSON; `from_json` gives it back."""
        return json.dumps(
            {
                "format": JSON_FORMAT,
                "version": JSON_VERSION,
                "hash": self.hash,
                "ports": [asdict(p) for p in self.ports],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ComponentIndex:
        """Returns the index that `to_json` wrote. Raises ModelMismatchError if the text is something else."""
        try:
            data = json.loads(text)
            index = cls([Port(**port) for port in data["ports"]])
            intact = data["format"] == JSON_FORMAT and data["version"] == JSON_VERSION and data["hash"] == index.hash
        except (ValueError, TypeError, KeyError) as error:
            raise ModelMismatchError(f"This is no component index in JSON: {type(error).__name__}: {error}.") from error
        if not intact:
            raise ModelMismatchError(
                f"This component index says format {data['format']!r}, version {data['version']} and hash "
                f"{str(data['hash'])[:12]}, expected {JSON_FORMAT!r}, {JSON_VERSION} and {index.hash[:12]}: "
                "it was changed. Make it again with ComponentIndex.from_model(model)."
            )
        return index

    def check(self, model: nn.Module) -> None:
        """Raises ModelMismatchError, naming every port that does not fit, unless this index describes `model`."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        problems = []
        for port in self.ports:
            shape = shapes.get(port.parameter)
            if shape is None:
                close = nearest(port.parameter, shapes)
                problems.append(f"no parameter {port.parameter!r}" + (f" (nearest: {close[0]!r})" if close else ""))
            elif port.axis >= len(shape) or shape[port.axis] != port.count * port.width:
                problems.append(
                    f"{port.parameter!r} has shape {shape}, expected {port.count * port.width} along axis {port.axis}"
                )
            elif prod(shape) != port.count * port.n_parameters:
                problems.append(
                    f"{port.parameter!r} has shape {shape}, expected {port.n_parameters:,} values per component, "
                    f"not {prod(shape) // port.count:,}"
                )
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:5])
            more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ModelMismatchError(
                f"This index ({len(self):,} components, {self.hash[:12]}) was not made for this "
                f"{type(model).__name__}:\n{shown}{more}\nMake one with ComponentIndex.from_model(model)."
            )


def _default_kinds(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the default kinds for a model, and the modules to leave out with them."""
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if convolutions > len(linear[:-1]):
        return ("conv_filter",), ()
    return ("linear_neuron",), (tuple(linear[-1:]) if len(linear) > 1 else ())


def _require_match(pattern: str, names: Sequence[str], what: str) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        raise UnknownNameError(
            what,
            pattern,
            (n for n in names if n),
            f"{sum(map(bool, names))} names were tried; patterns like 'layer4.*' are allowed.",
        )


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter
