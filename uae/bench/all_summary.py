"""The JSON of `uae bench all` from its rows: the keys of the contract, section 6, and what the figures need besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uae.bench.all_plan import OWN, SHARED, STARTED, VARIANTS
from uae.bench.metrics_field import landmark_row, log_slope, registration_row
from uae.bench.reliability import score_bins
from uae.json_values import plain

BINS = 5
"""Bins of the reliability curve: with some hundred points a bin still holds enough to give a share."""


def summarise(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """All tables.

    Args:
        rows: records of `all_rows.measure`.
        meta: machine, versions, settings.

    Returns:
        `R1.<set>.<system>` (final result, own start), `R1_started_from_uae.<set>.<peer>`, `R1_variants.<set>.<variant>`
        (`unrefined` comes from the same run as `uae`), `R2.<system>`, `R3.<system>`, `R4.<pair>.<system>`,
        `R5.<pair>.<system>`, `L1`, `L2`, `A1`, `S1`, and `meta` with all `rows`.
    """
    by = {name: [row for row in rows if row["scenario"] == name] for name in ("R1", "R2", "R3", "R4", "R5")}
    result: dict[str, Any] = {}
    systems = _by(by["R1"], lambda row: row["system"] if _plain_system(row["system"]) else None)
    started = _by(by["R1"], lambda row: row["system"].removesuffix(STARTED) if STARTED in row["system"] else None)
    variants = _by(by["R1"], lambda row: row["system"].removeprefix("uae-") if row["system"] in VARIANTS else None)
    for part, cases in _by(by["R1"], lambda row: "unrefined" if row["system"] == OWN else None).items():
        variants.setdefault(part, {})["unrefined"] = [
            {**case, "tre_mm": case["before_refinement_mm"]}
            for case in cases["unrefined"]
            if "before_refinement_mm" in case
        ]  # fmt: skip
    for table in variants.values():
        others = [own for name, own in table.items() if name != "unrefined"]
        if others and "unrefined" in table:
            table["unrefined"] = _on(table["unrefined"], _shared(others))
    for key, table in (("R1", systems), ("R1_started_from_uae", started), ("R1_variants", variants)):
        if table:
            result[key] = {part: _rates(own) for part, own in table.items()}
    if by["R2"]:
        result["R2"] = _deformable(_group(by["R2"], lambda row: row["system"]))
    if by["R3"]:
        result["R3"] = {name: _unrelated(own) for name, own in _group(by["R3"], lambda row: row["system"]).items()}
    for key in ("R4", "R5"):
        table = _by(by[key], lambda row: row["system"])
        if table:
            result[key] = {part: _rates(own) for part, own in table.items()}
    for key in ("L1", "L2"):
        own = [row for row in rows if row["scenario"] == key]
        if any(row.get("ways") for row in own):
            result[key] = {part: _ways(cases) for part, cases in _group(own, lambda row: row["part"]).items()}
    rounds = _rounds(by["R1"], meta)
    if rounds:
        result["A1"] = rounds
    scaling = _scaling([row for row in rows if row["scenario"] == "S1"])
    if scaling:
        result["S1"] = scaling
    return plain({**result, "meta": {**meta, "sets": _sets(by["R1"]), "rows": list(rows)}})


def _plain_system(name: str) -> bool:
    return STARTED not in name and name not in VARIANTS


def _group(
    rows: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str | None]
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by key, those without one left out."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = key(row)
        if name is not None:
            found.setdefault(name, []).append(row)
    return found


def _by(
    rows: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str | None]
) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Rows by part and key; parts without any are left out."""
    parts = {part: _group(own, key) for part, own in _group(rows, lambda row: row["part"]).items()}
    return {part: own for part, own in parts.items() if own}


def _shared(tables: Iterable[Sequence[Mapping[str, Any]]]) -> set[str]:
    """Cases that all of some lists of rows have; none where there are no lists."""
    cases = [{row["case"] for row in rows} for rows in tables]
    return set.intersection(*cases) if cases else set()


def _on(rows: Sequence[Mapping[str, Any]], cases: set[str]) -> list[Mapping[str, Any]]:
    """The rows on some of the cases."""
    return [row for row in rows if row["case"] in cases]


