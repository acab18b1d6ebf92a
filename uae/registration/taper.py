"""From a deformation on a crop to one that can be used anywhere: u of x -> R(x + u(x)), tapered to zero outside.

Viewers treat the outside of a displacement grid differently (MRML keeps the border value, ITK gives zero), so u must be
zero on the border, and it must get there without folding space.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from uae.errors import NoConfidentResultError, ResourceError
from uae.geometry import Geometry
from uae.registration.masks import inside
from uae.transform import Affine, DisplacementField
from uae.volume import Volume

log = logging.getLogger(__name__)

MIN_WIDTH_MM = 20.0  # contract, section 1, as the factor below
RIM_FACTOR = 4.0
ATTEMPTS = ((1.0, 0.0), (1.0, 24.0), (1.5, 24.0))
"""(factor on the width, smoothing in mm of the extension), tried in turn until nothing folds. A longer taper cures what
moves far; smoothing cures gaps of the overlap whose two sides move against each other, where no width can help."""
MAX_NODES = 40_000_000
"""Of the padded grid: about 2 GB while it is computed."""
RELAXATIONS = 6
REPAIR_REACHES = (3, 6, 12)
"""Nodes around a fold that are smoothed again, in turn."""
SLAB_NODES = 2_000_000
"""Nodes whose determinants are computed at once: bounds the temporaries to some 300 MB."""


@dataclass(frozen=True)
class TaperResult:
    """A field that may be used anywhere.

    field: u on the padded grid.
    width_mm: of the taper.
    overlap: bool (z, y, x) on the padded grid, where u is unchanged.
    folding_outside: nodes outside the overlap with a determinant <= 0.
    """

    field: DisplacementField
    width_mm: float
    overlap: np.ndarray
    folding_outside: int


def minimum_determinant(vectors: np.ndarray, geometry: Geometry, without: np.ndarray | None = None) -> np.ndarray:
    """Smallest determinant of I + grad u at each node over its up to eight neighbouring cells, (z, y, x) float32.

    It is the volume that three deformed edges of a cell span, relative to the cell's own. One-sided differences are
    used since central ones do not see a field that alternates from node to node.

    Args:
        vectors: (z, y, x, 3) mm, LPS.
        geometry: of the grid, any direction, two nodes or more along each axis.
        without: bool (z, y, x), or None; corners whose four nodes are all in it are left out (inf where all are).
    """
    depth = vectors.shape[0]
    thickness = max(2, SLAB_NODES // (vectors.shape[1] * vectors.shape[2]))
    lowest = np.empty(vectors.shape[:3], dtype=np.float32)
    for start in range(0, depth, thickness):
        low, high = max(start - 1, 0), min(start + thickness + 1, depth)
        part = _determinants(vectors[low:high], geometry, None if without is None else without[low:high])
        lowest[start : start + thickness] = part[start - low : start - low + thickness]
    return lowest


def _determinants(vectors: np.ndarray, geometry: Geometry, without: np.ndarray | None) -> np.ndarray:
    """`minimum_determinant` of one slab."""
    edges = geometry.direction * geometry.spacing  # columns: undeformed edges along the index axes x, y, z
    sides, kept = [], []
    components = np.ascontiguousarray(np.moveaxis(np.asarray(vectors, dtype=np.float32), -1, 0))
    for column, axis in enumerate((2, 1, 0)):
        edge = np.diff(components, axis=axis + 1) + edges[:, column, None, None, None].astype(np.float32)
        sides.append([_shifted(edge, axis + 1, ahead) for ahead in (True, False)])
        if without is not None:
            inner = np.delete(without, 0, axis), np.delete(without, -1, axis)
            kept.append([_shifted(side, axis, ahead) for side, ahead in zip(inner, (True, False))])
    lowest = np.full(vectors.shape[:3], np.inf, dtype=np.float32)
    scale = np.float32(1.0 / np.linalg.det(edges))
    for j, k in np.ndindex(2, 2):
        (ax, ay, az), (bx, by, bz) = sides[1][j], sides[2][k]
        normal = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for i in range(2):
            determinant = scale * sum(a * n for a, n in zip(sides[0][i], normal))
            if without is not None:
                determinant[without & kept[0][i] & kept[1][j] & kept[2][k]] = np.inf
            np.minimum(lowest, determinant, out=lowest)
    return lowest


def _shifted(between: np.ndarray, axis: int, ahead: bool) -> np.ndarray:
    """Values between nodes, given to the node before them (ahead) or behind; an end takes its only neighbour's."""
    end = np.take(between, [-1] if ahead else [0], axis=axis)
    return np.concatenate([between, end] if ahead else [end, between], axis=axis)


