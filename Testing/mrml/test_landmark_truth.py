"""The shipping model on one phantom body in two scans on odd grids under parents: matched world points are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("slicer")

from landmark_cases import click, linear_parent, rigid, world_of

from UAECommonLib.mrml import add_volume, flip_points, matrix_of
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib.logic import UAELandmarkLogic

SEED = 200_060
POINTS = 12


def odd_scan(middle: np.ndarray, degrees: tuple[float, float, float], spacing: tuple[float, ...], flips: tuple) -> Any:
    """CT of the subject on an oblique, flipped, anisotropic grid around a place (3,) LPS mm."""
    from uae.geometry import Geometry
    from uae.phantom import make_phantom

    direction = rigid(degrees, (0, 0, 0))[:3, :3] @ np.diag(flips)
    size = np.array([260.0, 220.0, 190.0])
    shape = np.round(size / spacing).astype(int)
    origin = middle - direction @ ((shape - 1) * spacing / 2)
    geometry = Geometry(tuple(int(n) for n in shape[::-1]), np.array(spacing), origin, direction)
    return make_phantom(SEED, mr=False, table=False, geometry=geometry)


@pytest.mark.parametrize("hardened", [False, True])
def test_geometry_clicked_world_points_are_matched_within_2_mm(scene, hardened):
    import slicer
    import vtk

    from uae.phantom import make_phantom

    middle = make_phantom(SEED, 12.0, mr=False, part="abdomen").labels.geometry.center_mm()
    bodies = (
        odd_scan(middle, (8, -6, 15), (2.0, 2.5, 3.0), (1, -1, 1)),
        odd_scan(np.add(middle, (6.0, -4.0, 9.0)), (-7, 9, -12), (2.4, 2.0, 2.8), (-1, 1, -1)),
    )
    nodes = [add_volume(scene, body.ct.to_sitk(), name) for body, name in zip(bodies, ("CT", "later CT"))]
    # A hardened turn is a turned patient, and patients lie about straight; a parent may be turned in any way.
    turns = [(8, -5, 6), (-6, 7, 5)] if hardened else [(25, -15, 40), (-20, 35, 10)]
    above = [rigid(turns[0], (70, -30, 20)), rigid(turns[1], (-60, 45, 110))]
    for node, matrix in zip(nodes, above):
        linear_parent(scene, matrix, node)
        if hardened:
            node.HardenTransform()
    rng = np.random.default_rng(5)
    cells = np.argwhere(bodies[0].labels.array > 1)[:, ::-1].astype(float)
    inside = bodies[0].labels.geometry.index_to_mm(cells)
    inside = inside[bodies[1].labels.geometry.contains(inside, margin_voxels=-8)]
    chosen = inside[rng.choice(len(inside), POINTS, replace=False)]  # one body: the same LPS place in both scans

    points = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Targets")
    linear_parent(scene, rigid((1, 2, 3), (4, 5, 6)), points)
    for number, place in enumerate(flip_points(chosen)):
        click(points, (above[0] @ np.append(place, 1))[:3], f"P{number}")
    client = WorkerClient(options=["--device", "cpu"])
    logic = UAELandmarkLogic(scene, client)
    try:
        answer = logic.prepareAndWait(*nodes, templateModality="ct", queryModality="ct")
        assert answer["verdict"] in ("accepted", "review"), answer["reason"]
        found = logic.match(*nodes, points, templateModality="ct", queryModality="ct")
    finally:
        logic.close()
        client.close()
    errors = np.array(
        [
            np.linalg.norm(world_of(found, index) - (above[1] @ np.append(place, 1))[:3])
            for index, place in enumerate(flip_points(chosen))
        ]
    )
    assert np.median(errors) < 2.0, errors.round(1)
    confident = np.array([found.GetNthControlPointSelected(index) for index in range(POINTS)])
    assert confident.any() and errors[confident].max() < 10.0, errors.round(1)
    for node, matrix in zip(nodes, above):  # nobody moved
        transform = vtk.vtkMatrix4x4()
        slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(node.GetParentTransformNode(), None, transform)
        assert np.allclose(matrix_of(transform), np.eye(4) if hardened else matrix)
