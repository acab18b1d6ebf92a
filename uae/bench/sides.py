"""Fixed-point matching with seed cubes of several sides against the nearest neighbour, on the simulated sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uae.bench.data import VALIDATION_CTS
from uae.bench.embedding import case_points, case_seed
from uae.bench.metrics import point_errors
from uae.bench.study import FAILURE_MM, Setup, Study
from uae.json_values import plain
from uae.preprocess import body_mask
from uae.simulate import SETS, simulate_mr

CASES, QUICK_CASES = 5, 1
"""Simulated scans for every validation CT and set: the first ones of the benchmark."""
POINTS, QUICK_POINTS = 60, 20
"""Points a case: the first ones of the benchmark's."""
FIGURES = ("median_mm", "mean_mm", "p95_mm", "under_10mm")


def _count(setup: Setup) -> int:
    return QUICK_POINTS if setup.quick else POINTS


def side_cases(setup: Setup) -> list[str]:
    """Cases "CT SET SEED", those of one CT together."""
    count = QUICK_CASES if setup.quick else CASES
    return [f"{ct} {name} {case_seed(ct, k)}" for ct in VALIDATION_CTS for name in SETS for k in range(count)]


def measure_sides(setup: Setup, name: str) -> dict[str, Any]:
    """One simulated scan matched into its CT: {"ct", "set", "seed", "matches": {method: records}}."""
    subject, set_name, seed = name.split()

    def load() -> tuple:
        ct = setup.data.ct(subject)
        return ct, body_mask(ct), setup.embed(ct)

    ct, body, fixed = setup.remember(subject, load)
    pair = simulate_mr(ct, int(seed), set_name, body)
    points, truth = case_points(pair, _count(setup))
    matches = setup.records(setup.embed(pair.moving, cache=False), fixed, points, truth)
    return {"ct": subject, "set": set_name, "seed": int(seed), "matches": matches}


def summarise_sides(records: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any] | None = None) -> dict:
    """By set and method: median_mm, mean_mm, p95_mm, under_10mm, failures (share over 20 mm); by case, then averaged.

    Args:
        records: of `measure_sides`.
        thresholds: not used; confidence is no matter of this study.
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys(record["set"] for record in records):
        own = [record["matches"] for record in records if record["set"] == name]
        result[name] = {"cases": len(own)}
        for method in own[0]:
            by_case = [[match["error_mm"] for match in matches[method]] for matches in own]
            figures = [point_errors(errors) for errors in by_case]
            result[name][method] = {key: sum(f[key] for f in figures) / len(figures) for key in FIGURES}
            shares = [sum(error > FAILURE_MM for error in errors) / len(errors) for errors in by_case]
            result[name][method]["failures"] = sum(shares) / len(shares)
    return plain(result)


SIDES_STUDY = Study(
    "sides", side_cases, measure_sides, summarise_sides,
    lambda setup: {"sides": setup.sides, "points": _count(setup)},
)  # fmt: skip
