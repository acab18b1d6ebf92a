"""A template's points followed into a query's markups node, by control point ID; all of it is kept in the scene.

The query's markups node refers to the template's markups and to both volumes, and an attribute of it says for each
template point which query point belongs to it, where the template point was when it was matched, and what was found.
So undo, save and reopen need no code of their own: `changes` compares what is there with what is noted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from UAECommonLib.i18n import _
from UAELandmarkLib.places import own_lps, world_ras

__all__ = ["Changes", "Link", "describe", "find_links", "has_points", "make_link"]

TEMPLATE_POINTS, TEMPLATE, QUERY, MAP = "UAE.templateMarkups", "UAE.templateVolume", "UAE.queryVolume", "UAE.map"
"""Node references of the query's markups node (MAP: to the similarity map shown last)."""
LINKED, LIVE, METHOD, ORIGIN = "UAE.linked", "UAE.live", "UAE.method", "UAE.origin"
"""Its attributes."""
MOVED_MM = 1e-3
CONFIDENT_COLOR, DOUBTFUL_COLOR = (0.1, 0.75, 0.55), (0.95, 0.45, 0.1)
"""Of selected (confident) and unselected points: told apart also by the red-green blind."""


@dataclass
class Changes:
    """What has to follow: points to match (template point ID -> (label, own LPS mm)) and how many else followed."""

    to_match: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    removed: int = 0
    renamed: int = 0


