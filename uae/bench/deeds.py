"""`uae bench deeds`: accuracy, time and memory of the deformable solver on pairs with known truth, beside deedsBCV."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from uae.bench.data import find_data
from uae.bench.deeds_pairs import PAIRS, DeedsPair, make_pair
from uae.bench.embedding import earlier_run, write_json
from uae.bench.metrics_field import log_slope
from uae.bench.resources import run_child
from uae.deeds import fields
from uae.deeds.cost import ControlGrid
from uae.deeds.presets import PRESETS
from uae.device import cpu_name
from uae.errors import InputError, ResourceError
from uae.json_values import plain
from uae.paths import child_environment
from uae.progress import Cancel, Progress, check_cancel, report
from uae.quality import jacobian_statistics
from uae.transform import DisplacementField

logger = logging.getLogger(__name__)

ORIGINAL = "deedsbcv"
ORIGINAL_STEP = 4
"""Control point distance of the original's last default level, in which its result is stored."""
ALWAYS = ("faithful", "default")
QUICK_PAIRS = ("chest_small", "lung")
SCALING_SHAPES = ((100, 96, 96), (160, 128, 128), (240, 192, 192), (400, 256, 256))
"""(z, y, x) voxels of 2 mm, the last one a whole torso."""


def run_deeds_bench(
    data_dir: str | Path | None = None, quick: bool = False, json_path: str | Path | None = None,
    pairs: Sequence[str] = (), presets: Sequence[str] = ALWAYS, original: str | Path | None = None, threads: int = 2,
    repeats: int = 3, scaling: bool = False, progress: Progress | None = None, cancel: Cancel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the presets, and the original where its folder is given, in turn on every pair.

    Args:
        data_dir: folder of the real volumes; UAE_DATA or the default where None.
        quick: two small pairs, once.
        json_path: written after every pair; a run with the same settings goes on there.
        pairs: names of PAIRS; all where empty.
        presets: of `uae.deeds`, measured after each other.
        original: folder with a built `deedsBCV`.
        threads: of each program.
        repeats: times that each is run; the median time is given.
        scaling: also measure synthetic pairs up to a whole torso.
        progress: told the share of registrations done, stage "bench".
        cancel: asked between registrations.

    Returns:
        The keys of the contract: means over the pairs (folding and peak memory: the highest), each pair under `pairs`.

    Raises:
        InputError: unknown pair or preset, no data, or no program in `original`.
        ResourceError: a child process failed.
    """
    names = list(pairs) or list(QUICK_PAIRS if quick else PAIRS)
    unknown = [name for name in names if name not in PAIRS] + [name for name in presets if name not in PRESETS]
    if unknown:
        raise InputError(f"unknown {unknown[0]!r}; pairs: {', '.join(PAIRS)}; presets: {', '.join(PRESETS)}")
    program = None if original is None else _original_program(Path(original))
    data = find_data(data_dir)
    repeats = 1 if quick else repeats
    systems = [*([ORIGINAL] if program else []), *presets]
    meta = {"threads": threads, "repeats": repeats, "systems": systems, "processor": cpu_name(),
            "processors": os.cpu_count()}  # fmt: skip
    path = None if json_path is None else Path(json_path)
    earlier = earlier_run(path, meta, meta)
    done: dict[str, Any] = earlier.get("pairs", {})
    sizes = earlier.get("scaling", {})
    shapes = [shape for shape in SCALING_SHAPES if scaling and _size_name(shape) not in sizes]
    total = sum(name not in done for name in names) + len(shapes)
    count = 0
    with tempfile.TemporaryDirectory(prefix="uae-bench-deeds-") as folder:
        for name in names:
            if name in done:
                continue
            report(progress, "bench", count / total)
            pair = make_pair(name, data)
            done[name] = measure_pair(pair, Path(folder), systems, program, threads, repeats, cancel)
            logger.info("%s: %s", name, done[name])
            count += 1
            _save(path, summarise(done, sizes, meta))
        for shape in shapes:
            check_cancel(cancel)
            report(progress, "bench", count / total)
            sizes[_size_name(shape)] = measure_size(shape, Path(folder), threads)
            count += 1
            _save(path, summarise(done, sizes, meta))
    report(progress, "bench", 1.0)
    result = summarise(done, sizes, meta)
    _save(path, result)
    return result


def _save(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is not None:
        write_json(path, content)


def _original_program(folder: Path) -> Path:
    for name in ("deedsBCV", "deedsBCV.exe"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise InputError(f"{folder} holds no program deedsBCV; build it from its public repository and give its folder")


def measure_pair(
    pair: DeedsPair, folder: Path, systems: Sequence[str], program: Path | None, threads: int, repeats: int,
    cancel: Cancel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run each system `repeats` times, all in turn.

    Returns:
        `initial_tre_mm`, and for each system tre_mm, p95_mm, folding, seconds (median), process_seconds, peak_mb and
        all `runs_s`; `ratio` of each preset: the median over the turns of the original's seconds by its own.
    """
    files = {name: folder / f"{name}.nii.gz" for name in ("fixed", "moving")}
    for name, file in files.items():
        sitk.WriteImage(sitk.Cast(getattr(pair, name).to_sitk(), sitk.sitkFloat32), str(file))
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    figures: dict[str, Any] = {"initial_tre_mm": pair.initial_tre_mm, "shape": pair.fixed.geometry.shape,
                               "test": pair.test}  # fmt: skip
    for _ in range(repeats):
        for system in systems:
            check_cancel(cancel)
            if system == ORIGINAL:
                run, field = _run_original(program, files, folder, pair, threads)
            else:
                modalities = [pair.fixed.modality, pair.moving.modality]
                job = {**{k: str(v) for k, v in files.items()}, "modalities": modalities, "preset": system}
                run, field = _run_ours(job, folder, pair, threads)
            if not runs[system]:
                figures[system] = accuracy(field, pair)
            runs[system].append(run)
    for system, own in runs.items():
        figures[system] |= {key: float(np.median([run[key] for run in own])) for key in ("seconds", "process_seconds")}
        figures[system] |= {"peak_mb": max(run["peak_mb"] for run in own), "runs_s": [run["seconds"] for run in own]}
        if "stages" in own[0]:
            figures[system] |= {key: own[0][key] for key in ("stages", "levels", "consistency_mm", "backend")}
        if ORIGINAL in runs and system != ORIGINAL:
            ratios = [theirs["seconds"] / ours["seconds"] for theirs, ours in zip(runs[ORIGINAL], own)]
            figures[system]["ratio"] = float(np.median(ratios))
    return plain(figures)


def accuracy(field: DisplacementField, pair: DeedsPair) -> dict[str, float]:
    """tre_mm and p95_mm of the moving body points, and the folded share of the fixed body's voxels."""
    errors = np.linalg.norm(field.inverse().apply(pair.moving_points) - pair.fixed_points, axis=1)
    folding = jacobian_statistics(field, pair.body)["folding"]
    return {"tre_mm": float(errors.mean()), "p95_mm": float(np.percentile(errors, 95)), "folding": folding}


def _run_ours(
    job: Mapping[str, Any], folder: Path, pair: DeedsPair | None, threads: int
) -> tuple[dict[str, Any], DisplacementField | None]:
    names = {"figures": str(folder / "figures.json"), "job": str(folder / "job.json")}
    task = {**job, "threads": threads, "figures": names["figures"]}
    if pair is not None:
        task["field"] = str(folder / "field.npy")
    Path(names["job"]).write_text(json.dumps(task), encoding="utf-8")
    environment = {**child_environment(), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "uae.bench.deeds_child", names["job"]]
    used = run_child(command, environment, f"preset {job['preset']}")
    run = json.loads(Path(names["figures"]).read_text(encoding="utf-8"))
    run |= {"process_seconds": used.seconds, "peak_mb": used.peak_mb or math.nan}
    field = None if pair is None else DisplacementField(np.load(task["field"]), pair.fixed.geometry)
    return run, field


def _run_original(
    program: Path, files: Mapping[str, Path], folder: Path, pair: DeedsPair, threads: int
) -> tuple[dict[str, Any], DisplacementField]:
    out = folder / "original"
    command = [str(program), "-F", str(files["fixed"]), "-M", str(files["moving"]), "-O", str(out)]
    used = run_child(command, {"OMP_NUM_THREADS": str(threads)}, "deedsBCV")
    # Its own clock leaves reading and writing out, as ours does.
    told = re.search(r"Total time: ([0-9.]+) sec", used.output)
    run = {"seconds": float(told.group(1)) if told else used.seconds, "process_seconds": used.seconds,
           "peak_mb": used.peak_mb or math.nan}  # fmt: skip
    return run, read_original(Path(f"{out}_displacements.dat"), pair)


def read_original(path: Path, pair: DeedsPair) -> DisplacementField:
    """The original's stored control points as a field in millimetres on the pair's grid.

    Raises:
        ResourceError: the file does not hold as many numbers as the grid has.
    """
    geometry = pair.fixed.geometry
    grid = ControlGrid.over(geometry.shape, ORIGINAL_STEP, "corner")
    values = np.fromfile(path, np.float32)
    if values.size != 3 * grid.nodes:
        raise ResourceError(f"{path}: {values.size} numbers instead of {3 * grid.nodes}; is it deedsBCV's last level?")
    along_y, along_x, along_z = values.reshape(3, *grid.counts)
    dense = fields.transfer(np.stack([along_z, along_y, along_x]), grid, None, "numpy")
    vectors = np.moveaxis(dense[::-1], 0, -1) * geometry.spacing
    return DisplacementField(np.ascontiguousarray(vectors, dtype=np.float32), geometry)


def _size_name(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape[::-1])


def measure_size(shape: Sequence[int], folder: Path, threads: int) -> dict[str, float]:
    """Time and memory of the default preset on a synthetic pair of that shape (z, y, x)."""
    run, _ = _run_ours({"shape": list(shape), "preset": "default"}, folder, None, threads)
    return plain({"voxels": int(np.prod(shape)), "seconds": run["seconds"], "peak_mb": run["peak_mb"]})


def slope(sizes: Mapping[str, Mapping[str, float]]) -> float | None:
    """Slope of log(seconds) over log(voxels), None with fewer than two sizes."""
    rows = list(sizes.values())
    return log_slope([row["voxels"] for row in rows], [row["seconds"] for row in rows])


def summarise(
    pairs: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, Any], meta: Mapping[str, Any]
) -> dict[str, Any]:
    """The benchmark's JSON from the figures of the pairs and sizes."""
    rows = list(pairs.values())
    result: dict[str, Any] = {"meta": {**meta, "date": date.today().isoformat()}, "pairs": dict(pairs)}
    if rows:
        result["initial_tre_mm"] = float(np.mean([row["initial_tre_mm"] for row in rows]))
        for system in meta["systems"]:
            own = [row[system] for row in rows]
            result[system] = {key: float(np.mean([one[key] for one in own])) for key in ("tre_mm", "p95_mm", "seconds")}
            result[system] |= {key: max(one[key] for one in own) for key in ("folding", "peak_mb")}
            if "ratio" in own[0]:
                result[system]["ratio"] = float(np.exp(np.mean([np.log(one["ratio"]) for one in own])))
    if sizes:
        result |= {"scaling": dict(sizes), "scaling_slope": slope(sizes)}
    return plain(result)
