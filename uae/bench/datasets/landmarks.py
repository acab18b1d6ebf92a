"""Chest CT with named landmarks (the 19-landmark evaluation of SAM and UAE): one table and NIfTI images.

Layout: `landmarks.csv` with the columns image, label and either x_lps_mm, y_lps_mm, z_lps_mm or x, y, z (voxels), and
optionally phase (CE, NC); the images in `images/` or beside it, named as in the table with or without their ending.
One subject is the template and every other image is a query, as in the papers; each combination of phases is a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from uae.bench.datasets.common import (
    IMAGE_ENDINGS,
    PointPair,
    existing_file,
    existing_folder,
    grid_of,
    number,
    read_table,
)
from uae.errors import InputError

TABLE = "landmarks.csv"
MM, VOXELS = ("x_lps_mm", "y_lps_mm", "z_lps_mm"), ("x", "y", "z")


def is_layout(folder: Path) -> bool:
    """Whether a folder holds the table."""
    return (folder / TABLE).is_file()


def read_landmarks(folder: str | Path, template: str | None = None) -> list[PointPair]:
    """Pairs of a template with every other image of the set.

    Args:
        folder: of the data set.
        template: name of the template image; the first of each phase in the table where None.

    Returns:
        One pair for each template and query, with the landmarks that both have; `group` is "CE-NC" and the like, "all"
        where the table has no phases.

    Raises:
        InputError: no such folder, table, image or template, or no common landmark.
    """
    root = existing_folder(folder, f"the landmark set: {TABLE} and its images")
    table = root / TABLE
    rows = read_table(existing_file(table, "the landmarks of all images"), ("image", "label"))
    columns = MM if all(name in rows[0] for name in MM) else VOXELS
    if any(name not in rows[0] for name in columns):
        raise InputError(f"{table}: coordinates are missing; use the columns {', '.join(MM)} (or x, y, z in voxels)")
    points: dict[str, dict[str, np.ndarray]] = {}
    phases: dict[str, str] = {}
    files: dict[str, Path] = {}
    for row in rows:
        if not row["image"] or not row["label"]:
            raise InputError(f"{table}: a line without image or label; complete or remove it")
        name = row["image"].strip()
        if name not in files:
            files[name] = _image(root, name)
            phases[name] = (row.get("phase") or "").strip().upper()
        place = np.array([number(row[axis], table, f"{axis} of {row['label']} in {name}") for axis in columns])
        if columns is VOXELS:
            place = grid_of(files[name]).index_to_mm(place)[0]
        points.setdefault(name, {})[row["label"].strip()] = place
    templates = _templates(points, phases, template, table)
    pairs = []
    for own, phase in templates:
        for other in points:
            common = [label for label in points[own] if label in points[other]]
            if other == own or not common:
                continue
            group = f"{phase}-{phases[other]}" if phase and phases[other] else "all"
            pairs.append(PointPair(
                f"{own} > {other}", files[own], files[other], common,
                np.array([points[own][label] for label in common]),
                np.array([points[other][label] for label in common]), group, ("ct", "ct"),
            ))  # fmt: skip
    if not pairs:
        raise InputError(f"{table}: no landmark is common to the template and another image; check the labels")
    return pairs


def _templates(
    points: dict[str, dict[str, np.ndarray]], phases: dict[str, str], template: str | None, table: Path
) -> list[tuple[str, str]]:
    if template is not None:
        if template not in points:
            raise InputError(f"{table}: no image {template!r}; it has {', '.join(list(points)[:5])}")
        return [(template, phases[template])]
    first: dict[str, str] = {}
    for name, phase in phases.items():
        first.setdefault(phase, name)
    return [(name, phase) for phase, name in first.items()]


def _image(root: Path, name: str) -> Path:
    names = [name] if name.endswith(IMAGE_ENDINGS) else [name + ending for ending in IMAGE_ENDINGS]
    places = [root / sub / file for sub in ("images", ".") for file in names]
    found = next((path for path in places if path.is_file()), None)
    return found or existing_file(places[0], f"an image that {TABLE} names")
