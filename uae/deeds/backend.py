"""Which kernels run (numba or numpy), and how the solver's threads are stopped and watched."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from types import ModuleType

import numpy as np

from uae.errors import CancelledError, InputError

logger = logging.getLogger(__name__)


_gave_up = threading.Event()


def numba_kernels() -> ModuleType | None:
    """The compiled kernels, or None (announced once) where numba cannot be imported or cannot compile them."""
    return None if _gave_up.is_set() else _import_kernels()


def give_up_numba(error: Exception) -> None:
    """Use the numpy code from now on: the kernels cannot be compiled on this machine."""
    _gave_up.set()
    logger.warning("numba cannot compile here (%s): DEEDS runs the exact but slower numpy code", error)


@lru_cache(maxsize=1)
def _import_kernels() -> ModuleType | None:
    try:
        import numba  # noqa: F401  first, since the kernels' modules may have been imported while it was there

        from uae.deeds import kernels
    except ImportError as error:
        logger.warning(
            "numba is not usable (%s): DEEDS runs the exact but slower numpy code; install the extra [fast] for speed",
            error,
        )
        return None
    return kernels


def resolve_backend(name: str = "auto") -> str:
    """Turn 'auto' into 'numba' or 'numpy'; 'torch' and 'torch:DEVICE' become 'torch:DEVICE'.

    Raises:
        InputError: the name is unknown, or numba is asked for and missing.
    """
    if name.startswith("torch"):
        device = name.partition(":")[2] or "cpu"
        if name.split(":")[0] == "torch" and device.split(":")[0] in ("cpu", "cuda", "mps", "xpu"):
            return f"torch:{device}"
    if name not in ("auto", "numba", "numpy"):
        raise InputError(f"unknown DEEDS backend {name!r}; use auto, numba, numpy or torch:DEVICE")
    if name == "numpy":
        return name
    if numba_kernels() is not None:
        return "numba"
    if name == "numba":
        raise InputError("numba is not installed; install the extra [fast] or choose the backend auto")
    return "numpy"


def processor_backend(name: str) -> str:
    """The backend for what stays on the processor: the given one, or the best there is beside a torch device."""
    return resolve_backend("auto") if name.startswith("torch") else resolve_backend(name)


def torch_device(name: str) -> str | None:
    """The device of a resolved torch backend, None of any other."""
    return name.partition(":")[2] if name.startswith("torch:") else None


class Memory:
    """Arrays by name that one search uses again at every level: fresh memory costs a page fault every 4 KB.

    Two names are shared by arrays that are never needed together: "image" (the warped image, then the fixed words) and
    "scratch" (box sums, then the search window).
    """

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An uninitialised array of that shape; what an earlier call of the same name gave is overwritten."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays.pop(name, None)  # before the larger one is made
            self._arrays[name] = np.empty(size, np.uint8)
        return self._arrays[name][:size].view(dtype).reshape(shape)


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
