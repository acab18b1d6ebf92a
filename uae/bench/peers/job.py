"""The files between the benchmark and a peer's process: two images on their grids, starts, settings; a transform back.

Only numpy is imported here: the process may run in an interpreter of its own, with no more than the peer needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Scan:
    """An image on its grid: array (z, y, x) float32; spacing (3,), origin (3,) LPS mm; direction (3, 3) in columns."""

    array: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray

    @classmethod
    def on(cls, grid: Any, array: np.ndarray | None = None) -> Scan:
        """An image on the grid (spacing, origin, direction) of a geometry or another scan; None: only its place."""
        array = np.broadcast_to(np.uint8(0), grid.shape) if array is None else array
        return cls(array, grid.spacing, grid.origin, grid.direction)

    @property
    def shape(self) -> tuple[int, ...]:
        """(z, y, x) voxels."""
        return self.array.shape

    @property
    def steps(self) -> np.ndarray:
        """(3, 3) mm of one index step along x, y, z in its columns."""
        return self.direction * self.spacing

    @property
    def size(self) -> np.ndarray:
        """(3,) voxels along x, y, z."""
        return np.array(self.array.shape[::-1], dtype=np.float64)

    def to_mm(self, index: np.ndarray) -> np.ndarray:
        """Continuous indices (N, 3) x, y, z to LPS mm (N, 3)."""
        return np.asarray(index, dtype=np.float64) @ self.steps.T + self.origin

    def to_index(self, points: np.ndarray) -> np.ndarray:
        """LPS mm (N, 3) to continuous indices (N, 3) x, y, z."""
        return (np.asarray(points, dtype=np.float64) - self.origin) @ np.linalg.inv(self.steps).T

    def grid_mm(self) -> np.ndarray:
        """(z*y*x, 3) LPS mm of all voxel centres in the array's C order."""
        z, y, x = np.meshgrid(*(np.arange(n) for n in self.array.shape), indexing="ij")
        return self.to_mm(np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1))

    def carried(self, matrix: np.ndarray) -> Scan:
        """The same voxels with the header moved by a rigid 4x4 matrix: no voxel is resampled."""
        rotation = matrix[:3, :3]
        return Scan(self.array, self.spacing, rotation @ self.origin + matrix[:3, 3], rotation @ self.direction)


@dataclass
class Job:
    """What a peer is asked.

    reference: the image whose grid is sampled (ITK's "fixed"). other: the one that is read through the transform.
    starts: (K, 4, 4) rigid maps reference -> other, LPS mm; all are tried and the best is kept.
    peer, method: which program, and "rigid", "affine" or "deformable". threads, seed: of the run.
    """

    peer: str
    method: str
    reference: Scan
    other: Scan
    starts: np.ndarray
    threads: int = 1
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a peer found: a map reference -> other in LPS mm.

    matrix: (4, 4), the whole map where `vectors` is None, else unused.
    vectors: (z, y, x, 3) float32 mm, x -> x + vectors(x) on `grid` (a Scan whose array is not used), None if linear.
    score: the peer's own last figure or the choice's, for the record. seconds: registration without reading.
    """

    matrix: np.ndarray
    vectors: np.ndarray | None = None
    grid: Scan | None = None
    info: dict[str, Any] = field(default_factory=dict)


_GRID = ("spacing", "origin", "direction")


def write_job(path: str | Path, job: Job) -> None:
    """Write a job as one uncompressed .npz."""
    arrays = {"starts": np.asarray(job.starts, dtype=np.float64).reshape(-1, 4, 4)}
    for name in ("reference", "other"):
        scan = getattr(job, name)
        arrays[name] = np.ascontiguousarray(scan.array, dtype=np.float32)
        arrays |= {f"{name}_{key}": np.asarray(getattr(scan, key), dtype=np.float64) for key in _GRID}
    words = {key: getattr(job, key) for key in ("peer", "method", "threads", "seed", "options")}
    np.savez(path, words=json.dumps(words), **arrays)


def read_job(path: str | Path) -> Job:
    """Read what `write_job` wrote."""
    with np.load(path) as stored:
        scans = {
            name: Scan(stored[name], *(stored[f"{name}_{key}"] for key in _GRID)) for name in ("reference", "other")
        }
        return Job(starts=stored["starts"], **scans, **json.loads(str(stored["words"])))


def write_outcome(path: str | Path, outcome: Outcome) -> None:
    """Write a result as one .npz."""
    arrays: dict[str, Any] = {"matrix": np.asarray(outcome.matrix, dtype=np.float64)}
    if outcome.vectors is not None:
        arrays["vectors"] = np.asarray(outcome.vectors, dtype=np.float32)
        arrays |= {key: np.asarray(getattr(outcome.grid, key), dtype=np.float64) for key in _GRID}
    np.savez(path, info=json.dumps(outcome.info), **arrays)


def read_outcome(path: str | Path) -> Outcome:
    """Read what `write_outcome` wrote."""
    with np.load(path) as stored:
        info: Mapping[str, Any] = json.loads(str(stored["info"]))
        if "vectors" not in stored:
            return Outcome(stored["matrix"], info=dict(info))
        vectors = stored["vectors"]
        grid = Scan(np.zeros(vectors.shape[:3], np.uint8), *(stored[key] for key in _GRID))
        return Outcome(stored["matrix"], vectors, grid, dict(info))
