"""Matches between two embeddings, each with what is needed to trust or to distrust it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from uae.errors import InputError
from uae.geometry import as_points
from uae.matching.confidence import judge, limits_for
from uae.matching.fixed_point import FixedPointOptions, Memory, Pairs, Search, find_pairs, place
from uae.matching.search import SearchIndex, search_index
from uae.progress import Cancel, Progress, check_cancel, report
from uae.volume import Volume

if TYPE_CHECKING:
    from uae.embedding import Embedding
    from uae.transform import Transform

logger = logging.getLogger(__name__)

PRIOR_WEIGHT = 0.1
"""Penalty for 10 mm from the predicted place. Our measurement on small, deformed fields of view (share of points within
10 mm): 46 % at 0.03, 53 % at 0.1, 52 % at 0.3, 49 % at 1.0; free search 19 %, the prediction itself 48 %."""

PRIOR_MOST = 0.2
"""Largest penalty under a registration for review, which may be that of two people whose organs lie differently. Our
measurement: it costs 4 % of the right guided matches of the hard set, 0.3 % of standard15; a liver dome of another
person that the full penalty put into the lung (47 mm) is found."""

COMPETITOR_MM = 20.0
"""A competitor is the best cell farther away than this: about one vertebral level."""

METHODS = ("auto", "fixed-point", "nearest", "guided", "guided-nearest")

_CHUNK = 16


@dataclass
class Match:
    """One template point and its place in the query. Points (3,) LPS mm; similarities are means of the heads' cosines.

    cycle_mm: distance between the template point and the place found when the result is matched back by the nearest
        neighbour (under the inverse prior where the match was guided).
    fixed_points, residual_mm: number of supporting pairs and the median residual of their map (None without one).
    method: 'nearest', 'fixed-point', 'guided' (fixed-point with prior), 'guided-nearest'.
    competitor_mm, competitor_score: best cell farther than 20 mm from the result by plain similarity, None if none.
    nearest_distance_mm: from the result to the nearest neighbour's.
    """

    label: str
    template_mm: np.ndarray
    point_mm: np.ndarray
    score: float
    cycle_mm: float
    fixed_points: int
    residual_mm: float | None
    method: str
    competitor_mm: np.ndarray | None
    competitor_score: float | None
    confident: bool
    reason: str
    nearest_distance_mm: float = 0.0

    @property
    def margin(self) -> float | None:
        """Score minus competitor_score; negative where the prior or the fixed points overruled a higher similarity."""
        return None if self.competitor_score is None else self.score - self.competitor_score


def nearest(
    template: Embedding, query: Embedding, points_mm: np.ndarray, refine: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Free nearest neighbours of the template points (N, 3) LPS mm: places (N, 3) LPS mm and similarities (N,).

    refine: sub-cell maximum instead of the cell's centre. Raises InputError for points outside the template scan.
    """
    points_mm = _checked(template, query, points_mm)
    index = search_index(query)
    descriptors = template.descriptors(points_mm)
    rows, scores = index.best(descriptors)
    return (index.refine(rows, descriptors) if refine else index.points_mm[rows]), scores


