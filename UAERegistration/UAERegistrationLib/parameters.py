"""Everything chosen in the module, saved in the scene. Only the application has the wrapper; the logic needs none."""

from __future__ import annotations

import enum

from slicer import vtkMRMLLinearTransformNode, vtkMRMLMarkupsROINode, vtkMRMLScalarVolumeNode
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import parameterNodeWrapper
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleLogic

from UAECommonLib.modality import Modality

__all__ = ["Modality", "Preset", "UAERegistrationParameterNode", "getParameterNode"]

MODULE = "UAERegistration"


class Preset(enum.Enum):
    """What is computed; the values are the keys of logic.PRESETS."""

    RIGID = "rigid"
    AFFINE = "affine"
    DEFORMABLE = "deformable"

    def label(self) -> str:
        """Text of the selector."""
        return {
            Preset.RIGID: _("Rigid (planning)"),
            Preset.AFFINE: _("Affine"),
            Preset.DEFORMABLE: _("Rigid + deformable (contour support, not dose)"),
        }[self]


@parameterNodeWrapper
class UAERegistrationParameterNode:
    """Choices of one registration.

    Attributes:
        fixedVolume: the scan that stays (planning CT).
        movingVolume: the scan that is brought to it.
        roi: region of the fixed scan that counts, or None.
        preset: what is computed.
        fixedModality: what the fixed scan is.
        movingModality: what the moving scan is.
        device: auto, cpu or cuda:N.
        resample: also add the moving scan resampled to the fixed grid.
        result: linear transform node of the last accepted registration; it refers to the others.
    """

    fixedVolume: vtkMRMLScalarVolumeNode
    movingVolume: vtkMRMLScalarVolumeNode
    roi: vtkMRMLMarkupsROINode
    preset: Preset = Preset.RIGID
    fixedModality: Modality = Modality.AUTO
    movingModality: Modality = Modality.AUTO
    device: str = "auto"
    resample: bool = False
    result: vtkMRMLLinearTransformNode


def getParameterNode() -> UAERegistrationParameterNode:
    """The module's parameter node of the application's scene, made if need be."""
    base = ScriptedLoadableModuleLogic()
    base.moduleName = MODULE
    return UAERegistrationParameterNode(base.getParameterNode())
