"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 failed while running, 2 bad input, 3 not finished, 4 the store belongs to something else.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

import ablate
import coar
import stores
from coar import plots
from coar.demo import ablation_curve, run_demo
from coar.reload import reload_engine
from coar.report import edit_section, provenance_section, quality_section, write_report

FAILED, BAD_INPUT, NOT_FINISHED, MISMATCH = 1, 2, 3, 4

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which parts of this network made that prediction, and what happens if I change them?",
)
# Ids and groups are the user's: no markup, no emoji in them.
_plain: Any = {"markup": False, "emoji": False, "highlight": False}
_out = Console(**_plain) if sys.stdout.isatty() else Console(width=140, soft_wrap=True, **_plain)

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A campaign spec (TOML).")]
AttributionsPath = Annotated[str, typer.Argument(metavar="ATTRIBUTIONS", help="An attribution store.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"coar {version('component-attribution')}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Tells which parts of a network made a prediction, and what happens without them."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it writes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of data, training and keep-vectors.")] = 0,
) -> None:
    """Run the main job on real handwritten digits: ablate, attribute, ask, edit, report."""
    run_demo(out, seed, _say)


@app.command()
def index(
    spec: SpecFile,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also run two examples: how is each module gated, and why?")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the components of a spec's model, module by module, and what is left out."""
    campaign = ablate.CampaignSpec.from_file(spec)
    with ablate.preserved_random_state():
        model, examples = campaign.load()
    found = campaign.make_index(model)
    gating = None
    if explain:
        engine = campaign.make_engine(model, found, examples)
        engine.check(examples)
        gating = engine.explain()
    if as_json:
        facts = {"components": len(found), "hash": found.hash, "modules": _records(found.modules())}
        _print_json(facts if gating is None else {**facts, "gating": _records(gating)})
        return
    _say(f"{len(found):,} components in {len(found.ports)} modules; index {found.hash[:12]}", found.modules())
    if len(found.left_out()):
        _say("Left out:", found.left_out())
    if gating is not None:
        _say("How each module is gated:", gating[["module", "used by", "activation gating", "notes"]])


@app.command(name="ablate")
def run_campaign(
    spec: SpecFile,
    store: Annotated[str | None, typer.Option(help="Where to store it; default: the spec's `store`.")] = None,
    accept_versions: Annotated[
        bool, typer.Option("--accept-versions", help="Go on with a store that other package versions wrote.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Run a campaign into its store, or go on where it stopped."""
    campaign = ablate.run(spec, store, progress=not quiet, accept_versions=accept_versions)
    _say(f"Complete: {campaign.rows:,} rows x {campaign.example_count:,} examples in {campaign.where}", None)


@app.command()
def status(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A campaign store.")], as_json: Json = False
) -> None:
    """Show how far a campaign is. Exit code 3 while it is not finished."""
    campaign = stores.CampaignStore.open(store)
    state = campaign.progress
    facts = {
        "store": campaign.where,
        "complete": state.complete,
        "finished_rows": state.finished_rows,
        "rows": state.rows,
        "finished_blocks": state.finished_blocks,
        "blocks": state.blocks,
        "examples": campaign.example_count,
        "components": campaign.component_count,
        "spec": campaign.header["spec"],
    }
    if as_json:
        _print_json(facts)
    else:
        share = state.finished_rows / state.rows
        _say(
            f"{campaign.where}: {'complete' if state.complete else 'not finished'}, {state.finished_rows:,} of "
            f"{state.rows:,} rows ({share:.0%}), {state.finished_blocks} of {state.blocks} blocks; "
            f"{campaign.example_count:,} examples, {campaign.component_count:,} components.",
            None,
        )
    if not state.complete:
        raise typer.Exit(NOT_FINISHED)


@app.command(name="fit")
def fit_campaign(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A campaign store.")],
    out: Annotated[
        str | None, typer.Option(help="Where to write; default: STORE with -attributions before .zarr.")
    ] = None,
    method: Annotated[str, typer.Option(help="ridge, ols or lasso.")] = "ridge",
    ridge: Annotated[
        float | None, typer.Option(help="One penalty for all examples; default: chosen per example.")
    ] = None,
    ablate_fraction: Annotated[
        float | None, typer.Option(help="Of a campaign with several, fit the rows of this one; default: all.")
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out/--fit-all", help="Measure quality on every tenth row, or fit all rows.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...: where the heavy products are computed.")] = "cpu",
    memory_gib: Annotated[float, typer.Option(min=0.01, max=1e6, help="Memory budget in GiB.")] = 2.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace attributions of another fit.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit one linear attribution per example to a campaign's finished rows."""
    target = out if out is not None else f"{store.rstrip('/').removesuffix('.zarr')}-attributions.zarr"
    fitted = coar.fit(
        store,
        target,
        method=method,  # type: ignore[arg-type]  # checked there
        ridge=ridge,
        ablate_fraction=ablate_fraction,
        held_out=held_out,
        device=device,
        memory=int(memory_gib * 2**30),
        overwrite=overwrite,
        progress=not quiet,
    )
    mean = float(fitted.quality["correlation"].mean())
    rows = fitted.header["identity"]["rows"]
    if as_json:
        _print_json({"store": target, "rows": rows, "examples": len(fitted), "held_out_correlation": mean})
    else:
        quality = f"Held-out correlation, mean over examples: {mean:.3f}" if held_out else "No rows were held out."
        _say(f"{len(fitted):,} attributions from {rows:,} rows in {target}. {quality}", None)


@app.command()
def evaluate(
    attributions: AttributionsPath,
    rows: Annotated[int, typer.Option(min=2, help="Number of fresh keep-vectors per ablate fraction.")] = 200,
    ablate_fraction: Annotated[
        list[float] | None, typer.Option(help="Share ablated; repeatable; default: the campaign's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Must differ from the campaign's.")] = 1_000_003,
    as_json: Json = False,
) -> None:
    """Judge attributions on fresh keep-vectors: correlation of predicted with true outputs."""
    opened = coar.open_attributions(attributions)
    engine, examples = reload_engine(opened)
    result = coar.evaluate(opened, engine, examples, rows=rows, ablate_fraction=ablate_fraction or None, seed=seed)
    if as_json:
        _print_json({"rows": rows, "seed": seed, "fractions": _records(result.table())})
        return
    _say(f"Correlation on {rows} fresh keep-vectors; low and high: 95 % interval of the mean.", result.table())
    for found in result.fractions:
        if found.undefined:
            _say(
                f"At {found.ablate_fraction:g}, {found.undefined:,} of {len(opened):,} examples have no correlation: "
                "their predicted or true outputs are the same in all rows.",
                None,
            )


@app.command()
def top(
    attributions: AttributionsPath,
    example: Annotated[int | None, typer.Option(help="Position of the example.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Id of the example.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many components.")] = 10,
    sign: Annotated[str, typer.Option(help="both, positive or negative.")] = "both",
    figure: Annotated[Path | None, typer.Option(help="Write a figure; runs the model on this example.")] = None,
    as_json: Json = False,
) -> None:
    """Show the components that matter most to one example."""
    opened = coar.open_attributions(attributions)
    position = _position(opened, example, name)
    if figure is not None and figure.suffix.removeprefix(".") not in plots.formats():
        raise typer.BadParameter(f"--figure is {figure}; its name must end in one of .{', .'.join(plots.formats())}")
    table = opened.top(position, k, sign)  # type: ignore[arg-type]  # both are checked by top()
    if as_json:
        _print_json(_records(table))
    else:
        _say(_about(opened, position), table)
    if figure is not None:
        engine, examples = reload_engine(opened)
        curve = ablation_curve(opened, engine, examples, position, min(20, len(opened.index)))
        figure.parent.mkdir(parents=True, exist_ok=True)
        plots.top_components(opened, position, _picture(examples, position), curve, k).savefig(figure)


@app.command()
def nearest(
    attributions: AttributionsPath,
    example: Annotated[int | None, typer.Option(help="Position of the example.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Id of the example.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many examples.")] = 5,
    as_json: Json = False,
) -> None:
    """Show the examples whose attributions are most similar to one example's, by cosine."""
    opened = coar.open_attributions(attributions)
    position = _position(opened, example, name)
    table = opened.nearest(position, k)
    if as_json:
        _print_json(_records(table))
    else:
        _say(_about(opened, position), table)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="An attribution store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of the same components.")],
    k: Annotated[int | None, typer.Option("-k", help="Size of the tops that are compared; default: 20.")] = None,
    as_json: Json = False,
) -> None:
    """Show how far two attribution stores agree, on the examples both have."""
    found = coar.compare(coar.open_attributions(a), coar.open_attributions(b), k=k)
    if as_json:
        measures = _records(found.summary())
        differences = [str(difference) for difference in found.differences]
        _print_json({"examples": len(found.examples), "k": found.k, "measures": measures, "differences": differences})
        return
    _say(repr(found), found.summary())
    for difference in found.differences:
        _say(f"Estimated differently: {difference}", None)


@app.command()
def edit(
    attributions: AttributionsPath,
    out: Annotated[Path, typer.Option(help="Where to write the edit (.safetensors).")],
    target_group: Annotated[
        list[str] | None, typer.Option(help="Group whose output should change; repeatable.")
    ] = None,
    reference_group: Annotated[list[str] | None, typer.Option(help="Group that should stay; repeatable.")] = None,
    target: Annotated[list[int] | None, typer.Option(help="Position of a target example; repeatable.")] = None,
    reference: Annotated[list[int] | None, typer.Option(help="Position of a reference example; repeatable.")] = None,
    ids_contain: Annotated[str, typer.Option(help="Of the groups take only examples whose id contains this.")] = "",
    k: Annotated[int, typer.Option("-k", help="How many components to ablate.")] = 20,
    direction: Annotated[str, typer.Option(help="raise or lower the target's output.")] = "raise",
    as_json: Json = False,
) -> None:
    """Find the k components to ablate that change the target's output and spare the reference's (COAR-Edit)."""
    opened = coar.open_attributions(attributions)
    targets = [*(target or []), *(i for g in target_group or [] for i in opened.group(g, ids_contain))]
    references = [*(reference or []), *(i for g in reference_group or [] for i in opened.group(g, ids_contain))]
    found = coar.coar_edit(opened, targets, references, k, direction)  # type: ignore[arg-type]  # checked there
    found.save(out)
    details = found.details
    if as_json:
        _print_json({"edit": str(out), "ids": list(found.selection.ids), "details": dict(details)})
    else:
        _say(
            f"{found!r} -> {out}. Predicted change of the mean output: "
            f"target {details['predicted_change_target']:+.3f}, reference {details['predicted_change_reference']:+.3f}",
            found.describe(),
        )


@app.command()
def report(
    attributions: AttributionsPath,
    out: Annotated[Path, typer.Option(help="Where to write the report (.html).")],
    edit_file: Annotated[Path | None, typer.Option("--edit", help="An edit to describe.")] = None,
) -> None:
    """Write a self-contained HTML report: quality, layers, the edit, spec and hashes."""
    opened = coar.open_attributions(attributions)
    sections = [quality_section(opened)]
    if edit_file is not None:
        found = coar.load_edit(edit_file)
        if found.selection.index != opened.index:
            raise coar.EditMismatchError(
                f"{edit_file} edits components of index {found.selection.index.hash[:12]}, {opened.store.where} has "
                f"index {opened.index.hash[:12]}. Give an edit of the same model."
            )
        sections.append(edit_section(found))
    sections.append(provenance_section(opened.header))
    write_report(out, "Component attributions", opened.store.where, sections)
    _say(f"Report: {out}", None)


def main() -> None:
    """Runs the command line; turns errors of the toolkit into a message and an exit code."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # a spec's `factory` may be a module of the working directory, as with `python -m`
    try:
        app()
    except stores.StoreMismatchError as error:
        _fail(error, MISMATCH)
    except stores.UnfinishedStoreError as error:
        _fail(error, NOT_FINISHED)
    except (ablate.NonFiniteOutputError, ablate.OutOfMemoryError, stores.DamagedBlockError) as error:
        _fail(error, FAILED)
    except (ablate.AblateError, stores.StoreError, coar.CoarError) as error:
        _fail(error, BAD_INPUT)
    except OSError as error:  # e.g. a place where nothing may be written
        _fail(error, FAILED)


def _fail(error: Exception, code: int) -> None:
    print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)  # noqa: T201
    sys.exit(code)


def _say(text: str, table: pd.DataFrame | None) -> None:
    _out.print(text)
    if table is not None:
        _out.print(_rich_table(table))


def _position(attributions: coar.Attributions, example: int | None, name: str | None) -> int:
    """Returns the position of the example that was asked for by --example or --id."""
    if example is None and name is not None:
        return attributions.locate([name])[0]
    if example is not None and name is None:
        return example
    raise typer.BadParameter("give either --example or --id")


def _about(attributions: coar.Attributions, position: int) -> str:
    row = attributions.examples.iloc[position]
    return f"Example {position}: id {row['id']}, label {row['label']}, group {row['group']}"


def _rich_table(table: pd.DataFrame) -> Table:
    drawn = Table()
    for name in table.columns:
        numeric = pd.api.types.is_numeric_dtype(table[name])
        drawn.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False, name=None):
        drawn.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    return drawn


def _records(table: pd.DataFrame) -> Any:
    return json.loads(table.to_json(orient="records"))


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=2, allow_nan=False))  # noqa: T201


def _finite(value: Any) -> Any:
    """Returns JSON-able values with null for NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _picture(examples: ablate.Examples, position: int) -> Any:
    """Returns an example as an image to show, or None if it is none."""
    value = examples.input(position).float()
    if value.ndim != 3 or value.shape[0] not in (1, 3):
        return None
    value = (value - value.min()) / (value.max() - value.min()).clamp_min(1e-12)
    return value[0].numpy() if value.shape[0] == 1 else value.permute(1, 2, 0).numpy()
