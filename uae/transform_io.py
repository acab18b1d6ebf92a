"""Transform files that SimpleITK and 3D Slicer read: linear .tfm/.txt/.h5/.mat, fields as vector images or .h5/.tfm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from uae.errors import InputError
from uae.file_checks import check_file
from uae.itk_files import WRITABLE, quiet_itk, write_image, write_with_itk
from uae.transform import ORTHONORMAL_TOLERANCE, Affine, Composite, DisplacementField, Rigid, Transform

LINEAR_SUFFIXES = (".tfm", ".txt", ".h5", ".mat")
FIELD_SUFFIXES = (".h5", ".tfm")
IMAGE_SUFFIXES = (*WRITABLE, ".mhd", ".nhdr")

PROBE_MM = 1000.0
"""Distance at which a linear ITK transform of any class is probed; its matrix follows within about 1e-12."""


def write_transform(path: str | Path, transform: Transform) -> None:
    """Write a transform (fixed -> moving, LPS mm); the file appears whole or not at all.

    Args:
        path: .tfm, .txt, .h5, .mat for linear ones; .nii.gz, .nii, .nrrd, .mha (vector image), .h5, .tfm for a field;
            .h5, .tfm for a chain with a field.
        transform: what to write; a chain of linear parts is written as one matrix.

    Raises:
        InputError: suffix and transform do not go together.
        ResourceError: the disk is full.
    """
    path = Path(path)
    name = path.name.lower()
    if transform.is_linear:
        _require(path, name, LINEAR_SUFFIXES, "a linear transform")
        _write_itk(path, transform.as_linear().to_sitk())
    elif isinstance(transform, DisplacementField) and name.endswith(WRITABLE):
        write_image(transform.to_sitk_image(), path)
    else:
        itk_transform = transform.to_sitk()
        if itk_transform is None:
            raise InputError(f"{path}: an inverse field has no file format; write its invert_to_grid() instead")
        _require(path, name, FIELD_SUFFIXES, "a chain or displacement field")
        _write_itk(path, itk_transform)


def _require(path: Path, name: str, suffixes: tuple[str, ...], what: str) -> None:
    if not name.endswith(suffixes):
        raise InputError(f"{path}: {what} cannot be written with this ending; use one of {', '.join(suffixes)}")


def _write_itk(path: Path, transform: sitk.Transform) -> None:
    write_with_itk(path, lambda file: sitk.WriteTransform(transform, file))


def read_transform(path: str | Path) -> Transform:
    """Read a transform written by this package, SimpleITK, ITK or 3D Slicer.

    Args:
        path: .tfm, .txt, .h5, .mat, or a displacement image (.nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd).

    Returns:
        Rigid, Affine, DisplacementField, or a Composite of them.

    Raises:
        InputError: missing, damaged, or a kind of transform that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such transform file; check the path")
    try:
        with quiet_itk():
            if path.name.lower().endswith(IMAGE_SUFFIXES):
                check_file(path)
                return _field_from_image(path, sitk.ReadImage(str(path)))
            return _from_itk(path, sitk.ReadTransform(str(path)).Downcast())
    except RuntimeError as error:
        raise InputError(
            f"{path}: not a readable transform; give an ITK transform (.tfm, .h5, .txt, .mat) or a displacement image "
            "(an inverse field saved by 3D Slicer must be converted to a forward displacement field first)"
        ) from error


def _field_from_image(path: Path, image: sitk.Image) -> DisplacementField:
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 3:
        raise InputError(
            f"{path}: an image without 3-D vectors is not a displacement field; give the displacement image itself"
        )
    field = DisplacementField.from_sitk(image)
    if not np.all(np.isfinite(field.vectors)):
        raise InputError(f"{path}: the displacement field holds NaN or infinite vectors; compute it again")
    return field


def _from_itk(path: Path, transform: sitk.Transform) -> Transform:
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: a {transform.GetDimension()}-D transform; a 3-D one is needed")
    if isinstance(transform, sitk.CompositeTransform):
        # ITK applies the part that was added last first.
        count = transform.GetNumberOfTransforms()
        parts = [_from_itk(path, transform.GetNthTransform(i).Downcast()) for i in reversed(range(count))]
        chain = Composite(parts)
        return chain.as_linear() if chain.is_linear else chain
    if isinstance(transform, sitk.DisplacementFieldTransform):
        return _field_from_image(path, transform.GetDisplacementField())
    if transform.IsLinear():
        return _linear_from_itk(transform)
    raise InputError(f"{path}: a {transform.GetName()} is not supported; convert it to a displacement field")


def _linear_from_itk(transform: sitk.Transform) -> Affine:
    """The matrix of any linear ITK transform, whatever its class and centre, by its action on four points."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, 3] = origin
    for axis in range(3):
        probe = np.zeros(3)
        probe[axis] = PROBE_MM
        matrix[:3, axis] = (np.array(transform.TransformPoint(probe.tolist())) - origin) / PROBE_MM
    rotation = matrix[:3, :3]
    is_rotation = np.abs(rotation.T @ rotation - np.eye(3)).max() <= ORTHONORMAL_TOLERANCE / 10
    return Rigid(matrix) if is_rotation and np.linalg.det(rotation) > 0 else Affine(matrix)
