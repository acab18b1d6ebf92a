"""Reading images with every check a user deserves: each refusal names the cause and the next step."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from uae.dicom import is_dicom_file, read_dicom
from uae.errors import InputError, ResourceError
from uae.file_checks import check_file
from uae.geometry import Geometry
from uae.itk_files import quiet_itk
from uae.volume import Volume

logger = logging.getLogger(__name__)

MIN_SIZE = 4
"""Voxels an axis must have at least: thinner images carry no 3-D anatomy."""
SPACING_RANGE_MM = (1e-3, 100.0)
MAX_EXTENT_MM = 5000.0
"""Limits beyond which a header is in wrong units or damaged; no scanner goes that far."""
ORTHONORMAL_TOLERANCE = 1e-3
"""Largest deviation of D^T D from the identity: single-precision headers stay far below, a tilt of 0.06 degrees
exceeds it."""
MASK_HIGHEST = 20000
MASK_VALUES, LABEL_MAP_VALUES, LABEL_MAP_FLAT = 16, 256, 0.5
"""Whole numbers from 0 to 20000 (atlas codes reach 14175): at most 16 distinct ones are a mask; at most 256 with more
than half of the neighbours alike (the background left out) are a label map. Our measurement on 14 label maps and 12
MR scans: label maps 0.75-0.95 alike, scans at most 0.12."""

DICOM_MODALITY = {"CT": "ct", "MR": "mr"}


def read_checked(path: Path, series: str | None = None, label: bool = False) -> Volume:
    """Volume.read: see there.

    Raises:
        InputError: the file cannot be read or used.
        ResourceError: it does not fit into memory.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; check the path")
    try:
        with quiet_itk():
            image, meta = _read_image(path, series)
    except MemoryError as error:
        raise ResourceError(f"{path}: not enough memory to read it; close other programs or crop it") from error
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it; check the file's rights") from error
    except RuntimeError as error:
        raise _translated(path, error) from error
    image = _three_dimensional(path, image)
    geometry = Geometry.from_sitk(image)
    _check_geometry(path, geometry)
    array = sitk.GetArrayFromImage(image)
    _check_finite(path, array)
    array = _as_labels(path, array) if label else _as_image(path, array)
    tag = meta.get("Modality", "")
    modality = DICOM_MODALITY.get(tag)
    reason = f"DICOM tag Modality is {tag}" if modality else ""
    logger.debug("read %s: %s voxels (z, y, x), spacing %s mm", path, geometry.shape, geometry.spacing)
    return Volume(array, geometry, modality, reason, path, meta)


def _read_image(path: Path, series: str | None) -> tuple[sitk.Image, dict[str, str]]:
    if path.is_dir() or is_dicom_file(path):
        return read_dicom(path, series)
    check_file(path)
    return sitk.ReadImage(str(path)), {}


def _translated(path: Path, error: RuntimeError) -> InputError:
    """ITK's message in the words of a user."""
    text = str(error)
    lower = text.lower()
    if "orthonormal" in lower or "orthogonal" in lower:
        return InputError(
            f"{path}: the image axes are not perpendicular (sheared, as by gantry tilt); "
            "resample it to a regular grid first (3D Slicer: harden the acquisition transform)"
        )
    if "spacing" in lower and ("zero" in lower or "negative" in lower):
        return InputError(f"{path}: the spacing in the header is zero or negative; export the image again")
    if "unable to determine imageio" in lower or "could not create io object" in lower:
        return InputError(f"{path}: not an image format known here; use NIfTI, NRRD, MHA/MHD or a DICOM folder")
    # ITK's own last line helps nobody (after a short read of a .mha it says "No such file or directory").
    logger.debug("%s: %s", path, text)
    return InputError(f"{path}: damaged or truncated, its voxels cannot be read; copy or export it again")


