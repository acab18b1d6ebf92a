"""Clicks and drags in an offscreen slice view of the template, followed in the query by the real worker."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("slicer")

from landmark_cases import CELL_MM, LIVER, SPINE, add_points, add_scan, linear_parent, rigid, tiny_client, world_of

from UAECommonLib.mrml import flip_points
from UAELandmarkLib import views
from UAELandmarkLib.logic import UAELandmarkLogic

TIMEOUT_S = 240.0


def test_clicks_drag_and_the_jump_of_the_querys_view(headless, scene, slice_view, tiny_model):
    client = tiny_client(tiny_model)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    to_world = rigid((10, -20, 15), (40, 10, -30))
    linear_parent(scene, to_world, query)
    points = add_points(scene)
    points.CreateDefaultDisplayNodes()
    above, below = slice_view("Red", "Axial"), slice_view("Red+", "Axial")
    logic = UAELandmarkLogic(scene, client, onJump=lambda place: views.jump(scene, query, place))
    logic.prepareAndWait(template, query)
    found = logic.startLive(template, query, points, method="nearest")
    views.show_beside(scene, template, query)
    above.show(template)
    below.show(query)

    above.place(points)
    hit = [above.click_world(flip_points(place)[0]) for place in (SPINE, LIVER)]
    above.stop_placing()
    assert logic.waitForAnswers(TIMEOUT_S)
    assert points.GetNumberOfControlPoints() == found.GetNumberOfControlPoints() == 2

    def truth(place: np.ndarray) -> np.ndarray:
        return (to_world @ np.append(place, 1))[:3]

    for index, place in enumerate(hit):
        assert np.linalg.norm(world_of(points, index) - place) < 2.0
        assert np.linalg.norm(world_of(found, index) - truth(world_of(points, index))) < CELL_MM
        assert found.GetNthControlPointLabel(index) == points.GetNthControlPointLabel(index)
    shown = below.node.GetSliceToRAS()
    normal = np.array([shown.GetElement(row, 2) for row in range(3)])
    origin = np.array([shown.GetElement(row, 3) for row in range(3)])
    assert abs(normal @ (world_of(found, 1) - origin)) < 0.5

    above.jump(world_of(points, 1))
    above.render()
    start = above.pixel(world_of(points, 1))
    above.drag(start, (start[0] + 12, start[1] - 9), steps=6)
    assert logic.waitForAnswers(TIMEOUT_S)
    assert np.linalg.norm(world_of(points, 1) - hit[1]) > 4.0
    assert np.linalg.norm(world_of(found, 1) - truth(world_of(points, 1))) < CELL_MM
    logic.close()
    client.close()
