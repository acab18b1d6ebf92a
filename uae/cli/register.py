"""`uae register` and `uae deform`: a moving scan onto a fixed one, with a verdict."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uae.cli.common import Session, check_writable, load_model_for, read_scan
from uae.cli.parser import add_command, add_modality_options, add_model_options
from uae.errors import InputError, NoConfidentResultError

if TYPE_CHECKING:
    from uae.registration.pipeline import RegistrationResult
    from uae.volume import Volume

REGISTER_EXAMPLE = """\
  uae register planning_ct.nii.gz mr.nii.gz --output result
  uae register planning_ct/ mr/ --output result --deformable --moving-modality mr"""
DEFORM_EXAMPLE = "  uae deform ct.nii.gz ct_followup.nii.gz --initial rigid.tfm --output result"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `register` and `deform`."""
    register = add_command(
        commands,
        "register",
        "Register a moving scan to a fixed one, rigidly by default. The verdict is accepted, review or refused; a "
        "refusal (exit code 3) leaves only report.json. The linear file maps fixed to moving, as ITK's resampling "
        "transforms do, and Slicer reads it as it is.",
        REGISTER_EXAMPLE,
    )
    register.set_defaults(run=run_register)
    _add_pair(register)
    register.add_argument("--affine", action="store_true", help="affine instead of rigid (affine.tfm)")
    register.add_argument("--deformable", action="store_true", help="add a deformable part (contour support, not dose)")
    register.add_argument("--no-refine", action="store_true", help="leave out the intensity-based rigid refinement")
    register.add_argument(
        "--margin", type=int, default=10, metavar="VOXELS", help="2 mm voxels around the overlap in the deformable step"
    )
    register.add_argument("--fixed-mask", metavar="F", help="use only this part of the fixed scan (a mask image)")
    register.add_argument("--moving-mask", metavar="M", help="use only this part of the moving scan")
    register.add_argument("--seed", type=int, default=0, help="seed of the random sampling (default 0)")
    add_model_options(register)

    deform = add_command(
        commands,
        "deform",
        "The deformable step (DEEDS) alone, from a given linear transform; the same files as register.",
        DEFORM_EXAMPLE,
    )
    deform.set_defaults(run=run_deform)
    _add_pair(deform)
    deform.add_argument("--initial", metavar="T.tfm", help="linear transform fixed to moving (default: identity)")
    presets = "preset of the solver: default, after-rigid, large-motion, crosssam or faithful"
    deform.add_argument("--preset", default="default", metavar="NAME", help=presets)
    deform.add_argument(
        "--affine", action="store_true", help="first improve --initial by an affine step, kept where it helps"
    )
    deform.add_argument("--device", default="cpu", metavar="auto|cpu|cuda[:n]", help="where the solver runs")
    deform.add_argument("--fixed-mask", metavar="F", help="use only this part of the fixed scan (a mask image)")
    deform.add_argument("--moving-mask", metavar="M", help="use only this part of the moving scan")


def _add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixed", metavar="FIXED", help="the scan that stays: image file or DICOM folder")
    parser.add_argument("moving", metavar="MOVING", help="the scan that is brought to it")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the result")
    add_modality_options(parser, "fixed", "moving")


def run_register(arguments: argparse.Namespace, session: Session) -> int:
    """Register one pair."""
    output = check_writable(arguments.output, folder=True)
    if arguments.margin < 0:
        raise InputError(f"--margin {arguments.margin}: give 0 or more voxels of 2 mm (10 is the paper's)")
    fixed, moving = _read_pair(arguments)
    fixed_mask, moving_mask = _read_masks(arguments)
    model = load_model_for(arguments.model, fixed, moving)
    from uae.registration.pipeline import RegisterOptions, register

    options = RegisterOptions(
        affine=arguments.affine,
        deformable=arguments.deformable,
        refine=not arguments.no_refine,
        margin_voxels=arguments.margin,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        device=arguments.device,
        memory_mb=arguments.memory_mb,
        threads=arguments.threads or os.cpu_count() or 1,
        cache=not arguments.no_cache,
        seed=arguments.seed,
    )
    return _finish(register(fixed, moving, model, options, progress=session.progress), output, session)


def run_deform(arguments: argparse.Namespace, session: Session) -> int:
    """The deformable step of one pair."""
    output = check_writable(arguments.output, folder=True)
    fixed, moving = _read_pair(arguments)
    fixed_mask, moving_mask = _read_masks(arguments)
    from uae.registration.pipeline import deform
    from uae.transform_io import read_transform

    initial = read_transform(arguments.initial) if arguments.initial else None
    result = deform(
        fixed,
        moving,
        initial=initial,
        preset=arguments.preset,
        affine=arguments.affine,
        device=arguments.device,
        threads=arguments.threads or os.cpu_count() or 1,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        progress=session.progress,
    )
    return _finish(result, output, session)


def _read_pair(arguments: argparse.Namespace) -> tuple[Volume, Volume]:
    return (
        read_scan(arguments.fixed, arguments.fixed_modality, "--fixed-modality", arguments.series),
        read_scan(arguments.moving, arguments.moving_modality, "--moving-modality", arguments.series),
    )


def _read_masks(arguments: argparse.Namespace) -> tuple[Volume | None, Volume | None]:
    from uae.volume import Volume

    fixed, moving = (
        Volume.read(path, label=True) if path else None for path in (arguments.fixed_mask, arguments.moving_mask)
    )
    return fixed, moving


def _finish(result: RegistrationResult, output: Path, session: Session) -> int:
    """Write a result, say its verdict, and raise where it is a refusal."""
    from uae.registration.pipeline import write_result

    write_result(result, output)
    report = result.report
    if report["status"] == "refused":
        raise NoConfidentResultError(f"refused: {report['reason']} (figures: {output / 'report.json'})")
    session.say(f"{report['status']}: {report['reason']}")
    shift = ", ".join(f"{name} {value:.1f}" for name, value in zip(("LR", "AP", "CC"), report["shift_mm"]))
    session.say(f"shift {shift} mm; written: {output}")
    return 0
