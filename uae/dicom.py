"""DICOM series to one regular volume, with the checks of the contract: one series, constant steps, no gantry tilt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from uae.errors import InputError

STEP_TOLERANCE = 0.01
"""Slice steps may differ from their median by this share (contract, section 1)."""
TILT_TOLERANCE = 1e-3
"""Millimetres of in-plane drift per millimetre of slice step (0.06 degrees): more is a tilted gantry, less is the
rounding of positions in the header."""

TAGS = {
    "Modality": "0008|0060",
    "SeriesDescription": "0008|103e",
    "StudyInstanceUID": "0020|000d",
    "SeriesInstanceUID": "0020|000e",
    "FrameOfReferenceUID": "0020|0052",
    "PatientPosition": "0018|5100",
    "GantryDetectorTilt": "0018|1120",
}
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"


def _header(path: str | Path) -> sitk.ImageFileReader:
    """The tags of one file."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _tag(reader: sitk.ImageFileReader, key: str) -> str:
    return reader.GetMetaData(key).strip("\x00 ") if reader.HasMetaDataKey(key) else ""


def _numbers(reader: sitk.ImageFileReader, key: str, count: int, path: str) -> np.ndarray:
    """The `count` numbers of a tag.

    Raises:
        InputError: the tag is absent or malformed.
    """
    try:
        values = np.array([float(v) for v in _tag(reader, key).split("\\")], dtype=np.float64)
    except ValueError:
        values = np.empty(0)
    if len(values) != count or not np.all(np.isfinite(values)):
        raise InputError(
            f"{path}: DICOM tag ({key.replace('|', ',')}) with the slice's place is missing; "
            "export the series again with its geometry, or convert it to NIfTI in your scanner's viewer"
        )
    return values


def is_dicom_file(path: Path) -> bool:
    """Whether the file carries the DICOM magic word behind its 128-byte preamble."""
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _describe(folder: Path, uid: str) -> str:
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)
    reader = _header(names[0])
    text = _tag(reader, TAGS["SeriesDescription"]) or "no description"
    return f"{uid} ({_tag(reader, TAGS['Modality']) or '?'}, {text}, {len(names)} files)"


def read_dicom(path: Path, series: str | None) -> tuple[sitk.Image, dict[str, str]]:
    """Read one series.

    Args:
        path: a folder, or one file of the series (its folder is read), or one multi-frame file.
        series: SeriesInstanceUID to choose where the folder holds several.

    Returns:
        The image with its geometry taken from the slices' positions (float64), and the tags of TAGS.

    Raises:
        InputError: no series, several series, missing slices, uneven steps, gantry tilt, or damaged files.
    """
    if path.is_file():
        reader = _header(path)
        if reader.GetDimension() == 3 and reader.GetSize()[2] > 1:
            return reader.Execute(), {name: _tag(reader, key) for name, key in TAGS.items() if _tag(reader, key)}
        path, series = path.parent, series or _tag(reader, TAGS["SeriesInstanceUID"])
    # GDCM appends details to the identifier where a folder mixes several; the plain UID is what users know.
    found = sorted(set(sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))))
    if not found:
        raise InputError(f"{path}: no DICOM series in this folder; name the folder that holds the slice files itself")
    if series is None and len(found) > 1:
        listing = "; ".join(_describe(path, uid) for uid in found)
        raise InputError(f"{path}: {len(found)} DICOM series; choose one with --series UID: {listing}")
    if series is not None and series not in found:
        listing = "; ".join(_describe(path, uid) for uid in found)
        raise InputError(f"{path}: no series {series}; choose one with --series UID: {listing}")
    uid = series or found[0]
    return _read_slices(list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), uid)), f"{path}: series {uid}")


def _read_slices(names: list[str], what: str) -> tuple[sitk.Image, dict[str, str]]:
    """The slice files of one series as an image with checked geometry; `what` begins every message."""
    headers = [_header(name) for name in names]
    meta = {name: _tag(headers[0], key) for name, key in TAGS.items() if _tag(headers[0], key)}
    if len(names) == 1:
        if headers[0].GetDimension() == 3 and headers[0].GetSize()[2] > 1:
            return headers[0].Execute(), meta
        raise InputError(f"{what} has only one slice; a 3-D series with at least 4 slices is needed")
    positions = np.array([_numbers(h, POSITION, 3, n) for h, n in zip(headers, names, strict=True)])
    orientations = np.array([_numbers(h, ORIENTATION, 6, n) for h, n in zip(headers, names, strict=True)])
    spacings = np.array([_numbers(h, PIXEL_SPACING, 2, n) for h, n in zip(headers, names, strict=True)])
    if np.abs(orientations - orientations[0]).max() > 1e-3 or np.abs(spacings - spacings[0]).max() > 1e-3:
        raise InputError(
            f"{what} mixes slices of different orientation or pixel size (a localizer?); "
            "export one plane orientation as a series of its own"
        )
    row, column = orientations[0, :3], orientations[0, 3:]
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable")
    step = _checked_step(positions[order], normal, what)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([names[i] for i in order])
    image = reader.Execute()
    # DICOM's pixel spacing is (between rows, between columns): y first, then x.
    image.SetSpacing([float(spacings[0, 1]), float(spacings[0, 0]), step])
    image.SetOrigin(positions[order[0]].tolist())
    image.SetDirection(np.stack([row, column, normal], axis=1).ravel().tolist())
    return image, meta


def _checked_step(positions: np.ndarray, normal: np.ndarray, what: str) -> float:
    """The constant step in mm of slices sorted along `normal`, positions (N, 3) LPS mm.

    Raises:
        InputError: repeated positions, missing slices, uneven steps or gantry tilt.
    """
    steps = np.diff(positions @ normal)
    typical = float(np.median(steps))
    if steps.min() < 1e-3:
        raise InputError(
            f"{what} has several slices at one position (time points, phases or echoes); "
            "export the wanted phase as a series of its own"
        )
    worst = int(np.argmax(np.abs(steps - typical)))
    if abs(steps[worst] - typical) > STEP_TOLERANCE * typical:
        kind = "a slice is missing" if steps[worst] > 1.5 * typical else "the slice steps are not constant"
        raise InputError(
            f"{what}: {kind} after slice {worst + 1} of {len(positions)} (step {steps[worst]:.3f} mm, else "
            f"{typical:.3f} mm); export the complete series, or resample it to constant steps first"
        )
    span = positions[-1] - positions[0]
    along = float(span @ normal)
    drift = float(np.linalg.norm(span - along * normal)) / along
    if drift > TILT_TOLERANCE:
        raise InputError(
            f"{what} was taken with gantry tilt ({np.degrees(np.arctan(drift)):.1f} degrees); "
            "correct the gantry tilt first (3D Slicer's DICOM import does it), then use the corrected volume"
        )
    return along / (len(positions) - 1)
