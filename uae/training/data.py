"""Training subjects of a configuration: scans, labelled scans, phantoms, packed volumes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.data import HELD_BACK
from uae.errors import InputError
from uae.preprocess import network_geometry
from uae.progress import Cancel, Progress, check_cancel, report
from uae.training.case_cache import load_case
from uae.training.frames import CanonicalFrame
from uae.training.labels import (
    ClassTable,
    label_map_classes,
    phantom_classes,
    totalsegmentator_cases,
)
from uae.training.regions import superpixels
from uae.training.subjects import Subject, map_labels, subject_from_volume
from uae.volume import Volume

logger = logging.getLogger(__name__)


def check_training_file(file: str) -> None:
    """Refuse scans of the collection that are kept for validation or testing.

    Raises:
        InputError: it is one of them.
    """
    if any(part.startswith(HELD_BACK) for part in Path(file).parts):
        raise InputError(f"[data] {file} is kept for validation or testing; take it out of the list")


def load_subjects(
    data: Mapping[str, Any],
    root: Path,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
    table: ClassTable | None = None,
    contrast: Mapping[str, Any] | None = None,
    synthetic: Mapping[str, Any] | None = None,
) -> list[Subject]:
    """Read every scan and phantom of a training configuration.

    Args:
        data: the `[data]` table: `volumes` (list of tables with file, modality, optional weight, labels, names),
            `packed` (a file of `uae.training.pack`), `totalsegmentator` (folder), `phantom_seeds` ([first, last)).
        root: folder to which file names are relative.
        progress: called for every scan.
        cancel: asked before every scan.
        table: takes up the classes of the labels; labels are not read where None.
        contrast: the table [contrast]; superpixels are made where `regions` is above 0.
        synthetic: the table [synthetic]; phantoms get their tissues and the canonical frame where it uses them.

    Raises:
        InputError: nothing to train on, or a file cannot be read.
    """
    synthetic = synthetic or {}
    entries = [] if data.get("packed") else list(data.get("volumes", []))
    cases = _cases(data, root) if table is not None else []
    first, last = data.get("phantom_seeds", (0, 0))
    total = max(len(entries) + len(cases) + last - first, 1)
    subjects: list[Subject] = []

    def step(stage: str) -> None:
        check_cancel(cancel)
        report(progress, stage, min(len(subjects) / total, 1.0))

    if data.get("packed"):
        from uae.training.pack import read_packed

        packed = Path(data["packed"])
        subjects += read_packed(packed if packed.is_file() else root / packed)
    for entry in entries:
        step("loading volumes")
        subjects.append(_entry_subject(entry, root, table))
        logger.info("%s: %s voxels at 2 mm", entry["file"], tuple(subjects[-1].image.shape[2:]))
    for case in cases:
        step("loading volumes")
        subjects.append(load_case(case, table))
    for seed in range(first, last):
        step("making phantoms")
        weight = float(data.get("phantom_weight", 1.0))
        shared = bool(synthetic.get("cross_subject", 0))
        subjects.append(phantom_subject(seed, weight, table, bool(synthetic.get("label_contrast", 0)), shared))
    if not subjects:
        raise InputError("no training volumes; list them under [data] volumes or give phantom_seeds")
    if contrast is not None and contrast["regions"]:
        for subject in subjects:
            step("superpixels")
            subject.regions = superpixels(subject, contrast["slic_segments"], contrast["slic_compactness"])
    return subjects


def _cases(data: Mapping[str, Any], root: Path) -> list[Path]:
    folder = data.get("totalsegmentator", "")
    if not folder:
        return []
    return totalsegmentator_cases(root / folder, str(data.get("totalsegmentator_split", "train")))


def _entry_subject(entry: Mapping[str, Any], root: Path, table: ClassTable | None) -> Subject:
    check_training_file(str(entry["file"]))
    volume = Volume.read(root / entry["file"])
    volume.modality = entry["modality"]
    classes, annotated = None, frozenset()
    if table is not None and entry.get("labels"):
        check_training_file(str(entry["labels"]))
        labels, numbers = label_map_classes(root / entry["labels"], entry.get("names", {}), table)
        classes, annotated = map_labels(labels, numbers), frozenset(numbers.values())
    return subject_from_volume(
        entry["file"], volume, weight=float(entry.get("weight", 1.0)), classes=classes, annotated=annotated
    )


def phantom_subject(
    seed: int, weight: float, table: ClassTable | None = None, tissues: bool = False, shared: bool = False
) -> Subject:
    """A training phantom: its CT, and its MR as the partner.

    Args:
        seed: 0 to 99999.
        weight: relative frequency.
        table: takes up the phantom's classes; no classes where None.
        tissues: keep the structures, from which contrasts are synthesised.
        shared: keep the map to the canonical body, for pairs of two phantoms.

    Raises:
        InputError: the seed is not a training seed.
    """
    from uae.phantom import make_phantom

    if not 0 <= seed < 100_000:
        raise InputError(f"phantom seed {seed} is not for training; use 0 to 99999")
    phantom = make_phantom(seed, spacing=2.0)
    numbers = {} if table is None else phantom_classes(table)
    subject = subject_from_volume(
        f"phantom-{seed}",
        phantom.ct,
        phantom.mr,
        weight,
        tissues=phantom.labels if tissues else None,
        classes=map_labels(phantom.labels, numbers) if numbers else None,
        annotated=frozenset(numbers.values()),
    )
    if shared:
        grid = network_geometry(phantom.ct.geometry, (1, 1, 1))
        subject.frame = CanonicalFrame(grid, phantom.to_canonical)
    return subject


def class_cells(subject: Subject) -> np.ndarray:
    """(M, 3) int voxels of labelled cells (every second voxel per axis), where semantic crops are centred."""
    return np.argwhere(subject.classes[::2, ::2, ::2] > 0) * 2
