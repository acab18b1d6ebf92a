"""Many scans, the console's one call, similarity maps and files, on a real scene (random network)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
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

from uae.errors import InputError
from uae.points import read_points
from UAECommonLib.mrml import array_of, flip_points
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib.batch import COLUMNS
from UAELandmarkLib.logic import UAELandmarkLogic

TIMEOUT_S = 300.0


@pytest.fixture
def logic(scene: Any, client: WorkerClient) -> Iterator[UAELandmarkLogic]:
    logic = UAELandmarkLogic(scene, client)
    yield logic
    logic.close()


def test_match_in_one_call_as_in_the_console(logic, scene):
    templateVolume, queryVolume = add_scan(scene, "CT"), add_scan(scene, "MR")
    templateMarkups = add_points(scene, "Targets", (SPINE, LIVER))
    found = logic.match(templateVolume, queryVolume, templateMarkups, method="nearest")
    assert found.GetName() == "Targets in MR" and labels_of(found) == ["P1", "P2"]
    again = logic.match(templateVolume, queryVolume, templateMarkups, queryMarkups=found, method="fixed-point")
    assert again is found and found.GetNumberOfControlPoints() == 2
    assert not logic.isLive(found) and found.GetDescription().startswith("tiny 0 on cpu")
    assert logic.findLinked(templateVolume, queryVolume, templateMarkups) is found


def test_what_cannot_be_matched_is_said(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets")
    for arguments, word in (
        ((template, query, points), "no points"),
        ((template, template, points), "same volume"),
        ((template, None, points), "choose"),
        ((template, query, None), "points"),
    ):
        with pytest.raises(InputError, match=word):
            logic.match(*arguments)
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Empty")
    with pytest.raises(InputError, match="no voxels"):
        logic.prepare(template, empty)
    with pytest.raises(InputError, match="no-such-model"):
        logic.prepareAndWait(template, query, model="no-such-model")
    with pytest.raises(InputError, match="not prepared"):
        logic.similarityMap(logic.startLive(template, query, points), 0)


def test_the_same_volumes_are_not_embedded_twice(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR", seed=7)
    first = logic.prepareAndWait(template, query)
    stages: list[str] = []
    assert logic.prepare(template, query, onProgress=lambda stage, *_rest: stages.append(stage)) is None
    linear_parent(scene, rigid((5, 5, 5), (1, 2, 3)), template, query)
    assert logic.prepared(template, query) == first and stages == []
    logic.prepareAndWait(query, template, onProgress=lambda stage, *_rest: stages.append(stage))
    assert stages and not [stage for stage in stages if stage.startswith("embedding: ")]


def test_batch_table_and_csv(logic, scene, tmp_path):
    template = add_scan(scene, "CT")
    queries = [add_scan(scene, f"MR {number}") for number in range(2)]
    above = rigid((0, 0, 90), (5, 6, 7))
    linear_parent(scene, above, queries[1])
    empty = scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Empty")
    points = add_points(scene, "Targets", (SPINE, LIVER))
    seen: list[str] = []
    batch = logic.batch(
        template, [queries[0], empty, queries[1]], points, method="nearest",
        onProgress=lambda stage, *_rest: seen.append(stage),
    )  # fmt: skip
    assert batch.wait(TIMEOUT_S)
    assert set(batch.failed) == {"Empty"} and set(batch.results) == {node.GetID() for node in queries}
    assert any(text.startswith("3 of 3, MR 1") for text in seen)
    assert batch.table.GetNumberOfRows() == 5
    file = tmp_path / "Tabelle ü.csv"
    batch.exportCsv(file)
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [row["query"] for row in rows] == ["MR 0", "MR 0", "Empty", "MR 1", "MR 1"]
    assert "no voxels" in rows[2]["reason"] and rows[2]["confident"] == "false"
    world = flip_points([[float(rows[3][name]) for name in COLUMNS[2:5]]])[0]
    assert np.linalg.norm(world - (above @ np.append(flip_points(SPINE)[0], 1))[:3]) < CELL_MM
    found = scene.GetNodeByID(batch.results[queries[1].GetID()])
    assert np.allclose(world_of(found, 0), world, atol=1e-3) and not logic.isLive(found)


def test_batch_can_be_cancelled_and_keeps_what_it_has(logic, scene):
    template = add_scan(scene, "CT")
    queries = [add_scan(scene, f"MR {number}", seed=20 + number) for number in range(3)]
    points = add_points(scene, "Targets", (SPINE,))
    ends: list[Any] = []
    batch = logic.batch(template, queries, points, method="nearest", onDone=ends.append)
    batch.cancel()
    assert batch.wait(TIMEOUT_S) and ends == [batch]
    assert len(batch.results) < 3
    with pytest.raises(InputError, match="at least one"):
        logic.batch(template, [], points)


def test_similarity_map_lies_over_the_query(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    above = rigid((12, 0, 30), (10, 20, 30))
    transform = linear_parent(scene, above, query)
    points = add_points(scene, "Targets", (SPINE, HILUM))
    logic.prepareAndWait(template, query)
    found = logic.startLive(template, query, points, method="nearest")
    maps: list[Any] = []
    for index in range(2):
        logic.similarityMap(found, index, maps.append)
        assert logic.waitForAnswers(TIMEOUT_S)
    node = maps[-1]
    assert scene.GetNumberOfNodesByClass("vtkMRMLScalarVolumeNode") == 3  # the second took the first one's place
    assert node.GetParentTransformNode() is transform and "P2" in node.GetName()
    voxels = array_of(node)
    z, y, x = np.unravel_index(np.argmax(voxels), voxels.shape)
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    best = np.array(matrix.MultiplyPoint((float(x), float(y), float(z), 1.0)))[:3]
    # The nearest neighbour is the map's highest cell, moved by up to half a cell along each axis.
    apart = world_of(found, 1) - (above @ np.append(best, 1))[:3]
    assert np.linalg.norm(apart) <= np.sqrt(3) * 2.0 + 1e-3
    with pytest.raises(InputError, match="no such point"):
        logic.similarityMap(found, 9)


def test_point_lists_are_saved_and_loaded(logic, scene, tmp_path):
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets", (SPINE, LIVER))
    found = logic.match(template, query, points, method="nearest")
    file = tmp_path / "gefundene Punkte ü.mrk.json"
    logic.savePoints(found, file)
    read = read_points(file)
    assert read.labels == ["P1", "P2"]
    assert np.allclose(flip_points(read.points), [world_of(found, index) for index in range(2)], atol=1e-4)
    again = logic.loadPoints(file)
    assert labels_of(again) == ["P1", "P2"]
    assert again.GetNthControlPointDescription(0) == found.GetNthControlPointDescription(0)
    assert np.allclose(world_of(again, 1), world_of(found, 1), atol=1e-4)
    (tmp_path / "p.csv").write_text("label,x_lps_mm,y_lps_mm,z_lps_mm\nspine,4,36,60\n")
    assert np.allclose(world_of(logic.loadPoints(tmp_path / "p.csv"), 0), flip_points(SPINE)[0])
    count = scene.GetNumberOfNodes()
    (tmp_path / "bad.mrk.json").write_text("{")
    for path in (tmp_path / "none.mrk.json", tmp_path / "bad.mrk.json", tmp_path / "none.csv"):
        with pytest.raises(InputError):
            logic.loadPoints(path)
    with pytest.raises(InputError):
        logic.savePoints(found, tmp_path / "points.txt")
    assert scene.GetNumberOfNodes() == count


def test_a_scan_removed_while_it_is_embedded_does_not_stop_the_batch(logic, scene):
    template, first, second = (add_scan(scene, name, seed) for name, seed in (("CT", 0), ("A", 3), ("B", 4)))
    points = add_points(scene, "Targets", (SPINE,))
    batch = logic.batch(template, [first, second], points)
    scene.RemoveNode(first)
    assert batch.wait(TIMEOUT_S)
    assert list(batch.results) == [second.GetID()] and "no longer in the scene" in batch.failed["A"]


def test_prepare_of_a_pair_that_the_batch_prepares_joins_it(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "A", 3)
    points, answers = add_points(scene, "Targets", (SPINE,)), []
    batch = logic.batch(template, [query], points)
    logic.prepare(template, query, onDone=answers.append)
    assert batch.wait(TIMEOUT_S) and len(answers) == 1 and not batch.failed


def test_the_batch_keeps_a_pair_that_is_followed(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "A", 3)
    points = add_points(scene, "Targets", (SPINE,))
    batch = logic.batch(template, [query], points)
    found = logic.startLive(template, query, points)
    assert batch.wait(TIMEOUT_S) and logic.waitForAnswers(TIMEOUT_S)
    click(points, flip_points(LIVER)[0], "liver")
    assert logic.waitForAnswers(TIMEOUT_S) and labels_of(found) == ["P1", "liver"]


def test_other_voxels_match_all_points_again_but_those_set_by_hand(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "A", 3)
    points = add_points(scene, "Targets", (SPINE, LIVER))
    logic.prepareAndWait(template, query)
    found = logic.startLive(template, query, points, method="nearest")
    assert logic.waitForAnswers(TIMEOUT_S)
    found.SetNthControlPointPositionWorld(1, flip_points(HILUM)[0].tolist())
    found.InvokeEvent(found.PointEndInteractionEvent)
    found.SetNthControlPointDescription(0, "old")
    logic.prepareAndWait(template, query)
    assert logic.waitForAnswers(TIMEOUT_S) and found.GetNthControlPointDescription(0) == "old"
    array_of(query)[:] = array_of(query) + 3
    query.GetImageData().Modified()
    logic.prepareAndWait(template, query)
    assert logic.waitForAnswers(TIMEOUT_S)
    assert found.GetNthControlPointDescription(0).startswith("score")
    assert found.GetNthControlPointDescription(1) == "placed by hand"


def test_no_points_leave_no_list(logic, scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "A", 3)
    points, before = add_points(scene), scene.GetNumberOfNodes()
    with pytest.raises(InputError, match="no points"):
        logic.match(template, query, points)
    assert scene.GetNumberOfNodes() == before
