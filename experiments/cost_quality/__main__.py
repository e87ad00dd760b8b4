"""`python -m experiments.cost_quality`: what attributions cost and how good they are, all estimators in one run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from coar.report import plots
from experiments.cost_quality.config import read_config
from experiments.cost_quality.measure import Bench, Record, at_other_fractions, coverage, to_frame
from experiments.cost_quality.networks import trained_network
from experiments.cost_quality.report import write_tables
from experiments.cost_quality.summary import headline

DRAWN = (
    "gradient",
    "regression, ridge",
    "regression, lasso",
    "leave_one_out",
    "integrated_gate_gradients",
    "gradient_times_gate",
)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A small version, into runs/ instead of docs/.")] = False,
    resnet50: Annotated[bool, typer.Option("--resnet50", help="ResNet-50, 22,720 filters; needs a GPU.")] = False,
    networks: Annotated[list[str] | None, typer.Option("--network", help="Only this, into runs/; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and figures.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder for trained networks.")] = Path("runs/cost_quality"),
) -> None:
    """Compare all estimators: correlation with the true effect of ablating against cost in plain forward passes."""
    if resnet50 and not torch.cuda.is_available():
        raise typer.BadParameter("--resnet50 needs a CUDA device, and there is none.")
    name = "resnet50" if resnet50 else "quick" if quick else "full"
    config = read_config(name)
    if networks:
        unknown = set(networks) - set(config.networks)
        if unknown:
            raise typer.BadParameter(f"no network {', '.join(unknown)}; there are {', '.join(config.networks)}.")
        config = config.model_copy(update={"networks": {n: c for n, c in config.networks.items() if n in networks}})
    # what is small or a part never replaces the tables of the whole
    folder = out or (Path("runs/cost_quality") / name if quick or networks else Path("docs/benchmarks"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    records: list[Record] = []
    calibrated: list[dict[str, object]] = []
    fractions: list[dict[str, object]] = []
    for network in config.networks:
        model, index = trained_network(network, cache)
        bench = Bench(network, config, model, index, print)
        print(f"{network}: {len(index):,} components, {len(bench.examples)} examples", flush=True)
        records += bench.records()
        if config.networks[network].calibrate:
            calibrated += coverage(bench)
        if not quick:
            fractions += at_other_fractions(bench, rows=60)
        print(f"  {(time.perf_counter() - started) / 60:.1f} minutes so far", flush=True)
    table = to_frame(records)
    summary = headline(table, config)
    minutes = (time.perf_counter() - started) / 60
    write_tables(folder, name, table, summary, pd.DataFrame(calibrated), pd.DataFrame(fractions), minutes)
    for row in summary.to_dict("records"):
        mine = table[(table["network"] == row["network"]) & table["estimator"].isin(DRAWN)]
        order = pd.concat([mine[mine["estimator"] == estimator] for estimator in DRAWN])
        title = f"{row['network']}: {row['components']:,} components"
        plots.cost_quality(order, row["target"], title).savefig(folder / f"cost_quality_{row['network']}.png", dpi=150)
    print(summary.to_string(index=False))
    print(f"{minutes:.1f} minutes; tables and figures in {folder}")


if __name__ == "__main__":
    typer.run(main)
