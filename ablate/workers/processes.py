"""Workers as processes of this machine: the same command, once per device, each with a name of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from tqdm.auto import tqdm

from ablate.workers.supervise import End

MOST_TEXT = 20_000  # characters that are kept of an error
ERROR_STARTS = ("error:", "Traceback (most recent call last)")


class ChildProcess:
    """A worker that is a process of this machine; a `WorkerHandle`.

    The process gets a pipe as its standard input that ends when this process ends, however it ends: a worker that
    reads it knows that it is alone.

    Args:
      name: How messages call it.
      command: What is run.
      environment: Variables beside those of this process.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command, self._environment = list(command), {**os.environ, **environment}
        self._process: subprocess.Popen[str] | None = None
        self._stderr: _StderrReader | None = None

    def start(self) -> None:
        """Starts the process, in a session of its own: an interrupt of the terminal is this process's to pass on."""
        self._process = subprocess.Popen(  # noqa: S603 - the command is our own
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=self._environment,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._stderr = _StderrReader(self._process.stderr)

    def poll(self) -> End | None:
        """Returns how the process ended, None while it works."""
        if self._process is None or self._stderr is None:
            return End()
        code = self._process.poll()
        if code is None:
            return None
        if code < 0:
            return End(died=f"was killed by {_signal_name(-code)}")
        return End(code, self._stderr.text() if code else "")

    def process(self) -> tuple[str, int] | None:
        """Returns host and id of the process."""
        return None if self._process is None else (socket.gethostname(), self._process.pid)

    def stop(self) -> None:
        """Sends SIGTERM."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends the process if it has not ended, and closes what belongs to it."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._stderr is not None:
            self._stderr.text()
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process = self._stderr = None


class _StderrReader:
    """Reads what a process says: shows it at once, but keeps the error it ends with, which others may say, too."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        self._error: list[str] = []
        self._thread = threading.Thread(target=self._listen, name="worker-messages", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        for line in self._stream or ():
            if self._error or line.startswith(ERROR_STARTS):
                self._error.append(line)
            else:
                tqdm.write(line, file=sys.stderr, end="")

    def text(self) -> str:
        """Returns the error, when the process has ended."""
        self._thread.join(timeout=10)  # a process of the process may still hold the pipe
        return "".join(self._error)[-MOST_TEXT:].strip().removeprefix("error: ")


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    return f"signal {number}" + (f" ({name})" if name else "")


def thread_variables(threads: int) -> dict[str, str]:
    """Returns the variables that give a process so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
