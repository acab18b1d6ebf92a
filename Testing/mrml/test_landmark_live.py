"""Points of the template followed live into the query, on a real scene through the real worker (random network)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("slicer")

from landmark_cases import (
    CELL_MM,
    HILUM,
    LIVER,
    SPINE,
    add_points,
    add_scan,
    click,
    labels_of,
    linear_parent,
    rigid,
    world_of,
)

from UAECommonLib.mrml import flip_points
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib.logic import UAELandmarkLogic

TIMEOUT_S = 240.0


@pytest.fixture
def make_logic(scene: Any, client: WorkerClient) -> Iterator[Callable[..., UAELandmarkLogic]]:
    made: list[UAELandmarkLogic] = []

    def make(**options: Any) -> UAELandmarkLogic:
        made.append(UAELandmarkLogic(scene, client, **options))
        return made[-1]

    yield make
    for logic in made:
        logic.close()
        assert not logic._preparation.pairs.folder.exists()


@pytest.fixture
def live(scene, make_logic):
    """A prepared pair, two points on the template, and their query list followed live."""
    messages: list[str] = []
    logic = make_logic(onMessage=messages.append)
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets", (SPINE, LIVER))
    logic.prepareAndWait(template, query)
    found = logic.startLive(template, query, points, method="nearest")
    settle(logic)
    return logic, template, query, points, found, messages


def settle(logic: UAELandmarkLogic) -> None:
    assert logic.waitForAnswers(TIMEOUT_S)


def test_points_there_are_matched_and_described(live):
    logic, _template, _query, _points, found, _messages = live
    assert labels_of(found) == ["P1", "P2"]
    for index, place in enumerate((SPINE, LIVER)):
        assert np.linalg.norm(world_of(found, index) - flip_points(place)[0]) < CELL_MM  # the same voxels: found again
        text = found.GetNthControlPointDescription(index)
        assert text.startswith("score ") and "cycle" in text and "nearest" in text and "not confident: " in text
        assert not found.GetNthControlPointSelected(index)
    assert logic.isLive(found) and logic.pointsToMatch(found) == 0
    assert found.GetDisplayNode().GetColor() != found.GetDisplayNode().GetSelectedColor()


def test_add_move_rename_delete_follow(live):
    logic, _template, _query, points, found, _messages = live
    jumps: list[np.ndarray] = []
    logic.onJump = jumps.append
    click(points, flip_points(HILUM)[0], "lung")
    settle(logic)
    assert labels_of(found) == ["P1", "P2", "lung"]
    assert np.allclose(jumps[-1], world_of(found, 2))

    points.SetNthControlPointPositionWorld(0, flip_points((14.0, 30.0, 80.0))[0].tolist())
    settle(logic)
    assert np.linalg.norm(world_of(found, 0) - flip_points((14.0, 30.0, 80.0))[0]) < CELL_MM
    assert np.allclose(jumps[-1], world_of(found, 0))

    points.SetNthControlPointLabel(1, "Leber ü")
    assert labels_of(found) == ["P1", "Leber ü", "lung"]

    before = world_of(found, 2)
    points.RemoveNthControlPoint(0)
    assert labels_of(found) == ["Leber ü", "lung"]
    assert np.allclose(world_of(found, 1), before)
    points.RemoveAllControlPoints()
    assert found.GetNumberOfControlPoints() == 0


def test_links_hold_by_point_not_by_place_in_the_list(live):
    logic, _template, _query, points, found, _messages = live
    first, second = world_of(found, 0), world_of(found, 1)
    points.SwapControlPoints(0, 1)
    points.SetNthControlPointLabel(0, "liver")
    settle(logic)
    assert labels_of(found) == ["P1", "liver"]
    assert np.allclose(world_of(found, 0), first) and np.allclose(world_of(found, 1), second)
    assert logic.queryPointOf(found, 0) == 1


def test_a_quick_drag_ends_where_the_mouse_ended(live):
    logic, _template, _query, points, found, _messages = live
    for step in np.linspace(0, 1, 40):
        place = np.array(SPINE) + step * (np.array(LIVER) - SPINE)
        points.SetNthControlPointPositionWorld(0, flip_points(place)[0].tolist())
        logic.pump(0.01)
    settle(logic)
    assert np.linalg.norm(world_of(found, 0) - flip_points(LIVER)[0]) < CELL_MM
    assert logic.pointsToMatch(found) == 0


def test_moving_one_point_while_another_waits_answers_both(live):
    logic, _template, _query, points, found, _messages = live
    points.SetNthControlPointPositionWorld(0, flip_points(HILUM)[0].tolist())
    points.SetNthControlPointPositionWorld(1, flip_points(SPINE)[0].tolist())
    settle(logic)
    assert np.linalg.norm(world_of(found, 0) - flip_points(HILUM)[0]) < CELL_MM
    assert np.linalg.norm(world_of(found, 1) - flip_points(SPINE)[0]) < CELL_MM


def test_a_preview_point_is_not_matched(live):
    logic, _template, _query, points, found, _messages = live
    index = click(points, flip_points(HILUM)[0], "preview")
    settle(logic)
    points.UnsetNthControlPointPosition(index)
    settle(logic)
    assert labels_of(found) == ["P1", "P2"]


def test_geometry_points_follow_under_parents_of_everything(live, scene):
    """Template, query and both point lists each under its own parent, then these moved."""
    logic, template, query, points, found, _messages = live
    above = [linear_parent(scene, rigid((20, -10, 35), (50, -20, 10)), template)]
    above += [linear_parent(scene, rigid((-15, 25, 5), (-30, 60, 5)), query)]
    above += [linear_parent(scene, rigid((3, 4, 5), (6, 7, 8)), points)]
    above += [linear_parent(scene, rigid((-30, 0, 12), (0, 0, 90)), found)]

    def truth(index: int) -> np.ndarray:
        to_world = [np.eye(4), np.eye(4)]
        for number, node in enumerate((template, query)):
            parent = node.GetParentTransformNode()
            to_world[number] = _matrix(parent)
        own = np.linalg.inv(to_world[0]) @ np.append(world_of(points, index), 1)
        return (to_world[1] @ own)[:3]

    inside = flip_points((SPINE, LIVER))
    for index in range(2):
        place = _matrix(above[0]) @ np.append(inside[index], 1)
        points.SetNthControlPointPositionWorld(index, place[:3].tolist())
    settle(logic)
    for index in range(2):
        assert np.linalg.norm(world_of(found, index) - truth(index)) < 2.0
    starts = logic.client.starts
    from UAECommonLib.mrml import vtk_matrix

    above[1].SetMatrixTransformToParent(vtk_matrix(rigid((0, 40, 0), (11, 12, 13))))
    settle(logic)
    for index in range(2):
        assert np.linalg.norm(world_of(found, index) - truth(index)) < 2.0
    assert logic.client.starts == starts and logic.prepared(template, query) is not None


def _matrix(transform: Any) -> np.ndarray:
    import vtk

    from UAECommonLib.mrml import matrix_of

    matrix = vtk.vtkMatrix4x4()
    transform.GetMatrixTransformToWorld(matrix)
    return matrix_of(matrix)


def test_a_point_outside_the_template_is_told_and_has_no_match(live):
    logic, _template, _query, points, found, messages = live
    click(points, np.array([900.0, 0.0, 0.0]), "far")
    settle(logic)
    assert labels_of(found) == ["P1", "P2"]
    assert any("far" in message and "outside" in message for message in messages)
    points.SetNthControlPointPositionWorld(2, flip_points(HILUM)[0].tolist())
    settle(logic)
    assert labels_of(found) == ["P1", "P2", "far"]


def test_a_query_point_placed_by_hand_says_so_until_its_template_point_moves(live):
    logic, _template, _query, points, found, _messages = live
    found.SetNthControlPointPositionWorld(0, (1.0, 2.0, 3.0))
    found.InvokeEvent(found.PointEndInteractionEvent)
    assert found.GetNthControlPointDescription(0) == "placed by hand"
    points.SetNthControlPointLabel(0, "other")
    settle(logic)
    assert np.allclose(world_of(found, 0), (1, 2, 3))
    points.SetNthControlPointPositionWorld(0, flip_points(HILUM)[0].tolist())
    settle(logic)
    assert found.GetNthControlPointDescription(0).startswith("score")


def test_the_better_answer_replaces_the_first(live):
    logic, template, query, points, _found, _messages = live
    seen: list[str] = []
    better = logic.startLive(template, query, points, method="fixed-point")
    number = better.AddObserver(
        better.PointModifiedEvent, lambda node, _event: seen.append(node.GetNthControlPointDescription(0))
    )
    settle(logic)
    better.RemoveObserver(number)
    assert any("being improved" in text for text in seen)
    assert "being improved" not in better.GetNthControlPointDescription(0)


def test_undo_takes_the_match_back_with_the_click(live, scene):
    logic, _template, _query, points, found, _messages = live
    scene.SetUndoOn()
    scene.SaveStateForUndo()
    click(points, flip_points(HILUM)[0], "lung")
    settle(logic)
    assert labels_of(found) == ["P1", "P2", "lung"]
    scene.Undo()
    settle(logic)
    assert labels_of(points) == ["P1", "P2"] and labels_of(found) == ["P1", "P2"]
    assert np.linalg.norm(world_of(found, 1) - flip_points(LIVER)[0]) < CELL_MM


def test_stopping_leaves_the_points_where_they_are(live):
    logic, _template, _query, points, found, _messages = live
    logic.stopLive(found)
    points.SetNthControlPointPositionWorld(0, flip_points(HILUM)[0].tolist())
    click(points, flip_points(HILUM)[0], "more")
    settle(logic)
    assert labels_of(found) == ["P1", "P2"] and not logic.isLive(found)
    assert np.linalg.norm(world_of(found, 0) - flip_points(SPINE)[0]) < CELL_MM


def test_a_changed_image_has_to_be_prepared_again(live):
    import slicer

    logic, template, query, points, found, _messages = live
    slicer.util.arrayFromVolume(query)[:] += 50
    slicer.util.arrayFromVolumeModified(query)
    query.GetImageData().Modified()
    assert logic.prepared(template, query) is None
    click(points, flip_points(HILUM)[0], "lung")
    settle(logic)
    assert labels_of(found) == ["P1", "P2"]
    logic.prepareAndWait(template, query)
    settle(logic)
    assert labels_of(found) == ["P1", "P2", "lung"]


def test_saved_and_opened_again_the_link_lives(live, headless, scene, tmp_path):
    logic, _template, _query, _points, found, _messages = live
    name = found.GetName()
    places = [world_of(found, index) for index in range(2)]
    scene_file = headless.save_scene(tmp_path / "Szene ä.mrb")
    headless.load_scene(scene_file)
    found = headless.node(name)
    linked = logic.linked(found)
    assert linked["template"].GetName() == "CT" and linked["query"].GetName() == "MR"
    assert linked["method"] == "nearest" and logic.isLive(found)
    assert all(np.allclose(world_of(found, index), place, atol=1e-4) for index, place in enumerate(places))
    assert found.GetNthControlPointDescription(0).startswith("score")
    assert logic.pointsToMatch(found) == 0
    points = linked["points"]
    points.RemoveNthControlPoint(0)
    assert labels_of(found) == ["P2"]
    click(points, flip_points(HILUM)[0], "lung")
    logic.prepareAndWait(linked["template"], linked["query"])
    settle(logic)
    assert labels_of(found) == ["P2", "lung"]


def test_closing_the_scene_in_the_middle_drops_the_answer_with_a_message(live, scene):
    logic, _template, _query, points, _found, messages = live
    click(points, flip_points(HILUM)[0], "lung")
    scene.Clear(False)
    settle(logic)
    assert scene.GetNumberOfNodesByClass("vtkMRMLMarkupsFiducialNode") == 0
    assert any("dropped" in message for message in messages)


def test_removing_the_query_in_the_middle_drops_the_answer_with_a_message(live, scene):
    logic, _template, query, points, found, messages = live
    click(points, flip_points(HILUM)[0], "lung")
    scene.RemoveNode(query)
    settle(logic)
    assert labels_of(found) == ["P1", "P2"] and not logic.isLive(found)
    assert any("dropped" in message for message in messages)


def test_notes_in_the_scene_are_plain_json(live):
    _logic, _template, _query, points, found, _messages = live
    notes = json.loads(found.GetAttribute("UAE.linked"))
    assert set(notes) == {points.GetNthControlPointID(0), points.GetNthControlPointID(1)}
