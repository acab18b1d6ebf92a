"""Real scans of different people, where no true place is known: cycle errors, and kidneys of an MR found from CTs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from uae.bench.data import VALIDATION_CTS
from uae.bench.embedding import match_record
from uae.bench.metrics import MATCH_LIMIT_MM, is_confident
from uae.bench.study import Setup, Study, by_method, error_figures, match_kind, method_name
from uae.embedding import Embedding
from uae.phantom import VALIDATION_SEEDS, make_phantom
from uae.phantom.organs import KIDNEYS
from uae.registration.adareg import body_points, spread_sample
from uae.volume import Volume

ABDOMEN, CHEST = VALIDATION_CTS
PARTNERS = {
    ABDOMEN: ("ct_thca_torso", "ct_flt001_abdthigh"),
    CHEST: ("ct_thca_torso", "ct_popi_chest", "ct_cmbcrc_chest"),
}
"""Validation CT -> training CTs of other people that show (almost) all of it. The validation subject decides what is
measured: its points are sought in the other person and back, so that every point has a counterpart. The two validation
CTs share a hand's breadth only."""
CYCLE_POINTS, QUICK_CYCLE_POINTS = 80, 30

MR = "mr_ukatge_abdcor"
KIDNEY_LABELS = {"left": 1, "right": 2}
PHANTOM_SEEDS = tuple(VALIDATION_SEEDS[0] + 1500 + k for k in range(3))
KIDNEY_POINTS = {
    "left_centre": (84.0, 29.0, -127.0), "left_upper_pole": (60.0, 43.0, -92.0),
    "left_lower_pole": (88.0, 3.0, -174.0), "left_lateral": (104.0, 31.0, -126.0),
    "right_centre": (-68.0, 22.0, -147.0), "right_upper_pole": (-52.0, 53.0, -112.0),
    "right_lower_pole": (-66.0, -5.0, -188.0), "right_lateral": (-78.0, 29.0, -156.0),
}  # fmt: skip
"""In the abdomen CT, LPS mm: centroids of the enhanced kidneys (125-330 HU in a box drawn around each) and, near their
ends and side, points deep in the parenchyma; made and looked at by us."""


def real_cases(setup: Setup) -> list[str]:
    """Cases "cycle CT OTHER" and "kidney TEMPLATE", TEMPLATE a phantom seed or the abdomen CT."""
    few = slice(1) if setup.quick else slice(None)
    cycles = [f"cycle {ct} {other}" for ct, others in PARTNERS.items() for other in others[few]]
    return cycles + [f"kidney {template}" for template in (ABDOMEN, *PHANTOM_SEEDS[few])]


def measure_real(setup: Setup, name: str) -> dict[str, Any]:
    """One case of `real_cases`: {"kind", ..., "matches": {method: records}}."""
    kind, template, *rest = name.split()
    if kind == "kidney":
        return _kidneys(setup, template)
    other = rest[0]
    own = setup.remember(template, lambda: setup.embed(setup.data.ct(template)))
    points = spread_sample(body_points(own), _cycle_points(setup), np.random.default_rng(0))
    matches = setup.records(own, setup.embed(setup.data.ct(other)), points, None)
    return {"kind": kind, "ct": template, "other": other, "matches": matches}


def _cycle_points(setup: Setup) -> int:
    return QUICK_CYCLE_POINTS if setup.quick else CYCLE_POINTS


def phantom_kidney_points(seed: int) -> tuple[Volume, dict[str, np.ndarray]]:
    """CT of a phantom and, named as in KIDNEY_POINTS, places in its kidneys, (3,) LPS mm each."""
    phantom = make_phantom(seed, mr=False)
    to_patient = phantom.to_canonical.inverse()
    points = {f"{s}_centre": to_patient.apply(np.array([KIDNEYS[s].center], float))[0] for s in KIDNEY_LABELS}
    prefix = "kidney_"
    points |= {k.removeprefix(prefix): v for k, v in phantom.landmarks.items() if k.startswith(prefix)}
    return phantom.ct, points


def _kidneys(setup: Setup, template: str) -> dict[str, Any]:
    if template == ABDOMEN:
        ct, points = setup.data.ct(ABDOMEN), {k: np.array(v) for k, v in KIDNEY_POINTS.items()}
    else:
        ct, points = phantom_kidney_points(int(template))
    mr = setup.remember(MR, lambda: setup.embed(setup.data.volume(f"{MR}/mr.nii.gz", "mr")))
    labels = Volume.read(setup.data.file(f"{MR}/kidneys_L1_R2.nii.gz"), label=True)
    matches = kidney_matches(setup, setup.embed(ct), mr, points, labels)
    return {"kind": "kidney", "template": template, "matches": matches}


