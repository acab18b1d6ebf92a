"""Where the voxels of an image lie in the patient: any spacing, origin and direction, in LPS millimetres."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk


def as_points(points: np.ndarray) -> np.ndarray:
    """Points as float64 (N, 3); one bare point becomes (1, 3).

    Raises:
        ValueError: the last axis is not of length 3.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.size == 0:
        return points.reshape(0, 3)
    points = np.atleast_2d(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape (N, 3), not {points.shape}")
    return points


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of an image.

    Attributes:
        shape: voxels along (z, y, x), the shape of the array.
        spacing: (3,) millimetres along the index axes x, y, z.
        origin: (3,) LPS mm of the centre of voxel (0, 0, 0).
        direction: (3, 3); its columns are the directions of the index axes x, y, z in LPS.
    """

    shape: tuple[int, int, int]
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        for name, size in (("spacing", (3,)), ("origin", (3,)), ("direction", (3, 3))):
            value = np.array(getattr(self, name), dtype=np.float64).reshape(size)
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        if len(self.shape) != 3:
            raise ValueError(f"a geometry has three axes, not {len(self.shape)}")

    @classmethod
    def from_sitk(cls, image: sitk.Image) -> Geometry:
        """The grid of a 3-D SimpleITK image."""
        return cls(image.GetSize()[::-1], image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    def apply_to_sitk(self, image: sitk.Image) -> None:
        """Write spacing, origin and direction into a SimpleITK image of the same size."""
        image.SetSpacing(self.spacing.tolist())
        image.SetOrigin(self.origin.tolist())
        image.SetDirection(self.direction.ravel().tolist())

    @property
    def size(self) -> np.ndarray:
        """(3,) voxels along x, y, z, float64."""
        return np.array(self.shape[::-1], dtype=np.float64)

    @property
    def extent_mm(self) -> np.ndarray:
        """(3,) millimetres from outer edge to outer edge along x, y, z."""
        return self.size * self.spacing

    @property
    def voxel_volume_mm3(self) -> float:
        """Volume of one voxel in cubic millimetres."""
        return float(abs(np.linalg.det(self.direction)) * np.prod(self.spacing))

    def matrix(self) -> np.ndarray:
        """(4, 4) matrix from index (x, y, z) to LPS mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = self.direction * self.spacing
        matrix[:3, 3] = self.origin
        return matrix

    def index_to_mm(self, index: np.ndarray) -> np.ndarray:
        """Continuous indices (N, 3) in the order x, y, z to LPS mm (N, 3)."""
        return as_points(index) @ (self.direction * self.spacing).T + self.origin

    def mm_to_index(self, points: np.ndarray) -> np.ndarray:
        """LPS mm (N, 3) to continuous indices (N, 3) in the order x, y, z."""
        return (as_points(points) - self.origin) @ np.linalg.inv(self.direction * self.spacing).T

    def contains(self, points: np.ndarray, margin_voxels: float | np.ndarray = 0.5) -> np.ndarray:
        """Which points (N, 3) mm lie inside the image, bool (N,).

        Args:
            points: (N, 3) LPS mm.
            margin_voxels: how far beyond the outer voxel centres still counts, one number or (3,) in the order x, y, z;
                0.5 is the voxels' edge.
        """
        return self.index_inside(self.mm_to_index(points), margin_voxels)

    def index_inside(self, index: np.ndarray, margin_voxels: float | np.ndarray = 0.5) -> np.ndarray:
        """The same as `contains` for continuous indices (N, 3) in the order x, y, z."""
        # A point computed to lie on the edge may miss it by rounding; a micro-voxel of tolerance keeps it inside.
        margin = margin_voxels + 1e-6
        return np.all((index >= -margin) & (index <= self.size - 1 + margin), axis=1)

    def corners_mm(self) -> np.ndarray:
        """(8, 3) LPS mm of the outer corners (voxel edges, not centres)."""
        ends = [(-0.5, n - 0.5) for n in self.size]
        return self.index_to_mm(np.array(list(itertools.product(*ends))))

    def center_mm(self) -> np.ndarray:
        """(3,) LPS mm of the middle of the image."""
        return self.index_to_mm((self.size - 1) / 2)[0]

    def bounds_mm(self) -> np.ndarray:
        """(2, 3) lowest and highest L, P, S of the outer corners."""
        corners = self.corners_mm()
        return np.stack([corners.min(axis=0), corners.max(axis=0)])

    def grid_points_mm(self) -> np.ndarray:
        """(z*y*x, 3) LPS mm of all voxel centres, in the C order of the array."""
        return self.slab_points_mm(0, self.shape[0])

    def slab_points_mm(self, start: int, stop: int) -> np.ndarray:
        """Voxel centres (N, 3) mm of the slices start <= z < stop, in the C order of the array."""
        step = self.direction * self.spacing
        z, y, x = (np.arange(n, dtype=np.float64) for n in self.shape)
        points = (
            z[start:stop, None, None, None] * step[:, 2]
            + y[None, :, None, None] * step[:, 1]
            + x[None, None, :, None] * step[:, 0]
            + self.origin
        )
        return points.reshape(-1, 3)

    def same_as(self, other: Geometry, tolerance_mm: float = 1e-3) -> bool:
        """Whether two grids have the same shape and all voxels in the same places within the tolerance."""
        if self.shape != other.shape:
            return False
        return bool(np.abs(self.corners_mm() - other.corners_mm()).max() <= tolerance_mm)
