"""Learn2Reg: `<Task>_dataset.json` with lists of pairs, images, labels, masks and keypoints in folders beside it.

Pairs stand in "registration_val", "registration_test" or "training_paired_images" as {"fixed": "./imagesTr/...",
"moving": ...}; labels, masks and keypoints lie in the folder whose name has "images" replaced (labelsTr, keypointsTr,
landmarksTr), keypoints as CSV of voxel indices x, y, z without a header. Modalities: "modality": {"0": "CT", ...}, the
number being the image name's last four digits.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.datasets.common import ImagePair, existing_file, existing_folder, grid_of, read_json
from uae.errors import InputError

PAIR_LISTS = {"val": "registration_val", "test": "registration_test", "train": "training_paired_images"}
POINT_FOLDERS = ("landmarks", "keypoints")
"""In this order: points set by hand are better than detected ones."""


def is_layout(folder: Path) -> bool:
    """Whether a folder holds a data set's JSON file."""
    return _description(folder) is not None


def read_pairs(folder: str | Path, split: str = "val") -> list[ImagePair]:
    """The pairs of a split.

    Args:
        folder: of the task.
        split: val, test or train.

    Returns:
        Pairs with points and label maps where the task has them.

    Raises:
        InputError: no such folder, JSON file, split, image, or keypoints that do not pair.
    """
    root = existing_folder(folder, "a Learn2Reg task")
    if split not in PAIR_LISTS:
        raise InputError(f"unknown split {split!r}; choose {', '.join(PAIR_LISTS)}")
    file = _description(root)
    if file is None:
        raise InputError(f"{root}: no *dataset.json; unpack the whole task")
    content = read_json(file)
    entries = content.get(PAIR_LISTS[split]) if isinstance(content, dict) else None
    if not entries:
        others = [name for name, key in PAIR_LISTS.items() if isinstance(content, dict) and content.get(key)]
        hint = f"it has {', '.join(others)}" if others else "it lists no pairs at all"
        raise InputError(f"{file}: no pairs under {PAIR_LISTS[split]!r} ({hint}); choose another split")
    return [_pair(root, file, content, entry) for entry in entries]


def _description(root: Path) -> Path | None:
    found = sorted(root.glob("*dataset.json"))
    return found[0] if found else None


def _pair(root: Path, file: Path, content: dict[str, Any], entry: Any) -> ImagePair:
    if not isinstance(entry, dict) or not {"fixed", "moving"} <= entry.keys():
        raise InputError(f"{file}: a pair needs 'fixed' and 'moving', not {entry!r}")
    images = [
        existing_file(root / str(entry[role]), f"an image that {file.name} names") for role in ("fixed", "moving")
    ]
    labels = [_beside(path, "labels", path.name) for path in images]
    points: list[np.ndarray | None] = [None, None]
    for kind in POINT_FOLDERS:
        files = [_beside(path, kind, _stem(path) + ".csv") for path in images]
        if all(files):
            points = [_points(table, image) for table, image in zip(files, images)]
            if len(points[0]) != len(points[1]):
                raise InputError(
                    f"{files[1]}: {len(points[1])} points for {len(points[0])} of {files[0].name}; they must pair"
                )
            break
    names = [] if points[0] is None else [str(i + 1) for i in range(len(points[0]))]
    return ImagePair(
        f"{_stem(images[0])} < {_stem(images[1])}", *images, names, *points, *labels,
        (_modality(content, images[0]), _modality(content, images[1])),
    )  # fmt: skip


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _beside(image: Path, kind: str, name: str) -> Path | None:
    path = image.parent.parent / image.parent.name.replace("images", kind) / name
    return path if path != image and path.is_file() else None


def _points(table: Path, image: Path) -> np.ndarray:
    """(N, 3) LPS mm of a table of voxel indices."""
    try:
        index = np.loadtxt(table, delimiter=",", ndmin=2, dtype=np.float64)
    except ValueError as error:
        raise InputError(
            f"{table}: not a table of numbers ({error}); it holds x,y,z voxels without a header"
        ) from error
    if index.ndim != 2 or index.shape[1] != 3 or not len(index):
        raise InputError(f"{table}: three columns x,y,z are needed, not an array of {index.shape}")
    return grid_of(image).index_to_mm(index)


def _modality(content: dict[str, Any], image: Path) -> str:
    number = re.search(r"_(\d{4})$", _stem(image))
    words = content.get("modality")
    word = str(words.get(str(int(number.group(1))), "")) if number and isinstance(words, dict) else ""
    return "mr" if "MR" in word.upper() else "ct" if "CT" in word.upper() else "auto"
