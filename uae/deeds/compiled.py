"""How kernels are compiled: lazily, without the interpreter lock, and with a cache on disk."""

from __future__ import annotations

from collections.abc import Callable

from numba import njit


def compile_kernel(function: Callable) -> Callable:
    """Compile with the disk cache where a folder for it can be written, else without."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)
