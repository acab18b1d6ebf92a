"""Looking features up by position: where the cells of a level lie, and linear interpolation between them."""

from __future__ import annotations

import math

import numpy as np

from uae.geometry import Geometry


def level_geometry(geometry: Geometry, shape: tuple[int, ...]) -> Geometry:
    """Grid of an output level: cell k of stride s lies at s k + (s-1)/2 network voxels on each axis.

    Args:
        geometry: the network grid.
        shape: (z, y, x) of the level; divides the network grid's shape.

    Raises:
        ValueError: it does not divide it.
    """
    if any(n <= 0 or whole % n for whole, n in zip(geometry.shape, shape, strict=True)):
        raise ValueError(f"a level of {shape} cells on a grid of {geometry.shape}")
    stride = np.array([whole // n for whole, n in zip(geometry.shape, shape, strict=True)][::-1], dtype=np.float64)
    origin = geometry.index_to_mm((stride - 1) / 2)[0]
    return Geometry(tuple(shape), geometry.spacing * stride, origin, geometry.direction)


def interpolation(fine: int, coarse: int) -> np.ndarray:
    """Linear interpolation by position along one axis, clamped at the ends: (fine, coarse) float32."""
    index = np.clip((np.arange(fine) + 0.5) * coarse / fine - 0.5, 0, coarse - 1)
    low = np.minimum(index.astype(int), max(coarse - 2, 0))
    weights = np.zeros((fine, coarse), dtype=np.float32)
    rows = np.arange(fine)
    weights[rows, np.minimum(low + 1, coarse - 1)] = index - low
    weights[rows, low] += 1 - (index - low)
    return weights


def trilinear(index: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Flat corner indices and weights, each (8, N), at continuous indices (N, 3) z, y, x, clamped to the grid."""
    size = np.array(shape)
    index = np.clip(index, 0, size - 1)
    low = np.minimum(index.astype(np.intp), np.maximum(size - 2, 0))
    share = index - low
    corners, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        offset = np.array(corner)
        corners.append(np.ravel_multi_index(tuple(np.minimum(low + offset, size - 1).T), shape))
        weights.append(np.where(offset, share, 1 - share).prod(axis=1))
    return np.stack(corners), np.stack(weights).astype(np.float32)


def single(half: np.ndarray) -> np.ndarray:
    """Half to single precision, C order; torch converts many times faster than NumPy."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(half)).float().numpy()


def gather(values: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum (N, C) of the vectors of `values` (C, z, y, x) at corners (8, N)."""
    flat = values.reshape(len(values), -1)
    total = np.zeros((corners.shape[1], len(values)), dtype=np.float32)
    for corner, weight in zip(corners, weights, strict=True):
        used = np.flatnonzero(weight)  # at a cell's centre seven of eight corners have no weight
        if len(used):
            total[used] += weight[used, None] * single(flat[:, corner[used]].T)
    return total


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Heads (n, C_i) at unit length, side by side, over the square root of their number: float32 (n, D)."""
    scale = 1.0 / math.sqrt(len(parts))
    unit = [part * (scale / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)) for part in parts]
    return np.concatenate(unit, axis=1)
