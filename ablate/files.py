"""Files that are there whole or not at all: written beside their place, flushed, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stores import StoreExistsError
from stores.storage.drafts import draft_of


@contextmanager
def written_whole(path: Path, overwrite: bool) -> Iterator[Path]:
    """Gives the path of a draft to fill, which takes its place when the block ends, and vanishes if that raised.

    Raises:
      StoreExistsError: Something is at `path`, and it is a folder or may not be replaced.
    """
    refuse_existing(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        refuse_existing(path, overwrite)  # what has appeared meanwhile
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises StoreExistsError if there is a folder at `path`, or a file that may not be replaced."""
    if path.is_dir():
        raise StoreExistsError(f"{path} is a folder, expected the path of a file to write. Choose another path.")
    if path.exists() and not overwrite:
        raise StoreExistsError(
            f"There is something at {path} already. Choose another path, or replace it with overwrite=True "
            "(`--overwrite`)."
        )
