"""A link's bookkeeping in a real scene, with answers written by hand: no worker and no network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("slicer")

from landmark_cases import LIVER, SPINE, add_points, add_scan, click, labels_of, linear_parent, world_of

from UAECommonLib.mrml import flip_points
from UAELandmarkLib.link import describe, find_links, make_link

TURNED = np.array([[0.0, -1, 0, 30], [1, 0, 0, -20], [0, 0, 1, 70], [0, 0, 0, 1]])


def answer(place: Any, confident: bool = True) -> dict[str, Any]:
    return {
        "label": "x", "point_mm": None if place is None else list(map(float, place)), "score": 0.834, "cycle_mm": 2.14,
        "method": "guided", "confident": confident, "reason": "" if confident else "margin 0.01 is below 0.03",
    }  # fmt: skip


@pytest.fixture
def linked(scene):
    template, query = add_scan(scene, "CT"), add_scan(scene, "MR")
    points = add_points(scene, "Targets", (SPINE, LIVER))
    return make_link(scene, template, query, points), template, query, points


def match_all(link, places) -> None:
    asked = link.changes().to_match
    link.show(asked, [answer(place) for place in places], final=True)


def test_answers_become_points_with_labels_and_descriptions(linked):
    link, _template, _query, _points = linked
    assert [label for label, _place in link.changes().to_match.values()] == ["P1", "P2"]
    match_all(link, (SPINE, LIVER))
    assert labels_of(link.node) == ["P1", "P2"] and not link.changes().to_match
    assert link.node.GetNthControlPointDescription(0) == "score 0.83, cycle 2.1 mm, guided, confident"
    assert link.node.GetNthControlPointSelected(0)
    assert np.allclose(world_of(link.node, 1), flip_points(LIVER)[0])


def test_a_doubtful_answer_says_why_and_a_first_one_that_it_is_the_first():
    text = describe(answer(SPINE, confident=False), final=False)
    assert "not confident: margin 0.01 is below 0.03" in text and "being improved" in text


def test_changes_follow_by_point_id(linked):
    link, _template, _query, points = linked
    match_all(link, (SPINE, LIVER))
    points.SetNthControlPointLabel(1, "liver")
    changes = link.changes()
    assert changes.renamed == 1 and labels_of(link.node) == ["P1", "liver"]
    points.RemoveNthControlPoint(0)
    assert link.changes().removed == 1 and labels_of(link.node) == ["liver"]
    points.SetNthControlPointPositionWorld(0, (1.0, 2.0, 3.0))
    click(points, np.zeros(3), "new")
    assert [label for label, _place in link.changes().to_match.values()] == ["liver", "new"]


def test_an_answer_for_a_point_that_is_gone_is_dropped(linked):
    link, _template, _query, points = linked
    asked = link.changes().to_match
    points.RemoveNthControlPoint(0)
    link.show(asked, [answer(SPINE), answer(LIVER)], final=True)
    assert labels_of(link.node) == ["P2"]


def test_geometry_own_frames_lie_under_parents(linked, scene):
    link, template, query, points = linked
    match_all(link, (SPINE, LIVER))
    linear_parent(scene, TURNED, template)
    assert len(link.changes().to_match) == 2  # the volume moved under the points
    for index, place in enumerate((SPINE, LIVER)):
        points.SetNthControlPointPositionWorld(index, (TURNED @ np.append(flip_points(place)[0], 1))[:3].tolist())
    assert not link.changes().to_match
    linear_parent(scene, TURNED, query)
    link.place_again()
    assert np.allclose(world_of(link.node, 0), (TURNED @ np.append(flip_points(SPINE)[0], 1))[:3])
    linear_parent(scene, TURNED, link.node)
    link.place_again()
    assert np.allclose(world_of(link.node, 0), (TURNED @ np.append(flip_points(SPINE)[0], 1))[:3])


def test_a_point_without_an_answer_has_no_query_point(linked):
    link, _template, _query, _points = linked
    match_all(link, (SPINE, None))
    assert labels_of(link.node) == ["P1"] and not link.changes().to_match


def test_placed_by_hand_stays_until_the_template_point_moves(linked):
    link, _template, _query, points = linked
    match_all(link, (SPINE, LIVER))
    link.node.SetNthControlPointPositionWorld(0, (1.0, 2.0, 3.0))
    link.placed_by_hand()
    assert link.node.GetNthControlPointDescription(0) == "placed by hand" and not link.changes().to_match
    assert link.node.GetNthControlPointDescription(1).startswith("score")
    points.SetNthControlPointPositionWorld(0, (5.0, 5.0, 5.0))
    assert len(link.changes().to_match) == 1


def test_undo_takes_point_and_match_back_together(linked, scene):
    link, _template, _query, points = linked
    match_all(link, (SPINE, LIVER))
    scene.SetUndoOn()
    scene.SaveStateForUndo()
    index = click(points, np.zeros(3), "new")
    match_all(link, [(0.0, 0.0, 50.0)])
    assert labels_of(link.node)[index] == "new"
    scene.Undo()
    assert labels_of(points) == labels_of(link.node) == ["P1", "P2"] and not link.changes().to_match


def test_saved_and_opened_the_link_is_the_same(linked, headless, scene, tmp_path):
    link, _template, _query, _points = linked
    link.method = "guided"
    match_all(link, (SPINE, LIVER))
    headless.load_scene(headless.save_scene(tmp_path / "Szene ä.mrb"))
    (again,) = find_links(scene)
    assert again.complete and again.live and again.method == "guided"
    assert not again.changes().to_match and labels_of(again.node) == ["P1", "P2"]
    again.reference("UAE.templateMarkups").RemoveNthControlPoint(0)
    assert again.changes().removed == 1 and labels_of(again.node) == ["P2"]


def test_another_query_begins_anew(linked, scene):
    link, template, _query, points = linked
    match_all(link, (SPINE, LIVER))
    other = make_link(scene, template, add_scan(scene, "MR 2"), points)
    assert other.node is not link.node and len(other.changes().to_match) == 2
    assert len(find_links(scene)) == 2
