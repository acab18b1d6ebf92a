"""One registration in a process of its own, so that its time and peak memory are its own.

`python -m uae.bench.deeds_child JOB.json`: the job names the files of the pair, or the shape of a synthetic one, the
preset, the threads and where the field and the figures go.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from uae import deeds
from uae.deeds.warm import warm_up
from uae.volume import Geometry, Volume

SYNTHETIC_SHIFT = (3, -2, 4)


def synthetic(shape: tuple[int, int, int]) -> tuple[Volume, Volume]:
    """A random texture and the same a few voxels away, any size, at 2 mm."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal([-(-n // 4) + 4 for n in shape]).astype(np.float32)
    wide = 300.0 * ndimage.zoom(small, 4, order=1)
    geometry = Geometry(shape, np.full(3, 2.0), np.zeros(3), np.eye(3))
    parts = []
    for shift in ((0, 0, 0), SYNTHETIC_SHIFT):
        window = tuple(slice(5 + move, 5 + move + n) for n, move in zip(shape, shift))
        parts.append(Volume(np.ascontiguousarray(wide[window]), geometry, "mr"))
    return parts[0], parts[1]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Register, write the field where `field` says, and return the figures."""
    if "shape" in job:
        fixed, moving = synthetic(tuple(job["shape"]))
    else:
        fixed, moving = (Volume.read(job[name]) for name in ("fixed", "moving"))
        fixed.modality, moving.modality = job["modalities"]
    warm_up()
    start = time.perf_counter()
    result = deeds.register(fixed, moving, preset=job["preset"], threads=job["threads"])
    seconds = time.perf_counter() - start
    if job.get("field"):
        np.save(job["field"], result.field.vectors)
    return {
        "seconds": seconds,
        "stages": result.seconds,
        "levels": [level["seconds"] for level in result.levels],
        "backend": result.backend,
        "consistency_mm": result.consistency_mm,
    }


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(task["figures"]).write_text(json.dumps(run(task)), encoding="utf-8")
