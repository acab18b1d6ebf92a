"""One row of `uae bench all`: make the pair, run the system in its own process, compare with the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.all_plan import HEADS, OWN, SEMANTIC, STARTED, VARIANTS, Row
from uae.bench.embedding import points_shown
from uae.bench.metrics import transform_tre
from uae.bench.own import run_own
from uae.bench.pairs import BenchPair
from uae.bench.peers.job import Outcome
from uae.bench.peers.run import PEERS, PeerRun, as_transform, run_peer
from uae.errors import InputError
from uae.json_values import plain
from uae.phantom import FIRST_TEST_SEED, make_phantom
from uae.quality import jacobian_statistics
from uae.transform import Affine, DisplacementField, Rigid, Transform

SIDES = (3, 5, 7)
"""L of the fixed points' seed cube, as in UAE's ablation, where L = 0 is the nearest neighbour."""
SEMANTIC_WAYS = (("nearest", 5), ("fixed-point", 5))
"""Method and side by which the heads compare: the papers' table."""
L2_POINTS = 60
SCALE_SEED = FIRST_TEST_SEED + 900
SCALE_STEP_MM = 80.0
"""Length along the body of one unit of S1: at 2 mm one million network voxels."""


@dataclass(frozen=True)
class RunOptions:
    """How rows are run: model, threads and device for all of them alike; where embeddings are kept (None: nowhere)."""

    model: str = "uae-m"
    threads: int = 1
    device: str = "auto"
    cache_folder: Path | None = None
    timeout_s: float = 3600.0


def measure(row: Row, pair: BenchPair | None, options: RunOptions, ours: Mapping[str, Any] | None) -> dict[str, Any]:
    """Run one row.

    Args:
        row: what is run.
        pair: its pair; None for S1, which makes its own.
        options: see RunOptions.
        ours: our own finished row of the same pair, for rows that start from it.

    Returns:
        A plain record: name, scenario, part, case, system, status (accepted, review, refused, done or failed), reason,
        tre_mm (None without estimate or truth), floor_mm, fixed_to_moving, seconds, process_seconds, cpu_seconds,
        peak_mb, gpu_peak_mb (of torch, None without a GPU), meta of the pair, and what the scenario adds.

    Raises:
        InputError: a started row without our result, or an unknown system.
    """
    if row.scenario == "S1":
        return _record(row, _scale(row, options), None, {})
    assert pair is not None
    if row.scenario in ("L1", "L2"):
        return _matches(row, pair, options)
    if row.scenario == "R2":
        run = _deformable(row, pair, options)
        return _record(row, run, pair, _folding(run, pair))
    system, started, _ = row.system.partition(STARTED)
    initial = None
    if started:
        initial = _start(ours)
        if initial is None:
            run = PeerRun(None, None, "failed", "our registration gave nothing to start from")
            return _record(row, run, pair, {})
    if system in PEERS:
        run = run_peer(
            system, PEERS[system].best, pair.fixed, pair.moving, initial, options.threads, timeout_s=options.timeout_s
        )
        return _record(row, run, pair, {"start": run.info.get("start"), "own_metric": run.info.get("metric")})
    if system != OWN and system not in VARIANTS:
        raise InputError(f"unknown system {system!r}; choose uae, {', '.join(VARIANTS)} or {', '.join(PEERS)}")
    run = _own(pair, options, VARIANTS.get(system, {}))
    before = run.info.get("unrefined")
    more: dict[str, Any] = {
        "features": run.info.get("features"), "stages": run.info.get("stages"), "deformable": run.info.get("deformable")
    }  # fmt: skip
    if len(pair.moving_points):
        unrefined = None if before is None else as_transform(Outcome(np.array(before)))
        more["before_refinement_mm"] = transform_tre(unrefined, pair.moving_points, pair.fixed_points)
    return _record(row, run, pair, more)


def _own(pair: BenchPair, options: RunOptions, extra: Mapping[str, Any]) -> PeerRun:
    run = run_own(
        "register", pair.fixed, pair.moving, options.model, options.threads, options.cache_folder, options.timeout_s,
        device=options.device, **extra,
    )  # fmt: skip
    if run.status == "done":
        run.status = str(run.info["status"])
    return run


def _start(ours: Mapping[str, Any] | None) -> Affine | None:
    matrix = None if ours is None else ours.get("fixed_to_moving")
    return None if matrix is None else as_transform(Outcome(np.array(matrix, dtype=np.float64)))


def _deformable(row: Row, pair: BenchPair, options: RunOptions) -> PeerRun:
    """R2: both images lie on one grid in the same place; what is measured is the deformable part alone."""
    if row.system == "uae-deeds":
        return run_own("deeds", pair.fixed, pair.moving, options.model, options.threads, timeout_s=options.timeout_s)
    return run_peer(
        row.system, "deformable", pair.fixed, pair.moving, Rigid.identity(), options.threads,
        timeout_s=options.timeout_s,
    )  # fmt: skip