@dataclass
class Link:
    """One link, held by node IDs: every method looks its nodes up again and does nothing where one is gone."""

    scene: Any
    node_id: str

    @property
    def node(self) -> Any:
        """The query's markups node, or None."""
        node = self.scene.GetNodeByID(self.node_id)
        return node if node is not None and node.GetAttribute(LINKED) is not None else None

    def reference(self, role: str) -> Any:
        """The node of a role (TEMPLATE_POINTS, TEMPLATE, QUERY), or None."""
        return self.node.GetNodeReference(role) if self.node is not None else None

    @property
    def complete(self) -> bool:
        """Whether all nodes of the link are in the scene."""
        return all(self.reference(role) is not None for role in (TEMPLATE_POINTS, TEMPLATE, QUERY))

    @property
    def live(self) -> bool:
        """Whether the query's points follow the template's at once."""
        return self.node is not None and self.node.GetAttribute(LIVE) == "1"

    @live.setter
    def live(self, value: bool) -> None:
        self.node.SetAttribute(LIVE, "1" if value else "0")

    @property
    def method(self) -> str:
        """Matching method of the link."""
        return (self.node.GetAttribute(METHOD) or "auto") if self.node is not None else "auto"

    @method.setter
    def method(self, value: str) -> None:
        self.node.SetAttribute(METHOD, value)

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """What is noted by template point ID.

        {"query": point ID, "at": [L, P, S], "found": [L, P, S], "final": bool, "hand": bool (set by the user)}.
        """
        return json.loads(self.node.GetAttribute(LINKED) or "{}")

    def _note(self, notes: Mapping[str, Any]) -> None:
        text = json.dumps(notes)
        if self.node.GetAttribute(LINKED) != text:
            self.node.SetAttribute(LINKED, text)

    def template_points(self) -> dict[str, tuple[str, np.ndarray]]:
        """Placed template points: ID -> (label, (3,) LPS mm in the template volume's own frame)."""
        markups, volume = self.reference(TEMPLATE_POINTS), self.reference(TEMPLATE)
        placed = _placed(markups)
        world = np.array([markups.GetNthControlPointPositionWorld(index) for index in placed.values()])
        own = own_lps(volume, world)
        return {
            point_id: (markups.GetNthControlPointLabel(index), point)
            for (point_id, index), point in zip(placed.items(), own, strict=True)
        }

    def changes(self) -> Changes:
        """Let removed and renamed template points follow, and say which points have to be matched (again)."""
        result, points, notes = Changes(), self.template_points(), self.notes
        here = _indices(self.node)
        for point_id in [point_id for point_id in notes if point_id not in points]:
            query_id = notes.pop(point_id)["query"]
            if query_id in here:
                self.node.RemoveNthControlPoint(here[query_id])
                here = _indices(self.node)
            result.removed += 1
        for point_id, (label, place) in points.items():
            note = notes.get(point_id)
            if note is None or not note["final"] or np.linalg.norm(place - note["at"]) > MOVED_MM:
                result.to_match[point_id] = (label, place)
            index = here.get(note["query"]) if note else None
            if index is not None and self.node.GetNthControlPointLabel(index) != label:
                self.node.SetNthControlPointLabel(index, label)
                result.renamed += 1
        self._note(notes)
        return result

    def show(
        self, asked: Mapping[str, tuple[str, np.ndarray]], matches: Iterable[Mapping[str, Any]], final: bool
    ) -> str | None:
        """Put answers into the query's markups node.

        Args:
            asked: what was matched: template point ID -> (label, (3,) LPS mm).
            matches: the worker's answers, in the same order.
            final: not only the first, quicker answer.

        Returns:
            ID of the last query point placed, or None.
        """
        points, notes, last = self.template_points(), self.notes, None
        was = self.node.StartModify()
        try:
            for (point_id, (_label, place)), match in zip(asked.items(), matches, strict=True):
                if point_id in points:  # it may have been deleted since
                    last = self._show_one(notes, point_id, points[point_id][0], place, match, final) or last
            self._note(notes)
        finally:
            self.node.EndModify(was)
        return last

    def _show_one(
        self, notes: dict[str, Any], point_id: str, label: str, at: np.ndarray, match: Mapping[str, Any], final: bool
    ) -> str | None:
        note = notes.get(point_id, {"query": None})
        index = _indices(self.node).get(note["query"])
        notes[point_id] = {"query": note["query"], "at": list(at), "found": match["point_mm"], "final": final}
        if match["point_mm"] is None:
            if index is not None:
                self.node.RemoveNthControlPoint(index)
            notes[point_id]["query"] = None
            return None
        place = world_ras(self.reference(QUERY), match["point_mm"])[0]
        if index is None:
            index = self.node.AddControlPointWorld(place.tolist(), label)
            notes[point_id]["query"] = self.node.GetNthControlPointID(index)
        else:
            self.node.SetNthControlPointPositionWorld(index, place.tolist())
            self.node.SetNthControlPointLabel(index, label)
        self.node.SetNthControlPointDescription(index, describe(match, final))
        self.node.SetNthControlPointSelected(index, bool(match["confident"]))
        return notes[point_id]["query"]

    def renew(self, origin: str) -> None:
        """Have all points matched again that rest on another model, modality or other voxels, but those set by hand."""
        if self.node.GetAttribute(ORIGIN) not in (None, origin):
            notes = self.notes
            for note in notes.values():
                note["final"] = note.get("hand", False)
            self._note(notes)

    def tell_origin(self, prepared: Mapping[str, Any]) -> None:
        """Say in the node's description with what its points were found: model, device, verdict of the alignment."""
        self.node.SetAttribute(ORIGIN, prepared["origin"])
        self.node.SetDescription(
            _("{model} {version} on {device}; prior alignment of the scans: {verdict}").format(
                model=prepared["model"]["name"],
                version=prepared["model"]["version"],
                device=prepared["device"],
                verdict=prepared["verdict"],
            )
        )

    def place_again(self) -> None:
        """Put the query's points back where they were found: the query volume was moved by a parent."""
        here, volume = _indices(self.node), self.reference(QUERY)
        for note in self.notes.values():
            if note["query"] in here and note["found"] is not None:
                index, place = here[note["query"]], world_ras(volume, note["found"])[0]
                if np.linalg.norm(place - self.node.GetNthControlPointPositionWorld(index)) > MOVED_MM:
                    self.node.SetNthControlPointPositionWorld(index, place.tolist())

    def placed_by_hand(self) -> None:
        """Note which query points the user moved: they stay there, and say so, until their template points move."""
        notes, here, volume = self.notes, _indices(self.node), self.reference(QUERY)
        for note in notes.values():
            index = here.get(note["query"])
            if index is None or note["found"] is None:
                continue
            place = own_lps(volume, self.node.GetNthControlPointPositionWorld(index))[0]
            if np.linalg.norm(place - note["found"]) > MOVED_MM:
                note.update(found=place.tolist(), final=True, hand=True)
                self.node.SetNthControlPointDescription(index, _("placed by hand"))
                self.node.SetNthControlPointSelected(index, False)
        self._note(notes)

    def world_of(self, query_id: str) -> np.ndarray:
        """World place (3,) RAS mm of a query point by its ID."""
        return np.array(self.node.GetNthControlPointPositionWorld(_indices(self.node)[query_id]))

    def query_index(self, point_id: str) -> int | None:
        """Index of the query point that belongs to a template point ID, or None."""
        note = self.notes.get(point_id)
        return _indices(self.node).get(note["query"]) if note else None


