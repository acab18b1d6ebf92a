"""Docs/benchmarks/all.md and its pictures, from the JSON of `uae bench all`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uae.bench.all_figures import draw
from uae.bench.all_plan import HEADS, OWN, SEMANTIC, SHARED
from uae.bench.tables import table
from uae.files import atomic_path

RATES = (
    "cases", "success_rate", "median_tre_mm", "median_tre_before_refinement_mm", "refusal_rate", "review_rate",
    "confident_failure_rate", "median_seconds", "median_cpu_seconds", "peak_mb",
)  # fmt: skip
DEFORMED = (
    "cases", "shared", "initial_tre_mm", "tre_mm", "floor_mm", "folding", "seconds", "cpu_seconds", "peak_mb", "failed",
)  # fmt: skip
UNRELATED = ("pairs", "confident_wrong", "refused", "review", "accepted", "failed")
WAYS = (
    "cases", "points", "med_mm", "med_std_mm", "median_mm", "within_5mm", "within_10mm", "max_mm", "confident_share",
    "confident_over_10mm", "seconds",
)  # fmt: skip
CLOSE_RATE, CLOSE_MM = 0.02, 0.2
"""Differences smaller than these are called no difference in the first paragraph."""


def write_report(result: Mapping[str, Any], folder: str | Path, name: str = "all.md") -> list[Path]:
    """Write the tables and draw the pictures.

    Args:
        result: of `uae.bench.all_run.run_all`.
        folder: where to.
        name: of the Markdown file.

    Returns:
        The files written.

    Raises:
        InputError: no permission.
    """
    folder = Path(folder)
    file = folder / name
    pictures = draw(result, folder, file.stem)
    rows = file.with_name(f"{file.stem}_rows.md")
    for path, text in ((file, text_of(result, pictures, rows.name)), (rows, rows_text(result))):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [file, rows, *(folder / picture for picture in pictures.values())]


def rows_text(result: Mapping[str, Any]) -> str:
    """A page with every row and the command that measures it alone."""
    rows = {
        row["name"]: {**row, "command": f"`{row['command']}`"}
        for row in sorted(result["meta"]["rows"], key=lambda row: row["name"])
    }
    columns = ("status", "tre_mm", "floor_mm", "seconds", "cpu_seconds", "peak_mb", "command")
    lines = [f"# Rows of `uae bench all`, {result['meta']['date']}", "", *table(rows, columns, "row")]
    return "\n".join(lines) + "\n"


def compared(result: Mapping[str, Any]) -> bool:
    """Whether a peer was measured beside us anywhere."""
    tables = [part for key in ("R1", "R4", "R5") for part in result.get(key, {}).values()]
    tables += [result.get("R2", {}), result.get("R3", {})]
    return any(len(systems) > 1 and any(name.startswith(OWN) for name in systems) for systems in tables)


def losses(result: Mapping[str, Any]) -> list[str]:
    """Where a peer is better than we are: one phrase each, with the figures."""
    found = []
    for key, title in (("R1", "R1"), ("R4", "R4"), ("R5", "R5")):
        for part, systems in result.get(key, {}).items():
            own = systems.get(SHARED, systems.get(OWN))
            for name, figures in systems.items():
                if own is None or name in (OWN, SHARED):
                    continue
                on = "" if figures["cases"] == own["cases"] else f" ({figures['cases']} and {own['cases']} cases)"
                if figures["success_rate"] > own["success_rate"] + CLOSE_RATE:
                    found.append(
                        f"{title} {part}: {name} succeeds in {100 * figures['success_rate']:.0f} %, we in "
                        f"{100 * own['success_rate']:.0f} %{on}"
                    )
                theirs, ours = figures["median_tre_mm"], own["median_tre_mm"]
                if theirs is not None and (ours is None or theirs < ours - CLOSE_MM):
                    ours_text = "none" if ours is None else f"{ours:.2f} mm"
                    found.append(f"{title} {part}: median TRE {theirs:.2f} mm of {name}, {ours_text} of ours{on}")
    deeds = result.get("R2", {}).get("uae-deeds", {})
    ours, lost = deeds.get("tre_mm"), deeds.get("failed", 0) / max(deeds.get("cases", 1), 1)
    for name, figures in result.get("R2", {}).items():
        if name != "uae-deeds" and ours is not None and figures.get("tre_mm", ours) < ours - CLOSE_MM:
            found.append(f"R2: TRE {figures['tre_mm']:.2f} mm of {name}, {ours:.2f} mm of ours")
        if name != "uae-deeds" and figures["failed"] / figures["cases"] < lost:
            found.append(f"R2: {name} fails less often than we, in {100 * lost:.0f} % of our cases")
    wrong = result.get("R3", {}).get(OWN, {}).get("confident_wrong")
    if wrong:
        found.append(f"R3: {wrong} of our results on pairs without overlap were not refused")
    failures = [
        f"{part} ({100 * systems[OWN]['confident_failure_rate']:.1f} %)"
        for part, systems in result.get("R1", {}).items()
        if systems.get(OWN, {}).get("confident_failure_rate")
    ]
    if failures:
        found.append("confident failures of ours in R1 " + ", ".join(failures))
    return found


def text_of(result: Mapping[str, Any], pictures: Mapping[str, str], rows_page: str = "all_rows.md") -> str:
    """The whole page; `rows_page` lists every row with its command."""
    meta = result["meta"]
    worse = losses(result)
    nowhere = "nowhere in the rows below" if compared(result) else "not known, no peer was measured beside us"
    kind = "quick run" if meta["quick"] else "run"
    lines = [
        f"# `uae bench all`, {kind} of {meta['date']}", "",
        "**Where we lose:** " + ("; ".join(worse) if worse else nowhere) + ".", "",
        f"Machine: {meta['processors']} x {meta['processor']}, {meta['platform']}, {meta['threads']} threads for each "
        f"system, {meta['jobs']} pairs at once, device {meta['device']}. Model {meta['model']} "
        f"{meta['model_version']}. "
        "Versions: " + ", ".join(f"{name} {version or 'none'}" for name, version in meta["versions"].items()) + ".", "",
        "Every system runs in a process of its own on the same files, CT windowed to -300..400 HU and MR to its 0.5 "
        "and 99.5 percentiles for the peers. TRE, floor and success are those of the embedding benchmark: success is "
        "TRE up to 5 mm beyond what the best rigid leaves. A peer has no verdict: each of its results is accepted. "
        "Seconds: of the registration without starting and reading.",
    ]  # fmt: skip
    if len(meta["rows"]) < meta.get("planned", 0):
        lines += ["", f"**{len(meta['rows'])} of the {meta['planned']} rows of the {kind} are in.**"]
    if meta.get("note"):
        lines += ["", meta["note"]]
    if meta["cached_embeddings"]:
        lines += [
            "",
            "Embeddings of the CTs were kept between cases: our seconds are those of a second scan of one CT.",
        ]
    for name, reason in meta["skipped"].items():
        lines += ["", f"Skipped: {name}, {reason}."]
    for key, title in (
        ("R1", "R1: simulated MR to CT"), ("R1_started_from_uae", "R1: peers started from our result"),
        ("R1_variants", "R1: our variants"), ("R4", "R4: head CT and T1 templates, turned"),
        ("R5", "R5: one pelvis, three MR series, turned"),
    ):  # fmt: skip
        for part, systems in result.get(key, {}).items():
            lines += ["", f"## {title}, {part}", "", *table(systems, RATES, "system")]
        if key == "R1":
            lines += _pictures(pictures, ("errors", "field of view"))
    for key, title, columns in (
        ("R2", "R2: a known deformation up to 12 mm", DEFORMED), ("R3", "R3: nothing in common, both orders", UNRELATED)
    ):  # fmt: skip
        if key in result:
            lines += ["", f"## {title}", "", *table(result[key], columns, "system")]
    for key, title in (
        ("L1", "L1: landmarks of phantoms of two people"),
        ("L2", "L2: one patient, simulated MR to CT"),
    ):
        for part, ways in result.get(key, {}).items():
            lines += ["", f"## {title}, {part}", "", *table(ways, WAYS, "way")]
    if any(way.startswith(name) for key in ("L1", "L2") for ways in result.get(key, {}).values()
           for way in ways for name in HEADS):  # fmt: skip
        lines += [
            "",
            f"SAM, SEA and UAE-S: the appearance heads, the semantic head and all heads of {SEMANTIC}; "
            "limits of a confident match hold for all heads together, so that single ones have none.",
        ]
    lines += _pictures(pictures, ("reliability",))
    if "A1" in result:
        lines += ["", "## A1: AdaReg on the hard set by round, median TRE in mm", "",
                  *table(result["A1"], ("cases", "rigid", "refined", "deformable"), "round")]  # fmt: skip
    if "S1" in result:
        rows = {
            f"{task}, {threads.removeprefix('threads')} threads": figures
            for task, tables in result["S1"].items() for threads, figures in tables.items()
        }  # fmt: skip
        flat = {
            name: {**f, "largest_voxels": f["voxels"][-1], "seconds": f["seconds"][-1], "peak_mb": f["peak_mb"][-1]}
            for name, f in rows.items()
        }
        columns = ("largest_voxels", "seconds", "peak_mb", "seconds_slope", "memory_slope")
        lines += ["", "## S1: scaling", "", *table(flat, columns, "task"), *_pictures(pictures, ("scaling",))]
    lines += _rows(meta, rows_page)
    lines += ["", "## Settings of the peers", ""]
    for name, entries in meta["settings"].items():
        lines += [f"* {name}: " + "; ".join(f"{key}: {value}" for key, value in entries.items()) + "."]
    return "\n".join(lines) + "\n"


def _pictures(pictures: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    found = [f"![{name.capitalize()}]({pictures[name]})" for name in names if name in pictures]
    return ["", *found] if found else []


def _rows(meta: Mapping[str, Any], page: str) -> list[str]:
    """How to repeat rows, and those that were left out."""
    lines = ["", "## Repeat", ""]
    if meta["rows"]:
        lines += [
            f"[Every row]({page}) stands with the command that measures it alone with the same accuracy figures, "
            f"such as `{meta['rows'][0]['command']}`; the JSON file has them under `meta.rows`.",
        ]  # fmt: skip
    if meta["left_out"]:
        left = meta["left_out"]
        lines += ["", f"Left out when the time was up: {len(left)} rows, {left[0]} among them; run it again to go on."]
    return lines
