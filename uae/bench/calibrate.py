"""A model's limits from measured cases: when a registration is accepted or refused, when a match is confident.

Limits are boxes (every figure above or below its own limit) because their reasons can be told to a user in words.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uae.bench.metrics import (
    CONFIDENT_FAILURE_MM,
    MATCH_LIMIT_MM,
    auto_matches,
    confident_matches,
    relation_verdict,
    summarise,
    verdict_of_case,
)
from uae.bench.negatives import NO_OVERLAP, OTHER_SUBJECT
from uae.registration.adareg import ACCEPTED, REFUSED

logger = logging.getLogger(__name__)

FIGURES = {
    "inliers": 1,
    "inlier_share": 1,
    "spread_mm": 1,
    "heldout_within_10mm": 1,
    "heldout_log10_p": -1,
    "runner_up_ratio": -1,
    "stability_mm": -1,
    "similarity_gain": 1,
    "hypothesis_score": 1,
    "hypothesis_margin": 1,
}
"""Figures of a registration that may carry a limit; 1: at least, -1: at most."""

LEAST = {
    "review": {"inliers": 12.0, "spread_mm": 6.0, "heldout_within_10mm": 0.1, "heldout_log10_p": -4.0},
    "accepted": {"spread_mm": 16.0, "heldout_within_10mm": 0.15, "heldout_log10_p": -8.0, "runner_up_ratio": 0.5},
}
"""No limit is looser than these whatever the data say: a dozen matches within a vertebra fix no rotation, the held-out
matches must agree beyond chance, and the second best place may have half the support of the best. Matches close
together also fit the next vertebra: a fresh case with a spread of 14 mm had slipped by 30 mm. Review's hold for
accepted as well."""

MATCH_LEAST = {"score": 0.3, "cycle_mm": 10.0}
"""The same for a confident match: what leads back elsewhere is none."""

SIZE, SIZE_SLACK = "smaller_body_ml", 0.95
"""Scans smaller than this share of the smallest case lie outside what the other limits have seen."""

SLACK = 0.25
"""How far beyond the edge of the right rows a limit lies that no wrong row asks for, relative to edge - median."""

MATCH_FIGURES = {"score": 1, "margin": 1, "cycle_mm": -1, "fixed_points": 1, "residual_mm": -1}
NEVER = {"score": 2.0}
"""A limit no similarity reaches, for methods where no box is safe enough."""


def _rounded(limit: float, towards: Any) -> float:
    """Six decimals, rounded to the stricter side."""
    return float(limit) if not math.isfinite(limit) else towards(limit * 1e6) / 1e6


@dataclass(frozen=True)
class Box:
    """Limits by figure: sign * value >= sign * limit."""

    limits: dict[str, float]

    def tightened(self, least: Mapping[str, float]) -> Box:
        """The stricter of both limits for every figure."""
        strictest = dict(self.limits)
        for name, value in least.items():
            sign = FIGURES[name]
            strictest[name] = sign * max(sign * value, sign * strictest.get(name, value))
        return Box(strictest)

    def as_limits(self) -> dict[str, dict[str, float]]:
        """The form `uae.registration.adareg.verdict_of` reads."""
        return {
            name: {"min": _rounded(limit, math.ceil)} if FIGURES[name] > 0 else {"max": _rounded(limit, math.floor)}
            for name, limit in self.limits.items()
        }


def fit_box(
    right: np.ndarray, wrong: np.ndarray, tolerated: int = 0, guard: float = 0.01, start: Box | None = None
) -> Box:
    """Limits that let no more than `tolerated` wrong rows through and lose as few right rows as possible.

    Greedy: as long as too many wrong rows pass, the one limit is tightened that removes the most wrong rows for each
    right row lost. A limit is put half-way between the worst row it has to stop and the next right row beyond, so an
    unseen pair a little better than the worst one is stopped as well. Figures that were not needed still get a limit
    near the `guard` quantile of the right rows: a result unlike all right ones is not trusted.

    Args:
        right: (N, F) figures in the order of FIGURES; NaN never passes.
        wrong: (M, F).
        tolerated: wrong rows that may pass.
        guard: share of right rows that the unneeded limits may cost, each.
        start: limits to begin with; they are only tightened.
    """
    names, signs = list(FIGURES), np.array(list(FIGURES.values()), float)
    good, bad = right * signs, wrong * signs
    low = np.full(len(names), -np.inf)
    if len(good):
        edge = np.nanquantile(good, guard, axis=0, method="lower")
        # A little beyond the outermost right rows: the next person's right pair will not be inside exactly these.
        low = np.maximum(low, edge - SLACK * np.abs(np.nanmedian(good, axis=0) - edge))

    for name, limit in (start.limits if start else {}).items():
        column = names.index(name)
        low[column] = max(low[column], signs[column] * limit)

    def passing(rows: np.ndarray) -> np.ndarray:
        return np.all(rows >= low, axis=1)

    while True:
        good_in, bad_in = good[passing(good)], bad[passing(bad)]
        if len(bad_in) <= tolerated:
            break
        best: tuple[float, int, float] | None = None
        for column in range(len(names)):
            for stop in np.unique(bad_in[:, column]):
                removed = int((bad_in[:, column] <= stop).sum())
                beyond = good_in[good_in[:, column] > stop, column]
                lost = len(good_in) - len(beyond)
                limit = (stop + beyond.min()) / 2.0 if len(beyond) else np.nextafter(stop, np.inf)
                value = removed / (lost + 0.5)
                if best is None or value > best[0]:
                    best = (value, column, float(limit))
        low[best[1]] = best[2]
    triples = zip(names, signs, low, strict=True)
    return Box({name: float(sign * limit) for name, sign, limit in triples if np.isfinite(limit)})


def _rows(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Figures (N, F) of recorded registrations that have any; missing ones are NaN."""
    features = [record["registration"]["features"] for record in records]
    return np.array(
        [[math.nan if f.get(name) is None else f[name] for name in FIGURES] for f in features if f], dtype=np.float64
    ).reshape(-1, len(FIGURES))


