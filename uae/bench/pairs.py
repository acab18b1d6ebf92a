"""The pairs of `uae bench all`: two scans, and where the moving one's body voxels truly lie in the fixed one.

Seeds are fixed, and the subject split of the data is kept: R1 and R2 use the validation CTs, R4 and R5 the test
volumes. R3 takes the pairs that the collection names: scans of all kinds, one of them much like a pair that the
limits of the verdicts were calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uae.bench.data import VALIDATION_CTS, DataFolder
from uae.bench.deeds_pairs import known_deformation
from uae.bench.embedding import case_seed
from uae.bench.parts import along_body
from uae.bench.real_mr import HEAD, PELVIS, load_scan
from uae.bench.real_mr import PAIRS as REAL_PAIRS
from uae.errors import InputError
from uae.phantom import FIRST_TEST_SEED, correspondence, make_phantom
from uae.preprocess import body_mask
from uae.registration.rigid import arun
from uae.simulate import simulate_mr
from uae.simulate.pose import random_rotation
from uae.transform import Rigid
from uae.volume import Geometry, Volume, resample

LARGEST_MM, KNOT_MM = 12.0, 60.0
"""R2: the issue's 12 mm; knots at the smooth end of the hard set, since the field is to be followed, not guessed."""
R4_PAIRS = {
    "heads": (*REAL_PAIRS["head ct/t1"], 500.0),
    "brains": (*REAL_PAIRS["brain ct/t1"], 0.0),
}
"""Name -> CT, T1 and the T1 signal above which a voxel is tissue."""
R4_DEG, R4_MM, R4_CROP = (3.0, 30.0), 40.0, (0.65, 1.0)
R5_PAIRS = {"sagittal": ("t2_tra", "t2_sag"), "coronal": ("t2_tra", "t2_cor"), "both": ("t2_sag", "t2_cor")}
R5_DEG, R5_MM = (3.0, 15.0), 30.0
MAXIMUM_POINTS = 20_000


@dataclass
class BenchPair:
    """A pair with its truth.

    Attributes:
        fixed, moving: modality decided.
        moving_points, fixed_points: (N, 3) LPS mm; empty where there is no truth since nothing overlaps (R3).
        floor_mm: mean distance that the best rigid leaves.
        body: bool (z, y, x) on the fixed grid where folds are counted, or None.
        meta: what describes the case.
    """

    fixed: Volume
    moving: Volume
    moving_points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    fixed_points: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    floor_mm: float = 0.0
    body: np.ndarray | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class Pairs:
    """Makes pairs by scenario, part and case; CTs and their body masks are read once."""

    def __init__(self, data: DataFolder) -> None:
        self._data = data
        self._cts: dict[str, tuple[Volume, np.ndarray]] = {}

    def make(self, scenario: str, part: str, case: str) -> BenchPair:
        """One pair.

        Args:
            scenario: R1 to R5, L1, L2.
            part: a set (R1, L2), a pair of volumes, or the kind of phantoms (L1).
            case: as `cases` names them.

        Raises:
            InputError: unknown names, or a volume is missing.
        """
        makers: dict[str, Callable[[str, str], BenchPair]] = {
            "R1": self._simulated, "L2": self._simulated, "R2": self._deformed, "R3": self._unrelated,
            "R4": self._head, "R5": self._prostate, "L1": phantoms,
        }  # fmt: skip
        if scenario not in makers:
            raise InputError(f"scenario {scenario!r} has no pairs; choose from {', '.join(makers)}")
        return makers[scenario](part, case)

    def _ct(self, subject: str) -> tuple[Volume, np.ndarray]:
        if subject not in self._cts:
            ct = self._data.ct(subject)
            self._cts[subject] = (ct, body_mask(ct))
        return self._cts[subject]

    def _simulated(self, part: str, case: str) -> BenchPair:
        subject, index = _split(case)
        if subject not in VALIDATION_CTS:
            raise InputError(f"{subject} is no validation CT; choose from {', '.join(VALIDATION_CTS)}")
        ct, body = self._ct(subject)
        made = simulate_mr(ct, case_seed(subject, index), part, body)
        return BenchPair(ct, made.moving, made.moving_body_points, made.fixed_body_points, made.rigid_floor_mm,
                         meta=made.meta)  # fmt: skip

    def _deformed(self, part: str, case: str) -> BenchPair:
        subject, index = _split(case)
        seed = 40 + 10 * VALIDATION_CTS.index(subject) + index
        made = known_deformation(self._data, subject, LARGEST_MM, KNOT_MM, seed)
        fitted = arun(made.moving_points, made.fixed_points)
        floor = float(np.linalg.norm(fitted.apply(made.moving_points) - made.fixed_points, axis=1).mean())
        return BenchPair(made.fixed, made.moving, made.moving_points, made.fixed_points, floor, made.body,
                         {"seed": seed, "largest_mm": LARGEST_MM})  # fmt: skip

    def _unrelated(self, part: str, case: str) -> BenchPair:
        first, second = (make(self._data) for make in UNRELATED[part])
        return BenchPair(first, second) if case == "forward" else BenchPair(second, first)

    def _head(self, part: str, case: str) -> BenchPair:
        *names, limit = R4_PAIRS[part]
        ct, mr = (load_scan(self._data, name) for name in names)
        number = int(case.removeprefix("move"))
        rng = np.random.default_rng([44, list(R4_PAIRS).index(part), number])
        return _turned_pair(ct, mr, rng, R4_DEG, R4_MM, R4_CROP, limit)

    def _prostate(self, part: str, case: str) -> BenchPair:
        fixed, moving = (load_scan(self._data, f"{PELVIS}/{name}") for name in R5_PAIRS[part])
        rng = np.random.default_rng([55, list(R5_PAIRS).index(part), int(case.removeprefix("move"))])
        return _turned_pair(fixed, moving, rng, R5_DEG, R5_MM, (1.0, 1.0), 0.1 * float(moving.array.mean()))


