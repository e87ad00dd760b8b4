"""Whether an engine or a model is what attributions are about: the same weights, code, output and ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ablate import Engine, Examples
from ablate.campaign.identity import compared, subject_identity, whatever_the_data, without_calls
from ablate.models.identity import ModelIdentity
from stores.comparison import Difference

MEASURED = ("index", "output", "output_settings", "ablation")
MODEL = ("model", "weights", "code")


def engine_differences(of: Mapping[str, Any], engine: Engine, examples: Examples) -> list[Difference]:
    """Returns how what an engine measures differs from what attributions are about, key by key, stored -> now.

    Precision is left out: it changes rounding only. So are keys that the attributions do not have, which an earlier
    version or an import wrote. Numbers, and the arguments of functions, are compared on the same examples only.

    Args:
      of: What the attributions are about, `header["identity"]["of"]`.
      engine: What is to measure.
      examples: What it is to measure with.
    """
    now = subject_identity(examples, engine)
    stored, now = _named_only(of), _named_only(now)
    keys: tuple[str, ...] = (*MODEL, *MEASURED)
    if of.get("data") == now["data"]:
        keys = (*keys, "sample_outputs") if "bfloat16" not in (of.get("precision"), now["precision"]) else keys
    elif "code" in stored:
        stored, now = ({**one, "code": whatever_the_data(one["code"])} for one in (stored, now))
    return _differences(stored, now, keys)


def model_differences(of: Mapping[str, Any], model: nn.Module) -> list[Difference]:
    """Returns how a model that is not run differs from that of attributions, key by key, stored -> now."""
    stored = dict(of)
    if "code" in stored:
        stored["code"] = without_calls(stored["code"])
    return _differences(stored, ModelIdentity.of(model).describe(), MODEL)


def listed(differences: Sequence[Difference]) -> str:
    """Returns differences as lines, `key: stored -> now`."""
    return "\n".join(f"  {difference}" for difference in differences)


def _differences(stored: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> list[Difference]:
    known = [key for key in keys if stored.get(key) is not None]  # an import may know no model
    one, two = ({key: value[key] for key in known} for value in (stored, now))
    found = compared({"of": one}, {"of": two})
    return [Difference(d.key.removeprefix("of."), d.stored, d.now) for d in found]


def output_name(of: Mapping[str, Any]) -> str | None:
    """Returns the name of the output that attributions are about; its class may have moved to another module."""
    text = str(of.get("output") or "")
    return text.rpartition(" (")[0] or text or None


def _named_only(of: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity with the output by its name alone."""
    return {**of, "output": output_name(of)}
