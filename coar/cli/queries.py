"""Commands that ask and judge attributions, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import ablate
import coar
from coar.cli.common import AttributionsPath, Json, RunCode, print_json, records, say
from coar.cli.storage import Storage, both_located, located


def evaluate(
    attributions: AttributionsPath,
    rows: Annotated[int, typer.Option(min=2, help="Number of fresh keep-vectors per ablate fraction.")] = 200,
    ablate_fraction: Annotated[
        list[float] | None, typer.Option(help="Share ablated; repeatable; default: that of the attributions.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Must differ from that of the campaign or estimate.")] = 1_000_003,
    run_code: RunCode = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Judge attributions on fresh keep-vectors: correlation of predicted with true outputs."""
    from coar.attributions.reload import reload_engine

    opened = coar.open_attributions(located(storage, attributions))
    engine, examples = reload_engine(opened, run_code=run_code)
    result = coar.evaluate(opened, engine, examples, rows=rows, ablate_fraction=ablate_fraction or None, seed=seed)
    if as_json:
        print_json({"rows": rows, "seed": seed, "fractions": records(result.table())})
        return
    say(f"Correlation on {rows} fresh keep-vectors; low and high: 95 % interval of the mean.", result.table())
    for found in result.fractions:
        if found.undefined:
            say(
                f"At {found.ablate_fraction:g}, {found.undefined:,} of {len(opened):,} examples have no correlation: "
                "their predicted or true outputs are the same in all rows."
            )


def top(
    attributions: AttributionsPath,
    example: Annotated[int | None, typer.Option(help="Position of the example.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Id of the example.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many components.")] = 10,
    sign: Annotated[str, typer.Option(help="both, positive or negative.")] = "both",
    figure: Annotated[Path | None, typer.Option(help="Write a figure; runs the model on this example.")] = None,
    run_code: RunCode = False,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show the components that matter most to one example."""
    opened = coar.open_attributions(located(storage, attributions))
    position = _position(opened, example, name)
    if figure is not None:
        _require_format(figure)
    table = opened.top(position, k, sign)  # type: ignore[arg-type]  # both are checked by top()
    if as_json:
        print_json(records(table))
    else:
        say(_about(opened, position), table)
    if figure is not None:
        from coar.attributions.reload import reload_engine
        from coar.demo import ablation_curve
        from coar.report import plots

        engine, examples = reload_engine(opened, run_code=run_code)
        curve = ablation_curve(opened, engine, examples, position, min(20, len(opened.index)))
        figure.parent.mkdir(parents=True, exist_ok=True)
        plots.top_components(opened, position, _picture(examples, position), curve, k).savefig(figure)


def nearest(
    attributions: AttributionsPath,
    example: Annotated[int | None, typer.Option(help="Position of the example.")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Id of the example.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many examples.")] = 5,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show the examples whose attributions are most similar to one example's, by cosine."""
    opened = coar.open_attributions(located(storage, attributions))
    position = _position(opened, example, name)
    table = opened.nearest(position, k)
    if as_json:
        print_json(records(table))
    else:
        say(_about(opened, position), table)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="An attribution store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, of the same components.")],
    k: Annotated[int | None, typer.Option("-k", help="Size of the tops that are compared; default: 20.")] = None,
    storage: Storage = None,
    as_json: Json = False,
) -> None:
    """Show how far two attribution stores agree, on the examples both have."""
    found = coar.compare(*map(coar.open_attributions, both_located(storage, a, b)), k=k)
    if as_json:
        measures = records(found.summary())
        differences = [str(difference) for difference in found.differences]
        print_json({"examples": len(found.examples), "k": found.k, "measures": measures, "differences": differences})
        return
    say(repr(found), found.summary())
    if found.differences:
        say("\n  ".join(["Estimated differently (A -> B):", *map(str, found.differences)]))


def report(
    attributions: AttributionsPath,
    out: Annotated[Path, typer.Option(help="Where to write the report (.html).")],
    edit_file: Annotated[Path | None, typer.Option("--edit", help="An edit to describe.")] = None,
    storage: Storage = None,
) -> None:
    """Write a self-contained HTML report: quality, layers, the edit, spec and hashes."""
    from coar.report.html import edit_section, provenance_section, quality_section, write_report

    opened = coar.open_attributions(located(storage, attributions))
    sections = [quality_section(opened)]
    if edit_file is not None:
        found = coar.load_edit(edit_file)
        if found.selection.index != opened.index:
            raise coar.EditMismatchError(
                f"{edit_file} edits components of index {found.selection.index.hash[:12]}, {opened.store.where} has "
                f"index {opened.index.hash[:12]}. Give an edit of the same model."
            )
        sections.append(edit_section(found))
    sections.append(provenance_section(opened))
    write_report(out, "Component attributions", opened.store.where, sections)
    say(f"Report: {out}")


def _require_format(figure: Path) -> None:
    from coar.report import plots

    if figure.suffix.removeprefix(".") not in plots.formats():
        raise typer.BadParameter(f"--figure is {figure}; its name must end in one of .{', .'.join(plots.formats())}")


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


def _picture(examples: ablate.Examples, position: int) -> Any:
    """Returns an example as an image to show, or None if it is none."""
    value = examples.input(position).float()
    if value.ndim != 3 or value.shape[0] not in (1, 3):
        return None
    value = (value - value.min()) / (value.max() - value.min()).clamp_min(1e-12)
    return value[0].numpy() if value.shape[0] == 1 else value.permute(1, 2, 0).numpy()
