"""Attributions: a lazy view of an attribution store that answers questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from ablate import ComponentIndex, KeepError
from ablate.errors import UnknownNameError
from coar.attributions.similarity import DIMENSIONS, EXACT_BYTES, cosines, projected, projection_error, shortlist_size
from coar.errors import QueryError
from stores import AttributionStore, Rows
from stores.format.groups import Location

Sign = Literal["both", "positive", "negative"]
OTHER_UNITS = "not in units of the output"


def open_attributions(location: Location | AttributionStore) -> Attributions:
    """Returns the attributions in a finished store. Mutates nothing; raises what `AttributionStore.open` raises."""
    return Attributions(location if isinstance(location, AttributionStore) else AttributionStore.open(location))


class Attributions:
    """One linear attribution per example: `output(keep) ~ bias + sum_i weights_i * keep_i`, True = kept.

    A positive weight means that the component supports the output. An example is addressed by its position in the
    store; `locate` finds positions by id, `group` by group. Everything is read when asked for.
    """

    def __init__(self, store: AttributionStore) -> None:
        self.store = store
        self.header: dict[str, Any] = store.header

    @cached_property
    def index(self) -> ComponentIndex:
        """The component index; its hash is what edits and models are checked against."""
        return ComponentIndex.from_json(self.header["index"])

    def __len__(self) -> int:
        return self.store.example_count

    def __repr__(self) -> str:
        return (
            f"<Attributions: {len(self):,} examples x {len(self.index):,} components, "
            f"held-out correlation {self.quality_text()}, {self.store.where}"
            f"{'' if self.in_output_units else f', {OTHER_UNITS}'}>"
        )

    @property
    def in_output_units(self) -> bool:
        """Whether weights are in units of the output: not after an import whose ablate fraction was not known.

        Before imports asked for it, they all copied the numbers of the file as they were.
        """
        identity = self.header["identity"]
        return bool(identity["method"] != "imported" or identity.get("units") == "output")

    def require_output_units(self, what: str) -> None:
        """Raises QueryError unless weights are in units of the output, which `what` needs."""
        if not self.in_output_units:
            raise QueryError(
                f"{what} needs weights in units of the output, and those of {self.store.where} are {OTHER_UNITS}: they "
                "were imported per standard deviation of masks whose ablate fraction was not given. Import the file "
                "again with ablate_fraction= (`coar import ... --ablate-fraction 0.05 --overwrite`)."
            )

    @cached_property
    def lacking(self) -> frozenset[int]:
        """Positions of examples that have no attribution: imported with `on_nan="keep"`; their weights are NaN."""
        return frozenset(self.header.get("lacking", ()))

    @property
    def weights(self) -> Rows:
        """(examples, components) float32, in units of the output (see `in_output_units`); index it to read."""
        return self.store.weights

    @property
    def stderr(self) -> Rows:
        """Standard error of each weight, (examples, components) float32; index it to read.

        What it counts depends on the method: see `coar.fit` and the estimators of `coar.estimate`. 0 where nothing was
        sampled, as in the baselines.
        """
        return self.store.stderr

    @property
    def bias(self) -> Rows:
        """Predicted output with every component ablated, (examples,) float32; index it to read."""
        return self.store.bias

    @cached_property
    def examples(self) -> pd.DataFrame:
        """One row per example: id, label, group; the row's number is the example's position."""
        columns = self.store.examples
        return pd.DataFrame({name: columns[name] for name in ("id", "label", "group")})

    @cached_property
    def quality(self) -> pd.DataFrame:
        """One row per example: held-out correlation and r2, residual standard deviation, and more by method.

        Of a ridge its penalty, of a lasso also the number of its weights, of an estimate its passes.
        """
        return pd.DataFrame(self.store.quality)

    @property
    def quality_measured(self) -> bool:
        """Whether there were held-out rows: not after `fit(held_out=False)` or `estimate(quality_rows=0)`."""
        identity = self.header["identity"]
        return bool(identity.get("held_out", True)) and identity.get("quality_rows") != 0

    def quality_text(self) -> str:
        """Returns the mean over examples of the held-out correlation, in words where there is no number."""
        if not self.quality_measured:
            return "not measured"
        mean = self.quality["correlation"].mean()  # of those that are not NaN
        return "undefined: outputs are constant" if np.isnan(mean) else f"{mean:.3f}"

    def locate(self, ids: Sequence[str]) -> list[int]:
        """Returns the positions of examples by id. Raises UnknownNameError with the nearest ids."""
        if isinstance(ids, str):
            raise QueryError(f"ids is the string {ids!r}, expected a list: locate([{ids!r}]).")
        positions = {name: i for i, name in enumerate(self.examples["id"])}
        for name in ids:
            if name not in positions:
                raise UnknownNameError("example with id", name, positions, "attributions.examples lists all.")
        return [positions[name] for name in ids]

    def group(self, name: str, contains: str = "") -> list[int]:
        """Returns the positions of the examples of a group whose id contains a text."""
        groups = sorted(set(self.examples["group"]))
        if name not in groups:
            raise UnknownNameError("group", name, groups)
        chosen = (self.examples["group"] == name) & self.examples["id"].str.contains(contains, regex=False)
        return [int(i) for i in np.flatnonzero(chosen)]

    def top(self, example: int, k: int = 10, sign: Sign = "both") -> pd.DataFrame:
        """Returns the k components that matter most to one example, strongest first; ties by id.

        Args:
          example: Position.
          k: How many.
          sign: `both` by absolute weight, `positive` what supports the output, `negative` what works against it.

        Returns:
          Columns component, name, module, layer, weight, stderr, and z: the weight in standard errors, NaN where the
          standard error is zero.
        """
        self._check_example(example)
        self._check_count(k, len(self.index), "components")
        weights, stderr = self.weights[example], self.stderr[example]
        order = _strongest(weights, k, sign)
        table = pd.DataFrame({name: self.index.columns[name][order] for name in ("id", "name", "module", "layer")})
        table = table.rename(columns={"id": "component"}).assign(weight=weights[order], stderr=stderr[order])
        return self._with_units(table.assign(z=table["weight"] / table["stderr"].where(table["stderr"] > 0)))

    def predict(self, keep: npt.NDArray[np.bool_], examples: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Returns the predicted outputs (rows, examples) float32 under keep-vectors (rows, components) bool.

        Examples without an attribution have NaN, unless they are named: then they are refused.

        Cost: reads the examples' weights block by block; rows x components x examples multiplications.
        """
        self.require_output_units("A prediction")
        keep = np.asarray(keep)
        if keep.dtype != np.bool_:
            raise KeepError(f"keep has dtype {keep.dtype}, expected bool (True = kept).")
        if keep.ndim != 2 or keep.shape[1] != len(self.index):
            raise KeepError(f"keep has shape {keep.shape}, expected (rows, {len(self.index)}).")
        if examples is not None:
            for example in examples:
                self._check_example(example)
        kept = keep.astype(np.float32)
        parts = [kept @ weights.T + bias for weights, bias in self._blocks(examples)]
        return np.concatenate(parts, axis=1) if parts else np.zeros((len(keep), 0), dtype=np.float32)

    def nearest(self, example: int, k: int = 5, *, exact: bool | None = None) -> pd.DataFrame:
        """Returns the k other examples with the most similar attributions (by cosine), most similar first.

        Similarities are exact cosines of the weights. Where these are large, they are not compared with all others, but
        with those that can be among the k best by a random projection, which is made once and kept: an example is
        missed only where the projection of its cosine is off by more than four times its standard error.

        Args:
          example: Position.
          k: How many.
          exact: True: compare with all examples; False: with the projection's candidates; None: with all if the weights
            are at most 64 MiB.

        Returns:
          Columns example, id, label, group, similarity.

        Cost: all weights are read once, block by block: by each question if it is exact, else by the first one, which
          makes the projection (2 KiB per example); then the blocks of the candidates are read: few where some examples
          stand out, all where none does.
        """
        self._check_example(example)
        self._check_count(k, len(self) - len(self.lacking) - 1, "other examples")
        own = self.weights[example]
        few = shortlist_size(k)
        if self._compare_all(exact) or few >= len(self) - 1:
            cosine = self._cosines(np.arange(len(self)), own)
        else:
            similarity = self._projection @ self._projection[example]
            similarity[[example, *self.lacking]] = -np.inf
            cosine = self._cosines(np.argpartition(-similarity, few - 1)[:few], own)
            found = float(np.partition(cosine, -k)[-k])
            possible = similarity >= found - projection_error(found, self._projection.shape[1])
            cosine = np.maximum(cosine, self._cosines(np.flatnonzero(possible & np.isneginf(cosine)), own))
        cosine[example] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:k]
        return self._example_table(order.tolist()).assign(similarity=cosine[order])

    def _compare_all(self, exact: bool | None) -> bool:
        size = len(self) * len(self.index) * self.weights.dtype.itemsize
        return size <= EXACT_BYTES if exact is None else exact

    def _cosines(self, positions: npt.NDArray[np.intp], own: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Returns the cosine of all examples' weights with these weights, (examples,): -inf but at these positions."""
        result = np.full(len(self), -np.inf)
        for block in np.unique(positions // self.store.block_examples):
            part = np.sort(positions[positions // self.store.block_examples == block])
            rows = self.weights[part[0] : part[-1] + 1]  # a run: much faster to read than rows here and there
            result[part] = cosines(rows[part - part[0]], own)
        result[list(self.lacking)] = -np.inf
        return result

    @cached_property
    def _projection(self) -> npt.NDArray[np.float32]:
        """Random projections of all weights, of length one, (examples, dimensions)."""
        components = len(self.index)
        blocks = (weights for weights, _ in self._blocks(None))
        return projected(blocks, len(self), components, dimensions=min(DIMENSIONS, components))

    def for_component(self, component: int, k: int = 20, sign: Sign = "both") -> pd.DataFrame:
        """Returns the k examples to which one component matters most, strongest first; ties by position.

        Args:
          component: Its id.
          k: How many.
          sign: `both` by absolute weight, `positive` whose output it supports, `negative` against which it works.

        Returns:
          Columns example, id, label, group, weight, stderr.
        """
        if not 0 <= component < len(self.index):
            raise QueryError(f"No component {component}: ids are 0 to {len(self.index) - 1}.")
        self._check_count(k, len(self) - len(self.lacking), "examples")
        weights, stderr = self.weights[:, component], self.stderr[:, component]
        order = _strongest(weights, k, sign)
        return self._with_units(self._example_table(order.tolist()).assign(weight=weights[order], stderr=stderr[order]))

    def by_layer(self, examples: int | Sequence[int] | None = None) -> pd.DataFrame:
        """Returns the weights summed over each module, averaged over examples (one, some, or all that have weights).

        Returns:
          Columns layer, module, components, weight (their sum: the predicted loss of output when the module's
          components are all ablated), absolute (the sum of absolute weights).
        """
        chosen = [examples] if isinstance(examples, (int, np.integer)) else examples
        if chosen is not None and not len(chosen):
            raise QueryError("No examples given: pass the positions of at least one, or None for all.")
        for example in () if chosen is None else chosen:
            self._check_example(example)
        if chosen is None and self.lacking:
            chosen = [i for i in range(len(self)) if i not in self.lacking]
        total, absolute, count = np.zeros(len(self.index)), np.zeros(len(self.index)), 0
        for weights, _ in self._blocks(chosen):
            total += weights.sum(axis=0, dtype=np.float64)
            absolute += np.abs(weights).sum(axis=0, dtype=np.float64)
            count += len(weights)
        table = pd.DataFrame({"layer": self.index.columns["layer"], "module": self.index.columns["module"]})
        table = table.assign(components=1, weight=total / count, absolute=absolute / count)
        return self._with_units(table.groupby(["layer", "module"], sort=True).sum().reset_index())

    def _blocks(
        self, examples: Sequence[int] | None
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """Yields (weights, bias) of the examples, at most one stored block's worth at a time."""
        positions = np.arange(len(self)) if examples is None else np.asarray(examples, dtype=np.int64)
        step = self.store.block_examples
        for start in range(0, len(positions), step):
            part = positions[start : start + step]
            yield self.weights[part], self.bias[part]

    def _with_units(self, table: pd.DataFrame) -> pd.DataFrame:
        """Returns a table of weights, with a column that says so where they are not in units of the output."""
        return table if self.in_output_units else table.assign(units=OTHER_UNITS)

    def _example_table(self, positions: Sequence[int]) -> pd.DataFrame:
        table = self.examples.iloc[list(positions)].reset_index(drop=True)
        table.insert(0, "example", list(positions))
        return table

    def _check_example(self, example: int) -> None:
        if not isinstance(example, (int, np.integer)) or not 0 <= example < len(self):
            raise QueryError(
                f"No example {example!r}: positions are 0 to {len(self) - 1}. Find one by id with locate([...])."
            )
        if int(example) in self.lacking:
            raise QueryError(
                f"Example {example} ({self.examples['id'][example]!r}) has no attribution: its numbers in the imported "
                "file are not finite. Choose another one, or compute it anew."
            )

    def _check_count(self, k: int, available: int, what: str) -> None:
        if not 1 <= k <= available:
            raise QueryError(f"k is {k}, expected 1 to {available}: there are {available} {what}.")


def _strongest(weights: npt.NDArray[np.float32], k: int, sign: Sign) -> npt.NDArray[np.intp]:
    """Returns the positions of the k strongest weights of a sign, strongest first; ties by position."""
    if sign not in ("both", "positive", "negative"):
        raise UnknownNameError("sign", str(sign), ("both", "positive", "negative"))
    strength = {"both": np.abs(weights), "positive": weights, "negative": -weights}[sign]
    order = np.argsort(-strength, kind="stable")[:k]
    return order if sign == "both" else order[strength[order] > 0]
