"""Scans, transforms and result folders for the tests of the modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from uae.geometry import Geometry
from uae.transform import Composite, DisplacementField, Rigid, write_transform
from UAECommonLib.mrml import add_volume, vtk_matrix

FLIPPED = np.array([[-1.0, 0, 0], [0, 1, 0], [0, 0, -1]])


def oblique(*angles: float) -> np.ndarray:
    """(3, 3) rotation by Euler angles in degrees."""
    return Rigid.from_euler_deg(*angles).rotation


def add_scan(
    scene: Any, name: str, direction: np.ndarray, spacing=(2.0, 3.0, 4.0), size=(30, 24, 20), origin=(-20, 15, -40)
) -> Any:
    """A volume node with noise, any orientation and anisotropic voxels; all in LPS mm."""
    rng = np.random.default_rng(len(name))
    image = sitk.GetImageFromArray(rng.integers(-200, 300, size[::-1]).astype(np.int16))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(np.asarray(direction).ravel().tolist())
    return add_volume(scene, image, name)


def add_linear(scene: Any, name: str, matrix: np.ndarray) -> Any:
    """A linear transform node with a (4, 4) RAS matrix to parent."""
    node = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", name)
    node.SetMatrixTransformToParent(vtk_matrix(matrix))
    return node


def rigid_ras(angle: float, shift: tuple[float, float, float]) -> np.ndarray:
    """(4, 4) rotation about a slanted axis by some degrees and a shift in mm."""
    return Rigid.from_euler_deg(angle, -0.5 * angle, 0.3 * angle, shift).matrix


def known_transforms(deformable: bool = True) -> tuple[Rigid, DisplacementField | None]:
    """R, and u on an oblique anisotropic grid that fades to 0 on its border."""
    rigid = Rigid.from_euler_deg(8, -5, 12, (25, -40, 60), (10, 20, 30))
    if not deformable:
        return rigid, None
    geometry = Geometry((14, 16, 18), np.array([6.0, 5.0, 4.0]), np.array([-45.0, -20.0, -60.0]), oblique(10, 5, -8))
    z, y, x = (np.sin(np.pi * np.arange(n) / (n - 1)) ** 2 for n in geometry.shape)
    bump = z[:, None, None, None] * y[None, :, None, None] * x[None, None, :, None]
    vectors = bump * np.array([6.0, -4.0, 5.0])
    for face in range(3):
        for edge in (0, -1):
            np.moveaxis(vectors, face, 0)[edge] = 0.0
    return rigid, DisplacementField(vectors, geometry)


def write_result_folder(folder: Path, deformable: bool = True, status: str = "accepted") -> Path:
    """What `uae register` writes, with the known transforms."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"status": status, "reason": "made by a test", "inputs": {"fixed": {}, "moving": {}}, "device": "cpu"}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if status != "refused":
        rigid, field = known_transforms(deformable)
        write_transform(folder / "rigid.tfm", rigid)
        if field is not None:
            write_transform(folder / "displacement.nii.gz", field)
    return folder


def itk_transform(folder: Path) -> sitk.Transform:
    """The files of a result folder as SimpleITK's own transform, fixed to moving, LPS."""
    chain = sitk.CompositeTransform(3)
    chain.AddTransform(sitk.ReadTransform(str(folder / "rigid.tfm")))
    field = folder / "displacement.nii.gz"
    if field.is_file():
        image = sitk.Cast(sitk.ReadImage(str(field)), sitk.sitkVectorFloat64)
        chain.AddTransform(sitk.DisplacementFieldTransform(image))
    return chain


def truth(deformable: bool = True) -> Composite:
    """The known map fixed to moving of this package."""
    rigid, field = known_transforms(deformable)
    return Composite([rigid] if field is None else [field, rigid])


def world_positions(scene: Any) -> dict[str, list[float]]:
    """Where a few points of every transformable node lie in the world (RAS mm), by node ID."""
    import vtk

    positions = {}
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLTransformableNode")):
        node = scene.GetNthNodeByClass(index, "vtkMRMLTransformableNode")
        if node.IsA("vtkMRMLTransformNode"):
            continue
        to_world = vtk.vtkGeneralTransform()
        parent = node.GetParentTransformNode()
        if parent is not None:
            parent.GetTransformToWorld(to_world)
        positions[node.GetID()] = [list(to_world.TransformPoint(*p)) for p in np.diag([50.0, 60, 70]).tolist()]
    return positions


def transform_matrices(scene: Any) -> dict[str, list[float]]:
    """The matrix of every linear transform node, by node ID."""
    import vtk

    matrices = {}
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLLinearTransformNode")):
        node = scene.GetNthNodeByClass(index, "vtkMRMLLinearTransformNode")
        matrix = vtk.vtkMatrix4x4()
        node.GetMatrixTransformToParent(matrix)
        matrices[node.GetID()] = [matrix.GetElement(r, c) for r in range(4) for c in range(4)]
    return matrices
