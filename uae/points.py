"""Point lists: 3D Slicer's .mrk.json and .fcsv in either coordinate system, and plain .csv in LPS millimetres."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uae.errors import InputError
from uae.files import atomic_path
from uae.geometry import as_points

logger = logging.getLogger(__name__)

CSV_HEADER = ("label", "x_lps_mm", "y_lps_mm", "z_lps_mm")
POINT_SUFFIXES = (".mrk.json", ".fcsv", ".csv")
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])
FCSV_SYSTEMS = {"LPS": "LPS", "RAS": "RAS", "1": "LPS", "0": "RAS"}
"""Slicer before 4.11 wrote numbers: 0 is RAS, 1 is LPS."""
FCSV_COLUMNS = ["id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "associatedNodeID"]
SCHEMA = (
    "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
    "markups-schema-v1.0.3.json#"
)
ORIENTATION_LPS = [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0]
"""What Slicer itself writes for an unrotated control point: RAS axes expressed in LPS."""


@dataclass
class PointSet:
    """Named points.

    Attributes:
        labels: N names, as in the file.
        points: (N, 3) LPS mm, float64.
    """

    labels: list[str]
    points: np.ndarray


def is_point_file(path: str | Path) -> bool:
    """Whether the name ends like a point list that can be read."""
    return str(path).lower().endswith(POINT_SUFFIXES)


def read_points(path: str | Path) -> PointSet:
    """Read .mrk.json, .fcsv or .csv.

    Args:
        path: .mrk.json and .fcsv obey the coordinate system they name; .csv has the header
            label,x_lps_mm,y_lps_mm,z_lps_mm (further columns are ignored).

    Returns:
        The points in the order of the file; control points that were never placed are left out.

    Raises:
        InputError: missing, damaged, empty, without coordinate system, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such point file; check the path")
    name = path.name.lower()
    try:
        text = path.read_text(encoding="utf-8-sig")
        if name.endswith(".json"):
            labels, points = _parse_markups(path, text)
        elif name.endswith(".fcsv"):
            labels, points = _parse_fcsv(path, text)
        elif name.endswith(".csv"):
            labels, points = _parse_csv(path, text)
        else:
            raise InputError(f"{path}: points are read from {', '.join(POINT_SUFFIXES)}; convert the file")
        array = as_points(np.array(points, dtype=np.float64))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, csv.Error) as error:
        raise InputError(f"{path}: damaged point file ({error}); save it again from 3D Slicer") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file's rights") from error
    if len(array) == 0:
        raise InputError(f"{path}: no placed points in the file; place at least one point")
    if not np.all(np.isfinite(array)):
        bad = labels[int(np.argmin(np.isfinite(array).all(axis=1)))]
        raise InputError(f"{path}: point {bad!r} has a coordinate that is not a finite number; correct it")
    return PointSet(labels, array)


def _to_lps(path: Path, system: str, points: list[list[float]]) -> list[np.ndarray]:
    if system not in ("LPS", "RAS"):
        raise InputError(f"{path}: coordinate system {system or 'missing'!r}; LPS or RAS is needed, save it again")
    if any(len(p) != 3 for p in points):
        raise ValueError("a position needs three numbers")
    flip = RAS_TO_LPS if system == "RAS" else np.ones(3)
    return [np.asarray(p, dtype=np.float64) * flip for p in points]


def _parse_markups(path: Path, text: str) -> tuple[list[str], list[np.ndarray]]:
    labels: list[str] = []
    points: list[np.ndarray] = []
    for markup in json.loads(text)["markups"]:
        unit = markup.get("coordinateUnits", "mm")
        if unit != "mm" and unit != ["mm", "mm", "mm"]:
            raise InputError(f"{path}: coordinates in {unit}; millimetres are needed, save the file again")
        all_points = markup.get("controlPoints", [])
        placed = [p for p in all_points if p.get("positionStatus", "defined") == "defined"]
        left_out = len(all_points) - len(placed)
        if left_out:
            logger.warning("%s: %d control points were never placed and are left out", path, left_out)
        points += _to_lps(path, str(markup.get("coordinateSystem", "")), [p["position"] for p in placed])
        labels += [str(p.get("label") or p.get("id") or i + 1) for i, p in enumerate(placed)]
    return labels, points


