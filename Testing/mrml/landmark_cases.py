"""Scans for the landmark tests: a small one with a random network (quick), and one phantom on odd grids (true)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import vtk

from UAECommonLib.mrml import add_volume, flip_points, vtk_matrix
from UAECommonLib.worker_client import WorkerClient

SPINE, LIVER, HILUM = (4.0, 36.0, 60.0), (-40.0, 0.0, 50.0), (14.0, 30.0, 80.0)
"""Points (LPS mm) inside `small_scan`, where it has structure enough for a random network."""

CELL_MM = 4.5
"""A fine cell and a little: as near as a random network finds a place of the same voxels again."""


def small_scan(seed: int = 0) -> sitk.Image:
    """A CT-like scan of 36 x 44 x 48 voxels of 4 mm: soft tissue with lungs, spine and texture."""
    shape = (36, 44, 48)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.85) ** 2 + (y / 0.75) ** 2 < 1] = 40
    for side in (-1, 1):
        hu[((x - 0.4 * side) / 0.3) ** 2 + (y / 0.45) ** 2 + ((z - 0.3) / 0.6) ** 2 < 1] = -800
    hu[(x / 0.12) ** 2 + ((y - 0.5) / 0.14) ** 2 < 1] = 400
    hu += np.random.default_rng(seed).normal(0, 40, shape)
    image = sitk.GetImageFromArray(hu.astype(np.float32))
    image.SetSpacing((4.0, 4.0, 4.0))
    image.SetOrigin((-90.0, -80.0, 20.0))
    return image


def tiny_client(model: Path) -> WorkerClient:
    """A worker with the random network of a model file."""
    return WorkerClient(options=["--device", "cpu", "--threads", "1", "--model", str(model)])


def add_scan(scene: Any, name: str, seed: int = 0) -> Any:
    """`small_scan` as a volume node."""
    return add_volume(scene, small_scan(seed), name)


def add_points(scene: Any, name: str = "Targets", points: tuple[tuple[float, ...], ...] = ()) -> Any:
    """A point list node with points given in LPS mm."""
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
    node.SetUndoEnabled(True)
    for number, point in enumerate(points, 1):
        click(node, flip_points(point)[0], f"P{number}")
    return node


def click(node: Any, world: np.ndarray, label: str) -> int:
    """Place a control point at a world position (RAS mm); returns its index."""
    return node.AddControlPointWorld(vtk.vtkVector3d(*map(float, world)), label)


def world_of(node: Any, index: int) -> np.ndarray:
    """World position (3,) RAS mm of a control point."""
    return np.array(node.GetNthControlPointPositionWorld(index))


def labels_of(node: Any) -> list[str]:
    """Labels of all control points."""
    return [node.GetNthControlPointLabel(index) for index in range(node.GetNumberOfControlPoints())]


def linear_parent(scene: Any, matrix: np.ndarray, *nodes: Any) -> Any:
    """A linear transform node with a (4, 4) RAS matrix to parent above nodes."""
    transform = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    transform.SetMatrixTransformToParent(vtk_matrix(matrix))
    for node in nodes:
        node.SetAndObserveTransformNodeID(transform.GetID())
    return transform


def rigid(degrees: tuple[float, float, float], shift: tuple[float, float, float]) -> np.ndarray:
    """A (4, 4) rigid matrix from Euler angles and a shift, mm."""
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix
