"""Everything chosen in the module, saved in the scene. Only the application has the wrapper; the logic needs none."""

from __future__ import annotations

import enum

from slicer import vtkMRMLMarkupsFiducialNode, vtkMRMLScalarVolumeNode, vtkMRMLTableNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import parameterNodeWrapper
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleLogic

from UAECommonLib.modality import Modality

__all__ = ["Method", "Modality", "UAELandmarkParameterNode", "getParameterNode"]

MODULE = "UAELandmark"


class Method(enum.Enum):
    """How points are matched; the values are those of `uae match --method`."""

    AUTO = "auto"
    GUIDED = "guided"
    FIXED_POINT = "fixed-point"
    NEAREST = "nearest"

    def label(self) -> str:
        """Text of the selector."""
        return {
            Method.AUTO: _("Automatic"),
            Method.GUIDED: _("Guided by the pair's alignment"),
            Method.FIXED_POINT: _("Fixed points (free search)"),
            Method.NEAREST: _("Nearest neighbour (quickest)"),
        }[self]


@parameterNodeWrapper
class UAELandmarkParameterNode:
    """Choices of the module.

    Attributes:
        templateVolume: the scan in which points are placed.
        queryVolume: the scan in which they are found.
        templateModality: what the template is.
        queryModality: what the query is.
        model: registry name; empty takes the default for the modalities.
        device: auto, cpu or cuda:N.
        templatePoints: the points of the template.
        queryPoints: what was found; it refers to the other three.
        method: how points are matched.
        live: the query's points follow at once.
        jump: the query's slice views jump to the point that was found.
        batchVolumes: scans of the batch.
        table: the batch's last table.
    """

    templateVolume: vtkMRMLScalarVolumeNode
    queryVolume: vtkMRMLScalarVolumeNode
    templateModality: Modality = Modality.AUTO
    queryModality: Modality = Modality.AUTO
    model: str = ""
    device: str = "auto"
    templatePoints: vtkMRMLMarkupsFiducialNode
    queryPoints: vtkMRMLMarkupsFiducialNode
    method: Method = Method.AUTO
    live: bool = True
    jump: bool = True
    batchVolumes: list[vtkMRMLScalarVolumeNode]
    table: vtkMRMLTableNode


def getParameterNode() -> UAELandmarkParameterNode:
    """The module's parameter node of the application's scene, made if need be."""
    base = ScriptedLoadableModuleLogic()
    base.moduleName = MODULE
    return UAELandmarkParameterNode(base.getParameterNode())
