"""Start the peers: the same windowed inputs, threads and starts for each, and their transforms back."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.peers.job import Job, Outcome, Scan, read_outcome, write_job
from uae.bench.peers.starts import geometry_start, moments_start, windowed
from uae.bench.resources import run_child, thread_environment
from uae.errors import InputError, ResourceError
from uae.paths import child_environment
from uae.transform import Affine, DisplacementField, Rigid, Transform
from uae.volume import Geometry, Volume

__all__ = ["PEERS", "Peer", "PeerRun", "missing_reason", "run_peer", "settings", "versions"]

PYTHON_VARIABLE = "UAE_PEERS_PYTHON"
"""Interpreter that has the peers, where they are kept apart from this one."""


@dataclass(frozen=True)
class Peer:
    """A program: package as pip knows it, its methods, and the one for a rigid task."""

    name: str
    package: str
    methods: tuple[str, ...]
    best: str


PEERS = {
    peer.name: peer
    for peer in (
        Peer("simpleitk", "SimpleITK", ("rigid", "affine"), "rigid"),
        Peer("elastix", "itk-elastix", ("rigid", "affine", "deformable"), "rigid"),
        Peer("ants", "antspyx", ("rigid", "affine", "deformable"), "rigid"),
        Peer("convexadam", "convexAdam", ("deformable",), "deformable"),
    )
}


@dataclass
class PeerRun:
    """Result of one run.

    transform: fixed -> moving, LPS mm; None where the program failed. to_fixed: moving -> fixed.
    status: done or failed; reason: why.
    seconds: registration alone; process_seconds: with starting and reading; cpu_seconds; peak_mb (10^6 bytes).
    """

    transform: Transform | None
    to_fixed: Transform | None
    status: str
    reason: str = ""
    seconds: float | None = None
    process_seconds: float | None = None
    cpu_seconds: float | None = None
    peak_mb: float | None = None
    info: dict[str, Any] = field(default_factory=dict)


def python_of_peers() -> str:
    """The interpreter that runs the peers: UAE_PEERS_PYTHON, else this one."""
    return os.environ.get(PYTHON_VARIABLE) or sys.executable


@functools.cache
def _installed(python: str) -> dict[str, str | None]:
    program = (
        "import importlib.metadata as m, json, sys\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: found[name] = None\n"
        "print(json.dumps(found))"
    )
    packages = [peer.package for peer in PEERS.values()]
    try:
        told = subprocess.run([python, "-c", program, *packages], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"{PYTHON_VARIABLE}={python} does not run ({error}); name a Python interpreter") from error
    return json.loads(told.stdout)


def versions() -> dict[str, str | None]:
    """Version of each peer by its name, None where it is not installed; nothing is imported.

    Raises:
        InputError: UAE_PEERS_PYTHON names no interpreter.
    """
    found = _installed(python_of_peers())
    return {name: found[peer.package] for name, peer in PEERS.items()}


def missing_reason(name: str) -> str | None:
    """Why a peer is skipped here, or None where it is installed.

    Raises:
        InputError: unknown peer.
    """
    if name not in PEERS:
        raise InputError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}")
    if versions()[name] is not None:
        return None
    return (
        f"{PEERS[name].package} is not installed; pip install '.[bench]', or keep it apart and set {PYTHON_VARIABLE} "
        "to the interpreter that has it"
    )


def settings() -> dict[str, dict[str, str]]:
    """Every peer's settings with the reason for each."""
    return {name: dict(importlib.import_module(f"uae.bench.peers.{name}_peer").SETTINGS) for name in PEERS}