def mutual_matches(
    a: Embedding,
    b: Embedding,
    points_mm: np.ndarray,
    cycle_mm: float = 8.0,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nearest neighbours of points (N, 3) mm of `a` in `b` and back, for AdaReg.

    Returns for all N points: the points (N, 3), their places in `b` (N, 3), similarities (N,), cycle distances (N,) mm.
    Both searches run over the whole body; a pair is mutual where its cycle distance is at most `cycle_mm`. That limit
    only orders the work of the way back: a pair's own place is looked at first, which excludes most blocks at once.
    """
    points_mm = _checked(a, b, points_mm)
    forward, backward = search_index(b), search_index(a)
    places = np.empty_like(points_mm)
    scores, cycles = np.empty(len(points_mm)), np.empty(len(points_mm))
    for begin in range(0, len(points_mm), 256):
        check_cancel(cancel)
        part = slice(begin, begin + 256)
        descriptors = a.descriptors(points_mm[part])
        rows, scores[part] = forward.best(descriptors)
        places[part] = forward.refine(rows, descriptors)
        back = b.descriptors(places[part])
        rows, _ = backward.best(back, start_mm=points_mm[part], start_radius_mm=cycle_mm)
        cycles[part] = np.linalg.norm(backward.refine(rows, back) - points_mm[part], axis=1)
        report(progress, "match", (begin + len(places[part])) / len(points_mm))
    logger.info("mutual matches: %d of %d within %.0f mm", int(np.sum(cycles <= cycle_mm)), len(cycles), cycle_mm)
    return points_mm, places, scores, cycles


def similarity_map(template: Embedding, query: Embedding, point_mm: np.ndarray) -> Volume:
    """Similarity of one template point (3,) LPS mm to every body cell of the query, on its fine grid; -1 elsewhere.

    Raises InputError for a point outside the template scan.
    """
    points_mm = _checked(template, query, point_mm)
    index = search_index(query)
    array = np.full(tuple(query.fine_geometry.shape), -1.0, np.float32)
    array[tuple(index.cells.T)] = index.scores(template.descriptors(points_mm)[0])
    return Volume(array, query.fine_geometry)


def match_points(
    template: Embedding,
    query: Embedding,
    points_mm: np.ndarray,
    labels: Sequence[str] | None = None,
    method: str = "auto",
    side: int = 5,
    prior: Transform | None = None,
    prior_verdict: str | None = None,
    limits: Mapping[str, Any] | None = None,
    options: FixedPointOptions | None = None,
    prior_weight: float = PRIOR_WEIGHT,
    prior_most: float | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> list[Match]:
    """Match template points (N, 3) LPS mm; one Match a point, in order.

    method: 'nearest'; 'fixed-point'; 'guided' (fixed-point, every search with the soft prior) and 'guided-nearest';
        'auto' is 'guided' where the prior's verdict is accepted or review, else 'fixed-point'. A guided method with a
        refused prior searches freely; the reason says so.
    side: edge of the seed cube; options: all settings of the fixed points (then `side` is not used).
    prior: map from template to query mm with its inverse (AdaReg's transform of this pair); prior_verdict: its verdict.
        Guided by a registration for review no match is confident.
    prior_weight, prior_most: penalty for 10 mm and the largest one; None: PRIOR_MOST for review, else without end.
    limits: calibrated limits of the model, see `confidence.judge` and `limits_for`; also 'pair_score', the smallest
        similarity of a pair of fixed points.
    Raises InputError for points outside the template scan, unknown methods, a guided method without a prior, an image
    without body, or embeddings of different models; CancelledError.
    """
    points_mm = _checked(template, query, points_mm)
    labels = [f"F-{i + 1}" for i in range(len(points_mm))] if labels is None else list(labels)
    if len(labels) != len(points_mm):
        raise InputError(f"{len(labels)} labels for {len(points_mm)} points; give one label a point")
    method, note = _choose(method, prior, prior_verdict)
    own_limits = limits_for(limits, method)
    if options is None:
        options = FixedPointOptions(side=side, min_score=own_limits.get("pair_score"))
    if prior_most is None:
        prior_most = PRIOR_MOST if prior_verdict == "review" else np.inf
    pair = _Pair(template, query, prior if method.startswith("guided") else None, prior_weight, prior_most)
    pair.for_review = pair.prior is not None and prior_verdict == "review"
    matches: list[Match] = []
    for begin in range(0, len(points_mm), _CHUNK):
        check_cancel(cancel)
        part = slice(begin, begin + _CHUNK)
        matches += _match_chunk(pair, points_mm[part], labels[part], method, note, own_limits, options, cancel)
        report(progress, "match", len(matches) / len(points_mm))
    return matches


def _choose(method: str, prior: Transform | None, verdict: str | None) -> tuple[str, str]:
    """The method that will run and the note that says why."""
    if method not in METHODS:
        raise InputError(f"unknown matching method '{method}'; use one of {', '.join(METHODS)}")
    guided = method.startswith("guided")
    if guided and prior is None and verdict != "refused":
        raise InputError(f"method '{method}' needs the pair's transform; register the pair or use 'fixed-point'")
    if not guided and method != "auto":
        return method, ""
    if verdict == "refused":
        return method.replace("guided-", "") if method == "guided-nearest" else "fixed-point", (
            "free search because the pair's registration was refused"
        )
    if guided:
        return method, f"guided by the pair's registration ({verdict or 'no verdict given'})"
    if prior is not None and verdict in ("accepted", "review"):
        return "guided", f"guided by the pair's registration ({verdict})"
    return "fixed-point", "free search without a registration of the pair"


class _Pair:
    """Template and query with their indices, and the searches both ways, with the soft prior where there is one."""

    def __init__(
        self, template: Embedding, query: Embedding, prior: Transform | None, weight: float, most: float
    ) -> None:
        self.template, self.query = template, query
        self.template_index, self.query_index = search_index(template), search_index(query)
        self.prior, self.inverse = prior, None if prior is None else prior.inverse()
        self.weight, self.most = weight, most
        self.for_review = False
        forward = self._seed_search(template, self.template_index, self.query_index, self.prior)
        backward = self._seed_search(query, self.query_index, self.template_index, self.inverse)
        self.forward = Memory(forward, len(self.template_index.cells))
        self.backward = Memory(backward, len(self.query_index.cells))

    def _seed_search(
        self, source: Embedding, source_index: SearchIndex, target: SearchIndex, prior: Transform | None
    ) -> Search:
        def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            descriptors = source.cell_descriptors(source_index.cells[rows])
            return self._best(target, descriptors, source_index.points_mm[rows], prior)

        return search

    def _best(
        self, index: SearchIndex, descriptors: np.ndarray, from_mm: np.ndarray, prior: Transform | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if prior is None or self.weight <= 0:
            return index.best(descriptors)
        return index.best_near(descriptors, prior.apply(from_mm), self.weight, self.most)

    def to_query(self, points_mm: np.ndarray, descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Refined nearest neighbours (N, 3) mm in the query and their similarities (N,)."""
        return self._refined(self.query_index, descriptors, points_mm, self.prior)

    def to_template(self, points_mm: np.ndarray) -> np.ndarray:
        """Refined nearest neighbours (N, 3) mm in the template of query points (N, 3) mm."""
        return self._refined(self.template_index, self.query.descriptors(points_mm), points_mm, self.inverse)[0]

    def _refined(
        self, index: SearchIndex, descriptors: np.ndarray, from_mm: np.ndarray, prior: Transform | None
    ) -> tuple[np.ndarray, np.ndarray]:
        rows, scores = self._best(index, descriptors, from_mm, prior)
        predicted = None if prior is None else prior.apply(from_mm)
        return index.refine(rows, descriptors, predicted, self.weight, self.most), scores

    def pair_points(self, pairs: Pairs, refine: bool) -> tuple[np.ndarray, np.ndarray]:
        """Millimetre points of fixed points (n, 3) and of their images (n, 3), the images refined below the cell.

        The iteration itself stays on whole cells, where standing still is well defined.
        """
        source = self.template_index.points_mm[pairs.template_rows]
        if not refine or not len(pairs):
            return source, self.query_index.points_mm[pairs.query_rows]
        descriptors = self.template.cell_descriptors(self.template_index.cells[pairs.template_rows])
        predicted = None if self.prior is None else self.prior.apply(source)
        return source, self.query_index.refine(pairs.query_rows, descriptors, predicted, self.weight, self.most)


def _match_chunk(
    pair: _Pair,
    points_mm: np.ndarray,
    labels: Sequence[str],
    method: str,
    note: str,
    limits: dict[str, float],
    options: FixedPointOptions,
    cancel: Cancel | None,
) -> list[Match]:
    """Match some points together (see match_points)."""
    descriptors = pair.template.descriptors(points_mm)
    near_mm, scores = pair.to_query(points_mm, descriptors)
    drafts = [
        Match(label, point, near, float(score), np.nan, 0, None, method, None, None, False, "")
        for label, point, near, score in zip(labels, points_mm, near_mm, scores, strict=True)
    ]
    # Under a wrong prior all matches agree with each other: one vertebra too high looks as sure as the right one.
    caution = ["the pair's registration is only for review"] if pair.for_review else []
    doubts: list[list[str]] = [list(caution) for _ in drafts]
    in_air = ~_touches(pair.template, pair.template.body, points_mm)
    if method in ("fixed-point", "guided"):
        found = find_pairs(pair.template_index, pair.forward, pair.backward, points_mm, options, cancel)
        for i, pairs in enumerate(found):
            drafts[i] = _from_pairs(pair, drafts[i], descriptors[i], pairs, options, doubts[i])
    if pair.prior is not None:
        for i in np.flatnonzero(~_touches(pair.query, pair.query.valid, pair.prior.apply(points_mm))):
            doubts[i].append("the predicted place lies outside the query scan")
    result_mm = np.stack([draft.point_mm for draft in drafts])
    rivals, rival_scores = pair.query_index.best(descriptors, far_from_mm=result_mm, far_mm=COMPETITOR_MM)
    cycles = np.linalg.norm(pair.to_template(result_mm) - points_mm, axis=1)
    for i, draft in enumerate(drafts):
        draft.cycle_mm = float(cycles[i])
        if rivals[i] >= 0:
            draft.competitor_mm = pair.query_index.points_mm[rivals[i]].copy()
            draft.competitor_score = float(rival_scores[i])
        if in_air[i]:
            doubts[i].insert(0, "the template point lies in air; place it inside the body")
        passed, why = judge({**vars(draft), "margin": draft.margin}, limits)
        draft.confident = passed and not doubts[i]
        draft.reason = "; ".join(text for text in [*doubts[i], why, note] if text)
    return drafts


def _from_pairs(
    pair: _Pair, draft: Match, descriptor: np.ndarray, pairs: Pairs, options: FixedPointOptions, doubts: list[str]
) -> Match:
    """The nearest-neighbour draft replaced by the fixed points' answer, or kept and flagged as a fallback."""
    source, target = pair.pair_points(pairs, refine=not options.released)
    placed = place(source, target, draft.template_mm, options)
    fallback = {"method": "guided-nearest" if pair.prior is not None else "nearest", "fixed_points": len(pairs)}
    if placed is None:
        doubts.append(f"fallback to the nearest neighbour: only {len(pairs)} fixed points")
        return replace(draft, **fallback)
    point, fitted = placed
    if not _touches(pair.query, pair.query.valid, point[None])[0]:
        doubts.append("fallback to the nearest neighbour: the fixed points lead out of the query scan")
        return replace(draft, **fallback)
    if pairs.relaxed:
        doubts.append("found only after relaxing the similarity limit of the fixed points")
    if fitted.kind != "affine":
        logger.info("%s: %d fixed points allow only a %s", draft.label, len(pairs), fitted.kind)
    return replace(
        draft,
        point_mm=point,
        score=float(descriptor @ pair.query.descriptors(point[None])[0]),
        fixed_points=len(pairs),
        residual_mm=fitted.residual_mm,
        nearest_distance_mm=float(np.linalg.norm(point - draft.point_mm)),
    )


def inside_scan(embedding: Embedding, points_mm: np.ndarray) -> np.ndarray:
    """Whether each point (N, 3) LPS mm lies in the embedded scan, bool (N,): `match_points` refuses the others."""
    return _touches(embedding, embedding.valid, points_mm)


def _touches(embedding: Embedding, mask: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """(N,) is any of the 8 fine cells around each point (N, 3) mm set in the mask (z, y, x)."""
    base = np.floor(embedding.fine_geometry.mm_to_index(points_mm)[:, ::-1]).astype(np.int64)
    steps = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(-1, 3)
    cells = base[:, None] + steps
    inside = np.all((cells >= 0) & (cells < np.array(mask.shape)), axis=2)
    z, y, x = np.moveaxis(np.where(inside[..., None], cells, 0), -1, 0)
    return np.any(inside & np.asarray(mask, bool)[z, y, x], axis=1)


def _checked(template: Embedding, query: Embedding, points_mm: np.ndarray) -> np.ndarray:
    """Points as float64 (N, 3), inside the template scan, of embeddings that can be compared."""
    if template.model_sha256 != query.model_sha256:
        raise InputError("the two embeddings come from different models; embed both scans with the same one")
    try:
        points_mm = as_points(points_mm)
    except ValueError as error:
        raise InputError(f"{error}; give x, y, z in LPS millimetres for each point") from None
    if not len(points_mm):
        raise InputError("there are no points to match; place at least one in the template scan")
    if not np.isfinite(points_mm).all():
        raise InputError("points must be finite numbers; check the point file")
    outside = np.flatnonzero(~inside_scan(template, points_mm))
    if len(outside):
        place_mm = ", ".join(f"{value:.1f}" for value in points_mm[outside[0]])
        raise InputError(
            f"{len(outside)} of {len(points_mm)} points lie outside the template scan (first: {place_mm} mm LPS); "
            "check the coordinate system (LPS or RAS) and the scan"
        )
    return points_mm
