"""A registration's files as nodes: moving, under the linear, under the grid transform (contract, section 1, Scene).

Only the moving scan moves in the world: no matrix of an existing transform node changes, and a parent that other nodes
share stays where it is, while the moving scan alone goes under a linear copy of its chain.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import vtk

from UAECommonLib.errors import SceneChangedError, UnsuitableNodeError
from UAECommonLib.mrml import (
    add_volume,
    check_linear_parents,
    fingerprint,
    flip_matrix,
    grid_transform,
    matrix_of,
    parent_chain,
    roi_fingerprint,
    same_fingerprint,
    vtk_matrix,
    world_matrix,
)

if TYPE_CHECKING:
    import SimpleITK as sitk

__all__ = [
    "OUTDATED", "ResultFiles", "ResultNodes", "find_results", "mark_outdated", "nodes_of", "note_region",
    "outdated_reason", "place", "read_result", "remove", "show", "top_of", "undo", "use_linear_interpolation",
]  # fmt: skip

FIXED, MOVING = "spatialRegistrationFixed", "spatialRegistrationMoving"
"""Slicer's own roles of the two scans of a transform node."""
GRID, REPORT, IMAGE, CARRIER, MOVED, OLD_PARENT, ROI, BOARD = (
    "UAE.grid", "UAE.report", "UAE.image", "UAE.carrier", "UAE.moved", "UAE.oldParent", "UAE.region",
    "UAE.checkerboard",
)  # fmt: skip
LINEAR = "vtkMRMLLinearTransformNode"
KIND = "UAE.Registration"
"""Attribute of every node that a registration adds: linear, grid, copy, report or image."""
MATRIX = "UAE.Matrix"
"""Attribute of the linear node: its matrix as it was computed, so that an edit by hand shows."""
OUTDATED = "UAE.Outdated"
"""Attribute of the linear node of a result whose inputs changed: what changed."""
EDITED_MM = 1e-6
FIXED_PRINT, MOVING_PRINT, ROI_PRINT = "UAE.FixedFingerprint", "UAE.MovingFingerprint", "UAE.RegionFingerprint"


@dataclass
class ResultFiles:
    """A result folder in memory.

    Attributes:
        report: what report.json holds.
        linear: (4, 4) fixed to moving, LPS mm; None where refused.
        kind: "rigid" or "affine".
        field: residual displacement u (LPS mm) of x_moving = R(x + u(x)); None without a deformable part.
        image: the moving scan in fixed space, where it was asked for.
    """

    report: dict[str, Any]
    linear: np.ndarray | None = None
    kind: str = "rigid"
    field: sitk.Image | None = None
    image: sitk.Image | None = None


@dataclass
class ResultNodes:
    """The nodes of one registration; `linear` holds the references to all others.

    Attributes:
        linear: vtkMRMLLinearTransformNode.
        grid: vtkMRMLGridTransformNode, or None.
        image: the resampled scan, or None.
        report: vtkMRMLTextNode with report.json.
        copy: linear copy of a shared parent chain, or None.
    """

    linear: Any
    grid: Any = None
    image: Any = None
    report: Any = None
    copy: Any = None

    @property
    def figures(self) -> dict[str, Any]:
        """What report.json held."""
        return json.loads(self.report.GetText()) if self.report is not None else {}


