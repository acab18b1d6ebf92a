"""Reliability: how often a match of a given similarity, or one called confident, is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.metrics import MATCH_LIMIT_MM, auto_matches, confident_matches, is_confident
from uae.files import atomic_path

BINS = 10
"""Bins of equal counts."""

Records = Sequence[Mapping[str, Any]]


def score_bins(scores: np.ndarray, bins: int = BINS) -> list[np.ndarray]:
    """Numbers of scores (N,) in bins of (almost) equal counts, lowest first; fewer where there are fewer scores."""
    return [part for part in np.array_split(np.argsort(scores, kind="stable"), bins) if len(part)]


def reliability_curve(records: Records, bins: int = BINS) -> list[dict[str, float]]:
    """Share of matches within 10 mm by similarity.

    Args:
        records: match records with `score` and `error_mm`; those without an error are left out.
        bins: of (almost) equal counts, from low to high score; fewer where there are fewer records.

    Returns:
        For each bin {"low", "high", "score" (mean), "matches", "under_10mm"}.
    """
    known = [record for record in records if record["error_mm"] is not None]
    score = np.array([record["score"] for record in known], dtype=np.float64)
    right = np.array([record["error_mm"] <= MATCH_LIMIT_MM for record in known], dtype=np.float64)
    return [
        {
            "low": float(score[part].min()), "high": float(score[part].max()), "score": float(score[part].mean()),
            "matches": len(part), "under_10mm": float(right[part].mean()),
        }
        for part in score_bins(score, bins)
    ]  # fmt: skip


def _shares(sure: Records, rest: Records) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, records in (("confident", sure), ("not_confident", rest)):
        right = [record["error_mm"] <= MATCH_LIMIT_MM for record in records if record["error_mm"] is not None]
        figures |= {f"{name}_matches": len(right), f"{name}_under_10mm": float(np.mean(right)) if right else np.nan}
    return figures


def reliability(result: Mapping[str, Any], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Curves and confident shares from the benchmark's records.

    Args:
        result: the benchmark's JSON.
        thresholds: the model's.

    Returns:
        Source -> {"curve": of `reliability_curve`, "confident_matches", "confident_under_10mm",
        "not_confident_matches", "not_confident_under_10mm"}. Sources: `auto` (what the product gives on the simulated
        sets), `fixed_point` (free search there), and `inter_subject_ct_ct`, `inter_subject_ct_mr` where they were
        measured with side 5.
    """
    limits = thresholds.get("match")
    found: dict[str, Any] = {}
    cases = result.get("cases", [])
    if cases:
        auto = [match for case in cases for match in auto_matches(case, thresholds.get("registration"))]
        sure = [match for case in cases for match in confident_matches(case, thresholds)]
        chosen = {id(match) for match in sure}
        rest = [match for match in auto if id(match) not in chosen]
        found["auto"] = {"curve": reliability_curve(auto), **_shares(sure, rest)}
        found["fixed_point"] = _of([match for case in cases for match in case["fixed_point"]], limits)
    pairs = result.get("inter_subject", {}).get("cases", [])
    for kind in dict.fromkeys(pair["kind"] for pair in pairs):
        own = [match for pair in pairs if pair["kind"] == kind for match in pair["matches"].get("fixed_point_5", [])]
        if own:
            found[f"inter_subject_{kind}"] = _of(own, limits)
    return found


def _of(records: Records, limits: Mapping[str, Any] | None) -> dict[str, Any]:
    sure = [record for record in records if is_confident(record, limits)]
    rest = [record for record in records if not is_confident(record, limits)]
    return {"curve": reliability_curve(records), **_shares(sure, rest)}


def plot_reliability(found: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Draw what `reliability` gives: the curves, and the shares of confident and other matches that are right.

    Args:
        found: by source.
        path: of the picture (.png).

    Raises:
        InputError: no permission.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, figures in found.items():
        curve = figures["curve"]
        left.plot([b["score"] for b in curve], [100 * b["under_10mm"] for b in curve], "o-", ms=4, label=name)
    left.set(xlabel="similarity of the match", ylabel="% within 10 mm", ylim=(-3, 103), title="By similarity")
    left.legend(fontsize=8)
    at = np.arange(len(found))
    for shift, key, label in ((-0.2, "confident", "confident"), (0.2, "not_confident", "not confident")):
        shares = [figures[f"{key}_under_10mm"] for figures in found.values()]
        heights = [0.0 if share is None or not np.isfinite(share) else 100 * share for share in shares]
        bars = right.bar(at + shift, heights, 0.4, label=label)
        right.bar_label(bars, [f"n={figures[f'{key}_matches']}" for figures in found.values()], fontsize=7)
    right.set_xticks(at, list(found), rotation=20, ha="right", fontsize=8)
    right.set(ylim=(0, 112), ylabel="% within 10 mm", title="By verdict")
    right.legend(fontsize=8, loc="lower right")
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path
