"""Everything chosen in the module, saved in the scene. Only the application has the wrapper: the logic needs none."""

from __future__ import annotations

from typing import Optional

from slicer import (
    vtkMRMLLinearTransformNode,
    vtkMRMLMarkupsROINode,
    vtkMRMLScalarVolumeNode,
)
from slicer.parameterNodeWrapper import parameterNodeWrapper


@parameterNodeWrapper
class UAERegistrationParameterNode:
    """Choices of one registration.

    Attributes:
        fixedVolume: the scan that stays (planning CT).
        movingVolume: the scan that is brought to it.
        roi: region of the fixed scan that counts, or None.
        preset: a key of logic.PRESETS.
        fixedModality: auto, ct or mr.
        movingModality: auto, ct or mr.
        device: auto, cpu or cuda:N.
        resample: also add the moving scan resampled to the fixed grid.
        result: linear transform node of the last accepted registration; it refers to the others.
    """

    fixedVolume: Optional[vtkMRMLScalarVolumeNode] = None  # noqa: UP045 - the wrapper of Slicer 5.10 knows Optional
    movingVolume: Optional[vtkMRMLScalarVolumeNode] = None  # noqa: UP045
    roi: Optional[vtkMRMLMarkupsROINode] = None  # noqa: UP045
    preset: str = "rigid"
    fixedModality: str = "auto"
    movingModality: str = "auto"
    device: str = "auto"
    resample: bool = False
    result: Optional[vtkMRMLLinearTransformNode] = None  # noqa: UP045
