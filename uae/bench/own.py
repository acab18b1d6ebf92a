"""Start our own system as the peers are started: one pair, one process, the same files and threads."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.peers.job import Job, Scan, read_outcome, write_job
from uae.bench.peers.run import PeerRun, as_transform
from uae.bench.resources import run_child, thread_environment
from uae.errors import ResourceError
from uae.paths import child_environment
from uae.transform import Composite
from uae.volume import Volume


def run_own(
    task: str,
    fixed: Volume,
    moving: Volume,
    model: str,
    threads: int = 1,
    cache_folder: Path | None = None,
    timeout_s: float | None = None,
    **options: Any,
) -> PeerRun:
    """Run a task of `uae.bench.own_child`.

    Args:
        task: register, deeds, embed or match.
        fixed: the scan that stays (or the template), modality decided.
        moving: the other one.
        model: name or file of the weights.
        threads: of everything that computes.
        cache_folder: where embeddings are kept between runs; none are kept where None.
        timeout_s: it is stopped after this time and counts as failed.
        **options: entries of RegisterOptions, `preset`, `points`, `ways`; plain values only.

    Returns:
        As `run_peer` does; `info` holds the task's figures, for register the verdict as "status", the candidate before
        refinement as "unrefined" and the figures that the verdict rests on. A refused registration keeps its candidate.
    """
    scans = [Scan.on(volume.geometry, np.asarray(volume.array, np.float32)) for volume in (fixed, moving)]
    entries = {"task": task, "model": model, "modalities": [fixed.modality, moving.modality],
               "cache": cache_folder is not None, **options}  # fmt: skip
    job = Job("uae", task, *scans, np.eye(4)[None], threads, 0, entries)
    environment = {**child_environment(), **thread_environment(threads)}
    if cache_folder is not None:
        environment["UAE_CACHE"] = str(cache_folder)
    with tempfile.TemporaryDirectory(prefix="uae-own-") as folder:
        paths = [str(Path(folder) / file) for file in ("job.npz", "result.npz")]
        write_job(paths[0], job)
        try:
            command = [sys.executable, "-m", "uae.bench.own_child", *paths]
            used = run_child(command, environment, f"uae {task}", timeout_s)
        except ResourceError as error:
            return PeerRun(None, None, "failed", str(error))
        found = read_outcome(paths[1])
    run = PeerRun(
        None, None, "done", str(found.info.get("reason", "")), float(found.info["seconds"]), used.seconds,
        used.cpu_seconds, used.peak_mb, found.info,
    )  # fmt: skip
    if np.isfinite(found.matrix).all():
        field = as_transform(found) if found.vectors is not None else None
        found.vectors = None
        linear = as_transform(found)
        run.transform = linear if field is None else Composite([field, linear])
        run.to_fixed = run.transform.inverse()
    return run
