"""What stores cost: `python -m experiments.bench.stores [--quick | --full] [--only PART ...] [--folder FOLDER]`.

Parts: `reads` (one example's attributions, one component's column), `blocks` (writing blocks of a campaign, reading
slabs of examples), `share` (of a campaign's time that is not computing), `scale` (two workers beside one), `linear`
(cost and memory as a campaign grows). Each is measured beside what it is compared with, in one run; "cold" means that
the files were dropped from the page cache first. The table goes to docs/benchmarks/stores.md; a `--quick` run, which is
for trying it out, goes to stdout only. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import zarr

from experiments.bench.store_campaigns import Campaign, linear_part, run_given, scale_part, share_part
from experiments.bench.store_layouts import Size, attributions_part, campaign_part, has_tensorstore
from experiments.bench.store_timing import paragraph

OUTPUT = Path("docs/benchmarks/stores.md")
Part = Callable[[Path], list[str]]

FULL = Size(examples=50_000, components=20_000, rows=2_048, questions=9)
QUICK = Size(examples=1_500, components=700, rows=200, questions=2)


def parts(quick: bool, threads: int) -> dict[str, Part]:
    """Returns every part of the benchmark, as a function of the folder to work in."""
    size = QUICK if quick else FULL
    pixels, small = (32, 32) if quick else (224, 32)
    shared = Campaign(4 if quick else 16, 4 if quick else 64, pixels, 2 if quick else 4, 64)
    scaled = Campaign(8 if quick else 64, 4 if quick else 128, small, 1 if quick else 4, 64)
    # Batches that divide every size: all run the same forwards. And images enough that setting up a keep-vector,
    # which costs the same for any number of them, does not show.
    base = Campaign(4, 4, small, 2, 4) if quick else Campaign(8, 128, small, 8, 32)
    return {
        "reads": lambda folder: attributions_part(folder, size),
        "blocks": lambda folder: campaign_part(folder, size),
        "share": lambda folder: share_part(folder, shared, threads),
        "scale": lambda folder: scale_part(folder, scaled),
        "linear": lambda folder: linear_part(folder, base, (2,) if quick else (16,)),
    }


def measure(names: Sequence[str], quick: bool, folder: Path, threads: int) -> list[str]:
    """Returns the lines of the report of some parts; whatever they write to `folder` is gone afterwards."""
    needed = (QUICK if quick else FULL).bytes_needed
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / 2**30:.0f} GiB free, {needed / 2**30:.0f} are needed. Name another --folder."
        )
    tensorstore = "with tensorstore installed" if has_tensorstore() else "tensorstore not installed"
    lines = [
        "# What stores cost",
        "",
        *paragraph(
            f"`python -m experiments.bench.stores{' --quick' if quick else ''}`, zarr {zarr.__version__}, torch "
            f"{torch.__version__}, {tensorstore}, {threads} CPU threads, a local disk. Medians; cold: dropped from the "
            "page cache first. Times vary with the machine, ratios less."
        ),
    ]
    for name in names:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            lines += parts(quick, threads)[name](Path(place))
    return lines


def main(given: Sequence[str] | None = None) -> None:
    """Prints the report, and writes a full one to docs/benchmarks/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out: the figures mean nothing")
    parser.add_argument("--full", dest="quick", action="store_false", help="the sizes of the published table (default)")
    parser.add_argument("--only", nargs="+", choices=list(parts(True, 1)), default=list(parts(True, 1)))
    parser.add_argument("--folder", type=Path, default=None, help="where stores are written, and deleted again")
    parser.add_argument("--output", type=Path, default=None, help=f"default: {OUTPUT}, of a full run of all parts")
    parser.add_argument("--campaign", default=None, help=argparse.SUPPRESS)  # a worker of the parts on campaigns
    arguments = parser.parse_args(given)
    if arguments.campaign is not None:
        run_given(arguments.campaign)
        return
    folder = arguments.folder or Path(tempfile.gettempdir())
    text = "\n".join(measure(arguments.only, arguments.quick, folder, torch.get_num_threads()))
    whole = not arguments.quick and set(arguments.only) == set(parts(True, 1))
    path = arguments.output or (OUTPUT if whole else None)
    if path is not None:
        path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