def label_distances(places: np.ndarray, labels: Volume, number: int) -> np.ndarray:
    """Distance (N,) mm from places (N, 3) LPS mm to the nearest voxel centre of a label, 0 inside one of its voxels."""
    inside = labels.sample(places, order=0) == number
    cells = labels.geometry.index_to_mm(np.argwhere(labels.array == number)[:, ::-1])
    return np.where(inside, 0.0, cKDTree(cells).query(places)[0])


def kidney_matches(
    setup: Setup, template: Embedding, query: Embedding, points: Mapping[str, np.ndarray], labels: Volume
) -> dict[str, list[dict[str, Any]]]:
    """Find kidney points in a scan whose kidneys are labelled.

    Args:
        setup: sides and model.
        template: of the scan with the points.
        query: of the labelled scan.
        points: "left_..." or "right_..." -> (3,) LPS mm.
        labels: KIDNEY_LABELS on any grid in the query's millimetres.

    Returns:
        By method one record a point: `uae.bench.embedding.match_record` with error_mm the distance to the label of the
        same side (0 inside), `label`, `inside`, `other_kidney` (it lies in the other one), and for centres `centre_mm`:
        the distance to the label's centroid.
    """
    sides = np.array([name.split("_")[0] for name in points])
    mm = np.array(list(points.values()))
    middles = {
        side: labels.geometry.index_to_mm(np.argwhere(labels.array == number)[:, ::-1]).mean(axis=0)
        for side, number in KIDNEY_LABELS.items()
    }
    result: dict[str, list[dict[str, Any]]] = {}
    for cube in setup.sides:
        found = setup.match(template, query, mm, cube)
        places = np.array([match.point_mm for match in found])
        apart = {side: label_distances(places, labels, number) for side, number in KIDNEY_LABELS.items()}
        own = result[method_name(cube)] = []
        for k, (name, side) in enumerate(zip(points, sides, strict=True)):
            other = "right" if side == "left" else "left"
            record = {
                **match_record(found[k], match_kind(cube), None), "label": name,
                "error_mm": round(float(apart[side][k]), 4), "inside": bool(apart[side][k] == 0.0),
                "other_kidney": bool(apart[other][k] == 0.0),
            }  # fmt: skip
            if name.endswith("_centre"):
                record["centre_mm"] = round(float(np.linalg.norm(places[k] - middles[side])), 4)
            own.append(record)
    return result


def cycle_figures(records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any] | None) -> dict[str, float]:
    """matches, cycle_median_mm, cycle_mean_mm, cycle_p95_mm, cycle_under_10mm and confident_share of match records.

    A short cycle is no proof: what leads back may still be another place.
    """
    cycles = np.array([record["cycle_mm"] for record in records], dtype=np.float64)
    return {
        "matches": len(records),
        "cycle_median_mm": float(np.median(cycles)),
        "cycle_mean_mm": float(cycles.mean()),
        "cycle_p95_mm": float(np.percentile(cycles, 95)),
        "cycle_under_10mm": float((cycles <= MATCH_LIMIT_MM).mean()),
        "confident_share": float(np.mean([is_confident(record, limits) for record in records])),
    }


def kidney_figures(records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any] | None) -> dict[str, float]:
    """`error_figures` of distances to the right label, `inside`, `other_kidney` (shares) and `centre_median_mm`."""
    centres = [record["centre_mm"] for record in records if "centre_mm" in record]
    return {
        **error_figures(records, limits),
        "inside": float(np.mean([record["inside"] for record in records])),
        "other_kidney": float(np.mean([record["other_kidney"] for record in records])),
        "centre_median_mm": float(np.median(centres)) if centres else float("nan"),
    }


def summarise_real(records: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Under `cycle` the figures of each validation CT, under `kidneys` those from the real CT and from phantoms."""
    limits = thresholds.get("match")
    result: dict[str, Any] = {}
    for ct in PARTNERS:
        own = [record for record in records if record.get("ct") == ct]
        if own:
            figures = by_method(own, lambda matches: cycle_figures(matches, limits))
            result.setdefault("cycle", {})[ct] = {"pairs": len(own), **figures}
    for source in ("real_ct", "phantom_ct"):
        own = [r for r in records if r["kind"] == "kidney" and (r["template"] == ABDOMEN) == (source == "real_ct")]
        if own:
            figures = by_method(own, lambda matches: kidney_figures(matches, limits))
            result.setdefault("kidneys", {})[source] = {"templates": len(own), **figures}
    return result


REAL_INTER_SUBJECT = Study(
    "real_inter_subject", real_cases, measure_real, summarise_real,
    lambda setup: {"sides": setup.sides, "cycle_points": _cycle_points(setup)},
)  # fmt: skip
