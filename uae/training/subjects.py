"""One training scan on the 2 mm grid: its voxels on the training device, its masks beside them for cheap draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from uae.errors import InputError
from uae.preprocess import AIR_HU, NETWORK_SPACING_MM, body_mask, network_geometry
from uae.training.frames import CanonicalFrame
from uae.volume import Volume, resample_with_mask

INSIDE, BODY = 1, 2
"""Values of a subject's masks: inside the scan, inside the patient; 0 is outside the scan."""
MOST_HU = 3071.0


@dataclass
class Subject:
    """One training scan at 2 mm.

    Attributes:
        name: for the log.
        modality: "ct" or "mr".
        image: (1, 1, z, y, x) float32; CT as HU + 1024 (so that zero padding is air), MR as 0..1.
        mask: uint8 (z, y, x); 0 outside the scan, 1 inside, 2 inside the patient.
        partner: a second image on the same grid (a phantom's or a registered MR, as 0..1) or None.
        partner_mask: mask of the partner where it covers less than the scan (a registered MR), else None.
        beyond_mask: uint8 (z, y, x), 1 in the body outside the dilated overlap with the partner; None without one.
        beyond: (M, 3) int cells of it.
        body_cells: (M, 3) int z, y, x; every second body voxel per axis, where views are centred.
        tissues: (1, 1, z, y, x) float32 numbers of tissues or labels, from which contrasts are synthesised, or None.
        classes: int16 (z, y, x) class numbers for the semantic branch (0: none), or None.
        annotated: class numbers that the labels of this scan carry.
        regions: (1, 1, z, y, x) float32 superpixel numbers, or None.
        frame: the map to the canonical body (phantoms), or None.
        weight: how often it is drawn, relative to the others of its modality.
    """

    name: str
    modality: str
    image: Tensor
    mask: np.ndarray
    partner: Tensor | None = None
    partner_mask: np.ndarray | None = None
    beyond_mask: np.ndarray | None = None
    beyond: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), int))
    body_cells: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), int))
    tissues: Tensor | None = None
    classes: np.ndarray | None = None
    annotated: frozenset[int] = frozenset()
    regions: Tensor | None = None
    frame: CanonicalFrame | None = None
    weight: float = 1.0

    @property
    def registered(self) -> bool:
        """Whether the partner is another scan, brought here by a registration."""
        return self.partner_mask is not None

    def on(self, device: torch.device) -> Subject:
        """The subject with its images on `device` (a GPU holds all of them)."""
        moved = {
            name: None if value is None else value.to(device)
            for name, value in vars(self).items()
            if name in ("image", "partner", "tissues", "regions")
        }
        return replace(self, **moved)


def unit_mr(array: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """MR signal (z, y, x) -> 0..1 by its 0.2 and 99.8 percentiles inside `valid` (authors' code), 0 outside."""
    low, high = np.percentile(array[valid], (0.2, 99.8))
    return np.where(valid, np.clip((array - low) / max(float(high - low), 1e-6), 0, 1), 0).astype(np.float32)


def lattice_cells(inside: np.ndarray) -> np.ndarray:
    """(M, 3) int z, y, x of every second voxel per axis of a bool array."""
    return np.argwhere(inside[::2, ::2, ::2]) * 2


def as_tensor(array: np.ndarray) -> Tensor:
    """(z, y, x) -> (1, 1, z, y, x) float32."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]


def check_finite(name: str, volume: Volume) -> None:
    """Refuse a training scan that holds values which are not numbers.

    Raises:
        InputError: there is one.
    """
    if not np.isfinite(volume.array).all():
        raise InputError(f"{name}: the image holds values that are not numbers; repair it or leave it out")


def subject_from_volume(
    name: str,
    volume: Volume,
    partner: Volume | None = None,
    weight: float = 1.0,
    tissues: Volume | None = None,
    classes: Volume | None = None,
    annotated: frozenset[int] = frozenset(),
) -> Subject:
    """Resample a scan (and what belongs to it) to 2 mm.

    Args:
        name: for the log.
        volume: CT or MR, modality decided.
        partner: an MR in the same patient millimetres, or None.
        weight: relative frequency.
        tissues: tissue or label numbers from which contrasts are synthesised, in the same millimetres.
        classes: class numbers for the semantic branch, in the same millimetres.
        annotated: class numbers that `classes` carries.

    Raises:
        InputError: no patient is found in the scan, or values that are not numbers.
    """
    check_finite(name, volume)
    grid = network_geometry(volume.geometry, (1, 1, 1))
    carried, inside = resample_with_mask(volume, grid, antialias=True)
    valid = inside.array > 0
    body = body_mask(carried) & valid
    cells = lattice_cells(body)
    if len(cells) == 0:
        raise InputError(f"{name}: no patient found in the scan; leave it out of the training list")
    subject = Subject(
        name,
        str(volume.modality),
        as_tensor(np.where(valid, network_units(carried, valid), 0)),
        valid.astype(np.uint8) + body,
        body_cells=cells,
        annotated=annotated,
        weight=weight,
    )
    if partner is not None:
        second, also = resample_with_mask(partner, grid, antialias=True)
        subject.partner = as_tensor(unit_mr(second.array, (also.array > 0) & valid))
    if tissues is not None:
        subject.tissues = as_tensor(nearest_labels(name, tissues, grid, valid))
    if classes is not None:
        subject.classes = nearest_labels(name, classes, grid, valid).astype(np.int16)
    return subject


def network_units(volume: Volume, valid: np.ndarray) -> np.ndarray:
    """CT -> HU + 1024, MR -> 0..1; float32 (z, y, x)."""
    if volume.modality == "ct":
        return (np.clip(volume.array, AIR_HU, MOST_HU) - AIR_HU).astype(np.float32)
    return unit_mr(volume.array, valid)


def nearest_labels(name: str, labels: Volume, grid, valid: np.ndarray) -> np.ndarray:
    """Label numbers (z, y, x) on the 2 mm grid of a scan, by place and not by index.

    Raises:
        InputError: the labels cover another box than the scan.
    """
    carried, covered = resample_with_mask(labels, grid, fill=0.0, order=0)
    missed = float((valid & (covered.array == 0)).sum() / max(valid.sum(), 1))
    spare = labels.geometry.extent_mm.prod() / (valid.sum() * NETWORK_SPACING_MM**3)
    if missed > 0.05 or spare > 1.2:
        raise InputError(
            f"{name}: its label map is of another size or place ({100 * missed:.0f} % of the scan is not covered); "
            "use the labels that were drawn on this scan"
        )
    return np.where(valid, carried.array, 0)


def map_labels(labels: Volume, numbers: Mapping[int, int]) -> Volume:
    """A label map with its numbers replaced; what is not in `numbers` becomes 0."""
    array = np.asarray(labels.array).astype(np.int64)
    table = np.zeros(max(int(array.max()), *numbers, 0) + 1, dtype=np.int16)
    for number, target in numbers.items():
        table[number] = target
    return labels.replace(table[np.maximum(array, 0)])
