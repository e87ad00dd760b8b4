"""A command of ours in a process of somebody else's, as a Ray actor is."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass

MOST_TEXT = 20_000  # characters of what an actor says


def run_command_here(
    words: list[str], spec: str, text: str, folder: str, threads: int, number: int, count: int
) -> tuple[int, str]:
    """Runs the command line in this process, as a worker of a cluster; returns exit code and error.

    The spec travels with it, so that the node needs no copy; paths in it are relative to the folder in which the
    command was given, if the node has one of that name.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    torch.set_num_threads(threads)
    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="coar-spec-") as temporary:
        if not os.path.exists(spec):
            copy = Path(temporary) / Path(spec).name
            copy.write_text(text, encoding="utf-8")
            words = [str(copy) if word == spec else word for word in words]
        before = sys.argv
        sys.argv = ["coar", *words, f"--worker={number}/{count}"]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                runpy.run_module("coar", run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        else:
            code = 0
        finally:
            sys.argv = before
    return code, said.getvalue()[-MOST_TEXT:].strip().removeprefix("error: ") if code else ""
