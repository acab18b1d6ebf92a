"""Real MR against real MR or CT of one body after a known rigid move (test data: reported, never chosen by)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uae.bench.data import DataFolder
from uae.bench.metrics import CONFIDENT_FAILURE_MM, RIGID_SUCCESS_MM, transform_tre, verdict_of_case
from uae.bench.study import Setup, Study
from uae.geometry import Geometry
from uae.preprocess import body_mask
from uae.registration.adareg import ACCEPTED, REFUSED, REVIEW
from uae.registration.pipeline import RegisterOptions, register
from uae.simulate.pose import LARGEST_SHIFT_MM, random_rotation
from uae.transform import Rigid
from uae.volume import Volume, resample

MOVES, QUICK_MOVES = 3, 1
ROTATION_DEG = (3.0, 15.0)
"""As in the benchmark's set standard15."""
SPACING_MM = 1.0
"""Grid of the turned scan: finer than the network's 2 mm, so that only one smoothing counts."""
MAXIMUM_POINTS = 20000

PELVIS = "mr_prostatex0000_pelvis"
HEAD = "head_mni_ctmr"
PAIRS = {
    "pelvis sag/cor": (f"{PELVIS}/t2_sag", f"{PELVIS}/t2_cor"),
    "pelvis sag/tra": (f"{PELVIS}/t2_sag", f"{PELVIS}/t2_tra"),
    "pelvis cor/tra": (f"{PELVIS}/t2_cor", f"{PELVIS}/t2_tra"),
    "head ct/t1": (f"{HEAD}/ct_scct_2mm_smooth_cormack", f"{HEAD}/mr_mni152_t1_2mm_head"),
    "brain ct/t1": (f"{HEAD}/ct_scct_ss_1mm", f"{HEAD}/mr_mni152_t1_1mm"),
}
"""Fixed and moving scan, aligned as stored. What differs nevertheless counts as error: between the series of a session
the patient has moved (mutual information, started from the stored places, ends 7, 2 and 5 mm away at the worst corner),
and population templates show different heads."""


def hounsfield_from_cormack(values: np.ndarray) -> np.ndarray:
    """Undo the scale of the CT head template: 0..900 and beyond 2900 one to one, -124..76 HU stretched tenfold.

    Rorden et al., "Age-specific CT and MRI templates for spatial normalization", NeuroImage 2012, and their published
    code. Our check: the brain comes out within 15 HU of the skull-stripped template, which is stored in HU.
    """
    raw = np.interp(values, (0.0, 900.0, 2900.0, 4900.0), (0.0, 900.0, 1100.0, 3100.0))
    return (raw - 1024.0).astype(np.float32)


def load_scan(data: DataFolder, name: str) -> Volume:
    """A scan of PAIRS with its modality known; CT templates as HU with air around them."""
    volume = data.volume(f"{name}.nii.gz", "ct" if "/ct_" in name else "mr")
    if name.endswith("cormack"):
        return volume.replace(hounsfield_from_cormack(volume.array))
    if name.endswith("ct_scct_ss_1mm"):
        mask = Volume.read(data.file(f"{HEAD}/ct_scct_ss_mask.nii.gz"), label=True)
        inside = resample(mask, volume.geometry, order=0).array > 0
        return volume.replace(np.where(inside, volume.array, -1000.0).astype(np.float32))
    return volume


def random_move(center_mm: np.ndarray, rng: np.random.Generator) -> Rigid:
    """A turn by ROTATION_DEG about a random axis through a centre (3,) mm, and a shift of up to LARGEST_SHIFT_MM."""
    turn = random_rotation(float(rng.uniform(*ROTATION_DEG)), rng)
    away = rng.standard_normal(3)
    away *= rng.uniform(0.0, LARGEST_SHIFT_MM) / np.linalg.norm(away)
    return Rigid.from_rotation(turn, center_mm + away - turn @ center_mm)


def moved(volume: Volume, move: Rigid, spacing_mm: float = SPACING_MM) -> Volume:
    """The same body after a rigid move, its voxels resampled onto an upright grid that holds all of the scan.

    Args:
        volume: the scan.
        move: where a point of the scan goes, mm -> mm.
        spacing_mm: of the new grid.

    Returns:
        The turned scan; beyond the old one's edges lies air, or the MR's lowest value.
    """
    corners = move.apply(volume.geometry.corners_mm())
    low, high = corners.min(axis=0), corners.max(axis=0)
    size = np.ceil((high - low) / spacing_mm).astype(int)
    grid = Geometry(tuple(int(n) for n in size[::-1]), np.full(3, spacing_mm), low + spacing_mm / 2, np.eye(3))
    return resample(volume, grid, move.inverse(), antialias=True)


