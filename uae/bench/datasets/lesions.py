"""Deep Longitudinal Study (DLS): lesion pairs of DeepLesion, as published for the Deep Lesion Tracker (CVPR 2021).

Layout: `train.json`, `valid.json` or `val.json`, `test.json` (in the folder or in `data/`), each a list or an object of
pairs with "source", "target" (image names), "source center", "target center" ([x, y, z] voxels), "target box" ([x, y,
z, width, height, depth] voxels) and "target recist diameter" ([long, short], in pixels of the slice although the
authors' page says millimetres: 24.0 for marks 24 pixels apart); the images in `images/`, `Images_nifti/` or the folder.
Both directions of a pair are entries of their own (960 in test.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.datasets.common import PointPair, existing_file, existing_folder, grid_of, number, read_json
from uae.errors import InputError
from uae.geometry import Geometry

SPLITS = {"train": ("train.json",), "valid": ("valid.json", "val.json"), "test": ("test.json",)}
IMAGE_FOLDERS = ("images", "Images_nifti", ".")


def is_layout(folder: Path) -> bool:
    """Whether a folder holds a split's file."""
    return any((folder / sub / name).is_file() for sub in (".", "data") for names in SPLITS.values() for name in names)


def read_lesions(folder: str | Path, split: str = "test", reversed_slices: bool = False) -> list[PointPair]:
    """Lesion pairs, one point each.

    Args:
        folder: of the data set.
        split: train, valid or test.
        reversed_slices: the images' slices run against the annotation's z (conversions differ; UAE's authors had
            such copies). As the archive's own conversion stores them where False.

    Returns:
        Pairs with `figures`: `radius_mm` (1,) half of the longest RECIST diameter, not finite where there is none;
        `size_mm` (1,) diagonal of the box; `box` (1, 2, 3) its lower and upper corners in voxels x, y, z of the query.

    Raises:
        InputError: no such folder, split, image or entry.
    """
    root = existing_folder(folder, "DLS: test.json and its NIfTI images")
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; choose {', '.join(SPLITS)}")
    files = [root / sub / name for sub in (".", "data") for name in SPLITS[split]]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise InputError(f"{root}: {SPLITS[split][0]} is missing here and in data/; it lists the lesion pairs")
    content = read_json(file)
    if not isinstance(content, Mapping | list):
        raise InputError(f"{file}: a table of lesion pairs was expected; download the file again")
    entries = content.items() if isinstance(content, Mapping) else ((f"{i:04d}", e) for i, e in enumerate(content, 1))
    grids: dict[Path, Geometry] = {}
    pairs = [_pair(root, file, str(key), entry, split, reversed_slices, grids) for key, entry in entries]
    if not pairs:
        raise InputError(f"{file}: no lesion pairs in it; download it again")
    return pairs


def in_box(pair: PointPair, points: np.ndarray, grid: Geometry) -> np.ndarray:
    """Whether found points (N, 3) mm lie in the lesions' boxes (lower side inclusive, upper exclusive), bool (N,)."""
    index = grid.mm_to_index(points)
    box = pair.figures["box"]
    return np.all((index >= box[:, 0]) & (index < box[:, 1]), axis=1)


def _pair(
    root: Path, file: Path, key: str, entry: Any, split: str, flipped: bool, grids: dict[Path, Geometry]
) -> PointPair:
    paths, centres = [], []
    for role in ("source", "target"):
        name = str(_entry(entry, role, file, key))
        path = _image(root, name, file)
        if path not in grids:
            grids[path] = grid_of(path)
        centre = _numbers(_entry(entry, f"{role} center", file, key), 3, file, f"{role} center of {key}")
        if flipped:
            centre[2] = grids[path].size[2] - 1 - centre[2]
        paths.append(path)
        centres.append(grids[path].index_to_mm(centre)[0])
    grid = grids[paths[1]]
    corner = _numbers(_entry(entry, "target box", file, key), 6, file, f"target box of {key}")
    low, sides = corner[:3], corner[3:]
    if flipped:
        low = np.array([low[0], low[1], grid.size[2] - low[2] - sides[2]])
    diameters = entry.get("target recist diameter")
    longest = float("nan")
    if isinstance(diameters, list) and diameters:
        longest = max(number(value, file, f"target recist diameter of {key}") for value in diameters)
    return PointPair(
        key, paths[0], paths[1], [key], centres[0][None], centres[1][None], split, ("ct", "ct"),
        {
            "radius_mm": np.array([float(longest) / 2.0 * grid.spacing[0]]),
            "size_mm": np.array([np.linalg.norm(sides * grid.spacing)]),
            "box": np.stack([low, low + sides])[None],
        },
    )  # fmt: skip


def _entry(entry: Any, name: str, file: Path, key: str) -> Any:
    if not isinstance(entry, Mapping) or name not in entry:
        raise InputError(f"{file}: the pair {key} has no {name!r}; download the file again")
    return entry[name]


def _numbers(values: Any, count: int, file: Path, what: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"{file}: {what} must be {count} numbers, not {values!r}")
    return np.array([number(value, file, what) for value in values])


def _image(root: Path, name: str, file: Path) -> Path:
    found = next((root / sub / name for sub in IMAGE_FOLDERS if (root / sub / name).is_file()), None)
    return found or existing_file(root / IMAGE_FOLDERS[0] / name, f"an image that {file.name} names")
