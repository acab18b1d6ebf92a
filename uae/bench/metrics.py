"""Figures of the benchmarks, computed from plain records so that new thresholds need no new run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uae.json_values import plain
from uae.matching import judge, limits_for
from uae.registration.adareg import ACCEPTED, REFUSED, REVIEW, verdict_of
from uae.transform import Transform

MATCH_LIMIT_MM = 10.0
RIGID_SUCCESS_MM = 5.0
"""Embedding's rigid before refinement: TRE up to floor + 5 mm counts as success (the standard sets have floor 0)."""
CONFIDENT_FAILURE_MM = 10.0
"""An accepted registration farther than floor + 10 mm from the truth is a confident failure."""


def transform_tre(transform: Transform | None, moving_points: np.ndarray, fixed_points: np.ndarray) -> float:
    """Mean distance (mm) between where a registration puts moving points in the fixed scan and where they belong.

    Args:
        transform: fixed -> moving, or None where there is no estimate (infinitely wrong).
        moving_points: (N, 3) mm in the moving scan.
        fixed_points: (N, 3) mm, their true places.
    """
    if transform is None:
        return math.inf
    return float(np.linalg.norm(transform.inverse().apply(moving_points) - fixed_points, axis=1).mean())


def point_errors(errors_mm: np.ndarray) -> dict[str, float]:
    """median_mm, under_10mm (share), mean_mm, p95_mm of match errors (N,) mm."""
    errors = np.asarray(errors_mm, dtype=np.float64)
    return {
        "median_mm": float(np.median(errors)),
        "under_10mm": float((errors <= MATCH_LIMIT_MM).mean()),
        "mean_mm": float(errors.mean()),
        "p95_mm": float(np.percentile(errors, 95)),
    }


def relation_verdict(case: Mapping[str, Any], limits: Mapping[str, Any] | None) -> str:
    """Verdict on how two scans were related under given limits; matching sees this one, as it does not refine."""
    features = case["registration"]["features"]
    if not features:
        return REFUSED
    figures = {name: math.nan if value is None else value for name, value in features.items()}
    return verdict_of(figures, limits)[0]


def verdict_of_case(case: Mapping[str, Any], limits: Mapping[str, Any] | None) -> str:
    """Verdict of a recorded registration under given limits; a runaway refinement makes it review at most."""
    verdict = relation_verdict(case, limits)
    return REVIEW if verdict == ACCEPTED and case.get("refined", {}).get("failed") else verdict


def is_confident(match: Mapping[str, Any], limits: Mapping[str, Any] | None) -> bool:
    """Whether a recorded match is confident under a model's match limits."""
    return bool(match["eligible"]) and judge(match, limits_for(limits, match["method"]))[0]


def auto_matches(case: Mapping[str, Any], limits: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What the method "auto" gives: guided, or the free search where the pair is refused."""
    return list(case["fixed_point"] if relation_verdict(case, limits) == REFUSED else case["guided"])


def confident_matches(case: Mapping[str, Any], thresholds: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The matches of "auto" that a user would see as confident; guided ones only where the pair is accepted."""
    matches = auto_matches(case, thresholds.get("registration"))
    sure = [match for match in matches if is_confident(match, thresholds.get("match"))]
    if relation_verdict(case, thresholds.get("registration")) != ACCEPTED:
        sure = [match for match in sure if not match["method"].startswith("guided")]
    return sure


def _number(value: float | None) -> float:
    """A recorded figure; None stands for no estimate, which is infinitely wrong."""
    return math.inf if value is None else float(value)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def summarise(cases: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Figures of one set.

    Args:
        cases: records of `uae.bench.embedding.run_case`.
        thresholds: a model's {"registration": ..., "match": ...}; verdicts and confidence are judged by them here, so
            they may differ from those under which the cases ran.

    Returns:
        The keys of the contract and a few more; point figures by case, then averaged; TREs as medians over cases.
    """
    thresholds = thresholds or {}
    near = [case["nearest"] for case in cases]
    result: dict[str, Any] = {"cases": len(cases)}
    for key in ("median_mm", "under_10mm", "mean_mm", "p95_mm"):
        result[key] = _mean(entry[key] for entry in near)
    auto = [auto_matches(case, thresholds.get("registration")) for case in cases]
    records = {
        "fixed_point": [case["fixed_point"] for case in cases],
        "guided": auto,
        "nearest_same_points": [case["nearest_same_points"] for case in cases],
    }
    for method, by_case in records.items():
        errors = [[match["error_mm"] for match in own] for own in by_case if own]
        figures = [point_errors(np.array(values)) for values in errors]
        for key in ("median_mm", "under_10mm", "mean_mm", "p95_mm"):
            result[f"{method}_{key}"] = _mean(entry[key] for entry in figures)

    floor = np.array([case["floor_mm"] for case in cases])
    rigid = np.array([_number(case["registration"]["tre_mm"]) for case in cases])
    refined = np.array([_number(case["refined"]["tre_mm"]) for case in cases])
    verdicts = np.array([verdict_of_case(case, thresholds.get("registration")) for case in cases])
    result |= {
        "floor_median_mm": float(np.median(floor)),
        "rigid_success": float((rigid <= floor + RIGID_SUCCESS_MM).mean()),
        "rigid_within_10mm_of_floor": float((rigid <= floor + CONFIDENT_FAILURE_MM).mean()),
        "rigid_median_tre_mm": float(np.median(rigid)),
        "refined_median_tre_mm": float(np.median(refined)),
        "refined_success": float((refined <= floor + RIGID_SUCCESS_MM).mean()),
        "accepted_rate": float((verdicts == ACCEPTED).mean()),
        "review_rate": float((verdicts == REVIEW).mean()),
        "refusal_rate": float((verdicts == REFUSED).mean()),
        "confident_failure_rate": float(((verdicts == ACCEPTED) & (refined > floor + CONFIDENT_FAILURE_MM)).mean()),
    }
    matches = [match for own in auto for match in own]
    sure = [match for case in cases for match in confident_matches(case, thresholds)]
    result["confident_share"] = len(sure) / max(len(matches), 1)
    over = sum(match["error_mm"] > MATCH_LIMIT_MM for match in sure)
    result["confident_over_10mm"] = over / len(sure) if sure else 0.0
    result["seconds_per_case"] = _mean(sum(case["seconds"].values()) for case in cases)
    return plain(result)
