"""`make demo`: a simulated CT and MR with known truth, registered exactly as a user's files would be, and measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.cli import main as uae
from uae.cli.common import Session
from uae.files import atomic_path
from uae.phantom import PhantomPair, phantom_pair, write_sample

DEMO_SEED = 200001
"""A torso that no training, validation or calibration has seen: their seeds end at 199999 (contract, section 2)."""

TRE_POINTS = 20000
"""Body points of the MR that the errors are averaged over; more changes the mean by less than 0.01 mm."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pair, register it through the command line, compare with the truth, and say how to go on.

    Args:
        argv: arguments without the program's name; the process's own where None.

    Returns:
        The exit code of the registration.
    """
    parser = argparse.ArgumentParser(prog="python -m uae.demo", description=main.__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder (default build/demo)")
    parser.add_argument("--seed", type=int, default=DEMO_SEED, help="which torso, 200000 and up")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:n]")
    parser.add_argument("--model", help="model name or file (default: by modality)")
    arguments = parser.parse_args(argv)
    data, result = arguments.output / "data", arguments.output / "result"

    say = Session("none").say
    say("1  a simulated CT and MR of one torso, each with its own field of view and frame of reference")
    pair = phantom_pair(arguments.seed)
    write_sample(data, arguments.seed, pair)
    say("\n2  uae register ct mr --deformable")
    command = ["register", str(data / "ct.nii.gz"), str(data / "mr.nii.gz"), "--output", str(result), "--deformable"]
    command += ["--fixed-modality", "ct", "--moving-modality", "mr", "--device", arguments.device]
    code = uae(command + (["--model", arguments.model] if arguments.model else []))
    if code:
        return code
    summary = measure(pair, result)
    with atomic_path(arguments.output / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _tell(say, summary, arguments.output, data, result)
    return 0


def measure(pair: PhantomPair, result: Path) -> dict[str, Any]:
    """Compare the written transforms with the truth of the phantom.

    Args:
        pair: the pair that was registered.
        result: the folder that `uae register` wrote.

    Returns:
        The keys of the contract, section 6, with the error of the best possible rigid beside them.
    """
    from uae.apply import LINEAR_NAMES, load_chain
    from uae.quality import tre
    from uae.registration.rigid import arun

    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    linear = load_chain([next(result / name for name in LINEAR_NAMES if (result / name).is_file())])
    whole = load_chain([result])
    fixed_marks = np.array(list(pair.fixed_landmarks.values()))
    moving_marks = np.array([pair.moving_landmarks[name] for name in pair.fixed_landmarks])
    moving_points = body_points(pair)
    fixed_points = pair.moving_to_fixed.apply(moving_points)
    best = arun(fixed_points, moving_points)
    return {
        "initial_landmark_mm": float(np.linalg.norm(moving_marks - fixed_marks, axis=1).mean()),
        "rigid_landmark_mm": tre(linear, fixed_marks, moving_marks)["mean"],
        "rigid_tre_mm": tre(linear, fixed_points, moving_points)["mean"],
        "deformable_tre_mm": tre(whole, fixed_points, moving_points)["mean"],
        "best_rigid_tre_mm": tre(best, fixed_points, moving_points)["mean"],
        "landmarks": len(fixed_marks),
        "status": report["status"],
        "seconds": report["seconds"]["total"],
        "device": report["device"],
        "model": f"{report['model']['name']} {report['model']['version']}",
        "seed": pair.seed,
    }


def body_points(pair: PhantomPair) -> np.ndarray:
    """Places (N, 3) mm in the MR of body voxels inside its field of view, an even choice of TRE_POINTS."""
    cells = np.argwhere(pair.moving_labels.array > 0)
    chosen = cells[np.linspace(0, len(cells) - 1, min(len(cells), TRE_POINTS)).astype(int)]
    return pair.moving_labels.geometry.index_to_mm(chosen[:, ::-1].astype(np.float64))


def _tell(say: Callable[[str], None], summary: dict[str, Any], output: Path, data: Path, result: Path) -> None:
    rows = (
        ("landmarks before", summary["initial_landmark_mm"], f"{summary['landmarks']} named places in both scans"),
        ("landmarks, rigid", summary["rigid_landmark_mm"], ""),
        ("whole body, rigid", summary["rigid_tre_mm"], f"the best possible rigid: {summary['best_rigid_tre_mm']:.2f}"),
        ("whole body, deformable", summary["deformable_tre_mm"], ""),
    )
    say(f"\n3  errors against the known truth, millimetres ({summary['status']})\n")
    for name, value, note in rows:
        say(f"   {name:<24} {value:8.2f}   {note}".rstrip())
    say(f"\n   {summary['seconds']:.0f} s on {summary['device']}, model {summary['model']}")
    say(f"\npicture   {result / 'overview.png'}\nsummary   {output / 'summary.json'}\ntransforms {result}/")
    say("\nYour own files (NIfTI, NRRD, MHA or a DICOM folder):\n")
    say("   source .venv/bin/activate")
    say("   uae register planning_ct.nii.gz mr.nii.gz --output result")
    say("   uae match ct.nii.gz mr.nii.gz --points landmarks.mrk.json --output found.mrk.json")
    say(f"   uae apply {result} {data}/landmarks_mr.csv --output on_the_ct.csv")
    say("   uae --help")


if __name__ == "__main__":
    sys.exit(main())
