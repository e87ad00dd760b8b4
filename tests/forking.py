"""Python processes that start in a few milliseconds: forked from a server that has imported the toolkit once.

Importing torch and all the rest takes seconds, and tests that kill processes start dozens. A forked process is one of
its own, with its own arguments, folder, variables, files, session and signals: only its imports come from the server.
What it starts itself as `python ...` is forked from the same server, so workers of a command cost no more than it does.
Tests beside these start the command line and its workers for real.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
MOST = 1 << 20  # bytes of a question


class Forked:
    """A forked process, used as a `subprocess.Popen` is."""

    def __init__(self, server: str, words: Sequence[str], files: Sequence[int], **how: Any) -> None:
        self._server = server
        self.pid = int(_ask(server, {"start": {"words": [*words], **how}}, files))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, minus the signal that killed it; None while it runs."""
        if self.returncode is None:
            self.returncode = _ask(self._server, {"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        """Returns the exit code when the process has ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9."""
        self.send_signal(signal.SIGKILL)


class Told(Forked):
    """A process that a test has started: what it writes goes into two files."""

    def __init__(self, server: str, folder: Path, words: Sequence[str], **how: Any) -> None:
        self._written = [folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err")]
        with open(os.devnull) as nothing, self._written[0].open("w") as out, self._written[1].open("w") as err:
            super().__init__(server, words, [nothing.fileno(), out.fileno(), err.fileno()], **how)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Returns what it has written to stdout and stderr when it has ended."""
        self.wait(timeout)
        return self._written[0].read_text(), self._written[1].read_text()


class Started(Forked):
    """A worker that a forked command has started: it holds a pipe to its stdin and one from its stderr."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], errors: str, start_new_session: bool) -> None:
        (its_stdin, my_stdin), (my_stderr, its_stderr) = os.pipe(), os.pipe()
        how = {"cwd": os.getcwd(), "environment": dict(env), "strict": False, "session": start_new_session}
        with open(os.devnull, "w") as nothing:
            super().__init__(os.environ["FORK_SERVER"], command[1:], [its_stdin, nothing.fileno(), its_stderr], **how)
        os.close(its_stdin)
        os.close(its_stderr)
        self.stdin: IO[str] = os.fdopen(my_stdin, "w")
        self.stderr: IO[str] = os.fdopen(my_stderr, errors=errors)


class ForkingPopen(subprocess.Popen[Any]):
    """In a forked process, what starts workers as the toolkit does forks them, too; anything else is started."""

    def __new__(cls, command: Any, *_: Any, **how: Any) -> Any:
        """Returns a `Started` for a command of this Python with the pipes of a worker."""
        pipes = (how.pop("stdin", None), how.pop("stdout", None), how.pop("stderr", None), how.pop("text", None))
        if pipes == (subprocess.PIPE, subprocess.DEVNULL, subprocess.PIPE, True) and command[0] == sys.executable:
            return Started(command, **how)
        return super().__new__(cls)


def start(*words: object, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, strict: bool = False) -> Told:
    """Starts `python *words`: `-m module`, `-c code` or a file, and arguments. `strict`: as with `-W error`."""
    folder = _server()
    address = str(folder / "socket")
    variables = {**(os.environ if environment is None else environment), "FORK_SERVER": address}
    how: dict[str, Any] = {"cwd": str(cwd), "environment": variables, "strict": strict, "session": False}
    return Told(address, folder, [*map(str, words)], **how)


def alive(variable: str) -> list[int]:
    """Returns the forked processes that live and were given this variable, as `NAME=value`: none shows its own."""
    found: list[int] = _ask(str(_server() / "socket"), {"alive": variable})
    return found


@cache
def _server() -> Path:
    """Starts the server; returns its folder. It ends with this process, whose end closes its standard input."""
    folder = Path(tempfile.mkdtemp(prefix="forking-"))
    address = str(folder / "socket")
    server = subprocess.Popen([sys.executable, "-u", __file__, address], cwd=ROOT, stdin=subprocess.PIPE)
    atexit.register(_stop, server, folder)
    deadline = time.monotonic() + 120
    while not os.path.exists(address):
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    return folder


def _stop(server: subprocess.Popen[bytes], folder: Path) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)
    shutil.rmtree(folder)


def _ask(server: str, question: dict[str, Any], files: Sequence[int] = ()) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server)
        socket.send_fds(connection, [json.dumps(question).encode()], files)
        return json.loads(connection.recv(MOST))


def _serve(address: str) -> list[str]:
    """Answers until stdin ends; returns only in a forked process, which has become what was asked for: its words."""
    started: dict[int, list[str]] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(address)
        door.listen(64)
        while door in select.select([door, sys.stdin], [], [])[0]:
            connection, _ = door.accept()
            with connection:
                data, files, _, _ = socket.recv_fds(connection, MOST, 3)
                question = json.loads(data)
                if "start" in question:
                    given = question["start"]
                    answer: Any = os.fork()
                    if answer == 0:
                        _become(files, **given)
                        return list(given["words"])
                    started[answer] = [f"{name}={value}" for name, value in given["environment"].items()]
                elif "poll" in question:
                    pid, status = os.waitpid(question["poll"], os.WNOHANG)
                    answer = os.waitstatus_to_exitcode(status) if pid else None
                    started.pop(pid, None)
                else:
                    mine = [pid for pid, variables in started.items() if question["alive"] in variables]
                    answer = [pid for pid in mine if _runs(pid)]
                for file in files:
                    os.close(file)
                connection.send(json.dumps(answer).encode())
    os._exit(0)


def _runs(child: int) -> bool:
    """Whether a child that was not waited for has not ended."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _become(
    files: Sequence[int], words: list[str], cwd: str, environment: dict[str, str], strict: bool, session: bool
) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    subprocess.Popen = ForkingPopen  # type: ignore[misc,assignment]
    if session:
        os.setsid()
    if strict:
        warnings.simplefilter("error")


def _run(words: list[str]) -> None:
    """Runs what Python runs when it is given these words."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _exit_code(words: list[str]) -> int:
    """Runs it; returns the exit code that Python would have given."""
    try:
        _run(words)
    except SystemExit as ended:
        if isinstance(ended.code, int | None):
            return ended.code or 0
        print(ended.code, file=sys.stderr)  # noqa: T201
    except BaseException:
        traceback.print_exc()
    else:
        return 0
    return 1


def _end(code: int) -> NoReturn:
    """Ends as Python does, but for taking apart what the server had imported, which takes seconds."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.path.insert(1, str(ROOT))
    import torch

    from coar.cli.app import PANELS

    for commands in PANELS.values():
        for place in commands.values():
            importlib.import_module(place.partition(":")[0])  # else imported when it is first run, by each process
    import ablate
    import coar

    _USED = (ablate.run, coar.fit, coar.estimate)
    torch.set_num_threads(1)
    _end(_exit_code(_serve(sys.argv[1])))
