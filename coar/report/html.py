"""Reports: one self-contained HTML file of text, tables and figures; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from ablate.files import written_whole
from coar.attributions.attributions import OTHER_UNITS, Attributions
from coar.editing.coar_edit.ranking import predicted_change
from coar.editing.edits.edit import Edit
from coar.report import plots
from stores.storage.places import user_path

_NOTHING_SAMPLED = (
    "Standard errors are zero, as this method samples nothing: they say nothing of how far its weights are from the "
    "effect of ablating."
)
_STDERR = {
    "gradient": (
        "Standard errors say how far each weight may be from that of infinitely many passes, judged by all examples "
        "that were estimated together: intervals of 1.96 of them are meant to hold it in 95 % of cases."
    ),
    "ridge": (
        "Standard errors count the noise and the shrinkage towards zero, if weights are about as large as the penalty "
        "assumes: the few largest weights are shrunk by more than that."
    ),
    "ols": "Standard errors are those of ordinary least squares: the noise of the rows that were fitted.",
    "lasso": (
        "Standard errors are those of least squares on the components with weights. They count neither the selection "
        "nor the shrinkage, and are too small therefore."
    ),
    "leave_one_out": _NOTHING_SAMPLED,
    "gradient_times_gate": _NOTHING_SAMPLED,
    "integrated_gate_gradients": _NOTHING_SAMPLED,
    "neuron_conductance": _NOTHING_SAMPLED,
    "internal_influence": _NOTHING_SAMPLED,
    "imported": "The imported file had no standard errors: they are 0 here.",
    "random": "These weights are random numbers that know nothing of the model; their standard errors mean nothing.",
}
_GATES_BETWEEN = " They do not count the small bias that comes of gates between 0 and 1."


@dataclass(frozen=True)
class Section:
    """One part of a report: paragraphs, then tables, then figures, each table and figure with its caption."""

    title: str
    text: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)


def write_report(path: str | os.PathLike[str], title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Writes a self-contained HTML report and returns its path. Overwrites a file of that name, whole or not at all."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("coar.report").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(title=title, lead=lead, sections=[_render(section) for section in sections])
    target = user_path(path)
    with written_whole(target, overwrite=True) as draft:
        draft.write_text(page, encoding="utf-8")
    return target


def provenance_section(attributions: Attributions, timings: Mapping[str, float] | None = None) -> Section:
    """Returns what a result was made from: method, spec, hashes, versions, and how long each step took in seconds."""
    header = attributions.header
    identity = header["identity"]
    of = identity.get("of", identity)
    told = ("of", "versions")  # elsewhere
    settings = {name: value for name, value in identity.items() if name not in told} if "of" in identity else {}
    # what the spec says for the other way of estimating, or was told otherwise beside it, was not used
    unused = ("rows", "block_rows", "store", *settings) if _from_model(identity) else ("passes",)
    tables = {"Method": _pairs(_flat(settings))} if settings else {}
    tables |= {
        "Spec": _pairs(_flat({name: value for name, value in header["spec"].items() if name not in unused})),
        "Hashes (sha256)": _pairs({name: of[name] for name in ("model", "data", "index")}),
        "Ablate fraction and seed" if _from_model(identity) else "Keep plan": _pairs(_flat(of["plan"])),
        "Written with": pd.DataFrame([_flat(environment) for environment in attributions.store.environments]),
    }
    if timings:
        tables["Timings of the run that wrote this report"] = pd.DataFrame(
            {"step": list(timings), "seconds": [f"{seconds:.1f}" for seconds in timings.values()]}
        )
    return Section("Where this comes from", tables=tables)


def quality_section(attributions: Attributions) -> Section:
    """Returns how the attributions were estimated, and how well they predict held-out rows."""
    layers = {"Which layers carry the output (mean over all examples)": plots.layer_effects(attributions.by_layer())}
    text = [_origin(attributions), stderr_meaning(attributions.header["identity"])]
    if not attributions.quality_measured:
        text.insert(1, "How well they predict outputs was not measured: no rows were held out.")
        return Section("How good the attributions are", text=text, figures=layers)
    quality = attributions.quality
    correlation = quality["correlation"]
    rows = _held_out_rows(attributions.header["identity"])
    judged = f"Correlation of predicted with true outputs on {rows}: mean {attributions.quality_text()}"
    if correlation.notna().any():
        judged += f", median {correlation.median():.3f}; share of examples below 0.5: {(correlation < 0.5).mean():.1%}"
    text.insert(1, f"{judged}.")
    return Section(
        "How good the attributions are",
        text=text,
        tables={
            "Quality per example (correlation and r2 on held-out rows)": quality.describe().reset_index(
                names="statistic"
            ),
            "The worst predicted examples": attributions.examples.join(quality).nsmallest(5, "correlation"),
        },
        figures={
            "Held-out correlation per example": plots.prediction_quality(
                correlation.to_numpy(), "Held-out correlation per example"
            ),
            **layers,
        },
    )


def stderr_meaning(identity: Mapping[str, Any]) -> str:
    """Returns what the standard errors of attributions with this `identity` count, in plain words."""
    method = identity["method"]
    if method == "ridge" and identity.get("ridge") == 0:
        method = "ols"
    known = _STDERR.get(method, f"For what the standard errors count, see the method: {method}.")
    return known + (_GATES_BETWEEN if method == "gradient" and identity.get("background") != "bernoulli" else "")


def _from_model(identity: Mapping[str, Any]) -> bool:
    """Returns whether `coar.estimate` made it; else a campaign's rows are behind it."""
    return "quality_rows" in identity


