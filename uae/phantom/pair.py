"""A CT and an MR of the same body with different fields of view, poses and a known smooth deformation."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from uae.errors import InputError
from uae.files import atomic_path
from uae.geometry import Geometry
from uae.phantom import correspond, render
from uae.phantom.body import outline_depth
from uae.phantom.subject import PARTS, landmarks_in, make_phantom, paint
from uae.phantom.tissues import LABEL_NAMES
from uae.points import write_points
from uae.transform import Composite, DisplacementField, Rigid, Transform, write_transform
from uae.volume import Volume

logger = logging.getLogger(__name__)

MOTION_STREAM = 31
LARGEST_SHIFT_MM = 7.2
"""Largest smooth displacement anywhere in the body; inside the MR's field of view it is at least 5 mm."""
FLOOR_LIMITS_MM = (1.2, 2.8)
"""What the best rigid may leave: enough for the deformable step to show, little enough for a fair rigid one."""
MIN_START_MM = 65.0
SUPERSAMPLING = 3
"""Sub-slices rendered and averaged for every thick MR slice."""
TRUTH_SPACING_MM = 4.0


@dataclass
class PhantomPair:
    """A pair whose truth is known: x_moving = R(x_fixed + u(x_fixed)).

    Attributes:
        seed: what it was made from.
        fixed: CT of most of the torso.
        moving: MR of the abdomen, thick slices, in a frame of reference of its own.
        fixed_labels: structures on the CT's grid; moving_labels: on the MR's.
        fixed_to_moving: the truth, LPS mm; moving_to_fixed: its exact inverse.
        rigid: R.
        motion: x -> x + u(x), analytic.
        fixed_landmarks: name -> (3,) mm in the CT, those inside both fields of view; moving_landmarks: in the MR.
        rigid_floor_mm: mean distance that the least-squares rigid leaves over the MR's body voxels.
        max_deformation_mm: largest |u| over the body inside the MR's field of view.
    """

    seed: int
    fixed: Volume
    moving: Volume
    fixed_labels: Volume
    moving_labels: Volume
    fixed_to_moving: Composite
    moving_to_fixed: Composite
    rigid: Rigid
    motion: Transform
    fixed_to_canonical: Transform
    fixed_landmarks: dict[str, np.ndarray]
    moving_landmarks: dict[str, np.ndarray]
    rigid_floor_mm: float
    max_deformation_mm: float
    label_names: dict[int, str] = field(default_factory=lambda: dict(LABEL_NAMES))


def phantom_pair(
    seed: int,
    *,
    fixed_spacing: float | Sequence[float] = 2.0,
    moving_spacing: Sequence[float] = (1.5, 1.5, 4.0),
    moving_extent: Sequence[float] = (300.0, 200.0, 180.0),
    part: str | tuple[float, float] = "torso",
) -> PhantomPair:
    """Make a pair: CT of the torso, MR of the abdomen turned by 10-20 degrees, displaced and smoothly deformed.

    The MR is rendered from the canonical body through the composed map, so it carries no resampling blur.

    Args:
        seed: 200000 and up for tests and the demo.
        fixed_spacing: of the CT, mm, one number or (x, y, z).
        moving_spacing: of the MR, (x, y, z) mm; the last is the slice thickness.
        moving_extent: of the MR, (x, y, z) mm.
        part: what the CT shows (make_phantom).

    Raises:
        InputError: a spacing or an extent is not positive.
    """
    spacing, extent = np.asarray(moving_spacing, float), np.asarray(moving_extent, float)
    if spacing.shape != (3,) or extent.shape != (3,) or not np.all(spacing > 0) or not np.all(extent >= 4 * spacing):
        raise InputError(
            f"MR of {extent.tolist()} mm at {spacing.tolist()} mm; give x,y,z of at least four voxels each"
        )
    fixed = make_phantom(seed, fixed_spacing, mr=False, part=part)
    body = _body_points(fixed.to_canonical)
    middle = fixed.to_canonical.inverse().apply(np.array([[0.0, -6.0, 112.0]]))[0]
    motion, rigid, geometry = _draw_motion(seed, fixed, body, middle, spacing, extent)
    fixed_to_moving = Composite([motion, rigid])
    moving_to_fixed = fixed_to_moving.inverse()
    signal, labels = _moving_signal(seed, geometry, Composite([moving_to_fixed, fixed.to_canonical]))
    moving = Volume(render.finish_mr(signal, geometry, seed), geometry, "mr", "phantom")
    both = landmarks_in(geometry, Composite([moving_to_fixed, fixed.to_canonical]))
    both = {name: point for name, point in both.items() if name in fixed.landmarks}
    inside = body[geometry.contains(fixed_to_moving.apply(body))]
    return PhantomPair(
        seed, fixed.ct, moving, fixed.labels, Volume(labels, geometry), fixed_to_moving, moving_to_fixed, rigid, motion,
        fixed.to_canonical, {name: fixed.landmarks[name] for name in both}, both,
        _rigid_residual(fixed_to_moving.apply(inside), inside), float(_length(motion, inside).max()),
    )  # fmt: skip


