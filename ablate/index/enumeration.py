"""Enumerating a model: which components of which kinds it has, in which order, and what is left out, and why.

Apart from the index itself, which is read in places that know no models: this is what needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ablate.errors import AblateError, DataError, SelectionError, UnknownNameError
from ablate.index.defaults import default_components
from ablate.index.flow import Flow, flow_of
from ablate.index.kinds import KINDS, STRUCTURAL, Anatomy
from ablate.index.listing import BY_NAME, Listing, excluded_by_name
from ablate.index.presets import preset_parts
from ablate.index.table import Port

Enumeration = tuple[Sequence[Port], Sequence[tuple[str, int, int, str]]]  # ports, and what is left out


def ports_of_kinds(
    model: nn.Module,
    kinds: Sequence[str] | None,
    include: Sequence[str],
    exclude: Sequence[str],
    example_inputs: Tensor | None,
) -> Enumeration:
    """Returns the ports of a model's components of some kinds; see `ComponentIndex.from_model`."""
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
    return ports_of_anatomy(anatomy, kinds, excluded)


def ports_of_preset(
    model: nn.Module, name: str, include: Sequence[str], exclude: Sequence[str], shortcuts: bool
) -> Enumeration:
    """Returns the ports of a published enumeration; see `ComponentIndex.from_preset`."""
    anatomy = Anatomy(model)
    kinds, excluded = preset_parts(anatomy, name, shortcuts)
    return ports_of_anatomy(anatomy, kinds, excluded_by_name(anatomy, include, exclude) | excluded)


def ports_of_anatomy(anatomy: Anatomy, kinds: Sequence[str], excluded: Mapping[str, str]) -> Enumeration:
    """Returns the ports of these kinds in all modules but the excluded ones; SelectionError if there are none."""
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
    return listing.ports, listing.left_out


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
