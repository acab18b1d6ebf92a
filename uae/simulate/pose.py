"""Where a simulated scan lies: its box in the patient, its turned and moved header, its smooth deformation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from uae.simulate.contrast import spline_weights
from uae.transform import DisplacementField, Rigid
from uae.volume import Geometry

MINIMUM_SIDE_MM = 80.0
MINIMUM_BODY_SHARE = 0.70
LARGEST_SHIFT_MM = 200.0
FIELD_STEP_MM = 5.0
"""Lattice of the stored displacement: a seventh of the shortest knot distance keeps the trilinear field smooth."""


@dataclass(frozen=True)
class SetDefinition:
    """One set of the benchmark: ranges as (lowest, highest)."""

    name: str
    share: tuple[float, float]
    rotation_deg: tuple[float, float]
    rms_mm: tuple[float, float] | None = None
    knots_mm: tuple[float, float] = (36.0, 60.0)


SETS = {
    "standard15": SetDefinition("standard15", (0.25, 0.60), (3.0, 15.0)),
    "standard30": SetDefinition("standard30", (0.25, 0.60), (3.0, 30.0)),
    "hard": SetDefinition("hard", (0.08, 0.20), (3.0, 15.0), (5.0, 10.0)),
}


@dataclass(frozen=True)
class Placement:
    """A scan's grid in its own world and the rigid map from there to the CT's world."""

    geometry: Geometry
    to_fixed: Rigid
    share: float
    rotation_deg: float
    slice_axis: str


def body_box_mm(body: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Bounding box of a body mask along the CT's own axes: (first, last) outer index corners, each (3,) in x, y, z."""
    first, last = [], []
    for axis in (2, 1, 0):
        hit = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        first.append(hit[0] - 0.5)
        last.append(hit[-1] + 0.5)
    return np.array(first), np.array(last)


def random_rotation(degrees: float, rng: np.random.Generator) -> np.ndarray:
    """Rotation matrix (3, 3) by `degrees` about a uniformly random axis."""
    axis = rng.standard_normal(3)
    return Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()


def propose(
    definition: SetDefinition, angle: float, body: np.ndarray, ct: Geometry, rng: np.random.Generator
) -> Placement | None:
    """One random placement, or None where it does not fit into the CT.

    The grid has its own plain orientation (axial, coronal or sagittal slices, sometimes slightly oblique); the patient
    lies turned inside it, so the voxel grid cuts the anatomy obliquely.

    Args:
        definition: ranges of the set.
        angle: rotation against the CT, degrees, about a random axis.
        body: (z, y, x) bool body mask of the CT.
        ct: the CT's geometry.
        rng: source of all randomness.
    """
    low, high = body_box_mm(body, ct)
    body_sides = (high - low) * ct.spacing
    turn = random_rotation(angle, rng)
    target = rng.uniform(*definition.share) * body_sides.prod()
    stretch = rng.uniform(0.75, 1.33, 3)
    shape_of_body = np.clip(body_sides, 0.0, 420.0) * stretch / np.cbrt(stretch.prod())
    sides = shape_of_body * np.cbrt(target / shape_of_body.prod())

    # Columns of `axes` are the grid's x, y (in plane) and z (across slices) in its own world.
    slice_axis = str(rng.choice(["axial", "coronal", "sagittal"], p=[0.5, 0.3, 0.2]))
    order = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}[slice_axis]
    axes = np.eye(3)[:, order]
    if slice_axis != "axial":
        axes[:, 1] *= -1.0
    if np.linalg.det(axes) < 0:
        axes[:, 2] *= -1.0
    if rng.random() < 0.4:
        axes = random_rotation(rng.uniform(2.0, 10.0), rng) @ axes
    in_plane, thickness = rng.uniform(1.1, 1.7), rng.uniform(3.0, 6.0)
    spacing = np.array([in_plane, in_plane, thickness])
    counts = np.maximum(np.rint(sides[list(order)] / spacing), np.ceil(MINIMUM_SIDE_MM / spacing)).astype(int)
    extent = counts * spacing
    share = float(extent.prod() / body_sides.prod())
    if not definition.share[0] <= share <= definition.share[1]:
        return None

    # The turned box must stay inside the CT: its half extents along the CT's axes bound where the centre may lie.
    size = np.array(ct.shape[::-1], float)
    reach = np.abs(ct.direction.T @ turn @ axes) @ (extent / 2.0) / ct.spacing
    lowest = np.maximum(reach - 0.5, low)
    highest = np.minimum(size - 0.5 - reach, high)
    if np.any(highest < lowest):
        return None
    center_fixed = ct.index_to_mm(rng.uniform(lowest, highest)[None])[0]
    direction = rng.standard_normal(3)
    shift = rng.uniform(0.0, LARGEST_SHIFT_MM) * direction / np.linalg.norm(direction)
    center_moving = center_fixed + shift
    origin = center_moving - axes @ ((counts - 1) / 2.0 * spacing)
    geometry = Geometry(tuple(int(n) for n in counts[::-1]), spacing, origin, axes)
    to_fixed = Rigid.from_rotation(turn, center_fixed - turn @ center_moving)
    return Placement(geometry, to_fixed, share, float(angle), slice_axis)


def random_displacement(
    placement: Placement, inside: np.ndarray, definition: SetDefinition, rng: np.random.Generator
) -> tuple[DisplacementField, float] | None:
    """Smooth displacement over the scan's place in the CT, or None where the draw would fold or overshoot.

    Cubic B-spline whose control points are zero one knot outside the scan, so the field ends at exactly 0. The operator
    norm of its gradient stays below 0.9: the map x + u(x) is then one-to-one and its inverse iteration converges.

    Args:
        placement: the scan.
        inside: (N, 3) body points of the scan at their rigid place in the CT, mm; the RMS is set over them.
        definition: ranges of RMS and knot distance.
        rng: source of all randomness.

    Returns:
        The field in the CT's world and its knot distance in mm.
    """
    knot = rng.uniform(*definition.knots_mm)
    wanted = rng.uniform(*definition.rms_mm)
    corners = placement.to_fixed.apply(placement.geometry.corners_mm())
    low, high = corners.min(axis=0), corners.max(axis=0)
    count = np.ceil((high - low) / knot).astype(int) + 3
    start = (low + high) / 2.0 - (count - 1) / 2.0 * knot
    coefficients = rng.standard_normal((count[2], count[1], count[0], 3))

    step = np.full(3, FIELD_STEP_MM)
    # Two knots beyond the last control point a cubic B-spline is exactly zero.
    origin = start - 2.0 * knot
    size = np.ceil((count + 3) * knot / step).astype(int) + 1
    vectors = coefficients
    for axis in range(3):
        xyz = 2 - axis
        where = (origin[xyz] + np.arange(size[xyz]) * step[xyz] - start[xyz]) / knot
        weights = spline_weights(where, count[xyz])
        vectors = np.moveaxis(np.tensordot(weights, vectors, (1, axis)), 0, axis)
    geometry = Geometry(tuple(int(n) for n in size[::-1]), step, origin, np.eye(3))
    field = DisplacementField(vectors, geometry)
    rms = float(np.sqrt((field.displacement(inside) ** 2).sum(axis=1).mean()))
    vectors = vectors * (wanted / rms)
    gradient = np.stack(np.gradient(vectors, FIELD_STEP_MM, axis=(0, 1, 2)), axis=-1)
    if np.linalg.norm(gradient[::2, ::2, ::2].reshape(-1, 3, 3), ord=2, axis=(1, 2)).max() > 0.9:
        return None
    return DisplacementField(vectors, geometry), float(knot)
