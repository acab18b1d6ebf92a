"""Voxel places of phantoms of different shape in one canonical body, read from lattices."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uae.geometry import Geometry
from uae.phantom import correspond
from uae.transform import Transform

LATTICE_VOXELS = 2
"""Nodes every 4 mm: the maps have no detail under 100 mm, linear reading is then exact to 0.2 mm (test)."""
CUBIC_MM = 12.0
"""Exact nodes, cubic in between: ten times faster than exact inverses every 4 mm."""
CANONICAL_BOX_MM = ((-210.0, -150.0, -230.0), (210.0, 170.0, 500.0))


def _normalised(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Voxel positions (..., 3) z, y, x -> grid_sample coordinates (..., 3) x, y, z with align_corners."""
    size = torch.tensor([max(n - 1, 1) for n in shape], dtype=points.dtype, device=points.device)
    return (2 * points / size - 1).flip(-1)


def sample_at(volume: Tensor, points: Tensor, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Read (1, C, z, y, x) at voxel positions (..., 3) z, y, x -> (C, ...)."""
    grid = _normalised(points, volume.shape[2:]).reshape(1, 1, 1, -1, 3)
    values = F.grid_sample(volume, grid.to(volume.dtype), mode=mode, padding_mode=padding, align_corners=True)
    return values.reshape(volume.shape[1], *points.shape[:-1])


def _lattice(geometry: Geometry, transform: Transform) -> tuple[Geometry, np.ndarray]:
    """Nodes of every LATTICE_VOXELS-th voxel of `geometry` and the image (3, z, y, x) mm of each under `transform`."""
    shape = tuple(-(-n // LATTICE_VOXELS) + 1 for n in geometry.shape)
    nodes = Geometry(shape, geometry.spacing * LATTICE_VOXELS, geometry.origin, geometry.direction)
    return nodes, correspond.on_lattice(nodes, transform, CUBIC_MM)


class CanonicalFrame:
    """Voxels (z, y, x) of a 2 mm grid <-> voxels of a 2 mm grid over the canonical body, differentiable in neither.

    Args:
        geometry: the subject's 2 mm grid, axes along L, P, S.
        to_canonical: patient mm -> canonical mm with an inverse.
    """

    def __init__(self, geometry: Geometry, to_canonical: Transform) -> None:
        low, high = (np.array(end) for end in CANONICAL_BOX_MM)
        size = np.ceil((high - low) / 2.0).astype(int)
        canonical = Geometry((int(size[2]), int(size[1]), int(size[0])), np.full(3, 2.0), low, np.eye(3))
        self._forward = self._offsets(geometry, to_canonical, canonical)
        self._backward = self._offsets(canonical, to_canonical.inverse(), geometry)

    @staticmethod
    def _offsets(source: Geometry, transform: Transform, target: Geometry) -> Tensor:
        nodes, images = _lattice(source, transform)
        index = target.mm_to_index(images.reshape(3, -1).T.astype(np.float64))[:, ::-1]
        own = np.stack(np.meshgrid(*[np.arange(n) * LATTICE_VOXELS for n in nodes.shape], indexing="ij"), -1)
        offsets = index.reshape(*nodes.shape, 3) - own
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(offsets, -1, 0), dtype=np.float32))[None]

    @staticmethod
    def _shifted(offsets: Tensor, voxels: Tensor) -> Tensor:
        return voxels + sample_at(offsets, voxels / LATTICE_VOXELS, padding="border").movedim(0, -1)

    def to_common(self, voxels: Tensor) -> Tensor:
        """Subject voxels (..., 3) float z, y, x -> canonical voxels (..., 3)."""
        return self._shifted(self._forward, voxels)

    def from_common(self, voxels: Tensor) -> Tensor:
        """Canonical voxels (..., 3) -> subject voxels (..., 3)."""
        return self._shifted(self._backward, voxels)
