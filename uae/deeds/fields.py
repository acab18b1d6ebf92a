"""Displacement fields inside the solver: (3, z, y, x) arrays, components z, y, x, in voxels of the working grid."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import ndimage

from uae.deeds.backend import Memory, Work, numba_kernels, resolve_backend
from uae.deeds.cost import ControlGrid

_SLAB_VOXELS = 500_000
MERGE_ROUNDS = 10
"""Rounds of the consistent mapping (deedsBCV)."""
_SPLINE_MARGIN = 6
"""A cubic spline forgets its ends by a factor of 3.7 a sample: 6 leave 0.04 %."""


def transfer(
    field: np.ndarray, grid: ControlGrid, target: ControlGrid | None, backend: str = "auto", planes: slice = slice(None)
) -> np.ndarray:
    """Carry a control point field (3, *grid.counts) to another control grid, or to all voxels (None), trilinearly.

    Between block centres, the outermost value continuing to the border; or, for grids placed as the original does,
    corner aligned with index * (old count / new count). On voxels, of which `planes` are computed, it is float32.
    """
    places = [_positions(grid, target, axis) for axis in range(3)]
    if target is None:
        places[0] = tuple(part[planes] for part in places[0])
        field = np.ascontiguousarray(field, np.float32)
        if resolve_backend(backend) == "numba":
            (low_z, z), (low_y, y), (low_x, x) = [(low, part.astype(np.float32)) for low, part in places]
            out = np.empty((3, len(low_z), len(low_y), len(low_x)), np.float32)
            numba_kernels().spread(field, low_x, x, low_z, z, low_y, y, out)
            return out
    for axis, (low, fraction) in enumerate(places):
        size = field.shape[axis + 1]
        shape = [1, 1, 1, 1]
        shape[axis + 1] = len(low)
        below = np.take(field, low, axis + 1)
        above = np.take(field, np.minimum(low + 1, size - 1), axis + 1)
        field = below + fraction.astype(field.dtype).reshape(shape) * (above - below)
    return field


def _positions(grid: ControlGrid, target: ControlGrid | None, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower neighbour among the control points and weight of the upper one, for each place along one axis."""
    if grid.corner:
        size = grid.shape[axis] if target is None else target.counts[axis]
        positions = np.arange(size) * (grid.counts[axis] / size)
    else:
        voxels = np.arange(grid.shape[axis]) if target is None else target.voxel_positions(axis)
        positions = (voxels - grid.voxel_positions(axis)[0]) / grid.step
    positions = np.clip(positions, 0.0, grid.counts[axis] - 1.0)
    low = np.minimum(np.floor(positions).astype(np.int64), max(grid.counts[axis] - 2, 0))
    return low, positions - low


def _sample(field: np.ndarray, coordinates: np.ndarray, cubic: bool = False, backend: str = "auto") -> np.ndarray:
    """Each component of `field` (3, ...) at coordinates (3, ...) in samples, the border value outside.

    Cubic B-splines take the field as continued by its border value, exactly within _SPLINE_MARGIN samples.
    """
    margin = 0
    if cubic:
        margin = _SPLINE_MARGIN
        padded = np.pad(field, ((0, 0), *[(margin, margin)] * 3), mode="edge")
        field = np.stack([ndimage.spline_filter(component, 3, mode="mirror") for component in padded])
    out = np.empty((3, *coordinates.shape[1:]), field.dtype)
    if resolve_backend(backend) == "numba" and field.dtype == np.float64:
        numba_kernels().sample(np.ascontiguousarray(field), coordinates, margin, cubic, out)
        return out
    for component in range(3):
        ndimage.map_coordinates(
            field[component], coordinates + margin, output=out[component], order=3 if cubic else 1, mode="nearest",
            prefilter=False,
        )  # fmt: skip
    return out


