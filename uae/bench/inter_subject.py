"""Named landmarks of one phantom found in another: other people, CT to CT and CT to MR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from uae.bench.embedding import match_record
from uae.bench.metrics import is_confident
from uae.bench.study import Setup, Study, by_method, error_figures, match_kind, method_name
from uae.embedding import Embedding
from uae.phantom import VALIDATION_SEEDS, make_phantom

FIRST_SEED = VALIDATION_SEEDS[0] + 1000
"""Seeds of the landmark study, from the validation range (contract, section 2) and away from those of the negative
pairs; the weights are trained on seeds below 100000, and tests and the demo start at 200000."""
PAIRS, QUICK_PAIRS = 8, 2
MR_SLICE_MM = 4.0
VERTEBRA = "vertebra_"


def phantom_pairs(setup: Setup) -> list[str]:
    """Cases "ct_ct A B" and "ct_mr A B": landmarks of phantom A's CT are sought in phantom B's scan."""
    seeds = [FIRST_SEED + k for k in range((QUICK_PAIRS if setup.quick else PAIRS) + 1)]
    return [f"{kind} {a} {b}" for a, b in pairwise(seeds) for kind in ("ct_ct", "ct_mr")]


def level_of(place: np.ndarray, landmarks: Mapping[str, np.ndarray]) -> str:
    """Name of the vertebra whose centre lies nearest to a place.

    Args:
        place: (3,) LPS mm.
        landmarks: name -> (3,) LPS mm in the same scan; those that begin with `vertebra_` count.
    """
    names = [name for name in landmarks if name.startswith(VERTEBRA)]
    apart = [np.linalg.norm(np.asarray(landmarks[name]) - place) for name in names]
    return names[int(np.argmin(apart))]


def landmark_matches(
    setup: Setup,
    template: Embedding,
    query: Embedding,
    template_marks: Mapping[str, np.ndarray],
    query_marks: Mapping[str, np.ndarray],
) -> dict[str, list[dict[str, Any]]]:
    """Find the landmarks that both scans show.

    Args:
        setup: sides and model.
        template: of the scan whose landmarks are known.
        query: of the scan in which they are sought.
        template_marks: name -> (3,) LPS mm.
        query_marks: the true places, name -> (3,) LPS mm.

    Returns:
        By method one record a landmark: `uae.bench.embedding.match_record`, its `label`, and for vertebrae
        `level_right`: the found place is nearest to the vertebra of the same name.
    """
    names = [name for name in template_marks if name in query_marks]
    points = np.array([template_marks[name] for name in names])
    found: dict[str, list[dict[str, Any]]] = {}
    for side in setup.sides:
        own = found[method_name(side)] = []
        for name, match in zip(names, setup.match(template, query, points, side), strict=True):
            record = {"label": name, **match_record(match, match_kind(side), query_marks[name])}
            if name.startswith(VERTEBRA):
                record["level_right"] = level_of(match.point_mm, query_marks) == name
            own.append(record)
    return found


def _scan(setup: Setup, seed: int, kind: str) -> tuple[Embedding, dict[str, np.ndarray]]:
    phantom = make_phantom(seed, ct=kind == "ct", mr=kind == "mr", mr_slice_mm=MR_SLICE_MM)
    return setup.embed(phantom.ct if kind == "ct" else phantom.mr, cache=False), phantom.landmarks


def measure_pair(setup: Setup, name: str) -> dict[str, Any]:
    """One case of `phantom_pairs`: {"kind", "template", "query", "matches": {method: records}}."""
    kind, template, query = name.split()
    first, marks = setup.remember(f"ct {template}", lambda: _scan(setup, int(template), "ct"))
    scan = kind.removeprefix("ct_")
    second, truth = setup.remember(f"{scan} {query}", lambda: _scan(setup, int(query), scan))
    matches = landmark_matches(setup, first, second, marks, truth)
    return {"kind": kind, "template": int(template), "query": int(query), "matches": matches}


def landmark_figures(records: Sequence[Mapping[str, Any]], limits: Mapping[str, Any] | None) -> dict[str, float]:
    """`error_figures` of landmark records, and of their vertebrae `level_right` and `level_right_or_flagged`.

    Args:
        records: of `landmark_matches`.
        limits: a model's thresholds["match"]; flagged is what is not confident under them.
    """
    levels = [record for record in records if "level_right" in record]
    safe = [record["level_right"] or not is_confident(record, limits) for record in levels]
    return {
        **error_figures(records, limits),
        "vertebrae": len(levels),
        "level_right": float(np.mean([record["level_right"] for record in levels])) if levels else float("nan"),
        "level_right_or_flagged": float(np.mean(safe)) if levels else float("nan"),
    }


def summarise_pairs(records: Sequence[Mapping[str, Any]], thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """By kind (ct_ct, ct_mr) the number of `pairs` and, by method, `landmark_figures` over all their landmarks."""
    result: dict[str, Any] = {}
    for kind in dict.fromkeys(record["kind"] for record in records):
        own = [record for record in records if record["kind"] == kind]
        figures = by_method(own, lambda matches: landmark_figures(matches, thresholds.get("match")))
        result[kind] = {"pairs": len(own), **figures}
    return result


INTER_SUBJECT = Study(
    "inter_subject", phantom_pairs, measure_pair, summarise_pairs,
    lambda setup: {"sides": setup.sides, "first_seed": FIRST_SEED, "mr_slice_mm": MR_SLICE_MM},
)  # fmt: skip
