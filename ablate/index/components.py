"""The index of a model's components, and selections from it: sets of components, in which every editing method ends.

A component is a slice of one module's port that can be switched off. `ComponentIndex` is the only thing in the project
that enumerates a model. It is made of ports; row `id` follows from the ports' order, so the index of a network with a
million components is a page of JSON.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate.errors import ModelMismatchError, SelectionError, UnknownNameError
from ablate.immutable import Immutable
from ablate.index.table import ComponentTable, Port

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ablate.index.kinds import Anatomy

JSON_FORMAT = "component-index"
JSON_VERSION = 1


class ComponentIndex(ComponentTable):
    """The ordered table of all components of one model. Immutable; equal indices have equal hashes."""

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
        from ablate.index.enumeration import ports_of_kinds

        return cls(*ports_of_kinds(model, kinds, include, exclude, example_inputs))

    @classmethod
    def from_anatomy(cls, anatomy: Anatomy, kinds: Sequence[str], excluded: Mapping[str, str]) -> ComponentIndex:
        """Returns the index of these kinds in all modules but the excluded ones (module name -> why).

        For `from_model` and the presets, which have checked what they were given.
        """
        from ablate.index.enumeration import ports_of_anatomy

        return cls(*ports_of_anatomy(anatomy, kinds, excluded))

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
        from ablate.index.enumeration import ports_of_preset

        return cls(*ports_of_preset(model, name, include, exclude, shortcuts))

    def select(self, ids: Iterable[int]) -> Selection:
        """Returns the selection of these component ids. Raises SelectionError for ids outside the index."""
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


SELECTION_FORMAT = "selection"
SELECTION_VERSION = 1


class Selection(Immutable):
    """Some components of one index. Immutable: every operation returns a new selection."""

    index: ComponentIndex
    ids: tuple[int, ...]

    def __init__(self, index: ComponentIndex, ids: Iterable[int]) -> None:
        values = sorted({_component_id(i) for i in ids})
        if values and (values[0] < 0 or values[-1] >= len(index)):
            outside = [i for i in values if not 0 <= i < len(index)]
            raise SelectionError(
                f"Component ids {', '.join(map(str, outside[:5]))} do not exist; ids are 0 to {len(index) - 1}."
            )
        self.index = index
        self.ids = tuple(values)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __contains__(self, component: object) -> bool:
        return component in self._set

    @cached_property
    def _set(self) -> frozenset[int]:
        return frozenset(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self.ids == other.ids and self.index == other.index

    def __hash__(self) -> int:
        return hash((self.index, self.ids))

    def __repr__(self) -> str:
        return f"<Selection: {len(self):,} of {len(self.index):,} components>"

    def __invert__(self) -> Selection:
        return Selection(self.index, np.flatnonzero(self.keep()))

    def __or__(self, other: Selection) -> Selection:
        return Selection(self.index, self._set | self._same_index(other)._set)

    def __and__(self, other: Selection) -> Selection:
        return Selection(self.index, self._set & self._same_index(other)._set)

    def __sub__(self, other: Selection) -> Selection:
        return Selection(self.index, self._set - self._same_index(other)._set)

    def _same_index(self, other: Selection) -> Selection:
        if not isinstance(other, Selection):
            raise SelectionError(f"A selection combines with selections only, got a {type(other).__name__}.")
        if self.index != other.index:
            raise SelectionError(
                f"These selections belong to different indices: {self.index.hash[:12]} ({len(self.index):,} "
                f"components) and {other.index.hash[:12]} ({len(other.index):,}). Combine selections of one index only."
            )
        return other

    def where(self, *, module: str | None = None, kind: str | None = None, layer: int | None = None) -> Selection:
        """Returns the selected components whose module name fits a pattern and whose kind and layer are as given.

        Raises:
          UnknownNameError: The pattern, kind or layer fits nothing in the whole index.
        """
        ports = self.index.ports
        names = list(dict.fromkeys(p.module for p in ports))
        if kind is not None and kind not in {p.kind for p in ports}:
            raise UnknownNameError("component kind", kind, sorted({p.kind for p in ports}))
        if module is not None and not any(fnmatchcase(name, module) for name in names):
            raise UnknownNameError("module", module, names, f"index.modules() lists all {len(names)} indexed modules.")
        if layer is not None and not 0 <= layer <= ports[-1].layer:
            raise UnknownNameError("layer", str(layer), [], f"Layers are 0 to {ports[-1].layer}.")
        fits = [
            (module is None or fnmatchcase(p.module, module))
            and (kind is None or p.kind == kind)
            and (layer is None or p.layer == layer)
            for p in ports
        ]
        chosen = np.repeat(fits, [p.count for p in ports])
        return Selection(self.index, (i for i in self.ids if chosen[i]))

    def sample(self, n: int, seed: int) -> Selection:
        """Returns `n` of the selected components, drawn without replacement; the same for the same seed.

        Uses a generator of its own: no global random state is read or changed.
        """
        if not 0 <= n <= len(self):
            raise SelectionError(f"Cannot sample {n} of {len(self)} components. Give n between 0 and {len(self)}.")
        if not 0 <= seed < 2**63:
            raise SelectionError(f"seed is {seed}, expected an integer from 0 to 2**63 - 1.")
        raw = np.random.Philox(key=np.array([seed, len(self)], dtype=np.uint64)).random_raw(len(self))
        return Selection(self.index, (self.ids[i] for i in np.argsort(raw, kind="stable")[:n]))

    def keep(self) -> npt.NDArray[np.bool_]:
        """Returns the keep-vector (components,) that ablates exactly these: False where selected, True elsewhere."""
        keep = np.ones(len(self.index), dtype=np.bool_)
        keep[list(self.ids)] = False
        return keep

    def expect(self, count: int) -> Selection:
        """Returns this selection, or raises SelectionError with the count per module if it has not `count` members."""
        if len(self) != count:
            listing = self.table().groupby("module", sort=False).size().to_string() if self.ids else "  (none)"
            raise SelectionError(f"Expected {count:,} components, found {len(self):,}. Per module:\n{listing}")
        return self

    def table(self) -> pd.DataFrame:
        """Returns the selected rows of the index as a DataFrame."""
        return self.index.table().iloc[list(self.ids)].reset_index(drop=True)

    def to_json(self) -> str:
        """Returns the ids and the index's hash as JSON; `from_json` gives the selection back."""
        return json.dumps(
            {"format": SELECTION_FORMAT, "version": SELECTION_VERSION, "index": self.index.hash, "ids": list(self.ids)}
        )

    @classmethod
    def from_json(cls, text: str, index: ComponentIndex) -> Selection:
        """Returns the selection that `to_json` wrote. Raises SelectionError if it belongs to another index."""
        try:
            data = json.loads(text)
            written, version, stored, ids = data["format"], data["version"], data["index"], list(data["ids"])
        except (ValueError, TypeError, KeyError) as error:
            raise SelectionError(f"This is no selection in JSON: {type(error).__name__}: {error}.") from error
        if (written, version) != (SELECTION_FORMAT, SELECTION_VERSION):
            raise SelectionError(
                f"This JSON says format {written!r}, version {version}; expected {SELECTION_FORMAT!r}, "
                f"{SELECTION_VERSION}."
            )
        if stored != index.hash:
            raise SelectionError(
                f"This selection belongs to index {str(stored)[:12]}, not to {index.hash[:12]} ({len(index):,} "
                "components). Use the index it was made with."
            )
        return cls(index, ids)


def _component_id(value: object) -> int:
    """Returns an id as int. Refuses floats, and booleans: a keep array more likely than the ids 0 and 1."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise SelectionError(
            f"Component ids are integers, got {value!r}. For what a keep array ablates pass numpy.flatnonzero(~keep)."
        )
    return operator.index(value)