def merge(
    forward: np.ndarray, backward: np.ndarray, step: int, cubic: bool = False, rounds: int = MERGE_ROUNDS,
    backend: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Make two control point fields inverses of each other (consistent mapping, deedsBCV).

    Both are halved against the other's inverse at once, ten times: u <- (u - v(x + u)) / 2, v <- (v - u(x + v)) / 2.
    This, not the tree, is what keeps the result free of folds (our measurement: 20 % folded voxels without it). Part of
    that is the smoothing of ten trilinear interpolations, which also shrinks true displacements: by 12 % where they
    vary over 110 mm and control points are 8 mm apart (our measurement); cubic splines do not.
    """
    nodes = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in forward.shape[1:]), indexing="ij"))
    u, v = forward / step, backward / step
    with ThreadPoolExecutor(2, thread_name_prefix="deeds-merge") as pool:
        for _ in range(rounds):
            there = pool.submit(_sample, v, nodes + u, cubic, backend)
            back = _sample(u, nodes + v, cubic, backend)
            u, v = 0.5 * (u - there.result()), 0.5 * (v - back)
    return u * step, v * step


def _slabs(shape: tuple[int, ...], work: Work | None) -> Iterator[slice]:
    """Slices of z of about a million voxels; asks whether to stop before each."""
    planes = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    for first in range(0, shape[0], planes):
        if work is not None:
            work.check()
        yield slice(first, min(first + planes, shape[0]))


def _coordinates(slab: slice, dense: np.ndarray) -> np.ndarray:
    """Voxel coordinates x + u(x) of the planes in `slab`, whose displacement (3, planes, Y, X) is given."""
    axes = (np.arange(slab.start, slab.stop), np.arange(dense.shape[2]), np.arange(dense.shape[3]))
    out = dense.astype(np.float64)
    for axis, values in enumerate(axes):
        shape = [1, 1, 1]
        shape[axis] = len(values)
        out[axis] += values.reshape(shape)
    return out


def warp(
    image: np.ndarray, valid: np.ndarray | None, field: np.ndarray, grid: ControlGrid | None = None,
    work: Work | None = None, backend: str = "auto", memory: Memory | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Image (Z, Y, X) at x + u(x), trilinear, and where that is valid.

    Args:
        image: float32.
        valid: bool of the same shape, or None where the whole volume and its replicated border count.
        field: displacement in voxels: (3, *grid.counts) of control points, or (3, Z, Y, X) float32 where grid is None.
        grid: the control points.
        work: asked whether to stop.
        backend: 'auto', 'numba' or 'numpy'; the results are equal to the last bit.
        memory: where the results come from.

    Returns:
        (warped image, warped validity or None). A place outside the volume is not valid.
    """
    memory = memory or Memory()
    warped = memory.array("image", image.shape, np.float32)
    none = np.empty((0, 0, 0), bool)
    warped_valid = none if valid is None else memory.array("warped valid", image.shape, bool)
    for slab in _slabs(image.shape, work):
        dense = field[:, slab] if grid is None else transfer(field, grid, None, backend, slab)
        if resolve_backend(backend) == "numba":
            dense = np.ascontiguousarray(dense, np.float32)
            given = none if valid is None else valid
            numba_kernels().warp_planes(image, given, dense, slab.start, slab.stop, warped, warped_valid)
        else:
            _warp_numpy(image, valid, dense, slab, warped, warped_valid)
    return warped, None if valid is None else warped_valid


def _warp_numpy(
    image: np.ndarray, valid: np.ndarray | None, dense: np.ndarray, slab: slice, warped: np.ndarray,
    warped_valid: np.ndarray,
) -> None:  # fmt: skip
    """The planes of one slab."""
    coordinates = _coordinates(slab, dense)
    ndimage.map_coordinates(image, coordinates, output=warped[slab], order=1, mode="nearest")
    if valid is None:
        return
    weight = ndimage.map_coordinates(valid.astype(np.float32), coordinates, order=1, mode="nearest")
    for axis, size in enumerate(image.shape):
        weight[(coordinates[axis] < -0.5) | (coordinates[axis] > size - 0.5)] = 0.0
    warped_valid[slab] = weight > 0.5


def invert(
    dense: np.ndarray, start: np.ndarray, *, tolerance: float, rounds: int = 40, work: Work | None = None,
    backend: str = "auto",
) -> np.ndarray:  # fmt: skip
    """Field v with v(x) = -u(x + v(x)) at every voxel, by fixed-point iteration (Chen et al., Med. Phys. 2008).

    Args:
        dense: (3, Z, Y, X) u in voxels; beyond the border its edge value continues.
        start: first guess of v.
        tolerance: change in voxels at which a voxel is done.
        rounds: at most so many iterations.
        work: asked whether to stop.
        backend: 'auto', 'numba' or 'numpy'; the results are equal to the last bit.

    Returns:
        (3, Z, Y, X), the type of `start`.
    """
    inverse = start.copy()
    if resolve_backend(backend) == "numba":
        for slab in _slabs(dense.shape[1:], work):
            numba_kernels().invert_planes(dense, slab.start, slab.stop, tolerance, rounds, inverse)
        return inverse
    for slab in _slabs(dense.shape[1:], work):
        values = inverse[:, slab].reshape(3, -1).astype(np.float64)
        home = _coordinates(slab, np.zeros_like(dense[:, slab])).reshape(3, -1)
        active = np.arange(values.shape[1])
        for _ in range(rounds):
            update = -_sample(dense, home[:, active] + values[:, active], backend="numpy")
            change = np.abs(update - values[:, active]).max(axis=0)
            values[:, active] = update
            active = active[change > tolerance]
            if len(active) == 0:
                break
            if work is not None:
                work.check()
        inverse[:, slab] = values.reshape(inverse[:, slab].shape)
    return inverse


def consistency(forward: np.ndarray, backward: np.ndarray, stride: int = 2, backend: str = "auto") -> float:
    """Mean of |v(x) + u(x + v(x))| in voxels over every `stride`-th voxel: how far v is from the inverse of u."""
    if resolve_backend(backend) == "numba":
        return float(numba_kernels().consistency(forward, backward, stride))
    part = np.ascontiguousarray(backward[:, ::stride, ::stride, ::stride])
    places = np.stack(np.meshgrid(*(np.arange(0, n, stride) for n in forward.shape[1:]), indexing="ij")) + part
    return float(np.linalg.norm(part + _sample(forward, places.astype(np.float64), backend="numpy"), axis=0).mean())


def jacobian_determinant(field: np.ndarray, pitch: float = 1.0, backend: str = "auto") -> np.ndarray:
    """det(I + grad u) by central differences; `pitch` is the distance of the samples in voxels."""
    if resolve_backend(backend) == "numba":
        out = np.empty(field.shape[1:], np.float32)
        numba_kernels().jacobian_planes(np.asarray(field / np.float32(pitch), np.float32), 0, len(out), out)
        return out
    jacobian = np.empty((*field.shape[1:], 3, 3))
    for component in range(3):
        jacobian[..., component, :] = np.stack(np.gradient(field[component].astype(np.float64), pitch), axis=-1)
    return np.linalg.det(jacobian + np.eye(3))