def is_wrong(case: Mapping[str, Any]) -> bool:
    """Whether a case's estimate is farther than floor + 10 mm from the truth, before and after refinement counted."""
    limit = case["floor_mm"] + CONFIDENT_FAILURE_MM
    errors = (case["registration"]["tre_mm"], case["refined"]["tre_mm"])
    return any(error is None or error > limit for error in errors)


def fit_registration(
    cases: Sequence[Mapping[str, Any]], negatives: Sequence[Mapping[str, Any]], wrong_in_review: float = 0.25
) -> dict[str, dict[str, dict[str, float]]]:
    """Limits of `accepted` and `review` from cases with truth and from negative pairs.

    Accepted: no wrong case and no negative pair. Review: no pair without overlap, and at most a share of the wrong
    cases (a reviewer looks at these, so losing right ones weighs more there). Both: no scan smaller than the cases'.

    Args:
        cases: records of the embedding benchmark.
        negatives: records of `uae.bench.negatives.run_negatives`.
        wrong_in_review: share of wrong cases that may reach review.

    Returns:
        {"accepted": {figure: {"min" or "max": limit}}, "review": {...}}.
    """
    right = _rows([case for case in cases if not is_wrong(case)])
    wrong = _rows([case for case in cases if is_wrong(case)])
    apart = _rows([pair for pair in negatives if pair["kind"] == NO_OVERLAP])
    others = _rows([pair for pair in negatives if pair["kind"] != NO_OVERLAP])
    # First the pairs without overlap, all of them; then the wrong ones down to the tolerated share.
    surely_related = fit_box(right, apart, start=Box(LEAST["review"]))
    review = fit_box(right, wrong, math.floor(wrong_in_review * len(wrong)), start=surely_related)
    start = review.tightened(LEAST["accepted"])
    accepted = fit_box(right, np.concatenate([wrong, apart, others]), start=start)
    limits = {"accepted": accepted.as_limits(), "review": review.as_limits()}
    sizes = [case["registration"]["features"].get(SIZE) for case in cases if case["registration"]["features"]]
    known = [size for size in sizes if size is not None]
    if known:
        for level in limits.values():
            level[SIZE] = {"min": round(SIZE_SLACK * min(known), 1)}
    return limits


