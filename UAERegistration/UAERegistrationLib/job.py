"""One registration: what was chosen, its files for the child process, and how it ended."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uae.errors import UAEError
from UAECommonLib import result_nodes
from UAECommonLib.modality import Modality, settle_modality
from UAECommonLib.mrml import fingerprint, roi_fingerprint, write_roi_mask, write_volume
from UAECommonLib.temporary import temporary_directory

__all__ = ["FOLDER_PREFIX", "MODALITIES", "PRESETS", "Job", "Outcome", "RegistrationOptions", "write_job"]

PRESETS: dict[str, tuple[str, ...]] = {"rigid": (), "affine": ("--affine",), "deformable": ("--deformable",)}
"""Options of `uae register` by preset. rigid: planning, the default; deformable: contour support, not dose."""
MODALITIES = tuple(modality.value for modality in Modality)
FOLDER_PREFIX = "uae-register-"


@dataclass(frozen=True)
class RegistrationOptions:
    """Choices of one registration.

    Attributes:
        preset: a key of PRESETS.
        fixedModality: auto, ct or mr.
        movingModality: auto, ct or mr.
        roi: vtkMRMLMarkupsROINode, only matches of the fixed scan inside it count; None for the whole scan.
        device: auto, cpu or cuda:N.
        resample: also add the moving scan resampled to the fixed grid.
        model: name of the registry or file; by modality where None.
        extra: further options of `uae register`.
    """

    preset: str = "rigid"
    fixedModality: str = "auto"
    movingModality: str = "auto"
    roi: Any = None
    device: str = "auto"
    resample: bool = False
    model: str | None = None
    extra: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How a registration ended.

    Attributes:
        status: accepted, review, refused, cancelled or failed.
        reason: one line for the user.
        report: report.json; empty where there is none.
        nodes: the new nodes; None unless accepted or for review.
        error: what went wrong; None unless cancelled or failed.
        scans: fixed and moving volume node.
    """

    status: str
    reason: str
    report: dict[str, Any] = field(default_factory=dict)
    nodes: result_nodes.ResultNodes | None = None
    error: UAEError | None = None
    scans: tuple[Any, Any] = (None, None)


@dataclass
class Job:
    """A running registration.

    Attributes:
        fixed, moving: volume nodes.
        prints: fingerprints of both when it began.
        roiPrint: of the region; empty where there is none.
        arguments: of the child, without the device.
        options: as chosen.
        folder: its temporary files.
        onProgress, onFinished, onLog: listeners, see `UAERegistrationLogic.start`.
        message: the child's last word.
        device: on which it runs.
    """

    fixed: Any
    moving: Any
    prints: tuple[str, str]
    roiPrint: str
    arguments: list[str]
    options: RegistrationOptions
    folder: tempfile.TemporaryDirectory
    onProgress: Callable[[str, float, float | None], None] | None = None
    onFinished: Callable[[Outcome], None] | None = None
    onLog: Callable[[str], None] | None = None
    message: str = ""
    device: str = "auto"


def write_job(fixed: Any, moving: Any, options: RegistrationOptions) -> Job:
    """Write both scans (and the region) in the world frame to a temporary folder.

    Raises:
        InputError: a modality is left to be decided, and is doubtful.
        UnsuitableNodeError: a scan or the region cannot be written.
        ResourceError: the disk is full, or there is no temporary folder.
    """
    modalities = (settle_modality(fixed, options.fixedModality), settle_modality(moving, options.movingModality))
    top = result_nodes.top_of(moving)
    folder = temporary_directory(FOLDER_PREFIX)
    try:
        place = Path(folder.name)
        write_volume(fixed, place / "fixed.nrrd")
        write_volume(moving, place / "moving.nrrd", top)
        arguments = ["register", str(place / "fixed.nrrd"), str(place / "moving.nrrd")]
        arguments += ["--output", str(place / "result"), "--progress", "json", *PRESETS[options.preset]]
        arguments += ["--fixed-modality", modalities[0], "--moving-modality", modalities[1]]
        roi_print = ""
        if options.roi is not None:
            write_roi_mask(options.roi, place / "roi.nrrd")
            arguments += ["--fixed-mask", str(place / "roi.nrrd")]
            roi_print = roi_fingerprint(options.roi)
        if options.model:
            arguments += ["--model", options.model]
        prints = (fingerprint(fixed), fingerprint(moving, top))
    except BaseException:
        folder.cleanup()
        raise
    return Job(fixed, moving, prints, roi_print, [*arguments, *options.extra], options, folder, device=options.device)
