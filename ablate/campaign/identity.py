"""What numbers depend on: weights, the network's code, data, index, output, ablation; compared key by key, old -> new.

A store is bound to its identity: it is gone on with by the same one only. What a store of before does not say is not
compared. Other package versions and other code that computes the same numbers may be accepted, each by its flag.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

import stores
from ablate.data.examples import Examples
from ablate.engine.engine import Engine
from ablate.errors import NonFiniteOutputError
from ablate.keep import KeepPlan
from ablate.models.buffers import same_weights
from stores import StoreMismatchError
from stores.comparison import Difference

LOG = logging.getLogger("ablate.identity")
PACKAGES = ("component-attribution", "torch", "numpy", "zarr")
NUMBERS_ADVICE = (
    "The network or the output computes other numbers than when the store was made, whatever its weights. Give the "
    "original code back, or name another store."
)
ADVICE = {
    "versions": "Other versions may round differently. Install the stored ones, or go on all the same with "
    "accept_versions=True (`--accept-versions`).",
    "code": "The network is written in another way. Give the original code back; if it was only rewritten and computes "
    "the same, which is checked on two examples, go on with accept_code=True (`--accept-code`).",
}
LATER = ("code", "output_settings", "sample_outputs")  # keys that campaigns of before do not have; fits lack others
CLOSE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.1}  # of outputs, relative and absolute, on any device
SHOWN = 30  # characters before the place where two long texts part


Identity = Callable[[], Mapping[str, Any]]  # returns what a store is bound to


def campaign_identity(examples: Examples, plan: KeepPlan, engine: Engine, block_rows: int) -> dict[str, Any]:
    """Returns what a campaign's store is bound to. Checks the model with the first two examples, once."""
    return {
        **subject_identity(examples, engine),
        "plan": plan.describe(),
        "block_rows": min(block_rows, plan.rows),
        "versions": package_versions(),
    }


def subject_identity(examples: Examples, engine: Engine) -> dict[str, Any]:
    """Returns what is ablated and measured: what campaigns and estimates have in common.

    Args:
      examples: What it is measured on.
      engine: The model and what is measured.

    Cost: two forwards of two examples, for `sample_outputs`.
    """
    model, measured = engine.identity(examples).describe(), engine_identity(engine)
    model["sample_outputs"] = sample_outputs(engine, examples)
    after = engine.output.describe()
    kept = {key: value for key, value in measured["output_settings"].items() if after.get(key) == value}
    measured["output_settings"] = kept  # not what a call changes: counters
    return {**model, "data": examples.hash, **measured}


def engine_identity(engine: Engine) -> dict[str, Any]:
    """Returns what an engine measures, whatever the model and the examples."""
    return {
        "index": engine.index.hash,
        "output": output_identity(engine),
        "output_settings": engine.output.describe(),
        "ablation": engine.ablation.describe(),
        "precision": engine.precision,
        **({} if engine.output_key is None else {"output_key": engine.output_key}),
    }


def output_identity(engine: Engine) -> str:
    """Returns the output's name and class, as stores have it."""
    kind = type(engine.output)
    return f"{engine.output.name} ({kind.__module__}.{kind.__qualname__})"


def package_versions() -> dict[str, str]:
    """Returns the versions of the packages that decide how numbers are rounded."""
    return {package: version(package) for package in PACKAGES}


