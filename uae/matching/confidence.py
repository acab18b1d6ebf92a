"""When a match may be trusted: every calibrated limit of the model must pass (a confident wrong match is the worst)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TESTS = (
    ("score", "similarity", 1, ""),
    ("margin", "margin over the best place farther than 20 mm", 1, ""),
    ("cycle_mm", "forward-backward distance", -1, " mm"),
    ("fixed_points", "number of fixed points", 1, ""),
    ("residual_mm", "residual of the fixed points", -1, " mm"),
)
"""Key, words, sign (1: at least, -1: at most), unit."""


def limits_for(limits: Mapping[str, Any] | None, method: str) -> dict[str, float]:
    """Limits of one method: the common keys, replaced by those under the method's own name where a model has them.

    {"score": 0.7, "guided": {"margin": -0.2}} gives guided matches both limits and all others only the first.
    """
    common = {key: value for key, value in (limits or {}).items() if not isinstance(value, Mapping)}
    own = (limits or {}).get(method)
    return {**common, **own} if isinstance(own, Mapping) else common


def judge(values: Mapping[str, float | None], limits: Mapping[str, float]) -> tuple[bool, str]:
    """Are all limits met, and if not, why not (one line).

    values: score, margin, cycle_mm, fixed_points, residual_mm; None where it could not be measured, which fails its
    limit. limits: calibrated by the model; score, margin and fixed_points are smallest, cycle_mm and residual_mm
    largest allowed values; a missing key is not tested, and without any key nothing is ever confident.
    """
    tested = [test for test in _TESTS if limits.get(test[0]) is not None]
    if not tested:
        return False, "model is not calibrated"
    failures = []
    for key, words, sign, unit in tested:
        value, limit = values.get(key), float(limits[key])
        if value is None:
            failures.append(f"{words} could not be measured")
        elif not sign * value >= sign * limit:
            digits = 0 if key == "fixed_points" else 1 if unit else 3
            compare = "below" if sign > 0 else "above"
            failures.append(f"{words} {value:.{digits}f}{unit} is {compare} {limit:.{digits}f}{unit}")
    return not failures, "; ".join(failures)
