"""Transforms of points in LPS millimetres. Like ITK's resampling transforms they run from fixed to moving space."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from uae.geometry import Geometry, as_points

__all__ = ["Affine", "Composite", "DisplacementField", "InverseField", "Rigid", "Transform"]
__all__ += ["read_transform", "write_transform"]

logger = logging.getLogger(__name__)

ORTHONORMAL_TOLERANCE = 1e-5
"""Largest deviation of R^T R from the identity in a Rigid: 0.005 mm over 500 mm."""
INVERSE_TOLERANCE_MM = 1e-4
"""Residual at which the inverse of a field counts as found: a hundredth of the 0.01 mm the contract asks for."""
CHUNK = 1_000_000
"""Points handled at once when a whole grid is inverted; bounds the temporaries to some 200 MB."""


class Transform:
    """A map of points (N, 3) LPS mm to points (N, 3) LPS mm."""

    is_linear: bool = False

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) LPS mm to their images (N, 3), float64."""
        raise NotImplementedError

    def inverse(self) -> Transform:
        """The transform that undoes this one."""
        raise NotImplementedError

    def linear_part(self) -> np.ndarray:
        """(3, 3) matrix that stands for the transform where only scale and rotation matter (antialiasing)."""
        return np.eye(3)

    def as_linear(self) -> Affine:
        """The same as one Affine (a Rigid where it is rigid).

        Raises:
            ValueError: the transform is not linear.
        """
        raise ValueError(f"a {type(self).__name__} has no single matrix")

    def to_sitk(self) -> sitk.Transform | None:
        """The same as a SimpleITK transform; None where ITK has none (inverse of a field)."""
        return None


class Affine(Transform):
    """p -> A p + t.

    Args:
        matrix: (4, 4) homogeneous matrix, LPS mm; the last row is 0 0 0 1.
    """

    is_linear = True

    def __init__(self, matrix: np.ndarray) -> None:
        matrix = np.array(matrix, dtype=np.float64)
        if matrix.shape != (4, 4) or not np.all(np.isfinite(matrix)):
            raise ValueError("an affine transform needs a finite 4 x 4 matrix")
        if not np.allclose(matrix[3], (0, 0, 0, 1)):
            raise ValueError("the last row of an affine matrix must be 0 0 0 1")
        matrix.setflags(write=False)
        self.matrix = matrix

    def __repr__(self) -> str:
        return f"{type(self).__name__}({np.array2string(self.matrix, precision=4, suppress_small=True)})"

    @property
    def translation(self) -> np.ndarray:
        """(3,) mm: where the world's origin goes."""
        return self.matrix[:3, 3]

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) LPS mm to A p + t (N, 3)."""
        return as_points(points) @ self.matrix[:3, :3].T + self.matrix[:3, 3]

    def inverse(self) -> Affine:
        """The inverse, of the same class (a Rigid stays a Rigid).

        Raises:
            numpy.linalg.LinAlgError: the matrix is singular.
        """
        return type(self)(np.linalg.inv(self.matrix))

    def linear_part(self) -> np.ndarray:
        """(3, 3) A."""
        return self.matrix[:3, :3]

    def as_linear(self) -> Affine:
        """Itself."""
        return self

    def to_sitk(self) -> sitk.Transform:
        """As sitk.AffineTransform."""
        transform = sitk.AffineTransform(3)
        transform.SetMatrix(self.matrix[:3, :3].ravel().tolist())
        transform.SetTranslation(self.matrix[:3, 3].tolist())
        return transform

    @classmethod
    def identity(cls) -> Affine:
        """The transform that moves nothing."""
        return cls(np.eye(4))


class Rigid(Affine):
    """Rotation and translation: p -> R p + t.

    Raises:
        ValueError: the 3 x 3 part is not a rotation.
    """

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(matrix)
        rotation = self.matrix[:3, :3]
        error = np.abs(rotation.T @ rotation - np.eye(3)).max()
        if error > ORTHONORMAL_TOLERANCE or np.linalg.det(rotation) < 0:
            raise ValueError("the 3 x 3 part of a rigid transform must be a rotation")

    @classmethod
    def from_rotation(cls, rotation: np.ndarray, translation: np.ndarray) -> Rigid:
        """The map p -> rotation p + translation, rotation (3, 3), translation (3,) mm."""
        matrix = np.eye(4)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = translation
        return cls(matrix)

    @classmethod
    def from_euler_deg(
        cls,
        rx: float,
        ry: float,
        rz: float,
        translation: Sequence[float] = (0.0, 0.0, 0.0),
        center: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> Rigid:
        """The map p -> R (p - center) + center + translation, R = Rz Rx Ry, the order of ITK's Euler3DTransform.

        Args:
            rx: degrees about the L axis.
            ry: degrees about the P axis.
            rz: degrees about the S axis.
            translation: (3,) mm.
            center: (3,) LPS mm, the fixed point of the rotation.
        """
        (cx, cy, cz), (sx, sy, sz) = np.cos(np.radians([rx, ry, rz])), np.sin(np.radians([rx, ry, rz]))
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        rotation = about_z @ about_x @ about_y
        center = np.asarray(center, dtype=np.float64)
        return cls.from_rotation(rotation, center + np.asarray(translation, dtype=np.float64) - rotation @ center)

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) rotation matrix."""
        return self.matrix[:3, :3]

    def rotation_angle_deg(self) -> float:
        """Angle of the rotation about its axis, 0 to 180 degrees."""
        rotation = self.rotation
        # atan2 of sine and cosine stays exact for small angles, where arccos of the trace loses half the digits.
        skew = rotation - rotation.T
        sine = 0.5 * np.linalg.norm([skew[2, 1], skew[0, 2], skew[1, 0]])
        return float(np.degrees(np.arctan2(sine, 0.5 * (np.trace(rotation) - 1.0))))


