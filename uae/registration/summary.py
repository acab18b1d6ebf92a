"""The figures of a registration as plain values: what `report.json` holds."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import uae
from uae.files import sha256
from uae.info import versions
from uae.json_values import plain
from uae.registration.refine import RefineResult
from uae.registration.rigid import arun
from uae.transform import Affine
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.models import Model
    from uae.registration.adareg import AdaRegResult

_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def linear_figures(linear: Affine, center: np.ndarray) -> dict[str, Any]:
    """Matrix, shift and rotation of a linear transform about a centre (3,) mm in fixed space.

    The shift is how far the centre of the overlap moves from fixed to moving, along left-right, anterior-posterior and
    cranio-caudal; positive towards left, posterior and cranial. It does not depend on where the scanners put their
    origin of rotation.
    """
    probes = center + 100.0 * np.vstack([np.zeros(3), np.eye(3), -np.eye(3)])
    rotation = arun(probes, linear.apply(probes))  # the rotation closest to an affine
    return {
        "fixed_to_moving": linear.matrix,
        "shift_mm": linear.apply(center[None])[0] - center,
        "rotation_deg": rotation.rotation_angle_deg(),
        "center_mm": center,
    }


def match_figures(result: AdaRegResult | None) -> dict[str, Any] | None:
    """Counts of AdaReg and its residuals on the matches that no fit has seen."""
    if result is None:
        return None
    return {
        "queried": result.queried,
        "mutual": result.mutual,
        "inliers": result.inliers,
        "heldout": result.heldout,
        "heldout_within_10mm": result.heldout_within_10mm,
        "heldout_chance": result.heldout_chance,
        "heldout_residual_median_mm": result.heldout_residual_median_mm,
        "heldout_inlier_median_mm": result.heldout_inlier_median_mm,
        "features": result.features,
    }


def refinement_figures(result: RefineResult | None) -> dict[str, Any]:
    """What the refinement did; `used` is False where it was not asked for."""
    if result is None:
        return {"moved_mm": 0.0, "moved_deg": 0.0, "used": False, "reason": "not done"}
    return {
        "moved_mm": result.moved_mm,
        "moved_deg": result.moved_deg,
        "used": result.used,
        "reason": result.reason,
        "mutual_information_before": result.metric_before,
        "mutual_information_after": result.metric_after,
    }


def input_figures(volume: Volume) -> dict[str, Any]:
    """File, hash, UIDs where known, modality and how it was decided.

    The hash is of the file's bytes; a DICOM folder or a volume made in memory has no single file, so there it is of the
    voxels.
    """
    path = Path(volume.path) if volume.path else None
    is_file = path is not None and path.is_file()
    return {
        "file": str(path) if path else None,
        "sha256": sha256(path) if is_file else hashlib.sha256(np.ascontiguousarray(volume.array)).hexdigest(),
        "sha256_of": "file" if is_file else "voxels",
        **{name: volume.meta[name] for name in _UIDS if volume.meta.get(name)},
        "modality": volume.modality,
        "modality_reason": volume.modality_reason,
        "size_xyz": volume.geometry.shape[::-1],
        "spacing_mm": volume.geometry.spacing,
    }


def build_report(
    status: str,
    reason: str,
    linear: Affine | None,
    center: np.ndarray | None,
    overlap_percent: float | None,
    matches: AdaRegResult | None,
    refinement: RefineResult | None,
    deformable: dict[str, Any] | None,
    model: Model | None,
    device: str,
    seconds: dict[str, float],
    fixed: Volume,
    moving: Volume,
) -> dict[str, Any]:
    """All keys of a registration's report, as values that JSON has; see the functions above for the parts."""
    empty = {"fixed_to_moving": None, "shift_mm": None, "rotation_deg": None, "center_mm": None}
    return plain(
        {
            "status": status,
            "reason": reason,
            **(empty if linear is None or center is None else linear_figures(linear, center)),
            "overlap_percent": overlap_percent,
            "matches": match_figures(matches),
            "refinement": refinement_figures(refinement),
            "deformable": deformable,
            "model": None if model is None else {"name": model.name, "version": model.version, "sha256": model.sha256},
            "device": device,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "inputs": {"fixed": input_figures(fixed), "moving": input_figures(moving)},
            "versions": {"uae": uae.__version__, "python": platform.python_version(), **versions()},
            "intended_use": "research; not a medical device"
            + ("; deformable part: contour support, not dose" if deformable else ""),
        }
    )
