"""`uae phantom`: a sample pair whose truth is known."""

from __future__ import annotations

import argparse

from uae.cli.common import Session, check_writable, whole_folder
from uae.cli.parser import add_command
from uae.errors import InputError

EXAMPLE = "  uae phantom --output sample --seed 200001"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `phantom`."""
    parser = add_command(
        commands,
        "phantom",
        "Make a CT and an MR of one simulated torso, each with its own field of view, with labels, landmarks and the "
        "true transform. Seeds below 100000 belong to training, 100000 to 199999 to validation, 200000 and up to tests "
        "and demonstrations.",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--seed", required=True, type=int, metavar="N", help="which torso, which scans")


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Make one pair."""
    output = check_writable(arguments.output, folder=True)
    if arguments.seed < 0:
        raise InputError(f"--seed {arguments.seed}: give 0 or more")
    from uae.phantom import write_sample

    session.progress("phantom", 0.0)
    with whole_folder(output) as folder:
        pair = write_sample(folder, arguments.seed)
    session.progress("phantom", 1.0)
    session.say(
        f"written: {output} (best rigid leaves {pair.rigid_floor_mm:.1f} mm, largest deformation "
        f"{pair.max_deformation_mm:.1f} mm, {len(pair.fixed_landmarks)} landmarks in both)"
    )
    return 0
