"""Implicit shapes in the canonical body, painted on whatever points the canonical coordinates are known at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline, PchipInterpolator

from uae.phantom.tissues import LABEL, TISSUE

Selection = tuple[slice, slice, slice] | np.ndarray
Layer = tuple[float, str, str]
"""(millimetres inside the surface at which the layer starts, structure or '' to keep it, tissue or '' to keep it)."""


Piece = tuple[Selection, np.ndarray]
Clip = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
OUTER_MM = 2.0
"""Layers may begin up to this far outside a surface (a wall around a lumen)."""


class Canvas:
    """Labels and tissues being painted over a set of points with known canonical coordinates.

    Later paint covers earlier paint; that order is the priority of the structures.

    Args:
        points: canonical coordinates, (3, z, y, x) for a grid or (3, N) for loose points, mm, float32.
        grid: whether the points are a grid, where neighbours lie side by side.
    """

    BIN_MM = 8.0
    EMPTY = 1 << 30

    def __init__(self, points: np.ndarray, grid: bool) -> None:
        self.x, self.y, self.z = points
        self.labels = np.zeros(points.shape[1:], np.uint8)
        self.tissues = np.zeros(points.shape[1:], np.uint8)
        self._grid = grid
        if grid:
            self._index_bins(points)

    def _index_bins(self, points: np.ndarray) -> None:
        """For every canonical bin: between which indices the voxels lie that fall into it or beside it."""
        shape = points.shape[1:]
        coarse = points[:, ::4, ::4, ::4]
        gaps = [np.abs(np.diff(coarse, axis=k)).max() / 4 for k in (1, 2, 3) if coarse.shape[k] > 1]
        per_voxel = float(max(gaps, default=self.BIN_MM))
        stride = int(max(5.0 // per_voxel, 1))
        nodes = [np.unique(np.append(np.arange(0, n, stride), n - 1)) for n in shape]
        lattice = points[(slice(None), *np.ix_(*nodes))]
        self._low = lattice.reshape(3, -1).min(axis=1) - self.BIN_MM
        bins = ((lattice - self._low[:, None, None, None]) / self.BIN_MM).astype(np.int32).reshape(3, -1)
        self._count = bins.max(axis=1) + 2
        flat = np.ravel_multi_index(tuple(bins), tuple(self._count))
        first = np.full((3, int(np.prod(self._count))), self.EMPTY, np.int32)
        last = np.full_like(first, -1)
        for k, index in enumerate(np.meshgrid(*nodes, indexing="ij")):
            index = index.reshape(-1).astype(np.int32)
            np.minimum.at(first[k], flat, index)
            np.maximum.at(last[k], flat, index)
        self._first, self._last = (a.reshape(3, *self._count) for a in (first, last))
        self._stride = stride
        # A point is at most half a stride from a node along each axis; the axes are nearly at right angles.
        self._reach = 0.75 * stride * per_voxel + 0.5

    def select(self, low: Sequence[float], high: Sequence[float]) -> Selection | None:
        """Everything that can lie in the canonical box low..high (x, y, z, mm), or None where nothing does."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        if not self._grid:
            inside = np.ones(self.labels.shape, bool)
            for axis, a, b in zip((self.x, self.y, self.z), low, high):
                inside &= (axis >= a) & (axis <= b)
            found = np.flatnonzero(inside)
            return found if found.size else None
        begin = np.maximum(((low - self._reach - self._low) // self.BIN_MM), 0).astype(int)
        end = np.minimum(((high + self._reach - self._low) // self.BIN_MM) + 1, self._count).astype(int)
        if np.any(begin >= end):
            return None
        block = tuple(slice(a, b) for a, b in zip(begin, end))
        first = [int(f[block].min()) for f in self._first]
        last = [int(f[block].max()) for f in self._last]
        if last[0] < 0:
            return None
        reach = (self._stride + 1) // 2
        return tuple(slice(max(a - reach, 0), b + reach + 1) for a, b in zip(first, last))

    def at(self, selection: Selection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Canonical x, y, z (mm) of a selection."""
        return self.x[selection], self.y[selection], self.z[selection]

    def paint(
        self, selection: Selection, mask: np.ndarray, structure: str, tissue: str, only: Sequence[str] = ()
    ) -> None:
        """Paint part of a selection.

        Args:
            selection: from select().
            mask: bool, of the selection's shape.
            structure: its new structure; '' keeps what is there.
            tissue: its new tissue; '' keeps what is there.
            only: structures that may be covered; empty: all.
        """
        labels, tissues = self.labels[selection], self.tissues[selection]
        if only:
            allowed = np.zeros(256, bool)
            allowed[[LABEL[name] for name in only]] = True
            mask = mask & allowed[labels]
        if structure:
            labels[mask] = LABEL[structure]
        if tissue:
            tissues[mask] = TISSUE[tissue]
        self.labels[selection], self.tissues[selection] = labels, tissues


def paint_union(
    canvas: Canvas, shapes: Sequence, layers: Sequence[Layer], only: Sequence[str] = (), clip: Clip | None = None
) -> None:
    """Paint several shapes as one body: each layer of all of them before the next layer.

    Args:
        canvas: what is painted on.
        shapes: Tube, Ellipsoid or Sheet.
        layers: from the outermost to the innermost.
        only: structures that may be covered; empty: all.
        clip: (x, y, z) canonical mm -> bool; where false nothing is painted.
    """
    pieces = [piece for shape in shapes for piece in shape.pieces(canvas, clip)]
    for start, structure, tissue in layers:
        for selection, depth in pieces:
            canvas.paint(selection, depth > start, structure, tissue, only)


def smooth_path(points: Sequence[Sequence[float]], radii: float | Sequence[float], step: float = 8.0) -> tuple:
    """A smooth curve through `points` (K, 3) mm as short segments.

    Returns:
        vertices (M, 3) mm and radii (M,) mm, at most about `step` mm apart.
    """
    points = np.asarray(points, float)
    radii = np.broadcast_to(np.asarray(radii, float), len(points))
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    count = max(int(np.ceil(lengths[-1] / step)) + 1, 3)
    at = np.linspace(0.0, lengths[-1], count)
    if len(points) == 2:
        return points[0] + at[:, None] / lengths[-1] * (points[1] - points[0]), np.interp(at, lengths, radii)
    return CubicSpline(lengths, points)(at), PchipInterpolator(lengths, radii)(at)


@dataclass
class Tube:
    """Capsules with changing radius along a curve; `flatten` stretches the cross-section along x, y, z.

    Args:
        vertices: (M, 3) mm; radii: (M,) mm.
    """

    vertices: np.ndarray
    radii: np.ndarray
    flatten: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def through(
        cls, points: Sequence[Sequence[float]], radii: float | Sequence[float], step: float = 8.0,
        flatten: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> Tube:  # fmt: skip
        """A tube along the smooth curve through `points` (K, 3) mm with `radii` mm at them."""
        return cls(*smooth_path(points, radii, step), flatten)

    def mirrored(self, side: int) -> Tube:
        """The same tube (defined on the left, x > 0) for side +1 (left) or -1 (right)."""
        return Tube(self.vertices * [side, 1, 1], self.radii, self.flatten)

    def pieces(self, canvas: Canvas, clip: Clip | None = None) -> list[Piece]:
        """(selection, depth inside the surface in mm) of every segment."""
        scale = np.array(self.flatten)
        found = []
        for k in range(len(self.vertices) - 1):
            a, b = self.vertices[k], self.vertices[k + 1]
            reach = (max(self.radii[k], self.radii[k + 1]) + OUTER_MM) * scale
            selection = canvas.select(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
            if selection is None:
                continue
            x, y, z = canvas.at(selection)
            depth = _capsule_depth(x, y, z, a, b, self.radii[k], self.radii[k + 1], scale)
            found.append((selection, depth if clip is None else np.where(clip(x, y, z), depth, -99.0)))
        return found

    def paint(
        self, canvas: Canvas, layers: Sequence[Layer], only: Sequence[str] = (), clip: Clip | None = None
    ) -> None:
        """Paint the layers from the outermost to the innermost; `clip(x, y, z)` -> bool limits them."""
        paint_union(canvas, [self], layers, only, clip)


def _capsule_depth(x, y, z, a, b, radius_a, radius_b, scale) -> np.ndarray:
    sx, sy, sz = (float(s) for s in scale)
    ax, ay, az = ((b - a) / scale).tolist()
    dx, dy, dz = (x - float(a[0])) / sx, (y - float(a[1])) / sy, (z - float(a[2])) / sz
    along = np.clip((dx * ax + dy * ay + dz * az) / (ax * ax + ay * ay + az * az + 1e-9), 0.0, 1.0)
    dx, dy, dz = dx - along * ax, dy - along * ay, dz - along * az
    return float(radius_a) + along * float(radius_b - radius_a) - np.sqrt(dx * dx + dy * dy + dz * dz)


@dataclass
class Ellipsoid:
    """Ellipsoid with semi-axes `radii` mm along the columns of `axes` (3, 3)."""

    center: Sequence[float]
    radii: Sequence[float]
    axes: np.ndarray | None = None

    def mirrored(self, side: int) -> Ellipsoid:
        """The same ellipsoid (defined on the left) for side +1 (left) or -1 (right)."""
        flip = np.diag([side, 1.0, 1.0])
        return Ellipsoid(flip @ np.asarray(self.center), self.radii, None if self.axes is None else flip @ self.axes)

    def depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """About the distance inside the surface, mm (negative outside)."""
        axes = np.eye(3) if self.axes is None else self.axes
        dx, dy, dz = x - float(self.center[0]), y - float(self.center[1]), z - float(self.center[2])
        first = np.zeros_like(dx)
        second = np.zeros_like(dx)
        for k, radius in enumerate(self.radii):
            c = dx * float(axes[0, k]) + dy * float(axes[1, k]) + dz * float(axes[2, k])
            first += (c / float(radius)) ** 2
            second += (c / float(radius) ** 2) ** 2
        length = np.sqrt(first)
        depth = (1.0 - length) * length / np.maximum(np.sqrt(second), 1e-6)
        # The formula is 0/0 at the very centre.
        return np.where(length < 1e-3, float(min(self.radii)), depth)

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Canonical box (low, high), mm."""
        axes = np.eye(3) if self.axes is None else self.axes
        reach = np.sqrt(((axes * np.asarray(self.radii, float)) ** 2).sum(axis=1))
        return np.asarray(self.center) - reach, np.asarray(self.center) + reach

    def pieces(self, canvas: Canvas, clip: Clip | None = None) -> list[Piece]:
        """(selection, depth inside the surface in mm)."""
        low, high = self.box()
        selection = canvas.select(low - OUTER_MM, high + OUTER_MM)
        if selection is None:
            return []
        x, y, z = canvas.at(selection)
        depth = self.depth(x, y, z)
        return [(selection, depth if clip is None else np.where(clip(x, y, z), depth, -99.0))]

    def paint(
        self, canvas: Canvas, layers: Sequence[Layer], only: Sequence[str] = (), clip: Clip | None = None
    ) -> None:
        """Paint the layers from the outermost to the innermost; `clip(x, y, z)` -> bool limits them."""
        paint_union(canvas, [self], layers, only, clip)


def rotation(rx: float, ry: float, rz: float) -> np.ndarray:
    """Rotation matrix (3, 3) from degrees about x, then y, then z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad([rx, ry, rz])):
        c, s = np.cos(angle), np.sin(angle)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        m = np.eye(3)
        m[i, i], m[i, j], m[j, i], m[j, j] = c, -s, s, c
        out = m @ out
    return out


@dataclass
class Sheet:
    """A curved plate: rows of points, joined bilinearly, with a half-thickness.

    Args:
        rows: (U >= 3, V, 3) mm control points; half: half-thickness mm.
    """

    rows: np.ndarray
    half: float

    def mirrored(self, side: int) -> Sheet:
        """The same plate (defined on the left) for side +1 (left) or -1 (right)."""
        return Sheet(np.asarray(self.rows, float) * [side, 1, 1], self.half)

    def pieces(self, canvas: Canvas, clip: Clip | None = None) -> list[Piece]:
        """(selection, depth) of tubes along the rows, close enough to merge into a plate."""
        rows = np.asarray(self.rows, float)
        curves = [smooth_path(row, self.half, 8.0)[0] for row in rows]
        count = max(len(c) for c in curves)
        across = np.stack([_resampled(c, count) for c in curves])
        gap = np.linalg.norm(np.diff(across, axis=0), axis=2).max()
        stations = np.linspace(0, len(rows) - 1, max(int(np.ceil((len(rows) - 1) * gap / (1.1 * self.half))), 3))
        spread = CubicSpline(np.arange(len(rows)), across)(stations)
        return [piece for curve in spread for piece in Tube(curve, np.full(count, self.half)).pieces(canvas, clip)]


def _resampled(curve: np.ndarray, count: int) -> np.ndarray:
    at = np.linspace(0, len(curve) - 1, count)
    return np.stack([np.interp(at, np.arange(len(curve)), curve[:, k]) for k in range(3)], axis=1)


class Hull:
    """A closed surface around the body's axis: half-width, front and back as functions of z.

    Args:
        knots: rows (z, half-width, front y, back y), mm, z rising.
    """

    STEP = 0.1
    POWER = 2.5
    """Exponent of the superellipse cross-section (2 = ellipse): trunks are a little boxy."""

    def __init__(self, knots: Sequence[Sequence[float]]) -> None:
        table = np.asarray(knots, float)
        self.low = float(table[0, 0])
        at = np.arange(table[0, 0], table[-1, 0] + self.STEP, self.STEP)
        width, front, back = PchipInterpolator(table[:, 0], table[:, 1:])(at).T
        self._tables = [a.astype(np.float32) for a in (width, 0.5 * (front + back), 0.5 * (back - front))]

    def profile(self, z: np.ndarray) -> list[np.ndarray]:
        """Half-width, centre y and half-depth (mm) at heights z; the end values hold beyond the knots."""
        k = np.clip((np.asarray(z) - self.low) / self.STEP, 0, len(self._tables[0]) - 1).astype(np.int32)
        return [table[k] for table in self._tables]

    def depth(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Distance inside the surface along the ray from the axis, mm (negative outside)."""
        width, center, half = self.profile(z)
        dy = y - center
        # |u|^2.5 as u^2 sqrt|u| costs a fraction of a power.
        u, v = np.abs(x / width), np.abs(dy / half)
        g = np.maximum((u * u * np.sqrt(u) + v * v * np.sqrt(v)) ** (1.0 / self.POWER), 1e-3)
        return np.sqrt(x * x + dy * dy + 1.0) * (1.0 / g - 1.0)

    def point(self, angle_deg: float, z: float, side: int = 1) -> np.ndarray:
        """Surface point at an angle from the back (0) over the side (90) to the front (180), mm (3,)."""
        width, center, half = (float(v) for v in self.profile(np.float32(z)))
        s, c = np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))
        return np.array(
            [side * width * abs(s) ** (2 / self.POWER), center + half * np.sign(c) * abs(c) ** (2 / self.POWER), z]
        )
