"""`uae bench match`: from a click to its first and final answer, through the worker, on a prepared torso pair."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.errors import InputError, ResourceError
from uae.json_values import plain
from uae.paths import child_environment
from uae.progress import Progress, report

__all__ = ["PhantomTorsos", "measure", "run_match_bench", "torso_pair"]

logger = logging.getLogger(__name__)

SEED = 200_040
"""Of the test range: no model was trained on it."""
SPACING_MM = 2.0
SLICE_MM = 4.0
POINTS, QUICK_POINTS = 40, 10
WARM_UP = 2
"""Clicks that are not counted: the first ones fill the processor's and the libraries' caches."""
POSE_DEG, POSE_MM = (4.0, -6.0, 12.0), (35.0, -20.0, 140.0)


class PhantomTorsos:
    """A CT and an MR of the same whole torso in two poses, with points whose place is known in both.

    Attributes:
        template, query: files.
        points: (N, 3) LPS mm in the template, inside the body; truth: (N, 3) in the query.
    """

    def __init__(self, template: Path, query: Path, points: np.ndarray, truth: np.ndarray) -> None:
        self.template, self.query, self.points, self.truth = template, query, points, truth


def torso_pair(folder: Path, count: int, seed: int = SEED) -> PhantomTorsos:
    """Make and write the pair.

    Args:
        folder: for the two files.
        count: points to draw.
        seed: of the phantom.
    """
    from uae.phantom import correspondence, make_phantom
    from uae.transform import Rigid

    fixed = make_phantom(seed, SPACING_MM, mr=False)
    pose = Rigid.from_euler_deg(*POSE_DEG, translation=POSE_MM)
    moved = make_phantom(seed, (SPACING_MM, SPACING_MM, SLICE_MM), ct=False, pose=pose, mr_slice_mm=SLICE_MM)
    template, query = folder / "ct.nrrd", folder / "mr.nrrd"
    fixed.ct.write(template)
    moved.mr.write(query)
    inside = fixed.labels.geometry.index_to_mm(np.argwhere(fixed.labels.array > 0)[:, ::-1].astype(np.float64))
    truth = correspondence(fixed, moved).apply(inside)
    kept = np.flatnonzero(moved.labels.geometry.contains(truth))
    chosen = np.random.default_rng(seed).choice(kept, count, replace=False)
    return PhantomTorsos(template, query, inside[chosen], truth[chosen])


class _Child:
    """A worker, asked one thing at a time."""

    def __init__(self, options: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "uae", "worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **child_environment()},
        )
        self._number = 0

    def ask(self, command: str, **values: Any) -> tuple[dict[str, Any], float | None, float]:
        """The result, and seconds to the first (partial) answer and to it.

        Raises:
            InputError: the worker says so.
            ResourceError: it ended.
        """
        self._number += 1
        start, first = time.perf_counter(), None
        self._process.stdin.write(json.dumps({"id": self._number, "command": command, **values}).encode() + b"\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            record = json.loads(line)
            if record["id"] != self._number:
                continue
            if record["event"] == "partial":
                first = time.perf_counter() - start
            elif record["event"] == "result":
                return record, first, time.perf_counter() - start
            elif record["event"] == "error":
                raise InputError(record["message"])
        raise ResourceError("the worker ended; run `uae worker -v` by hand and look at its messages")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def measure(
    template: Path,
    query: Path,
    points_mm: np.ndarray,
    truth_mm: np.ndarray | None = None,
    options: Sequence[str] = (),
    methods: Sequence[str] = ("auto", "fixed-point"),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Click each point once for each method, one after the other, as a user does.

    Args:
        template: file in which the points lie.
        query: file in which they are looked for.
        points_mm: (N, 3) LPS mm, more than WARM_UP.
        truth_mm: (N, 3) LPS mm of their true places, where known.
        options: of `uae worker`.
        methods: to measure.
        progress: told the share of clicks done, stage "bench".

    Returns:
        `prepare_s` (nothing in memory; the cache on disk as `options` say), `prepare_again_s`, `verdict`, `device`,
        `model`, and for each method `first_median_s`, `first_p95_s`, `final_median_s`, `final_p95_s`,
        `final_max_s`, `confident_share` and, with the truth, `median_mm`. The first answer is the nearest neighbour's.
    """
    child = _Child(options)
    try:
        scans = {"template": {"path": str(template)}, "query": {"path": str(query)}}
        prepared, _, seconds = child.ask("prepare", pair="bench", **scans)
        _, _, again = child.ask("prepare", pair="bench", **scans)
        result: dict[str, Any] = {"prepare_s": seconds, "prepare_again_s": again}
        result |= {name: prepared[name] for name in ("verdict", "device", "model")}
        result["prepare_stages_s"] = prepared["seconds"]
        for number, method in enumerate(methods):
            rows, errors = [], []
            for count, point in enumerate(points_mm):
                answer, first, final = child.ask(
                    "match", pair="bench", points=[point.tolist()], method=method, live=True
                )
                (match,) = answer["matches"]
                if count >= WARM_UP:
                    rows.append((final if first is None else first, final, bool(match["confident"])))
                    if truth_mm is not None and match["point_mm"] is not None:
                        errors.append(float(np.linalg.norm(np.subtract(match["point_mm"], truth_mm[count]))))
                report(progress, "bench", (number * len(points_mm) + count + 1) / (len(methods) * len(points_mm)))
            result[method] = _figures(rows, errors)
        return plain(result)
    finally:
        child.close()


def _figures(rows: Sequence[tuple[float, float, bool]], errors: Sequence[float]) -> dict[str, float]:
    first, final, confident = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    figures = {
        "clicks": len(rows),
        "first_median_s": np.median(first),
        "first_p95_s": np.percentile(first, 95),
        "final_median_s": np.median(final),
        "final_p95_s": np.percentile(final, 95),
        "final_max_s": final.max(),
        "confident_share": confident.mean(),
    }
    return {**figures, "median_mm": float(np.median(errors))} if errors else figures


def run_match_bench(
    options: Sequence[str] = (), quick: bool = False, json_path: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Make the torso pair, measure, and write the figures.

    Args:
        options: of `uae worker`: model, device, threads.
        quick: fewer clicks.
        json_path: the file to write, if any.
        progress: see `measure`.

    Returns:
        `torso`: what `measure` gives; `meta`: seed, clicks, processors, shapes.
    """
    from uae.bench.embedding import write_json
    from uae.device import cpu_name

    count = WARM_UP + (QUICK_POINTS if quick else POINTS)
    with tempfile.TemporaryDirectory(prefix="uae-bench-") as folder:
        pair = torso_pair(Path(folder), count)
        figures = measure(pair.template, pair.query, pair.points, pair.truth, options, progress=progress)
    meta: Mapping[str, Any] = {
        "seed": SEED, "points": count, "warm_up": WARM_UP, "options": list(options), "processor": cpu_name(),
        "processors": os.cpu_count(),
    }  # fmt: skip
    result = plain({"torso": figures, "meta": meta})
    if json_path is not None:
        write_json(json_path, result)
    return result
