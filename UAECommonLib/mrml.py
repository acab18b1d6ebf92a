"""MRML nodes (world, RAS mm) to files of the core (patient LPS mm) and back; the only place where the two meet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from uae.errors import ResourceError
from UAECommonLib.errors import UnsuitableNodeError

if TYPE_CHECKING:
    import SimpleITK as sitk

__all__ = [
    "add_volume", "array_of", "as_ras", "check_linear_parents", "fingerprint", "flip_matrix", "flip_points",
    "grid_transform", "ijk_to_world_lps", "matrix_of", "parent_chain", "roi_fingerprint", "same_fingerprint",
    "vtk_matrix", "world_matrix", "write_roi_mask", "write_volume",
]  # fmt: skip

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
"""RAS to LPS and back: both negate the first two axes."""
SHEAR_TOLERANCE = 1e-3
"""Largest cosine between two image axes that a file's direction can stand for (the core's reader accepts as much)."""
ROI_SPACING_MM = 2.0
"""Voxel size of a region of interest written as a mask: the network's grid, which cannot tell finer ones apart."""
ROI_MOST = 64
"""Voxels of such a mask along an axis: it is all ones, so a coarser one says the same."""
FINGERPRINT_VOXELS = 65_536
"""Voxels looked at to see whether an image changed between two sessions; edits in this one are seen by their events."""


def flip_points(points: np.ndarray) -> np.ndarray:
    """Points (N, 3) from RAS to LPS mm or back, float64 (N, 3)."""
    return np.asarray(points, dtype=np.float64).reshape(-1, 3) * (-1.0, -1.0, 1.0)


def flip_matrix(matrix: np.ndarray) -> np.ndarray:
    """A (4, 4) map between patient points from RAS to LPS or back."""
    return FLIP @ np.asarray(matrix, dtype=np.float64) @ FLIP


def matrix_of(source: vtk.vtkMatrix4x4) -> np.ndarray:
    """The same as a (4, 4) float64 array."""
    return np.array([[source.GetElement(row, column) for column in range(4)] for row in range(4)])


def vtk_matrix(matrix: np.ndarray) -> vtk.vtkMatrix4x4:
    """A (4, 4) array as a VTK matrix."""
    target = vtk.vtkMatrix4x4()
    target.DeepCopy(np.asarray(matrix, dtype=np.float64).ravel().tolist())
    return target


def parent_chain(node: Any, top: Any = None) -> list[Any]:
    """Transform nodes above `node`, the nearest first; up to and including `top` (none where that is `node` itself)."""
    chain = []
    current = node
    while current is not top and (current := current.GetParentTransformNode()) is not None:
        chain.append(current)
    return chain


def check_linear_parents(node: Any, top: Any = None) -> None:
    """Refuse a node under a transform that no file header can hold.

    Raises:
        UnsuitableNodeError: some parent (up to `top`) is not linear; the message asks to harden it.
    """
    for parent in parent_chain(node, top):
        if not parent.IsLinear():
            raise UnsuitableNodeError(
                f"{node.GetName()} lies under the non-linear transform {parent.GetName()}; "
                "harden that transform first (Data module: right-click the transform, Harden transform)"
            )


def world_matrix(node: Any, top: Any = None) -> np.ndarray:
    """(4, 4) RAS mm: from a transformable node's own space to the world, or to the space of `top`'s parent.

    Raises:
        UnsuitableNodeError: some parent (up to `top`) is not linear.
    """
    check_linear_parents(node, top)
    matrix = np.eye(4)
    for parent in parent_chain(node, top):
        step = vtk.vtkMatrix4x4()
        parent.GetMatrixTransformToParent(step)
        matrix = matrix_of(step) @ matrix
    return matrix


def ijk_to_world_lps(volume: Any, top: Any = None) -> np.ndarray:
    """(4, 4) from voxel indices (i, j, k) of a volume node to world LPS mm, or to the space of `top`'s parent.

    Raises:
        UnsuitableNodeError: some parent (up to `top`) is not linear.
    """
    ijk_to_ras = vtk.vtkMatrix4x4()
    volume.GetIJKToRASMatrix(ijk_to_ras)
    return FLIP @ world_matrix(volume, top) @ matrix_of(ijk_to_ras)


