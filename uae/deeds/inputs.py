"""From two volumes anywhere in space to two images on one isotropic working grid, with their validity."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from uae.deeds.presets import Level
from uae.errors import InputError, ResourceError
from uae.transform import Affine
from uae.volume import Geometry, Volume, resample, resample_with_mask

logger = logging.getLogger(__name__)

CT_RANGE_HU = (-1024.0, 3071.0)
"""12-bit range of CT: scanner padding (-2000, -3024) and overflow in metal carry no anatomy."""
MIN_OVERLAP_VOXELS = 1000
"""Fewer common voxels (8 ml at 2 mm) hold fewer than two coarse control blocks: nothing to register."""
MIN_CONTROL_POINTS = 3
"""Control points along each axis; with fewer there is no inner one, and the merge works on borders only."""
MAX_VOXELS = 100_000_000
"""About four times the largest supported torso crop (256 x 256 x 400 at 2 mm)."""


@dataclass
class Image:
    """One image on the working grid.

    Attributes:
        values: (Z, Y, X) float32; outside the field of view the nearest inner value, so that no false edge arises.
        valid: (Z, Y, X) bool, inside the field of view and the mask.
    """

    values: np.ndarray
    valid: np.ndarray


def working_grid(region: Geometry, spacing: float) -> Geometry:
    """Isotropic grid with axes along L, P, S over the box of `region`; its first voxel edge is the box's low corner.

    Raises:
        InputError: unusable spacing, or more than MAX_VOXELS voxels.
    """
    if not (np.isfinite(spacing) and 0.2 <= spacing <= 20.0):
        raise InputError(f"DEEDS working spacing of {spacing} mm is unusable; use 0.2 to 20 mm (2 mm in the papers)")
    low, high = region.bounds_mm()
    # A thousandth of a voxel of rounding must not add a plane: a region that is such a grid gives that grid.
    size = np.maximum(np.ceil((high - low) / spacing - 1e-3), 1).astype(int)
    if np.prod(size.astype(float)) > MAX_VOXELS:
        raise InputError(
            f"DEEDS working grid of {'x'.join(map(str, size))} voxels is too large; "
            "use a smaller region or a larger spacing"
        )
    return Geometry(tuple(int(n) for n in size[::-1]), np.full(3, float(spacing)), low + spacing / 2, np.eye(3))


def prepare(name: str, volume: Volume, mask: Volume | None, grid: Geometry, transform: Affine | None) -> Image:
    """Carry one volume and its mask onto the working grid, once.

    Args:
        name: 'fixed' or 'moving', for messages.
        volume: the image.
        mask: voxels > 0 count; None: all.
        grid: working grid.
        transform: from points of the grid to points of the volume.

    Raises:
        InputError: NaN or infinite voxels, an empty mask, a constant image, or no common space with the grid.
    """
    if not np.isfinite(volume.array).all():
        raise InputError(f"the {name} image holds NaN or infinite voxels; replace them before the registration")
    if mask is not None and not (mask.array > 0).any():
        raise InputError(f"the {name} mask is empty; give a mask with voxels > 0, or none")
    if volume.modality == "ct":
        volume = volume.replace(np.clip(volume.array, *CT_RANGE_HU))
    carried, inside = resample_with_mask(volume, grid, transform, antialias=True)
    valid = inside.array > 0
    if np.count_nonzero(valid) < MIN_OVERLAP_VOXELS:
        raise InputError(
            f"the {name} image does not reach into the region to register; "
            "check the initial transform (run `uae register` without --deformable first)"
        )
    values = np.asarray(carried.array, np.float32)
    known = values[valid]
    # Interpolation of equal values leaves rounding behind, so a spread of a few units in the last place is none.
    if float(np.ptp(known)) <= 1e-6 * float(np.abs(known).max()):
        raise InputError(
            f"the {name} image is constant in the region to register; give an image that shows anatomy, "
            "or check the initial transform"
        )
    low, high = np.percentile(known, [1, 99])
    if not valid.all():
        nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
        values = values[tuple(nearest)]
    if volume.modality != "ct":
        # MR values have no unit; the noise floor of MIND and the tree's weights want a common order of magnitude.
        values = values * np.float32(1000.0 / (high - low if high > low else np.ptp(known)))
    if mask is not None:
        covered = resample(Volume((mask.array > 0).astype(np.uint8), mask.geometry), grid, transform, 0.0, order=0)
        valid &= covered.array > 0
    return Image(np.ascontiguousarray(values), valid)


def check_overlap(fixed: Image, moving: Image) -> float:
    """Share of the fixed image's valid voxels that the moving image covers at the start.

    Raises:
        InputError: too few common voxels.
    """
    common = int(np.count_nonzero(fixed.valid & moving.valid))
    if common < MIN_OVERLAP_VOXELS:
        raise InputError(
            f"fixed and moving share only {common} voxels of the working grid under the initial transform "
            "and the masks; give a better initial transform or larger masks"
        )
    return common / max(int(np.count_nonzero(fixed.valid)), 1)


def usable_levels(levels: tuple[Level, ...], shape: tuple[int, int, int]) -> tuple[Level, ...]:
    """The levels whose control grid has enough points along each axis; the dropped ones are logged.

    Raises:
        InputError: none is left.
    """
    usable = tuple(level for level in levels if min(shape) // level.step >= MIN_CONTROL_POINTS)
    size = "x".join(str(n) for n in shape[::-1])
    if not usable:
        need = MIN_CONTROL_POINTS * min(level.step for level in levels)
        raise InputError(
            f"the region of {size} working voxels is too small for DEEDS, which needs {need} along each "
            "axis; use a larger region or a smaller working spacing"
        )
    if len(usable) < len(levels):
        logger.warning(
            "the region of %s working voxels is small: %d coarse DEEDS levels are left out, so that "
            "displacements over %d voxels cannot be found",
            size,
            len(levels) - len(usable),
            sum(level.reach for level in usable),
        )
    return usable


def out_of_memory(shape: tuple[int, int, int]) -> ResourceError:
    """The error for a working grid that does not fit into memory."""
    size = "x".join(str(n) for n in shape[::-1])
    return ResourceError(f"no memory for DEEDS on {size} working voxels; use a smaller region or a larger spacing")
