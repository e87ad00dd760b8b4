"""How each part of a model is gated, and why: the engine's knowledge as a table."""

from __future__ import annotations

import pandas as pd

from ablate.components import Port
from ablate.machine import Machine


def explain(machine: Machine) -> pd.DataFrame:
    """Returns one row per port: module, kind, components, uses, how its gates act on activations, notes."""
    return pd.DataFrame(
        [_row(machine, port) for port in machine.index.ports],
        columns=["module", "kind", "port", "components", "used by", "activation gating", "notes"],
    )


def _row(machine: Machine, port: Port) -> tuple[object, ...]:
    uses = machine.report.uses.get(port.parameter, [])
    used_by = ", ".join(dict.fromkeys(f"{use.op.name} in {use.module or 'the model itself'!r}" for use in uses))
    if port.parameter in machine.report.strange:
        used_by = ", ".join(filter(None, (used_by, machine.report.strange[port.parameter])))
    problem = machine.activation.problems.get(port.module)
    if problem is not None:
        how = f"refused: {problem}"
    elif port.module in machine.activation.layers:
        how = "gated layer"
    elif port.module in machine.activation.attentions:
        how = "attention taken apart"
    else:
        how = "gated where it is used: the module's own forward is not the use"
    notes = []
    if port.module in machine.activation.alone:
        notes.append(f"one example per forward: {machine.activation.alone[port.module]}")
    if port.module in machine.activation.no_gradient:
        notes.append(f"no gradients: {machine.activation.no_gradient[port.module]}")
    if not uses and port.parameter not in machine.report.strange:
        notes.append("never used on the two examples")
    if len(uses) > 1:
        notes.append(f"used {len(uses)} times; a gate acts on every use")
    layouts = dict.fromkeys(use.in_layout if port.port == "in" else use.out_layout for use in uses)
    notes += [str(layout) for layout in layouts if layout is not None]
    if port.module in machine.shared:
        notes.append(f"weight shared with {', '.join(map(repr, machine.shared[port.module]))}")
    if port.module in machine.folded_into:
        notes.append(f"batch norm {machine.folded_into[port.module]!r} folded in")
    return (port.module, port.kind, port.port, port.count, used_by or "nothing", how, "; ".join(notes))
