"""The headless start-up itself: files round trip, and a mouse places and drags points."""

from __future__ import annotations

import numpy as np
import slicer
import slicer.util


def ball(headless, name="scan"):
    _, y, x = np.mgrid[:40, :60, :60]
    node = slicer.util.addVolumeFromArray((100 * ((x - 30) ** 2 + (y - 30) ** 2 < 400)).astype(np.int16))
    node.SetName(name)
    node.SetSpacing(3, 3, 4)
    node.CreateDefaultDisplayNodes()
    return node


def test_files_round_trip(headless, tmp_path):
    volume = ball(headless)
    points = headless.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.AddControlPoint(1, 2, 3)
    linear = headless.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode", "linear")
    volume.SetAndObserveTransformNodeID(linear.GetID())
    text = headless.scene.AddNewNodeByClass("vtkMRMLTextNode", "text")
    text.SetText('{"a": "ü"}')
    for node, name in (
        (volume, "v.nrrd"),
        (points, "p.mrk.json"),
        (points, "p.fcsv"),
        (linear, "l.h5"),
        (linear, "l.tfm"),
    ):
        read = headless.load(headless.save(node, tmp_path / name))
        assert read.IsA(node.GetClassName())
    saved = headless.save_scene(tmp_path / "scene.mrb")
    headless.load_scene(saved)
    assert headless.node("scan").GetParentTransformNode() is headless.node("linear")
    assert headless.node("text").GetText() == '{"a": "ü"}'
    np.testing.assert_allclose(headless.node("points").GetNthControlPointPositionWorld(0), (1, 2, 3))


def test_mouse_places_and_drags_points(headless, slice_view):
    view = slice_view("Red")
    view.show(ball(headless))
    points = headless.scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "points")
    points.CreateDefaultDisplayNodes()
    view.place(points)
    first, second = view.click_world((-90, -80, 60)), view.click_world((-60, -100, 60))
    view.stop_placing()
    assert points.GetNumberOfControlPoints() == 2
    for index, hit in enumerate((first, second)):
        np.testing.assert_allclose(points.GetNthControlPointPositionWorld(index), hit, atol=0.5)
    start = view.pixel(second)
    view.drag(start, (start[0] + 20, start[1]))
    np.testing.assert_allclose(points.GetNthControlPointPositionWorld(1), view.world(start[0] + 20, start[1]), atol=1.5)
    assert 20 < view.render().mean() < 235
