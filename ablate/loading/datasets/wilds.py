"""Waterbirds and CelebA as WILDS lays them out on disk.

Read directly: two tables of text and a folder of images need no package, and `wilds` itself brings one that asks the
network for newer versions.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ablate.data.examples import Examples
from ablate.errors import LoadError
from ablate.loading.datasets.images import image_examples
from ablate.loading.packages import one_line
from ablate.loading.pixels import read_image
from ablate.loading.transforms import Transform

SPLITS = {"train": 0, "val": 1, "test": 2}
FOLDERS = {"waterbirds": "waterbirds_v1.0", "celebA": "celebA_v1.0"}


def wilds_data(name: str, root: Path, split: str, transform: Transform | None) -> Examples:
    """Returns a split of Waterbirds or CelebA; groups are label and spurious attribute, as WILDS evaluates them.

    Waterbirds: landbird 0, waterbird 1; groups `y:landbird-background:land`, ... CelebA: blond hair 1, else 0; groups
    `y:not_blond-male:no`, ... `root` is the folder that holds `waterbirds_v1.0` or `celebA_v1.0`.
    """
    folder = root / FOLDERS[name]
    table = _waterbirds(folder) if name == "waterbirds" else _celeba(folder)
    table = table[table["split"] == SPLITS[split]]
    if table.empty:
        raise LoadError(f"{folder} lists no images of split {split!r}.")
    read = partial(_open, folder, table["file"].tolist())
    ids = [Path(file).name if name == "celebA" else file for file in table["file"]]
    return image_examples(read, table["y"].tolist(), ids, table["group"].tolist(), transform, name)


def _waterbirds(folder: Path) -> pd.DataFrame:
    table = _read(folder / "metadata.csv", ["img_filename", "y", "split", "place"])
    label = table["y"].map({0: "landbird", 1: "waterbird"})
    background = table["place"].map({0: "land", 1: "water"})
    return _table(folder, table["img_filename"], table["y"], table["split"], "background", label, background)


def _celeba(folder: Path) -> pd.DataFrame:
    attributes = _read(folder / "list_attr_celeba.csv", ["image_id", "Blond_Hair", "Male"])
    partition = _read(folder / "list_eval_partition.csv", ["image_id", "partition"])
    if attributes["image_id"].tolist() != partition["image_id"].tolist():
        raise LoadError(
            f"{folder}: list_attr_celeba.csv and list_eval_partition.csv do not list the same images in the same order."
        )
    blond = attributes["Blond_Hair"].map({-1: 0, 0: 0, 1: 1})
    label = blond.map({0: "not_blond", 1: "blond"})
    male = attributes["Male"].map({-1: "no", 0: "no", 1: "yes"})
    files = "img_align_celeba/" + attributes["image_id"].astype(str)
    return _table(folder, files, blond, partition["partition"], "male", label, male)


def _table(folder: Path, files: Any, y: Any, split: Any, attribute: str, label: Any, value: Any) -> pd.DataFrame:
    unknown = label.isna() | value.isna()
    if unknown.any():
        raise LoadError(f"{folder} has a label or {attribute} outside the known ones, for {files[unknown].iloc[0]!r}.")
    group = "y:" + label + f"-{attribute}:" + value
    return pd.DataFrame({"file": files.astype(str), "y": y.astype(int), "split": split, "group": group})


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise LoadError(
            f"No file at {path}. root must hold the folder {path.parent.name} as WILDS has it; nothing is downloaded."
        )
    try:
        table = pd.read_csv(path)
    except Exception as error:  # pandas raises many types
        raise LoadError(f"{path} cannot be read as a table: {one_line(error)}.") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise LoadError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    return table


def _open(folder: Path, files: list[str], i: int) -> Any:
    return read_image(folder / files[i])
