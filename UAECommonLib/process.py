"""A child process that runs `uae`, behind one interface: QProcess in the application, subprocess elsewhere.

Its standard output is JSON lines, handed over as mappings in the main thread; its standard error is the log. In the
application the event loop delivers them; elsewhere whoever waits calls `pump` or `wait`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from uae.errors import InputError, ResourceError
from uae.paths import ROOT, child_environment

__all__ = ["Runner", "SubprocessRunner", "child_environment", "kill_tree_on_windows", "make_runner", "python_program"]

logger = logging.getLogger(__name__)

GRACE_S = 3.0
"""Time that a cancelled child has to remove what it has half written, before it is killed."""
LOG_CHARACTERS = 20_000
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from uae.child import run; sys.exit(run(sys.argv[2], sys.argv[3:]))"
)
"""The running `uae` comes first: PythonSlicer, a launcher, puts its own folders before PYTHONPATH."""

OnLine = Callable[[dict[str, Any]], None]
OnLog = Callable[[str], None]
OnFinished = Callable[[int], None]


def python_program() -> str:
    """The Python of the application (PythonSlicer) or the one that runs.

    Raises:
        InputError: neither is known.
    """
    inside = "slicer" in sys.modules and getattr(sys.modules["slicer"], "app", None) is not None
    found = shutil.which("PythonSlicer") if inside else None
    if found is None and inside and hasattr(sys.modules["slicer"].app, "slicerHome"):
        found = shutil.which(str(Path(sys.modules["slicer"].app.slicerHome) / "bin" / "PythonSlicer"))
    found = found or sys.executable
    if not found:
        raise InputError("PythonSlicer was not found beside the application; repair the installation of 3D Slicer")
    return found


def make_runner() -> Runner:
    """A runner for where we are: QProcess where an application's event loop runs, else subprocess."""
    slicer = sys.modules.get("slicer")
    if slicer is not None and getattr(slicer, "app", None) is not None:
        try:
            import qt

            if hasattr(qt, "QProcess"):
                from UAECommonLib.qt_process import QtRunner

                return QtRunner()
        except ImportError:
            logger.debug("no Qt here: children run through subprocess")
    return SubprocessRunner()


class Runner:
    """One child process at a time.

    Attributes:
        log: the end of the child's standard error.
        cancelled: whether `cancel` or `kill` ended it.
        exit_code: of the last child, None while it runs; 130 where it was cancelled.
    """

    def __init__(self) -> None:
        self.log = ""
        self.cancelled = False
        self.exit_code: int | None = None
        self._child_pid: int | None = None
        self._on_line: OnLine | None = None
        self._on_log: OnLog | None = None
        self._on_finished: OnFinished | None = None
        self._rest = {"out": b"", "err": b""}

    @property
    def running(self) -> bool:
        """Whether a child runs whose end has not been told yet."""
        raise NotImplementedError

    def start(
        self,
        arguments: Sequence[str],
        on_line: OnLine | None = None,
        on_finished: OnFinished | None = None,
        on_log: OnLog | None = None,
        folder: str | Path = "",
    ) -> None:
        """Run `uae` with arguments.

        Args:
            arguments: such as ["register", fixed, moving, "--output", folder, "--progress", "json"].
            on_line: told each JSON line of the standard output.
            on_finished: told the exit code, once, after the last line; 130 where it was cancelled.
            on_log: told each line of the standard error.
            folder: the job's temporary files, which the child removes where this process vanishes.

        Raises:
            InputError: a child runs already, or Python cannot be started.
        """
        if self.running:
            raise InputError("the helper process still runs; wait for it or cancel it first")
        self.log, self.cancelled, self.exit_code, self._child_pid = "", False, None, None
        self._rest = {"out": b"", "err": b""}
        self._on_line, self._on_finished, self._on_log = on_line, on_finished, on_log
        self._start(python_program(), ["-c", PROGRAM, ROOT, str(folder), *map(str, arguments)])

    def write(self, line: str) -> None:
        """Send one line to the child's standard input.

        Raises:
            ResourceError: the child has ended.
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Ask the child to stop and to clean up; it is killed where it does not. Returns at once."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the child and everything it started now, and wait until it is gone; on_finished is told."""
        raise NotImplementedError

    def pump(self, timeout: float = 0.0) -> None:
        """Deliver what has arrived; wait up to `timeout` seconds for something."""
        raise NotImplementedError

    def wait(self, until: Callable[[], bool] | None = None, timeout: float | None = None) -> bool:
        """Pump until a condition holds (the child's end where None), for at most `timeout` seconds.

        Returns:
            Whether the condition holds.
        """
        done = until or (lambda: not self.running)
        end = None if timeout is None else time.monotonic() + timeout
        while not done():
            if not self.running or (end is not None and time.monotonic() >= end):
                return done()
            self.pump(0.05)
        return True

    def _start(self, program: str, arguments: list[str]) -> None:
        raise NotImplementedError

    def _received(self, stream: str, data: bytes, last: bool = False) -> None:
        """Take bytes of "out" or "err" and hand over the whole lines."""
        *lines, rest = (self._rest[stream] + data).split(b"\n")
        if last and rest:
            lines, rest = [*lines, rest], b""
        self._rest[stream] = rest
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip("\r")
            if text.strip():
                self._line(stream, text)

    def _line(self, stream: str, text: str) -> None:
        record = _as_record(text) if stream == "out" else None
        if record is None:
            self.log = (self.log + text + "\n")[-LOG_CHARACTERS:]
            self._tell(self._on_log, text)
        elif self._child_pid is None and set(record) == {"pid"}:
            self._child_pid = record["pid"]
        else:
            self._tell(self._on_line, record)

    def _ended(self, exit_code: int) -> None:
        for stream in ("out", "err"):
            self._received(stream, b"", last=True)
        self.exit_code = 130 if self.cancelled else exit_code
        on_finished, self._on_finished = self._on_finished, None
        self._tell(on_finished, self.exit_code)

    def _signal_child(self, number: int) -> None:
        """Send a signal to the group of the Python that works."""
        if self._child_pid is not None and hasattr(os, "killpg"):
            try:
                os.killpg(self._child_pid, number)
            except (ProcessLookupError, PermissionError):
                logger.debug("process group %d is gone", self._child_pid)

    @staticmethod
    def _tell(listener: Callable[[Any], None] | None, value: Any) -> None:
        if listener is not None:
            try:
                listener(value)
            except Exception:  # a listener's mistake must not stop the delivery of the next lines
                logger.exception("a listener of the helper process failed")


