"""`uae apply`: carry an image, a label map or points through the files of a registration."""

from __future__ import annotations

import argparse

from uae.cli.common import Session, check_writable
from uae.cli.parser import add_command
from uae.errors import InputError

EXAMPLE = """\
  uae apply result/ mr.nii.gz --reference ct.nii.gz --output mr_in_ct.nii.gz
  uae apply result/ contours.nii.gz --label --reference ct.nii.gz --output contours_in_ct.nii.gz
  uae apply result/ ct_points.mrk.json --inverse --output mr_points.mrk.json
  uae apply displacement.nii.gz rigid.tfm mr_points.csv --output ct_points.csv"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `apply`."""
    parser = add_command(
        commands,
        "apply",
        "Carry INPUT from the moving to the fixed scan's space, or with --inverse the other way. Transforms: the "
        "folder of a registration, or files in the order in which a fixed point meets them (grid, then linear).",
        EXAMPLE,
    )
    parser.set_defaults(run=run)
    parser.add_argument("items", nargs="+", metavar="DIR|TRANSFORM... INPUT", help="the transforms, then the input")
    parser.add_argument("--output", required=True, metavar="O", help="image, or .mrk.json or .csv for points")
    parser.add_argument("--reference", metavar="R", help="image whose grid the output takes (needed for images)")
    parser.add_argument("--inverse", action="store_true", help="INPUT lies in the fixed scan's space")
    parser.add_argument("--label", action="store_true", help="INPUT is a label map: nearest neighbour, filled with 0")
    parser.add_argument("--points", action="store_true", help="INPUT is a point file (known from its ending otherwise)")


def run(arguments: argparse.Namespace, session: Session) -> int:
    """Carry one input."""
    *transforms, source = arguments.items
    if not transforms:
        raise InputError("give the transforms and then the input: uae apply DIR|TRANSFORM... INPUT --output O")
    output = check_writable(arguments.output)
    from uae.apply import apply_files

    apply_files(
        transforms,
        source,
        output,
        reference=arguments.reference,
        inverse=arguments.inverse,
        label=arguments.label,
        points=arguments.points,
        progress=session.progress,
    )
    session.say(f"written: {output}")
    return 0
