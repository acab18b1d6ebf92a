"""The module's panel: choices into the parameter node, that into the logic, the outcome onto the screen."""

from __future__ import annotations

import logging
from typing import Any

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
from slicer.util import VTKObservationMixin

from uae.errors import UAEError
from UAECommonLib import compare_views
from UAECommonLib.devices import AUTO, CPU, list_devices
from UAECommonLib.result_nodes import CARRIER, find_results, nodes_of
from UAECommonLib.torch_offer import ensure_torch
from UAERegistrationLib.logic import Outcome, RegistrationOptions, UAERegistrationLogic
from UAERegistrationLib.parameters import Modality, getParameterNode
from UAERegistrationLib.quality import COLORS, quality_html, stage_label, verdict

__all__ = ["UAERegistrationWidget"]

logger = logging.getLogger(__name__)

FLICKER_MS = 600
"""Time each scan is shown: slow enough to see an edge jump."""


class UAERegistrationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """One button, Align, which turns into Cancel."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: UAERegistrationLogic | None = None
        self.parameters: Any = None
        self._guiTag: Any = None
        self._deviceRunner: Any = None
        self._devices = {AUTO: _("Automatic"), CPU: CPU}
        self._updating = False

    def setup(self) -> None:
        """Build the panel; called once by the application."""
        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath("UI/UAERegistration.ui"))
        self.layout.addWidget(panel)
        self.ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self.logic = UAERegistrationLogic()
        self.ui.progressBar.visible = False
        self._flickerTimer = qt.QTimer()
        self._flickerTimer.setInterval(FLICKER_MS)
        self._flickerTimer.connect("timeout()", self._onFlicker)
        self.ui.alignButton.connect("clicked(bool)", self.onAlign)
        self.ui.undoButton.connect("clicked(bool)", self.onUndo)
        self.ui.linearCheckBox.connect("toggled(bool)", self.onShow)
        self.ui.gridCheckBox.connect("toggled(bool)", self.onShow)
        self.ui.showPairButton.connect("clicked(bool)", self.onShowPair)
        self.ui.blendSlider.connect("valueChanged(double)", self.onBlend)
        self.ui.flickerCheckBox.connect("toggled(bool)", self.onFlickerToggled)
        self.ui.linkCheckBox.connect("toggled(bool)", self.onLink)
        self.ui.checkerboardButton.connect("clicked(bool)", self.onCheckerboard)
        self.ui.deviceComboBox.connect("currentIndexChanged(int)", self.onDevice)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(slicer.mrmlScene, slicer.mrmlScene.EndImportEvent, self.onSceneImported)
        self.setParameterNode(getParameterNode())
        self._deviceRunner = list_devices(self.onDevices)

    def cleanup(self) -> None:
        """End what runs; called when the module goes away."""
        self.setParameterNode(None)
        self.removeObservers()
        self._flickerTimer.stop()
        if self._deviceRunner is not None:
            self._deviceRunner.kill()
        self.logic.close()

    def enter(self) -> None:
        """Show the scene's choices when the module is opened."""
        if self.parameters is None:
            self.setParameterNode(getParameterNode())

    def exit(self) -> None:
        """Stop what blinks when the module is left; a registration goes on."""
        self.ui.flickerCheckBox.checked = False

    def onSceneStartClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Let go of the nodes; a running registration is ended."""
        self.logic.close()
        self.setParameterNode(None)

    def onSceneEndClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Begin with the new scene."""
        if self.parent.isEntered:
            self.setParameterNode(getParameterNode())

    def onSceneImported(self, _caller: Any = None, _event: Any = None) -> None:
        """Take over results and choices of a scene that was read."""
        self.logic.afterSceneLoaded()
        self.setParameterNode(getParameterNode())

    def setParameterNode(self, parameters: Any) -> None:
        """Connect the panel with a parameter node, or with none."""
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.removeObserver(self.parameters.parameterNode, vtk.vtkCommand.ModifiedEvent, self.updateGui)
        self.parameters = parameters
        if parameters is not None:
            self._guiTag = parameters.connectGui(self.ui)
            self.addObserver(parameters.parameterNode, vtk.vtkCommand.ModifiedEvent, self.updateGui)
            self._fillDevices()
            self._observeResult()
            self.updateGui()

    def updateGui(self, _caller: Any = None, _event: Any = None) -> None:
        """Buttons, modalities and the result from the parameter node."""
        if self.parameters is None or self._updating:
            return
        self._updating = True
        try:
            missing = self._missing()
            running = self.logic.running
            self.ui.alignButton.enabled = running or not missing
            self.ui.alignButton.text = _("Cancel") if running else _("Align")
            self.ui.alignButton.toolTip = missing or _("Bring the moving scan to the fixed one")
            for node, chosen, box in (
                (self.parameters.fixedVolume, self.parameters.fixedModality, self.ui.fixedModalityComboBox),
                (self.parameters.movingVolume, self.parameters.movingModality, self.ui.movingModalityComboBox),
            ):
                self._showModality(box, node, chosen)
            self._showResult()
        finally:
            self._updating = False

    def _missing(self) -> str:
        """What still has to be chosen; empty where Align can be pressed."""
        fixed, moving = self.parameters.fixedVolume, self.parameters.movingVolume
        if fixed is None or moving is None:
            return _("Choose a fixed and a moving scan")
        return _("Fixed and moving are the same scan; choose two") if fixed is moving else ""

    def _showModality(self, box: Any, node: Any, chosen: Modality) -> None:
        """Say in the selector what "automatic" would decide, and in its tool tip why."""
        text, reason = Modality.AUTO.label(), _("What the scan is")
        if node is not None and chosen is Modality.AUTO:
            try:
                modality, reason = self.logic.guessModality(node)
                text = _("Automatic: {modality}").format(modality=modality.upper() or _("doubtful, choose one"))
            except UAEError as error:
                reason = str(error)
        box.setItemText(0, text)
        box.toolTip = reason

    def onAlign(self, _checked: bool = False) -> None:
        """Begin, or cancel what runs."""
        if self.logic.running:
            self.ui.stageLabel.text = _("Cancelling...")
            self.logic.cancel()
            return
        with slicer.util.tryWithErrorDisplay(_("The registration could not be started."), waitCursor=True):
            ensure_torch(slicer.util.confirmOkCancelDisplay)
            chosen = self.parameters
            options = RegistrationOptions(
                preset=chosen.preset.value,
                fixedModality=chosen.fixedModality.value,
                movingModality=chosen.movingModality.value,
                roi=chosen.roi,
                device=chosen.device,
                resample=chosen.resample,
            )
            self.ui.logTextEdit.plainText = ""
            self.logic.start(
                chosen.fixedVolume, chosen.movingVolume, options, self.onFinished, self.onProgress, self.onLog
            )
            self.ui.progressBar.visible = True
            self.ui.progressBar.value = 0
            self.ui.stageLabel.text = _("Starting...")
        self.updateGui()

    def onProgress(self, stage: str, percent: float, secondsLeft: float | None) -> None:
        """Show the stage, its percentage and the time left in it."""
        self.ui.progressBar.value = int(percent)
        left = "" if secondsLeft is None else _(", {seconds} s left").format(seconds=int(secondsLeft))
        self.ui.stageLabel.text = f"{stage_label(stage)}{left}"

    def onLog(self, line: str) -> None:
        """Add a line to the log."""
        self.ui.logTextEdit.appendPlainText(line)

    def onFinished(self, outcome: Outcome) -> None:
        """Show how it ended."""
        self.ui.progressBar.visible = False
        self.ui.stageLabel.text = ""
        if outcome.nodes is not None and self.parameters is not None:
            self.parameters.result = outcome.nodes.linear
            self._observeResult()
        self.updateGui()
        if outcome.nodes is not None:
            self.onShowPair()
        elif outcome.status == "refused":
            self._showReport(outcome.report, "")
            self.ui.resultCollapsibleButton.enabled = True
        else:
            self.ui.stageLabel.text = outcome.reason
            if outcome.status == "failed":
                slicer.util.errorDisplay(outcome.reason, windowTitle=_("Registration"))

    def onUndo(self, _checked: bool = False) -> None:
        """Give the moving scan its old place back."""
        with slicer.util.tryWithErrorDisplay(_("The registration could not be undone.")):
            linear, self.parameters.result = self.parameters.result, None
            if linear is not None:
                self.logic.undo(linear)
        self.updateGui()

    def onShow(self, _checked: bool = False) -> None:
        """Before and after."""
        if self._updating or self.parameters is None or self.parameters.result is None:
            return
        with slicer.util.tryWithErrorDisplay(_("The registration cannot be switched.")):
            self.logic.show(self.parameters.result, self.ui.linearCheckBox.checked, self.ui.gridCheckBox.checked)

    def onShowPair(self, _checked: bool = False) -> None:
        """Both scans in all slice views."""
        if self.parameters is not None and not self._missing():
            compare_views.show_pair(
                slicer.mrmlScene, self.parameters.fixedVolume, self.parameters.movingVolume, self.ui.blendSlider.value
            )

    def onBlend(self, opacity: float) -> None:
        """Opacity of the moving scan."""
        compare_views.blend(slicer.mrmlScene, opacity)

    def onFlickerToggled(self, checked: bool) -> None:
        """Begin and stop changing between the scans."""
        if checked:
            self.onShowPair()
            self._flickerTimer.start()
        else:
            self._flickerTimer.stop()
            compare_views.blend(slicer.mrmlScene, self.ui.blendSlider.value)

    def _onFlicker(self) -> None:
        compare_views.flicker(slicer.mrmlScene)

    def onLink(self, checked: bool) -> None:
        """Move all slice views together."""
        compare_views.link(slicer.mrmlScene, checked)

    def onCheckerboard(self, _checked: bool = False) -> None:
        """Show fields of both scans in turn."""
        with slicer.util.tryWithErrorDisplay(_("The checkerboard cannot be shown."), waitCursor=True):
            result = nodes_of(self.parameters.result)
            board = compare_views.checkerboard(slicer.mrmlScene, self.parameters.fixedVolume, result.image)
            slicer.util.setSliceViewerLayers(background=board, foreground=None)

    def onDevices(self, devices: dict[str, str]) -> None:
        """Offer the devices that were found."""
        self._devices = {AUTO: _("Automatic"), **devices}
        self._deviceRunner = None
        self._fillDevices()

    def onDevice(self, index: int) -> None:
        """Keep the chosen device in the scene."""
        if not self._updating and self.parameters is not None and index >= 0:
            self.parameters.device = self.ui.deviceComboBox.itemData(index)

    def _fillDevices(self) -> None:
        if self.parameters is None:
            return
        chosen = self.parameters.device
        self._updating = True
        self.ui.deviceComboBox.clear()
        for name, text in {**self._devices, chosen: self._devices.get(chosen, chosen)}.items():
            self.ui.deviceComboBox.addItem(text, name)
        self.ui.deviceComboBox.setCurrentIndex(self.ui.deviceComboBox.findData(chosen))
        self._updating = False

    def _observeResult(self) -> None:
        """Watch the scans of the result; one of a scene without a parameter node's memory is found again."""
        linear = self.parameters.result
        if linear is None and (found := find_results(slicer.mrmlScene)):
            linear = self.parameters.result = found[-1]
        if linear is not None:
            self.logic.observe(linear, lambda _reason: self.updateGui())

    def _showResult(self) -> None:
        linear = self.parameters.result
        self.ui.resultCollapsibleButton.enabled = linear is not None
        has_image = linear is not None and nodes_of(linear).image is not None
        self.ui.checkerboardButton.enabled = has_image
        if linear is None:
            self.ui.verdictLabel.text = _("No registration yet")
            self.ui.qualityTextBrowser.html = ""
            return
        result = nodes_of(linear)
        self.ui.gridCheckBox.enabled = result.grid is not None
        carrier = linear.GetNodeReference(CARRIER)
        self.ui.linearCheckBox.checked = carrier is not None and carrier.GetParentTransformNode() is linear
        self.ui.gridCheckBox.checked = result.grid is not None and linear.GetParentTransformNode() is result.grid
        self._showReport(result.figures, self.logic.outdated(linear))

    def _showReport(self, report: dict[str, Any], outdated: str) -> None:
        self.ui.verdictLabel.text = verdict(report)
        self.ui.verdictLabel.styleSheet = f"color: {COLORS.get(report.get('status'), 'black')}; font-weight: bold"
        self.ui.qualityTextBrowser.html = quality_html(report, outdated)
