"""Reports: one self-contained HTML file of text, tables and figures; nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from coar import plots
from coar.attributions import Attributions
from coar.editing.edit import Edit


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
    template = environment.from_string(files("coar").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    page = template.render(title=title, lead=lead, sections=[_render(section) for section in sections])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, target)
    return target


def provenance_section(header: Mapping[str, Any], timings: Mapping[str, float] | None = None) -> Section:
    """Returns what a result was made from: spec, hashes, versions, and how long each step took in seconds."""
    identity = header["identity"]
    of = identity.get("of", identity)
    hashes = {name: of[name] for name in ("model", "data", "index")}
    tables = {
        "Spec": _pairs(_flat(header["spec"])),
        "Hashes (sha256)": _pairs(hashes),
        "Keep plan": _pairs(_flat(of["plan"])),
        "Written with": pd.DataFrame([_flat(environment) for environment in header["environments"]]),
    }
    if timings:
        tables["Timings of the run that wrote this report"] = pd.DataFrame(
            {"step": list(timings), "seconds": [f"{seconds:.1f}" for seconds in timings.values()]}
        )
    return Section("Where this comes from", tables=tables)


def quality_section(attributions: Attributions) -> Section:
    """Returns how well the attributions predict held-out rows."""
    quality = attributions.quality
    worst = attributions.examples.join(quality).nsmallest(5, "correlation")
    return Section(
        "How good the attributions are",
        text=[
            f"{len(attributions):,} examples x {len(attributions.index):,} components. Correlation of predicted with "
            f"true outputs on held-out keep-vectors: mean {quality['correlation'].mean():.3f}, median "
            f"{quality['correlation'].median():.3f}; share of examples below 0.5: "
            f"{(quality['correlation'] < 0.5).mean():.1%}."
        ],
        tables={
            "Quality per example (correlation and r2 on held-out rows)": quality.describe().reset_index(
                names="statistic"
            ),
            "The worst predicted examples": worst,
        },
        figures={
            "Held-out correlation per example": plots.prediction_quality(
                quality["correlation"].to_numpy(), "Held-out correlation per example"
            ),
            "Which layers carry the output (mean over all examples)": plots.layer_effects(attributions.by_layer()),
        },
    )


def edit_section(edit: Edit) -> Section:
    """Returns what an edit touches, and what the attributions expect of it."""
    details = edit.details
    text = [f"{edit.method}: {edit.operation} {len(edit.selection)} components at alpha = {edit.alpha:g}."]
    if "predicted_change_target" in details:
        text.append(
            f"Predicted change of the mean output: target {details['predicted_change_target']:+.3f}, reference "
            f"{details['predicted_change_reference']:+.3f} (the harm done elsewhere)."
        )
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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
