"""Where the peers start, and which of their results is kept: the same rules for all of them, numpy and scipy only."""

from __future__ import annotations

import numpy as np

from uae.bench.peers.job import Scan
from uae.registration.information import information_of

CT_WINDOW_HU = (-300.0, 400.0)
"""Soft tissue to trabecular bone: over the whole CT range 32 bins would not tell soft tissues apart; the same window as
our own refinement, so no system sees more than another."""
MR_PERCENTILES = (0.5, 99.5)
BINS = 32
LATTICE = 40_000
MINIMUM_SHARE = 0.25
"""Least share of the reference that must land in the other scan: mutual information of a sliver is high by chance."""


def windowed(array: np.ndarray, modality: str | None) -> np.ndarray:
    """Intensities clipped to where tissues differ, float32 (z, y, x); `modality` "ct" or "mr"."""
    values = np.asarray(array, dtype=np.float32)
    low, high = CT_WINDOW_HU if modality == "ct" else np.percentile(values, MR_PERCENTILES)
    return np.clip(values, np.float32(low), np.float32(high))


def shift(vector: np.ndarray) -> np.ndarray:
    """(4, 4) translation by (3,) mm."""
    matrix = np.eye(4)
    matrix[:3, 3] = vector
    return matrix


def geometry_start(reference: Scan, other: Scan) -> np.ndarray:
    """(4, 4) map reference -> other that puts the middles of the two boxes on each other."""
    middles = [scan.to_mm((scan.size - 1)[None] / 2)[0] for scan in (reference, other)]
    return shift(middles[1] - middles[0])


def moments_start(reference: Scan, other: Scan) -> np.ndarray:
    """(4, 4) map reference -> other that puts the centres of mass (of value above the minimum) on each other."""
    return shift(_mass(other) - _mass(reference))


def _mass(scan: Scan) -> np.ndarray:
    weight = scan.array.astype(np.float64) - float(scan.array.min())
    total = weight.sum()
    if total <= 0:
        return scan.to_mm((scan.size - 1)[None] / 2)[0]
    sums = [weight.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in (2, 1, 0)]
    return scan.to_mm(np.array([[(s * np.arange(len(s))).sum() / total for s in sums]]))[0]


def lattice(scan: Scan, count: int = LATTICE) -> np.ndarray:
    """About `count` evenly spread voxel indices (N, 3) x, y, z of a scan."""
    stride = max(1, round((scan.array.size / count) ** (1 / 3)))
    z, y, x = np.meshgrid(*(np.arange(0, n, min(stride, max(1, n // 8))) for n in scan.array.shape), indexing="ij")
    return np.stack([x.ravel(), y.ravel(), z.ravel()], axis=1)


def mutual_information(reference: Scan, other: Scan, mapped: np.ndarray, index: np.ndarray) -> float:
    """Mutual information (nats) of 32 x 32 bins between two scans.

    Args:
        reference: first image.
        other: second image, read at the nearest voxel.
        mapped: (N, 3) LPS mm in the other scan, images of the reference voxels `index`.
        index: (N, 3) voxel indices x, y, z of the reference.

    Returns:
        The information over the voxels that land inside; minus infinity where that is less than MINIMUM_SHARE.
    """
    cells = np.rint(other.to_index(mapped)).astype(np.int64)
    inside = np.all((cells >= 0) & (cells < other.size), axis=1)
    if inside.mean() < MINIMUM_SHARE:
        return -np.inf
    first = reference.array[tuple(index[inside, ::-1].T)]
    second = other.array[tuple(cells[inside, ::-1].T)]
    counts, _, _ = np.histogram2d(first, second, bins=BINS)
    return information_of(counts)


def matrix_of_points(images: np.ndarray, step: float = 100.0) -> np.ndarray:
    """(4, 4) matrix of a linear map from the images (4, 3) of the origin and of `step` mm along x, y and z."""
    matrix = np.eye(4)
    matrix[:3, 3] = images[0]
    matrix[:3, :3] = (images[1:] - images[0]).T / step
    return matrix


def probe_points(step: float = 100.0) -> np.ndarray:
    """(4, 3) points whose images `matrix_of_points` reads."""
    return np.vstack([np.zeros(3), step * np.eye(3)])