def describe(match: Mapping[str, Any], final: bool = True) -> str:
    """A match in one line, such as "score 0.83, cycle 2.1 mm, guided, confident"."""
    verdict = _("confident") if match["confident"] else _("not confident")
    text = _("score {score:.2f}, cycle {cycle}, {method}, {verdict}").format(
        score=match["score"],
        cycle="?" if match["cycle_mm"] is None else f"{match['cycle_mm']:.1f} mm",
        method=match["method"],
        verdict=verdict,
    )
    if not match["confident"] and match["reason"]:
        text += f": {match['reason']}"
    return text if final else text + " " + _("(first answer, being improved)")


def make_link(scene: Any, template: Any, query: Any, points: Any, node: Any = None, live: bool = True) -> Link:
    """Link a query's markups node (a new one where None) to a template's.

    Args:
        scene: vtkMRMLScene.
        template: template volume node.
        query: query volume node.
        points: the template's markups node.
        node: the query's markups node.
        live: the query's points follow at once.
    """
    if node is None:
        name = scene.GenerateUniqueName(f"{points.GetName()} in {query.GetName()}")
        node = _add_points(scene, name, points)
    points.SetUndoEnabled(True)
    node.SetUndoEnabled(True)
    node.CreateDefaultDisplayNodes()
    display = node.GetDisplayNode()
    if display is not None and node.GetAttribute(LINKED) is None:  # later colours are the user's
        display.SetSelectedColor(*CONFIDENT_COLOR)
        display.SetColor(*DOUBTFUL_COLOR)
    for role, other in ((TEMPLATE_POINTS, points), (TEMPLATE, template), (QUERY, query)):
        if node.GetNodeReferenceID(role) != other.GetID():
            node.SetAttribute(LINKED, "{}")
            node.SetNodeReferenceID(role, other.GetID())
    if node.GetAttribute(LINKED) is None:
        node.SetAttribute(LINKED, "{}")
    link = Link(scene, node.GetID())
    link.live = live
    return link


def _add_points(scene: Any, name: str, template_points: Any) -> Any:
    """A new point list that does not become the one into which the user's clicks go, as new lists do."""
    selection = scene.GetNodeByID("vtkMRMLSelectionNodeSingleton")
    before = selection.GetActivePlaceNodeID() if selection is not None else None
    kind = selection.GetActivePlaceNodeClassName() if selection is not None else None
    node = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
    if selection is not None and selection.GetActivePlaceNodeID() == node.GetID():
        selection.SetReferenceActivePlaceNodeClassName(kind if before else template_points.GetClassName())
        selection.SetReferenceActivePlaceNodeID(before or template_points.GetID())
    return node


def find_links(scene: Any) -> list[Link]:
    """The links in a scene, such as one that was just opened."""
    count = scene.GetNumberOfNodesByClass("vtkMRMLMarkupsFiducialNode")
    nodes = [scene.GetNthNodeByClass(index, "vtkMRMLMarkupsFiducialNode") for index in range(count)]
    return [Link(scene, node.GetID()) for node in nodes if node.GetAttribute(LINKED) is not None]


def _indices(markups: Any) -> dict[str, int]:
    return {markups.GetNthControlPointID(index): index for index in range(markups.GetNumberOfControlPoints())}


def has_points(markups: Any) -> bool:
    """Whether a point list holds a placed point."""
    return bool(_placed(markups))


def _placed(markups: Any) -> dict[str, int]:
    """IDs and indices of the control points whose place is defined (not the preview under the mouse)."""
    return {
        point_id: index
        for point_id, index in _indices(markups).items()
        if markups.GetNthControlPointPositionStatus(index) == markups.PositionDefined
    }
