"""AdaReg: the rigid (or affine) transform between two scans from matches of their embeddings, and its verdict.

After the paper's registration step (UAE-M, section "Registration"), with differences that make it safe to press as a
button: matches must be mutual, the fit is robust, a fifth of the matches is never shown to any fit and judges it, and
the verdict can be a refusal.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np

from uae.embedding import Embedding
from uae.errors import InputError, NoConfidentResultError
from uae.matching import mutual_matches
from uae.progress import Cancel, Progress, check_cancel, report
from uae.registration.evidence import (
    TOLERANCE_MM,
    body_overlap,
    held_out,
    heldout_figures,
    similarity_gain,
    stability,
)
from uae.registration.hypotheses import best_hypothesis
from uae.registration.masks import inside
from uae.registration.rigid import ELSEWHERE_MM, box_corners, fit_affine, ransac, spread_mm
from uae.transform import Affine, Rigid
from uae.volume import Volume

log = logging.getLogger(__name__)

ACCEPTED, REVIEW, REFUSED = "accepted", "review", "refused"
N_POINTS = 800  # our measurement; the authors use about one point per 18 ml
CYCLE_MM = 8.0  # our measurement: two fine cells
MIN_INLIERS = 4
MIN_MATCHES = 8  # below it neither a fit nor a held-out share says anything
AFFINE_STRETCH = (
    0.8,
    1.25,
)  # patients differ in size by about this much; beyond it an affine fit follows wrong matches

DEFAULT_LIMITS: dict[str, dict[str, dict[str, float]]] = {
    "accepted": {
        "inliers": {"min": 40},
        "inlier_share": {"min": 0.3},
        "spread_mm": {"min": 12.0},
        "heldout_within_10mm": {"min": 0.3},
        "heldout_log10_p": {"max": -6.0},
        "runner_up_ratio": {"max": 0.5},
    },
    "review": {
        "inliers": {"min": 15},
        "inlier_share": {"min": 0.12},
        "spread_mm": {"min": 8.0},
        "heldout_within_10mm": {"min": 0.12},
        "heldout_log10_p": {"max": -2.0},
    },
}
"""Used only for a model that brings no calibrated limits of its own; deliberately strict."""

_WORDS = {
    "inliers": "agreeing matches",
    "inlier_share": "share of agreeing matches",
    "spread_mm": "spatial spread of the agreeing matches (mm)",
    "heldout_within_10mm": "share of held-out matches within 10 mm",
    "heldout_log10_p": "log10 of the probability of that share by chance",
    "hypothesis_score": "similarity of the whole body at its predicted places",
    "hypothesis_margin": "lead of that similarity over the best other place",
    "runner_up_ratio": "support of the second best place relative to the best",
    "stability_mm": "change of the result over random halves of the matches (mm)",
    "similarity_gain": "similarity at the predicted places above that around them",
    "smaller_body_ml": "body volume of the smaller scan (ml; smaller ones were never calibrated)",
    "body_overlap": "share of the body that lands in the other scan's body",
}


@dataclass
class AdaRegResult:
    """What AdaReg found; points and transform in mm, LPS.

    transform: fixed -> moving, None where not even a candidate exists. A refused result keeps its candidate for
        measurements.
    heldout_*: on the matches that no fit has seen; the inlier median is over those of them within 10 mm.
    fixed_points, moving_points: (M, 3) all mutual matches; inlier_mask, heldout_mask: bool (M,); scores (M,).
    spread_mm: smallest principal standard deviation of the inliers in the fixed scan.
    features: every figure a verdict may use, for calibration.
    rigid: fixed -> moving without the affine part. searched: whose points were searched in the other, "fixed" or
        "moving" (the smaller body).
    """

    verdict: str
    reason: str
    transform: Affine | None = None
    queried: int = 0
    mutual: int = 0
    inliers: int = 0
    heldout: int = 0
    heldout_within_10mm: float = 0.0
    heldout_chance: float = 0.0
    heldout_residual_median_mm: float | None = None
    heldout_inlier_median_mm: float | None = None
    fixed_points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    moving_points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    inlier_mask: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    heldout_mask: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    spread_mm: float = 0.0
    features: dict[str, float] = field(default_factory=dict)
    rigid: Rigid | None = None
    searched: str = "moving"

    def judge_by(self, figures: dict[str, float]) -> None:
        """Take the held-out figures over; where there is no such match a residual is None."""
        self.heldout = int(figures["heldout"])
        self.heldout_within_10mm, self.heldout_chance = figures["heldout_within_10mm"], figures["heldout_chance"]
        for name in ("heldout_residual_median_mm", "heldout_inlier_median_mm"):
            setattr(self, name, None if math.isnan(figures[name]) else figures[name])


def body_points(embedding: Embedding, mask: Volume | None = None) -> np.ndarray:
    """Centres (N, 3) mm of the fine cells inside the body and, where given, inside a mask image (voxels > 0)."""
    points = embedding.fine_geometry.index_to_mm(
        np.argwhere(embedding.body & embedding.valid)[:, ::-1].astype(np.float64)
    )
    return points[inside(mask, points)]


def spread_sample(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """About `count` of points (N, 3), one at random from each cube of equal size: random, yet even over the body."""
    if len(points) <= count:
        return points
    shuffled = points[
        rng.permutation(len(points))[: 50 * count]
    ]  # enough to fill every cube, and quick for whole torsos
    offset = shuffled - shuffled.min(axis=0)
    low, high = 1.0, float(offset.max()) + 1.0
    for _ in range(30):  # bisection on the cube's edge
        edge = 0.5 * (low + high)
        cubes = np.floor(offset / edge).astype(np.int64)
        first = np.unique(np.ravel_multi_index(cubes.T, cubes.max(axis=0) + 1), return_index=True)[1]
        low, high = (edge, high) if len(first) > count else (low, edge)
        if abs(len(first) - count) <= 0.02 * count:
            break
    return shuffled[np.sort(first)[:count]]


def verdict_of(features: dict[str, float], limits: dict[str, dict[str, dict[str, float]]] | None) -> tuple[str, str]:
    """Compare figures with a model's limits.

    Args:
        features: figures by name.
        limits: {"accepted": {figure: {"min": a, "max": b}}, "review": {...}}; DEFAULT_LIMITS where there
            are none at all, and a verdict without limits of its own is never given.

    Returns:
        The best verdict whose limits all hold, else "refused"; and the reason, naming what keeps the result from being
        better.

    Raises:
        InputError: a limit names an unknown figure.
    """
    limits = limits or DEFAULT_LIMITS
    missed: dict[str, list[str]] = {}
    for level in (ACCEPTED, REVIEW):
        missed[level] = [] if limits.get(level) else ["the model brings no limits for this verdict"]
        for name, bound in limits.get(level, {}).items():
            if name not in features:
                raise InputError(f"registration limits name the unknown figure {name!r}; check the model's thresholds")
            value = features[name]
            low, high = bound.get("min", -math.inf), bound.get("max", math.inf)
            if not low <= value <= high:
                wanted = f"at least {low:.3g}" if value < low else f"at most {high:.3g}"
                missed[level].append(f"{_WORDS.get(name, name)} {value:.3g} ({wanted} wanted)")
    if not missed[ACCEPTED]:
        return ACCEPTED, "enough matches agree, and those that were held out agree as well"
    if not missed[REVIEW]:
        return REVIEW, "look at the overlay before use: " + "; ".join(missed[ACCEPTED])
    return REFUSED, "the scans could not be related with confidence: " + "; ".join(missed[REVIEW]) + _NEXT_STEP


_NEXT_STEP = (
    ". Check that both show a common region of one patient and that the modalities are right, or limit the search to "
    "that region by a mask or a region of interest"
)


def _affine(rigid: Rigid, source: np.ndarray, target: np.ndarray) -> Affine:
    """Robust affine through the inliers, or `rigid` where the matches do not determine a plausible one."""
    try:
        affine = fit_affine(source, target)
    except NoConfidentResultError as error:
        log.warning("affine: %s; the rigid transform is kept", error)
        return rigid
    stretch = np.linalg.svd(affine.matrix[:3, :3], compute_uv=False)
    if (
        stretch.min() < AFFINE_STRETCH[0]
        or stretch.max() > AFFINE_STRETCH[1]
        or np.linalg.det(affine.matrix[:3, :3]) <= 0
    ):
        log.warning(
            "affine: stretches of %s are implausible for patients; the rigid transform is kept", np.round(stretch, 2)
        )
        return rigid
    return affine


def _masked(embedding: Embedding, mask: Volume | None) -> tuple[Embedding, np.ndarray]:
    """The embedding with its body cut to a mask image > 0, and where that and the scan are (bool, fine grid)."""
    if mask is None:
        return embedding, embedding.valid
    region = embedding.valid & inside(mask, embedding.fine_geometry.grid_points_mm()).reshape(embedding.valid.shape)
    return replace(embedding, body=embedding.body & region, _search=None), region


def estimate(
    fixed: Embedding,
    moving: Embedding,
    limits: dict[str, dict[str, dict[str, float]]] | None = None,
    n_points: int = N_POINTS,
    affine: bool = False,
    seed: int = 0,
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    first: AdaRegResult | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> AdaRegResult:
    """Estimate fixed -> moving from two embeddings of one model.

    The search runs from the smaller body to the larger one (a point of the larger is often outside the smaller); the
    result does not show it.

    Args:
        fixed: embedding of the scan that stays.
        moving: embedding of the other scan, by the same model.
        limits: the model's calibrated limits (see `verdict_of`), None for the strict defaults.
        n_points: queried points, evenly over the smaller body.
        affine: add a robust affine fit on the inliers; the verdict rests on the rigid one.
        seed: of all random choices.
        fixed_mask: image > 0 where matches may lie in the fixed scan.
        moving_mask: the same for the moving scan.
        first: result of a first pass; its rigid is one more hypothesis, and the same scan is searched.
        progress: told the stage "match".
        cancel: asked during the search.

    Returns:
        The transform with verdict and figures; never raises for scans that do not fit together, it refuses.

    Raises:
        InputError: a scan (or its mask) holds no body at all.
        CancelledError: the user stopped.
    """
    rng = np.random.default_rng(seed)
    scans, regions = {}, {}
    for name, embedding, mask in (("fixed", fixed, fixed_mask), ("moving", moving, moving_mask)):
        scans[name], regions[name] = _masked(embedding, mask)
    bodies = {name: body_points(scan) for name, scan in scans.items()}
    for name, points in bodies.items():
        if not len(points):
            raise InputError(
                f"no body was found in the {name} image (or inside its mask); check image, modality and mask"
            )
    swap = len(bodies["moving"]) <= len(bodies["fixed"]) if first is None else first.searched == "moving"
    searched, other = ("moving", "fixed") if swap else ("fixed", "moving")
    source, target, body = scans[searched], scans[other], bodies[searched]
    queries = spread_sample(body, n_points, rng)
    report(progress, "match", 0.0)
    check_cancel(cancel)
    part = None if progress is None else lambda stage, fraction: progress(stage, 0.8 * fraction)
    found_source, found_target, scores, cycle = mutual_matches(source, target, queries, CYCLE_MM, part, cancel)
    check_cancel(cancel)
    mutual = np.isfinite(cycle) & (cycle <= CYCLE_MM)
    a, b, scores = found_source[mutual], found_target[mutual], np.asarray(scores, dtype=np.float64)[mutual]
    pair = (b, a) if swap else (a, b)
    result = AdaRegResult(
        REFUSED, "", queried=len(queries), mutual=len(a), fixed_points=pair[0], moving_points=pair[1], scores=scores,
        searched=searched, heldout_mask=held_out(a), inlier_mask=np.zeros(len(a), dtype=bool),
    )  # fmt: skip
    if len(a) < MIN_MATCHES:
        result.reason = f"only {len(a)} of {len(queries)} points find a mutual match{_NEXT_STEP}"
        return result
    fit = ~result.heldout_mask
    earlier = None if first is None else first.rigid
    if earlier is not None and swap:
        earlier = earlier.inverse()
    try:
        winner = ransac(a[fit], b[fit], tolerance_mm=TOLERANCE_MM, seed=seed)
        shown = queries[~held_out(queries)]
        chosen = best_hypothesis(source, target, a[fit], b[fit], shown, earlier, regions[other], seed, cancel)
    except NoConfidentResultError as error:
        result.reason = f"{error}{_NEXT_STEP}"
        return result
    rigid = chosen.transform
    result.inlier_mask[fit] = np.linalg.norm(rigid.apply(a[fit]) - b[fit], axis=1) <= TOLERANCE_MM
    agreed = result.inlier_mask
    if agreed.sum() < MIN_INLIERS:
        result.reason = f"only {int(agreed.sum())} of {len(a)} mutual matches agree with any one place{_NEXT_STEP}"
        return result
    elsewhere = np.linalg.norm(rigid.apply(a[fit]) - winner.transform.apply(a[fit]), axis=1).mean() > ELSEWHERE_MM
    runner_up = int(winner.inliers.sum()) if elsewhere else winner.runner_up
    corners = box_corners(body)
    spread = spread_mm(pair[0][agreed])
    result.features = {
        "queried": len(queries),
        "mutual": len(a),
        "mutual_share": len(a) / len(queries),
        "fitted": int(fit.sum()),
        "inliers": int(agreed.sum()),
        "inlier_share": float(agreed.sum() / fit.sum()),
        "inlier_query_share": float(agreed.sum() / len(queries)),
        "inlier_median_mm": float(np.median(np.linalg.norm(rigid.apply(a[agreed]) - b[agreed], axis=1))),
        "inlier_score_median": float(np.median(scores[agreed])),
        "mutual_score_median": float(np.median(scores)),
        "spread_mm": float(spread[2]),
        "spread_largest_mm": float(spread[0]),
        # Relative to the whole body searched: inliers crowded in one corner of a large scan turn badly.
        "spread_relative": float(spread[2] / max(spread_mm(body)[2], 1e-6)),
        "runner_up_ratio": float(runner_up / int(agreed.sum())),
        "hypothesis_score": chosen.score,
        "hypothesis_margin": chosen.margin,
        "rotation_deg": float(rigid.rotation_angle_deg()),
        "stability_mm": stability(a[agreed], b[agreed], corners, rng),
        "similarity_gain": similarity_gain(source, target, rigid, queries),
        "body_overlap": body_overlap(target, rigid, queries),
        "smaller_body_ml": float(len(body) * source.fine_geometry.voxel_volume_mm3 / 1000.0),
        **heldout_figures(rigid, a[result.heldout_mask], b[result.heldout_mask]),
    }
    result.inliers, result.spread_mm = result.features["inliers"], result.features["spread_mm"]
    result.judge_by(result.features)
    result.verdict, result.reason = verdict_of(result.features, limits)
    linear = rigid
    if affine:
        linear = _affine(rigid, a[agreed], b[agreed])
        figures = heldout_figures(linear, a[result.heldout_mask], b[result.heldout_mask])
        if figures["heldout_within_10mm"] < result.heldout_within_10mm:
            log.warning("affine: fewer held-out matches agree with it; the rigid transform is kept")
            linear = rigid
        else:
            result.judge_by(figures)
    result.transform = linear.inverse() if swap else linear
    result.rigid = rigid.inverse() if swap else rigid
    report(progress, "match", 1.0)
    log.info(
        "AdaReg: %s, %d of %d mutual matches of %d points agree: %s",
        result.verdict,
        result.inliers,
        result.mutual,
        result.queried,
        result.reason,
    )
    return result
