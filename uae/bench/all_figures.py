"""Pictures of `uae bench all`: errors, success against field of view, reliability of scores, scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.all_plan import STARTED, VARIANTS
from uae.bench.metrics import RIGID_SUCCESS_MM
from uae.files import atomic_path

WORST_MM = 300.0
"""Where a registration without an estimate is drawn."""


def draw(result: Mapping[str, Any], folder: Path, stem: str = "all") -> dict[str, str]:
    """Draw what the result has.

    Args:
        result: of `all_summary.summarise`.
        folder: where to.
        stem: how their names begin.

    Returns:
        File names by what they show, only those written.

    Raises:
        InputError: no permission.
    """
    rows = result["meta"]["rows"]
    main = [
        row for row in rows
        if row["scenario"] == "R1" and STARTED not in row["system"] and row["system"] not in VARIANTS
    ]  # fmt: skip
    written = {}
    if main:
        _boxes(main, folder / f"{stem}_errors.png")
        _field_of_view(main, folder / f"{stem}_field_of_view.png")
        written |= {"errors": f"{stem}_errors.png", "field of view": f"{stem}_field_of_view.png"}
    curves = {
        f"{scenario} {part}, {way}": table[way]["reliability"]
        for scenario in ("L1", "L2") for part, table in result.get(scenario, {}).items()
        for way in ("nearest", "fixed-point-L5", "UAE-S fixed-point-L5") if way in table
    }  # fmt: skip
    if curves:
        _reliability(curves, folder / f"{stem}_reliability.png")
        written["reliability"] = f"{stem}_reliability.png"
    if result.get("S1"):
        _scaling(result["S1"], folder / f"{stem}_scaling.png")
        written["scaling"] = f"{stem}_scaling.png"
    return written


def _figure(width: float, height: float, columns: int = 1, sharey: bool = False):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns, sharey=sharey))


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _boxes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure, axes = _figure(1.5 + 2.6 * len(parts), 3.4, len(parts), sharey=True)
    for axis, part in zip(axes, parts):
        own = [row for row in rows if row["part"] == part]
        names = list(dict.fromkeys(row["system"] for row in own))
        values = [
            [WORST_MM if row["tre_mm"] is None else max(row["tre_mm"], 0.1) for row in own if row["system"] == name]
            for name in names
        ]  # fmt: skip
        axis.boxplot(values, flierprops={"markersize": 3})
        labels = [f"{name} ({len(own_values)})" for name, own_values in zip(names, values, strict=True)]
        axis.set_xticks(range(1, len(names) + 1), labels, rotation=30, ha="right")
        axis.set_yscale("log")
        axis.set_title(f"R1 {part} (cases)")
    axes[0].set_ylabel("TRE, mm")
    _save(figure, path)


def _field_of_view(rows: Sequence[Mapping[str, Any]], path: Path, bins: int = 5) -> None:
    """Success over the share of the body that the moving scan shows, in bins of equally many cases."""
    figure, (axis,) = _figure(5.0, 3.4)
    for name in dict.fromkeys(row["system"] for row in rows):
        own = sorted((row for row in rows if row["system"] == name), key=lambda row: row["meta"]["share"])
        parts = [part for part in np.array_split(np.arange(len(own)), min(bins, len(own))) if len(part)]
        shares = [100 * np.mean([own[i]["meta"]["share"] for i in part]) for part in parts]
        success = [np.mean([_right(own[i]) for i in part]) for part in parts]
        axis.plot(shares, 100 * np.array(success), "o-", label=f"{name}, {len(own)} cases")
    axis.set(xlabel="field of view, % of the body's box", ylabel="success, %", ylim=(-4, 104))
    axis.legend(fontsize=8)
    _save(figure, path)


def _right(row: Mapping[str, Any]) -> bool:
    return row["tre_mm"] is not None and row["tre_mm"] <= row["floor_mm"] + RIGID_SUCCESS_MM


def _reliability(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    figure, (axis,) = _figure(5.4, 3.6)
    for name, points in curves.items():
        axis.plot([p["score"] for p in points], [100 * p["within_10mm"] for p in points], "o-", label=name)
    axis.set(xlabel="score", ylabel="matches within 10 mm, %", ylim=(-4, 104), title="Do scores tell?")
    axis.legend(fontsize=7)
    _save(figure, path)


def _scaling(tables: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    figure, axes = _figure(8.0, 3.4, 2)
    for task, by_threads in tables.items():
        for threads, table in by_threads.items():
            million = np.array(table["voxels"]) / 1e6
            axes[0].loglog(million, table["seconds"], "o-", label=f"{task}, {threads.removeprefix('threads')} threads")
            if all(table["peak_mb"]):
                axes[1].loglog(million, table["peak_mb"], "o-")
    axes[0].set(xlabel="million voxels", ylabel="seconds")
    axes[1].set(xlabel="million voxels", ylabel="peak memory, MB")
    axes[0].legend(fontsize=7)
    _save(figure, path)
