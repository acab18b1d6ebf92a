"""World points (RAS mm) in a volume's own patient frame (LPS mm) and back: the edge between MRML and the core.

Any parent transforms, also non-linear ones, lie between a volume's own frame and the world; the core never sees them,
so a prepared pair stays valid when a parent moves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import vtk

from UAECommonLib.mrml import flip_points

__all__ = ["own_lps", "state_of", "world_ras"]


def own_lps(volume: Any, points: np.ndarray) -> np.ndarray:
    """World points (N, 3) RAS mm in the volume's own frame, (N, 3) LPS mm."""
    return flip_points(_between(None, volume.GetParentTransformNode(), points))


def world_ras(volume: Any, points: np.ndarray) -> np.ndarray:
    """Points (N, 3) LPS mm of the volume's own frame in the world, (N, 3) RAS mm."""
    return _between(volume.GetParentTransformNode(), None, flip_points(points))


def _between(source: Any, target: Any, points: np.ndarray) -> np.ndarray:
    import slicer

    transform = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(source, target, transform)
    points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    return np.array([transform.TransformPoint(point) for point in points.tolist()]).reshape(-1, 3)


def state_of(volume: Any) -> tuple[Any, ...]:
    """What changes when the voxels or their place in the volume's own frame change (not when a parent moves)."""
    matrix = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(matrix)
    image = volume.GetImageData()
    elements = tuple(matrix.GetElement(row, column) for row in range(4) for column in range(4))
    return (image.GetMTime() if image is not None else 0, elements)
