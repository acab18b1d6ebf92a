"""Carry points and volumes through transforms that were computed before: the work of `uae apply`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from uae.errors import InputError, ModalityError
from uae.points import is_point_file, read_points, write_points
from uae.progress import Cancel, Progress, check_cancel, report
from uae.transform import Composite, Transform
from uae.transform_io import read_transform
from uae.volume import Geometry, Volume, resample

logger = logging.getLogger(__name__)

LINEAR_NAMES = ("rigid.tfm", "affine.tfm")
FIELD_NAME = "displacement.nii.gz"


def load_chain(paths: Sequence[str | Path]) -> Transform:
    """The transform fixed -> moving from files or result folders.

    Args:
        paths: in the order in which a fixed point meets them (grid, then linear). A folder stands for the result of
            `uae register` or `uae deform`: its displacement field, if there is one, then its linear transform.

    Returns:
        x_moving as a function of x_fixed, LPS mm.

    Raises:
        InputError: nothing given, a missing or unreadable transform, or a folder without a result.
    """
    parts: list[Transform] = []
    for path in map(Path, paths):
        parts += _folder_parts(path) if path.is_dir() else [read_transform(path)]
    if not parts:
        raise InputError("no transform given; name a result folder or transform files before the input")
    return parts[0] if len(parts) == 1 else Composite(parts)


def _folder_parts(folder: Path) -> list[Transform]:
    linear = [folder / name for name in LINEAR_NAMES if (folder / name).is_file()]
    if not linear:
        raise InputError(
            f"{folder}: neither {' nor '.join(LINEAR_NAMES)} in this folder; name the output folder of an accepted "
            "`uae register` (a refused one holds only report.json) or a transform file"
        )
    if len(linear) > 1:
        raise InputError(f"{folder}: both {' and '.join(LINEAR_NAMES)}; name the transform files that are meant")
    field = folder / FIELD_NAME
    return ([read_transform(field)] if field.is_file() else []) + [read_transform(linear[0])]


def apply_to_points(transform: Transform, points: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Carry points (N, 3) LPS mm.

    Args:
        transform: fixed -> moving.
        points: (N, 3) LPS mm, in moving space; with `inverse` in fixed space.
        inverse: carry from fixed to moving space (what SimpleITK's TransformPoint gives) instead of moving to fixed.

    Returns:
        (N, 3) LPS mm.
    """
    return transform.apply(points) if inverse else transform.inverse().apply(points)


def apply_to_volume(
    transform: Transform,
    volume: Volume,
    reference: Geometry,
    inverse: bool = False,
    label: bool = False,
    fill: float | None = None,
) -> Volume:
    """Carry a volume onto a grid, resampled once.

    Args:
        transform: fixed -> moving.
        volume: lies in moving space; with `inverse` in fixed space.
        reference: the grid of the result, in fixed space; with `inverse` in moving space.
        inverse: carry from fixed to moving space.
        label: nearest neighbour and 0 outside, for label maps and masks.
        fill: value where the volume ends; 0 for labels, -1024 for CT, else the minimum, where None.

    Returns:
        The volume on `reference`.
    """
    if label and fill is None:
        fill = 0.0
    return resample(volume, reference, transform.inverse() if inverse else transform, fill, order=0 if label else 1)


def apply_files(
    transforms: Sequence[str | Path],
    source: str | Path,
    output: str | Path,
    reference: str | Path | None = None,
    inverse: bool = False,
    label: bool = False,
    points: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """`uae apply`: read, carry and write one point list or image.

    Args:
        transforms: see load_chain.
        source: the point list or image to carry.
        output: the file to write.
        reference: image whose grid the result gets; needed for images.
        inverse: `source` lies in fixed space.
        label: `source` is a label map.
        points: `source` is a point list; also understood from its ending.
        progress: called with the stage and its fraction.
        cancel: asked between the stages.

    Raises:
        InputError: unusable input, or no reference for an image.
        ResourceError: memory or disk is exhausted.
        CancelledError: the user stopped.
    """
    chain = load_chain(transforms)
    report(progress, "read", 0.0)
    if points or is_point_file(source):
        given = read_points(source)
        write_points(output, given.labels, apply_to_points(chain, given.points, inverse))
        report(progress, "write", 1.0)
        return
    if reference is None:
        raise InputError(f"{source}: an image needs the grid to be resampled onto; add --reference IMAGE")
    volume = Volume.read(source, label=label)
    # The reference only lends its grid: a mask is as good as an image.
    grid = _reference_geometry(reference)
    check_cancel(cancel)
    report(progress, "resample", 0.0)
    carried = apply_to_volume(chain, volume, grid, inverse, label, None if label else _image_fill(volume))
    check_cancel(cancel)
    report(progress, "write", 0.0)
    carried.write(output)
    report(progress, "write", 1.0)


def _reference_geometry(path: str | Path) -> Geometry:
    """The grid of an image or label map."""
    try:
        return Volume.read(path).geometry
    except InputError as error:
        try:
            return Volume.read(path, label=True).geometry
        except InputError:
            raise error from None


def _image_fill(volume: Volume) -> float:
    """Air for a CT, the minimum for everything else; a doubtful modality must not stop the resampling."""
    from uae.preprocess import decide_modality

    try:
        volume.modality, volume.modality_reason = decide_modality(volume)
    except ModalityError as error:
        logger.info("filling with the minimum: %s", error)
    return volume.default_fill
