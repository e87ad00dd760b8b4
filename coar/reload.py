"""From attributions back to the model and examples they are about: reloaded by the stored spec, checked by hash."""

from __future__ import annotations

from ablate import CampaignSpec, Engine, Examples, model_hash, preserved_random_state
from coar.attributions import Attributions
from coar.errors import QueryError
from stores import StoreMismatchError, differences


def reload_engine(attributions: Attributions) -> tuple[Engine, Examples]:
    """Returns an engine for the attributions' model, index and output, and their examples. Mutates nothing.

    Raises:
      QueryError: They were made from Python objects: only Python can give them again.
      stores.StoreMismatchError: What the spec loads now is not what it loaded then.
    """
    header = attributions.header
    if not header["loadable"]:
        raise QueryError(
            f"{attributions.store.where} was made from Python objects, which a store cannot load again. Use the Python "
            "functions (coar.evaluate, Edit.apply) with your model and data, or start from a spec file."
        )
    spec = CampaignSpec.from_dict(header["spec"], where=f"the spec stored in {attributions.store.where}")
    with preserved_random_state():
        model, examples = spec.load()
    of = header["identity"]["of"]
    found = differences({"model": of["model"], "data": of["data"]}, {"model": model_hash(model), "data": examples.hash})
    if found:
        raise StoreMismatchError(
            attributions.store.where, found, "The checkpoint or data file has changed since. Restore the original."
        )
    return spec.make_engine(model, attributions.index), examples