def compared(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Returns the differences between what a store is bound to and what it is used with, key by key.

    Not counted: keys that the store, written by an earlier version, does not have; buffers that a forward writes; and
    settings of modules and outputs that only one of the two has, as a forward may make and change them.
    """
    subject, own = stored.get("of", stored), now.get("of", now)
    either = {*own, *subject} if "of" in now else LATER
    missing = [key for key in either if key not in subject or key not in own]
    found = []
    for difference in stores.differences(stored, now):
        key = difference.key.removeprefix("of.")
        if key.split(".")[0] in missing or key.startswith("weights"):
            continue
        if key == "model" and same_weights(subject.get("weights", {}), own.get("weights", {})):
            continue
        if key == "sample_outputs" and _same_numbers(difference.stored, difference.now, own.get("precision", "")):
            continue
        if key.startswith(("code.settings.", "output_settings.")) and None in (difference.stored, difference.now):
            continue
        found.append(_from_where_they_part(difference))
    return _without_consequences(found)


def _without_consequences(found: list[Difference]) -> list[Difference]:
    """Returns differences without those that follow from others among them."""
    kinds = {_kind(difference) for difference in found}
    if "other" in kinds:
        found = [difference for difference in found if _kind(difference) != "numbers"]
    plainer = [difference for difference in found if not difference.key.endswith("code.flow")]
    return plainer if any(_kind(difference) == "code" for difference in plainer) else found


def without_calls(code: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a network's code that is known without running it."""
    return {key: code[key] for key in ("types", "settings") if key in code}


def whatever_the_data(code: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a network's code that is the same for other examples: functions without their arguments."""
    calls = {module: re.sub(r"\([^()]*\)", "", line) for module, line in code.get("calls", {}).items()}
    return {**without_calls(code), "calls": calls}


def require_same(
    where: str,
    stored: Mapping[str, Any],
    identity: Identity,
    advice: Callable[[], str],
    *,
    finished: bool,
    accept_versions: bool = False,
    accept_code: bool = False,
) -> None:
    """Raises StoreMismatchError, naming each key old -> new, unless all differences are accepted.

    Of a finished store no versions are compared: nothing is left to round differently. Outputs are: what no description
    shows (weights in a list, what a closure holds) must not give the numbers of another model.

    Args:
      where: The store.
      stored: Its identity.
      identity: That of what it is used with.
      advice: Returns what to do about other differences than those of versions and code.
      finished: Whether the store is finished.
      accept_versions, accept_code: As for `ablate.run`.
    """
    found = compared(stored, identity())
    accept_versions |= finished
    subject = stored.get("of", stored)
    if "code" not in subject and subject.get("model") is not None:
        LOG.info(
            "%s was made before stores said how a network is written: its code is not compared", where,
            extra={"event": "code_not_compared", "store": where},
        )  # fmt: skip
    accepted = {"versions"} if accept_versions else set()
    accepted |= {"code"} if accept_code else set()
    left = [difference for difference in found if _kind(difference) not in accepted]
    kinds = {_kind(difference) for difference in left}
    if "other" in kinds:
        raise StoreMismatchError(where, left, advice())
    if "numbers" in kinds:
        raise StoreMismatchError(where, left, NUMBERS_ADVICE)
    if left:
        raise StoreMismatchError(where, left, " ".join(ADVICE[kind] for kind in sorted(kinds)))


def _kind(difference: Difference) -> str:
    first = difference.key.removeprefix("of.").partition(".")[0]
    return {"versions": "versions", "code": "code", "sample_outputs": "numbers"}.get(first, "other")


def sample_outputs(engine: Engine, examples: Examples) -> list[list[float]] | None:
    """Returns outputs of the first two examples, with all components and without every other one; JSON-able.

    Kept in a store to tell later whether other code computes the same. None where outputs are no finite numbers.

    Cost: two forwards of two examples.
    """
    keep = np.ones((2, len(engine.index)), dtype=np.bool_)
    keep[1, ::2] = False
    first = examples.take(range(min(2, len(examples))))
    engine.check(examples)
    compiled = engine._gated_model is not None and engine._gated_model.compiled  # which would compile for two examples
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            found = engine.outputs(keep, first)
    except NonFiniteOutputError:
        return None
    return [[float(value) for value in row] for row in found]


def _same_numbers(stored: Any, now: Any, precision: str) -> bool:
    """Returns whether outputs are equal but for the rounding of another device or version."""
    if stored is None or now is None:
        return stored is now
    close = CLOSE.get(precision, CLOSE["float32"])
    return np.shape(now) == np.shape(stored) and bool(np.allclose(now, stored, rtol=close, atol=close))


def _from_where_they_part(difference: Difference) -> Difference:
    """Returns a difference of two long texts with what they have in common at the beginning cut off."""
    old, new = difference.stored, difference.now
    if not (isinstance(old, str) and isinstance(new, str)) or max(len(old), len(new)) <= 2 * SHOWN:
        return difference
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - SHOWN)
    if start == 0 or not difference.key.removeprefix("of.").startswith("code."):
        return difference
    return Difference(difference.key, f"...{old[start:]}", f"...{new[start:]}")
