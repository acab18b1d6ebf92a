"""Docs/benchmarks/deeds.md and its picture, from the figures of `uae bench deeds`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uae.bench.tables import number
from uae.files import atomic_path

COLUMNS = ("tre_mm", "p95_mm", "folding", "seconds", "ratio", "peak_mb")
NAMES = {"deedsbcv": "deedsBCV", "faithful": "`faithful`", "default": "`default`"}


def write_report(result: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write deeds.md, and deeds_scaling.png where sizes were measured.

    Args:
        result: of `uae.bench.deeds.run_deeds_bench`.
        folder: where to.

    Returns:
        The files written.

    Raises:
        InputError: no permission.
    """
    folder = Path(folder)
    files = [folder / "deeds.md"]
    sizes = result.get("scaling", {})
    if len(sizes) > 1:
        files.append(folder / "deeds_scaling.png")
        _plot(sizes, result["scaling_slope"], files[-1])
    with atomic_path(files[0]) as temporary:
        temporary.write_text(_text(result, len(files) > 1), encoding="utf-8")
    return files


def _row(name: str, figures: Mapping[str, Any]) -> str:
    return f"| {name} | " + " | ".join(number(figures.get(column)) for column in COLUMNS) + " |"


def _text(result: Mapping[str, Any], with_picture: bool) -> str:
    meta = result["meta"]
    head = "| | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1)
    lines = [
        f"# `uae bench deeds`, {meta['date']}",
        "",
        f"Machine: {meta['processors']} x {meta['processor']}, {meta['threads']} threads for each program, "
        f"{meta['repeats']} runs in turn (median).",
        "",
        "Six pairs of our own making, the truth known at every voxel: simulated MR of the two validation CTs with two "
        "deformation sizes, a chest CT in another breath, and the CT and T1 head templates (test data: only reported, "
        "no setting chosen on it; the templates' own anatomies differ, which counts as error for every system). TRE: "
        "mean over body voxels of the moving image. Seconds: of the registration without reading and writing, as each "
        "program tells them. Ratio: deedsBCV's seconds by ours, paired; over the pairs the geometric mean. Folding: "
        "highest share of body voxels with a Jacobian <= 0. Peak: of the whole process, MB, the highest.",
        "",
        "Repeat: `UAE_DATA=... uae bench deeds --deedsbcv DIR --scaling --json build/bench/deeds.json --report "
        "Docs/benchmarks`; DIR holds the original, built from its public repository.",
    ]
    if result.get("pairs"):
        lines += ["", f"## All {len(result['pairs'])} pairs", "",
                  f"Before: {result['initial_tre_mm']:.2f} mm.", "", head]  # fmt: skip
        lines += [_row(NAMES.get(system, system), result[system]) for system in meta["systems"]]
    for name, figures in result.get("pairs", {}).items():
        size = "x".join(str(n) for n in figures["shape"][::-1])
        lines += ["", f"## {name}", "", f"{size} voxels of 2 mm; before: {figures['initial_tre_mm']:.2f} mm.", "", head]
        lines += [_row(NAMES.get(system, system), figures[system]) for system in meta["systems"]]
    if result.get("scaling"):
        lines += ["", "## Size", "", "Synthetic texture, preset `default`."]
        if result.get("scaling_slope") is not None:
            lines[-1] += f" Slope of log time over log voxels: {result['scaling_slope']:.2f}."
        lines += ["", "| voxels | million | seconds | peak_mb |", "|---|---|---|---|"]
        for name, row in result["scaling"].items():
            figures = (f"{row['voxels'] / 1e6:.1f}", number(row["seconds"]), number(row["peak_mb"]))
            lines.append(f"| {name} | {' | '.join(figures)} |")
        if with_picture:
            lines += ["", "![Time over size](deeds_scaling.png)"]
    return "\n".join(lines) + "\n"


def _plot(sizes: Mapping[str, Mapping[str, float]], slope: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(sizes.values(), key=lambda row: row["voxels"])
    voxels = [row["voxels"] / 1e6 for row in rows]
    seconds = [row["seconds"] for row in rows]
    axes.loglog(voxels, seconds, "o-", label=f"default (slope {slope:.2f})")
    axes.loglog(voxels, [seconds[0] * v / voxels[0] for v in voxels], "k:", label="slope 1")
    axes.set(xlabel="million voxels", ylabel="seconds", title="Time of a registration")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
