"""Smooth invertible maps: from a subject's body to the canonical one, and the motion inside one subject.

All maps are of the kind q = p + d(p) with a Lipschitz constant of d that is measured and kept below 0.65 per step,
so that each step is one-to-one and its inverse is the limit of the fixed-point iteration p <- q - d(p).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from uae.geometry import as_points
from uae.transform import Affine, Composite, Rigid, Transform

INVERSE_TOLERANCE_MM = 1e-5
LIPSCHITZ = 0.6
SHAPE_STREAM, POSE_STREAM = 11, 12

_ORGANS: tuple[tuple[tuple[float, float, float], float, float], ...] = (
    ((-75, -5, 195), 85, 0.16), ((100, 44, 203), 48, 0.18), ((66, 40, 137), 45, 0.12), ((-64, 42, 119), 45, 0.12),
    ((20, -28, 290), 65, 0.14), ((0, -40, -78), 45, 0.30), ((50, -25, 190), 50, 0.20), ((0, -40, 40), 80, 0.12),
    ((-85, 0, 330), 75, 0.08), ((85, 0, 330), 75, 0.08), ((0, 20, 385), 60, 0.08),
)  # fmt: skip
"""Centre (canonical mm), reach (mm) and largest relative change of size of regions that vary by themselves."""


class Smooth(Transform):
    """p -> p + d(p) for an analytic, contracting d; the inverse by fixed-point iteration."""

    def __init__(self, shift: Callable[[np.ndarray], np.ndarray], forward: bool = True) -> None:
        self.shift, self.forward = shift, forward

    def inverse(self) -> Smooth:
        """The same map the other way."""
        return Smooth(self.shift, not self.forward)

    def apply(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) mm to their images; the inverse direction is exact to 1e-5 mm."""
        points = as_points(points)
        if self.forward:
            return points + self.shift(points)
        guess = points - self.shift(points)
        active = np.arange(len(points))
        for _ in range(100):
            better = points[active] - self.shift(guess[active])
            moved = np.abs(better - guess[active]).max(axis=1) if len(active) else np.zeros(0)
            guess[active] = better
            active = active[moved > INVERSE_TOLERANCE_MM]
            if len(active) == 0:
                break
        return guess


