"""`uae bench landmarks | lesions | registration --dataset DIR`: the papers' table rows on data in public layouts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.bench.datasets import landmarks, learn2reg, lesions, paired, totalsegmentator
from uae.bench.datasets.common import ImagePair, PointPair, existing_folder, grid_of, read_scan
from uae.bench.embedding import write_json
from uae.bench.metrics_field import landmark_row, lesion_row
from uae.bench.metrics_surface import surface_distances
from uae.bench.tables import table
from uae.embedding import Embedding, embed
from uae.errors import InputError
from uae.files import atomic_path
from uae.json_values import plain
from uae.matching import inside_scan, match_points
from uae.preprocess import body_mask
from uae.progress import Cancel, Progress, check_cancel, report
from uae.quality import dice, jacobian_statistics
from uae.registration.pipeline import RegisterOptions, register
from uae.transform import Transform
from uae.volume import Volume, resample

if TYPE_CHECKING:
    from uae.models import Model

logger = logging.getLogger(__name__)

WAYS = ("nearest", "fixed-point")
VOXEL_MM = 2.0
"""The papers' working grid, in whose voxels P0 gives its CT-MR table."""
LANDMARK_COLUMNS = (
    "points", "med_mm", "med_std_mm", "max_mm", "med_x_mm", "med_y_mm", "med_z_mm", "within_5mm", "within_10mm",
    "missed",
)  # fmt: skip
LESION_COLUMNS = (
    "points", "cpm_10mm_dlt", "cpm_10mm_tlt", "cpm_radius_dlt", "cpm_radius_tlt", "in_box", "med_x_mm", "med_y_mm",
    "med_z_mm", "med_mm", "med_std_mm", "missed",
)  # fmt: skip
REGISTRATION_COLUMNS = (
    "pairs", "med_mm", "med_std_mm", "med_voxels", "max_mm", "dice", "mda_mm", "hd95_mm", "folding", "refused",
)  # fmt: skip


def point_pairs(
    kind: str, folder: str | Path, split: str | None = None, template: str | None = None, reversed_slices: bool = False
) -> list[PointPair]:
    """Read a data set of points in whichever layout it has.

    Args:
        kind: "landmarks" (chest CT table or TotalSegmentator) or "lesions" (DLS).
        folder: of the data set.
        split: the adapter's default where None.
        template: the template image or subject.
        reversed_slices: see `lesions.read_lesions`.

    Raises:
        InputError: no known layout, or what the adapter says.
    """
    root = existing_folder(folder, "the data set")
    given = {} if split is None else {"split": split}
    if kind == "lesions":
        return lesions.read_lesions(root, reversed_slices=reversed_slices, **given)
    if landmarks.is_layout(root):
        return landmarks.read_landmarks(root, template)
    if totalsegmentator.is_layout(root):
        return totalsegmentator.read_pairs(root, template=template, **given)
    raise InputError(
        f"{root}: no known layout; wanted is {landmarks.TABLE} with its images, or TotalSegmentator's sub-folders"
    )


def image_pairs(folder: str | Path, split: str | None = None) -> list[ImagePair]:
    """Read a data set of image pairs: Learn2Reg, or CT-MR folders with painted landmarks.

    Raises:
        InputError: no known layout, or what the adapter says.
    """
    root = existing_folder(folder, "the data set")
    if learn2reg.is_layout(root):
        return learn2reg.read_pairs(root, **({} if split is None else {"split": split}))
    if paired.is_layout(root):
        return paired.read_pairs(root)
    raise InputError(
        f"{root}: no known layout; wanted is Learn2Reg's *dataset.json, or sub-folders with ct, mr and landmark maps"
    )


