"""Which kernels run (numba or numpy), and how the solver's threads are stopped and watched."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from types import ModuleType

from uae.errors import CancelledError, InputError

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def numba_kernels() -> ModuleType | None:
    """The compiled kernels, or None (announced once) where numba cannot be imported."""
    try:
        from uae.deeds import kernels
    except ImportError as error:
        logger.warning(
            "numba is not usable (%s): DEEDS runs the exact but slower numpy code; install the extra [fast] for speed",
            error,
        )
        return None
    return kernels


def resolve_backend(name: str = "auto") -> str:
    """Turn 'auto', 'numba' or 'numpy' into 'numba' or 'numpy'.

    Raises:
        InputError: the name is unknown, or numba is asked for and missing.
    """
    if name not in ("auto", "numba", "numpy"):
        raise InputError(f"unknown DEEDS backend {name!r}; use auto, numba or numpy")
    if name == "numpy":
        return name
    if numba_kernels() is not None:
        return "numba"
    if name == "numba":
        raise InputError("numba is not installed; install the extra [fast] or choose the backend auto")
    return "numpy"


class Work:
    """Progress and the wish to stop, shared by the threads of one registration.

    The kernels run in chunks of well under a second and call `done` after each of them.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._units = 0.0

    @property
    def units(self) -> float:
        """Work done so far, in the caller's units."""
        return self._units

    def stop(self) -> None:
        """Make every thread leave at its next chunk."""
        self._stop.set()

    def check(self) -> None:
        """Raise CancelledError where the work was stopped."""
        if self._stop.is_set():
            raise CancelledError("cancelled by the user; nothing was written")

    def done(self, units: float) -> None:
        """Count a finished chunk, and leave where the work was stopped."""
        with self._lock:
            self._units += units
        self.check()