class DisplacementField(Transform):
    """p -> p + u(p), u trilinear on its grid and 0 beyond the edges of its outer voxels, exactly as in ITK.

    Args:
        vectors: (z, y, x, 3) LPS mm, float32 or float64.
        geometry: the grid of the vectors.
    """

    def __init__(self, vectors: np.ndarray, geometry: Geometry) -> None:
        vectors = np.asarray(vectors)
        if vectors.dtype != np.float32:
            vectors = vectors.astype(np.float64, copy=False)
        if vectors.shape != (*geometry.shape, 3):
            raise ValueError(f"vectors of shape {vectors.shape} on a grid of shape {geometry.shape}")
        self.vectors = vectors
        self.geometry = geometry

    @classmethod
    def from_sitk(cls, image: sitk.Image) -> DisplacementField:
        """From a 3-D image of 3-vectors (LPS mm)."""
        return cls(sitk.GetArrayFromImage(image), Geometry.from_sitk(image))

    def displacement(self, points: np.ndarray) -> np.ndarray:
        """Displacement u at points (N, 3) LPS mm, float64 (N, 3) mm."""
        index = self.geometry.mm_to_index(points)
        coordinates = index[:, ::-1].T
        out = np.empty((len(index), 3))
        for axis in range(3):
            ndimage.map_coordinates(
                self.vectors[..., axis], coordinates, output=out[:, axis], order=1, mode="nearest", prefilter=False
            )
        out[~self.geometry.index_inside(index)] = 0.0
        return out

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) LPS mm to p + u(p) (N, 3)."""
        points = as_points(points)
        return points + self.displacement(points)

    def inverse(self) -> InverseField:
        """The inverse, solved point by point."""
        return InverseField(self)

    def invert_to_grid(self, geometry: Geometry | None = None) -> DisplacementField:
        """The inverse as a field on `geometry` (the own grid where None); between its voxels it is interpolated."""
        geometry = geometry or self.geometry
        inverse = self.inverse()
        vectors = np.empty((*geometry.shape, 3), dtype=self.vectors.dtype)
        slab = max(1, CHUNK // (geometry.shape[1] * geometry.shape[2]))
        for start in range(0, geometry.shape[0], slab):
            stop = min(start + slab, geometry.shape[0])
            points = geometry.slab_points_mm(start, stop)
            vectors[start:stop] = (inverse.apply(points) - points).reshape(vectors[start:stop].shape)
        return DisplacementField(vectors, geometry)

    def jacobian_determinant(self) -> np.ndarray:
        """det(I + grad u) of x -> x + u(x) at every voxel (z, y, x), float64, by central differences in patient mm."""
        to_index = np.linalg.inv(self.geometry.direction * self.geometry.spacing)
        depth = self.geometry.shape[0]
        determinant = np.empty(self.geometry.shape)
        # Slabs bound the memory (nine derivatives a voxel); a slice of halo keeps the differences central.
        slab = max(1, CHUNK // (self.geometry.shape[1] * self.geometry.shape[2]))
        for start in range(0, depth, slab):
            stop = min(start + slab, depth)
            low, high = max(start - 1, 0), min(stop + 1, depth)
            jacobian = np.empty((high - low, *self.geometry.shape[1:], 3, 3))
            for component in range(3):
                along_zyx = np.gradient(self.vectors[low:high, ..., component].astype(np.float64, copy=False))
                jacobian[..., component, :] = np.stack(along_zyx[::-1], axis=-1) @ to_index
            a, b, c = np.moveaxis(jacobian[start - low : stop - low] + np.eye(3), -2, 0)
            determinant[start:stop] = np.einsum("zyxi,zyxi->zyx", a, np.cross(b, c))
        return determinant

    def to_sitk_image(self) -> sitk.Image:
        """As an ITK image of 3-vectors (LPS mm), float type kept."""
        image = sitk.GetImageFromArray(self.vectors, isVector=True)
        self.geometry.apply_to_sitk(image)
        return image

    def to_sitk(self) -> sitk.Transform:
        """As sitk.DisplacementFieldTransform (float64)."""
        return sitk.DisplacementFieldTransform(sitk.Cast(self.to_sitk_image(), sitk.sitkVectorFloat64))


class InverseField(Transform):
    """The inverse of a displacement field: q with q + u(q) = p, solved for every point.

    Fixed-point iteration q <- p - u(q) (Chen et al., "A simple fixed-point approach to invert a deformation field",
    Med. Phys. 2008) with the step halved where it overshoots, then damped Newton steps where that is not enough.
    Where the field folds, no unique q exists; the best one found is returned and a warning is logged.
    """

    FIXED_POINT_STEPS = 30
    NEWTON_STEPS = 40

    def __init__(self, field: DisplacementField) -> None:
        self.field = field

    def inverse(self) -> DisplacementField:
        """The field itself."""
        return self.field

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) LPS mm to the q (N, 3) that the field carries onto them, within 0.01 mm."""
        points = as_points(points)
        best = points.copy()
        best_residual = points - self.field.apply(best)
        best_error = np.linalg.norm(best_residual, axis=1)
        step = np.ones(len(points))
        active = np.flatnonzero(best_error > INVERSE_TOLERANCE_MM)
        for _ in range(self.FIXED_POINT_STEPS):
            if len(active) == 0:
                return best
            trial = best[active] + step[active, None] * best_residual[active]
            residual = points[active] - self.field.apply(trial)
            error = np.linalg.norm(residual, axis=1)
            better = error < best_error[active]
            good = active[better]
            best[good], best_residual[good], best_error[good] = trial[better], residual[better], error[better]
            step[active[~better]] *= 0.5
            active = active[best_error[active] > INVERSE_TOLERANCE_MM]
        # A jump at the field's border can trap the steps above: Newton starts afresh from p, then from the best so far.
        for start in (points, best):
            found, error = self._newton(points[active], start[active])
            better = error < best_error[active]
            best[active[better]], best_error[active[better]] = found[better], error[better]
            active = active[best_error[active] > INVERSE_TOLERANCE_MM]
        left = int(np.count_nonzero(best_error > 100 * INVERSE_TOLERANCE_MM))
        if left:
            what = "%d of %d points have no exact inverse (worst %.2f mm): the field folds or jumps there"
            logger.warning(what, left, len(points), best_error.max())
        return best

    def _newton(self, points: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Damped Newton steps from `start` (N, 3) towards the q of `points` (N, 3): q (N, 3) and residuals (N,) mm."""
        delta = 1e-3 * float(self.field.geometry.spacing.min())
        best = start.copy()
        best_error = np.linalg.norm(points - self.field.apply(best), axis=1)
        damping = np.ones(len(points))
        active = np.arange(len(points))
        for _ in range(self.NEWTON_STEPS):
            active = active[best_error[active] > INVERSE_TOLERANCE_MM]
            if len(active) == 0:
                break
            here = best[active]
            residual = points[active] - self.field.apply(here)
            ahead, behind = ([self.field.apply(here + d) for d in sign * delta * np.eye(3)] for sign in (1, -1))
            jacobian = (np.stack(ahead, axis=-1) - np.stack(behind, axis=-1)) / (2 * delta)
            trial = here + damping[active, None] * (np.linalg.pinv(jacobian) @ residual[..., None])[..., 0]
            error = np.linalg.norm(points[active] - self.field.apply(trial), axis=1)
            better = error < best_error[active]
            best[active[better]], best_error[active[better]] = trial[better], error[better]
            damping[active] = np.where(better, 1.0, damping[active] * 0.5)
        return best, best_error


class Composite(Transform):
    """Several transforms one after the other; a point meets `transforms[0]` first."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = tuple(transforms)

    @property
    def is_linear(self) -> bool:
        """Whether all parts are linear."""
        return all(t.is_linear for t in self.transforms)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) LPS mm through all parts in their order."""
        points = as_points(points)
        for transform in self.transforms:
            points = transform.apply(points)
        return points

    def inverse(self) -> Composite:
        """The inverses in reverse order."""
        return Composite([t.inverse() for t in reversed(self.transforms)])

    def linear_part(self) -> np.ndarray:
        """(3, 3) product of the parts' linear parts."""
        product = np.eye(3)
        for transform in self.transforms:
            product = transform.linear_part() @ product
        return product

    def as_linear(self) -> Affine:
        """One Affine (a Rigid where all parts are rigid) for the whole chain.

        Raises:
            ValueError: a part is not linear.
        """
        if not self.is_linear:
            raise ValueError("a chain with a displacement field has no single matrix")
        matrix = np.eye(4)
        rigid = True
        for transform in self.transforms:
            part = transform.as_linear()
            matrix = part.matrix @ matrix
            rigid = rigid and isinstance(part, Rigid)
        return Rigid(matrix) if rigid else Affine(matrix)

    def to_sitk(self) -> sitk.Transform | None:
        """As sitk.CompositeTransform; None where a part has no ITK counterpart."""
        parts = [t.to_sitk() for t in self.transforms]
        if any(part is None for part in parts):
            return None
        # ITK applies the transform that was added last first.
        return sitk.CompositeTransform(parts[::-1]) if parts else sitk.Transform(3, sitk.sitkIdentity)


def read_transform(path: str | Path) -> Transform:
    """Read a linear, field or composite transform: uae.transform_io.read_transform."""
    from uae import transform_io

    return transform_io.read_transform(path)


def write_transform(path: str | Path, transform: Transform) -> None:
    """Write a transform for SimpleITK and 3D Slicer: uae.transform_io.write_transform."""
    from uae import transform_io

    transform_io.write_transform(path, transform)
