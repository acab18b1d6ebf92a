"""Wall time, CPU time and peak memory of a child process that does one job, so that the figures are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uae.errors import ResourceError

_WATCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
json.dump([used.ru_maxrss, used.ru_utime + used.ru_stime], open(sys.argv[1], "w"))
sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
"""
"""A small process between: a child is born with its parent's peak memory, and the parent holds volumes."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip


@dataclass(frozen=True)
class ChildRun:
    """What a finished child used.

    seconds: wall time of the whole process, starting Python and importing included.
    cpu_seconds: user and system time of it and its own children; None where the system does not tell (Windows).
    peak_mb: largest resident memory, 10^6 bytes; None likewise.
    output: what it printed, standard output and error together.
    """

    seconds: float
    cpu_seconds: float | None
    peak_mb: float | None
    output: str


def thread_environment(threads: int) -> dict[str, str]:
    """Environment that bounds the threads of every numerical library a child may load."""
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


_LIVE: set[subprocess.Popen] = set()
_LOCK = threading.Lock()


def end_children() -> None:
    """Kill all children that `run_child` has running in other threads: their callers then get a ResourceError."""
    with _LOCK:
        for process in _LIVE:
            _end(process)


def run_child(
    command: Sequence[str], environment: Mapping[str, str], what: str, timeout_s: float | None = None
) -> ChildRun:
    """Run a command to its end and measure it.

    Args:
        command: program and arguments.
        environment: variables added to the inherited ones.
        what: its name in an error.
        timeout_s: it is killed after this many seconds.

    Raises:
        ResourceError: it ended with an error or was killed; the message ends with the last it printed.
    """
    with tempfile.TemporaryDirectory(prefix="uae-bench-") as folder:
        told = Path(folder) / "used.json"
        watched = [] if os.name == "nt" else [sys.executable, "-c", _WATCH, str(told)]
        start = time.perf_counter()
        # A group of its own, so that a timeout ends the watched program too.
        process = subprocess.Popen(
            [*watched, *command], env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        with _LOCK:
            _LIVE.add(process)
        try:
            raw, _ = process.communicate(timeout=timeout_s)
        except BaseException as error:
            _end(process)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ResourceError(f"{what}: stopped after {timeout_s:.0f} s") from None
            raise
        finally:
            with _LOCK:
                _LIVE.discard(process)
        seconds = time.perf_counter() - start
        output = raw.decode(errors="replace")
        if process.returncode:
            tail = " ".join(output.split())[-400:]
            raise ResourceError(f"{what}: ended with code {process.returncode}: {tail}")
        if not told.is_file():
            return ChildRun(seconds, None, None, output)
        peak, cpu = json.loads(told.read_text(encoding="utf-8"))
        unit = 1.0 if sys.platform == "darwin" else 1024.0
        return ChildRun(seconds, float(cpu), peak * unit / 1e6, output)


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all of its group."""
    if os.name == "nt":
        process.kill()
        return
    import signal
    from contextlib import suppress

    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
