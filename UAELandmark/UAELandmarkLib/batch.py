"""One point list in many volumes: a table node, a point list for each volume, and a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vtk

from uae.errors import InputError, UAEError
from uae.files import atomic_path
from UAECommonLib.i18n import _
from UAECommonLib.mrml import flip_points
from UAELandmarkLib.link import Link, has_points, make_link
from UAELandmarkLib.places import world_ras
from UAELandmarkLib.preparation import OnDone, OnProgress, Preparation, check_volumes

__all__ = ["COLUMNS", "Batch", "export_table"]

COLUMNS = (
    "query", "label", "x_lps_mm", "y_lps_mm", "z_lps_mm", "score", "cycle_mm", "method", "confident", "reason",
)  # fmt: skip
"""Of the table and the CSV file; places are those in the world, LPS mm, as in the core's own tables."""


class Batch:
    """A template's points matched in many volumes, one after the other, in the worker.

    Attributes:
        table: vtkMRMLTableNode with a row for each point and volume.
        results: query volume node ID -> its markups node ID; only those that could be matched.
        failed: query volume name -> why.
        done: whether all are through, or it was cancelled.
    """

    def __init__(
        self,
        preparation: Preparation,
        template: Any,
        queries: Sequence[Any],
        points: Any,
        method: str,
        side: int,
        options: dict[str, Any],
    ) -> None:
        if not queries:
            raise InputError(_("choose at least one query volume"))
        if points is None or not has_points(points):
            raise InputError(_("there are no points to match; place at least one in the template scan"))
        for query in queries:
            check_volumes(template, query)
        self._preparation, self._options = preparation, options
        self._method, self._side = method, side
        self._template_id, self._points_id = template.GetID(), points.GetID()
        self._waiting = [(query.GetID(), query.GetName()) for query in queries]
        self._count = len(queries)
        self._request: int | None = None
        self._stopped = False
        self._on_progress: OnProgress | None = None
        self._on_done: OnDone | None = None
        self.results: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.done = False
        scene = preparation.scene
        self._scene = scene
        name = scene.GenerateUniqueName(_("Matches of {name}").format(name=points.GetName()))
        table = scene.AddNewNodeByClass("vtkMRMLTableNode", name)
        table.SetUndoEnabled(True)
        for column in COLUMNS:
            array = table.AddColumn(vtk.vtkStringArray())
            array.SetName(column)
        self._table_id = table.GetID()

    @property
    def table(self) -> Any:
        """The table node, or None where it was removed."""
        return self._scene.GetNodeByID(self._table_id)

    def start(self, on_progress: OnProgress | None, on_done: OnDone | None) -> None:
        """Begin; see `UAELandmarkLogic.batch`."""
        self._on_progress, self._on_done = on_progress, on_done
        self._next()

    def cancel(self) -> None:
        """Stop; what is in the table stays."""
        self._stopped = True
        self._waiting.clear()
        if self._request is not None:
            self._preparation.client.cancel(self._request)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end (the console, tests); True where it came within `timeout` seconds."""
        client = self._preparation.client
        return self.done or (client.runner.wait(lambda: self.done or not client.busy, timeout) and self.done)

    def exportCsv(self, path: str | Path) -> None:
        """Write the table as CSV; see `export_table`."""
        export_table(self.table, path)

    def _next(self) -> None:
        nodes = [self._scene.GetNodeByID(node_id) for node_id in (self._template_id, self._points_id)]
        if not self._waiting or any(node is None for node in nodes):
            self._finish()
            return
        query_id, name = self._waiting.pop(0)
        query = self._scene.GetNodeByID(query_id)
        if query is None:
            self._failed(name, _gone())
            return
        place = _("{number} of {count}, {name}").format(
            number=self._count - len(self._waiting), count=self._count, name=name
        )

        def progress(stage: str, percent: float, eta: float | None) -> None:
            if self._on_progress is not None:
                self._on_progress(f"{place}: {stage}", percent, eta)

        template, points = nodes
        kept = self._preparation.ready(template, query) is not None

        def prepared(_answer: Any) -> None:
            self._match(template, query, points, kept)

        def failed(error: UAEError) -> None:
            self._failed(name, error if self._scene.GetNodeByID(query_id) is not None else _gone())

        try:
            started = self._preparation.start(template, query, self._options, progress, prepared, failed)
            self._request = started or self._request
        except UAEError as error:
            self._failed(name, error)

    def _match(self, template: Any, query: Any, points: Any, kept: bool) -> None:
        name, pair = query.GetName(), self._preparation.ready(template, query)
        link = make_link(self._scene, template, query, points, live=False)
        link.method = self._method
        asked = link.template_points()

        def matched(record: dict[str, Any]) -> None:
            if not kept and not self._preparation.in_use(pair):
                self._preparation.forget(self._preparation.pairs.take(template, query))
            if link.complete and self.table is not None:
                link.show(asked, record["matches"], final=True)
                link.tell_origin(pair.answer)
                self.results[query.GetID()] = link.node_id
                for match in record["matches"]:
                    self._row(name, _columns(query, match))
            else:
                self.failed[name] = _("the scene was edited meanwhile")
            self._next()

        def failed(error: UAEError) -> None:
            self._remove(link)
            self._failed(name, error)

        self._request = self._preparation.client.match(
            pair.name,
            [place for _label, place in asked.values()],
            [label for label, _place in asked.values()],
            method=self._method,
            side=self._side,
            on_result=matched,
            on_error=failed,
        )

    def _remove(self, link: Link) -> None:
        if link.node is not None:
            self._scene.RemoveNode(link.node)

    def _failed(self, name: str, error: UAEError) -> None:
        self.failed[name] = str(error)
        if self.table is None or self._stopped:
            self._waiting.clear()
        else:
            self._row(name, {"confident": "false", "reason": str(error)})
        self._next()

    def _row(self, query: str, values: dict[str, str]) -> None:
        table = self.table
        row = table.AddEmptyRow()
        for column, name in enumerate(COLUMNS):
            table.SetCellText(row, column, query if name == "query" else values.get(name, ""))

    def _finish(self) -> None:
        if not self.done:
            self.done, self._request = True, None
            self._preparation.tell(self._on_done, self)


def _gone() -> InputError:
    return InputError(_("the volume is no longer in the scene"))


def export_table(node: Any, path: str | Path) -> None:
    """Write a batch's table node as CSV, whole or not at all.

    Raises:
        InputError: there is no table, or it cannot be written there.
        ResourceError: the disk is full.
    """
    if node is None:
        raise InputError(_("the table is no longer in the scene; match again"))
    table = node.GetTable()
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for row in range(table.GetNumberOfRows()):
            writer.writerow([table.GetValueByName(row, column).ToString() for column in COLUMNS])


def _columns(query: Any, match: dict[str, Any]) -> dict[str, str]:
    values = {
        "label": match["label"],
        "score": _number(match["score"], 4),
        "cycle_mm": _number(match["cycle_mm"], 2),
        "method": match["method"],
        "confident": "true" if match["confident"] else "false",
        "reason": match["reason"],
    }
    if match["point_mm"] is not None:
        place = flip_points(world_ras(query, match["point_mm"]))[0]
        values.update({name: _number(value, 4) for name, value in zip(COLUMNS[2:5], place, strict=True)})
    return values


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
