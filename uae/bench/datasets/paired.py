"""Paired CT and MR with painted landmarks, as UAE's head-and-neck (12) and abdomen (6 landmarks) sets.

Layout: one folder a patient with `ct.nii.gz`, `mr.nii.gz` (or t1, t2) and label maps `ct_landmarks.nii.gz`,
`mr_landmarks.nii.gz` on the same grids: every landmark a small blob of its own number, its centroid the point.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uae.bench.datasets.common import IMAGE_ENDINGS, ImagePair, existing_folder
from uae.bench.metrics_surface import label_centroids
from uae.errors import InputError
from uae.volume import Volume

MR_NAMES = ("mr", "mri", "t1", "t2")
LABEL_NAMES = ("landmarks", "landmark", "label", "labels", "mask")


def is_layout(folder: Path) -> bool:
    """Whether some sub-folder holds a CT with painted landmarks."""
    return any(
        _find(sub, "ct") and any(_find(sub, f"ct_{name}") for name in LABEL_NAMES)
        for sub in sorted(folder.iterdir())
        if sub.is_dir()
    )


def read_pairs(folder: str | Path) -> list[ImagePair]:
    """One pair a patient, CT fixed, MR moving.

    Args:
        folder: of the data set.

    Returns:
        Pairs with the centroids of the labels that both maps have, named by their numbers.

    Raises:
        InputError: no such folder, no patient folder, a missing file, or no common label.
    """
    root = existing_folder(folder, "the CT-MR pairs, one sub-folder a patient")
    pairs = []
    for patient in sorted(path for path in root.iterdir() if path.is_dir()):
        ct = _find(patient, "ct")
        if ct is None:
            continue
        mr_name = next((name for name in MR_NAMES if _find(patient, name)), None)
        if mr_name is None:
            raise InputError(f"{patient}: ct is here but no {', '.join(MR_NAMES)} image; add the other scan")
        maps = [_map(patient, "ct"), _map(patient, mr_name)]
        centres = []
        for path in maps:
            volume = Volume.read(path, label=True)
            centres.append(label_centroids(volume.array, volume.geometry))
        common = [number for number in centres[0] if number in centres[1]]
        if not common:
            raise InputError(f"{patient}: the two landmark maps have no number in common; check them")
        points = [np.array([own[number] for number in common]) for own in centres]
        pairs.append(ImagePair(
            patient.name, ct, _find(patient, mr_name), [str(number) for number in common], *points,
            modalities=("ct", "mr"),
        ))  # fmt: skip
    if not pairs:
        raise InputError(f"{root}: no sub-folder with ct.nii.gz, mr.nii.gz and their landmark maps")
    return pairs


def _find(folder: Path, stem: str) -> Path | None:
    names = {path.name.lower(): path for path in folder.iterdir() if path.is_file()}
    return next((names[stem + ending] for ending in IMAGE_ENDINGS if stem + ending in names), None)


def _map(patient: Path, image: str) -> Path:
    found = next((path for name in LABEL_NAMES if (path := _find(patient, f"{image}_{name}")) is not None), None)
    if found is None:
        raise InputError(f"{patient}: {image}_landmarks.nii.gz is missing; paint each landmark with its own number")
    return found
