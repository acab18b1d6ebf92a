"""One phantom subject: shape, images, labels and landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uae.errors import InputError
from uae.geometry import Geometry
from uae.phantom import anatomy, correspond, render
from uae.phantom.body import outline_depth
from uae.phantom.canvas import Canvas
from uae.phantom.tissues import LABEL_NAMES
from uae.transform import Composite, Rigid, Transform
from uae.volume import Volume

TRAINING_SEEDS = range(100_000)
VALIDATION_SEEDS = range(100_000, 200_000)
FIRST_TEST_SEED = 200_000
"""Seeds from here on are for tests and the demo; the ranges never mix."""

PARTS = {"torso": (-175.0, 455.0), "chest": (165.0, 455.0), "abdomen": (-5.0, 265.0), "pelvis": (-175.0, 70.0)}
"""Canonical z range of each part, mm."""


@dataclass
class Phantom:
    """A body with its images.

    Attributes:
        seed: what it was made from.
        ct: Hounsfield units, or None.
        mr: magnitude signal, or None.
        labels: uint8 structure numbers on the same grid.
        label_names: number -> structure.
        landmarks: name -> (3,) LPS mm, those inside the grid.
        to_canonical: patient mm -> canonical mm (one-to-one, exact inverse).
    """

    seed: int
    ct: Volume | None
    mr: Volume | None
    labels: Volume
    landmarks: dict[str, np.ndarray]
    to_canonical: Composite
    label_names: dict[int, str] = field(default_factory=lambda: dict(LABEL_NAMES))


def make_phantom(
    seed: int,
    spacing: float | Sequence[float] = 2.0,
    *,
    ct: bool = True,
    mr: bool = True,
    part: str | tuple[float, float] = "torso",
    pose: Rigid | None = None,
    mr_slice_mm: float | None = None,
    table: bool | None = None,
    variation: float = 1.0,
    geometry: Geometry | None = None,
) -> Phantom:
    """Make the subject `seed`: the same seed gives the same body, contrast and noise on the same grid.

    Args:
        seed: 0-99999 training, 100000-199999 validation, 200000 and up test and demo.
        spacing: mm, one number or (x, y, z).
        ct: render a CT.
        mr: render an MR of the same body on the same grid.
        part: "torso", "chest", "abdomen", "pelvis", or (low, high) canonical z in mm.
        pose: body frame -> patient mm; a few degrees drawn from the seed where None.
        mr_slice_mm: slice thickness of the MR where it is more than the spacing.
        table: show the CT table; drawn from the seed where None.
        variation: 0 = the canonical shape, 1 = a usual person.
        geometry: a grid of one's own instead of spacing and part.

    Returns:
        The phantom; at 2 mm a torso has about 200 x 130 x 320 voxels.

    Raises:
        InputError: unknown part, empty range, or a spacing that is not positive.
    """
    to_canonical = correspond.subject_map(seed, variation, pose)
    geometry = _grid(to_canonical, spacing, part) if geometry is None else geometry
    canvas = paint(geometry, to_canonical, seed)
    images: dict[str, Volume | None] = {"ct": None, "mr": None}
    if ct:
        images["ct"] = Volume(render.render_ct(canvas.tissues, geometry, seed, table), geometry, "ct", "phantom")
    if mr:
        signal = render.mr_signal(canvas.tissues, geometry, seed)
        images["mr"] = Volume(render.finish_mr(signal, geometry, seed, mr_slice_mm), geometry, "mr", "phantom")
    return Phantom(seed, images["ct"], images["mr"], Volume(canvas.labels, geometry),
                   landmarks_in(geometry, to_canonical), to_canonical)  # fmt: skip


def correspondence(a: Phantom, b: Phantom) -> Composite:
    """The exact map from patient mm of `a` to patient mm of `b`: same place in the canonical body."""
    return Composite([a.to_canonical, b.to_canonical.inverse()])


def paint(geometry: Geometry, to_canonical: Transform, content_seed: int) -> Canvas:
    """Labels and tissues of a body on a grid (anatomy.paint_body's canvas)."""
    return anatomy.paint_body(correspond.on_lattice(geometry, to_canonical), content_seed)


def labels_at(points: np.ndarray, to_canonical: Transform, content_seed: int) -> np.ndarray:
    """Structure numbers (N,) at points (N, 3) LPS mm, without any grid."""
    canonical = np.ascontiguousarray(to_canonical.apply(points).T, dtype=np.float32)
    return anatomy.paint_body(canonical, content_seed, grid=False).labels


def landmarks_in(geometry: Geometry, to_canonical: Transform) -> dict[str, np.ndarray]:
    """The named landmarks (LPS mm) that lie inside a grid."""
    named = anatomy.landmarks()
    points = to_canonical.inverse().apply(np.array(list(named.values())))
    inside = geometry.contains(points, -0.5)
    return {name: point for name, point, keep in zip(named, points, inside) if keep}


def _grid(to_canonical: Transform, spacing: float | Sequence[float], part: str | tuple[float, float]) -> Geometry:
    spacing = np.broadcast_to(np.asarray(spacing, float), (3,))
    if not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise InputError(f"phantom spacing {spacing.tolist()} mm is not positive; give one number or x,y,z above 0")
    if isinstance(part, str) and part not in PARTS:
        raise InputError(f"unknown phantom part '{part}'; choose one of {', '.join(PARTS)} or a range of z in mm")
    low, high = PARTS[part] if isinstance(part, str) else part
    if not low < high:
        raise InputError(f"phantom range {low}..{high} mm is empty; give the lower end first")
    points = correspond.body_lattice(15.0)
    points = points[(points[:, 2] >= low - 8) & (points[:, 2] <= high + 8)]
    to_patient = to_canonical.inverse()
    box = to_patient.apply(points[outline_depth(*points.T) > -8.0])
    ends = to_patient.apply(np.array([[0.0, 15.0, low], [0.0, 15.0, high]]))[:, 2]
    bottom = np.array([*(box.min(axis=0)[:2] - (14, 12)), ends[0]])
    top = np.array([*np.add(box.max(axis=0)[:2], (14, 30)), ends[1]])
    shape = np.ceil((top - bottom) / spacing).astype(int) + 1
    return Geometry(tuple(int(n) for n in shape[::-1]), spacing, bottom, np.eye(3))
