"""How each part of a model is gated, and why: the engine's knowledge as a table."""

from __future__ import annotations

import pandas as pd

from ablate.engine.gated_model import GatedModel
from ablate.index.table import Port


def explain(gated_model: GatedModel) -> pd.DataFrame:
    """Returns one row per port: module, kind, components, uses, how its gates act on activations, notes."""
    return pd.DataFrame(
        [_row(gated_model, port) for port in gated_model.index.ports],
        columns=["module", "kind", "port", "components", "used by", "activation gating", "notes"],
    )


def _row(gated_model: GatedModel, port: Port) -> tuple[object, ...]:
    uses = gated_model.report.uses.get(port.parameter, [])
    used_by = ", ".join(dict.fromkeys(f"{use.op.name} in {use.module or 'the model itself'!r}" for use in uses))
    if port.parameter in gated_model.report.strange:
        used_by = ", ".join(filter(None, (used_by, gated_model.report.strange[port.parameter])))
    problem = gated_model.activation.problems.get(port.module)
    if problem is not None:
        how = f"refused: {problem}"
    elif port.module in gated_model.activation.layers:
        how = "gated layer"
    elif port.module in gated_model.activation.attentions:
        how = "attention taken apart"
    else:
        how = "gated where it is used: the module's own forward is not the use"
    notes = []
    if port.module in gated_model.activation.alone:
        notes.append(f"one example per forward: {gated_model.activation.alone[port.module]}")
    if port.module in gated_model.activation.no_gradient:
        notes.append(f"no gradients: {gated_model.activation.no_gradient[port.module]}")
    if not uses and port.parameter not in gated_model.report.strange:
        notes.append("never used on the two examples")
    if len(uses) > 1:
        notes.append(f"used {len(uses)} times; a gate acts on every use")
    layouts = dict.fromkeys(use.in_layout if port.port == "in" else use.out_layout for use in uses)
    notes += [str(layout) for layout in layouts if layout is not None]
    if port.module in gated_model.shared:
        notes.append(f"weight shared with {', '.join(map(repr, gated_model.shared[port.module]))}")
    if port.module in gated_model.folded_into:
        notes.append(f"batch norm {gated_model.folded_into[port.module]!r} folded in")
    return (port.module, port.kind, port.port, port.count, used_by or "nothing", how, "; ".join(notes))
