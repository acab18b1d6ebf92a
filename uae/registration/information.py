"""Mutual information of two scans over sampled points, as Mattes et al. (2003) estimate it: one joint histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from uae.volume import Geometry

BINS = 32  # our measurement
TAILS = (0.5, 99.5)
LEAST_SHARE = 0.1
"""With fewer of the points inside the moving body there is no information: what is left could agree by chance."""


class JointHistogram:
    """Mutual information between fixed values at points and a moving image under a linear map.

    Fixed values fall into the nearest bin; moving ones are shared linearly by two bins, which keeps the estimate
    continuous. Points that leave the moving body are left out.
    """

    def __init__(
        self, fixed_values: np.ndarray, points: np.ndarray, moving: np.ndarray, moving_body: np.ndarray, grid: Geometry
    ) -> None:
        """Take over the samples.

        Args:
            fixed_values: (N,) intensities of the fixed scan.
            points: (N, 3) mm, where they are.
            moving: (z, y, x) intensities.
            moving_body: bool (z, y, x).
            grid: of the moving image.
        """
        self.points, self.moving, self.body, self.grid = points, moving, moving_body, grid
        self.rows = np.rint(_in_bins(fixed_values, np.percentile(fixed_values, TAILS))).astype(np.int64)
        self.bounds = np.percentile(moving[moving_body] if moving_body.any() else moving, TAILS)

    def __call__(self, matrix: np.ndarray) -> float:
        """Mutual information in nats under a 4x4 map from the points to the moving grid; 0 where too few lie inside."""
        index = self.grid.mm_to_index(self.points @ matrix[:3, :3].T + matrix[:3, 3])
        inside = self.grid.index_inside(index)
        x, y, z = np.clip(np.rint(index[inside]), 0, self.grid.size - 1).astype(np.int64).T
        kept = np.flatnonzero(inside)[self.body[z, y, x]]
        if len(kept) < LEAST_SHARE * len(self.points) or not len(kept):
            return 0.0
        values = ndimage.map_coordinates(self.moving, index[kept].T[::-1], order=1, mode="nearest", prefilter=False)
        column = _in_bins(values, self.bounds)
        low = np.minimum(column.astype(np.int64), BINS - 2)
        share = column - low
        cell = self.rows[kept] * BINS + low
        counts = np.bincount(cell, 1.0 - share, BINS**2) + np.bincount(cell + 1, share, BINS**2)
        return information_of(counts.reshape(BINS, BINS))


def information_of(counts: np.ndarray) -> float:
    """Mutual information in nats of a joint histogram (rows, columns) of counts."""
    joint = counts / counts.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / apart[filled])).sum())


def _in_bins(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Values (N,) as positions 0..BINS - 1 between two bounds."""
    low, high = (float(bound) for bound in bounds)
    return np.clip((values - low) / max(high - low, 1e-6) * (BINS - 1), 0.0, BINS - 1.0)
