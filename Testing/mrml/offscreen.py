"""A slice view that nobody sees: Slicer's own displayable managers and mouse handling on an offscreen window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy


def gl_problem() -> str:
    """Why nothing can be rendered here; empty where it can."""
    try:
        window = _window(16, 16)
        window.Render()
        pixels = vtk.vtkUnsignedCharArray()
        window.GetPixelData(0, 0, 15, 15, 1, pixels, 0)
        window.Finalize()
    except (AttributeError, ImportError) as error:
        return f"no offscreen window: {error}"
    return (
        "" if pixels.GetNumberOfValues() else "software GL does not work (libEGL, libGL and their drivers are needed)"
    )


def _window(width: int, height: int) -> Any:
    from vtkmodules.vtkRenderingOpenGL2 import vtkEGLRenderWindow

    window = vtkEGLRenderWindow()
    window.SetSize(width, height)
    window.SetMultiSamples(0)
    window.OffScreenRenderingOn()
    return window


class SliceView:
    """One slice view ("Red", "Green", "Yellow" or any other name) with markups, and a mouse.

    Attributes:
        logic: vtkMRMLSliceLogic.
        node: vtkMRMLSliceNode.
        composite: vtkMRMLSliceCompositeNode.
    """

    def __init__(self, headless: Any, name: str = "Red", orientation: str = "Axial", size: int = 256) -> None:
        self.scene, self.size = headless.scene, size
        self._headless = headless
        application = headless.application
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(application)
        self.logic.SetMRMLScene(self.scene)
        self.node = self.logic.AddSliceNode(name)
        self.composite = self.logic.GetSliceCompositeNode()
        application.GetSliceLogics().AddItem(self.logic)
        if self.node.GetSliceOrientationPreset(orientation) is None:
            slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(self.scene)
            self.node.AddSliceOrientationPreset(orientation, _preset(orientation))
        self.node.SetOrientation(orientation)
        self.node.SetDimensions(size, size, 1)
        self.window = _window(size, size)
        self.renderer = vtk.vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkGenericRenderWindowInteractor()
        self.interactor.SetInteractorStyle(vtk.vtkInteractorStyleUser())
        self.window.SetInteractor(self.interactor)
        self.interactor.SetRenderWindow(self.window)
        self._image = vtk.vtkImageMapper()
        self._image.SetColorWindow(255)
        self._image.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._image)
        actor.SetLayerNumber(0)
        self.renderer.AddViewProp(actor)
        self.group = slicer.vtkMRMLDisplayableManagerGroup()
        self.group.SetRenderer(self.renderer)
        self.managers = [slicer.vtkMRMLMarkupsDisplayableManager()]
        for manager in self.managers:
            manager.SetMRMLApplicationLogic(application)
            self.group.AddDisplayableManager(manager)
        self.group.SetMRMLDisplayableNode(self.node)
        self.style = slicer.vtkMRMLSliceViewInteractorStyle()
        self.style.SetSliceLogic(self.logic)
        self.style.SetDisplayableManagers(self.group)
        self.style.SetInteractor(self.interactor)
        self.interactor.Initialize()
        self.interactor.SetSize(size, size)

    def show(self, background: Any, foreground: Any = None, opacity: float = 0.0) -> None:
        """Show one or two volumes, fitted to the view."""
        self.composite.SetBackgroundVolumeID(background.GetID())
        self.composite.SetForegroundVolumeID(foreground.GetID() if foreground is not None else None)
        self.composite.SetForegroundOpacity(opacity)
        self.logic.FitSliceToBackground()
        self.node.UpdateMatrices()

    def jump(self, point_ras: np.ndarray) -> None:
        """Show the slice through a world point (3,) RAS mm."""
        self.node.JumpSlice(*np.asarray(point_ras, dtype=float))

    def pixel(self, point_ras: np.ndarray) -> tuple[int, int]:
        """Where a world point (3,) RAS mm lies in the view."""
        to_xy = vtk.vtkMatrix4x4()
        vtk.vtkMatrix4x4.Invert(self.node.GetXYToRAS(), to_xy)
        x, y, _, _ = to_xy.MultiplyPoint((*np.asarray(point_ras, dtype=float), 1.0))
        return round(x), round(y)

    def world(self, x: int, y: int) -> np.ndarray:
        """The world point (3,) RAS mm of a pixel."""
        return np.array(self.node.GetXYToRAS().MultiplyPoint((x, y, 0.0, 1.0))[:3])

    def place(self, markups: Any) -> None:
        """Enter Slicer's place mode for a markups node: each click adds a point until `stop_placing`."""
        self._headless.logics["markups"].SetActiveList(markups)
        interaction = self._headless.application.GetInteractionNode()
        interaction.SetPlaceModePersistence(1)
        interaction.SetCurrentInteractionMode(interaction.Place)

    def stop_placing(self) -> None:
        """Leave the place mode."""
        interaction = self._headless.application.GetInteractionNode()
        interaction.SetCurrentInteractionMode(interaction.ViewTransform)

    def move(self, x: int, y: int) -> None:
        """Move the mouse to a pixel."""
        self.interactor.SetEventInformation(x, y, 0, 0)
        self.interactor.InvokeEvent(vtk.vtkCommand.MouseMoveEvent)

    def click(self, x: int, y: int) -> None:
        """Click the left button at a pixel."""
        self.move(x, y)
        self.interactor.InvokeEvent(vtk.vtkCommand.LeftButtonPressEvent)
        self.interactor.InvokeEvent(vtk.vtkCommand.LeftButtonReleaseEvent)

    def drag(self, start: tuple[int, int], end: tuple[int, int], steps: int = 4) -> None:
        """Drag with the left button from one pixel to another."""
        self.move(*start)
        self.interactor.InvokeEvent(vtk.vtkCommand.LeftButtonPressEvent)
        for step in range(1, steps + 1):
            part = step / steps
            self.move(*(round(a + part * (b - a)) for a, b in zip(start, end)))
        self.interactor.InvokeEvent(vtk.vtkCommand.LeftButtonReleaseEvent)

    def click_world(self, point_ras: np.ndarray) -> np.ndarray:
        """Show the slice through a world point and click it.

        Returns:
            (3,) RAS mm of the pixel that was hit.
        """
        self.jump(point_ras)
        self.render()
        x, y = self.pixel(point_ras)
        self.click(x, y)
        return self.world(x, y)

    def render(self) -> np.ndarray:
        """The picture, uint8 (rows, columns, 3), first row on top."""
        self.logic.UpdatePipeline()
        self._image.SetInputConnection(self.logic.GetImageDataConnection())
        self.window.Render()
        pixels = vtk.vtkUnsignedCharArray()
        width, height = self.window.GetSize()
        self.window.GetPixelData(0, 0, width - 1, height - 1, 1, pixels, 0)
        return vtk_to_numpy(pixels).reshape(height, width, 3)[::-1].copy()

    def save_picture(self, path: str | Path) -> None:
        """Write the picture as .png."""
        from PIL import Image

        Image.fromarray(self.render()).save(str(path))

    def close(self) -> None:
        """Let go of the window and the scene."""
        self.group.SetMRMLDisplayableNode(None)
        self.style.SetDisplayableManagers(None)
        self.style.SetInteractor(None)
        self.window.Finalize()


def _preset(orientation: str) -> vtk.vtkMatrix3x3:
    """Slicer's own slice axes of an orientation."""
    matrix = vtk.vtkMatrix3x3()
    axes = {"Axial": "GetAxialSliceToRASMatrix", "Sagittal": "GetSagittalSliceToRASMatrix"}
    getattr(slicer.vtkMRMLSliceNode, axes.get(orientation, "GetCoronalSliceToRASMatrix"))(matrix)
    return matrix
