"""What a DEEDS registration gives back: the field in millimetres, its inverse and its statistics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from uae.deeds import fields
from uae.deeds.backend import Work, processor_backend
from uae.deeds.inputs import Image
from uae.progress import Cancel, check_cancel
from uae.transform import Affine, DisplacementField
from uae.volume import Geometry

INVERSE_TOLERANCE_MM = 0.002


@dataclass
class DeedsResult:
    """What a registration found: x_moving = A(x + u(x)).

    Attributes:
        field: u on the working grid, LPS mm, not tapered: beyond the grid nothing is known.
        linear: A: the initial transform, improved where an affine step was asked for and helped.
        levels: for each level step, radius, quantisation, control_points, and for both directions energy (least energy
            a control point), hamming (mean Hamming distance 0..60 before the level's search), folding (share of control
            points with a Jacobian <= 0 after the merge), seconds.
        jacobian: min, max and folding (share <= 0) of det(I + grad u) over the fixed image's valid voxels whose place
            in the moving image is valid; folding_grid over the whole working grid.
        seconds: prepare, levels, finish, total.
        preset: name of the preset.
        backend: 'numba' or 'numpy'.
        overlap: share of the fixed image's valid voxels with a valid place in the moving image at the end.
        consistency_mm: mean of |v(x) + u(x + v(x))| of the solver's own backward field v: how far the two directions
            are from being inverses.
    """

    field: DisplacementField
    linear: Affine
    levels: list[dict]
    jacobian: dict[str, float]
    seconds: dict[str, float]
    preset: str
    backend: str
    overlap: float
    consistency_mm: float

    @cached_property
    def inverse(self) -> DisplacementField:
        """The field v with (x + v(x)) + u(x + v(x)) = x on the same grid, u continued beyond its border."""
        forward = _to_voxels(self.field)
        spacing = float(self.field.geometry.spacing[0])
        tolerance = INVERSE_TOLERANCE_MM / spacing
        backend = processor_backend(self.backend)
        inverse = fields.invert(forward, -forward, tolerance=tolerance, backend=backend)
        return DisplacementField(_to_mm(inverse, spacing), self.field.geometry)


def finish(
    grid: Geometry, images: list[Image], forward: np.ndarray, backward: np.ndarray, backend: str, cancel: Cancel | None
) -> dict:
    """The field in millimetres and the statistics of the result."""
    spacing = float(grid.spacing[0])
    work = CancelWork(cancel)
    fixed, moving = images
    _, reached = fields.warp(moving.values, moving.valid, forward, work=work, backend=backend)
    body = fixed.valid & reached
    work.check()
    determinant = fields.jacobian_determinant(forward, backend=backend)
    work.check()
    inside = determinant[body] if body.any() else determinant.ravel()
    return {
        "field": DisplacementField(_to_mm(forward, spacing), grid),
        "jacobian": {
            "min": float(inside.min()),
            "max": float(inside.max()),
            "folding": float(np.mean(inside <= 0)),
            "folding_grid": float(np.mean(determinant <= 0)),
        },
        "overlap": float(np.count_nonzero(body) / max(np.count_nonzero(fixed.valid), 1)),
        "consistency_mm": fields.consistency(forward, backward, backend=backend) * spacing,
    }


class CancelWork(Work):
    """Work of the calling thread itself, which can ask the user directly."""

    def __init__(self, cancel: Cancel | None) -> None:
        super().__init__()
        self._cancel = cancel

    def check(self) -> None:
        """Raise CancelledError where the user asked to stop."""
        check_cancel(self._cancel)


def _to_mm(dense: np.ndarray, spacing: float) -> np.ndarray:
    """(3, Z, Y, X) voxels in z, y, x order to (Z, Y, X, 3) millimetres in x, y, z order (identity direction)."""
    return np.ascontiguousarray(np.moveaxis(dense[::-1], 0, -1) * np.float32(spacing), dtype=np.float32)


def _to_voxels(field: DisplacementField) -> np.ndarray:
    """The reverse of `_to_mm`."""
    spacing = np.float32(field.geometry.spacing[0])
    return np.ascontiguousarray(np.moveaxis(field.vectors, -1, 0)[::-1] / spacing, dtype=np.float32)
