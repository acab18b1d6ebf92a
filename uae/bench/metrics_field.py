"""Figures under the names the papers print them, from plain errors: landmarks, lesions, registrations.

What a figure asks and whether it may fail a case stands in `uae.quality`, which also computes TRE, Dice, Jacobian and
inverse consistency; surface distances are in `uae.bench.metrics_surface`, time and memory in `uae.bench.resources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uae.bench.metrics import CONFIDENT_FAILURE_MM, RIGID_SUCCESS_MM
from uae.errors import InputError
from uae.quality import CPM_MM, cpm, med

NEAR_MM, FAR_MM = 5.0, CPM_MM
"""Limits of "% within" in the landmark tables: half of the customary 10 mm, and those."""


def landmark_row(estimated: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """One row of a landmark table (MED +- std, MED_x/y/z, share within 5 and 10 mm, maximum).

    Source: the tables of UAE and SAM (Bai et al.); MED is the mean Euclidean distance, MED_x/y/z the mean absolute
    difference along LPS x (left-right), y (anterior-posterior) and z (cranio-caudal). "Within" includes the limit.

    Args:
        estimated: (N, 3) LPS mm.
        truth: (N, 3) LPS mm.

    Returns:
        `points`; `med_mm`, `med_std_mm`, `median_mm`, `p95_mm`, `max_mm`; `med_x_mm`, `med_y_mm`, `med_z_mm` and their
        `..._std_mm`; `within_5mm`, `within_10mm` as shares 0..1. Standard deviations over N, not N - 1.

    Raises:
        InputError: no points, or lists of different lengths.
    """
    summary = med(estimated, truth)
    difference = np.abs(np.asarray(estimated, dtype=np.float64) - np.asarray(truth, dtype=np.float64))
    distance = np.linalg.norm(difference, axis=1)
    row = {"points": len(distance), "med_mm": summary["mean"], "med_std_mm": summary["std"]}
    row |= {f"{name}_mm": summary[name] for name in ("median", "p95", "max")}
    for index, axis in enumerate("xyz"):
        row |= {f"med_{axis}_mm": summary[axis], f"med_{axis}_std_mm": float(difference[:, index].std())}
    row |= {f"within_{limit:.0f}mm": float((distance <= limit).mean()) for limit in (NEAR_MM, FAR_MM)}
    return row


def lesion_row(
    estimated: np.ndarray, truth: np.ndarray, radius_mm: np.ndarray, size_mm: np.ndarray, in_box: np.ndarray
) -> dict[str, float]:
    """One row of the lesion tracking table, in both published readings of "centre point matching".

    DLT (Cai et al., CVPR 2021, its evaluation script): distance <= min(radius, 10 mm) and distance < radius, the
    strict one. TLT (Tang et al., MICCAI 2022): distance < min(10 mm, size) and distance < size, the lenient one. Box:
    the found point lies in the lesion's box (lower side inclusive, upper exclusive), which UAE's code counts as
    CPM@Radius beside a plain distance <= 10 mm.

    Args:
        estimated: (N, 3) LPS mm, found centres.
        truth: (N, 3) LPS mm.
        radius_mm: (N,) half of the longest RECIST diameter; not finite where the lesion has none, which DLT's script
            counts as half a radius away, that is as a hit at the radius.
        size_mm: (N,) diagonal of the lesion's 3-D box; TLT's script counts it in voxels of its working grid, so its own
            figures are stricter on lesions whose box has a diagonal below 10 of those.
        in_box: bool (N,).

    Returns:
        The keys of `landmark_row` and, as shares 0..1, `cpm_10mm_dlt`, `cpm_radius_dlt`, `cpm_10mm_tlt`,
        `cpm_radius_tlt`, `cpm_10mm_plain`, `in_box`.

    Raises:
        InputError: no lesions, or lists of different lengths.
    """
    radius = np.asarray(radius_mm, dtype=np.float64)
    in_box = np.asarray(in_box, dtype=bool)
    if in_box.shape != (len(np.atleast_1d(radius)),):
        raise InputError(f"there must be one box answer for each lesion, not {in_box.shape}")
    distance = np.linalg.norm(np.asarray(estimated, float) - np.asarray(truth, float), axis=1)
    known = np.isfinite(radius)
    shares = cpm(estimated, truth, FAR_MM, np.where(known, radius, np.maximum(2.0 * distance, 1e-3)), size_mm)
    return {
        **landmark_row(estimated, truth),
        "cpm_10mm_dlt": shares["dlt_at_limit"], "cpm_radius_dlt": shares["dlt_at_radius"],
        "cpm_10mm_tlt": shares["tlt_at_limit"], "cpm_radius_tlt": shares["tlt_at_radius"],
        "cpm_10mm_plain": float((distance <= FAR_MM).mean()), "in_box": float(in_box.mean()),
    }  # fmt: skip


def registration_row(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Success and confident failure of one system over a set of cases.

    Definitions of the contract, section 6: success = TRE <= floor + 5 mm, floor being what the best rigid leaves (0
    without deformation); no estimate counts as failure. Confident failure = accepted and TRE > floor + 10 mm; a system
    without verdicts accepts everything it returns.

    Args:
        cases: records with `tre_mm` (None without an estimate), `floor_mm`, `status` (accepted, review, refused or
            failed), and where measured `seconds`, `cpu_seconds`, `peak_mb`, `before_refinement_mm`.

    Returns:
        `cases`; as shares 0..1 `success_rate`, `within_10mm_of_floor`, `refusal_rate`, `review_rate`,
        `confident_failure_rate`, `no_estimate_rate`; in mm `median_tre_mm` (None where most cases have no estimate),
        `median_tre_before_refinement_mm`, `p95_tre_mm`; `median_seconds`, `median_cpu_seconds`, highest `peak_mb`.

    Raises:
        InputError: no cases.
    """
    if not cases:
        raise InputError("there are no cases to summarise")
    tre = np.array([_or_inf(case["tre_mm"]) for case in cases])
    floor = np.array([float(case["floor_mm"]) for case in cases])
    status = np.array([case["status"] for case in cases])
    row: dict[str, Any] = {
        "cases": len(cases),
        "success_rate": float((tre <= floor + RIGID_SUCCESS_MM).mean()),
        "median_tre_mm": _finite(np.median(tre)),
        "p95_tre_mm": _finite(np.percentile(tre, 95, method="higher")),
        "within_10mm_of_floor": float((tre <= floor + CONFIDENT_FAILURE_MM).mean()),
        "refusal_rate": float((status == "refused").mean()),
        "review_rate": float((status == "review").mean()),
        "confident_failure_rate": float(((status == "accepted") & (tre > floor + CONFIDENT_FAILURE_MM)).mean()),
        "no_estimate_rate": float(np.isinf(tre).mean()),
    }
    before = [_or_inf(case["before_refinement_mm"]) for case in cases if "before_refinement_mm" in case]
    if before:
        row["median_tre_before_refinement_mm"] = _finite(np.median(before))
    for key, name, how in (
        ("seconds", "median_seconds", np.median), ("cpu_seconds", "median_cpu_seconds", np.median),
        ("peak_mb", "peak_mb", np.max), ("gpu_peak_mb", "gpu_peak_mb", np.max),
    ):  # fmt: skip
        values = [float(case[key]) for case in cases if case.get(key) is not None]
        if values:
            row[name] = float(how(values))
    return row


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log(value) over log(size), 1 = proportional; None with fewer than two sizes or a value <= 0."""
    sizes, values = np.asarray(sizes, float), np.asarray(values, float)
    if len(np.unique(sizes)) < 2 or (values <= 0).any():
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _or_inf(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
