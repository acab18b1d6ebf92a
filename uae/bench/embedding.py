"""`uae bench embedding`: matches and registrations of simulated MR scans against the CTs they were made from."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.bench.data import VALIDATION_CTS, find_data
from uae.bench.metrics import point_errors, summarise, transform_tre
from uae.bench.parts import PARTIAL, PARTIAL_FROM, partial_pair
from uae.embedding import Embedding, embed
from uae.errors import InputError
from uae.files import atomic_path
from uae.json_values import plain
from uae.matching import PRIOR_MOST, Match, match_points, nearest
from uae.preprocess import body_mask
from uae.progress import Cancel, Progress, check_cancel, report
from uae.registration.adareg import ACCEPTED
from uae.registration.masks import body_volume
from uae.registration.refine import refine_rigid
from uae.registration.relate import relate
from uae.simulate import SETS, SimulatedPair, simulate_scan
from uae.transform import Transform
from uae.volume import Geometry, Volume

if TYPE_CHECKING:
    from uae.models import Model

logger = logging.getLogger(__name__)

ALL_SETS = (*SETS, PARTIAL)
CASES_PER_CT = 20
QUICK_CASES = 4
NEAREST_POINTS = 500
FIXED_POINTS = 60
"""Points a case for fixed-point and guided matching, which cost a hundred searches each; the nearest neighbour is also
given on the same points, so that the three compare."""

SETTLED = ("model_sha256", "options", "thresholds")
"""What must be the same for an earlier run's cases to count."""

ANY_MATCH = {"score": -2.0}
"""Limits that every match passes: what is then not confident failed for a reason no limit can repair."""


@dataclass(frozen=True)
class BenchOptions:
    """How much is measured: points a case, device, refinement on or off, modality of the simulated scans."""

    nearest_points: int = NEAREST_POINTS
    fixed_points: int = FIXED_POINTS
    device: str = "auto"
    refine: bool = True
    moving: str = "mr"


def case_seed(subject: str, index: int) -> int:
    """Seed of a case: fixed, and different for every subject."""
    return 1000 * (VALIDATION_CTS.index(subject) + 1) + index