def _rates(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Figures by system. A peer accepts what it returns: "done" counts as accepted."""
    systems = dict(systems)
    if OWN in systems and len(systems) > 1:
        shared = _shared(systems.values())
        if shared and len(shared) < len(systems[OWN]):
            systems[SHARED] = _on(systems[OWN], shared)
    return {
        name: registration_row([row if row["status"] != "done" else {**row, "status": "accepted"} for row in own])
        for name, own in systems.items()
        if own
    }  # fmt: skip


def _deformable(systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """R2: means over the cases that no system lost, so that losing hard ones pays nobody; `failed` tells the rest."""
    survived = {name: [row for row in own if row["tre_mm"] is not None] for name, own in systems.items()}
    shared = _shared(own for own in survived.values() if own)
    table = {}
    for name, rows in systems.items():
        found = _on(survived[name], shared)
        figures: dict[str, Any] = {"cases": len(rows), "failed": sum(row["tre_mm"] is None for row in rows)}
        if found:
            means = ("initial_tre_mm", "tre_mm", "floor_mm")
            figures |= {"shared": len(found)} | {key: float(np.mean([row[key] for row in found])) for key in means}
            figures["folding"] = max(row["folding"] for row in found)
            for key, how in (("seconds", np.median), ("cpu_seconds", np.median), ("peak_mb", np.max)):
                values = [row[key] for row in found if row.get(key) is not None]
                figures |= {key: float(how(values))} if values else {}
        table[name] = figures
    return table


def _unrelated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pairs without overlap: whatever is not refused is a confident wrong answer; a crash is none, but is told."""
    status = [row["status"] for row in rows]
    return {
        "pairs": len(rows), "confident_wrong": sum(s not in ("refused", "failed") for s in status),
        "refused": status.count("refused"), "accepted": status.count("accepted") + status.count("done"),
        "review": status.count("review"), "failed": status.count("failed"),
    }  # fmt: skip


def _ways(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Landmark rows of every way of matching, with the honesty of scores and `confident`; failed cases are counted."""
    table: dict[str, Any] = {}
    lost = Counter(row["system"] for row in rows if not row.get("ways"))
    for way in dict.fromkeys(way for row in rows for way in row.get("ways") or ()):
        own = [row for row in rows if way in (row.get("ways") or ())]
        offsets = np.concatenate([np.array(row["ways"][way]["offset_mm"], dtype=float).reshape(-1, 3) for row in own])
        matches = [match for row in own for match in row["ways"][way]["matches"]]
        if not len(offsets):
            continue
        errors = np.linalg.norm(offsets, axis=1)
        sure = np.array([bool(match["confident"]) for match in matches])
        table[way] = {
            **landmark_row(offsets, np.zeros_like(offsets)), "cases": len(own), "failed": lost[own[0]["system"]],
            "confident_share": float(sure.mean()),
            "confident_over_10mm": float((errors[sure] > 10.0).mean()) if sure.any() else 0.0,
            "seconds": float(np.median([row["ways"][way]["seconds"] for row in own])),
            "reliability": reliability(np.array([match["score"] for match in matches]), errors),
        }  # fmt: skip
    return table


def reliability(scores: np.ndarray, errors_mm: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Share of matches within 10 mm by score, in bins of equally many points.

    Args:
        scores: (N,) similarities.
        errors_mm: (N,) mm.
        bins: how many.

    Returns:
        For every bin `score` (mean), `within_10mm` (share 0..1), `median_mm`, `points`; lowest scores first.
    """
    return [
        {
            "score": float(scores[part].mean()), "within_10mm": float((errors_mm[part] <= 10.0).mean()),
            "median_mm": float(np.median(errors_mm[part])), "points": len(part),
        }
        for part in score_bins(scores, bins)
    ]  # fmt: skip


def _rounds(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """A1: AdaReg's steps on the hard cases, by the round of the model that ran."""
    hard = [row for row in rows if row["part"] == "hard"]
    own = [row for row in hard if row["system"] == OWN]
    if not own:
        return {}
    deformed = [row for row in hard if row["system"] == "uae-deformable"]
    if deformed:
        own = _on(own, _shared([deformed]))
    table = {
        "rigid": _median(row.get("before_refinement_mm") for row in own),
        "refined": _median(row["tre_mm"] for row in own),
        "deformable": _median(row["tre_mm"] for row in deformed) if deformed else None,
        "cases": len(own),
    }
    return {f"M{meta.get('model_round', 0)}": table}


def _median(values: Iterable[float | None]) -> float | None:
    found = float(np.median([np.inf if value is None else value for value in values]))
    return found if np.isfinite(found) else None


def _scaling(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """S1: seconds and memory by task, threads and size, and the slopes of log over log."""
    table: dict[str, Any] = {}
    done = [row for row in rows if row["status"] != "failed" and row.get("seconds") is not None]
    for task, own in _group(done, lambda row: row["part"]).items():
        for threads, sizes in _group(own, lambda row: f"threads{row['threads']}").items():
            sizes = sorted(sizes, key=lambda row: row["voxels"])
            voxels = [row["voxels"] for row in sizes]
            table.setdefault(task, {})[threads] = {
                "voxels": voxels, "seconds": [row["seconds"] for row in sizes],
                "peak_mb": [row["peak_mb"] for row in sizes],
                "seconds_slope": log_slope(voxels, [row["seconds"] for row in sizes]),
                "memory_slope": log_slope(voxels, [row["peak_mb"] or 0.0 for row in sizes]),
            }  # fmt: skip
    return table


def _sets(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sets are: cases, floor, fields of view and rotations that were drawn."""
    found = {}
    for part, own in _group(rows, lambda row: row["part"]).items():
        cases = {row["case"]: row for row in own}.values()
        found[part] = {
            "cases": len(cases), "floor_median_mm": float(np.median([row["floor_mm"] for row in cases])),
            "share": [float(f([row["meta"]["share"] for row in cases])) for f in (np.min, np.max)],
            "rotation_deg": [float(f([row["meta"]["rotation_deg"] for row in cases])) for f in (np.min, np.max)],
        }  # fmt: skip
    return found
