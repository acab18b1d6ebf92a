"""Search for the most similar body cell: exhaustive, by blocks (the usual way) and near a predicted place.

A descriptor is the concatenation of the heads' unit vectors over the square root of their number, so the dot product
of two descriptors is the mean of the heads' cosines (UAE, similarity of equal heads, no learned weights).
Descriptors are stored in half precision and accumulated in single precision: half-precision sums tie too often.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from uae.errors import InputError
from uae.matching.describe import describe_cells

if TYPE_CHECKING:
    from uae.embedding import Embedding

logger = logging.getLogger(__name__)

BLOCK_CELLS = 4
"""Edge of a block in fine cells (16 mm): large enough to make 64 cells one decision, small against organs."""

RADIUS_SHARE = 0.75
"""Share of a block's radius added to the similarity of its centre before the block is skipped.

1 is the Cauchy-Schwarz bound and always exact. A query that resembles a cell of the block with cosine s gains about
s * radius^2 over the centre, so the bound is never met in many dimensions; 0.75 keeps the answer of the exhaustive
search (tested: at least 99 %, also for noisy queries) and skips far more blocks."""

_FIRST_BLOCKS = 8
_QUERY_CHUNK = 256
_BUILD_CELLS = 4096
_DENSE_CELLS = 4096
_DENSE_SHARE = 0.5
_WINDOW_VALUES = 16_000_000
_FIRST_WINDOW_MM = 10.0


class SearchIndex:
    """Body cells of one embedding in block order, with the centre and the radius of each block.

    cells: (M, 3) int32 z, y, x on the fine grid; points_mm: (M, 3) float64 LPS mm of their centres;
    descriptors: (M, D) float16. Rows (indices into these arrays) name cells everywhere in this package.
    """

    def __init__(self, embedding: Embedding) -> None:
        """Collect the body cells of `embedding`; raises InputError where there are none."""
        self.geometry = embedding.fine_geometry
        cells = np.argwhere(np.asarray(embedding.body, bool) & np.asarray(embedding.valid, bool)).astype(np.int32)
        if not len(cells):
            raise InputError("no body was found in the scan, so nothing can be matched; check the image")
        shape = np.array(self.geometry.shape)
        blocks = np.ravel_multi_index(tuple((cells // BLOCK_CELLS).T), tuple(-(-shape // BLOCK_CELLS)))
        order = np.argsort(blocks, kind="stable")
        self.cells = cells[order]
        first = np.flatnonzero(np.diff(blocks[order], prepend=-1))
        self.starts = np.append(first, len(cells))
        self.points_mm = self.geometry.index_to_mm(self.cells[:, ::-1].astype(np.float64))
        self._row_of = np.full(tuple(shape), -1, np.int32)
        self._row_of[tuple(self.cells.T)] = np.arange(len(cells), dtype=np.int32)
        counts = np.diff(self.starts)
        self.block_points_mm = np.add.reduceat(self.points_mm, first, axis=0) / counts[:, None]
        apart = np.linalg.norm(self.points_mm - np.repeat(self.block_points_mm, counts, axis=0), axis=1)
        self.block_reach_mm = np.maximum.reduceat(apart, first)
        self.descriptors = describe_cells(embedding, self._row_of, len(cells))
        self._summarise()
        logger.debug(
            "search index: %d body cells, %d blocks of median radius %.3f",
            len(cells),
            self.n_blocks,
            float(np.median(self.radii)),
        )

    def _summarise(self) -> None:
        """Fill the centres and radii of the blocks, a bounded number of cells at a time."""
        self.centers = np.empty((self.n_blocks, self.descriptors.shape[1]), np.float32)
        self.radii = np.empty(self.n_blocks, np.float32)
        block = 0
        while block < self.n_blocks:
            stop = max(block + 1, int(np.searchsorted(self.starts, self.starts[block] + _BUILD_CELLS, "right")) - 1)
            begin, end = self.starts[block], self.starts[stop]
            values = _to_single(self.descriptors[begin:end])
            counts = np.diff(self.starts[block : stop + 1])
            local = self.starts[block:stop] - begin
            centers = np.add.reduceat(values, local, axis=0) / counts[:, None].astype(np.float32)
            values -= np.repeat(centers, counts, axis=0)
            self.centers[block:stop] = centers
            self.radii[block:stop] = np.sqrt(np.maximum.reduceat(np.einsum("ij,ij->i", values, values), local))
            block = stop

    @property
    def n_blocks(self) -> int:
        """Number of blocks that hold body cells."""
        return len(self.starts) - 1

    @property
    def pitch_mm(self) -> np.ndarray:
        """(3,) distance of neighbouring cells along z, y, x in mm."""
        return np.asarray(self.geometry.spacing, float)[::-1]

    def rows_at(self, cells: np.ndarray) -> np.ndarray:
        """Rows of the cells (..., 3) z, y, x; -1 where a cell is outside the grid or not body."""
        inside = np.all((cells >= 0) & (cells < np.array(self._row_of.shape)), axis=-1)
        z, y, x = np.moveaxis(np.where(inside[..., None], cells, 0), -1, 0)
        return np.where(inside, self._row_of[z, y, x], -1)

    def nearest_cells(self, points_mm: np.ndarray) -> np.ndarray:
        """(N, 3) int z, y, x of the grid cells closest to the points (N, 3) mm, body or not, also outside the grid."""
        return np.floor(self.geometry.mm_to_index(points_mm)[:, ::-1] + 0.5).astype(np.int64)

    def scores(self, query: np.ndarray) -> np.ndarray:
        """(M,) float32 similarity of one descriptor (D,) to every body cell."""
        result = np.empty(len(self.cells), np.float32)
        query = np.asarray(query, np.float32)
        for begin, values in self.chunks():
            np.matmul(values, query, out=result[begin : begin + len(values)])
        return result

    def best(
        self,
        queries: np.ndarray,
        far_from_mm: np.ndarray | None = None,
        far_mm: float = 20.0,
        start_mm: np.ndarray | None = None,
        start_radius_mm: float = 8.0,
        exhaustive: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Most similar body cell of each descriptor (Q, D): rows (Q,) int64 and similarities (Q,) float32.

        far_from_mm (Q, 3): only cells farther than `far_mm` from these points count (row -1, score -1: none is).
        start_mm (Q, 3), start_radius_mm: where to look first; it only saves time. exhaustive: look at every cell.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        rows = np.full(len(queries), -1, np.int64)
        scores = np.full(len(queries), -np.inf, np.float32)
        for begin in range(0, len(queries), _QUERY_CHUNK):
            part = slice(begin, begin + _QUERY_CHUNK)
            task = _Task(self, queries[part], None if far_from_mm is None else far_from_mm[part], far_mm)
            if start_mm is not None and far_from_mm is None:
                task.rows, task.scores, _ = self._window(queries[part], start_mm[part], start_radius_mm, 0.0)
            if exhaustive:
                task.dense()
            else:
                task.by_blocks()
            rows[part], scores[part] = task.rows, task.scores
        scores[rows < 0] = -1.0
        return rows, scores

    def best_near(
        self, queries: np.ndarray, predicted_mm: np.ndarray, weight: float, most: float = np.inf
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cell with the highest similarity - weight * (distance to the prediction / 10 mm)^2, for each descriptor.

        A soft prior beats a hard window and the prediction itself (our measurement: 53 % of the points of the hard
        set within 10 mm at weight 0.1, against 27 %, 48 %, and 19 % without a prior).
        most: largest penalty; a cell anywhere whose similarity is higher by more than it wins.
        Exact: no similarity exceeds 1, so a cell farther than 10 mm * sqrt((1 - best so far) / weight) cannot win.
        Returns rows (Q,) int64 and the plain similarities (Q,) float32.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if np.isfinite(most):
            return self._best_near_or_far(queries, predicted_mm, weight, most)
        rows, scores, objective = self._window(queries, predicted_mm, _FIRST_WINDOW_MM, weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = 10.0 * np.sqrt(np.maximum(1.0 + 1e-3 - objective, 0.0) / weight)
        ball = 4.2 * (reach / self.pitch_mm.min() + 1.0) ** 3
        dense = ~np.isfinite(reach) | (ball > 0.5 * len(self.cells))
        for i in np.flatnonzero(dense):
            values = self.scores(queries[i])
            penalty = weight * np.sum((self.points_mm - predicted_mm[i]) ** 2, axis=1) / 100.0
            rows[i] = int(np.argmax(values - penalty))
            scores[i] = values[rows[i]]
        todo = np.flatnonzero(~dense & (reach > _FIRST_WINDOW_MM))
        todo = todo[np.argsort(reach[todo])]
        for part in np.array_split(todo, max(1, len(todo) // 32)):
            if len(part):
                rows[part], scores[part], _ = self._window(queries[part], predicted_mm[part], reach[part].max(), weight)
        return rows, scores

    def _best_near_or_far(
        self, queries: np.ndarray, predicted_mm: np.ndarray, weight: float, most: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """`best_near` with a largest penalty: the best within its reach, or the best of all where that is better."""
        rows, scores, objective = self._window(queries, predicted_mm, 10.0 * np.sqrt(most / weight), weight)
        far_rows, far_scores = self.best(queries)
        far = far_scores - most > objective
        return np.where(far, far_rows, rows), np.where(far, far_scores, scores)

    def refine(
        self,
        rows: np.ndarray,
        queries: np.ndarray,
        predicted_mm: np.ndarray | None = None,
        weight: float = 0.0,
        most: float = np.inf,
    ) -> np.ndarray:
        """Sub-cell place of the maximum at `rows`: a parabola along each axis, clamped to half a cell.

        With `predicted_mm` the penalised similarity of `best_near` is refined. Returns (Q, 3) LPS mm.
        Along an axis where a neighbour is not body the cell's centre stays.
        """
        offsets = np.zeros((len(rows), 3))
        steps = np.concatenate([np.zeros((1, 3), int), np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        around = self.rows_at(self.cells[rows][:, None] + steps)
        values = self._similarity(around, np.ascontiguousarray(queries, np.float32)).astype(np.float64)
        if predicted_mm is not None:
            apart = self.points_mm[around] - np.asarray(predicted_mm)[:, None]
            values -= np.minimum(weight * np.sum(apart**2, axis=2) / 100.0, most)
        for axis in range(3):
            above, below = values[:, 1 + axis], values[:, 4 + axis]
            bend = 2.0 * values[:, 0] - above - below
            usable = (around[:, 1 + axis] >= 0) & (around[:, 4 + axis] >= 0) & (bend > 1e-9)
            shift = 0.5 * (above - below) / np.where(usable, bend, 1.0)
            offsets[:, axis] = np.where(usable, np.clip(shift, -0.5, 0.5), 0.0)
        return self.geometry.index_to_mm((self.cells[rows] + offsets)[:, ::-1])

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All descriptors in single precision, a chunk at a time: first row, values (n, D) in a buffer used again."""
        buffer = np.empty((_DENSE_CELLS, self.descriptors.shape[1]), np.float32)
        for begin in range(0, len(self.cells), _DENSE_CELLS):
            part = self.descriptors[begin : begin + _DENSE_CELLS]
            yield begin, _to_single(part, buffer[: len(part)])

    def _similarity(self, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """(Q, K) similarity of each query to its own rows (Q, K); rows of -1 give an arbitrary value."""
        return np.matmul(_to_single(self.descriptors[rows]), queries[:, :, None])[:, :, 0]

    def _window(
        self, queries: np.ndarray, center_mm: np.ndarray, radius_mm: float, weight: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Best penalised cell within `radius_mm` (and a little more) of each centre: rows, similarities, objective.

        Row -1 and -inf where no body cell is that near.
        """
        count = len(queries)
        reach = np.ceil(radius_mm / self.pitch_mm + 0.5).astype(int)
        steps = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), axis=-1).reshape(-1, 3)
        margin = 0.5 * float(np.linalg.norm(self.pitch_mm))
        steps = steps[np.linalg.norm(steps * self.pitch_mm, axis=1) <= radius_mm + margin]
        rows, objective = np.full(count, -1, np.int64), np.full(count, -np.inf)
        scores = np.full(count, -np.inf, np.float32)
        base = self.nearest_cells(center_mm)
        chunk = max(1, _WINDOW_VALUES // (len(steps) * queries.shape[1]))
        for begin in range(0, count, chunk):
            part = slice(begin, begin + chunk)
            near = self.rows_at(base[part, None] + steps)
            values = self._similarity(near, queries[part])
            apart = self.points_mm[near] - np.asarray(center_mm)[part, None]
            total = np.where(near >= 0, values - weight * np.sum(apart**2, axis=2) / 100.0, -np.inf)
            pick = np.argmax(total, axis=1)
            at = np.arange(len(pick))
            found = np.isfinite(total[at, pick])
            rows[part] = np.where(found, near[at, pick], -1)
            scores[part] = np.where(found, values[at, pick], -np.inf)
            objective[part] = total[at, pick]
        return rows, scores, objective


class _Task:
    """One batch of queries against one index; `rows` and `scores` hold the best found so far."""

    def __init__(self, index: SearchIndex, queries: np.ndarray, far_from_mm: np.ndarray | None, far_mm: float) -> None:
        self.index = index
        self.queries = queries
        self.far_from_mm = far_from_mm
        self.far_mm = far_mm
        self.rows = np.full(len(queries), -1, np.int64)
        self.scores = np.full(len(queries), -np.inf, np.float32)

    def by_blocks(self) -> None:
        """Look into the most promising blocks first, then into every block that can still hold a better cell."""
        index = self.index
        likely = self.queries @ index.centers.T
        likely += RADIUS_SHARE * index.radii
        if self.far_from_mm is not None:
            apart = np.linalg.norm(index.block_points_mm - self.far_from_mm[:, None], axis=2)
            likely[apart + index.block_reach_mm <= self.far_mm] = -np.inf
        first = np.zeros(likely.shape, bool)
        if index.n_blocks > _FIRST_BLOCKS:
            top = np.argpartition(likely, -_FIRST_BLOCKS, axis=1)[:, -_FIRST_BLOCKS:]
            np.put_along_axis(first, top, True, axis=1)
            self._visit(first)
        rest = (likely > self.scores[:, None]) & ~first
        if rest.mean() > _DENSE_SHARE:
            self.dense()
        else:
            self._visit(rest)

    def dense(self) -> None:
        """Look at every cell."""
        everyone = np.arange(len(self.queries))
        for begin, values in self.index.chunks():
            self._look(begin, values, everyone)

    def _visit(self, wanted: np.ndarray) -> None:
        """Look into block b for query q wherever wanted[q, b]."""
        starts = self.index.starts
        asked, block = np.nonzero(wanted)
        order = np.argsort(block, kind="stable")
        asked, block = asked[order], block[order]
        edges = np.append(np.flatnonzero(np.diff(block, prepend=-1)), len(block))
        for begin, end in pairwise(edges):
            at = block[begin]
            cells = self.index.descriptors[starts[at] : starts[at + 1]]
            self._look(starts[at], _to_single(cells), asked[begin:end])

    def _look(self, begin: int, descriptors: np.ndarray, asked: np.ndarray) -> None:
        """Compare the queries `asked` with the cells from row `begin` on (their descriptors); keep the better."""
        values = self.queries[asked] @ descriptors.T
        if self.far_from_mm is not None:
            apart = self.index.points_mm[None, begin : begin + len(descriptors)] - self.far_from_mm[asked, None]
            values[np.einsum("ijk,ijk->ij", apart, apart) <= self.far_mm**2] = -np.inf
        pick = values.argmax(axis=1)
        found = values[np.arange(len(pick)), pick]
        better = found > self.scores[asked]
        self.rows[asked[better]] = begin + pick[better]
        self.scores[asked[better]] = found[better]


def _to_single(half: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Half to single precision by torch: NumPy is more than ten times slower (our measurement)."""
    import torch

    if out is None:
        out = np.empty(half.shape, np.float32)
    torch.from_numpy(out).copy_(torch.from_numpy(half))
    return out


def search_index(embedding: Embedding) -> SearchIndex:
    """The search index of an embedding, built at the first call and kept on the embedding."""
    index = getattr(embedding, "_search_index", None)
    if index is None:
        index = SearchIndex(embedding)
        object.__setattr__(embedding, "_search_index", index)
    return index