def run_peer(
    name: str,
    method: str,
    fixed: Volume,
    moving: Volume,
    initial: Affine | None = None,
    threads: int = 1,
    seed: int = 1,
    timeout_s: float | None = None,
    **options: float,
) -> PeerRun:
    """Register with a peer.

    The scan with the smaller box is the reference whose voxels are sampled, since all of them have a chance to lie in
    the other one; the result is given fixed -> moving all the same.

    Args:
        name: of PEERS.
        method: one of its methods.
        fixed: the scan that stays, modality decided.
        moving: the other one, likewise.
        initial: fixed -> moving start, made rigid; where None the peer starts from the middles of the boxes and from
            the centres of mass and the better result counts.
        threads: of the peer; 1 makes it repeatable to the last digit.
        seed: of its sampling.
        timeout_s: it is stopped after this time and counts as failed.
        **options: `iterations` of elastix (each level) and ANTs (SyN's levels) in place of their settings, for tests.

    Returns:
        See PeerRun; a program that fails is a result and raises nothing.

    Raises:
        InputError: unknown peer or method, or the peer is not installed.
    """
    reason = missing_reason(name)
    if reason:
        raise InputError(reason)
    if method not in PEERS[name].methods:
        raise InputError(f"{name} has no method {method!r}; it has {', '.join(PEERS[name].methods)}")
    swap = _box_mm3(moving) < _box_mm3(fixed)
    scans = [_scan(volume) for volume in (fixed, moving)]
    reference, other = scans[::-1] if swap else scans
    if initial is None:
        starts = [geometry_start(reference, other), moments_start(reference, other)]
    else:
        linear = _rigid(initial, fixed)
        starts = [(linear.inverse() if swap else linear).matrix]
    job = Job(name, method, reference, other, np.array(starts), threads, seed, dict(options))
    with tempfile.TemporaryDirectory(prefix="uae-peer-") as folder:
        paths = [str(Path(folder) / file) for file in ("job.npz", "result.npz")]
        write_job(paths[0], job)
        try:
            used = run_child(
                [python_of_peers(), "-m", "uae.bench.peers.child", *paths],
                {**child_environment(), **thread_environment(threads)}, name, timeout_s,
            )  # fmt: skip
        except ResourceError as error:
            return PeerRun(None, None, "failed", str(error))
        found = read_outcome(paths[1])
    try:
        there = as_transform(found)
        transform, to_fixed = (there.inverse(), there) if swap else (there, there.inverse())
    except (ValueError, np.linalg.LinAlgError) as error:
        return PeerRun(None, None, "failed", f"gave no transform that can be inverted ({error})")
    return PeerRun(
        transform, to_fixed, "done", "", float(found.info["seconds"]), used.seconds, used.cpu_seconds, used.peak_mb,
        found.info,
    )  # fmt: skip


def as_transform(outcome: Outcome) -> Transform:
    """The map reference -> other as a transform of this package.

    Raises:
        ValueError: it holds values that are not numbers.
    """
    parts = [outcome.matrix] if outcome.vectors is None else [outcome.matrix, outcome.vectors]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("values that are not numbers")
    if outcome.vectors is None:
        rotation = outcome.matrix[:3, :3]
        rigid = np.abs(rotation.T @ rotation - np.eye(3)).max() < 1e-6 and np.linalg.det(rotation) > 0
        return Rigid(outcome.matrix) if rigid else Affine(outcome.matrix)
    grid = outcome.grid
    geometry = Geometry(outcome.vectors.shape[:3], grid.spacing, grid.origin, grid.direction)
    return DisplacementField(outcome.vectors, geometry)


def _scan(volume: Volume) -> Scan:
    return Scan.on(volume.geometry, windowed(volume.array, volume.modality))


def _box_mm3(volume: Volume) -> float:
    return volume.geometry.voxel_volume_mm3 * float(np.prod(volume.geometry.size))


def _rigid(initial: Affine, fixed: Volume) -> Rigid:
    """The rigid closest to a linear transform over the fixed scan's box."""
    if isinstance(initial, Rigid):
        return initial
    from uae.registration.rigid import arun

    corners = fixed.geometry.corners_mm()
    return arun(corners, initial.apply(corners))
