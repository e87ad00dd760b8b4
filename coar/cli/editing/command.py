"""Commands that edit: find an edit by any method, and say what the methods are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import nn

import ablate
import coar
from ablate import Examples
from ablate.engine.checks import require_device
from ablate.logits import OutputKey
from coar.cli.common import Json, Quiet, print_json, records, say
from coar.cli.editing.explaining import Explanation, check_settings, explain, parse_settings
from coar.cli.editing.info import facts_of
from coar.cli.editing.options import EditOptions, option_name, with_edit_options
from coar.cli.editing.spec import EditSpec, read_spec
from coar.cli.storage import Storage, located, storage_options
from coar.editing.coar_edit.ranking import predicted_change
from coar.editing.edits.edit import Edit
from coar.editing.judging.evaluate import evaluate_edit
from coar.editing.registry import editor_class, editor_names, get_editor
from coar.editing.request import Request

DEFAULT_K = 20
WITH_A_STORE = ("target", "target_group", "target_id", "reference", "reference_group", "reference_id", "ids_contain")
STEPS = {
    "converged": "it got there",
    "max_steps": "all steps were taken",
    "noop": "nothing had to be done",
    "failed": "it failed",
}


@with_edit_options
def edit(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC|ATTRIBUTIONS]", help="A spec (.toml) with model and data, or an attribution store."
        ),
    ] = None,
    *,
    wish: EditOptions,
    out: Annotated[Path | None, typer.Option(help="Where to write the edit (.safetensors).")] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Show what it would change; without --out nothing is written.")
    ] = False,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods, and stop.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say what a method does, needs and takes, and stop.")
    ] = None,
    storage: Storage = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find an edit: what to change in the model so that some examples come out differently and others stay.

    A spec is that of a campaign, and may have a table `edit`; what is given here
    goes before it. With an attribution store: COAR-Edit, without any model.
    """
    if methods:
        _list_methods(as_json)
    elif explain is not None:
        _explain(explain, as_json)
    elif source is None:
        raise typer.BadParameter(
            "give a spec (.toml) or an attribution store; --methods lists what can be done with it"
        )
    elif source.endswith(".toml"):
        _edit_by_spec(source, wish, out, describe, storage, quiet, as_json)
    else:
        _edit_by_store(source, wish, _required(out, describe), storage, as_json)


def _required(out: Path | None, describe: bool) -> Path | None:
    if out is None and not describe:
        raise typer.BadParameter("give --out FILE.safetensors, or --describe to look only")
    return out


def _edit_by_store(source: str, wish: EditOptions, out: Path | None, storage: list[str] | None, as_json: bool) -> None:
    """COAR-Edit from attributions: no model is run."""
    if wish.method not in (None, "coar"):
        editor_class(str(wish.method))  # names what is nearest
        raise typer.BadParameter(
            f"--method {wish.method} runs the model: give a spec (.toml) with model and data, not {source}"
        )
    others = [name for name in wish.given() if name not in (*WITH_A_STORE, "method", "k", "direction", "alpha")]
    if others:
        names = ", ".join(option_name(name) for name in others)
        raise typer.BadParameter(f"{names}: only with a spec (.toml), which says how to run the model")
    opened = coar.open_attributions(located(storage, source))
    sets = []
    for positions, ids, groups in (
        (wish.target, wish.target_id, wish.target_group),
        (wish.reference, wish.reference_id, wish.reference_group),
    ):
        in_groups = [i for group in groups or [] for i in opened.group(group, wish.ids_contain)]
        sets.append([*(positions or []), *(opened.locate(ids) if ids else []), *in_groups])
    k = DEFAULT_K if wish.k is None else wish.k
    direction: Any = wish.direction or "raise"  # checked there
    found = coar.coar_edit(opened, sets[0], sets[1], k, direction)
    if wish.alpha is not None:
        found = found.at(wish.alpha)
    if out is not None:
        found.save(out)
    details = found.details
    if as_json:
        written = None if out is None else str(out)
        print_json({"edit": written, "ids": list(found.selection.ids), "details": dict(details)})
        return
    say(f"{found!r}{_arrow(out)}. {predicted_change(details)}", found.describe())