def overlap_mask(
    field: DisplacementField,
    linear: Affine,
    moving: Geometry,
    fixed: Geometry | None = None,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
) -> np.ndarray:
    """Fixed points whose image under R(x + u) lies inside the moving scan (and both masks).

    Args:
        field: u.
        linear: R, fixed -> moving.
        moving: grid of the moving scan.
        fixed: grid of the fixed scan, None for the whole grid of the field.
        fixed_mask: image > 0 inside.
        moving_mask: image > 0 inside.

    Returns:
        bool (z, y, x) on the field's grid.
    """
    points = field.geometry.grid_points_mm()
    image = linear.apply(points + field.vectors.reshape(-1, 3))
    within = moving.contains(image)
    if fixed is not None:
        within &= fixed.contains(points)
    within &= inside(fixed_mask, points) & inside(moving_mask, image)
    return within.reshape(field.geometry.shape)


def _weight(distance: np.ndarray, width: float) -> np.ndarray:
    """Cubic step from 1 at 0 to 0 at `width` mm: continuous slope, and at most 1.5 / width steep."""
    t = np.clip(distance / width, 0.0, 1.0)
    return (1.0 - t * t * (3.0 - 2.0 * t)).astype(np.float32)


def _box(geometry: Geometry, overlap: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """First and last node (3, 2) z, y, x of the overlap, and the nodes (3,) by which `width` mm and one more pad it."""
    ends = np.array([np.flatnonzero(overlap.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3)])
    return ends, np.ceil(width / geometry.spacing[::-1]).astype(int) + 1


def _padded_nodes(geometry: Geometry, overlap: np.ndarray, width: float) -> int:
    """Nodes of the grid that `_padded` would make."""
    ends, pad = _box(geometry, overlap, width)
    return int(np.prod(ends[:, 1] - ends[:, 0] + 1 + 2 * pad))


def _affordable_width(geometry: Geometry, overlap: np.ndarray, width: float) -> float:
    """`width`, or the largest smaller one (in steps of a twentieth) whose padded grid has at most MAX_NODES.

    Raises:
        ResourceError: not even the smallest width of the contract fits.
    """
    for share in np.linspace(1.0, 0.0, 21):
        narrower = max(MIN_WIDTH_MM, float(share) * width)
        if _padded_nodes(geometry, overlap, narrower) <= MAX_NODES:
            if narrower < width:
                log.warning("taper: %.0f mm would need too much memory, %.0f mm are used", width, narrower)
            return narrower
    raise ResourceError("the deformation's grid is too large to be written; use masks or a smaller margin")


def _padded(field: DisplacementField, overlap: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """Vectors, overlap and geometry cropped to the overlap's box and padded on all sides by `width` mm and one node."""
    geometry = field.geometry
    ends, pad = _box(geometry, overlap, width)
    box = tuple(slice(lo, hi + 1) for lo, hi in ends)
    origin = geometry.index_to_mm((ends[:, 0] - pad)[::-1].astype(np.float64))[0]
    margins = [(int(p), int(p)) for p in pad]
    kept = np.pad(overlap[box], margins)
    vectors = np.pad(np.asarray(field.vectors[box], dtype=np.float32), [*margins, (0, 0)])
    return vectors, kept, Geometry(kept.shape, geometry.spacing, origin, geometry.direction)


def _extended(
    vectors: np.ndarray, overlap: np.ndarray, geometry: Geometry, width: float, smoothing_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """The field kept in the overlap; outside the nearest overlap value times the weight, then smoothed outside only.

    The nearest value jumps where two parts of the rim are equally near. Averaging with the overlap and everything
    beyond the width held, from coarse to fine, takes these steps away.

    Returns:
        vectors (z, y, x, 3), and bool (z, y, x): the nodes outside that are not held.
    """
    sampling = geometry.spacing[::-1]
    distance, nearest = ndimage.distance_transform_edt(~overlap, sampling=sampling, return_indices=True)
    extended = vectors[tuple(nearest)] * _weight(distance, width)[..., None]
    free = ~overlap & (distance < width)
    while smoothing_mm >= sampling.max():
        smooth = sitk.GetArrayFromImage(_recursive_gaussian(extended, sampling, smoothing_mm))
        extended[free] = smooth[free]
        smoothing_mm /= 2.0
    _relax(extended, free, RELAXATIONS)
    return extended, free


def _recursive_gaussian(vectors: np.ndarray, sampling: np.ndarray, sigma_mm: float) -> sitk.Image:
    """Gaussian smoothing in a time that does not depend on its width."""
    image = sitk.GetImageFromArray(vectors, isVector=True)
    image.SetSpacing([float(step) for step in sampling[::-1]])
    return sitk.SmoothingRecursiveGaussian(image, sigma_mm)


def _relax(vectors: np.ndarray, free: np.ndarray, rounds: int) -> None:
    """Replace the free nodes by the mean of their 3 x 3 x 3 neighbours, some rounds, in place."""
    for component in range(3):
        values = np.ascontiguousarray(vectors[..., component])
        for _ in range(rounds):
            values[free] = ndimage.uniform_filter(values, 3, mode="nearest")[free]
        vectors[..., component] = values


def _repair(vectors: np.ndarray, overlap: np.ndarray, free: np.ndarray, geometry: Geometry) -> int:
    """Smooth the free nodes around folds, in place and in growing neighbourhoods; returns the number of folds left."""
    folds = minimum_determinant(vectors, geometry, without=overlap) <= 0.0
    for reach in REPAIR_REACHES:
        if not folds.any():
            return 0
        places, _ = ndimage.label(ndimage.binary_dilation(folds, iterations=reach))
        for box in ndimage.find_objects(places):
            # One node beyond the folds' neighbourhood on all sides is held, so the patch joins what surrounds it.
            grown = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
            patch = np.ascontiguousarray(vectors[grown])
            inner = np.zeros(patch.shape[:3], dtype=bool)
            inner[1:-1, 1:-1, 1:-1] = True
            _relax(patch, free[grown] & inner, 4 * reach)
            vectors[grown] = patch
        folds = minimum_determinant(vectors, geometry, without=overlap) <= 0.0
    return int(folds.sum())


def taper(
    field: DisplacementField,
    linear: Affine,
    moving: Geometry,
    fixed: Geometry | None = None,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
) -> TaperResult:
    """Keep u inside the overlap and bring it smoothly to zero outside without folding, on a padded grid.

    The width is max(20 mm, 4 x the largest displacement at the overlap's rim); it is lengthened, and the outside
    smoothed (see ATTEMPTS), until det(I + grad u) > 0 there. Where the rim of the given field folds by itself nothing
    helps; such nodes are counted in `folding_outside`. Where the grid would exceed MAX_NODES the width is shortened.

    Args:
        field: untapered u of x_moving = R(x + u(x)), mm.
        linear: R, fixed -> moving.
        moving: grid of the moving scan.
        fixed: grid of the fixed scan, None for the whole grid of the field.
        fixed_mask: image > 0 in the region in which u is meant.
        moving_mask: the same in moving space.

    Raises:
        NoConfidentResultError: there is no overlap at all.
        ResourceError: the grid is too large whatever the width.
    """
    overlap = overlap_mask(field, linear, moving, fixed, fixed_mask, moving_mask)
    if not overlap.any():
        raise NoConfidentResultError("the deformed scans do not overlap; check the initial transform and the masks")
    # One node more: u is interpolated between nodes, so the cells that the overlap's edge crosses must keep all
    # corners.
    overlap = ndimage.binary_dilation(overlap, np.ones((3, 3, 3)))
    rim = overlap & ~ndimage.binary_erosion(overlap)  # nodes on the grid's border count as rim
    largest = float(np.linalg.norm(field.vectors[rim], axis=1).max())
    first_width = _affordable_width(field.geometry, overlap, max(MIN_WIDTH_MM, RIM_FACTOR * largest))
    best = None
    for factor, smoothing in ATTEMPTS:
        if best is not None and _padded_nodes(field.geometry, overlap, factor * first_width) > MAX_NODES:
            break
        vectors, kept, geometry = _padded(field, overlap, factor * first_width)
        vectors, free = _extended(vectors, kept, geometry, factor * first_width, smoothing)
        folded = _repair(vectors, kept, free, geometry)
        if best is None or folded < best.folding_outside:
            best = TaperResult(DisplacementField(vectors, geometry), factor * first_width, kept, folded)
        if not folded:
            return best
    log.warning("taper: %d nodes outside the overlap fold (width %.0f mm)", best.folding_outside, best.width_mm)
    return best
