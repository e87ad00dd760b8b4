"""What is wrong with a spec, a sentence each: names that no registry knows, and what pydantic found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ablate.ablation import Ablation, ablation_names
from ablate.engine.engine import MODES, PRECISIONS
from ablate.engine.gated_model import ATTENTION
from ablate.errors import nearest
from ablate.index.kinds import component_kinds
from ablate.index.presets import preset_names
from ablate.loading.sources import DATA_SOURCES, MODEL_SOURCES
from ablate.outputs import Output, output_names
from stores.storage.places import storage_problems

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
FRACTION_TAGS = ("one", "several")  # two schemas, so that a problem of one number is told as one


def check_place(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with where a spec stores its campaign; never repeats credentials."""
    store, storage = values.get("store"), values.get("storage")
    if isinstance(store, str) and (storage is None or isinstance(storage, Mapping)):
        for problem in storage_problems(store, storage):
            yield f"store: {problem}"


def check_names(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the problems of names that are checked against registries, with the nearest matches."""
    chosen = values.get("components")
    kinds = chosen.get("kinds") if isinstance(chosen, Mapping) else None
    for kind in kinds if isinstance(kinds, (list, tuple)) else ():
        yield from _check_name("components.kinds", kind, component_kinds())
    preset = chosen.get("preset") if isinstance(chosen, Mapping) else None
    if preset is not None:
        yield from _check_name("components.preset", preset, preset_names())
        if kinds is not None:
            yield "components.kinds: given beside preset, which has its own. Give one of the two."
    if "output" in values and not isinstance(values["output"], Output):
        yield from _check_name("output", values["output"], output_names())
    if "precision" in values:
        yield from _check_name("precision", values["precision"], tuple(PRECISIONS))
    if "mode" in values:
        yield from _check_name("mode", values["mode"], MODES)
    ablation = values.get("ablation", "zero")
    if not isinstance(ablation, Ablation):
        yield from _check_name("ablation", ablation, ablation_names())
    factor = values.get("ablation_factor")
    if (ablation == "scale") != (factor is not None):
        got = "missing" if factor is None else f"got {short(factor)} beside ablation = {short(ablation)}"
        yield f"ablation_factor: {got}. Give it with ablation = 'scale', and only then."
    speed = values.get("speed")
    attention = speed.get("attention") if isinstance(speed, Mapping) else None
    if attention is not None:
        yield from _check_name("speed.attention", attention, tuple(ATTENTION))
    compiled = speed.get("compile") if isinstance(speed, Mapping) else None
    if isinstance(compiled, str):
        yield from _check_name("speed.compile", compiled, COMPILE_MODES)


def _check_name(key: str, name: Any, known: tuple[str, ...]) -> Iterator[str]:
    if name not in known:
        close = nearest(str(name), known)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        yield f"{key}: got {name!r}, expected one of {', '.join(known)}.{hint}"


def explain(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """Returns one sentence per problem that pydantic found: where, what was expected, what was given."""
    problems = []
    for problem in error.errors():
        path = _path(problem["loc"])
        key = ".".join(path)
        if problem["type"] == "string_type" and key in ("output", "precision", "components.preset"):
            continue  # check_names says it better
        if problem["type"] == "extra_forbidden":
            close = nearest(path[-1], _field_names(schema, path[:-1]))
            hint = f" Did you mean {close[0]!r}?" if close else " Remove it."
            problems.append(f"{key}: unknown key.{hint}")
        elif problem["type"] == "missing":
            problems.append(f"{key}: missing. Give it.")
        elif problem["type"] == "union_tag_invalid":
            tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "")
            close = nearest(tag, known.split(", "))
            hint = f" Did you mean {close[0]!r}?" if close else ""
            problems.append(f"{key}.source: got {tag!r}, expected one of {known}.{hint}")
        elif problem["type"] == "union_tag_not_found":
            problems.append(f"{key}: missing source. Give source = '...'.")
        elif problem["type"] == "model_attributes_type":
            expected = _OBJECTS.get(key, "") if "index" in schema.model_fields else ""  # in Python, not in a file
            problems.append(f"{key}: got {short(problem['input'])}, expected {expected}a table with a source.")
        elif problem["type"] == "value_error":
            problems.append(f"{key}: {problem['ctx']['error']}.")
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            message = message.replace("input should", "it should")
            problems.append(f"{key}: got {short(problem['input'])}, but {message}.")
    return problems


def _path(location: tuple[int | str, ...]) -> list[str]:
    """Returns the keys that lead to a problem, without the tag that pydantic puts between a choice and its key."""
    top = str(location[0]) if location else ""
    tags = {source.tag() for source in {"model": MODEL_SOURCES, "data": DATA_SOURCES}.get(top, ())}
    if top == "ablate_fraction":
        tags = set(FRACTION_TAGS)
    return [str(part) for i, part in enumerate(location) if i != 1 or part not in tags]


_OBJECTS = {"model": "an nn.Module or ", "data": "(inputs, targets), a Dataset, Examples or "}


def short(value: Any) -> str:
    """Returns a value as Python writes it, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _field_names(schema: type[BaseModel], path: list[str]) -> list[str]:
    table = schema.model_fields[path[0]].annotation if len(path) == 1 and path[0] in schema.model_fields else None
    if isinstance(table, type) and issubclass(table, BaseModel):
        return list(table.model_fields)
    if path in (["model"], ["data"]):
        return [f for s in (MODEL_SOURCES if path == ["model"] else DATA_SOURCES) for f in s.model_fields]
    return list(schema.model_fields)