def real_mr_cases(setup: Setup) -> list[str]:
    """Cases "PAIR #MOVE"."""
    return [f"{pair} #{move}" for pair in PAIRS for move in range(QUICK_MOVES if setup.quick else MOVES)]


def measure_real_mr(setup: Setup, name: str) -> dict[str, Any]:
    """Turn the moving scan of a pair, register, compare with the truth.

    Returns:
        {"pair", "rotation_deg", "floor_mm" 0, "registration": {verdict, reason, tre_mm (the embedding's rigid),
        features, ...}, "refined": {tre_mm, overlap_tre_mm, failed, moved_mm, moved_deg}}; errors are means over the
        turned scan's body voxels, overlap_tre_mm over those that the fixed scan shows.
    """
    pair, number = name.rsplit(" #", 1)
    fixed, moving = (load_scan(setup.data, file) for file in PAIRS[pair])
    rng = np.random.default_rng([list(PAIRS).index(pair), int(number)])
    move = random_move(moving.geometry.center_mm(), rng)
    turned = moved(moving, move)
    cells = np.argwhere(body_mask(turned))
    cells = rng.permutation(cells)[:MAXIMUM_POINTS]
    points = turned.geometry.index_to_mm(cells[:, ::-1])
    points = points[moving.geometry.contains(move.inverse().apply(points))]
    truth = move.inverse().apply(points)
    found = register(fixed, turned, setup.model, RegisterOptions(device=setup.device, cache=False), cancel=setup.cancel)
    first, refinement = found.adareg, found.refinement
    tre = transform_tre(first.transform, points, truth)
    shown = fixed.geometry.contains(truth)
    # A refused pair is not refined by `register`; its candidate counts as it is.
    return {
        "pair": pair, "rotation_deg": move.rotation_angle_deg(), "floor_mm": 0.0,
        "inside_fixed": float(shown.mean()),
        "registration": {
            "verdict": first.verdict, "reason": first.reason, "tre_mm": tre, "queried": first.queried,
            "mutual": first.mutual, "inliers": first.inliers, "features": first.features,
        },
        "refined": {
            "tre_mm": transform_tre(found.linear, points, truth),
            "overlap_tre_mm": transform_tre(found.linear, points[shown], truth[shown]),
            "failed": bool(refinement and refinement.failed),
            "moved_mm": None if refinement is None else refinement.moved_mm,
            "moved_deg": None if refinement is None else refinement.moved_deg,
        },
    }  # fmt: skip


def _errors(records: Sequence[Mapping[str, Any]], stage: str, key: str) -> np.ndarray:
    """(N,) mm; no estimate is infinitely wrong."""
    values = [record[stage][key] for record in records]
    return np.array([np.inf if value is None else value for value in values], dtype=np.float64)


def summarise_real_mr(records: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """By pair and for `all`: median TREs, success (rigid within 5 mm), verdicts and confident failures as shares."""
    result: dict[str, Any] = {}
    for pair in ("all", *dict.fromkeys(record["pair"] for record in records)):
        own = [record for record in records if pair in ("all", record["pair"])]
        rigid, refined = _errors(own, "registration", "tre_mm"), _errors(own, "refined", "tre_mm")
        verdicts = np.array([verdict_of_case(record, thresholds.get("registration")) for record in own])
        result[pair] = {
            "cases": len(own),
            "rigid_median_tre_mm": float(np.median(rigid)),
            "refined_median_tre_mm": float(np.median(refined)),
            "overlap_median_tre_mm": float(np.median(_errors(own, "refined", "overlap_tre_mm"))),
            "rigid_success": float((rigid <= RIGID_SUCCESS_MM).mean()),
            "accepted_rate": float((verdicts == ACCEPTED).mean()),
            "review_rate": float((verdicts == REVIEW).mean()),
            "refusal_rate": float((verdicts == REFUSED).mean()),
            "confident_failure_rate": float(((verdicts == ACCEPTED) & (refined > CONFIDENT_FAILURE_MM)).mean()),
        }
    return result


REAL_MR = Study(
    "real_mr", real_mr_cases, measure_real_mr, summarise_real_mr,
    lambda setup: {"rotation_deg": ROTATION_DEG, "spacing_mm": SPACING_MM}, test=True,
)  # fmt: skip
