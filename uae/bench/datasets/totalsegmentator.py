"""TotalSegmentator: one folder a subject with `ct.nii.gz` (or `mri.nii.gz`) and `segmentations/<structure>.nii.gz`.

`meta.csv` (semicolons: image_id; ...; split) names the split. A structure's centroid serves as a landmark between
subjects, where the structure ends inside both scans: one that is cut off by the scan's border has another centroid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uae.bench.datasets.common import PointPair, existing_folder, read_table
from uae.bench.metrics_surface import label_centroids
from uae.errors import InputError
from uae.volume import Volume

IMAGES = {"ct": "ct.nii.gz", "mr": "mri.nii.gz"}
MASKS = "segmentations"
META = "meta.csv"


def is_layout(folder: Path) -> bool:
    """Whether some sub-folder is a subject."""
    return any((sub / MASKS).is_dir() and _image(sub) is not None for sub in folder.iterdir() if sub.is_dir())


def read_pairs(
    folder: str | Path, split: str | None = "test", template: str | None = None, structures: list[str] | None = None
) -> list[PointPair]:
    """Pairs of a template subject with every other subject of a split.

    Args:
        folder: of the data set.
        split: train, val or test of meta.csv; all subjects where None or without meta.csv.
        template: name of the template's folder; the first subject of the split where None.
        structures: names of segmentations; all of the template's where None.

    Returns:
        Pairs with the centroids (LPS mm) of the structures that are whole in both scans.

    Raises:
        InputError: no such folder, subject or structure, or nothing in common.
    """
    root = existing_folder(folder, "TotalSegmentator: s0000, s0001, ...")
    subjects = [path for path in sorted(root.iterdir()) if path.is_dir() and (path / MASKS).is_dir()]
    if split is not None and (root / META).is_file():
        wanted = {
            row["image_id"] for row in read_table(root / META, ("image_id", "split"), ";") if row["split"] == split
        }
        subjects = [path for path in subjects if path.name in wanted]
    if len(subjects) < 2:
        raise InputError(
            f"{root}: fewer than two subjects with {MASKS}/ in split {split!r}; check the folder and split"
        )
    own = subjects[0] if template is None else root / template
    if own not in subjects:
        raise InputError(f"{root}: no subject {template!r} in split {split!r}; it has {subjects[0].name} and others")
    known = whole_centroids(own, structures)
    if not known:
        raise InputError(f"{own}: no structure ends inside this scan; choose another template")
    pairs = []
    for other in subjects:
        if other == own:
            continue
        found = whole_centroids(other, list(known))
        names = [name for name in known if name in found]
        if names:
            pairs.append(PointPair(
                f"{own.name} > {other.name}", _needed(own), _needed(other), names,
                np.array([known[name] for name in names]), np.array([found[name] for name in names]),
                modalities=(_modality(own), _modality(other)),
            ))  # fmt: skip
    if not pairs:
        raise InputError(f"{root}: no structure of {own.name} is whole in another subject; choose another template")
    return pairs


def whole_centroids(subject: Path, structures: list[str] | None = None) -> dict[str, np.ndarray]:
    """Centroids (3,) LPS mm of a subject's segmentations that are not empty and touch no border of the scan.

    Raises:
        InputError: a segmentation cannot be read.
    """
    files = {path.name.split(".")[0]: path for path in sorted((subject / MASKS).glob("*.nii.gz"))}
    centres = {}
    for name in files if structures is None else structures:
        if name not in files:
            continue
        volume = Volume.read(files[name], label=True)
        mask = volume.array > 0
        inner = mask[1:-1, 1:-1, 1:-1]
        if mask.any() and inner.sum() == mask.sum():
            centres[name] = label_centroids(mask.astype(np.uint8), volume.geometry)[1]
    return centres


def _image(subject: Path) -> Path | None:
    return next((subject / name for name in IMAGES.values() if (subject / name).is_file()), None)


def _needed(subject: Path) -> Path:
    found = _image(subject)
    if found is None:
        raise InputError(f"{subject}: {' or '.join(IMAGES.values())} is missing; unpack the data set again")
    return found


def _modality(subject: Path) -> str:
    return "mr" if _needed(subject).name == IMAGES["mr"] else "ct"
