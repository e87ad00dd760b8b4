"""From attributions back to the model and examples they are about: reloaded by the stored spec, checked by hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ablate import CampaignSpec, Engine, Examples, preserved_random_state
from ablate.data.changed import what_changed
from coar.attributions.attributions import Attributions
from coar.attributions.same_subject import model_differences
from coar.errors import QueryError
from stores import StoreMismatchError, differences


def reload_engine(attributions: Attributions, *, run_code: bool = False) -> tuple[Engine, Examples]:
    """Returns an engine for the attributions' model, index and output, and their examples. Mutates nothing.

    Args:
      attributions: Whose spec names what to load.
      run_code: Import and call the Python functions that the spec names as `factory`. A store is data, perhaps somebody
        else's: without this, nothing that it names is run.

    Raises:
      QueryError: They were made from Python objects: only Python can give them again. Or the spec names functions, and
        `run_code` is not given.
      stores.StoreMismatchError: What the spec loads now is not what it loaded then.
    """
    header = attributions.header
    imported = "imported" in header["identity"]
    if not header["loadable"] and imported:
        raise QueryError(
            f"{attributions.store.where} was imported without a spec, or in part, and does not say which model and "
            "data it is about. Import the file again, all examples of it, with spec= (`coar import ... --spec "
            "SPEC.toml`)."
        )
    if not header["loadable"]:
        raise QueryError(
            f"{attributions.store.where} was made from Python objects, which a store cannot load again. Use the Python "
            "functions (coar.evaluate, Edit.apply) with your model and data, or start from a spec file."
        )
    functions = _named_functions(header["spec"])
    if functions and not run_code:
        raise QueryError(
            f"{attributions.store.where} names Python functions to import and call: {', '.join(functions)}. Nothing "
            "that a store names is run unasked. If you know them and trust whoever wrote the store, allow it with "
            "--run-code (run_code=True)."
        )
    spec = CampaignSpec.from_dict(header["spec"], where=f"the spec stored in {attributions.store.where}")
    with preserved_random_state():
        model, examples = spec.load()
    of = header["identity"]["of"]
    engine = spec.make_engine(model, attributions.index, examples)
    found = [*differences({"data": of["data"]}, {"data": examples.hash}), *model_differences(of, model)]
    if found:
        why = what_changed(attributions.store.examples, examples)
        code = all(difference.key.startswith("code.") for difference in found)
        changed = "code of the network" if code else "checkpoint or data file"
        advice = f"{why} The {changed} has changed since. Restore the original.".lstrip()
        raise StoreMismatchError(attributions.store.where, found, advice)
    return engine, examples


def _named_functions(spec: Mapping[str, Any]) -> list[str]:
    """Returns the Python functions, `module:function`, that make the model or the data of a stored spec."""
    tables = [spec[part] for part in ("model", "data") if isinstance(spec.get(part), Mapping)]
    return [str(table["factory"]) for table in tables if "factory" in table]