def run_points(
    pairs: Sequence[PointPair], model: Model, kind: str, device: str = "auto", limit: int | None = None,
    json_path: str | Path | None = None, progress: Progress | None = None, cancel: Cancel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Match the points of every pair and give the table rows.

    Args:
        pairs: of an adapter.
        model: the weights.
        kind: "landmarks" or "lesions", which decides the columns.
        device: where the network runs.
        limit: only this many pairs.
        json_path: written after every pair, and a Markdown table beside it at the end.
        progress: told the share of pairs done, stage "bench".
        cancel: asked between pairs.

    Returns:
        `<group>.<way>`: the columns of the papers; `missed`: points that lie outside their template scan and were not
        searched; `meta`.

    Raises:
        InputError: a scan cannot be read.
    """
    chosen = pairs[:limit]
    found: list[dict[str, Any]] = []
    cache: dict[Path, Embedding] = {}
    for count, pair in enumerate(chosen):
        check_cancel(cancel)
        report(progress, "bench", count / len(chosen))
        template, query = (
            _embedded(p, m, model, device, cache) for p, m in zip((pair.template, pair.query), pair.modalities)
        )
        found.append(_matched(pair, template, query, model, cancel))
        if json_path is not None:
            write_json(json_path, _point_tables(found, model, kind))
    result = _point_tables(found, model, kind)
    columns = LESION_COLUMNS if kind == "lesions" else LANDMARK_COLUMNS
    _write(result, json_path, f"uae bench {kind}", lambda own: table(own, columns, "way"))
    report(progress, "bench", 1.0)
    return result


def _embedded(path: Path, modality: str, model: Model, device: str, cache: dict[Path, Embedding]) -> Embedding:
    """A scan's embedding; the last few are kept, as pairs of one patient follow each other."""
    if path not in cache:
        while len(cache) >= 3:
            cache.pop(next(iter(cache)))
        cache[path] = embed(read_scan(path, modality), model, device)
    return cache[path]


def _matched(
    pair: PointPair, template: Embedding, query: Embedding, model: Model, cancel: Cancel | None
) -> dict[str, Any]:
    inside = inside_scan(template, pair.template_points)
    rows = np.flatnonzero(inside)
    record: dict[str, Any] = {"pair": pair, "missed": len(inside) - len(rows), "rows": rows, "ways": {}, "in_box": {}}
    for way in WAYS:
        places = np.zeros((0, 3))
        if inside.any():
            limits = model.thresholds.get("match")
            matches = match_points(
                template, query, pair.template_points[inside], method=way, limits=limits, cancel=cancel
            )
            places = np.array([match.point_mm for match in matches])
        record["ways"][way] = places
        if "box" in pair.figures:
            record["in_box"][way] = lesions.in_box(pair, places, grid_of(pair.query))
    return record


def _point_tables(records: Sequence[Mapping[str, Any]], model: Model, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for group in dict.fromkeys(record["pair"].group for record in records):
        own = [record for record in records if record["pair"].group == group and len(record["rows"])]
        missed = sum(record["missed"] for record in records if record["pair"].group == group)
        result[group] = {way: _point_row(own, way, kind) | {"missed": missed} for way in WAYS} if own else {}
    return plain({**result, "meta": _meta(model, len(records))})


def _point_row(records: Sequence[Mapping[str, Any]], way: str, kind: str) -> dict[str, Any]:
    places = np.concatenate([record["ways"][way] for record in records])
    truth = np.concatenate([record["pair"].query_points[record["rows"]] for record in records])
    if kind != "lesions":
        return landmark_row(places, truth)
    radius, size = (
        np.concatenate([record["pair"].figures[name][record["rows"]] for record in records])
        for name in ("radius_mm", "size_mm")
    )
    in_box = np.concatenate([record["in_box"][way] for record in records])
    return lesion_row(places, truth, radius, size, in_box)


def run_registrations(
    pairs: Sequence[ImagePair], model: Model, deformable: bool = True, device: str = "auto", threads: int = 2,
    limit: int | None = None, json_path: str | Path | None = None, progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Register every pair and give the table rows before, after each step.

    Args:
        pairs: of an adapter.
        model: the weights.
        deformable: also run DEEDS.
        device: where the network runs.
        threads: of the solver.
        limit: only this many pairs.
        json_path: written after every pair, and a Markdown table beside it at the end.
        progress: told the share of pairs done, stage "bench".
        cancel: asked inside the pairs.

    Returns:
        `steps.<initial|rigid|refined|deformable>`: errors of points over all pairs in mm and 2 mm voxels, Dice, MDA and
        HD95 as means over labels and pairs, the highest folding, refused pairs (whose candidate counts all the same);
        `pairs.<name>` with each pair's own; `meta`.

    Raises:
        InputError: a scan cannot be read.
    """
    chosen = pairs[:limit]
    done: dict[str, dict[str, Any]] = {}
    for count, pair in enumerate(chosen):
        check_cancel(cancel)
        report(progress, "bench", count / len(chosen))
        scans = [read_scan(path, modality) for path, modality in zip((pair.fixed, pair.moving), pair.modalities)]
        options = RegisterOptions(deformable=deformable, device=device, threads=threads)
        outcome = register(*scans, model, options, cancel=cancel)
        first = None if outcome.adareg is None else outcome.adareg.transform
        steps: dict[str, Transform | None] = {"initial": None, "rigid": first, "refined": outcome.linear}
        if deformable:
            steps["deformable"] = outcome.transform
        labels = _labels(pair)
        done[pair.name] = {"status": outcome.status, "reason": outcome.reason, "steps": {}}
        for step, transform in steps.items():
            if step != "initial" and transform is None:
                continue
            done[pair.name]["steps"][step] = _judged(pair, labels, transform)
        if outcome.field is not None:
            body = Volume(body_mask(scans[0]).astype(np.uint8), scans[0].geometry)
            inside = resample(body, outcome.field.geometry, fill=0, order=0).array > 0
            done[pair.name]["steps"]["deformable"]["folding"] = jacobian_statistics(outcome.field, inside)["folding"]
        if json_path is not None:
            write_json(json_path, _registration_tables(done, model))
    result = _registration_tables(done, model)
    _write(
        result, json_path, "uae bench registration", lambda own: table(own, REGISTRATION_COLUMNS, "step"), ("steps",)
    )
    report(progress, "bench", 1.0)
    return result


def _labels(pair: ImagePair) -> tuple[Volume, Volume] | None:
    """Label maps of the fixed and the moving scan, None where the data have none."""
    if pair.fixed_labels is None or pair.moving_labels is None:
        return None
    return Volume.read(pair.fixed_labels, label=True), Volume.read(pair.moving_labels, label=True)


def _judged(pair: ImagePair, labels: tuple[Volume, Volume] | None, transform: Transform | None) -> dict[str, Any]:
    """Errors of one step (None: the scans as they are): points carried from moving to fixed, labels resampled once."""
    figures: dict[str, Any] = {}
    if pair.fixed_points is not None and pair.moving_points is not None:
        places = pair.moving_points if transform is None else transform.inverse().apply(pair.moving_points)
        figures["offset_mm"] = np.round(places - pair.fixed_points, 3)
    if labels is not None:
        truth, moving = labels
        carried = resample(moving, truth.geometry, transform, fill=0, order=0)
        overlap = dice(truth.array, carried.array)
        apart = surface_distances(truth.array, carried.array, truth.geometry)
        figures |= {"dice": _mean(overlap.values()), "dice_by_label": overlap}
        if apart:
            figures |= {key: _mean(d[key] for d in apart.values()) for key in ("mda_mm", "hd95_mm")}
    return figures


def _registration_tables(done: Mapping[str, Mapping[str, Any]], model: Model) -> dict[str, Any]:
    steps: dict[str, Any] = {}
    for step in dict.fromkeys(name for one in done.values() for name in one["steps"]):
        own = [one["steps"][step] for one in done.values() if step in one["steps"]]
        row: dict[str, Any] = {"pairs": len(own)}
        offsets = [np.asarray(figures["offset_mm"], float) for figures in own if "offset_mm" in figures]
        if offsets:
            together = np.concatenate(offsets)
            row |= landmark_row(together, np.zeros_like(together))
            row["med_voxels"] = row["med_mm"] / VOXEL_MM
        for key in ("dice", "mda_mm", "hd95_mm"):
            values = [figures[key] for figures in own if figures.get(key) is not None]
            row |= {key: _mean(values)} if values else {}
        folds = [figures["folding"] for figures in own if "folding" in figures]
        row |= {"folding": max(folds)} if folds else {}
        row["refused"] = sum(one["status"] == "refused" for one in done.values())
        steps[step] = row
    return plain({"steps": steps, "pairs": done, "meta": _meta(model, len(done))})


def _mean(values: Iterable[float]) -> float:
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else math.nan


def _meta(model: Model, pairs: int) -> dict[str, Any]:
    return {"date": date.today().isoformat(), "pairs": pairs, "model": model.name, "model_version": model.version,
            "model_sha256": model.sha256}  # fmt: skip


def _write(
    result: Mapping[str, Any], json_path: str | Path | None, title: str,
    lines_of: Callable[[Mapping[str, Any]], list[str]], groups: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """The JSON, and beside it the same tables as Markdown."""
    if json_path is None:
        return
    write_json(json_path, result)
    meta = result["meta"]
    lines = [f"# `{title}`, {meta['date']}", "", f"{meta['pairs']} pairs, {meta['model']} {meta['model_version']}."]
    for name in groups or [name for name in result if name != "meta"]:
        if result[name]:
            lines += ["", f"## {name}", "", *lines_of(result[name])]
    with atomic_path(Path(json_path).with_suffix(".md")) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
