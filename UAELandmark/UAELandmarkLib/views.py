"""Slice views: template and query beside each other, and the query's views at the place that was found."""

from __future__ import annotations

from typing import Any

import numpy as np

from UAECommonLib.compare_views import composites

__all__ = ["jump", "overlay", "show_beside"]

OVERLAY_OPACITY = 0.5


def show_beside(scene: Any, template: Any, query: Any) -> None:
    """The template in the upper views (Red, Green, Yellow), the query in the lower ones (Red+, ...).

    Args:
        scene: vtkMRMLScene, in the layout three over three.
        template: volume node.
        query: volume node.
    """
    for node in composites(scene):
        volume = query if node.GetLayoutName().endswith("+") else template
        node.SetBackgroundVolumeID(volume.GetID())
        node.SetForegroundVolumeID(None)


def overlay(scene: Any, query: Any, image: Any, opacity: float = OVERLAY_OPACITY) -> None:
    """Lay a volume (None: nothing) over the query in the views that show it."""
    for node in composites(scene):
        if node.GetBackgroundVolumeID() == query.GetID():
            node.SetForegroundVolumeID(image.GetID() if image is not None else None)
            node.SetForegroundOpacity(opacity)


def jump(scene: Any, query: Any, place: np.ndarray) -> None:
    """Bring the slice views that show the query, and the crosshair, to a world place (3,) RAS mm.

    Where no view shows the query alone, all views that show it at all are brought there.
    """
    shown = [node for node in composites(scene) if node.GetBackgroundVolumeID() == query.GetID()]
    shown = shown or [node for node in composites(scene) if node.GetForegroundVolumeID() == query.GetID()]
    names = {node.GetLayoutName() for node in shown}
    for index in range(scene.GetNumberOfNodesByClass("vtkMRMLSliceNode")):
        view = scene.GetNthNodeByClass(index, "vtkMRMLSliceNode")
        if view.GetLayoutName() in names:
            view.JumpSliceByOffsetting(*map(float, place))
    crosshair = scene.GetFirstNodeByClass("vtkMRMLCrosshairNode")
    if crosshair is not None:
        crosshair.SetCrosshairRAS(*map(float, place))