def _edit_by_spec(
    source: str,
    wish: EditOptions,
    out: Path | None,
    describe: bool,
    storage: list[str] | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Any method, on the model and the data of a spec."""
    spec, asked = read_spec(source, wish.as_table())
    target = _required(out if out is not None or asked.out is None else Path(asked.out), describe)
    if asked.method is None:
        raise typer.BadParameter("give --method NAME, or method in the spec's table edit; --methods lists them")
    settings = _settings(asked, wish)
    if isinstance(named := settings.get("attributions"), str):  # of coar
        place = spec.with_storage(storage_options(storage)).place(named)
        settings["attributions"] = coar.open_attributions(place or named)
    editor = get_editor(asked.method, **settings)
    with ablate.preserved_random_state():
        loaded, examples = spec.load()
    model = _placed(loaded.eval(), spec.settings.device)
    request = asked.request(examples)
    key = spec.settings.output_key
    found = editor.edit(model, request, asked.selection(model), output_key=key, progress=not quiet)
    if asked.alpha is not None:
        found = found.at(asked.alpha)
    if target is not None:
        found.save(target)
    _show(found, target, _effect(model, found, request, key), as_json)


def _settings(asked: EditSpec, wish: EditOptions) -> dict[str, Any]:
    """Returns the settings of the method: those of the spec, then those of the command line."""
    editor = editor_class(str(asked.method))
    found = {**check_settings(editor, asked.settings), **parse_settings(editor, wish.settings or [])}
    for name in ("k", "direction"):
        value = getattr(wish, name)
        if value is None:
            continue
        if asked.method != "coar":
            raise typer.BadParameter(f"{option_name(name)} belongs to coar, the method is {asked.method}")
        found[name] = value
    return found


def _placed(model: nn.Module, device: str) -> nn.Module:
    """Returns the model where the spec says: `auto` is CUDA where there is one, else where it is."""
    if device == "auto":
        return model.to("cuda") if torch.cuda.is_available() else model
    require_device(device)
    return model.to(device)


def _effect(model: nn.Module, found: Edit, request: Request, output_key: OutputKey) -> pd.DataFrame | None:
    """Returns accuracy before and after on the examples that were named; None where none has labels."""
    sets: dict[str, Examples] = {}
    if request.labels is not None:
        sets["target"] = Examples(request.inputs, request.labels)
    if request.reference is not None:
        sets["reference"] = request.reference
    if request.validation is not None:
        sets["validation target"], sets["validation reference"] = request.validation
    if not sets:
        return None
    table = evaluate_edit(model, found, sets, output_key=output_key).table()
    return table[["set", "examples", "before", "after", "fixed", "broken", "agreement"]]


def _show(found: Edit, out: Path | None, effect: pd.DataFrame | None, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "edit": None if out is None else str(out),
                **facts_of(found),
                "effect": None if effect is None else records(effect),
            }
        )
        return
    log = found.details["log"]
    ended = STEPS.get(log["stop"], "it ended")
    why = f" ({log['why'].rstrip('.')})" if log["why"] else ""
    say(f"{found!r}{_arrow(out)}. {log['steps']:,} steps in {log['seconds']:.1f} s: {ended}{why}.")
    if effect is not None:
        say("Accuracy before and after; agreement: share predicted as before.", effect)
    say("What it changes; relative_change: norm of the change over the norm of what was there.", found.describe())


def _arrow(out: Path | None) -> str:
    return "" if out is None else f" -> {out}"


def _list_methods(as_json: bool) -> None:
    found = [explain(editor_class(name)) for name in editor_names()]
    table = pd.DataFrame(
        {
            "method": one.name,
            "what it is": one.title,
            "needs": ", ".join(one.needs) or "-",
            "cost": one.cost if as_json else one.cost.split(". ")[0].rstrip("."),
            "source": one.source,
        }
        for one in found
    )
    if as_json:
        print_json(records(table))
    else:
        say("Editing methods. More on one of them: coar edit --explain NAME", table)


def _explain(name: str, as_json: bool) -> None:
    one = explain(editor_class(name))
    settings = pd.DataFrame(
        {"setting": s.name, "default": s.default, "takes": s.takes, "meaning": s.meaning} for s in one.settings
    )
    if as_json:
        facts = {"about": list(one.about), "cost": one.cost, "settings": records(settings)}
        print_json({"method": one.name, "title": one.title, "source": one.source, "needs": list(one.needs), **facts})
        return
    say(f"{one.title} (--method {one.name})\n")
    for paragraph in one.about:
        say(f"{paragraph}\n")
    say(f"Source: {one.source}.")
    if one.cost:
        say(f"Cost: {one.cost}")
    say("Needs, beside the examples to change:" if one.needs else "Needs nothing beside the examples to change.")
    for need in one.needs:
        say(f"  {need}: {NEEDED[need]}")
    say(f"\nFor example: {_example(one)}\n")
    say("Settings, each given as --set NAME=VALUE:", settings)


NEEDED = {
    "labels": "the class that each example should get (the data's labels, or --label, or --labels)",
    "originals": "each example before its transformation, as the model takes it (--originals)",
    "masks": "where the concept is in each example, 0 to 1 (--masks)",
    "reference": "ordinary examples, which should stay (--reference-group, --reference or --reference-id)",
    "validation": "held-out examples to choose a strength on, some to be changed (--validation-target-group), some "
    "ordinary (--validation-reference-group)",
}
FOR_EXAMPLE = {
    "labels": "--label 3",
    "originals": "--originals originals.npy",
    "masks": "--masks masks.npy",
    "reference": "--reference-group GROUP",
    "validation": "--validation-target-group GROUP --validation-reference-group GROUP",
}


def _example(one: Explanation) -> str:
    inputs = "--inputs changed.npy" if "originals" in one.needs else "--target-group GROUP"
    words = ["coar edit spec.toml --method", one.name, inputs, *(FOR_EXAMPLE[need] for need in one.needs)]
    words += ["-k 20"] if one.name == "coar" else []
    return " ".join([*words, "--out fix.safetensors"])
