"""CT or MR: what the registration would decide, without reading more than a sample of the voxels."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

from uae.errors import InputError, ModalityError
from UAECommonLib.i18n import _
from UAECommonLib.mrml import array_of

__all__ = ["Modality", "dicom_modality", "guess_modality", "settle_modality"]

VOXELS_LOOKED_AT = 500_000
"""Enough for the shares of air and water that the decision asks for; some ten milliseconds."""


class Modality(enum.Enum):
    """What a scan is, as it is chosen in both panels."""

    AUTO = "auto"
    CT = "ct"
    MR = "mr"

    def label(self) -> str:
        """Text of the selector."""
        return {Modality.AUTO: _("Automatic"), Modality.CT: _("CT"), Modality.MR: _("MR")}[self]


def dicom_modality(volume: Any) -> str:
    """The modality (ct, mr) by the DICOM tag of a volume node from the application's database; empty elsewhere."""
    import slicer

    database = getattr(slicer, "dicomDatabase", None)
    uids = (volume.GetAttribute("DICOM.instanceUIDs") or "").split()
    tag = str(database.instanceValue(uids[0], "0008,0060")) if database is not None and uids else ""
    return tag.lower() if tag in ("CT", "MR") else ""


def guess_modality(volume: Any) -> tuple[str, str]:
    """CT or MR as the core decides it from a file, and why.

    Args:
        volume: volume node.

    Returns:
        ("ct", "mr" or "" where it is doubtful, reason).

    Raises:
        UnsuitableNodeError: the node holds no grey image.
    """
    from uae.geometry import Geometry
    from uae.preprocess import decide_modality
    from uae.volume import Volume

    tag = dicom_modality(volume)
    if tag:
        return tag, _("DICOM tag Modality is {tag}").format(tag=tag.upper())
    values = array_of(volume).reshape(-1)
    values = values[:: max(1, values.size // VOXELS_LOOKED_AT)].reshape(-1, 1, 1)
    line = Geometry(values.shape, np.ones(3), np.zeros(3), np.eye(3))
    try:
        return decide_modality(Volume(values, line))
    except ModalityError:
        return "", _("CT or MR is doubtful; choose it")


def settle_modality(volume: Any, chosen: str) -> str:
    """What to tell a child process about a scan: the choice, else the DICOM tag, else "auto" where that is no doubt.

    Args:
        volume: volume node.
        chosen: auto, ct or mr.

    Returns:
        auto, ct or mr.

    Raises:
        InputError: the choice is automatic, and the voxels leave a doubt.
        UnsuitableNodeError: the node holds no grey image.
    """
    if chosen != Modality.AUTO.value:
        return chosen
    if not guess_modality(volume)[0]:
        text = _("whether {name} is CT or MR is doubtful; choose its modality")
        raise InputError(text.format(name=volume.GetName()))
    return dicom_modality(volume) or chosen
