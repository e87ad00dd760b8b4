"""Ending in order: what a worker of the command line does when it is told to stop, or is left alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from ablate.workers.on_slurm import requeue

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
TIME_IS_UP = "SIGUSR1"
CODE = 128  # plus the signal's number, as shells say it


class _Told(SystemExit):
    """A signal told this process to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(CODE + number)


@contextmanager
def ending_in_order(back_into_queue: bool, tied: bool) -> Iterator[None]:
    """Lets SIGTERM, SIGUSR1 and SIGUSR2 end the work at once: the block is given back for others to take.

    Args:
      back_into_queue: On SIGUSR1, put the Slurm job back into the queue when the work has ended.
      tied: End, too, when standard input ends: its other end is held by the process that started this one.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = {number: signal.signal(number, _tell) for number in SIGNALS}
    try:
        if tied:
            threading.Thread(target=_end_when_alone, name="tied", daemon=True).start()
        yield
    except _Told as told:
        typer.echo(
            f"Ended by {told.signal.name}. Finished blocks stay; the one that was begun is free for others.", err=True
        )
        if back_into_queue and told.signal.name == TIME_IS_UP:
            typer.echo("The job goes back into the queue.", err=True)
            requeue()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def hear_interrupts() -> None:
    """Makes SIGINT (Ctrl-C) end this process, also where it was started with it ignored; mutates that setting alone.

    A shell starts background jobs so, in the belief that nobody would interrupt them but by mistake.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _tell(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # once is enough
    raise _Told(number)


def _end_when_alone() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # not through its buffer, whose lock would hold up the end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
