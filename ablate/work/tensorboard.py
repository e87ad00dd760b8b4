"""TensorBoard curves of long work: rows per second, finished blocks, failures, and held-out correlation if measured."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ablate.errors import LoadError
from ablate.work.logs import attached, facts_of
from stores.storage.places import user_path


@contextmanager
def scalars_to(folder: str | os.PathLike[str]) -> Iterator[None]:
    """While entered, the work of this process is drawn as curves in a folder for TensorBoard, one run per worker.

    The horizontal axis is the number of finished rows (campaigns) or examples (estimates), of all workers. Curves:
    `rows_per_second` of this worker, `finished_blocks` of all as far as it knows, `failures` it met, and what a
    finished block measured of itself (`correlation`: held out, mean over the block's examples).

    Raises:
      LoadError: TensorBoard is not installed.
      OSError: The folder cannot be written.
    """
    writer_class = _writer_class()
    place = user_path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with attached(_Curves(place, writer_class)):
        yield


def _writer_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old protocol buffers and numpy names; nothing a user could do about
        try:
            return import_module("torch.utils.tensorboard").SummaryWriter
        except ImportError as error:
            raise LoadError(
                f"TensorBoard cannot be imported ({error}). Install it: "
                "pip install 'component-attribution[tensorboard]'."
            ) from error


class _Curves(logging.Handler):
    """Turns the workers' events into points of curves."""

    def __init__(self, folder: Path, writer_class: Any) -> None:
        super().__init__()
        self._folder, self._writer_class = folder, writer_class
        self._writers: dict[str, Any] = {}
        self._failures: dict[str, int] = {}
        self._step: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        facts = facts_of(record)
        event, worker = facts.get("event"), facts.get("worker")
        if worker is None:
            return
        try:
            if event == "block_finished":
                self._step[worker] = int(facts["finished_rows"])
                names = ("rows_per_second", "finished_blocks")
                self._draw(worker, {name: facts[name] for name in names if name in facts})
                self._draw(worker, facts.get("measured", {}))
                self._draw(worker, {"failures": self._failures.get(worker, 0)})
            elif event in ("block_failed", "block_set_aside"):
                self._failures[worker] = self._failures.get(worker, 0) + 1
                self._draw(worker, {"failures": self._failures[worker]})
            elif event == "worker_ended" and worker in self._writers:
                self._writers[worker].flush()
        except Exception:  # as every handler of `logging` does
            self.handleError(record)

    def _draw(self, worker: str, values: dict[str, float]) -> None:
        if worker not in self._writers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._writers[worker] = self._writer_class(str(self._folder / worker))
        for name, value in values.items():
            self._writers[worker].add_scalar(name, value, self._step.get(worker, 0))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        super().close()