def _parse_fcsv(path: Path, text: str) -> tuple[list[str], list[np.ndarray]]:
    system = ""
    columns = FCSV_COLUMNS
    rows: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            rows.append(line)
            continue
        key, _, value = line[1:].partition("=")
        if key.strip().lower() == "coordinatesystem":
            system = FCSV_SYSTEMS.get(value.strip().upper(), value.strip())
        elif key.strip().lower() == "columns":
            columns = [c.strip() for c in value.split(",")]
    at = {name: columns.index(name) for name in ("x", "y", "z", "label")}
    labels: list[str] = []
    points: list[list[float]] = []
    for row in csv.reader(rows):
        if row:
            points.append([float(row[at[axis]]) for axis in "xyz"])
            labels.append(row[at["label"]] if len(row) > at["label"] and row[at["label"]] else str(len(points)))
    return labels, _to_lps(path, system, points)


def _parse_csv(path: Path, text: str) -> tuple[list[str], list[list[float]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    present = [name.strip() for name in reader.fieldnames or []]
    if not set(CSV_HEADER) <= set(present):
        raise InputError(f"{path}: the first line must be the header {','.join(CSV_HEADER)} (points in LPS mm); add it")
    reader.fieldnames = present
    rows = list(reader)
    return [str(r["label"]) for r in rows], [[float(r[name]) for name in CSV_HEADER[1:]] for r in rows]


def write_points(
    path: str | Path,
    labels: Sequence[str],
    points: np.ndarray,
    table: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write .mrk.json, .fcsv or .csv in LPS, whole or not at all.

    Args:
        path: the file.
        labels: N names.
        points: (N, 3) LPS mm; a point with NaN is written as not placed.
        table: N mappings of further columns (score, cycle_mm, method, confident, reason, ...): columns in a .csv, the
            description "name=value; ..." in the others.

    Raises:
        InputError: unknown suffix or no permission.
        ResourceError: the disk is full.
    """
    path = Path(path)
    name = path.name.lower()
    points = as_points(points)
    rows = [dict(row) for row in table] if table is not None else [{} for _ in labels]
    if not len(labels) == len(points) == len(rows):
        raise ValueError(f"{len(labels)} labels, {len(points)} points and {len(rows)} table rows")
    if name.endswith(".json"):
        text = _format_markups(labels, points, rows)
    elif name.endswith(".fcsv"):
        text = _format_fcsv(labels, points, rows)
    elif name.endswith(".csv"):
        text = _format_csv(labels, points, rows)
    else:
        raise InputError(f"{path}: points are written as {', '.join(POINT_SUFFIXES)}; choose one of these endings")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def _value(value: Any) -> str:
    """One cell of the table as text."""
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, np.ndarray)):
        return " ".join(_value(v) for v in value)
    return str(value)


def _description(row: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}={_value(value)}" for key, value in row.items())


def _format_markups(labels: Sequence[str], points: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> str:
    control_points = []
    for number, (label, point, row) in enumerate(zip(labels, points, rows), start=1):
        placed = bool(np.all(np.isfinite(point)))
        control_points.append(
            {
                "id": str(number),
                "label": str(label),
                "description": _description(row),
                "associatedNodeID": "",
                "position": [float(v) for v in point] if placed else [0.0, 0.0, 0.0],
                "orientation": ORIENTATION_LPS,
                "selected": True,
                "locked": False,
                "visibility": True,
                "positionStatus": "defined" if placed else "undefined",
            }
        )
    markup = {
        "type": "Fiducial",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": len(control_points),
        "controlPoints": control_points,
    }
    return json.dumps({"@schema": SCHEMA, "markups": [markup]}, indent=2, ensure_ascii=False) + "\n"


def _format_fcsv(labels: Sequence[str], points: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    stream.write("# Markups fiducial file version = 5.0\n# CoordinateSystem = LPS\n")
    stream.write(f"# columns = {','.join(FCSV_COLUMNS)}\n")
    writer = csv.writer(stream, lineterminator="\n")
    for number, (label, point, row) in enumerate(zip(labels, points, rows), start=1):
        if np.all(np.isfinite(point)):
            position = [f"{v:.6f}" for v in point]
            writer.writerow([number, *position, 0, 0, 0, 1, 1, 1, 0, label, _description(row), ""])
    return stream.getvalue()


def _format_csv(labels: Sequence[str], points: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> str:
    extra: list[str] = []
    for row in rows:
        extra += [key for key in row if key not in extra and key not in CSV_HEADER]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_HEADER, *extra])
    for label, point, row in zip(labels, points, rows):
        writer.writerow([label, *(f"{v:.6f}" for v in point), *(_value(row.get(key)) for key in extra)])
    return stream.getvalue()
