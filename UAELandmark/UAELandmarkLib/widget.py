"""The module's panel: choices into the parameter node, that into the logic, what was found onto the screen."""

from __future__ import annotations

from typing import Any

import numpy as np
import qt
import slicer
from slicer.i18n import tr as _

from uae.errors import CancelledError, UAEError
from UAECommonLib.panel import Panel
from UAELandmarkLib import views
from UAELandmarkLib.logic import UAELandmarkLogic
from UAELandmarkLib.parameters import getParameterNode

__all__ = ["UAELandmarkWidget"]

POINT_FILES = "Points (*.mrk.json *.fcsv *.csv)"


class UAELandmarkWidget(Panel):
    """Prepare two scans, then every change of the template's points is followed in the query."""

    def __init__(self, parent: Any = None) -> None:
        Panel.__init__(self, parent)
        self._models = {"": _("Automatic")}
        self._request: int | None = None
        self._batch: Any = None
        self._followed: tuple[Any, ...] = ()

    def build(self) -> None:
        """Make the logic and connect the panel's widgets."""
        self.logic = UAELandmarkLogic(onMessage=self.onLog)
        columns = [_("Point"), _("Score"), _("Cycle"), _("Method"), _("Verdict")]
        self.ui.resultsTable.setColumnCount(len(columns))
        self.ui.resultsTable.setHorizontalHeaderLabels(columns)
        self.ui.prepareButton.connect("clicked(bool)", self.onPrepare)
        self.ui.besideButton.connect("clicked(bool)", self.onBeside)
        self.ui.resultsTable.connect("cellClicked(int,int)", self.onResultClicked)
        self.ui.mapButton.connect("toggled(bool)", self.onMap)
        self.ui.loadButton.connect("clicked(bool)", self.onLoad)
        self.ui.saveButton.connect("clicked(bool)", self.onSave)
        self.ui.batchButton.connect("clicked(bool)", self.onBatch)
        self.ui.batchSelector.connect("checkedNodesChanged()", self.onBatchChecked)
        self.ui.exportButton.connect("clicked(bool)", self.onExport)
        self.ui.modelComboBox.connect("currentIndexChanged(int)", self.onModel)
        # without it the application leaves place mode after the first point
        self.ui.placeWidget.placeMultipleMarkups = slicer.qSlicerMarkupsPlaceWidget.ForcePlaceMultipleMarkups
        self._listModels()
        self.logic.restoreLinks()

    def getParameters(self) -> Any:
        """The module's parameter node of the application's scene."""
        return getParameterNode()

    def exit(self) -> None:
        """Leave place mode with the module; points are still followed."""
        self.ui.placeWidget.setPlaceModeEnabled(False)

    def onSceneStartClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Let go of the nodes and of what runs for them."""
        self._request, self._batch = None, None
        Panel.onSceneStartClose(self)

    def connected(self) -> None:
        """Check the scans of the batch."""
        self._followed = ()
        scans = self._batchScans()
        for node in self.ui.batchSelector.checkedNodes():
            if node not in scans:
                self.ui.batchSelector.setCheckState(node, qt.Qt.Unchecked)
        for node in scans:
            self.ui.batchSelector.setCheckState(node, qt.Qt.Checked)

    def showState(self) -> None:
        """Buttons, links and results from the parameter node."""
        self.fill(self.ui.modelComboBox, self._models, self.parameters.model)
        missing, running = self._missing(), self._request is not None
        self.ui.prepareButton.enabled = running or not missing
        self.ui.prepareButton.text = _("Cancel") if running else _("Prepare")
        self.ui.prepareButton.toolTip = missing or _("Embed both scans and find their prior alignment")
        self.ui.progressBar.visible = running or self._batch is not None
        self.ui.placeWidget.setCurrentNode(self.parameters.templatePoints)
        self.logic.onJump = self.onJump if self.parameters.jump else None
        self._follow()
        self._showBatchState()
        self.showResults()

    def _missing(self) -> str:
        """What still has to be chosen; empty where Prepare can be pressed."""
        template, query = self.parameters.templateVolume, self.parameters.queryVolume
        if template is None or query is None:
            return _("Choose a template scan and a query scan")
        return _("Template and query are the same scan; choose two") if template is query else ""

    def _follow(self) -> None:
        """Start or stop following as chosen; each query scan has a list of its own."""
        chosen = self.parameters
        wanted = (chosen.templateVolume, chosen.queryVolume, chosen.templatePoints)
        if self._missing() or chosen.templatePoints is None:
            return
        if chosen.queryPoints is chosen.templatePoints:
            self.ui.statusLabel.text = _("The found points need a list of their own; choose another one")
            return
        found, linked = chosen.queryPoints, self.logic.linked(chosen.queryPoints)
        if linked and (linked["template"], linked["query"], linked["points"]) != wanted:
            self.logic.stopLive(found)
            found = chosen.queryPoints = self.logic.findLinked(*wanted)
        state = (*wanted, found, chosen.method, chosen.live)
        if state == self._followed:
            return
        before = self._followed[3] if self._followed else None
        if before is not None and before is not found:
            self.logic.stopLive(before)
        if chosen.live:
            found = chosen.queryPoints = self.logic.startLive(*wanted, found, method=chosen.method.value)
            self.removeObservers(self.showResults)
            for event in (found.PointModifiedEvent, found.PointRemovedEvent):
                self.addObserver(found, event, self.showResults)
        elif found is not None:
            self.logic.stopLive(found)
        self._followed = (*wanted, found, chosen.method, chosen.live)

    def onPrepare(self, _checked: bool = False) -> None:
        """Begin, or cancel what runs."""
        if self._request is not None:
            self.ui.statusLabel.text = _("Cancelling...")
            self.logic.cancel(self._request)
            return
        with self.attempt(_("The scans could not be prepared.")):
            self.offerTorch()
            chosen = self.parameters
            if chosen.templatePoints is None:
                points = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", _("Targets"))
                points.SetUndoEnabled(True)
                points.CreateDefaultDisplayNodes()
                chosen.templatePoints = points
            self._request = self.logic.prepare(
                chosen.templateVolume,
                chosen.queryVolume,
                **self._options(),
                onProgress=self.onProgress,
                onDone=self.onPrepared,
                onError=self.onFailed,
            )

    def _options(self) -> dict[str, Any]:
        return {
            "model": self.parameters.model or None,
            "device": self.parameters.device,
            "templateModality": self.parameters.templateModality.value,
            "queryModality": self.parameters.queryModality.value,
        }

    def onProgress(self, stage: str, percent: float, secondsLeft: float | None) -> None:
        """Show the stage, its percentage and the time left in it."""
        self.ui.progressBar.value = int(percent)
        self.ui.statusLabel.text = self.progressText(stage, secondsLeft)

    def onPrepared(self, answer: dict[str, Any]) -> None:
        """Show the prior alignment's verdict, and what it was found with."""
        self._request = None
        self.ui.statusLabel.text = _(
            "Prior alignment: {verdict} ({reason}). Template {template}, query {query}. {model} on {device}."
        ).format(
            verdict=answer["verdict"],
            reason=answer["reason"],
            template=answer["template_modality"]["modality"].upper(),
            query=answer["query_modality"]["modality"].upper(),
            model=f"{answer['model']['name']} {answer['model']['version']}",
            device=answer["device"],
        )
        self.updateGui()

    def onFailed(self, error: UAEError) -> None:
        """Say what went wrong; a cancelled work says nothing more."""
        self._request = None
        self.ui.statusLabel.text = str(error)
        self.updateGui()
        if not isinstance(error, CancelledError):
            self.say(str(error), _("Landmarks"))

    def onJump(self, place: np.ndarray) -> None:
        """Bring the query's views to the point that was found."""
        if self.parameters is not None and self.parameters.queryVolume is not None:
            views.jump(slicer.mrmlScene, self.parameters.queryVolume, place)

    def onBeside(self, _checked: bool = False) -> None:
        """Template above, query below."""
        if self.parameters is not None and not self._missing():
            slicer.app.layoutManager().setLayout(slicer.vtkMRMLLayoutNode.SlicerLayoutThreeOverThreeView)
            views.show_beside(slicer.mrmlScene, self.parameters.templateVolume, self.parameters.queryVolume)
            slicer.util.resetSliceViews()

    def showResults(self, _caller: Any = None, _event: Any = None) -> None:
        """One row for each found point."""
        found, table = self.parameters.queryPoints if self.parameters is not None else None, self.ui.resultsTable
        count = found.GetNumberOfControlPoints() if found is not None else 0
        table.setRowCount(count)
        for row in range(count):
            score, cycle, method, verdict = _columns(found.GetNthControlPointDescription(row))
            for column, text in enumerate((found.GetNthControlPointLabel(row), score, cycle, method, verdict)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text)
                item.setFlags(qt.Qt.ItemIsSelectable | qt.Qt.ItemIsEnabled)
                table.setItem(row, column, item)

    def onResultClicked(self, row: int, _column: int) -> None:
        """Go to a found point."""
        found = self.parameters.queryPoints
        if found is not None and row < found.GetNumberOfControlPoints():
            self.onJump(np.array(found.GetNthControlPointPositionWorld(row)))
        if self.ui.mapButton.checked:
            self.onMap(True)

    def onMap(self, checked: bool) -> None:
        """Lay the similarity map of the chosen point over the query, or take it away."""
        query, found = self.parameters.queryVolume, self.parameters.queryPoints
        if query is None or found is None:
            return
        if not checked:
            views.overlay(slicer.mrmlScene, query, None)
            return
        row = max(self.ui.resultsTable.currentRow(), 0)
        points = range(self.parameters.templatePoints.GetNumberOfControlPoints())
        chosen = [index for index in points if self.logic.queryPointOf(found, index) == row]
        asked = False
        with self.attempt(_("The similarity map could not be made.")):
            self.logic.similarityMap(
                found,
                chosen[0] if chosen else -1,
                lambda node: views.overlay(slicer.mrmlScene, query, node),
                self.onFailed,
            )
            asked = True
        if not asked:
            self.ui.mapButton.checked = False

    def onLoad(self, _checked: bool = False) -> None:
        """Read template points."""
        path = qt.QFileDialog.getOpenFileName(slicer.util.mainWindow(), _("Load points"), "", POINT_FILES)
        if path:
            with self.attempt(_("The points could not be read.")):
                self.parameters.templatePoints = self.logic.loadPoints(path)

    def onSave(self, _checked: bool = False) -> None:
        """Write the found points."""
        found = self.parameters.queryPoints
        if found is None:
            return
        path = qt.QFileDialog.getSaveFileName(
            slicer.util.mainWindow(), _("Save found points"), f"{found.GetName()}.mrk.json", "Points (*.mrk.json)"
        )
        if path:
            with self.attempt(_("The points could not be written.")):
                self.logic.savePoints(found, path)

    def onBatchChecked(self) -> None:
        """Keep the scans of the batch in the scene."""
        if self.parameters is not None and not self._updating:
            self.parameters.batchVolumes = list(self.ui.batchSelector.checkedNodes())

    def _batchScans(self) -> list[Any]:
        """Scans of the batch that are still in the scene: the parameter node keeps the place of a removed one."""
        return [node for node in self.parameters.batchVolumes if node is not None]

    def onBatch(self, _checked: bool = False) -> None:
        """Begin, or cancel what runs."""
        if self._batch is not None:
            self._batch.cancel()
            return
        with self.attempt(_("The points could not be matched.")):
            self.offerTorch()
            chosen = self.parameters
            scans = [node for node in self._batchScans() if node is not chosen.templateVolume]
            options = {**self._options(), "method": chosen.method.value, "onProgress": self.onProgress}
            started = self.logic.batch(
                chosen.templateVolume, scans, chosen.templatePoints, onDone=self.onBatchDone, **options
            )
            self._batch = None if started.done else started
            chosen.table = started.table

    def onBatchDone(self, batch: Any) -> None:
        """Say how many scans could be matched."""
        self._batch = None
        self.ui.statusLabel.text = _("{done} scans matched, {failed} failed").format(
            done=len(batch.results), failed=len(batch.failed)
        )
        self.updateGui()

    def _showBatchState(self) -> None:
        ready = self.parameters.templateVolume is not None and self.parameters.templatePoints is not None
        self.ui.batchButton.enabled = self._batch is not None or (ready and bool(self._batchScans()))
        self.ui.batchButton.text = _("Cancel") if self._batch is not None else _("Match in all")
        self.ui.exportButton.enabled = self.parameters.table is not None

    def onExport(self, _checked: bool = False) -> None:
        """Write the table of the batch."""
        path = qt.QFileDialog.getSaveFileName(
            slicer.util.mainWindow(), _("Export table"), f"{self.parameters.table.GetName()}.csv", "Table (*.csv)"
        )
        if path:
            with self.attempt(_("The table could not be written.")):
                self.logic.exportTable(self.parameters.table, path)

    def onModel(self, index: int) -> None:
        """Keep the chosen model in the scene."""
        if not self._updating and self.parameters is not None and index >= 0:
            self.parameters.model = self.ui.modelComboBox.itemData(index)

    def _listModels(self) -> None:
        from uae.model_files import registered

        try:
            self._models.update({entry.name: entry.name for entry in registered()})
        except UAEError as error:
            self.onLog(str(error))


def _columns(description: str) -> tuple[str, str, str, str]:
    """Score, cycle, method and verdict from a point's description; all of it as verdict where it is another text."""
    parts = description.split(", ", 3)
    return tuple(parts) if len(parts) == 4 else ("", "", "", description)
