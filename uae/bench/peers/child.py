"""One peer, one pair, in a process of its own: `python -m uae.bench.peers.child JOB.npz RESULT.npz`."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import numpy as np

from uae.bench.peers.job import Job, Outcome, read_job, write_outcome
from uae.bench.peers.starts import lattice, mutual_information


def run(job: Job) -> Outcome:
    """Run the peer from every start and keep the result with the highest mutual information over the reference.

    The peer sees the other scan with its header carried back by the start, so that its own start is the identity: exact
    for a rigid start, and the same for every program whatever files it reads starts from.
    """
    module = importlib.import_module(f"uae.bench.peers.{job.peer}_peer")
    index = lattice(job.reference)
    points = job.reference.to_mm(index)
    best: tuple[float, int, Outcome] | None = None
    tried, failures = [], []
    begin = time.perf_counter()
    for number, start in enumerate(job.starts):
        try:
            found = module.register(job, job.other.carried(np.linalg.inv(start)))
        except Exception as error:
            tried.append(None)
            failures.append(error)
            continue
        found = _after(found, start)
        value = mutual_information(job.reference, job.other, apply(found, points), index)
        tried.append(value if np.isfinite(value) else None)
        if best is None or value > best[0]:
            best = (value, number, found)
    if best is None:
        raise failures[0]
    _, number, outcome = best
    outcome.info |= {"seconds": time.perf_counter() - begin, "start": number, "mutual_information": tried}
    return outcome


def apply(outcome: Outcome, points: np.ndarray) -> np.ndarray:
    """Images (N, 3) LPS mm of points (N, 3) of the reference."""
    if outcome.vectors is None:
        return points @ outcome.matrix[:3, :3].T + outcome.matrix[:3, 3]
    cells = np.rint(outcome.grid.to_index(points)).astype(np.int64)
    cells = np.clip(cells, 0, (np.array(outcome.vectors.shape[2::-1]) - 1))
    return points + outcome.vectors[tuple(cells[:, ::-1].T)]


def _after(found: Outcome, start: np.ndarray) -> Outcome:
    """The map into the other scan as it is: `found`, then the start."""
    if found.vectors is None:
        return Outcome(start @ found.matrix, info=found.info)
    here = found.grid.grid_mm()
    there = (here + found.vectors.reshape(-1, 3)) @ start[:3, :3].T + start[:3, 3]
    vectors = (there - here).reshape(found.vectors.shape).astype(np.float32)
    return Outcome(start @ found.matrix, vectors, found.grid, found.info)


if __name__ == "__main__":
    os.chdir(Path(sys.argv[2]).parent)  # some programs leave files where they run
    write_outcome(Path(sys.argv[2]), run(read_job(sys.argv[1])))
