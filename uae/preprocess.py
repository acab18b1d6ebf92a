"""From a scan to what the network sees: modality, body mask, the 2 mm network grid and the input map."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from uae.errors import InputError, ModalityError
from uae.geometry import Geometry
from uae.volume import Volume, resample_with_mask

logger = logging.getLogger(__name__)

NETWORK_SPACING_MM = 2.0
"""Spacing of the network grid on every axis (papers and authors' code)."""

AIR_HU = -1024.0
MAX_NETWORK_VOXELS = 250_000_000

SOFT_TISSUE_KNOTS: tuple[tuple[float, float], ...] = (
    (-1024, 0.0), (-300, 0.22), (-150, 0.30), (0, 0.50), (100, 0.66), (250, 0.80), (600, 0.90), (2000, 1.0),
)  # fmt: skip
"""HU -> 0..1 with room for soft tissue (our pilots); the released networks use the full linear window instead."""


def network_geometry(geometry: Geometry, stride: tuple[int, int, int], lattice: Geometry | None = None) -> Geometry:
    """The 2 mm grid that covers a scan's box, padded at the far ends.

    Args:
        geometry: any grid.
        stride: (z, y, x) coarse stride of the model; sizes become its multiples.
        lattice: a network grid whose axes and coarse cells are continued over the scan; without one the axes run along
            L, P, S and the first voxel's outer corner lies on the box's lower corner.

    Raises:
        InputError: the grid would be absurdly large (a wrong spacing in the header).
    """
    steps = np.asarray(stride[::-1], dtype=np.int64)
    if lattice is None:
        low, high = geometry.bounds_mm()
        cells = np.maximum(np.ceil((high - low) / NETWORK_SPACING_MM - 1e-6), 1).astype(np.int64)
        cells = -(-cells // steps) * steps
        origin, direction = low + NETWORK_SPACING_MM / 2, np.eye(3)
    else:
        edges = lattice.mm_to_index(geometry.corners_mm()) + 0.5
        first = np.floor(edges.min(axis=0) / steps + 1e-6).astype(np.int64) * steps
        cells = np.ceil(edges.max(axis=0) / steps - 1e-6).astype(np.int64) * steps - first
        low, high = np.zeros(3), cells * NETWORK_SPACING_MM
        origin, direction = lattice.index_to_mm(first)[0], lattice.direction
    if int(np.prod(cells)) > MAX_NETWORK_VOXELS:
        raise InputError(
            f"the scan's box of {np.round(high - low).astype(int).tolist()} mm is too large to embed; "
            "check its spacing or crop it"
        )
    shape = (int(cells[2]), int(cells[1]), int(cells[0]))
    return Geometry(shape, np.full(3, NETWORK_SPACING_MM), origin, direction)


def decide_modality(volume: Volume, requested: str = "auto", option: str = "--fixed-modality") -> tuple[str, str]:
    """CT or MR, and why.

    Args:
        volume: the scan; its DICOM modality tag, where read, decides first.
        requested: "ct", "mr" or "auto".
        option: name of the option that a doubtful case should mention.

    Returns:
        ("ct" or "mr", reason for the log and the report).

    Raises:
        ModalityError: the evidence is doubtful.
        InputError: `requested` is unknown or the DICOM tag is neither CT nor MR.
    """
    if requested in ("ct", "mr"):
        return requested, "given by the user"
    if requested != "auto":
        raise InputError(f"{option} {requested}: unknown modality; use ct, mr or auto")
    if volume.modality in ("ct", "mr"):
        return volume.modality, volume.modality_reason or "read from the file"
    tag = str(volume.meta.get("Modality", ""))
    if tag:
        raise InputError(f"{volume.path}: DICOM modality {tag}; only CT and MR can be used ({option} if wrong)")
    values = np.asarray(volume.array, dtype=np.float32)
    values = values.reshape(-1)[:: max(values.size // 2_000_000, 1)]
    air = float(np.mean(values < -850))
    water = float(np.mean((values > -150) & (values < 250)))
    negative = float(np.mean(values < -20))
    integral = bool(np.all(values == np.round(values)))
    figures = f"{air:.0%} of the voxels below -850, {water:.0%} in -150..250, minimum {values.min():.0f}"
    if air > 0.005 and water > 0.03 and values.min() > -4096:
        return "ct", f"Hounsfield units: {figures}"
    if values.min() < -20 and negative > 0.02 and water > 0.3 and values.max() > 200 and integral:
        return "ct", f"Hounsfield units inside the body: {figures}"
    # A CT stored without its rescale has its tissue near 1050; one cut to a display window piles up at its maximum.
    bright = values[values > 200]
    shifted = float(np.mean(np.abs(bright - 1050) < 150)) if bright.size > 0.01 * values.size else 0.0
    windowed = float(np.mean(values == values.max()))
    if values.min() > -20 and shifted < 0.4 and windowed < 0.005 and negative < 0.001:
        return "mr", f"no Hounsfield evidence: {figures}"
    name = volume.path or "the image"
    raise ModalityError(f"{name}: CT or MR is doubtful ({figures}); say which with {option} ct or {option} mr")


def body_mask(volume: Volume, modality: str | None = None) -> np.ndarray:
    """The patient without table and air around, lungs and bowel gas included.

    Threshold, opening and large components as the authors' code does per slice, here at about 4 mm in three
    dimensions; air enclosed from at least three of four in-plane sides belongs to the body where it is no open air.

    Args:
        volume: CT in HU or MR in any unit.
        modality: "ct" or "mr"; default the volume's own.

    Returns:
        bool (z, y, x) on the volume's own grid.
    """
    spacing = volume.geometry.spacing[::-1]
    step = np.minimum(np.maximum(np.round(4.0 / spacing), 1).astype(int), volume.array.shape)
    sigma = [0.35 * s if s > 1 else 0.0 for s in step]
    small = ndimage.gaussian_filter(np.asarray(volume.array, dtype=np.float32), sigma)[
        tuple(slice(s // 2, None, s) for s in step)
    ]
    if (modality or volume.modality) == "ct":
        solid, no_air = small > -400.0, small > -965.0
    else:
        low, high = np.percentile(small, (0.5, 99.0))
        level = (small - low) / max(float(high - low), 1e-6)
        threshold = float(np.clip(0.6 * _otsu(level), 0.08, 0.15))
        solid, no_air = level > threshold, np.ones(small.shape, bool)
    thin = [1 if size > 4 else 0 for size in small.shape]
    structure = np.ones([2 * t + 1 for t in thin], bool)
    opened = ndimage.binary_opening(np.pad(solid, 2, mode="edge"), structure)[2:-2, 2:-2, 2:-2]
    labels, count = ndimage.label(opened)
    if count == 0:
        return np.zeros(volume.array.shape, bool)
    sizes = np.bincount(labels.reshape(-1))[1:]
    body = np.isin(labels, 1 + np.flatnonzero(sizes >= 0.1 * sizes.max()))
    body = ndimage.binary_dilation(body, structure) & solid | body
    axial = int(np.argmax(np.abs(volume.geometry.direction[2])))
    body = _fill_slices(np.moveaxis(body, 2 - axial, 0), np.moveaxis(no_air, 2 - axial, 0))
    body = np.moveaxis(body, 0, 2 - axial)
    index = [
        np.minimum(np.arange(size) // s, n - 1) for size, s, n in zip(volume.array.shape, step, body.shape, strict=True)
    ]
    return body[np.ix_(*index)]


def _otsu(level: np.ndarray) -> float:
    counts, edges = np.histogram(level, bins=128, range=(0.0, 1.0))
    centers = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centers)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centers[int(np.nanargmax(between))])


def _fill_slices(body: np.ndarray, no_air: np.ndarray) -> np.ndarray:
    filled = np.empty_like(body)
    for index, mask in enumerate(body):
        closed = ndimage.binary_fill_holes(mask)
        sides = np.zeros(mask.shape, np.int8)
        for axis in (0, 1):
            sides += np.maximum.accumulate(mask, axis=axis)
            sides += np.flip(np.maximum.accumulate(np.flip(mask, axis), axis=axis), axis)
        filled[index] = closed | ((sides >= 3) & no_air[index])
    return filled


@dataclass(frozen=True)
class InputMap:
    """How voxel values become network input; belongs to a model and is stored with it.

    Attributes:
        name: "soft-tissue" (ours) or "released" (authors' code: -1024..3071 HU or the percentiles to -50..205).
        mr_percentiles: lower and upper percentile of an MR's valid voxels.
    """

    name: str = "soft-tissue"
    mr_percentiles: tuple[float, float] = (0.2, 99.8)

    def __post_init__(self) -> None:
        if self.name not in ("soft-tissue", "released"):
            raise InputError(f"unknown input map {self.name!r}; the model file is from a newer version")
        object.__setattr__(self, "mr_percentiles", tuple(float(p) for p in self.mr_percentiles))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or a checkpoint."""
        return {"name": self.name, "mr_percentiles": list(self.mr_percentiles)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputMap:
        """Inverse of to_dict."""
        return cls(values["name"], tuple(values["mr_percentiles"]))

    @property
    def pad(self) -> float:
        """Network input of air and of cells outside the scan."""
        return -50.0 if self.name == "released" else -2.0

    def scale(self, unit: np.ndarray) -> np.ndarray:
        """0..1 values to network units, float32."""
        unit = np.asarray(unit, dtype=np.float32)
        return unit * 255.0 - 50.0 if self.name == "released" else (unit - 0.5) / 0.25

    def unit(self, array: np.ndarray, modality: str, valid: np.ndarray | None = None) -> np.ndarray:
        """Voxel values to 0..1, float32; the MR percentiles are taken over `valid` voxels without truncation."""
        array = np.asarray(array, dtype=np.float32)
        if modality == "ct":
            if self.name == "released":
                return (np.clip(array, AIR_HU, 3071.0) - AIR_HU) / (3071.0 - AIR_HU)
            hu, level = np.transpose(SOFT_TISSUE_KNOTS)
            return np.interp(array, hu, level).astype(np.float32)
        inside = array if valid is None else array[valid]
        low, high = np.percentile(inside, self.mr_percentiles) if inside.size else (0.0, 1.0)
        return np.clip((array - low) / max(float(high - low), 1e-6), 0.0, 1.0)

    def __call__(self, array: np.ndarray, modality: str, valid: np.ndarray | None = None) -> np.ndarray:
        """Voxel values to network units, float32, same shape; cells outside `valid` become air."""
        image = self.scale(self.unit(array, modality, valid))
        return image if valid is None else np.where(valid, image, np.float32(self.pad))


@dataclass
class NetworkInput:
    """A scan on the padded network grid.

    Attributes:
        image: float32 (z, y, x), network units.
        valid: bool (z, y, x), inside the scan.
        body: bool (z, y, x), inside the scan and the patient.
        volume: the scan's own values on the same grid (air or minimum where not valid).
    """

    image: np.ndarray
    valid: np.ndarray
    body: np.ndarray
    volume: Volume

    @property
    def geometry(self) -> Geometry:
        """The padded 2 mm grid."""
        return self.volume.geometry


def prepare(
    volume: Volume, input_map: InputMap, stride: tuple[int, int, int], lattice: Geometry | None = None
) -> NetworkInput:
    """Resample once to the network grid (anti-aliased where the scan is finer) and normalise.

    Args:
        volume: scan with its modality decided ("ct" or "mr").
        input_map: the model's input map.
        stride: (z, y, x) coarse stride of the model.
        lattice: see `network_geometry`.

    Raises:
        ModalityError: the volume's modality is not decided.
        InputError: the scan's box is too large.
    """
    if volume.modality not in ("ct", "mr"):
        raise ModalityError(f"{volume.path or 'the image'}: the modality is not decided; give ct or mr")
    grid = network_geometry(volume.geometry, stride, lattice)
    on_grid, inside = resample_with_mask(volume, grid, antialias=True)
    valid = inside.array > 0
    body = body_mask(on_grid) & valid
    image = input_map(on_grid.array, volume.modality, valid)
    return NetworkInput(image.astype(np.float32, copy=False), valid, body, on_grid)
