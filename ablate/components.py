"""What a component is, and the ordered, hashed table of all components of one model.

A component is a slice of one module's port that can be switched off. `ComponentIndex` is the only thing in the project
that enumerates a model. It is made of ports; row `id` follows from the ports' order, so the index of a network with a
million components is a page of JSON.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor, nn

from ablate.defaults import default_components
from ablate.errors import AblateError, DataError, ModelMismatchError, SelectionError, UnknownNameError, nearest
from ablate.flow import Flow, flow_of
from ablate.immutable import Immutable
from ablate.kinds import KINDS, STRUCTURAL, Anatomy
from ablate.kinds import component_kinds as component_kinds
from ablate.listing import BY_NAME, Listing, excluded_by_name
from ablate.listing import Port as Port
from stores import content_hash

if TYPE_CHECKING:
    from ablate.selection import Selection

JSON_FORMAT = "component-index"
JSON_VERSION = 1


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


def _flow(model: nn.Module, example_inputs: Tensor | None) -> Flow | None:
    try:
        return flow_of(model, example_inputs)
    except AblateError:
        raise
    except Exception as error:  # whatever a model raises on inputs it does not take
        reason = str(error).partition("\n")[0].rstrip(".")
        raise DataError(f"The model fails on example_inputs: {type(error).__name__}: {reason}.") from error


def _kinds_of(anatomy: Anatomy) -> list[str]:
    """Returns the kinds of which a model has components."""
    return [kind for kind, rule in KINDS.items() if any(rule(n, m, anatomy) for n, m in anatomy.modules.items())]


class ComponentIndex(Immutable):
    """The ordered table of all components of one model. Immutable; equal indices have equal hashes."""

    def __init__(self, ports: Sequence[Port], left_out: Sequence[tuple[str, int, int, str]] = ()) -> None:
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
        example_inputs: Tensor | None = None,
    ) -> ComponentIndex:
        """Returns the index of a model's components, in the order of `model.named_modules()`. Mutates nothing.

        Args:
          model: Any module. A weight that several modules share is listed once, under the first.
          kinds: Component kinds (see `component_kinds()`). Where two of them mean the same slices of a weight, the
            first counts. None: `conv_filter` where convolutions outnumber hidden linear layers, else `linear_neuron`
            with the query, key and value rows that an attention keeps outside of linear layers. Never the rows that
            make the classes, nor layers that a forward pass does not use; `left_out()` says how these were found.
          include, exclude: Patterns of module names (`layer4.*`).
          example_inputs: At least one input (examples, ...), with which a copy of the model is run to find the layers
            that make the classes; for `kinds=None`. Without, the model is followed, or, where that cannot be done,
            every layer that may make the classes is left out.

        Raises:
          UnknownNameError: A kind or a pattern that fits nothing.
          SelectionError: No component is left.
          DataError: The model fails on `example_inputs`.
        """
        if isinstance(kinds, str):
            raise SelectionError(f"kinds is the string {kinds!r}, expected a list: kinds=[{kinds!r}].")
        anatomy = Anatomy(model)
        excluded = excluded_by_name(anatomy, include, exclude)
        if kinds is None:
            kinds, without = default_components(anatomy, _flow(model, example_inputs))
            excluded = without | excluded
        for kind in kinds:
            if kind not in KINDS:
                raise UnknownNameError("component kind", kind, KINDS)
        return cls.from_anatomy(anatomy, kinds, excluded)

    @classmethod
    def from_anatomy(cls, anatomy: Anatomy, kinds: Sequence[str], excluded: Mapping[str, str]) -> ComponentIndex:
        """Returns the index of these kinds in all modules but the excluded ones (module name -> why).

        For `from_model` and the presets, which have checked what they were given.
        """
        listing = Listing(anatomy, kinds, excluded)
        if not listing.ports:
            unknown = (
                ""
                if not set(kinds) & set(STRUCTURAL)
                else (
                    " Attentions, feed-forward networks and residual blocks of a form unknown here are made known with "
                    "ablate.register_attention, register_feed_forward and register_residual."
                )
            )
            reasons = {reason: name for name, _, count, reason in listing.left_out if count and reason != BY_NAME}
            why = "".join(f" Left out: {name!r} ({reason})." for reason, name in reasons.items())
            raise SelectionError(
                f"{type(anatomy.modules['']).__name__} has no component of kind {', '.join(kinds)} in the modules "
                f"asked for.{why} Kinds: {', '.join(KINDS)}; in this model: {', '.join(_kinds_of(anatomy)) or 'none'}. "
                f"Give other kinds, or widen include/exclude.{unknown}"
            )
        return cls(listing.ports, listing.left_out)

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        name: str,
        *,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        shortcuts: bool = False,
    ) -> ComponentIndex:
        """Returns a published enumeration of a model's components, by name (see `preset_names()`).

        Args:
          model: The model.
          name: `coar-resnet`, `coar-vit`, `coar-gpt2`, `heads` or `ffn`.
          include, exclude: Patterns of module names, to narrow it.
          shortcuts: With `coar-resnet`: list the shortcut convolutions too.

        Raises:
          UnknownNameError: A preset or a pattern that fits nothing.
          SelectionError: The model has none of what the preset lists.
        """
        from ablate.presets import preset_index

        return preset_index(model, name, include=include, exclude=exclude, shortcuts=shortcuts)

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
        return isinstance(other, ComponentIndex) and self.ports == other.ports

    def __hash__(self) -> int:
        return hash(self.ports)

    def __repr__(self) -> str:
        modules = len({port.module for port in self.ports})
        return f"<ComponentIndex: {len(self):,} components in {modules} modules, {self.hash[:12]}>"

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
        return {
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
