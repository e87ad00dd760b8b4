"""The table of a model's components: ports in order, rows by arithmetic, its hash, and whether a model fits it."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate.errors import ModelMismatchError, SelectionError, nearest
from ablate.immutable import FrozenDict, Immutable, read_only
from stores import content_hash

if TYPE_CHECKING:
    from torch import nn


_WHOLE = ("residual_branch", "layer")  # kinds with one component per weight


@dataclass(frozen=True)
class Port:
    """A run of components in one module: `count` equal slices of `parameter` along `axis`, each `width` wide.

    Attributes:
      kind: The component kind, e.g. `conv_filter`.
      layer: Position of the module among the indexed ones, from 0.
      module: The name in `model.named_modules()` of the module that owns the parameter.
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

    @property
    def with_bias(self) -> bool:
        """Whether ablation clears the module's bias too, so that a residual branch adds nothing at all."""
        return self.kind == "residual_branch"

    def name(self, unit: int) -> str:
        """Returns the name of one of the port's components: `conv1[3]`, `attn.proj:attention_head[3]`, `bn3:layer`."""
        if self.kind in ("conv_filter", "linear_neuron"):
            return f"{self.module}[{unit}]"
        weight = "" if self.parameter == "weight" else self.parameter.removesuffix(".weight")
        return f"{weight}:{self.kind}" + ("" if self.kind in _WHOLE else f"[{unit}]")


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


class ComponentTable(Immutable):
    """Components, row by row, as their ports say them: what an index is once it is made."""

    def __init__(self, ports: Sequence[Port], left_out: Sequence[tuple[str, int, int, str]] = ()) -> None:
        self.ports: tuple[Port, ...] = tuple(ports)
        self._left_out = tuple(left_out)
        self._offsets = read_only(np.cumsum([0, *(port.count for port in self.ports)], dtype=np.int64))

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
            name=port.name(unit),
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
        return isinstance(other, ComponentTable) and self.ports == other.ports

    def __hash__(self) -> int:
        return hash(self.ports)

    def __repr__(self) -> str:
        modules = len({port.module for port in self.ports})
        return f"<{type(self).__name__}: {len(self):,} components in {modules} modules, {self.hash[:12]}>"

    @cached_property
    def hash(self) -> str:
        """The sha256 (hex) of the ports: what a store, an attribution or an edit is bound to."""
        return content_hash([asdict(port) for port in self.ports])

    @cached_property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """The table as numpy columns, one value per component; they cannot be written to."""
        counts = [port.count for port in self.ports]
        units = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])

        def column(field: str) -> npt.NDArray[Any]:
            values = [getattr(port, field) for port in self.ports]
            dtype: Any = object if isinstance(values[0], str) else np.int64
            return np.repeat(np.array(values, dtype=dtype), counts)

        width = column("width")
        columns = {
            "id": np.arange(len(self), dtype=np.int64),
            "name": np.array([port.name(unit) for port in self.ports for unit in range(port.count)], dtype=object),
            "kind": column("kind"),
            "layer": column("layer"),
            "module": column("module"),
            "parameter": column("parameter"),
            "port": column("port"),
            "axis": column("axis"),
            "start": units * width,
            "stop": (units + 1) * width,
            "n_parameters": column("n_parameters"),
        }
        return FrozenDict({name: read_only(values) for name, values in columns.items()})

    def spans(self) -> tuple[tuple[Port, int, int], ...]:
        """Returns the ports in order, each with its first component's id and that after its last."""
        bounds = self._offsets.tolist()
        return tuple(zip(self.ports, bounds[:-1], bounds[1:], strict=True))

    def table(self) -> pd.DataFrame:
        """Returns the index as a DataFrame, one row per component."""
        return pd.DataFrame(self.columns)

    def modules(self) -> pd.DataFrame:
        """Returns one row per indexed module and kind: module, kind, layer, port, components, parameters."""
        return pd.DataFrame(
            [(p.module, p.kind, p.layer, p.port, p.count, p.count * p.n_parameters) for p in self.ports],
            columns=["module", "kind", "layer", "port", "components", "parameters"],
        )

    def left_out(self) -> pd.DataFrame:
        """Returns the modules with parameters that hold no component of this index, and the components not listed.

        Columns: module, its parameters, the components of the kinds asked for that it would have, and the reason.
        Known for an index made by `from_model`; empty for one read from a file or store.
        """
        return pd.DataFrame(list(self._left_out), columns=["module", "parameters", "components", "reason"])

    def expect(self, count: int) -> Self:
        """Returns this index, or raises SelectionError with the count per module if it has not `count` components."""
        if len(self) != count:
            raise SelectionError(f"Expected {count:,} components, found {len(self):,}:\n{self.modules().to_string()}")
        return self

    def check(self, model: nn.Module) -> None:
        """Raises ModelMismatchError, naming every port that does not fit, unless this index describes `model`."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        modules = dict(model.named_modules())
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
            elif port.with_bias and port.module not in modules:
                problems.append(f"no module {port.module!r}, whose weight and bias end a residual branch")
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:5])
            more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ModelMismatchError(
                f"This index ({len(self):,} components, {self.hash[:12]}) was not made for this "
                f"{type(model).__name__}:\n{shown}{more}\nMake one with ComponentIndex.from_model(model)."
            )