def array_of(volume: Any) -> np.ndarray:
    """Voxels (z, y, x) of a scalar volume node, a view on its own memory.

    Raises:
        UnsuitableNodeError: the node holds no image, or more than one value a voxel.
    """
    image = volume.GetImageData()
    if image is None or image.GetNumberOfPoints() == 0 or image.GetPointData().GetScalars() is None:
        raise UnsuitableNodeError(f"{volume.GetName()} holds no voxels; load the scan again")
    if image.GetNumberOfScalarComponents() != 1:
        raise UnsuitableNodeError(
            f"{volume.GetName()} holds {image.GetNumberOfScalarComponents()} values a voxel; choose a grey CT or MR"
        )
    return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])


def write_volume(volume: Any, path: str | Path, top: Any = None) -> None:
    """Write a scalar volume node as an uncompressed image in its WORLD frame; its voxels are not touched.

    Args:
        volume: scalar volume node; parents may turn, shift, mirror and scale it.
        path: .nrrd file to write.
        top: the last of its parents that counts (all where None); the volume itself writes it in its own frame.

    Raises:
        UnsuitableNodeError: a parent is non-linear, the axes are sheared, or the node holds no grey image.
        ResourceError: the disk is full.
    """
    import SimpleITK as sitk

    voxels = array_of(volume)
    image = sitk.GetImageFromArray(voxels)
    _set_geometry(image, ijk_to_world_lps(volume, top), volume.GetName())
    _write(image, path, compress=False)


def write_roi_mask(roi: Any, path: str | Path) -> None:
    """Write a markups ROI as a mask image of ones on a grid of its own axes, in the world frame.

    Args:
        roi: vtkMRMLMarkupsROINode.
        path: .nrrd file to write.

    Raises:
        UnsuitableNodeError: it has no extent, or lies under a non-linear or shearing parent.
    """
    import SimpleITK as sitk

    check_linear_parents(roi)
    size = np.array(roi.GetSize())
    if np.any(size <= 0):
        raise UnsuitableNodeError(f"the region {roi.GetName()} is empty; draw it, or choose none")
    count = np.clip(np.ceil(size / ROI_SPACING_MM), 4, ROI_MOST).astype(int)
    index_to_object = np.diag([*(size / count), 1.0])
    index_to_object[:3, 3] = (size / count - size) / 2
    image = sitk.GetImageFromArray(np.ones(count[::-1], dtype=np.uint8))
    _set_geometry(image, FLIP @ _roi_to_world(roi) @ index_to_object, roi.GetName())
    _write(image, path, compress=True)


def _roi_to_world(roi: Any) -> np.ndarray:
    """(4, 4) from a markups ROI's own axes, with its centre as origin, to world RAS mm."""
    return world_matrix(roi) @ matrix_of(roi.GetObjectToNodeMatrix())


def roi_fingerprint(roi: Any) -> str:
    """Text that tells where a markups ROI lies in the world and how large it is; see `same_fingerprint`.

    Raises:
        UnsuitableNodeError: some parent is not linear.
    """
    return json.dumps({"place": (_roi_to_world(roi) @ np.diag([*roi.GetSize(), 1.0])).round(6).tolist()})


def _write(image: sitk.Image, path: str | Path, compress: bool) -> None:
    import SimpleITK as sitk

    try:
        sitk.WriteImage(image, str(path), useCompression=compress)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise ResourceError(f"{path} cannot be written ({last}); free some space on that disk") from error