def _three_dimensional(path: Path, image: sitk.Image) -> sitk.Image:
    """The image itself if it is 3-D and scalar; a single-volume series is unpacked.

    Raises:
        InputError: 2-D, a series, colour or vectors, complex numbers.
    """
    components = image.GetNumberOfComponentsPerPixel()
    if components > 1:
        what = "a displacement field or colour image" if components == 3 else "a vector or colour image"
        raise InputError(f"{path}: {components} values in each voxel ({what}); give a scalar (grey) CT or MR image")
    if "complex" in image.GetPixelIDTypeAsString().lower():
        raise InputError(f"{path}: complex voxels; export the magnitude image")
    if image.GetDimension() == 4:
        count = image.GetSize()[3]
        if count != 1:
            raise InputError(
                f"{path}: a 4-D series of {count} volumes; extract one of them to a file of its own "
                f"(for example volume 0 of 0-{count - 1}: SimpleITK image[:, :, :, 0]) and use that"
            )
        return image[:, :, :, 0]
    if image.GetDimension() != 3:
        raise InputError(f"{path}: a {image.GetDimension()}-D image; a 3-D CT or MR volume is needed")
    return image


def _check_geometry(path: Path, geometry: Geometry) -> None:
    size, spacing = geometry.shape[::-1], geometry.spacing
    if min(size) == 1:
        raise InputError(f"{path}: only one slice ({size[0]} x {size[1]} x {size[2]} voxels); give a 3-D volume")
    if min(size) < MIN_SIZE:
        raise InputError(
            f"{path}: too small ({size[0]} x {size[1]} x {size[2]} voxels); "
            f"at least {MIN_SIZE} x {MIN_SIZE} x {MIN_SIZE} are needed"
        )
    text = " x ".join(f"{s:g}" for s in spacing)
    low, high = SPACING_RANGE_MM
    if not np.all(np.isfinite(spacing)) or not np.all(np.isfinite(geometry.origin)):
        raise InputError(f"{path}: spacing or origin in the header is not a number; export the image again")
    if spacing.min() < low or spacing.max() > high or geometry.extent_mm.max() > MAX_EXTENT_MM:
        raise InputError(
            f"{path}: spacing {text} mm (zero, negative or absurd; allowed are {low:g} to {high:g} mm and "
            f"{MAX_EXTENT_MM / 1000:g} m in all); correct the header, its unit must be the millimetre"
        )
    direction = geometry.direction
    if not np.abs(direction.T @ direction - np.eye(3)).max() <= ORTHONORMAL_TOLERANCE:
        raise InputError(
            f"{path}: the image axes are not perpendicular (sheared, as by gantry tilt); "
            "resample it to a regular grid first (3D Slicer: harden the acquisition transform)"
        )


def _check_finite(path: Path, array: np.ndarray) -> None:
    # The extremes are NaN or infinite exactly where a voxel is; counting is only for the message.
    if not np.isfinite([array.min(), array.max()]).all():
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        raise InputError(f"{path}: {bad} voxels are NaN or infinite; replace them (for CT by -1024) first")


def _as_image(path: Path, array: np.ndarray) -> np.ndarray:
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise InputError(f"{path}: all voxels have the value {low:g}; the image is empty, export it again")
    if low >= 0 and high <= MASK_HIGHEST and _looks_like_labels(array):
        raise InputError(
            f"{path}: few whole numbers from {low:g} to {high:g} in flat regions: a mask or label map, not an image; "
            "give the CT or MR scan itself"
        )
    return array.astype(np.float32)


def _looks_like_labels(array: np.ndarray) -> bool:
    """Whether the voxels are few whole numbers in flat regions: see LABEL_MAP_VALUES."""
    # A thinned sample decides nearly always; the whole array is only asked where the sample looks like a label map.
    for part in (array[::3, ::3, ::3], array):
        values = np.unique(part)
        if len(values) > LABEL_MAP_VALUES or np.any(values != np.round(values)):
            return False
    if len(values) <= MASK_VALUES:
        return True
    left, right = array[..., :-1], array[..., 1:]
    foreground = (left != values[0]) | (right != values[0])
    return bool((left == right)[foreground].mean() > LABEL_MAP_FLAT)


def _as_labels(path: Path, array: np.ndarray) -> np.ndarray:
    if np.issubdtype(array.dtype, np.integer):
        return array
    whole = np.round(array)
    if np.any(whole != array):
        raise InputError(f"{path}: fractional values in a label map or mask; give whole numbers (one per structure)")
    return whole.astype(np.int32)
