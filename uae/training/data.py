"""Training subjects on the network grid, held in memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uae.bench.data import HELD_BACK
from uae.errors import InputError
from uae.preprocess import AIR_HU, body_mask, network_geometry
from uae.progress import Cancel, Progress, check_cancel, report
from uae.volume import Volume, resample_with_mask

logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """One training scan at 2 mm.

    Attributes:
        name: for the log.
        modality: "ct" or "mr".
        image: (1, 1, z, y, x) float32; CT as HU + 1024 (so that zero padding is air), MR as 0..1.
        mask: (1, 1, z, y, x) float32; 0 outside the scan, 1 inside, 2 inside the patient.
        partner: a second rendering of the same grid (a phantom's MR as 0..1) or None.
        body_cells: (M, 3) int z, y, x; every 4th body voxel of a lattice, where views are centred.
        weight: how often it is drawn, relative to the others of its modality.
    """

    name: str
    modality: str
    image: Tensor
    mask: Tensor
    partner: Tensor | None
    body_cells: np.ndarray
    weight: float = 1.0


def _unit_mr(array: np.ndarray, valid: np.ndarray) -> np.ndarray:
    low, high = np.percentile(array[valid], (0.2, 99.8))
    return np.where(valid, np.clip((array - low) / max(float(high - low), 1e-6), 0, 1), 0).astype(np.float32)


def subject_from_volume(name: str, volume: Volume, partner: Volume | None = None, weight: float = 1.0) -> Subject:
    """Resample a scan (and its second rendering on the same anatomy) to 2 mm.

    Args:
        name: for the log.
        volume: CT or MR, modality decided.
        partner: an MR in the same patient millimetres, or None.
        weight: relative frequency.

    Raises:
        InputError: no patient is found in the scan.
    """
    grid = network_geometry(volume.geometry, (1, 1, 1))
    carried, inside = resample_with_mask(volume, grid, antialias=True)
    valid = inside.array > 0
    body = body_mask(carried) & valid
    if volume.modality == "ct":
        image = np.clip(carried.array, AIR_HU, 3071.0) - AIR_HU
    else:
        image = _unit_mr(carried.array, valid)
    other = None
    if partner is not None:
        second, also = resample_with_mask(partner, grid, antialias=True)
        other = torch.from_numpy(_unit_mr(second.array, (also.array > 0) & valid))[None, None]
    cells = np.argwhere(body[::2, ::2, ::2]) * 2
    if len(cells) == 0:
        raise InputError(f"{name}: no patient found in the scan; leave it out of the training list")
    mask = torch.from_numpy(valid.astype(np.float32) + body)[None, None]
    image_tensor = torch.from_numpy(np.where(valid, image, 0).astype(np.float32))[None, None]
    return Subject(name, str(volume.modality), image_tensor, mask, other, cells, weight)


def load_subjects(
    data: dict[str, Any], root: Path, progress: Progress | None = None, cancel: Cancel | None = None
) -> list[Subject]:
    """Read every scan and phantom of a training configuration.

    Args:
        data: the `[data]` table: `volumes` (list of tables with file, modality, optional weight) and
            `phantom_seeds` ([first, last) of training phantoms).
        root: folder to which file names are relative.
        progress: called for every scan.
        cancel: asked before every scan.

    Raises:
        InputError: nothing to train on, or a file cannot be read.
    """
    entries = list(data.get("volumes", []))
    first, last = data.get("phantom_seeds", (0, 0))
    total = max(len(entries) + last - first, 1)
    subjects = []
    for index, entry in enumerate(entries):
        check_cancel(cancel)
        report(progress, "loading volumes", index / total)
        if str(entry["file"]).startswith(HELD_BACK):
            raise InputError(f"[data] {entry['file']} is kept for validation or testing; take it out of the list")
        volume = Volume.read(root / entry["file"])
        volume.modality = entry["modality"]
        subjects.append(subject_from_volume(entry["file"], volume, weight=float(entry.get("weight", 1.0))))
        logger.info("%s: %s voxels at 2 mm", entry["file"], tuple(subjects[-1].image.shape[2:]))
    for seed in range(first, last):
        check_cancel(cancel)
        report(progress, "making phantoms", (len(entries) + seed - first) / total)
        subjects.append(phantom_subject(seed, float(data.get("phantom_weight", 1.0))))
    if not subjects:
        raise InputError("no training volumes; list them under [data] volumes or give phantom_seeds")
    return subjects


def phantom_subject(seed: int, weight: float) -> Subject:
    """A training phantom: its CT, and its MR as the partner.

    Raises:
        InputError: the seed is not a training seed.
    """
    from uae.phantom import make_phantom

    if not 0 <= seed < 100_000:
        raise InputError(f"phantom seed {seed} is not for training; use 0 to 99999")
    phantom = make_phantom(seed, spacing=2.0)
    return subject_from_volume(f"phantom-{seed}", phantom.ct, phantom.mr, weight)