def _body_points(to_canonical: Transform) -> np.ndarray:
    """Points (N, 3) patient mm some 12 mm apart that fill the body."""
    points = correspond.body_lattice(12.0)
    low, high = PARTS["torso"]
    keep = (outline_depth(*points.T) > 0) & (points[:, 2] > low) & (points[:, 2] < high)
    return to_canonical.inverse().apply(points[keep])


def _length(motion: Transform, points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(motion.apply(points) - points, axis=1)


def _rigid_residual(moving: np.ndarray, fixed: np.ndarray) -> float:
    """Mean distance (mm) that the least-squares rigid of moving (N, 3) onto fixed (N, 3) leaves."""
    a, b = moving - moving.mean(axis=0), fixed - fixed.mean(axis=0)
    turn, _ = Rotation.align_vectors(b, a)
    return float(np.linalg.norm(turn.apply(a) - b, axis=1).mean())


def _draw_motion(seed: int, fixed, body: np.ndarray, middle: np.ndarray, spacing: np.ndarray, extent: np.ndarray):
    """The first drawn motion that keeps the promises of the pair: (motion, rigid, the MR's grid)."""
    landmarks = np.array(list(fixed.landmarks.values()))
    for attempt in range(200):
        rng = np.random.default_rng([MOTION_STREAM, seed, attempt])
        waves = correspond.Waves.random(rng, 8, (170.0, 330.0), 3.0)
        waves = waves.scaled(LARGEST_SHIFT_MM / _length(correspond.Smooth(waves), body).max())
        motion = correspond.Smooth(waves)
        axis, direction = rng.normal(size=(2, 3))
        turn = Rotation.from_rotvec(np.deg2rad(rng.uniform(11, 19)) * axis / np.linalg.norm(axis)).as_matrix()
        shift = rng.uniform(90, 140) * direction / np.linalg.norm(direction)
        rigid = Rigid.from_rotation(turn, middle + shift - turn @ middle)
        both = Composite([motion, rigid])
        shape = np.round(extent / spacing).astype(int)
        # A table position like a scanner's: the box is centred on the abdomen and its slices are whole.
        corner = both.apply(middle[None])[0] - 0.5 * (shape - 1) * spacing
        geometry = Geometry(tuple(int(n) for n in shape[::-1]), spacing, np.round(corner, 2), np.eye(3))
        inside = body[geometry.contains(both.apply(body))]
        moved = both.apply(landmarks)
        seen = geometry.contains(moved)
        if np.linalg.norm(moved - landmarks, axis=1)[seen].min(initial=np.inf) < MIN_START_MM:
            continue
        floor, largest = _rigid_residual(both.apply(inside), inside), _length(motion, inside).max()
        if FLOOR_LIMITS_MM[0] <= floor <= FLOOR_LIMITS_MM[1] and largest >= 5.3:
            return motion, rigid, geometry
    raise InputError(f"phantom pair {seed}: no motion meets the limits for this field of view; make the MR larger")


def _moving_signal(seed: int, geometry: Geometry, to_canonical: Transform) -> tuple[np.ndarray, np.ndarray]:
    """Signal averaged over thick slices, and the labels at the slices' middles, both (z, y, x)."""
    thin = geometry.spacing * [1.0, 1.0, 1.0 / SUPERSAMPLING]
    origin = geometry.origin - geometry.direction[:, 2] * thin[2] * (SUPERSAMPLING - 1) / 2
    shape = (geometry.shape[0] * SUPERSAMPLING, *geometry.shape[1:])
    fine = Geometry(shape, thin, origin, geometry.direction)
    canvas = paint(fine, to_canonical, seed)
    signal = render.mr_signal(canvas.tissues, fine, seed)
    signal = signal.reshape(geometry.shape[0], SUPERSAMPLING, *geometry.shape[1:]).mean(axis=1)
    return signal, np.ascontiguousarray(canvas.labels[SUPERSAMPLING // 2 :: SUPERSAMPLING])


def truth_field(pair: PhantomPair, spacing_mm: float = TRUTH_SPACING_MM) -> DisplacementField:
    """The smooth part u of the truth on a grid over the CT (4 mm keep it within 0.02 mm of the analytic one)."""
    grid = pair.fixed.geometry
    shape = np.ceil((grid.extent_mm - grid.spacing) / spacing_mm).astype(int) + 1
    geometry = Geometry(tuple(int(n) for n in shape[::-1]), np.full(3, spacing_mm), grid.origin, grid.direction)
    points = geometry.grid_points_mm()
    return DisplacementField((pair.motion.apply(points) - points).reshape(*geometry.shape, 3), geometry)


def write_sample(folder: str | Path, seed: int, pair: PhantomPair | None = None) -> PhantomPair:
    """Write a pair for `uae phantom`.

    Files: ct.nii.gz, mr.nii.gz, labels.nii.gz and labels_mr.nii.gz (label_names.json says the numbers),
    landmarks_ct.csv and landmarks_mr.csv, truth_rigid.tfm (R, fixed -> moving), truth_displacement.nii.gz (u over the
    CT) and truth.json.

    Args:
        folder: is made where it does not exist.
        seed: of phantom_pair.
        pair: an already made pair of this seed.

    Returns:
        The pair.

    Raises:
        InputError: the folder cannot be written.
        ResourceError: the disk is full.
    """
    folder = Path(folder)
    pair = phantom_pair(seed) if pair is None else pair
    pair.fixed.write(folder / "ct.nii.gz")
    pair.moving.write(folder / "mr.nii.gz")
    pair.fixed_labels.write(folder / "labels.nii.gz")
    pair.moving_labels.write(folder / "labels_mr.nii.gz")
    for name, marks in (("landmarks_ct.csv", pair.fixed_landmarks), ("landmarks_mr.csv", pair.moving_landmarks)):
        write_points(folder / name, list(marks), np.array(list(marks.values())))
    write_transform(folder / "truth_rigid.tfm", pair.rigid)
    write_transform(folder / "truth_displacement.nii.gz", truth_field(pair))
    truth = {
        "seed": pair.seed,
        "fixed_to_moving": "x_moving = R(x + u(x)): truth_displacement.nii.gz, then truth_rigid.tfm",
        "rigid": pair.rigid.matrix.tolist(),
        "rotation_deg": pair.rigid.rotation_angle_deg(),
        "rigid_floor_mm": pair.rigid_floor_mm,
        "max_deformation_mm": pair.max_deformation_mm,
    }
    for name, content in (("truth.json", truth), ("label_names.json", pair.label_names)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    logger.info("phantom pair %d written to %s (%d landmarks)", seed, folder, len(pair.fixed_landmarks))
    return pair
