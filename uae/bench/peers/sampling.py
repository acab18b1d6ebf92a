"""Scans on isotropic grids, for peers that need one grid or would take hours on the scanner's."""

from __future__ import annotations

import numpy as np

from uae.bench.peers.job import Scan

SPACING_MM = 2.0


def isotropic(scan: Scan) -> Scan:
    """The grid of SPACING_MM over a scan's box along its own axes (its array is empty memory)."""
    extent = scan.size * scan.spacing
    size = np.maximum(np.rint(extent / SPACING_MM).astype(int), 1)
    first = scan.to_mm((((extent - (size - 1) * SPACING_MM) / 2) / scan.spacing - 0.5)[None])[0]
    return Scan(np.zeros(size[::-1], np.float32), np.full(3, SPACING_MM), first, scan.direction)


def sampled(scan: Scan, grid: Scan) -> np.ndarray:
    """Values (z, y, x) float32 of a scan at the voxels of a grid, linear; the scan's minimum outside."""
    from scipy import ndimage

    index = scan.to_index(grid.grid_mm())[:, ::-1].T
    values = ndimage.map_coordinates(scan.array, index, order=1, mode="nearest")
    sizes = np.array(scan.array.shape)[:, None]
    outside = ((index < -0.5) | (index > sizes - 0.5)).any(axis=0)
    values[outside] = scan.array.min()
    return values.reshape(grid.array.shape).astype(np.float32)