class Waves:
    """d(p) = sum of sine waves with random directions, mm.

    Args:
        vectors: (K, 3) wave vectors, rad/mm; phases: (K,) rad; amplitudes: (K, 3) mm.
    """

    def __init__(self, vectors: np.ndarray, phases: np.ndarray, amplitudes: np.ndarray) -> None:
        self.vectors, self.phases, self.amplitudes = vectors, phases, amplitudes

    @classmethod
    def random(cls, rng: np.random.Generator, count: int, wavelengths: tuple[float, float], amplitude: float) -> Waves:
        """`count` waves of `wavelengths` mm whose sum has about `amplitude` mm RMS per axis."""
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = np.exp(rng.uniform(*np.log(wavelengths), count))
        sizes = rng.normal(size=(count, 3)) * (lengths / lengths.mean())[:, None]
        sizes *= amplitude * np.sqrt(2.0 / count) / np.sqrt(np.mean(sizes**2))
        return cls(2 * np.pi * directions / lengths[:, None], rng.uniform(0, 2 * np.pi, count), sizes)

    def scaled(self, factor: float) -> Waves:
        """The same waves with all amplitudes times `factor`."""
        return Waves(self.vectors, self.phases, self.amplitudes * factor)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 3) mm to d (N, 3) mm."""
        return np.sin(points @ self.vectors.T + self.phases) @ self.amplitudes


def jacobian(shift: Callable[[np.ndarray], np.ndarray], points: np.ndarray, delta: float = 0.5) -> np.ndarray:
    """Derivative (N, 3, 3) of d at points (N, 3), central differences; [:, i, j] = d d_i / d p_j."""
    columns = []
    for axis in range(3):
        step = np.zeros(3)
        step[axis] = delta
        columns.append((shift(points + step) - shift(points - step)) / (2 * delta))
    return np.stack(columns, axis=2)


def steepness(shift: Callable[[np.ndarray], np.ndarray], points: np.ndarray) -> float:
    """Largest spectral norm of the derivative of d over points (N, 3)."""
    return float(np.linalg.norm(jacobian(shift, points), ord=2, axis=(1, 2)).max())


def body_lattice(step: float = 20.0) -> np.ndarray:
    """Canonical points (N, 3) mm on a lattice over the whole body."""
    axes = [np.arange(a, b + 1, step) for a, b in ((-190, 190), (-125, 130), (-220, 490))]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _kept_contracting(shift, factor_of: Callable[[float], Callable]) -> Callable:
    """`factor_of(f)` with the largest f <= 1 that keeps the steepness (linear in f) under LIPSCHITZ."""
    steep = steepness(shift, body_lattice())
    return factor_of(min(1.0, LIPSCHITZ / max(steep, 1e-9)))


def _organ_shift(sizes: np.ndarray, moves: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def shift(points: np.ndarray) -> np.ndarray:
        out = np.zeros_like(points)
        for (center, reach, _), size, move in zip(_ORGANS, sizes, moves):
            offset = points - center
            weight = np.exp(-((offset / reach) ** 2).sum(axis=1))[:, None]
            out += weight * (size * offset + move)
        return out

    return shift


def _fat_shift(amount: float, belly: float) -> Callable[[np.ndarray], np.ndarray]:
    """Radial stretch of what lies outside the muscle wall, and of the belly."""

    def shift(points: np.ndarray) -> np.ndarray:
        z = np.clip(points[:, 2], -200, 440)
        # The outline's own profile changes too fast near the shoulders for a smooth map; a polynomial stands for it.
        width = 168.0 + 12.0 * np.cos((z + 60.0) / 75.0)
        y = points[:, 1]
        s = np.sqrt((points[:, 0] / width) ** 2 + (y / 114.0) ** 2)
        t = np.clip((s - 0.72) / 0.36, 0.0, 1.0)
        weight = amount * t * t * t * (10.0 - 15.0 * t + 6.0 * t * t)
        front = np.exp(-(((z - 60.0) / 85.0) ** 2)) / (1.0 + np.exp((y + 25.0) / 18.0))
        out = -weight[:, None] * points * [1.0, 1.0, 0.0]
        out[:, 1] -= belly * front * (y + 25.0)
        return out

    return shift


def _posture_shift(bend: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Lordosis, kyphosis and a little scoliosis: shifts of whole axial planes."""

    def shift(points: np.ndarray) -> np.ndarray:
        z = points[:, 2]
        out = np.zeros_like(points)
        out[:, 1] = bend[0] * np.exp(-(((z - 90) / 110) ** 2)) + bend[1] * np.exp(-(((z - 330) / 110) ** 2))
        out[:, 0] = bend[2] * np.exp(-(((z - 110) / 90) ** 2)) + bend[3] * np.exp(-(((z - 320) / 90) ** 2))
        return out

    return shift


