"""What the panels of both modules share: the scene's choices in and out, devices, and work that may fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
from slicer.util import VTKObservationMixin

from uae.errors import UAEError
from UAECommonLib.devices import AUTO, CPU, list_devices
from UAECommonLib.stages import stage_label
from UAECommonLib.torch_offer import ensure_torch

__all__ = ["Panel"]

logger = logging.getLogger(__name__)


class Panel(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """A module's panel; a module fills in `build`, `getParameters`, `connected` and `showState`.

    Attributes:
        ui: widgets of the .ui file by name; one is `deviceComboBox`.
        logic: of the module, with a method `close`.
        parameters: the module's parameter node wrapper, None while no scene is there.
    """

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: Any = None
        self.parameters: Any = None
        self._guiTag: Any = None
        self._deviceRunner: Any = None
        self._devices = {AUTO: _("Automatic"), CPU: CPU}
        self._updating = False

    def build(self) -> None:
        """Make the logic and connect the module's own widgets."""
        raise NotImplementedError

    def getParameters(self) -> Any:
        """The module's parameter node of the application's scene."""
        raise NotImplementedError

    def connected(self) -> None:
        """Take over what the parameter node's connectors do not: called once for each parameter node."""

    def showState(self) -> None:
        """Buttons and results from the parameter node; what the panel itself changes here calls nothing back."""
        raise NotImplementedError

    def setup(self) -> None:
        """Build the panel; called once by the application."""
        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath(f"UI/{self.moduleName}.ui"))
        self.layout.addWidget(panel)
        self.ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self.ui.progressBar.visible = False
        self.build()
        self.ui.deviceComboBox.connect("currentIndexChanged(int)", self.onDevice)
        scene = slicer.mrmlScene
        for event, call in (
            (scene.StartCloseEvent, self.onSceneStartClose),
            (scene.EndCloseEvent, self.onSceneEndClose),
            (scene.StartImportEvent, self.onSceneStartImport),
            (scene.EndImportEvent, self.onSceneImported),
        ):
            self.addObserver(scene, event, call)
        self.setParameterNode(self.getParameters())
        self._deviceRunner = list_devices(self.onDevices)

    def cleanup(self) -> None:
        """End what runs; called when the module goes away."""
        self.setParameterNode(None)
        self.removeObservers()
        if self._deviceRunner is not None:
            self._deviceRunner.kill()
        if self.logic is not None:
            self.logic.close()

    def enter(self) -> None:
        """Show the scene's choices when the module is opened."""
        if self.parameters is None:
            self.setParameterNode(self.getParameters())

    def onSceneStartClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Let go of the nodes."""
        self.setParameterNode(None)

    def onSceneEndClose(self, _caller: Any = None, _event: Any = None) -> None:
        """Begin with the new scene."""
        if self.parent.isEntered:
            self.setParameterNode(self.getParameters())

    def onSceneStartImport(self, _caller: Any = None, _event: Any = None) -> None:
        """Let go of the choices: selectors that are filled anew at the end of the import must not write into them."""
        self.setParameterNode(None)

    def onSceneImported(self, _caller: Any = None, _event: Any = None) -> None:
        """Take over the choices of a scene that was read."""
        self.setParameterNode(self.getParameters())

    def setParameterNode(self, parameters: Any) -> None:
        """Connect the panel with a parameter node, or with none."""
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.removeObserver(self.parameters.parameterNode, vtk.vtkCommand.ModifiedEvent, self.updateGui)
        self.parameters = parameters
        if parameters is not None:
            self._guiTag = parameters.connectGui(self.ui)
            # after the wrapper's own observers, which take over what changed
            node, event = parameters.parameterNode, vtk.vtkCommand.ModifiedEvent
            self.addObserver(node, event, self.updateGui, priority=-1.0)
            self._updating = True
            try:
                self.connected()
            finally:
                self._updating = False
            self.updateGui()

    def updateGui(self, _caller: Any = None, _event: Any = None) -> None:
        """Show what is chosen and what was found."""
        if self.parameters is None or self._updating:
            return
        self._updating = True
        try:
            self.fill(self.ui.deviceComboBox, self._devices, self.parameters.device)
            self.showState()
        finally:
            self._updating = False

    @contextmanager
    def attempt(self, message: str) -> Iterator[None]:
        """Do something that may fail: one dialog says what and why, and the panel shows the state that is left.

        Args:
            message: what could not be done.
        """
        try:
            with slicer.util.tryWithErrorDisplay(message, waitCursor=True):
                yield
        except UAEError as error:
            logger.debug("shown to the user: %s", error)
        finally:
            self.updateGui()

    @staticmethod
    def say(text: str, title: str) -> None:
        """One dialog, opened from the event loop: a child process that just ended is still telling about it."""
        qt.QTimer.singleShot(0, lambda: slicer.util.errorDisplay(text, windowTitle=title))

    def offerTorch(self) -> None:
        """Ask whether a missing PyTorch may be installed.

        Raises:
            UAEError: it is missing and is not wanted, or cannot be installed.
        """
        ensure_torch(slicer.util.confirmOkCancelDisplay)

    def progressText(self, stage: str, secondsLeft: float | None) -> str:
        """A stage in the user's words, with the time left in it."""
        text = stage_label(stage)
        if secondsLeft is None:
            return text
        return _("{stage}, {seconds} s left").format(stage=text, seconds=int(secondsLeft))

    def onLog(self, line: str) -> None:
        """Add a line to the log."""
        self.ui.logTextEdit.appendPlainText(line)

    def onDevices(self, devices: dict[str, str]) -> None:
        """Offer the devices that were found."""
        self._devices, self._deviceRunner = {AUTO: _("Automatic"), **devices}, None
        self.updateGui()

    def onDevice(self, index: int) -> None:
        """Keep the chosen device in the scene."""
        if not self._updating and self.parameters is not None and index >= 0:
            self.parameters.device = self.ui.deviceComboBox.itemData(index)

    @staticmethod
    def fill(box: Any, choices: dict[str, str], chosen: str) -> None:
        """Offer choices (value -> text), and the chosen value also where it is not among them."""
        choices = {**choices, chosen: choices.get(chosen, chosen)}
        if [box.itemData(index) for index in range(box.count)] != list(choices):
            box.clear()
            for value, text in choices.items():
                box.addItem(text, value)
        box.setCurrentIndex(box.findData(chosen))
