"""Point lists and similarity maps between files and nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uae.errors import InputError
from UAECommonLib.i18n import _
from UAECommonLib.mrml import add_volume, flip_points
from UAELandmarkLib.link import MAP, QUERY, Link

__all__ = ["load_points", "save_points", "show_map"]

MAP_COLORS, PLAIN_MAP_COLORS = "vtkMRMLColorTableNodeFileColdToHotRainbow.txt", "vtkMRMLColorTableNodeReverseRainbow"


def save_points(scene: Any, markups: Any, path: str | Path) -> None:
    """Write a point list node as .mrk.json.

    Raises:
        InputError: another ending, or it cannot be written there.
    """
    storage = scene.AddNewNodeByClass("vtkMRMLMarkupsJsonStorageNode")
    try:
        storage.SetFileName(str(path))
        if not str(path).lower().endswith(".mrk.json") or not storage.WriteData(markups):
            raise InputError(_("{path}: cannot be written; choose a .mrk.json file").format(path=path))
    finally:
        scene.RemoveNode(storage)


def load_points(scene: Any, path: str | Path) -> Any:
    """Read .mrk.json (with its descriptions), .fcsv or .csv (columns as `uae match` writes them) into a new node.

    Raises:
        InputError: it cannot be read.
    """
    name = Path(path).name.split(".")[0] or "Points"
    markups = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", scene.GenerateUniqueName(name))
    markups.SetUndoEnabled(True)
    try:
        if str(path).lower().endswith((".csv", ".fcsv")):
            _read_table(markups, path)
        else:
            _read_markups(scene, markups, path)
    except InputError:
        # The markups logic gives every new list a display node at once.
        shown = [markups.GetNthDisplayNode(index) for index in range(markups.GetNumberOfDisplayNodes())]
        for node in (*shown, markups):
            scene.RemoveNode(node)
        raise
    markups.CreateDefaultDisplayNodes()
    return markups


def _read_table(markups: Any, path: str | Path) -> None:
    from uae.points import read_points

    found = read_points(path)
    for label, place in zip(found.labels, flip_points(found.points), strict=True):
        markups.AddControlPointWorld(place.tolist(), label)


def _read_markups(scene: Any, markups: Any, path: str | Path) -> None:
    storage = scene.AddNewNodeByClass("vtkMRMLMarkupsJsonStorageNode")
    storage.SetFileName(str(path))
    read = Path(path).is_file() and storage.ReadData(markups)
    scene.RemoveNode(storage)
    if not read:
        raise InputError(_("{path}: no point list; choose a .mrk.json, .fcsv or .csv file").format(path=path))


def show_map(link: Link, file: Path, label: str) -> Any:
    """Take a similarity map from its file into the scene, over the link's query; it replaces the earlier one.

    Args:
        link: complete.
        file: image in the query's own frame; it is removed.
        label: of the template point.

    Returns:
        The volume node.
    """
    import SimpleITK as sitk

    image = sitk.ReadImage(str(file))
    file.unlink(missing_ok=True)
    query, earlier = link.reference(QUERY), link.reference(MAP)
    if earlier is not None:
        link.scene.RemoveNode(earlier)
    name = _("Similarity of {label} in {query}").format(label=label, query=query.GetName())
    node = add_volume(link.scene, image, name)
    node.SetUndoEnabled(True)
    node.SetAndObserveTransformNodeID(query.GetTransformNodeID())
    link.node.SetNodeReferenceID(MAP, node.GetID())
    display = node.GetDisplayNode()
    if display is not None:
        known = link.scene.GetNodeByID(MAP_COLORS) is not None
        display.SetAndObserveColorNodeID(MAP_COLORS if known else PLAIN_MAP_COLORS)
        display.AutoWindowLevelOff()
        display.SetWindowLevelMinMax(0.0, 1.0)
        display.SetThreshold(0.0, 1.0)
        display.ApplyThresholdOn()
    return node
