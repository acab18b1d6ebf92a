"""What every adapter gives: pairs of files with corresponding points, and labels where the data have them."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from uae.errors import InputError
from uae.geometry import Geometry
from uae.itk_files import quiet_itk
from uae.volume import Volume

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


@dataclass
class PointPair:
    """Points of one scan and their places in another.

    Attributes:
        name: unique within the data set.
        template: file whose points are given; query: file in which they are searched.
        labels: N names; template_points, query_points: (N, 3) LPS mm.
        group: row of the table this pair counts in ("CE-NC", "test", ...).
        modalities: of template and query, "ct", "mr" or "auto".
        figures: further numbers of each point by name, (N,) or (N, 2, 3); see the adapter.
    """

    name: str
    template: Path
    query: Path
    labels: list[str]
    template_points: np.ndarray
    query_points: np.ndarray
    group: str = "all"
    modalities: tuple[str, str] = ("auto", "auto")
    figures: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class ImagePair:
    """Two images to register, with what judges the result.

    Attributes:
        name: unique within the data set.
        fixed, moving: image files; fixed_labels, moving_labels: label maps or None.
        labels: N names; fixed_points, moving_points: (N, 3) LPS mm, or None where the data have none.
        modalities: of fixed and moving, "ct", "mr" or "auto".
    """

    name: str
    fixed: Path
    moving: Path
    labels: list[str] = field(default_factory=list)
    fixed_points: np.ndarray | None = None
    moving_points: np.ndarray | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    modalities: tuple[str, str] = ("auto", "auto")


def existing_folder(folder: str | Path, what: str) -> Path:
    """The folder of a data set.

    Raises:
        InputError: there is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the folder of {what}")
    return path


def existing_file(path: Path, what: str) -> Path:
    """A file of a data set, by its name or with another image ending.

    Raises:
        InputError: it is not there; the message says what it would hold.
    """
    if path.is_file():
        return path
    for ending in IMAGE_ENDINGS:
        if path.name.endswith(ending):
            stem = path.name[: -len(ending)]
            other = next((path.with_name(stem + e) for e in IMAGE_ENDINGS if path.with_name(stem + e).is_file()), None)
            if other is not None:
                return other
    raise InputError(f"{path} is missing ({what}); check that the data set is complete")


def grid_of(path: Path) -> Geometry:
    """The grid of an image file from its header alone.

    Raises:
        InputError: not a 3-D image.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with quiet_itk():
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be read as an image; check the file") from error
    if reader.GetDimension() != 3:
        raise InputError(f"{path}: a {reader.GetDimension()}-D image; a 3-D one is needed")
    return Geometry(reader.GetSize()[::-1], reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); download it again") from error


def read_table(path: Path, needed: tuple[str, ...], delimiter: str = ",") -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        InputError: missing, empty, or a needed column is not there.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, skipinitialspace=True)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); check the file") from error
    missing = [name for name in needed if name not in names]
    if missing:
        raise InputError(f"{path}: the column {missing[0]!r} is missing; it has {', '.join(names) or 'none'}")
    if not rows:
        raise InputError(f"{path}: the table is empty; check the file")
    return rows


def number(text: Any, path: Path, what: str) -> float:
    """A finite number out of a file.

    Raises:
        InputError: it is none.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"{path}: {what} is {text!r}, not a number; correct the file")
    return value


def read_scan(path: Path, modality: str, model_modality: str = "--modality") -> Volume:
    """A scan with its modality; decided from the image where the data set does not say it.

    Raises:
        InputError: it cannot be read, or CT or MR cannot be decided.
    """
    from uae.preprocess import decide_modality

    volume = Volume.read(path)
    volume.modality, volume.modality_reason = decide_modality(volume, modality, model_modality)
    return volume
