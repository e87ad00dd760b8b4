"""The label of each folder of images: as the user says, or as the model's number of classes leaves no doubt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ablate.errors import DataError, LoadError, UnknownNameError, nearest
from ablate.loading.imagenet import imagenet_classes

KEYWORDS = ("folders", "index", "imagenet")
Classes = str | Sequence[str]


def folder_labels(path: Path, folders: Sequence[str], classes: Classes | None, count: int | None) -> dict[str, int]:
    """Returns the label of each folder.

    Args:
      path: Where the folders are, for messages.
      folders: Their names.
      classes: "folders": 0, 1, ... in the order of the names, numbers as numbers; "index": the names are the labels;
        "imagenet": WordNet ids, names or indices of ImageNet's classes; else the names of the model's classes in their
        order, or a file of them (one a line, or a JSON list). None: "folders", if the model has as many classes.
      count: The model's number of classes; None: not known.

    Raises:
      DataError: Which label a folder has cannot be known, or there is none; says what to do.
      LoadError: The file of names cannot be read.
    """
    if classes is None:
        _refuse_doubt(path, folders, count)
        classes = "folders"
    if classes == "folders":
        labels = {name: label for label, name in enumerate(sorted(folders, key=numbers_first))}
    elif classes == "index":
        labels = {name: _number(path, name) for name in folders}
    elif classes == "imagenet":
        table = imagenet_classes(count)
        if table is None:
            raise DataError(
                f'{path}: classes is "imagenet", but the model has {count:,} classes, and ImageNet has not.'
            )
        labels = {name: table.index(name) for name in folders}
    else:
        labels = _by_list(path, folders, classes, count)
    _check(path, labels, count)
    return labels


def numbers_first(name: str) -> tuple[int, int, str]:
    """A key to sort by: numbers as numbers, before texts as texts."""
    return (0, int(name), name) if _is_number(name) else (1, 0, name)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _number(path: Path, name: str) -> int:
    if not _is_number(name):
        raise DataError(f'{path}: folder {name!r} is no class index. With classes = "index" every folder must be one.')
    return int(name)


def _check(path: Path, labels: dict[str, int], count: int | None) -> None:
    """Raises DataError where two folders are one class, or a label is none of the model's."""
    by_label: dict[int, str] = {}
    for name, label in labels.items():
        if label in by_label:
            raise DataError(
                f"{path}: folders {by_label[label]!r} and {name!r} are both class {label}. Put them into one."
            )
        by_label[label] = name
        if count is not None and label >= count:
            raise DataError(f"{path}: folder {name!r} is class {label}, but the model has classes 0 to {count - 1}.")


def _refuse_doubt(path: Path, folders: Sequence[str], count: int | None) -> None:
    """Raises DataError where the order of the folders' names need not be that of the model's classes."""
    if count is None:
        return
    table = imagenet_classes(count)
    imagenet = table is not None and all(map(table.knows, folders))
    if len(folders) == count:
        ordered = sorted(folders, key=numbers_first)
        if table is None or not imagenet or [table.index(name) for name in ordered] == list(range(count)):
            return
        got = f"{path}: its {count:,} folders have the names of ImageNet's classes, but their order is another"
    else:
        word = "folder" if len(folders) == 1 else "folders"
        got = f"{path} has {len(folders):,} {word}, and the model has {count:,} classes"
    if len(folders) > count:
        raise DataError(
            f"{got}: there is none for some of them. Move away what is no class, or give the "
            "model that has these classes."
        )
    choices = []
    if imagenet:
        choices.append('"imagenet", as the folders are classes of ImageNet')
    if all(_is_number(name) and int(name) < count for name in folders):
        choices.append('"index", if the folders\' names are class indices')
    choices.append(f"a list, or a file, of the names of the model's {count:,} classes in their order")
    choices.append(f'"folders", if the labels are 0 to {len(folders) - 1} in the order of the names')
    raise DataError(
        f"{got}: which class each folder is cannot be known. Say it in the table of the data with classes = "
        f"{'; or '.join(choices)}."
    )


def _by_list(path: Path, folders: Sequence[str], classes: Classes, count: int | None) -> dict[str, int]:
    names = _read_names(Path(classes)) if isinstance(classes, str) else list(classes)
    where = repr(classes) if isinstance(classes, str) else "classes"
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(name for i, name in enumerate(names) if labels[name] != i)
        raise DataError(f"{where} names the class {twice!r} twice. Give each class of the model its own name.")
    if count is not None and len(names) != count:
        raise DataError(
            f"{where} names {len(names):,} classes, and the model has {count:,}. Name all of them, in their order; "
            "there need not be a folder of each."
        )
    unknown = [name for name in folders if name not in labels]
    if unknown:
        raise UnknownNameError(f"class in {where} for the folder", unknown[0], names, f"The folder is in {path}.")
    return {name: labels[name] for name in folders}


def _read_names(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoadError(f"The file of class names {str(file)!r} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        close = nearest(str(file), KEYWORDS, limit=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise LoadError(
            f"classes is {str(file)!r}, and there is no such file of class names ({type(error).__name__}).{hint} Give "
            f"{', '.join(KEYWORDS)}, a list of names, or a file of them: one a line, or a JSON list."
        ) from error
    if text.lstrip()[:1] not in ("[", "{"):
        names = text.rstrip().splitlines()
        empty = [i for i, name in enumerate(names, 1) if not name.strip()]
        if empty:
            raise LoadError(f"{file}: line {empty[0]} is empty, expected the name of a class in every line.")
        return [name.strip() for name in names]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise LoadError(f"{file} is no JSON: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise LoadError(f"{file} holds JSON, but no list of texts: the names of the model's classes in their order.")
    return found