def _set_geometry(image: sitk.Image, index_to_lps: np.ndarray, name: str) -> None:
    """Place an image by its (4, 4) map from index to LPS mm; UnsuitableNodeError where the axes are sheared."""
    steps = index_to_lps[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    if not np.all(np.isfinite(index_to_lps)) or np.any(spacing == 0):
        raise UnsuitableNodeError(f"the geometry of {name} is not usable (a voxel has no extent); load the scan again")
    direction = steps / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > SHEAR_TOLERANCE:
        raise UnsuitableNodeError(
            f"the axes of {name} are not perpendicular (sheared by a parent transform or gantry tilt); "
            "resample it first (module Crop Volume or Resample Scalar/Vector/DWI Volume) and choose the result"
        )
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(index_to_lps[:3, 3].tolist())


def as_ras(image: sitk.Image) -> np.ndarray:
    """(4, 4) from voxel indices of an image to RAS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return FLIP @ matrix


def add_volume(scene: Any, image: sitk.Image, name: str, label: bool = False) -> Any:
    """Add an image of the core to the scene, with a display node.

    Args:
        scene: vtkMRMLScene.
        image: scalar, LPS.
        name: of the new node.
        label: a label map instead of a grey volume.

    Returns:
        The volume node, without a parent.
    """
    import SimpleITK as sitk

    kind = "vtkMRMLLabelMapVolumeNode" if label else "vtkMRMLScalarVolumeNode"
    node = scene.AddNewNodeByClass(kind, scene.GenerateUniqueName(name))
    voxels = np.ascontiguousarray(sitk.GetArrayFromImage(image))
    data = vtk.vtkImageData()
    data.SetDimensions(*voxels.shape[::-1])
    data.GetPointData().SetScalars(numpy_to_vtk(voxels.ravel(), deep=True))
    node.SetIJKToRASMatrix(vtk_matrix(as_ras(image)))
    node.SetAndObserveImageData(data)
    node.CreateDefaultDisplayNodes()
    return node


def grid_transform(field: sitk.Image) -> Any:
    """A displacement field of the core as VTK's transform, x + u(x) in RAS, u trilinear as in ITK.

    Args:
        field: image of 3-vectors, LPS mm.

    Returns:
        slicer.vtkOrientedGridTransform; it is a transform FROM parent (fixed to moving).
    """
    import SimpleITK as sitk
    import slicer

    vectors = sitk.GetArrayFromImage(field).astype(np.float64) * (-1.0, -1.0, 1.0)
    to_ras = as_ras(field)
    spacing = np.linalg.norm(to_ras[:3, :3], axis=0)
    directions = np.eye(4)
    directions[:3, :3] = to_ras[:3, :3] / spacing
    data = vtk.vtkImageData()
    data.SetDimensions(*field.GetSize())
    data.SetSpacing(*spacing)
    data.SetOrigin(*to_ras[:3, 3])
    data.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(vectors.reshape(-1, 3)), deep=True))
    grid = slicer.vtkOrientedGridTransform()
    grid.SetDisplacementGridData(data)
    grid.SetGridDirectionMatrix(vtk_matrix(directions))
    grid.SetInterpolationModeToLinear()
    return grid


def fingerprint(volume: Any, top: Any = None) -> str:
    """Text that tells a volume node's voxels and place in the world; quick enough for the GUI thread.

    Args:
        volume: scalar volume node.
        top: the last of its parents that counts (all of them where None).

    Raises:
        UnsuitableNodeError: some parent is not linear, or the node holds no voxels.
    """
    voxels = array_of(volume).reshape(-1)
    sample = np.ascontiguousarray(voxels[:: max(1, voxels.size // FINGERPRINT_VOXELS)])
    return json.dumps(
        {
            "voxels": hashlib.sha256(sample.tobytes()).hexdigest()[:16],
            "size": volume.GetImageData().GetDimensions(),
            "place": ijk_to_world_lps(volume, top).round(6).tolist(),
        }
    )


def same_fingerprint(first: str, second: str) -> bool:
    """Whether two fingerprints tell the same voxels in the same place, within 0.001 mm."""
    a, b = json.loads(first), json.loads(second)
    same_place = np.allclose(a.pop("place"), b.pop("place"), rtol=0, atol=1e-3)
    return a == b and bool(same_place)