def subject_map(seed: int, variation: float = 1.0, pose: Rigid | None = None) -> Composite:
    """The map from a subject's patient millimetres to the canonical body.

    Args:
        seed: decides the shape; `variation` scales how far it is from the canonical one.
        variation: 0 gives the canonical body itself.
        pose: canonical-like body frame -> patient mm; drawn from the seed where None (a few degrees and mm).

    Returns:
        Composite of the inverse pose and five one-to-one steps; `.inverse()` carries canonical points to the patient.
    """
    rng = np.random.default_rng([SHAPE_STREAM, seed])
    size = 1.0 + variation * rng.normal(0.0, 0.035)
    scale = size * (1.0 + variation * rng.normal(0.0, [0.04, 0.04, 0.025]))
    bend = variation * rng.normal(0.0, [9.0, 9.0, 4.0, 4.0])
    taper = variation * rng.normal(0.0, 0.04, 2)
    waves = Waves.random(rng, 18, (140.0, 420.0), variation * rng.uniform(2.0, 4.5))
    sizes = variation * rng.uniform(-1.0, 1.0, len(_ORGANS)) * [organ[2] for organ in _ORGANS]
    moves = variation * rng.normal(0.0, 3.5, (len(_ORGANS), 3))
    fat, belly = variation * rng.uniform(-0.05, 0.11), variation * rng.uniform(-0.10, 0.22)
    turn = Rigid.from_euler_deg(*np.random.default_rng([POSE_STREAM, seed]).normal(0.0, 2.0, 3), center=(0, 0, 120))
    pose = turn if pose is None else pose

    def taper_shift(points: np.ndarray) -> np.ndarray:
        # Broader shoulders or broader hips.
        out = np.zeros_like(points)
        share = np.tanh((points[:, 2] - 130.0) / 220.0)
        out[:, 0], out[:, 1] = taper[0] * share * points[:, 0], taper[1] * share * points[:, 1]
        return out

    organ = _kept_contracting(_organ_shift(sizes, moves), lambda f: _organ_shift(f * sizes, f * moves))
    wave = _kept_contracting(waves, waves.scaled)
    outer = _kept_contracting(_fat_shift(fat, belly), lambda f: _fat_shift(f * fat, f * belly))
    shrink = Affine(np.diag([*(1.0 / scale), 1.0]))
    steps: list[Transform] = [pose.inverse(), shrink]
    steps += [Smooth(shift) for shift in (_posture_shift(bend), taper_shift, outer, wave, organ)]
    return Composite(steps)


def on_lattice(geometry, to_canonical: Transform, lattice_mm: float = 8.0) -> np.ndarray:
    """Canonical coordinates of every voxel: exact on a coarse lattice, cubic in between.

    The maps have no detail under some 100 mm, so the cubic interpolation from 8 mm is exact to about 0.01 mm.

    Args:
        geometry: the grid (any direction).
        to_canonical: patient mm -> canonical mm.
        lattice_mm: distance of the lattice's nodes.

    Returns:
        (3, z, y, x) float32 canonical mm.
    """
    spacing = geometry.spacing[::-1]
    step = tuple(int(max(1, round(lattice_mm / s))) for s in spacing)
    nodes, weights = [], []
    for n, s in zip(geometry.shape, step):
        count = int(np.ceil((n - 1) / s)) + 1
        nodes.append(np.arange(-2, count + 2) * s)
        weights.append(_cubic_weights(n, s, count + 4))
    index = np.stack(np.meshgrid(*nodes, indexing="ij"), axis=-1).reshape(-1, 3)[:, ::-1].astype(float)
    values = to_canonical.apply(geometry.index_to_mm(index)).reshape(*(len(a) for a in nodes), 3)
    out = np.empty((3, *geometry.shape), np.float32)
    for axis in range(3):
        coarse = np.einsum("xi,zyi->zyx", weights[2], values[..., axis], optimize=True)
        coarse = np.einsum("yj,zjx->zyx", weights[1], coarse, optimize=True)
        out[axis] = np.einsum("zk,kyx->zyx", weights[0].astype(np.float32), coarse.astype(np.float32), optimize=True)
    return out


def _cubic_weights(n: int, step: int, count: int) -> np.ndarray:
    """(n, count) weights of the four-point Lagrange cubic from nodes at -2 step, -step, 0, step, ..."""
    at = np.arange(n) / step + 2.0
    base = np.clip(np.floor(at).astype(int), 1, count - 3)
    t = at - base
    out = np.zeros((n, count))
    rows = np.arange(n)
    out[rows, base - 1] = -t * (t - 1) * (t - 2) / 6
    out[rows, base] = (t + 1) * (t - 1) * (t - 2) / 2
    out[rows, base + 1] = -(t + 1) * t * (t - 2) / 2
    out[rows, base + 2] = (t + 1) * t * (t - 1) / 6
    return out
