"""Looking at two scans in all slice views: blend, checkerboard, flicker, linked slices."""

from __future__ import annotations

from typing import Any

import numpy as np

from UAECommonLib.errors import UnsuitableNodeError
from UAECommonLib.mrml import add_volume, array_of, ijk_to_world_lps

__all__ = ["blend", "checkerboard", "composites", "flicker", "link", "show_pair"]

TILE_MM = 40.0
"""Side of a checkerboard's fields: a few of them across any organ."""
GREY_LEVELS = 255
SAME_GRID_MM = 0.01


def composites(scene: Any) -> list[Any]:
    """The composite nodes of all slice views."""
    name = "vtkMRMLSliceCompositeNode"
    return [scene.GetNthNodeByClass(index, name) for index in range(scene.GetNumberOfNodesByClass(name))]


def show_pair(scene: Any, fixed: Any, moving: Any, opacity: float = 0.5) -> bool:
    """Show the fixed scan behind the moving one in all slice views; returns whether some view showed another scan."""
    changed = any(node.GetBackgroundVolumeID() != fixed.GetID() for node in composites(scene))
    for node in composites(scene):
        node.SetBackgroundVolumeID(fixed.GetID())
        node.SetForegroundVolumeID(moving.GetID())
        node.SetForegroundOpacity(opacity)
    return changed


def blend(scene: Any, opacity: float) -> None:
    """Opacity of the moving scan, 0 (only fixed) to 1 (only moving)."""
    for node in composites(scene):
        node.SetForegroundOpacity(min(max(float(opacity), 0.0), 1.0))


def flicker(scene: Any) -> float:
    """Change between only fixed and only moving; a timer of the widget calls this.

    Returns:
        The new opacity of the moving scan, 0 or 1.
    """
    nodes = composites(scene)
    opacity = 0.0 if nodes and nodes[0].GetForegroundOpacity() > 0.5 else 1.0
    blend(scene, opacity)
    return opacity


def link(scene: Any, linked: bool) -> None:
    """Let all slice views move together, at once, or each on its own."""
    for node in composites(scene):
        node.SetLinkedControl(linked)
        node.SetHotLinkedControl(linked)


def checkerboard(scene: Any, fixed: Any, resampled: Any, tile_mm: float = TILE_MM) -> Any:
    """A volume with fields of both scans in turn, in the grey levels in which each is shown.

    Args:
        scene: vtkMRMLScene.
        fixed: volume node.
        resampled: the moving scan on the fixed grid.
        tile_mm: side of a field.

    Returns:
        New volume node, 0 to 255.

    Raises:
        UnsuitableNodeError: the two do not lie on one grid.
    """
    import SimpleITK as sitk

    first, second = array_of(fixed), array_of(resampled)
    place = ijk_to_world_lps(fixed)
    if first.shape != second.shape or np.abs(place - ijk_to_world_lps(resampled)).max() > SAME_GRID_MM:
        raise UnsuitableNodeError(
            f"{resampled.GetName()} does not lie on the grid of {fixed.GetName()}; align again with a resampled volume"
        )
    spacing = np.linalg.norm(place[:3, :3], axis=0)[::-1]
    steps = [np.arange(n) * s // tile_mm for n, s in zip(first.shape, spacing)]
    odd = (steps[0][:, None, None] + steps[1][None, :, None] + steps[2][None, None, :]) % 2 == 1
    board = np.where(odd, _grey(resampled, second), _grey(fixed, first))
    image = sitk.GetImageFromArray(board)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetDirection((place[:3, :3] / spacing[::-1]).ravel().tolist())
    image.SetOrigin(place[:3, 3].tolist())
    return add_volume(scene, image, f"Checkerboard of {fixed.GetName()} and {resampled.GetName()}")


def _grey(volume: Any, voxels: np.ndarray) -> np.ndarray:
    """Voxels (z, y, x) through the node's window and level, uint8."""
    display = volume.GetDisplayNode()
    if display is not None and display.IsA("vtkMRMLScalarVolumeDisplayNode") and display.GetWindow() > 0:
        low, width = display.GetLevel() - display.GetWindow() / 2, display.GetWindow()
    else:
        low, high = np.percentile(voxels[::4, ::4, ::4], (1, 99))
        width = max(float(high - low), 1e-6)
    grey = (voxels.astype(np.float32) - low) * (GREY_LEVELS / width)
    return np.clip(grey, 0, GREY_LEVELS).astype(np.uint8)
