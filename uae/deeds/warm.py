"""Compile the kernels before they are needed, beside something else."""

from __future__ import annotations

import logging
import threading
from functools import lru_cache

import numpy as np

from uae.deeds.backend import give_up_numba, numba_kernels, resolve_backend
from uae.deeds.presets import Level, Preset

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Run every compiled kernel once on a tiny pair.

    The first time on a machine it takes half a minute of compiling, later a second, since the code is kept on disk.
    """
    if numba_kernels() is None:
        return
    from uae.deeds.solver import register
    from uae.volume import Geometry, Volume

    rng = np.random.default_rng(0)
    geometry = Geometry((16, 16, 16), np.full(3, 2.0), np.zeros(3), np.eye(3))
    image = Volume(rng.standard_normal(geometry.shape).astype(np.float32), geometry, "mr")
    mask = Volume((np.arange(16) > 3).astype(np.uint8) * np.ones(geometry.shape, np.uint8), geometry)
    for border in ("neutral", "edge"):
        preset = Preset("warm-up", (Level(4, 1, 1), Level(4, 2, 1)), "compiles the kernels", border=border)
        result = register(image, image, preset=preset, fixed_mask=mask, backend="numba")
    _ = result.inverse


_one_at_a_time = threading.Lock()


def usable_backend(name: str) -> str:
    """`resolve_backend`, and numpy where the choice is free and the kernels turn out not to compile.

    Raises:
        InputError: the name is unknown, or numba is asked for and missing.
    """
    if name == "auto" or name.startswith("torch"):
        try:
            with _one_at_a_time:
                warm_up()
        except Exception as error:
            give_up_numba(error)
    return resolve_backend(name)


def warm_up_in_background() -> threading.Thread:
    """Start `warm_up` in a thread that neither delays the end of the program nor fails anybody."""

    def run() -> None:
        try:
            with _one_at_a_time:
                warm_up()
        except Exception:
            logger.debug("the DEEDS kernels could not be compiled in advance", exc_info=True)

    thread = threading.Thread(target=run, name="deeds-warm-up", daemon=True)
    thread.start()
    return thread