def _folding(run: PeerRun, pair: BenchPair) -> dict[str, Any]:
    """Share of folded voxels in the fixed body; fields on another grid are read at the fixed grid's voxels."""
    before = float(np.linalg.norm(pair.moving_points - pair.fixed_points, axis=1).mean())
    more: dict[str, Any] = {"initial_tre_mm": before}
    if run.transform is None or pair.body is None:
        return more
    grid = pair.fixed.geometry
    points = grid.grid_points_mm()
    vectors = (run.transform.apply(points) - points).reshape(*grid.shape, 3).astype(np.float32)
    return more | {"folding": jacobian_statistics(DisplacementField(vectors, grid), pair.body)["folding"]}


def _matches(row: Row, pair: BenchPair, options: RunOptions) -> dict[str, Any]:
    """L1, L2: the moving scan is the template; every way on the same points."""
    points, truth = pair.moving_points, pair.fixed_points
    if row.scenario == "L2":
        rng = np.random.default_rng([int(pair.meta["seed"]), 2])
        points, truth = points_shown(pair.fixed.geometry, points, truth, L2_POINTS, rng)
    else:
        # Landmarks of the phantom that the template shows.
        seen = pair.moving.geometry.contains(points) & pair.fixed.geometry.contains(truth)
        points, truth = points[seen], truth[seen]
    model, ways = options.model, [("nearest", "nearest", 5, None)]
    ways += [(f"fixed-point-L{side}", "fixed-point", side, None) for side in SIDES]
    if row.system == SEMANTIC:
        model = SEMANTIC
        ways = [
            (f"{name} {way}", method, side, heads)
            for name, heads in HEADS.items()
            for way, method, side, _ in ways
            if (method, side) in SEMANTIC_WAYS
        ]
    run = run_own(
        "match", pair.moving, pair.fixed, model, options.threads, options.cache_folder, options.timeout_s,
        points=points.tolist(), ways=ways, device=options.device,
    )  # fmt: skip
    more: dict[str, Any] = {"ways": {}}
    for name, found in run.info.get("ways", {}).items():
        places = np.array([match["point_mm"] for match in found["matches"]], dtype=np.float64).reshape(-1, 3)
        figures = [{key: match[key] for key in ("score", "margin", "confident")} for match in found["matches"]]
        offsets = np.round(places - truth, 3)
        more["ways"][name] = {"seconds": found["seconds"], "offset_mm": offsets, "matches": figures}
    return _record(row, run, None, more | {"meta": pair.meta})


def _scale(row: Row, options: RunOptions) -> PeerRun:
    """S1: a phantom of the given length against an MR of the same one, turned a little."""
    scale, threads = (int(text[1:]) for text in row.case.split("."))
    top = 280.0
    part = (top - SCALE_STEP_MM * scale, top) if scale < 8 else (-175.0, -175.0 + SCALE_STEP_MM * scale)
    fixed = make_phantom(SCALE_SEED, mr=False, part=part).ct
    pose = Rigid.from_euler_deg(4.0, -3.0, 6.0, translation=(20.0, -15.0, 60.0))
    moving = make_phantom(SCALE_SEED, (2.0, 2.0, 4.0), ct=False, part=part, pose=pose, mr_slice_mm=4.0).mr
    extra: dict[str, Any] = {"device": options.device}
    if row.part == "match":
        center = fixed.geometry.center_mm()
        extra |= {"points": (center + np.linspace(-30, 30, 10)[:, None] * np.eye(3)[0]).tolist(),
                  "ways": [("fixed-point-L5", "fixed-point", 5, None)]}  # fmt: skip
    run = run_own(row.part, fixed, moving, options.model, threads, timeout_s=options.timeout_s, **extra)
    run.info |= {"voxels": int(np.prod(fixed.geometry.shape)), "threads": threads}
    return run


def _record(row: Row, run: PeerRun, pair: BenchPair | None, more: Mapping[str, Any]) -> dict[str, Any]:
    tre = None
    if pair is not None and run.transform is not None and len(pair.moving_points):
        to_fixed = run.to_fixed if run.to_fixed is not None else run.transform.inverse()
        tre = float(np.linalg.norm(to_fixed.apply(pair.moving_points) - pair.fixed_points, axis=1).mean())
    record = {
        "name": row.name, "scenario": row.scenario, "part": row.part, "case": row.case, "system": row.system,
        "status": run.status, "reason": run.reason, "tre_mm": tre, "fixed_to_moving": _matrix(run.transform),
        "seconds": run.seconds, "process_seconds": run.process_seconds, "cpu_seconds": run.cpu_seconds,
        "peak_mb": run.peak_mb, "gpu_peak_mb": run.info.get("gpu_peak_mb"),
    }  # fmt: skip
    if pair is not None:
        record |= {"floor_mm": pair.floor_mm, "meta": pair.meta}
    if row.scenario == "S1":
        record |= {key: run.info.get(key) for key in ("voxels", "threads")}
    return plain({**record, **more})


def _matrix(transform: Transform | None) -> np.ndarray | None:
    """(4, 4) of a linear result (of the linear part of a chain of field and linear), None for a field alone."""
    if transform is None:
        return None
    if transform.is_linear:
        return transform.as_linear().matrix
    parts = getattr(transform, "transforms", ())
    linear = [part for part in parts if part.is_linear]
    return linear[0].as_linear().matrix if len(linear) == 1 else None
