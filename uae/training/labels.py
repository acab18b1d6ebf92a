"""Where labels for the semantic branch come from: phantoms, label maps with a name table, the TotalSegmentator layout.

Classes are told apart by name, so scans labelled by different tools share what they have in common, and a scan may
carry any part of the classes. The public TotalSegmentator data set (Wasserthal et al., 2023) is laid out as

    meta.csv                            image_id;...;split  (split: train, val or test)
    s0000/ct.nii.gz
    s0000/segmentations/liver.nii.gz    one binary mask for each class, possibly empty

"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from uae.errors import InputError
from uae.phantom.tissues import LABEL_NAMES
from uae.volume import Volume

logger = logging.getLogger(__name__)

CT_NAMES = ("ct.nii.gz", "ct.nii")
META = "meta.csv"

_PHANTOM_RULES = (
    (r"^kidney_(\w+)$", r"kidney_\1"), (r"^adrenal_(\w+)$", r"adrenal_gland_\1"), (r"^oesophagus$", "esophagus"),
    (r"^vena_cava_inferior$", "inferior_vena_cava"), (r"^vena_cava_superior$", "superior_vena_cava"),
    (r"^bladder$", "urinary_bladder"), (r"^psoas_(\w+)$", r"iliopsoas_\1"), (r"^hip_bone_(\w+)$", r"hip_\1"),
    (r"^erector_spinae_(\w+)$", r"autochthon_\1"), (r"^vertebra_(\w+)$", r"vertebrae_\1"),
    (r"^costal_cartilage$", "costal_cartilages"), (r"^liver_vessels$", "liver"),
)  # fmt: skip
"""The phantom's names -> TotalSegmentator's where both mean the same structure."""
PHANTOM_WITHOUT_CLASS = ("skin", "subcutaneous_fat", "visceral_fat", "mediastinal_fat", "muscle_wall")
"""Structures that fill the gaps between organs; their mean vector would mean nothing."""


class ClassTable:
    """Class numbers by name, the same for every label source of a training."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, name: str) -> int:
        """Number of a class, 1 and up; a new one where the name is new."""
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    @property
    def names(self) -> dict[int, str]:
        """Name by number."""
        return {number: name for name, number in self.numbers.items()}


def phantom_classes(table: ClassTable) -> dict[int, int]:
    """Phantom label -> class number."""
    found = {}
    for label, name in LABEL_NAMES.items():
        if name in PHANTOM_WITHOUT_CLASS:
            continue
        for pattern, target in _PHANTOM_RULES:
            name = re.sub(pattern, target, name)
        found[label] = table.number(name)
    return found


def label_map_classes(path: Path, names: Mapping[str, str], table: ClassTable) -> tuple[Volume, dict[int, int]]:
    """A label map of any tool and its name table.

    Args:
        path: image of whole numbers.
        names: name by number, as the table `names` of an entry of [data] volumes: { 5 = "liver" }.
        table: takes up the names.

    Returns:
        The label map and label -> class number.

    Raises:
        InputError: the image cannot be read, or the name table is empty or no table of whole numbers.
    """
    labels = Volume.read(path, label=True)
    try:
        numbers = {int(number): table.number(str(name)) for number, name in names.items()}
    except ValueError as error:
        raise InputError(f"{path}: the name table must name whole numbers ({error}); write names = {{ 5 = 'liver' }}"
                         ) from error  # fmt: skip
    if not numbers:
        raise InputError(f"{path}: labels without a name table; add names = {{ 5 = 'liver' }} to the entry")
    return labels, numbers


def totalsegmentator_cases(root: Path, split: str = "train") -> list[Path]:
    """Folders of the cases of one split, in order of name; all cases where there is no meta.csv.

    Raises:
        InputError: no such folder, or no case in it.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the unpacked TotalSegmentator data set")
    cases = sorted(p for p in root.iterdir() if p.is_dir() and any((p / name).is_file() for name in CT_NAMES))
    meta = root / META
    if meta.is_file():
        with meta.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            rows = list(csv.DictReader(stream, delimiter=";" if ";" in first else ","))
        chosen = {row.get("image_id", "") for row in rows if row.get("split", split) == split}
        cases = [case for case in cases if case.name in chosen]
    if not cases:
        raise InputError(f"{root}: no case of split {split!r}; each case is a folder with ct.nii.gz and segmentations/")
    return cases


def totalsegmentator_case(case: Path, table: ClassTable) -> tuple[Volume, Volume, frozenset[int]]:
    """One case of the TotalSegmentator layout.

    Where masks overlap the later name wins (authors' code). An empty mask says that the class was looked for and is
    not there: it counts as annotated.

    Returns:
        CT, class numbers on its grid, and the class numbers that the case carries.

    Raises:
        InputError: a mask has another size than the CT, or there is none.
    """
    ct = Volume.read(next(case / name for name in CT_NAMES if (case / name).is_file()))
    ct.modality, ct.modality_reason = "ct", "TotalSegmentator data set"
    masks = sorted((case / "segmentations").glob("*.nii.gz"))
    if not masks:
        raise InputError(f"{case}: no masks in segmentations/; unpack the case again or leave it out")
    merged = np.zeros(ct.geometry.shape, dtype=np.int16)
    annotated = set()
    for path in masks:
        mask = Volume.read(path, label=True)
        if mask.geometry.shape != ct.geometry.shape or not mask.geometry.same_as(ct.geometry, 0.1):
            raise InputError(f"{path}: the mask is of another size or place than its CT; unpack the case again")
        number = table.number(path.name.removesuffix(".nii.gz"))
        merged[np.asarray(mask.array) > 0] = number
        annotated.add(number)
    return ct, Volume(merged, ct.geometry), frozenset(annotated)
