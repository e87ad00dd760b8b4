"""Where to edit: a method is tried in one part of a model after the other, and the best trade-off tells where.

Source: Yang et al. (arXiv 2411.01948), Section 3.3: windows of three blocks, chosen by eye from generalisation and
locality. The criterion, the greedy search and the check for leaks are the toolkit's own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor, nn

from ablate import Examples, Selection
from ablate.work.progress import progress_bar
from coar.editing.abstract import Editor
from coar.editing.edits.edit import Edit
from coar.editing.edits.files import load_edit
from coar.editing.judging.benchmark_sets import content_hashes
from coar.editing.judging.edit_predictions import EditPredictions
from coar.editing.judging.single_edits import evaluate_single_edits
from coar.editing.request import Request
from coar.editing.running import BATCH
from coar.editing.where.layers import Place, default_layer_kinds, layers_of, windows
from coar.errors import EditError
from coar.metrics import OperatingPoint, TradeoffCurve, generalisation_rate, hypervolume

Criterion = Literal["hypervolume", "min"]
How = Literal["windows", "greedy"]
MakeRequest = Callable[[Tensor, Tensor], Request]
NO_EDIT = "no edit"


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """What a search found.

    Attributes:
      chosen: The best place; None where a greedy search found no layer that is better than no edit.
      places: One row per place tried: place, kind, layers, components, hypervolume, min_rate, chosen.
      curve: Every operating point (its name: the setting; its method: the place), with the Pareto front.
      predictions: (place, setting) -> what its edits predict, so that any metric can be computed.
      protocol: What was searched and how it was chosen, in words.
    """

    chosen: Place | None
    places: pd.DataFrame
    curve: TradeoffCurve
    predictions: Mapping[tuple[str, str], EditPredictions]
    protocol: str

    def __repr__(self) -> str:
        where = "nothing better than no edit" if self.chosen is None else self.chosen.name
        return f"<LayerSearch: {where}, of {len(self.places):,} places>"

    @property
    def selection(self) -> Selection:
        """The components to edit. Raises EditError where nothing is better than no edit."""
        if self.chosen is None:
            raise EditError("No layer is better than no edit: there is no selection. Look at `places`.")
        return self.chosen.selection

    @property
    def front(self) -> pd.DataFrame:
        """The operating points that no other beats, by rising locality."""
        return self.curve.table().iloc[list(self.curve.front)].reset_index(drop=True)


def search_layers(
    model: nn.Module,
    editor: Editor | Mapping[str, Editor],
    groups: Mapping[str, Examples],
    locality: Examples,
    *,
    kinds: Sequence[str] | None = None,
    window: int = 3,
    strengths: Sequence[float] = (1.0,),
    criterion: Criterion = "hypervolume",
    how: How = "windows",
    most: int | None = None,
    test: Examples | Sequence[Examples] = (),
    request: MakeRequest = Request,
    batch_size: int = BATCH,
    progress: bool = False,
) -> LayerSearch:
    """Returns in which layers of the model a method edits best. The model and the global random state are unchanged.

    In each place every example of every group is edited on its own; generalisation (to the rest of its group) and
    locality (agreement with the unedited model) make one operating point per setting and strength. Of two equal places
    the first counts.

    Args:
      model: The unedited model, in eval mode.
      editor: The method; or several settings of it, by name, each of which makes points.
      groups: Failures to edit, by group, each example with the label that it should get. At least one group of two.
      locality: Ordinary examples.
      kinds: Kinds of layers, see `layers_of`; None: `default_layer_kinds`.
      window: Layers in a row that are edited together; for `how="windows"`.
      strengths: Each edit is judged at each of these shares of the alpha that the method chose, which is mostly 1.
      criterion: `hypervolume`: the largest area under a place's points, then the largest min(generalisation, locality).
        `min`: the other way round.
      how: `windows`: every window of layers. `greedy`: begin with no layer, add the one with which the criterion rises
        most, until none does.
      most: For `greedy`: at most so many layers.
      test: Examples that the final edits are judged on: none of them may be searched with.
      request: From (inputs, labels) of one example to what the method is asked, e.g. to give it a reference set.
      batch_size: Examples per forward pass.
      progress: Show progress on stderr.

    Cost: per place, setting and example an edit, and per strength a pass over its group and the locality set. A greedy
      search of n layers tries up to n (n + 1) / 2 places.

    Raises:
      EditError: Search examples that are also test examples, no group with two examples, settings that make no sense;
        and what the method and `evaluate_single_edits` raise.
    """
    editors = dict(editor) if isinstance(editor, Mapping) else {editor.title: editor}
    _check(editors, groups, strengths, criterion, how, most)
    _check_leaks(groups, locality, [test] if isinstance(test, Examples) else test)
    kinds = default_layer_kinds(model) if kinds is None else kinds
    layers = layers_of(model, kinds)
    tried = _Trials(model, editors, groups, locality, tuple(strengths), criterion, request, batch_size)
    if how == "windows":
        candidates = windows(layers, window)
        with progress_bar("where to edit", len(candidates), 0, "place", progress) as bar:
            for place in candidates:
                tried.score(place)
                bar.update(1)
        chosen: Place | None = max(candidates, key=tried.score)  # of equal ones the first
        searched = f"{len(candidates):,} windows of {window} layer{'s'[: window > 1]} ({', '.join(kinds)})"
    else:
        chosen = _greedy(tried, layers, len(layers) if most is None else most, progress)
        searched = f"greedily among {len(layers):,} layers ({', '.join(kinds)}), {len(tried.places):,} places"
    return tried.result(chosen, searched)


def _greedy(tried: _Trials, layers: Sequence[Place], most: int, progress: bool) -> Place | None:
    """Returns the layers that were added while each made the criterion better; None where not even one does."""
    chosen: Place | None = None
    left = list(layers)
    best: float | None = None
    while left and (chosen is None or len(chosen.layers) < most):
        candidates = [layer if chosen is None else chosen + layer for layer in left]
        what = f"layer {1 if chosen is None else len(chosen.layers) + 1}"
        with progress_bar(what, len(candidates), 0, "place", progress) as bar:
            for place in candidates:
                tried.score(place)
                bar.update(1)
        at = max(range(len(candidates)), key=lambda i: tried.score(candidates[i]))
        score = tried.score(candidates[at])[0]
        if score <= (tried.no_edit()[0] if best is None else best):
            break
        chosen, best = candidates[at], score
        del left[at]
    return chosen


@dataclass
class _Trials:
    """Edits in one place after the other; a place that was tried is not tried again."""

    model: nn.Module
    editors: Mapping[str, Editor]
    groups: Mapping[str, Examples]
    locality: Examples
    strengths: tuple[float, ...]
    criterion: Criterion
    request: MakeRequest
    batch_size: int
    places: dict[str, Place] = field(default_factory=dict)
    points: dict[str, list[OperatingPoint]] = field(default_factory=dict)
    predictions: dict[tuple[str, str], EditPredictions] = field(default_factory=dict)

    def score(self, place: Place) -> tuple[float, float]:
        """Returns the criterion, and what decides between equal ones."""
        key = " + ".join(place.layers) + place.kind
        if key not in self.points:
            self.places[key] = place
            self.points[key] = [p for name in self.editors for p in self._points(name, place)]
        return self._order(self.points[key])

    def no_edit(self) -> tuple[float, float]:
        """Returns the criterion of the unedited model."""
        kept = next(iter(self.predictions.values())).groups
        pairs = {name: (group.base[None].repeat(len(group), axis=0), group.labels) for name, group in kept.items()}
        return self._order([OperatingPoint(NO_EDIT, 1.0, generalisation_rate(pairs).value)])

    def _order(self, points: Sequence[OperatingPoint]) -> tuple[float, float]:
        area = hypervolume([(p.locality, p.generalisation) for p in points])
        least = max(min(p.locality, p.generalisation) for p in points)
        return (area, least) if self.criterion == "hypervolume" else (least, area)

    def _points(self, setting: str, place: Place) -> list[OperatingPoint]:
        found = []
        with tempfile.TemporaryDirectory() as folder:  # edits of a large model do not fit into memory
            for alpha in self.strengths:
                name = setting if len(self.strengths) == 1 else f"{setting}, alpha {alpha:g}"
                kept = evaluate_single_edits(
                    self.model,
                    self._function(self.editors[setting], place, alpha, Path(folder)),
                    self.groups,
                    self.locality,
                    method=place.name,
                    details={"setting": setting, "alpha": alpha, **self.editors[setting].describe()},
                    batch_size=self.batch_size,
                )
                self.predictions[place.name, name] = kept
                found.append(kept.point(name))
        return found

    def _function(
        self, editor: Editor, place: Place, alpha: float, folder: Path
    ) -> Callable[[nn.Module, Tensor, Tensor], Edit]:
        """Returns a function that edits for one example: for the first strength anew, for others from the files."""
        calls = iter(range(sum(len(examples) for examples in self.groups.values())))

        def edit_one(model: nn.Module, inputs: Tensor, labels: Tensor) -> Edit:
            file = folder / f"{next(calls)}.safetensors"
            if file.exists():
                edit = load_edit(file)
            else:
                edit = editor.edit(model, self.request(inputs, labels), place.selection)
                if len(self.strengths) > 1:
                    edit.save(file)
            return edit.at(alpha * edit.alpha)

        return edit_one

    def result(self, chosen: Place | None, searched: str) -> LayerSearch:
        """Returns what was found."""
        rows: list[dict[str, Any]] = []
        for key, place in self.places.items():
            points = self.points[key]
            rows.append(
                {
                    "place": place.name,
                    "kind": place.kind,
                    "layers": ", ".join(place.layers),
                    "components": len(place.selection),
                    "hypervolume": hypervolume([(p.locality, p.generalisation) for p in points]),
                    "min_rate": max(min(p.locality, p.generalisation) for p in points),
                    "chosen": place == chosen,
                }
            )
        edits = sum(len(examples) for examples in self.groups.values())
        first = "hypervolume of its points" if self.criterion == "hypervolume" else "min(generalisation, locality)"
        then = "min(generalisation, locality)" if self.criterion == "hypervolume" else "hypervolume"
        where = "none is better than no edit" if chosen is None else f"chosen: {chosen.name}"
        protocol = (
            f"Searched {searched}; {edits:,} single-example edits in {len(self.groups):,} groups per place and "
            f"setting, each judged on the rest of its group and on {len(self.locality):,} ordinary examples. "
            f"Criterion: largest {first}, then {then}, then the first; {where}. These examples chose the place: report "
            "results on others."
        )
        curve = TradeoffCurve.of([point for points in self.points.values() for point in points])
        return LayerSearch(chosen, pd.DataFrame(rows), curve, self.predictions, protocol)


def _check(
    editors: Mapping[str, Editor],
    groups: Mapping[str, Examples],
    strengths: Sequence[float],
    criterion: str,
    how: str,
    most: int | None,
) -> None:
    problems = []
    if not editors:
        problems.append("editor holds no method")
    if not any(len(examples) > 1 for examples in groups.values()):
        problems.append("no group has two examples, so nothing can generalise")
    if not len(strengths) or len(set(strengths)) < len(strengths):
        problems.append(f"strengths are {list(strengths)}, expected at least one, all distinct")
    if any(not (math.isfinite(alpha) and 0 < alpha <= 1) for alpha in strengths):
        problems.append(f"strengths are {list(strengths)}, expected more than 0, at most 1")
    if criterion not in ("hypervolume", "min"):
        problems.append(f"criterion is {criterion!r}, expected 'hypervolume' or 'min'")
    if how not in ("windows", "greedy"):
        problems.append(f"how is {how!r}, expected 'windows' or 'greedy'")
    if most is not None and (most < 1 or how != "greedy"):
        problems.append(f"most is {most}, expected at least 1, and only with how='greedy'")
    if problems:
        raise EditError(f"This search cannot work: {'; '.join(problems)}.")


def _check_leaks(groups: Mapping[str, Examples], locality: Examples, test: Sequence[Examples]) -> None:
    """Raises EditError if an example that is searched with is also a test example: bit by bit the same input."""
    final = {key: name for examples in test for key, name in zip(content_hashes(examples), examples.ids, strict=True)}
    if not final:
        return
    for where, examples in {**{f"group {name!r}": e for name, e in groups.items()}, "locality": locality}.items():
        for key, name in zip(content_hashes(examples), examples.ids, strict=True):
            if key in final:
                raise EditError(
                    f"Example {name!r} of {where} is test example {final[key]!r}: the place would be chosen with what "
                    "it is judged on. Search with other examples."
                )
