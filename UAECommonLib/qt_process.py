"""A child process of the application: QProcess, whose event loop delivers."""

from __future__ import annotations

import os
import signal
from typing import Any

from uae.errors import InputError, ResourceError
from UAECommonLib.process import GRACE_S, Runner, child_environment, kill_tree_on_windows

__all__ = ["QtRunner"]


class QtRunner(Runner):
    """One QProcess at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._process: Any = None
        self._ended_process: Any = None

    @property
    def running(self) -> bool:
        """Whether a child runs whose end has not been told yet."""
        return self._process is not None

    def _start(self, program: str, arguments: list[str]) -> None:
        import qt
        import slicer

        process = qt.QProcess()
        environment = qt.QProcessEnvironment.systemEnvironment()
        for name, value in child_environment().items():
            environment.insert(name, value)
        process.setProcessEnvironment(environment)
        process.connect("readyReadStandardOutput()", self._read)
        process.connect("readyReadStandardError()", self._read)
        process.connect("finished(int,QProcess::ExitStatus)", self._on_process_finished)
        self._process = process
        process.start(program, arguments)
        if not process.waitForStarted(10_000):
            self._process = None
            raise InputError(f"{program} cannot be started ({process.errorString()}); repair the installation")
        slicer.app.connect("aboutToQuit()", self.kill)

    def _read(self) -> None:
        if self._process is not None:
            self._received("out", bytes(self._process.readAllStandardOutput().data()))
        if self._process is not None:
            self._received("err", bytes(self._process.readAllStandardError().data()))

    def _on_process_finished(self, exit_code: int, _status: Any) -> None:
        import slicer

        if self._process is None:
            return
        self._read()
        # PythonQt deletes a process with its last name, and it is still telling that it ended
        self._ended_process, self._process = self._process, None
        slicer.app.disconnect("aboutToQuit()", self.kill)
        self._ended(int(exit_code))

    def write(self, line: str) -> None:
        """Send one line to the child's standard input; ResourceError where it has ended."""
        if self._process is None or self._process.write(line.encode("utf-8") + b"\n") < 0:
            raise ResourceError("the helper process has ended; try again")

    def pump(self, timeout: float = 0.0) -> None:
        """Deliver what has arrived; wait up to `timeout` seconds for something (the console waits this way)."""
        if self._process is not None:
            self._process.waitForReadyRead(int(1000 * timeout))
            self._read()
        if self._process is not None and not self._process.processId():
            self._on_process_finished(self._process.exitCode(), None)

    def cancel(self) -> None:
        """Ask the child to stop; a timer kills it where it does not."""
        import qt

        process = self._process
        if process is None or self.cancelled:
            return
        self.cancelled = True
        if os.name == "nt":
            self.kill()
            return
        self._signal_child(signal.SIGTERM)
        qt.QTimer.singleShot(int(1000 * GRACE_S), lambda: self.kill() if self._process is process else None)

    def kill(self) -> None:
        """End the child and its launcher now and wait until both are gone."""
        process = self._process
        if process is None:
            return
        self.cancelled = True
        if os.name == "nt":
            kill_tree_on_windows(int(process.processId()))
        else:
            self._signal_child(signal.SIGKILL)
        process.kill()
        process.waitForFinished(5_000)
        if self._process is process:
            self._on_process_finished(process.exitCode(), None)