def case_points(pair: SimulatedPair, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random body points of a simulated scan whose true place lies inside the CT, and those places: (N, 3) mm each.

    Args:
        pair: whose seed decides the points.
        count: N, or all where there are fewer.
    """
    rng = np.random.default_rng([pair.meta["seed"], 1])
    return points_shown(pair.fixed.geometry, pair.moving_body_points, pair.fixed_body_points, count, rng)


def points_shown(
    fixed: Geometry, points: np.ndarray, truth: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random `count` (or all, where there are fewer) of points (N, 3) mm whose true place lies on the fixed grid.

    Returns:
        The points and their true places, (count, 3) mm each.
    """
    inside = np.flatnonzero(fixed.contains(truth))
    chosen = rng.choice(inside, min(count, len(inside)), replace=False)
    return points[chosen], truth[chosen]


def match_record(match: Match, method: str, truth: np.ndarray | None) -> dict[str, Any]:
    """What summary and calibration need of one match.

    Args:
        match: found with ANY_MATCH as limits.
        method: the method that was asked for, whose limits apply.
        truth: (3,) mm true place, None where there is none (pairs without overlap): the error is then None.
    """
    error = None if truth is None else float(np.linalg.norm(match.point_mm - truth))
    record = {
        "error_mm": error, "score": match.score, "margin": match.margin, "cycle_mm": match.cycle_mm,
        "fixed_points": match.fixed_points, "residual_mm": match.residual_mm,
    }
    rounded = {key: value if value is None else round(float(value), 4) for key, value in record.items()}
    return rounded | {"eligible": match.confident, "method": method}


def any_matches(
    template: Embedding, query: Embedding, points: np.ndarray, method: str, prior: Transform | None = None,
    verdict: str | None = None, pair_score: float | None = None, side: int = 5, cancel: Cancel | None = None,
) -> list[Match]:
    """Match points (N, 3) mm under limits that every match passes.

    They are matched as under `verdict`; what they lack to be confident is told as if the pair were accepted, since
    other limits may give it another verdict.
    """
    limits = ANY_MATCH if pair_score is None else {**ANY_MATCH, "pair_score": pair_score}
    return match_points(
        template, query, points, method=method, side=side, prior=prior, limits=limits, cancel=cancel,
        prior_verdict=None if prior is None else ACCEPTED, prior_most=np.inf if verdict == ACCEPTED else PRIOR_MOST,
    )  # fmt: skip


def match_records(
    template: Embedding, query: Embedding, points: np.ndarray, truth: np.ndarray | None, method: str,
    prior: Transform | None = None, verdict: str | None = None, pair_score: float | None = None,
    side: int = 5, cancel: Cancel | None = None,
) -> list[dict[str, Any]]:
    """`any_matches` recorded with their errors against truth (N, 3) mm (or None)."""
    found = any_matches(template, query, points, method, prior, verdict, pair_score, side, cancel)
    places = [None] * len(found) if truth is None else truth
    return [match_record(match, method, place) for match, place in zip(found, places, strict=True)]


def pair_score_of(model: Model, method: str) -> float | None:
    """The model's smallest similarity of a pair of fixed points for a method, None where it has none."""
    from uae.matching import limits_for

    return limits_for(model.thresholds.get("match"), method).get("pair_score")


def run_case(
    pair: SimulatedPair, fixed: Embedding, model: Model, options: BenchOptions, cancel: Cancel | None = None
) -> dict[str, Any]:
    """Measure one simulated pair.

    Args:
        pair: the simulated scan and its truth.
        fixed: embedding of the CT.
        model: the weights; its registration limits give the verdict that guides the matching.
        options: how much is measured.
        cancel: asked between the steps.

    Returns:
        A plain record, see `uae.bench.metrics.summarise`.
    """
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name], clock = round(now - clock, 2), now
        check_cancel(cancel)

    moving = embed(pair.moving, model, device=options.device, cache=False, cancel=cancel)
    lap("embed")
    points, truth = case_points(pair, options.nearest_points)
    places, _ = nearest(moving, fixed, points)
    errors = np.linalg.norm(places - truth, axis=1)
    lap("nearest")

    relation = relate(pair.fixed, pair.moving, fixed, moving, model, options.device, cache=False, cancel=cancel)
    found = relation.found
    tre = transform_tre(found.transform, pair.moving_body_points, pair.fixed_body_points)
    lap("register")
    refined = {"tre_mm": tre, "used": False, "failed": found.transform is None, "moved_mm": None, "moved_deg": None}
    if options.refine and found.transform is not None:
        bodies = body_volume(fixed), body_volume(moving)
        result = refine_rigid(pair.fixed, pair.moving, found.transform, *bodies, cancel=cancel)
        refined = {
            "tre_mm": transform_tre(result.transform, pair.moving_body_points, pair.fixed_body_points),
            "used": result.used, "failed": result.failed, "moved_mm": result.moved_mm, "moved_deg": result.moved_deg,
        }
    lap("refine")

    few, few_truth = points[: options.fixed_points], truth[: options.fixed_points]
    free_score = pair_score_of(model, "fixed-point")
    free = match_records(moving, fixed, few, few_truth, "fixed-point", pair_score=free_score, cancel=cancel)
    lap("fixed_point")
    guided = free
    if found.transform is not None:
        # Whatever the verdict: which of the two the product gives is decided when verdicts are judged (`auto_matches`).
        guided = match_records(
            relation.moving, relation.fixed, few, few_truth, "guided", found.transform.inverse(), found.verdict,
            pair_score_of(model, "guided"), cancel=cancel,
        )
    lap("guided")
    return plain({
        **pair.meta, "floor_mm": pair.rigid_floor_mm, "nearest": point_errors(errors),
        "nearest_same_points": [{"error_mm": round(float(error), 3)} for error in errors[: options.fixed_points]],
        "fixed_point": free, "guided": guided,
        "registration": {
            "verdict": found.verdict, "reason": found.reason, "tre_mm": tre, "queried": found.queried,
            "mutual": found.mutual, "inliers": found.inliers, "features": found.features,
        },
        "refined": refined, "seconds": seconds,
    })


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def report_of(
    cases: Sequence[Mapping[str, Any]], meta: Mapping[str, Any], thresholds: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The benchmark's JSON: figures under each set's name, `meta`, and all `cases`."""
    result: dict[str, Any] = {}
    for name in ALL_SETS:
        own = [case for case in cases if case["set"] == name]
        if own:
            result[name] = summarise(own, thresholds)
    return {**result, "meta": dict(meta), "cases": list(cases)}


def read_result(path: Path | None) -> dict[str, Any]:
    """What an earlier run has left in the file; empty where there is none.

    Raises:
        InputError: the file is no result of a benchmark.
    """
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); choose another --json") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a result of a benchmark; choose another --json")
    return content


def earlier_run(path: Path | None, meta: Mapping[str, Any], settled: Iterable[str]) -> dict[str, Any]:
    """What an earlier run has left in the file; empty where there is none, or where its settings were others.

    Args:
        path: the file.
        meta: of this run.
        settled: keys of `meta` that must be the same.

    Raises:
        InputError: the file is no result of a benchmark.
    """
    content = read_result(path)
    before = content.get("meta", {})
    if content and any(before.get(key) != meta[key] for key in settled):
        logger.info("%s comes from another model or other settings and is measured again", path)
        return {}
    return content


def run_embedding_bench(
    model: Model,
    data_dir: str | Path | None = None,
    quick: bool = False,
    sets: Sequence[str] = ALL_SETS,
    cases_per_ct: int = CASES_PER_CT,
    json_path: str | Path | None = None,
    options: BenchOptions | None = None,
    subjects: Sequence[str] = VALIDATION_CTS,
    keep: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Measure a model on simulated MR (or CT) scans of the validation CTs.

    Args:
        model: the weights with their thresholds.
        data_dir: folder of the real volumes; UAE_DATA or the default where None.
        quick: four cases a CT and set, and a third of the points for fixed-point matching.
        sets: names of `uae.simulate.SETS`, and "partial".
        cases_per_ct: cases of every set for every CT.
        json_path: written after every case; a run of the same model and options continues there.
        options: points a case, device, refinement.
        subjects: validation CTs.
        keep: further keys of the result, of the other studies (`uae.bench.suite`).
        progress: told the share of cases done, stage "bench".
        cancel: asked between and within cases.

    Returns:
        By set the figures of `uae.bench.metrics.summarise`; `meta`; `cases`.

    Raises:
        InputError: no data, unknown set, a result file that cannot be used.
        CancelledError: the user stopped; finished cases stay in the file.
    """
    unknown = [name for name in sets if name not in ALL_SETS]
    if unknown:
        raise InputError(f"unknown set '{unknown[0]}'; choose from {', '.join(ALL_SETS)}")
    data = find_data(data_dir)
    options = options or BenchOptions(fixed_points=FIXED_POINTS // 3 if quick else FIXED_POINTS)
    per_ct = min(cases_per_ct, QUICK_CASES) if quick else cases_per_ct
    meta = plain({
        "model": model.name, "model_version": model.version, "model_sha256": model.sha256, "subjects": list(subjects),
        "cases_per_ct": per_ct, "options": vars(options), "thresholds": model.thresholds,
    })
    path = None if json_path is None else Path(json_path)
    cases = list(earlier_run(path, meta, SETTLED).get("cases", []))
    done = {(case["set"], case["ct"], case["seed"]) for case in cases}
    wanted = [
        (subject, name, case_seed(subject, index)) for subject in subjects for name in sets for index in range(per_ct)
    ]
    loaded: tuple[str, Volume, np.ndarray, Embedding] | None = None
    for count, (subject, name, seed) in enumerate(wanted):
        report(progress, "bench", count / len(wanted))
        check_cancel(cancel)
        if (name, subject, seed) in done:
            continue
        if loaded is None or loaded[0] != subject:
            ct = data.ct(subject)
            loaded = (subject, ct, body_mask(ct), embed(ct, model, device=options.device, cancel=cancel))
        _, ct, body, fixed = loaded
        start = time.perf_counter()
        pair = simulate_scan(ct, seed, PARTIAL_FROM if name == PARTIAL else name, options.moving, body)
        simulated = round(time.perf_counter() - start, 2)
        if name == PARTIAL:
            pair = partial_pair(pair)
            fixed = embed(pair.fixed, model, device=options.device, cache=False, cancel=cancel)
        case = run_case(pair, fixed, model, options, cancel)
        case |= {"ct": subject, "seconds": {"simulate": simulated, **case["seconds"]}}
        cases.append(case)
        logger.info(
            "%s %s %d: nearest %.0f %% < 10 mm, TRE %s mm (floor %.1f), %s", name, subject, seed,
            100 * case["nearest"]["under_10mm"], case["registration"]["tre_mm"], case["floor_mm"],
            case["registration"]["verdict"],
        )
        if path is not None:
            write_json(path, {**report_of(cases, meta, model.thresholds), **(keep or {})})
    result = {**report_of(cases, meta, model.thresholds), **(keep or {})}
    if path is not None:
        write_json(path, result)
    report(progress, "bench", 1.0)
    return result