def _match_columns(matches: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Figures (N, F) of eligible matches times their signs (bigger is better; NaN where unmeasured) and errors (N,)."""
    kept = [match for match in matches if match["eligible"]]
    figures = [[math.nan if match[name] is None else match[name] for name in MATCH_FIGURES] for match in kept]
    errors = [math.inf if match["error_mm"] is None else match["error_mm"] for match in kept]
    signs = np.array(list(MATCH_FIGURES.values()), float)
    return np.array(figures, np.float64).reshape(-1, len(MATCH_FIGURES)) * signs, np.array(errors, np.float64)


def _reaches_least(figures: np.ndarray) -> np.ndarray:
    """Bool (N,): rows of signed figures (N, F) within MATCH_LEAST."""
    names = list(MATCH_FIGURES)
    return np.logical_and.reduce([
        ~(figures[:, names.index(name)] < MATCH_FIGURES[name] * least) for name, least in MATCH_LEAST.items()
    ])  # fmt: skip


def _candidates(values: np.ndarray, steps: int) -> np.ndarray:
    """Quantiles 0 .. 0.95 of a column without its NaNs, as limits to try."""
    values = values[np.isfinite(values)]
    if not len(values):
        return np.array([-np.inf])
    return np.unique(np.quantile(values, np.linspace(0.0, 0.95, steps)))


def fit_match(
    matches: Mapping[str, Sequence[Mapping[str, Any]]],
    negatives: Sequence[Mapping[str, Any]] = (),
    over_10mm: float = 0.02,
    over_10mm_in_a_set: float = 0.05,
    confident_negatives: float = 0.01,
    steps: int = 9,
) -> dict[str, float]:
    """Limits of one method under which as many matches as possible are confident and few of those are over 10 mm.

    Args:
        matches: records by set.
        negatives: matches of pairs without overlap, all wrong.
        over_10mm: largest share over 10 mm, all sets together (one more wrong one than seen is assumed: few data are
            no proof).
        over_10mm_in_a_set: largest such share in any one set.
        confident_negatives: largest share of `negatives` that may pass.
        steps: values tried for each figure.

    Returns:
        {"score", "margin", "cycle_mm", "fixed_points", "residual_mm"}, or NEVER where no limits are safe.
    """
    groups = {name: _match_columns(records) for name, records in matches.items()}
    figures = np.concatenate([columns for columns, _ in groups.values()] or [np.zeros((0, len(MATCH_FIGURES)))])
    errors = np.concatenate([error for _, error in groups.values()] or [np.zeros(0)])
    group = np.concatenate([np.full(len(error), k) for k, (_, error) in enumerate(groups.values())] or [np.zeros(0)])
    apart, _ = _match_columns(negatives)
    allowed = math.floor(confident_negatives * len(negatives))
    fit = _reaches_least(figures)
    figures, errors, group, apart = figures[fit], errors[fit], group[fit], apart[_reaches_least(apart)]
    usable = [k for k in range(len(MATCH_FIGURES)) if np.isfinite(figures[:, k]).any()]
    grids = [_candidates(figures[:, k], steps) for k in usable]
    over = errors > MATCH_LIMIT_MM
    masks = [[figures[:, k] >= limit for limit in grid] for k, grid in zip(usable, grids, strict=True)]
    apart_masks = [[apart[:, k] >= limit for limit in grid] for k, grid in zip(usable, grids, strict=True)]
    best, chosen = 0, None
    for pick in itertools.product(*(range(len(grid)) for grid in grids)):
        inside = np.logical_and.reduce([masks[k][i] for k, i in enumerate(pick)])
        count = int(inside.sum())
        if count <= best or int((inside & over).sum()) + 1 > over_10mm * (count + 2):
            continue
        if int(np.logical_and.reduce([apart_masks[k][i] for k, i in enumerate(pick)]).sum()) > allowed:
            continue
        shares = [(inside & (group == k), k) for k in range(len(groups))]
        if any((mask & over).sum() > over_10mm_in_a_set * max(mask.sum(), 1) + 1 for mask, _ in shares):
            continue
        best, chosen = count, pick
    if chosen is None:
        return dict(NEVER)
    names, signs = list(MATCH_FIGURES), list(MATCH_FIGURES.values())
    return {names[k]: round(float(signs[k] * grid[i]), 4) for k, grid, i in zip(usable, grids, chosen, strict=True)}


def calibrate(
    cases: Sequence[Mapping[str, Any]],
    negatives: Sequence[Mapping[str, Any]],
    other_people: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All limits of a model, in the form stored with it.

    Args:
        cases: `cases` of the embedding benchmark.
        negatives: records of `uae.bench.negatives.run_negatives`.
        other_people: fixed-point match records of landmarks in other people (`uae.bench.inter_subject`), a set of
            their own: what is confident within a person may be a vertebra off between two.

    Returns:
        {"registration": {"accepted", "review"}, "match": {method: limits}}. A method that was not measured has the
        limits of the strictest comparable one: nearest takes NEVER, since a bare nearest neighbour carries no proof.
    """
    registration = fit_registration(cases, negatives)
    sets = sorted({case["set"] for case in cases})
    free = {name: [match for case in cases if case["set"] == name for match in case["fixed_point"]] for name in sets}
    if other_people:
        free[OTHER_SUBJECT] = list(other_people)
    # A guided match is confident only where the pair is accepted, which no negative pair is.
    guided = {
        name: [m for case in cases if case["set"] == name and relation_verdict(case, registration) == ACCEPTED
               for m in case["guided"] if m["method"] == "guided"]
        for name in sets
    }  # fmt: skip
    apart = [match for pair in negatives if pair["kind"] == NO_OVERLAP for match in pair["fixed_point"]]
    by_method = {"fixed-point": fit_match(free, apart), "guided": fit_match(guided)}
    return {
        "registration": registration,
        "match": {**by_method, "nearest": dict(NEVER), "guided-nearest": dict(NEVER)},
    }


def judge_thresholds(
    cases: Sequence[Mapping[str, Any]], negatives: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any]
) -> dict[str, Any]:
    """What thresholds do on records: figures by set, and what becomes of the negative pairs."""
    sets = sorted({case["set"] for case in cases})
    result: dict[str, Any] = {
        name: summarise([case for case in cases if case["set"] == name], thresholds) for name in sets
    }
    limits = thresholds.get("registration")
    for kind in sorted({pair["kind"] for pair in negatives}):
        pairs = [pair for pair in negatives if pair["kind"] == kind]
        verdicts = [verdict_of_case(pair, limits) for pair in pairs]
        matches = [match for pair in pairs for match in auto_matches(pair, limits)]
        result[kind] = {
            "pairs": len(pairs),
            "accepted": verdicts.count(ACCEPTED),
            "refused": verdicts.count(REFUSED),
            "confident_matches": sum(len(confident_matches(pair, thresholds)) for pair in pairs),
            "matches": len(matches),
        }
    return result


def cross_check(
    cases: Sequence[Mapping[str, Any]],
    negatives: Sequence[Mapping[str, Any]],
    other_people: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Limits from the cases of all other CTs, judged on each CT: how well they carry over to an unseen person.

    Negative pairs that show the CT are judged as well and take no part in the limits. The arguments are those of
    `calibrate`.
    """
    result = {}
    for ct in sorted({case["ct"] for case in cases}):
        own, others = _parted(cases, lambda case, ct=ct: case["ct"] == ct)
        shown, elsewhere = _parted(negatives, lambda pair, ct=ct: ct in pair.get("cts", ()))
        if others:
            result[ct] = judge_thresholds(own, shown, calibrate(others, elsewhere, other_people))
    return result


def _parted(records: Sequence[Mapping[str, Any]], mine: Callable[[Mapping[str, Any]], bool]) -> tuple[list, list]:
    """Records for which `mine` holds, and the others."""
    return [r for r in records if mine(r)], [r for r in records if not mine(r)]
