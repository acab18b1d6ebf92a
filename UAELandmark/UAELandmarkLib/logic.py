"""Landmarks by example over a MRML scene: prepare a pair, let its points follow live, match from a script.

Plain Python: no widget and no application is needed. Long work runs in the worker process; where no event loop runs,
`pump` or `wait` delivers its answers.

    logic = UAELandmarkLogic()
    found = logic.match(templateVolume, queryVolume, templateMarkups)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.errors import InputError
from UAECommonLib.errors import SceneChangedError
from UAECommonLib.i18n import _
from UAECommonLib.worker_client import WorkerClient
from UAELandmarkLib import files
from UAELandmarkLib.batch import Batch, export_table
from UAELandmarkLib.link import QUERY, TEMPLATE, TEMPLATE_POINTS, Link, find_links, has_points, make_link
from UAELandmarkLib.live import LiveMatching
from UAELandmarkLib.places import own_lps
from UAELandmarkLib.preparation import OnDone, OnError, OnProgress, Preparation, check_volumes

__all__ = ["UAELandmarkLogic"]


class UAELandmarkLogic:
    """Prepares pairs of volumes and carries points from template to query.

    Args:
        scene: vtkMRMLScene; the application's where None.
        client: of the worker; one of its own if not given.
        onMessage: told what the user should know, one line each.
        onJump: told a matched point's world place (3,) RAS mm when a live answer has been placed.
    """

    def __init__(
        self,
        scene: Any = None,
        client: WorkerClient | None = None,
        onMessage: Callable[[str], None] | None = None,
        onJump: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        import slicer

        self.scene = scene if scene is not None else slicer.mrmlScene
        self.onMessage = onMessage
        self._ownsClient = client is None
        self.client = client or WorkerClient()
        self.client.on_message = self._say
        self._preparation = Preparation(self.scene, self.client, self._say)
        self._live = LiveMatching(self._preparation, self._say, onJump)
        self._preparation.on_ready = self._live.catch_up
        events = {
            self.scene.StartCloseEvent: self._onSceneClosing,
            self.scene.NodeRemovedEvent: self._onNodeRemoved,
            self.scene.EndImportEvent: self._onImported,
            self.scene.EndUndoEvent: self._onUndo,
            self.scene.EndRedoEvent: self._onUndo,
        }
        self._batches: list[Batch] = []
        self._observers = [self.scene.AddObserver(event, call) for event, call in events.items()]

    def close(self) -> None:
        """Stop following, end the worker (unless it was given), and remove the temporary files."""
        for tag in self._observers:
            self.scene.RemoveObserver(tag)
        self._observers = []
        self._stopBatches()
        self._live.stop_all()
        self._preparation.forget_all()
        if self._ownsClient:
            self.client.close()
        self._preparation.pairs.remove_folder()

    def pump(self, timeout: float = 0.0) -> None:
        """Deliver the worker's answers; only needed where no event loop runs."""
        self.client.pump(timeout)

    def waitForAnswers(self, timeout: float | None = None) -> bool:
        """Wait until no answer is on its way any more; True where that is so within `timeout` seconds."""
        return self.client.runner.wait(lambda: not self.client.busy, timeout)

    @property
    def busy(self) -> bool:
        """Whether an answer of the worker is on its way."""
        return self.client.busy

    @property
    def onJump(self) -> Callable[[np.ndarray], None] | None:
        """Told the world place (3,) RAS mm of a matched point that was just placed; None: nobody is told."""
        return self._live.jump

    @onJump.setter
    def onJump(self, jump: Callable[[np.ndarray], None] | None) -> None:
        self._live.jump = jump

    def prepare(
        self,
        templateVolume: Any,
        queryVolume: Any,
        model: str | None = None,
        device: str = "auto",
        templateModality: str = "auto",
        queryModality: str = "auto",
        onProgress: OnProgress | None = None,
        onDone: OnDone | None = None,
        onError: OnError | None = None,
    ) -> int | None:
        """Embed both volumes and find their prior alignment, in the worker; returns at once.

        Args:
            templateVolume: scalar volume node in which points are known.
            queryVolume: scalar volume node in which they are looked for.
            model: registry name or file; None takes the default for the modalities.
            device: auto, cpu or cuda:N.
            templateModality: auto, ct or mr.
            queryModality: the same.
            onProgress: told stage, percent 0..100 within it, and seconds left or None.
            onDone: told the answer: verdict, reason, template_to_query (4x4 LPS mm between the volumes' own frames, or
                None), template_modality, query_modality, device, model, seconds.
            onError: told what went wrong; onMessage where None.

        Returns:
            The request's number for `cancel`; None where the pair was ready already (onDone has been told).

        Raises:
            InputError: a node is missing, or both are the same, or it holds no grey image.
        """
        options = {
            "model": model,
            "device": device,
            "template_modality": templateModality,
            "query_modality": queryModality,
        }
        return self._preparation.start(templateVolume, queryVolume, options, onProgress, onDone, onError)

    def cancel(self, number: int) -> None:
        """Stop a request; its onError is told CancelledError."""
        self.client.cancel(number)

    def prepared(self, templateVolume: Any, queryVolume: Any) -> dict[str, Any] | None:
        """The answer of `prepare` for two volumes as they are now, or None."""
        pair = self._preparation.ready(templateVolume, queryVolume)
        return pair.answer if pair is not None else None

    def prepareAndWait(self, templateVolume: Any, queryVolume: Any, **options: Any) -> dict[str, Any]:
        """`prepare`, waiting for its answer.

        Raises:
            UAEError: what went wrong.
        """
        outcome: dict[str, Any] = {}
        number = self.prepare(
            templateVolume,
            queryVolume,
            onDone=lambda answer: outcome.update(answer=answer),
            onError=lambda error: outcome.update(error=error),
            **options,
        )
        return self._preparation.outcome(number, outcome)["answer"]

    def match(
        self,
        templateVolume: Any,
        queryVolume: Any,
        templateMarkups: Any,
        queryMarkups: Any = None,
        method: str = "auto",
        side: int = 5,
        **options: Any,
    ) -> Any:
        """Match all placed points and wait; the pair is prepared if need be.

        Args:
            templateVolume: scalar volume node in which the points are known.
            queryVolume: scalar volume node in which they are looked for.
            templateMarkups: point list node in the template's world.
            queryMarkups: point list node for the results; a new one where None.
            method: auto, guided, fixed-point or nearest.
            side: edge of the cube of fixed-point seeds, cells.
            options: of `prepare`: model, device, templateModality, queryModality.

        Returns:
            The query's markups node: same labels, places in the world of the query, score, cycle distance, method and
            verdict in the descriptions; selected points are confident.

        Raises:
            UAEError: no points, volumes that cannot be used, no memory, or cancelled.
        """
        if templateMarkups is None:
            raise InputError(_("choose the template's points"))
        check_volumes(templateVolume, queryVolume)
        if not has_points(templateMarkups):
            raise InputError(_("there are no points to match; place at least one in the template scan"))
        prepared = self.prepareAndWait(templateVolume, queryVolume, **options)
        link = make_link(self.scene, templateVolume, queryVolume, templateMarkups, queryMarkups, live=False)
        link.method = method
        link.changes()
        asked = link.template_points()
        outcome: dict[str, Any] = {}
        number = self.client.match(
            self._preparation.ready(templateVolume, queryVolume).name,
            [place for _label, place in asked.values()],
            [label for label, _place in asked.values()],
            method=method,
            side=side,
            on_result=lambda record: outcome.update(answer=record["matches"]),
            on_error=lambda error: outcome.update(error=error),
        )
        matches = self._preparation.outcome(number, outcome)["answer"]
        if not link.complete:
            raise SceneChangedError(_("the scene was edited while the points were matched; match them again"))
        link.show(asked, matches, final=True)
        link.tell_origin(prepared)
        return link.node

    def startLive(
        self,
        templateVolume: Any,
        queryVolume: Any,
        templateMarkups: Any,
        queryMarkups: Any = None,
        method: str = "auto",
        side: int = 5,
    ) -> Any:
        """Let the query's points follow the template's from now on, as soon as the pair is prepared.

        Returns:
            The query's markups node; it refers to the others, so that a saved scene keeps the link.

        Raises:
            InputError: a node is missing, or one node is meant for two roles.
        """
        check_volumes(templateVolume, queryVolume)
        if templateMarkups is None or templateMarkups is queryMarkups:
            raise InputError(_("choose the template's points, and another point list for the query"))
        link = make_link(self.scene, templateVolume, queryVolume, templateMarkups, queryMarkups, live=True)
        link.method = method
        self._live.follow(link, side)
        return link.node

    def stopLive(self, queryMarkups: Any) -> None:
        """Let a query's points stay where they are."""
        self._live.stop(queryMarkups.GetID())
        link = Link(self.scene, queryMarkups.GetID())
        if link.node is not None:
            link.live = False

    def isLive(self, queryMarkups: Any) -> bool:
        """Whether a query's points follow."""
        return queryMarkups is not None and self._live.is_followed(queryMarkups.GetID())

    def restoreLinks(self) -> list[Any]:
        """Follow again what was followed when the scene was saved; the points follow once their pair is prepared.

        Returns:
            The query markups nodes.
        """
        return [link.node for link in self._live.restore(self.scene)]

    def findLinked(self, templateVolume: Any, queryVolume: Any, templateMarkups: Any) -> Any:
        """The query's markups node that belongs to these three, or None."""
        wanted = (templateVolume, queryVolume, templateMarkups)
        for link in find_links(self.scene):
            if tuple(link.reference(role) for role in (TEMPLATE, QUERY, TEMPLATE_POINTS)) == wanted:
                return link.node
        return None

    def linked(self, queryMarkups: Any) -> dict[str, Any]:
        """What a query's points belong to: template, query, points (nodes or None) and method; empty without a link."""
        link = Link(self.scene, queryMarkups.GetID()) if queryMarkups is not None else None
        if link is None or link.node is None:
            return {}
        roles = {"template": TEMPLATE, "query": QUERY, "points": TEMPLATE_POINTS}
        return {"method": link.method, **{name: link.reference(role) for name, role in roles.items()}}

    def pointsToMatch(self, queryMarkups: Any) -> int:
        """Number of template points that have come or moved since they were matched."""
        link = Link(self.scene, queryMarkups.GetID())
        return len(link.changes().to_match) if link.complete else 0

    def queryPointOf(self, queryMarkups: Any, templateIndex: int) -> int | None:
        """Index of the query point that belongs to the template's point of an index, or None."""
        link = Link(self.scene, queryMarkups.GetID())
        return link.query_index(link.reference(TEMPLATE_POINTS).GetNthControlPointID(templateIndex))

    def similarityMap(
        self, queryMarkups: Any, index: int, onDone: Callable[[Any], None] | None = None, onError: OnError | None = None
    ) -> int:
        """Show how similar every place of the query is to one template point, as a volume to lay over the query.

        Args:
            queryMarkups: of a link whose pair is prepared.
            index: of a placed point of the template's markups.
            onDone: told the volume node; the link's earlier one is used again.
            onError: told what went wrong.

        Returns:
            The request's number.

        Raises:
            InputError: no link, no such point, or the pair is not prepared.
        """
        link = Link(self.scene, queryMarkups.GetID())
        pair = self._preparation.ready(link.reference(TEMPLATE), link.reference(QUERY)) if link.complete else None
        if pair is None:
            raise InputError(_("the scans of these points are not prepared; prepare them first"))
        markups = link.reference(TEMPLATE_POINTS)
        if not 0 <= index < markups.GetNumberOfControlPoints():
            raise InputError(_("there is no such point; choose one of the template's points"))
        label = markups.GetNthControlPointLabel(index)
        point = own_lps(link.reference(TEMPLATE), markups.GetNthControlPointPositionWorld(index))[0]
        file = self._preparation.pairs.new_file(".nrrd")

        def done(_answer: dict[str, Any]) -> None:
            if not link.complete:
                file.unlink(missing_ok=True)
                gone = SceneChangedError(_("the similarity map is dropped: its scans are no longer in the scene"))
                self._preparation.fail(onError, gone)
                return
            self._preparation.tell(onDone, files.show_map(link, file, label))

        return self.client.similarity_map(
            pair.name,
            point,
            str(file),
            method=link.method,
            on_result=done,
            on_error=lambda e: self._preparation.fail(onError, e),
        )

    def batch(
        self,
        templateVolume: Any,
        queryVolumes: Sequence[Any],
        templateMarkups: Any,
        method: str = "auto",
        side: int = 5,
        onProgress: OnProgress | None = None,
        onDone: OnDone | None = None,
        **options: Any,
    ) -> Batch:
        """Match a point list in many volumes, one after the other; returns at once.

        Args:
            templateVolume: as in `match`.
            queryVolumes: scalar volume nodes.
            templateMarkups: as in `match`.
            method: as in `match`.
            side: as in `match`.
            onProgress: told stage ("2 of 7, NAME: ..."), percent and seconds left.
            onDone: told the batch when all are through.
            options: of `prepare`.

        Returns:
            The batch: `table` (vtkMRMLTableNode), `results` (markups nodes), `cancel()`, `wait()`, `exportCsv(path)`.

        Raises:
            InputError: no points, or no volumes.
        """
        chosen = {"model": None, "device": "auto", "template_modality": "auto", "query_modality": "auto"}
        names = {"templateModality": "template_modality", "queryModality": "query_modality"}
        chosen.update({names.get(name, name): value for name, value in options.items()})
        started = Batch(self._preparation, templateVolume, queryVolumes, templateMarkups, method, side, chosen)
        self._batches = [one for one in self._batches if not one.done] + [started]
        started.start(onProgress, onDone)
        return started

    def exportTable(self, table: Any, path: str | Path) -> None:
        """Write a batch's table node as CSV; InputError where that cannot be."""
        export_table(table, path)

    def savePoints(self, markups: Any, path: str | Path) -> None:
        """Write a point list as .mrk.json (world places, descriptions kept); InputError where that cannot be."""
        files.save_points(self.scene, markups, path)

    def loadPoints(self, path: str | Path) -> Any:
        """Read .mrk.json, .fcsv or .csv points into a new node; InputError where they cannot be read."""
        return files.load_points(self.scene, path)

    def _say(self, text: str) -> None:
        if self.onMessage is not None:
            self.onMessage(text)

    def _onSceneClosing(self, *_arguments: Any) -> None:
        busy = self._live.stop_all() or self.client.busy
        self._stopBatches()
        self._preparation.forget_all()
        if busy:
            self._say(_("the scene was closed: the results that were on their way are dropped"))

    def _stopBatches(self) -> None:
        for batch in self._batches:
            batch.cancel()
        self._batches = []

    def _onNodeRemoved(self, *_arguments: Any) -> None:
        self._live.stop_incomplete()
        self._preparation.forget_gone()

    def _onImported(self, *_arguments: Any) -> None:
        self.restoreLinks()

    def _onUndo(self, *_arguments: Any) -> None:
        self._live.catch_up()