def _held_out_rows(identity: Mapping[str, Any]) -> str:
    if not _from_model(identity):
        return "held-out keep-vectors"
    fraction = identity["of"]["plan"]["ablate_fraction"]
    return f"{identity['quality_rows']} held-out keep-vectors ({100 * fraction:g} % of the components ablated)"


def _origin(attributions: Attributions) -> str:
    identity = attributions.header["identity"]
    size = f"{len(attributions):,} examples x {len(attributions.index):,} components"
    if identity["method"] == "imported":
        units = (
            "" if attributions.in_output_units else f" Weights are {OTHER_UNITS}: the ablate fraction was not known."
        )
        lacking = f" {len(attributions.lacking):,} examples have no attribution." if attributions.lacking else ""
        return f"{size}, imported from {identity['imported']['file']}.{units}{lacking}"
    if not _from_model(identity):
        return f"{size}, by {identity['method']} on {identity['rows']:,} keep-vectors of a campaign."
    passes = attributions.quality["passes"]
    count = f"{passes.min():,.0f}" if passes.min() == passes.max() else f"{passes.min():,.0f} to {passes.max():,.0f}"
    return f"{size}, by {identity['method']}, {count} {'pass' if count == '1' else 'passes'} per example."


def edit_section(edit: Edit) -> Section:
    """Returns what an edit touches, and what the attributions expect of it."""
    details = edit.details
    text = [f"{edit.method}: {edit.operation} {len(edit.selection)} components at alpha = {edit.alpha:g}."]
    expected = predicted_change(details)
    if expected:
        text.append(f"{expected}{' (the harm done elsewhere)' if 'predicted_change_target' in details else ''}.")
    return Section("The edit", text=text, tables={"Components touched": edit.describe()})


def _render(section: Section) -> dict[str, Any]:
    tables = [_render_table(caption, table) for caption, table in section.tables.items()]
    figures = [{"caption": caption, "png": _png(figure)} for caption, figure in section.figures.items()]
    return {"title": section.title, "text": section.text, "tables": tables, "figures": figures}


def _render_table(caption: str, table: pd.DataFrame) -> dict[str, Any]:
    columns = [{"name": str(name), "text": not pd.api.types.is_numeric_dtype(table[name])} for name in table.columns]
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return {"caption": caption, "columns": columns, "rows": rows}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _pairs(values: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({"key": list(values), "value": list(values.values())})