def _as_record(text: str) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def kill_tree_on_windows(pid: int) -> None:
    """End a process and all that it started."""
    subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], capture_output=True, check=False)


class SubprocessRunner(Runner):
    """Two threads read; `pump` delivers in the thread that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self._process: subprocess.Popen[bytes] | None = None
        self._arrived: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._open_streams = 0
        self._kill_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether a child runs whose end has not been told yet."""
        return self._process is not None

    def _start(self, program: str, arguments: list[str]) -> None:
        try:
            process = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **child_environment()},
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(f"{program} cannot be started ({error}); repair the installation") from error
        self._process, self._kill_at, self._open_streams = process, None, 2
        self._arrived = queue.SimpleQueue()
        for name, stream in (("out", process.stdout), ("err", process.stderr)):
            threading.Thread(target=self._collect, args=(name, stream, self._arrived), daemon=True).start()

    @staticmethod
    def _collect(name: str, stream: Any, arrived: queue.SimpleQueue[tuple[str, bytes]]) -> None:
        while data := stream.read1(1 << 16):
            arrived.put((name, data))
        arrived.put((name, b""))

    def write(self, line: str) -> None:
        """Send one line to the child's standard input; ResourceError where it has ended."""
        try:
            if self._process is None:
                raise BrokenPipeError
            self._process.stdin.write(line.encode("utf-8") + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise ResourceError("the helper process has ended; try again") from error

    def pump(self, timeout: float = 0.0) -> None:
        """Deliver what has arrived; wait up to `timeout` seconds for something."""
        block = timeout > 0
        while self._process is not None:
            try:
                name, data = self._arrived.get(block=block, timeout=timeout if block else None)
            except queue.Empty:
                break
            block = False
            if data:
                self._received(name, data)
            else:
                self._open_streams -= 1
            if self._open_streams == 0:
                self._finish()
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()

    def _finish(self) -> None:
        process, self._process, self._kill_at = self._process, None, None
        code = process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            try:
                stream.close()
            except OSError:
                logger.debug("unsent requests of an ended process are dropped")
        self._ended(code)

    def _send(self, number: int) -> None:
        if os.name == "nt":
            kill_tree_on_windows(self._process.pid)
            return
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            logger.debug("process group %d is gone", self._process.pid)

    def cancel(self) -> None:
        """Ask the child to stop; `pump` kills it where it does not."""
        if self._process is not None and self._kill_at is None:
            self.cancelled = True
            self._kill_at = time.monotonic() + GRACE_S
            self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End the child now and wait until it is gone."""
        if self._process is None:
            return
        self.cancelled, self._kill_at = True, None
        self._send(getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.wait()
        while self._process is not None:
            self.pump(0.05)
