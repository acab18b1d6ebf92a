"""Fixed-point matching: seeds around the template point are sent to the query and back until they no longer move.

UAE papers: seeds in an L^3 cube (L = 5 best), iterate A -> B -> A until t(i+1) = t(i), keep the fixed points nearer
than tau_dis, fit an affine map from the fixed points to their images and apply it to the template point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from uae.errors import InputError
from uae.matching.fit import LocalMap, local_map
from uae.matching.search import SearchIndex
from uae.progress import Cancel, check_cancel

logger = logging.getLogger(__name__)

Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From rows of one index to the best rows of the other and their similarities."""

_RELAX_STEP = 0.05


@dataclass(frozen=True)
class FixedPointOptions:
    """Settings of fixed-point matching.

    side: edge of the seed cube in fine cells, odd (papers: 5 best of 0, 3, 5, 7).
    tau_dis_mm: fixed points farther than this from the template point are dropped (papers give no value; 100 mm keeps
        what belongs to the same region).
    min_score: similarity below which a pair is dropped, None for no limit (authors' code: 0.8 for their networks). It
        is relaxed where fewer than 4 pairs would be left, with a warning, and such a match is never confident.
    max_round_trips: upper limit of the iteration (almost all seeds stand still after 2-4).
    released: the authors' published code instead: two round trips, no test for standing still, 200 mm, 0.8, one pair
        for each place in the query, mean of the pairs' votes.
    """

    side: int = 5
    tau_dis_mm: float = 100.0
    min_score: float | None = None
    max_round_trips: int = 10
    released: bool = False

    def __post_init__(self) -> None:
        if self.side < 1 or self.side % 2 == 0:
            raise InputError(f"the side of the seed cube must be an odd number of cells, got {self.side}; use 5")
        if self.max_round_trips < 1 or self.tau_dis_mm <= 0:
            raise InputError("fixed-point matching needs at least one round trip and a distance limit above 0 mm")

    @classmethod
    def authors_code(cls, side: int = 5) -> FixedPointOptions:
        """Settings of the authors' demo."""
        return cls(side=side, tau_dis_mm=200.0, min_score=0.8, max_round_trips=2, released=True)


@dataclass(frozen=True)
class Pairs:
    """Pairs of one template point: rows in the template and in the query index, similarities, was the limit relaxed."""

    template_rows: np.ndarray
    query_rows: np.ndarray
    scores: np.ndarray
    relaxed: bool = False

    def __len__(self) -> int:
        return len(self.template_rows)


class Memory:
    """A search that looks at every row only once: seeds of one or of many clicks share most of their way."""

    def __init__(self, search: Search, n_rows: int) -> None:
        self._search = search
        self._image = np.full(n_rows, -1, np.int32)
        self._score = np.zeros(n_rows, np.float32)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Best rows and similarities of `rows` (n,), which may repeat."""
        new = np.unique(rows[self._image[rows] < 0])
        if len(new):
            self._image[new], self._score[new] = self._search(new)
        return self._image[rows].astype(np.int64), self._score[rows]


def cube_seeds(index: SearchIndex, point_mm: np.ndarray, side: int) -> np.ndarray:
    """Rows of the body cells in the cube of side^3 fine cells around a point (3,) mm: at most side^3, perhaps none.

    Air is left out: the way back ends in the body, so a seed in air can never be a fixed point.
    """
    reach = np.arange(-(side // 2), side // 2 + 1)
    steps = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), axis=-1).reshape(-1, 3)
    rows = index.rows_at(index.nearest_cells(point_mm[None])[0] + steps)
    return rows[rows >= 0].astype(np.int64)


def find_pairs(
    template: SearchIndex,
    forward: Search,
    backward: Search,
    points_mm: np.ndarray,
    options: FixedPointOptions,
    cancel: Cancel | None = None,
) -> list[Pairs]:
    """Pairs that support each template point (N, 3) mm; the seeds of all points are searched together."""
    seeds = [cube_seeds(template, point, options.side) for point in points_mm]
    owner = np.repeat(np.arange(len(seeds)), [len(s) for s in seeds])
    start = np.concatenate([*seeds, np.zeros(0, np.int64)])
    rows, images, scores, keep = _iterate(start, forward, backward, options, cancel)
    result = []
    for i, point in enumerate(points_mm):
        mine = np.flatnonzero((owner == i) & keep)
        near = np.linalg.norm(template.points_mm[rows[mine]] - point, axis=1) < options.tau_dis_mm
        mine = mine[near]
        _, first = np.unique(images[mine], return_index=True)
        mine = mine[first]
        result.append(_above_score(Pairs(rows[mine], images[mine], scores[mine]), options.min_score))
    return result


def _iterate(
    rows: np.ndarray, forward: Search, backward: Search, options: FixedPointOptions, cancel: Cancel | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Send rows there and back until none moves: last rows, their images, similarities, and which of them to keep."""
    for _ in range(options.max_round_trips):
        check_cancel(cancel)
        images, scores = forward(rows)
        back, back_scores = backward(images)
        fixed = back == rows
        if options.released:
            rows, scores = back, back_scores
            continue
        if fixed.all():
            break
        rows = np.where(fixed, rows, back)
    if options.released:
        return rows, images, scores, np.ones(len(rows), bool)
    if not fixed.all():
        images, scores = forward(rows)
        fixed = backward(images)[0] == rows
    return rows, images, scores, fixed


def _above_score(pairs: Pairs, min_score: float | None) -> Pairs:
    """Drop pairs below the similarity limit, lowering it step by step where fewer than 4 would be left."""
    if min_score is None or not len(pairs):
        return pairs
    needed = min(4, len(pairs))
    limit = min_score
    while np.sum(pairs.scores >= limit) < needed:
        limit -= _RELAX_STEP
    relaxed = limit < min_score
    if relaxed:
        logger.warning("fewer than %d pairs reach the similarity %.2f; relaxed to %.2f", needed, min_score, limit)
    keep = pairs.scores >= limit
    return Pairs(pairs.template_rows[keep], pairs.query_rows[keep], pairs.scores[keep], relaxed)


def place(
    source_mm: np.ndarray, target_mm: np.ndarray, point_mm: np.ndarray, options: FixedPointOptions
) -> tuple[np.ndarray, LocalMap] | None:
    """Place of the template point (3,) in the query from its pairs (n, 3) mm, or None for fewer than 3 pairs."""
    if len(source_mm) < 3:
        return None
    fitted = local_map(source_mm, target_mm, point_mm)
    if options.released:
        votes = target_mm - (source_mm - point_mm) @ fitted.linear.T
        return votes.mean(axis=0), fitted
    return fitted.apply(point_mm[None])[0], fitted