def _split(case: str) -> tuple[str, int]:
    subject, _, index = case.rpartition(".")
    if not index.isdigit():
        raise InputError(f"a case is SUBJECT.NUMBER, not {case!r}")
    return subject, int(index)


def _turned_pair(
    fixed: Volume, source: Volume, rng: np.random.Generator, degrees: tuple[float, float], most_mm: float,
    crop: tuple[float, float], limit: float,
) -> BenchPair:  # fmt: skip
    """`source` lies in the fixed scan's space; the moving scan is a turned crop of it, so `move` is the truth."""
    grid = source.geometry
    size = np.maximum(np.rint(rng.uniform(*crop, 3) * grid.size), 8).astype(int)
    first = np.floor(rng.uniform(0.0, 1.0, 3) * (grid.size - size)).astype(int)
    middle = grid.index_to_mm((first + (size - 1) / 2.0)[None])[0]
    angle = rng.uniform(*degrees)
    turn = random_rotation(angle, rng)
    direction = rng.standard_normal(3)
    distance = rng.uniform(0.0, most_mm)
    shift = distance * direction / np.linalg.norm(direction)
    # The crop's middle stays in the scan, and the new scan lies `shift` away from it.
    move = Rigid.from_rotation(turn, middle - turn @ (middle + shift))
    own = Geometry(tuple(size[::-1]), grid.spacing, grid.index_to_mm(first.astype(float))[0] + shift, grid.direction)
    moving = resample(source, own, move, fill=source.minimum)
    points = own.index_to_mm(np.argwhere(moving.array > limit)[:, ::-1].astype(np.float64))
    if len(points) > MAXIMUM_POINTS:
        points = points[np.sort(rng.choice(len(points), MAXIMUM_POINTS, replace=False))]
    meta = {"rotation_deg": angle, "shift_mm": distance, "share": float(np.prod(size / grid.size))}
    return BenchPair(fixed, moving, points, move.apply(points), 0.0, meta=meta)


def phantoms(part: str, case: str) -> BenchPair:
    """L1: two people of the test range with their named landmarks, CT to CT or CT to MR ("ct-ct", "ct-mr")."""
    number = int(case.removeprefix("pair"))
    seed = FIRST_TEST_SEED + 700 + 2 * number
    first = make_phantom(seed, mr=False)
    second = make_phantom(seed + 1, ct=part == "ct-ct", mr=part == "ct-mr", mr_slice_mm=4.0)
    names = [name for name in first.landmarks if name in second.landmarks]
    points = np.array([first.landmarks[name] for name in names])
    query = second.ct if part == "ct-ct" else second.mr
    truth = correspondence(first, second).apply(points)
    return BenchPair(query, first.ct, points, truth, meta={"seeds": [seed, seed + 1], "landmarks": names})


UNRELATED: dict[str, tuple[Callable[[DataFolder], Volume], Callable[[DataFolder], Volume]]] = {
    "chest-thighs": (
        lambda data: data.ct("ct_flt001_chest_fu"), lambda data: data.ct("ct_flt001_abdthigh"),
    ),
    "neck-lumbar": (
        lambda data: data.volume("spine_tptbox/ct_L3.nii.gz", "ct"),
        lambda data: data.volume("spine_tptbox/mr_C6_t2.nii.gz", "mr"),
    ),
    "head-prostate": (
        lambda data: data.volume(f"{HEAD}/ct_ts_brain_atlas_1mm.nii.gz", "ct"),
        lambda data: data.volume(f"{PELVIS}/t2_tra.nii.gz", "mr"),
    ),
    "chest-pelvis": (
        lambda data: data.ct("ct_lidc0001_chest"), lambda data: along_body(data.ct("ct_mij_abdpelvis"), 0.0, 0.5),
    ),
}  # fmt: skip
"""R3: pairs of the data collection that show nothing in common."""
