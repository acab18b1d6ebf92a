"""Volume: voxels with their place in the patient; read, write, sample and resample (once, through any transform)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from uae.errors import ResourceError
from uae.geometry import Geometry
from uae.itk_files import write_image

if TYPE_CHECKING:
    from uae.transform import Transform

__all__ = ["CT_FILL", "Geometry", "Volume", "resample", "resample_with_mask", "write_image"]

logger = logging.getLogger(__name__)

CT_FILL = -1024.0
"""Value outside a CT's field of view, HU: air at the low end of the 12-bit scale (contract, section 1)."""

INTERPOLATORS = {0: sitk.sitkNearestNeighbor, 1: sitk.sitkLinear, 3: sitk.sitkBSpline}

FWHM_TO_SIGMA = 1.0 / np.sqrt(8.0 * np.log(2.0))
"""A voxel is taken as a Gaussian whose full width at half maximum is the voxel's size (Cardoso et al., "Scale factor
point spread function matching", MICCAI 2015): its sigma is 0.4247 of that size."""


@dataclass
class Volume:
    """An image or label map in patient space.

    Attributes:
        array: (z, y, x), float32; integers are kept as they are (labels, masks).
        geometry: where the voxels lie.
        modality: "ct", "mr" or None where it is not decided yet.
        modality_reason: how the modality was decided.
        path: the file or folder it was read from.
        meta: what the file says besides (DICOM: Modality, SeriesInstanceUID, FrameOfReferenceUID, ...).
    """

    array: np.ndarray
    geometry: Geometry
    modality: str | None = None
    modality_reason: str = ""
    path: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.dtype == bool:
            array = array.astype(np.uint8)
        elif not np.issubdtype(array.dtype, np.integer):
            array = array.astype(np.float32, copy=False)
        self.array = array
        if array.shape != self.geometry.shape:
            raise ValueError(f"array of shape {array.shape} on a grid of shape {self.geometry.shape}")

    @property
    def minimum(self) -> float:
        """The lowest voxel value."""
        return float(self.array.min())

    @property
    def is_label(self) -> bool:
        """Whether the voxels are integers (labels or a mask)."""
        return bool(np.issubdtype(self.array.dtype, np.integer))

    @property
    def default_fill(self) -> float:
        """Value where nothing was scanned: 0 for labels, -1024 HU for CT, else the minimum."""
        if self.is_label:
            return 0.0
        return CT_FILL if self.modality == "ct" else self.minimum

    @classmethod
    def read(cls, path: str | Path, series: str | None = None, label: bool = False) -> Volume:
        """Read NIfTI, NRRD, MHA/MHD, or a DICOM folder or file, and refuse what cannot be used.

        Args:
            path: file or DICOM folder.
            series: SeriesInstanceUID where a DICOM folder holds several series.
            label: a label map or mask (integers, may be constant) instead of an image.

        Returns:
            The volume; float32 for images, integers for labels.

        Raises:
            InputError: the file cannot be read or used; the message names the cause and the next step.
        """
        from uae.volume_io import read_checked

        return read_checked(Path(path), series, label)

    @classmethod
    def from_sitk(cls, image: sitk.Image, **attributes: Any) -> Volume:
        """A Volume from a 3-D scalar SimpleITK image; `attributes` are further fields of Volume."""
        return cls(sitk.GetArrayFromImage(image), Geometry.from_sitk(image), **attributes)

    def to_sitk(self) -> sitk.Image:
        """The same as a SimpleITK image (the voxels are copied)."""
        image = sitk.GetImageFromArray(self.array)
        self.geometry.apply_to_sitk(image)
        return image

    def write(self, path: str | Path) -> None:
        """Write .nii.gz, .nii, .nrrd or .mha; the file appears whole or not at all.

        Raises:
            InputError: unknown suffix or no permission.
            ResourceError: the disk is full.
        """
        write_image(self.to_sitk(), path)

    def sample(self, points_mm: np.ndarray, fill: float | None = None, order: int = 1) -> np.ndarray:
        """Values at points (N, 3) LPS mm, float32 (N,).

        Args:
            points_mm: (N, 3) LPS mm.
            fill: value outside the voxels' extent; default_fill where None. Between the outer voxel centres and
                their edges the edge value holds, as in ITK.
            order: 0 nearest, 1 linear, 3 cubic.
        """
        index = self.geometry.mm_to_index(points_mm)
        fill = self.default_fill if fill is None else float(fill)
        source = self.array if order == 0 else self.array.astype(np.float32, copy=False)
        values = ndimage.map_coordinates(source, index[:, ::-1].T, order=order, mode="nearest").astype(np.float32)
        values[~self.geometry.index_inside(index)] = fill
        return values

    def replace(self, array: np.ndarray, geometry: Geometry | None = None) -> Volume:
        """A volume with other voxels, the same modality and meta, and no path."""
        return Volume(array, geometry or self.geometry, self.modality, self.modality_reason, None, dict(self.meta))


