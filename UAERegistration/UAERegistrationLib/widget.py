"""The module's panel: choices into the parameter node, that into the logic, the outcome onto the screen."""

from __future__ import annotations

from typing import Any

import qt
import slicer
from slicer.i18n import tr as _

from uae.errors import UAEError
from UAECommonLib import compare_views
from UAECommonLib.panel import Panel
from UAECommonLib.result_nodes import CARRIER, find_results, nodes_of
from UAERegistrationLib.logic import Outcome, RegistrationOptions, UAERegistrationLogic
from UAERegistrationLib.parameters import Modality, getParameterNode
from UAERegistrationLib.quality import COLORS, quality_html, verdict

__all__ = ["UAERegistrationWidget"]

FLICKER_MS = 600
"""Time each scan is shown: slow enough to see an edge jump."""


class UAERegistrationWidget(Panel):
    """One button, Align, which turns into Cancel.

    Attributes:
        refusal: report of the last registration where that was refused, with its fixed and moving scan.
    """

    refusal: tuple[dict[str, Any], Any, Any] | None = None

    def build(self) -> None:
        """Make the logic and connect the panel's widgets."""
        self.logic = UAERegistrationLogic()
        self.logic.afterSceneLoaded()
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

    def getParameters(self) -> Any:
        """The module's parameter node of the application's scene."""
        return getParameterNode()

    def cleanup(self) -> None:
        """End what runs; called when the module goes away."""
        self._flickerTimer.stop()
        Panel.cleanup(self)

    def exit(self) -> None:
        """Stop what blinks when the module is left; a registration goes on."""
        self.ui.flickerCheckBox.checked = False

    def onSceneStartClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Let go of the nodes; a running registration is ended."""
        self.logic.close()
        Panel.onSceneStartClose(self)

    def onSceneImported(self, _caller: Any = None, _event: Any = None) -> None:
        """Take over results and choices of a scene that was read."""
        self.logic.afterSceneLoaded()
        Panel.onSceneImported(self)

    def connected(self) -> None:
        """Watch the result of the scene."""
        self.refusal = None
        self._observeResult()

    def showState(self) -> None:
        """Buttons, modalities and the result from the parameter node."""
        missing, running = self._missing(), self.logic.running
        self.ui.alignButton.enabled = running or not missing
        self.ui.alignButton.text = _("Cancel") if running else _("Align")
        self.ui.alignButton.toolTip = missing or _("Bring the moving scan to the fixed one")
        self.ui.progressBar.visible = running
        for node, chosen, box in (
            (self.parameters.fixedVolume, self.parameters.fixedModality, self.ui.fixedModalityComboBox),
            (self.parameters.movingVolume, self.parameters.movingModality, self.ui.movingModalityComboBox),
        ):
            self._showModality(box, node, chosen)
        self._showResult()

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
        with self.attempt(_("The registration could not be started.")):
            self.offerTorch()
            chosen = self.parameters
            options = RegistrationOptions(
                preset=chosen.preset.value,
                fixedModality=chosen.fixedModality.value,
                movingModality=chosen.movingModality.value,
                roi=chosen.roi,
                device=chosen.device,
                resample=chosen.resample,
            )
            self.refusal = None
            self.ui.logTextEdit.plainText = ""
            self.ui.progressBar.value = 0
            self.logic.start(
                chosen.fixedVolume, chosen.movingVolume, options, self.onFinished, self.onProgress, self.onLog
            )
            self.ui.stageLabel.text = _("Starting...")

    def onProgress(self, stage: str, percent: float, secondsLeft: float | None) -> None:
        """Show the stage, its percentage and the time left in it."""
        self.ui.progressBar.value = int(percent)
        self.ui.stageLabel.text = self.progressText(stage, secondsLeft)

    def onFinished(self, outcome: Outcome) -> None:
        """Show how it ended."""
        self.ui.stageLabel.text = ""
        if outcome.nodes is not None and self.parameters is not None:
            self.parameters.result = outcome.nodes.linear
            self._observeResult()
        if outcome.status == "refused" and self.parameters is not None:
            self.refusal = (outcome.report, *outcome.scans)
        self.updateGui()
        if outcome.nodes is not None:
            self._showScans(*outcome.scans)
        elif outcome.status != "refused":
            self.ui.stageLabel.text = outcome.reason
            if outcome.status == "failed":
                self.say(outcome.reason, _("Registration"))

    def onUndo(self, _checked: bool = False) -> None:
        """Give the moving scan its old place back."""
        with self.attempt(_("The registration could not be undone.")):
            linear = self.parameters.result
            if linear is not None:
                self.logic.undo(linear)
                self.parameters.result = self.refusal = None

    def onShow(self, _checked: bool = False) -> None:
        """Before and after."""
        if self._updating or self.parameters is None or self.parameters.result is None:
            return
        with self.attempt(_("The registration cannot be switched.")):
            self.logic.show(self.parameters.result, self.ui.linearCheckBox.checked, self.ui.gridCheckBox.checked)

    def onShowPair(self, _checked: bool = False) -> None:
        """Both scans in all slice views."""
        if self.parameters is not None and not self._missing():
            self._showScans(self.parameters.fixedVolume, self.parameters.movingVolume)

    def _showScans(self, fixed: Any, moving: Any) -> None:
        if compare_views.show_pair(slicer.mrmlScene, fixed, moving, self.ui.blendSlider.value):
            slicer.util.resetSliceViews()  # fits the scan; where it was shown already, the user's zoom stays

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
        with self.attempt(_("The checkerboard cannot be shown.")):
            board = self.logic.checkerboard(self.parameters.result)
            slicer.util.setSliceViewerLayers(background=board, foreground=None)

    def _observeResult(self) -> None:
        """Watch the scans of the result; one of a scene without a parameter node's memory is found again."""
        linear = self.parameters.result
        if linear is None and (found := find_results(slicer.mrmlScene)):
            linear = self.parameters.result = found[-1]
        if linear is not None:
            self.logic.observe(linear, lambda _reason: self.updateGui())

    def _showResult(self) -> None:
        linear = self.parameters.result
        result = nodes_of(linear) if linear is not None else None
        self.ui.resultCollapsibleButton.enabled = linear is not None or self.refusal is not None
        self.ui.checkerboardButton.enabled = result is not None and result.image is not None
        for widget in (self.ui.linearCheckBox, self.ui.undoButton):
            widget.enabled = result is not None
        self.ui.gridCheckBox.enabled = result is not None and result.grid is not None
        if result is not None:
            carrier = linear.GetNodeReference(CARRIER)
            self.ui.linearCheckBox.checked = carrier is not None and carrier.GetParentTransformNode() is linear
            self.ui.gridCheckBox.checked = result.grid is not None and linear.GetParentTransformNode() is result.grid
        if self.refusal is not None and self.refusal[1:] == (self.parameters.fixedVolume, self.parameters.movingVolume):
            self._showReport(self.refusal[0], "")
        elif result is not None:
            self._showReport(result.figures, self.logic.outdated(linear))
        else:
            self.ui.verdictLabel.text = _("No registration yet")
            self.ui.qualityTextBrowser.html = ""

    def _showReport(self, report: dict[str, Any], outdated: str) -> None:
        self.ui.verdictLabel.text = verdict(report)
        self.ui.verdictLabel.styleSheet = f"color: {COLORS.get(report.get('status'), 'black')}; font-weight: bold"
        self.ui.qualityTextBrowser.html = quality_html(report, outdated)