def read_result(folder: str | Path, with_image: bool = False) -> ResultFiles:
    """Read what `uae register` wrote, without touching any scene.

    Args:
        folder: of `--output`.
        with_image: also the resampled moving scan.

    Returns:
        The whole result; a refused one holds only its report.

    Raises:
        InputError: a file is missing or damaged.
    """
    import SimpleITK as sitk

    from uae.errors import InputError
    from uae.transform_io import read_transform

    folder = Path(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no complete result ({error}); run the registration again") from error
    if report["status"] == "refused":
        return ResultFiles(report)
    kind = "affine" if (folder / "affine.tfm").is_file() else "rigid"
    result = ResultFiles(report, read_transform(folder / f"{kind}.tfm").as_linear().matrix, kind)
    if (folder / "displacement.nii.gz").is_file():
        result.field = read_transform(folder / "displacement.nii.gz").to_sitk_image()
    if with_image:
        result.image = sitk.ReadImage(str(folder / "moving_in_fixed.nii.gz"))
    return result


def top_of(moving: Any) -> Any:
    """The last parent of a moving scan that does not come from our own earlier result; None where all count.

    A scan is aligned afresh from where it stood before, so that results never pile up.
    """
    earlier = _result_above(moving)
    return None if earlier is None else earlier.GetNodeReference(CARRIER)


def place(scene: Any, files: ResultFiles, fixed: Any, moving: Any) -> ResultNodes:
    """Add a result's nodes and put the moving scan under them; all of it or nothing.

    An earlier result above the moving scan is switched off and stays in the scene, marked as replaced.

    Args:
        scene: vtkMRMLScene.
        files: an accepted result or one for review.
        fixed: volume node, stays untouched with all its parents.
        moving: volume node; goes under its own chain, the linear and the grid transform.

    Returns:
        The new nodes.

    Raises:
        UnsuitableNodeError: the result is a refusal, or the moving scan is under a foreign non-linear transform.
    """
    if files.linear is None:
        raise UnsuitableNodeError("a refused registration has no transform; the scene stays as it was")
    top = top_of(moving)
    check_linear_parents(moving, top)
    added: list[Any] = []
    try:
        result = _add_nodes(scene, files, fixed, moving, top, added)
        earlier = _result_above(moving)
        carrier, moved, old_parent = _seat(scene, moving, earlier)
        if carrier is None:
            carrier = result.copy = _add(scene, added, LINEAR, f"{moving.GetName()}, copy of its transforms", "copy")
            carrier.SetMatrixTransformToParent(vtk_matrix(world_matrix(moving, top)))
    except BaseException:
        for node in reversed(added):
            scene.RemoveNode(node)
        raise
    linear = result.linear
    for role, node in ((CARRIER, carrier), (MOVED, moved), (OLD_PARENT, old_parent)):
        linear.SetNodeReferenceID(role, node.GetID() if node is not None else None)
    show(linear)
    if result.copy is not None:
        moving.SetAndObserveTransformNodeID(result.copy.GetID())
    if earlier is not None:
        mark_outdated(earlier, f"replaced by {linear.GetName()}")
    return result


def _add(scene: Any, added: list[Any], class_name: str, name: str, kind: str) -> Any:
    node = scene.AddNewNodeByClass(class_name, scene.GenerateUniqueName(name))
    added.append(node)
    node.SetAttribute(KIND, kind)
    return node


def _add_nodes(scene: Any, files: ResultFiles, fixed: Any, moving: Any, top: Any, added: list[Any]) -> ResultNodes:
    """The nodes of a result with their references; nothing of the scene hangs below them yet."""
    pair = f"{moving.GetName()} to {fixed.GetName()}"
    result = ResultNodes(_add(scene, added, LINEAR, f"{pair}, {files.kind}", "linear"))
    linear = result.linear
    # The file runs fixed -> moving in LPS; "to parent" carries the moving scan to the fixed one in RAS.
    to_fixed = np.linalg.inv(flip_matrix(files.linear))
    linear.SetMatrixTransformToParent(vtk_matrix(to_fixed))
    linear.SetAttribute(MATRIX, json.dumps(to_fixed.tolist()))
    if files.field is not None:
        name = f"{pair}, deformable (contour support, not dose)"
        result.grid = _add(scene, added, "vtkMRMLGridTransformNode", name, "grid")
        result.grid.SetAndObserveTransformFromParent(grid_transform(files.field))
        linear.SetNodeReferenceID(GRID, result.grid.GetID())
    for node in filter(None, (linear, result.grid)):
        node.SetNodeReferenceID(FIXED, fixed.GetID())
        node.SetNodeReferenceID(MOVING, moving.GetID())
    result.report = _add(scene, added, "vtkMRMLTextNode", f"{pair}, report", "report")
    result.report.SetText(json.dumps(files.report))
    linear.SetNodeReferenceID(REPORT, result.report.GetID())
    if files.image is not None:
        result.image = add_volume(scene, files.image, f"{moving.GetName()} in {fixed.GetName()}")
        added.append(result.image)
        result.image.SetAttribute(KIND, "image")
        linear.SetNodeReferenceID(IMAGE, result.image.GetID())
    linear.SetAttribute(FIXED_PRINT, fingerprint(fixed))
    linear.SetAttribute(MOVING_PRINT, fingerprint(moving, top))
    return result


def _seat(scene: Any, moving: Any, earlier: Any) -> tuple[Any, Any, Any]:
    """Where a result goes: what it goes above, the node whose parent changes for it, and that node's old parent.

    The first is None where the topmost parent of the moving scan is shared, and a copy of the chain has to be made.
    """
    chain = parent_chain(moving)
    if earlier is not None:
        carrier, moved, old_parent = (earlier.GetNodeReference(role) for role in (CARRIER, MOVED, OLD_PARENT))
        shared = carrier is not moving and _is_shared(scene, carrier, moving)
        return (None, moving, chain[0]) if shared else (carrier, moved, old_parent)
    if not chain:
        return moving, moving, None
    if chain[-1].GetAttribute(KIND) == "copy":  # made for an earlier result that is switched off
        for linear in find_results(scene):
            if linear.GetNodeReference(CARRIER) is chain[-1]:
                return chain[-1], moving, linear.GetNodeReference(OLD_PARENT)
    return (None, moving, chain[0]) if _is_shared(scene, chain[-1], moving) else (chain[-1], chain[-1], None)


def _is_shared(scene: Any, transform: Any, moving: Any) -> bool:
    """Whether a transform moves others than one scan and its chain, or will when an earlier result is undone."""
    own = [*parent_chain(moving), moving]
    come_back = (
        linear.GetNodeReference(OLD_PARENT)
        for linear in find_results(scene)
        if linear.GetNodeReference(MOVED) not in own
    )
    return any(node not in own for node in _below(scene, transform)) or any(
        transform in (parent, *parent_chain(parent)) for parent in come_back if parent is not None
    )


def _below(scene: Any, transform: Any) -> list[Any]:
    """All nodes that a transform node moves."""
    count = scene.GetNumberOfNodesByClass("vtkMRMLTransformableNode")
    nodes = (scene.GetNthNodeByClass(index, "vtkMRMLTransformableNode") for index in range(count))
    return [node for node in nodes if transform in parent_chain(node)]


def nodes_of(linear: Any) -> ResultNodes:
    """The nodes of a result from its linear node, as after reading a saved scene."""
    carrier = linear.GetNodeReference(CARRIER)
    copy = carrier if carrier is not None and carrier.GetAttribute(KIND) == "copy" else None
    return ResultNodes(
        linear, linear.GetNodeReference(GRID), linear.GetNodeReference(IMAGE), linear.GetNodeReference(REPORT), copy
    )


def find_results(scene: Any) -> list[Any]:
    """The linear nodes of all results in a scene."""
    nodes = [scene.GetNthNodeByClass(index, LINEAR) for index in range(scene.GetNumberOfNodesByClass(LINEAR))]
    return [node for node in nodes if node.GetAttribute(KIND) == "linear"]


def _result_above(moving: Any) -> Any:
    """The linear node of our result on top of a node's chain, with nothing foreign above; None elsewhere."""
    chain = parent_chain(moving)
    for index, node in enumerate(chain):
        if node.GetAttribute(KIND) == "grid":  # the linear part is switched off
            for linear in find_results(moving.GetScene()):
                if linear.GetNodeReference(GRID) is node and linear.GetNodeReference(CARRIER) in (
                    moving,
                    *chain[:index],
                ):
                    return linear if index == len(chain) - 1 else None
        if node.GetAttribute(KIND) == "linear" and node.GetNodeReference(CARRIER) is not None:
            grid = node.GetNodeReference(GRID)
            return node if all(above is grid for above in chain[index + 1 :]) else None
    return None


def show(linear: Any, with_linear: bool = True, with_grid: bool = True) -> None:
    """Switch the parts of a result on and off by the parents of its nodes; no matrix is changed.

    Args:
        linear: the result's linear node.
        with_linear: apply the linear part.
        with_grid: apply the deformable part, where there is one.

    Raises:
        SceneChangedError: the node that the result carries was deleted.
    """
    carrier, grid = linear.GetNodeReference(CARRIER), linear.GetNodeReference(GRID)
    if carrier is None:
        raise SceneChangedError("the scan of this registration is no longer in the scene; align again")
    top = grid.GetID() if grid is not None and with_grid else None
    linear.SetAndObserveTransformNodeID(top)
    carrier.SetAndObserveTransformNodeID(linear.GetID() if with_linear else top)


def undo(scene: Any, linear: Any) -> None:
    """Give the moving scan its old parent back and remove what the registration added.

    A transform under which the user has put other nodes stays in the scene, so that these do not move.

    Args:
        scene: vtkMRMLScene.
        linear: the result's linear node.
    """
    result = nodes_of(linear)
    moved, old_parent, carrier = (linear.GetNodeReference(role) for role in (MOVED, OLD_PARENT, CARRIER))
    others = [one for one in find_results(scene) if one is not linear and one.GetNodeReference(CARRIER) is carrier]
    if moved is not None and (not others or linear in parent_chain(moved)):
        moved.SetAndObserveTransformNodeID(old_parent.GetID() if old_parent is not None else None)
        if result.copy is not None and not _below(scene, result.copy):
            result.copy.SetAndObserveTransformNodeID(None)
    for node in filter(None, (result.image, result.report, linear.GetNodeReference(BOARD))):
        remove(scene, node)
    for node in filter(None, (None if others else result.copy, linear, result.grid)):
        if _below(scene, node):
            node.RemoveAttribute(KIND)
        else:
            remove(scene, node)


def remove(scene: Any, node: Any) -> None:
    """Remove a node with what shows and stores it."""
    parts = []
    if node.IsA("vtkMRMLDisplayableNode"):
        parts += [node.GetNthDisplayNode(index) for index in range(node.GetNumberOfDisplayNodes())]
    if node.IsA("vtkMRMLStorableNode"):
        parts += [node.GetNthStorageNode(index) for index in range(node.GetNumberOfStorageNodes())]
    for part in filter(None, (*parts, node)):
        scene.RemoveNode(part)


def note_region(linear: Any, roi: Any, state: str) -> None:
    """Note on a result which region it was limited to, and where that was (`roi_fingerprint`) when it began."""
    linear.SetNodeReferenceID(ROI, roi.GetID())
    linear.SetAttribute(ROI_PRINT, state)


def outdated_reason(linear: Any) -> str:
    """What changed in the inputs of a result since it was made, in a few words; empty where nothing did."""
    marked = linear.GetAttribute(OUTDATED)
    if marked:
        return marked
    for role, name, stored in ((FIXED, "fixed", FIXED_PRINT), (MOVING, "moving", MOVING_PRINT)):
        node = linear.GetNodeReference(role)
        if node is None:
            return f"the {name} scan was removed"
        top = linear.GetNodeReference(CARRIER) if role == MOVING else None
        try:
            same = same_fingerprint(fingerprint(node, top), linear.GetAttribute(stored))
        except UnsuitableNodeError:
            same = False
        if not same:
            return f"the {name} scan {node.GetName()} was changed or moved"
    return _placement_change(linear) or _region_change(linear)


def _placement_change(linear: Any) -> str:
    """Whether the result itself was edited, or is carried further by a transform that is not ours."""
    matrix = vtk.vtkMatrix4x4()
    linear.GetMatrixTransformToParent(matrix)
    stored = linear.GetAttribute(MATRIX)
    if stored and not np.allclose(matrix_of(matrix), json.loads(stored), rtol=0, atol=EDITED_MM):
        return f"the transform {linear.GetName()} was edited"
    carrier, grid = linear.GetNodeReference(CARRIER), linear.GetNodeReference(GRID)
    if carrier is not None and any(node is not linear and node is not grid for node in parent_chain(carrier)):
        return "the moving scan was put under another transform"
    return ""


def _region_change(linear: Any) -> str:
    stored, roi = linear.GetAttribute(ROI_PRINT), linear.GetNodeReference(ROI)
    if not stored:
        return ""
    if roi is None:
        return "the region was removed"
    try:
        same = same_fingerprint(roi_fingerprint(roi), stored)
    except UnsuitableNodeError:
        same = False
    return "" if same else f"the region {roi.GetName()} was changed or moved"


def mark_outdated(linear: Any, reason: str) -> None:
    """Note on a result that its inputs changed; it stays noted in a saved scene."""
    if not linear.GetAttribute(OUTDATED):
        linear.SetAttribute(OUTDATED, reason)


def use_linear_interpolation(scene: Any) -> None:
    """Set our grid transforms to linear interpolation: a grid read from a file interpolates cubically."""
    for linear in find_results(scene):
        grid = linear.GetNodeReference(GRID)
        transform = grid.GetTransformFromParent() if grid is not None else None
        if transform is not None and hasattr(transform, "SetInterpolationModeToLinear"):
            transform.SetInterpolationModeToLinear()
