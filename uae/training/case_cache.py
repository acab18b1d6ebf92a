"""TotalSegmentator cases at 2 mm, kept on disk: some hundred masks a case are read once and not at every start."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np

from uae.errors import UAEError
from uae.files import atomic_path
from uae.paths import cache_folder
from uae.training.labels import CT_NAMES, ClassTable, totalsegmentator_case
from uae.training.subjects import BODY, Subject, as_tensor, lattice_cells, subject_from_volume

logger = logging.getLogger(__name__)

FORMAT = "uae-case-1"


def case_folder() -> Path:
    """Where the cases are kept: in a folder of the cached embeddings' (UAE_CACHE moves both)."""
    return cache_folder() / "training"


def load_case(case: Path, table: ClassTable) -> Subject:
    """The subject of a case, from the cache where its files are as they were.

    Args:
        case: folder in the TotalSegmentator layout.
        table: takes up the classes.

    Raises:
        InputError: see `uae.training.labels.totalsegmentator_case`.
    """
    path = case_folder() / f"{_key(case)}.npz"
    stored = _read(path)
    if stored is None:
        stored = _make(case)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, **stored)
        except (UAEError, OSError) as error:
            logger.warning("%s is not kept for the next start: %s", case.name, error)
    names = json.loads(str(stored["names"]))
    numbers = np.array([0, *(table.number(name) for name in names)], np.int16)
    return Subject(
        case.name,
        "ct",
        as_tensor(stored["image"]),
        stored["mask"],
        body_cells=lattice_cells(stored["mask"] == BODY),
        classes=numbers[stored["classes"]],
        annotated=frozenset(int(number) for number in numbers[1:]),
    )


def _key(case: Path) -> str:
    files = [case / name for name in CT_NAMES if (case / name).is_file()][:1]
    files += sorted((case / "segmentations").glob("*.nii.gz"))
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([FORMAT, states]).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in ("image", "mask", "classes", "names")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is damaged and is made again: %s", path, error)
        return None


def _make(case: Path) -> dict[str, np.ndarray]:
    """HU + 1024 in whole numbers, the mask, class numbers of the case's own table, and that table's names in order."""
    own = ClassTable()
    ct, classes, annotated = totalsegmentator_case(case, own)
    subject = subject_from_volume(case.name, ct, classes=classes, annotated=annotated)
    return {
        "image": np.rint(subject.image[0, 0].numpy()).astype(np.uint16),
        "mask": subject.mask,
        "classes": subject.classes,
        "names": np.array(json.dumps([own.names[number] for number in sorted(annotated)])),
    }