def _antialiased(volume: Volume, geometry: Geometry, linear: np.ndarray) -> Volume:
    """Smooth along those source axes that are finer than the target grid.

    Each target voxel is a Gaussian of the target's voxel size (see FWHM_TO_SIGMA), brought into the source's axes by
    the rotation between the grids and the 3x3 part of the transform; what its variance along a source axis exceeds
    the source voxel's own is what has to be added by smoothing.
    """
    steps = linear @ (geometry.direction * geometry.spacing)
    in_source_axes = np.linalg.inv(volume.geometry.direction) @ steps
    target_mm = np.sqrt((in_source_axes**2).sum(axis=1))
    ratio = target_mm / volume.geometry.spacing
    sigma = FWHM_TO_SIGMA * np.sqrt(np.maximum(ratio**2 - 1.0, 0.0))
    array = volume.array.astype(np.float32, copy=False)
    for axis_xyz, sigma_voxels in enumerate(sigma):
        if sigma_voxels > 0.05:
            array = ndimage.gaussian_filter1d(array, float(sigma_voxels), axis=2 - axis_xyz, mode="nearest")
    return volume.replace(array)


def _warp(volume: Volume, geometry: Geometry, transform: Transform | None, fill: float, order: int) -> np.ndarray:
    """Values (z, y, x) of `volume` at the image of every voxel of `geometry`; `fill` outside."""
    itk_transform = sitk.Transform(3, sitk.sitkIdentity) if transform is None else transform.to_sitk()
    if itk_transform is not None:
        resampler = sitk.ResampleImageFilter()
        resampler.SetSize([int(n) for n in geometry.shape[::-1]])
        resampler.SetOutputSpacing(geometry.spacing.tolist())
        resampler.SetOutputOrigin(geometry.origin.tolist())
        resampler.SetOutputDirection(geometry.direction.ravel().tolist())
        resampler.SetTransform(itk_transform)
        resampler.SetInterpolator(INTERPOLATORS[order])
        resampler.SetDefaultPixelValue(float(fill))
        return sitk.GetArrayFromImage(resampler.Execute(volume.to_sitk()))
    out = np.empty(geometry.shape, dtype=volume.array.dtype)
    # Slabs bound the memory: points, indices and the transform's temporaries take about 200 bytes a voxel.
    slab = max(1, 2_000_000 // (geometry.shape[1] * geometry.shape[2]))
    for start in range(0, geometry.shape[0], slab):
        stop = min(start + slab, geometry.shape[0])
        points = transform.apply(geometry.slab_points_mm(start, stop))
        out[start:stop] = volume.sample(points, fill, order).reshape(out[start:stop].shape)
    return out


def resample(
    volume: Volume,
    geometry: Geometry,
    transform: Transform | None = None,
    fill: float | None = None,
    order: int = 1,
    antialias: bool = False,
) -> Volume:
    """Carry a volume onto another grid.

    Args:
        volume: the image or label map to carry (moving).
        geometry: the grid of the result (fixed).
        transform: maps points of the result's grid to points of `volume`, as ITK does; identity where None.
        fill: value where the volume ends; Volume.default_fill where None.
        order: 0 nearest (labels), 1 linear, 3 cubic B-spline.
        antialias: smooth first along axes where the volume is finer than the target (images only).

    Returns:
        The volume on `geometry`, modality kept. Labels keep their integer type when order is 0.

    Raises:
        ResourceError: not enough memory for the result.
    """
    fill = volume.default_fill if fill is None else float(fill)
    source = volume if order == 0 or not volume.is_label else volume.replace(volume.array.astype(np.float32))
    try:
        if antialias and order > 0:
            linear = transform.linear_part() if transform is not None else np.eye(3)
            source = _antialiased(source, geometry, linear)
        return volume.replace(_warp(source, geometry, transform, fill, order), geometry)
    except MemoryError as error:
        raise ResourceError(f"no memory to resample onto {geometry.shape}; use a smaller or coarser image") from error


def resample_with_mask(
    volume: Volume,
    geometry: Geometry,
    transform: Transform | None = None,
    fill: float | None = None,
    order: int = 1,
    antialias: bool = False,
) -> tuple[Volume, Volume]:
    """`resample`, and a uint8 volume that is 1 where a voxel's image lies inside the source's extent (voxel edges)."""
    carried = resample(volume, geometry, transform, fill, order, antialias)
    inside = Volume(np.ones(volume.geometry.shape, dtype=np.uint8), volume.geometry)
    return carried, Volume(_warp(inside, geometry, transform, 0.0, 0), geometry)
