"""The files of a registration: all of them or none, and no older one beside them."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from uae.files import as_user_error
from uae.transform import write_transform
from uae.volume import resample_with_mask

if TYPE_CHECKING:
    from uae.registration.pipeline import RegistrationResult

log = logging.getLogger(__name__)

REPORT = "report.json"
RIGID, AFFINE, FIELD = "rigid.tfm", "affine.tfm", "displacement.nii.gz"
IMAGE, MASK, OVERVIEW = "moving_in_fixed.nii.gz", "moving_in_fixed_mask.nii.gz", "overview.png"
OWNED = (REPORT, RIGID, AFFINE, FIELD, IMAGE, MASK, OVERVIEW)


def write_result(result: RegistrationResult, folder: str | Path) -> list[Path]:
    """Write a registration into a folder, made if need be; left-over files of an earlier result are removed.

    A refused result leaves only `report.json`; whoever called raises NoConfidentResultError, since the folder is
    complete by then.

    Args:
        result: of `register` or `deform`.
        folder: where to.

    Returns:
        The files written.

    Raises:
        InputError: no permission.
        ResourceError: the disk is full.
    """
    folder = Path(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        _write_all(result, temporary)
        folder.mkdir(exist_ok=True)
        # The report goes first and comes last: a folder without it is not a complete result, whenever the power fails.
        (folder / REPORT).unlink(missing_ok=True)
        names = [name for name in OWNED if (temporary / name).exists()]
        for name in set(OWNED) - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in reversed(names):
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise as_user_error(error, folder) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: %s", folder, ", ".join(names))
    return [folder / name for name in names]


def _write_all(result: RegistrationResult, folder: Path) -> None:
    """Write the files of a result into an empty folder."""
    if result.status != "refused":
        write_transform(folder / (AFFINE if result.affine else RIGID), result.linear)
        if result.field is not None:
            write_transform(folder / FIELD, result.field)
        # Filled outside with air or the MR minimum (Volume.default_fill); one interpolation, through the whole
        # composition.
        carried, mask = resample_with_mask(result.moving, result.fixed.geometry, result.transform)
        carried.write(folder / IMAGE)
        mask.write(folder / MASK)
        if importlib.util.find_spec("matplotlib") is None:  # as in 3D Slicer, which shows the result itself
            log.info("no %s: matplotlib is not installed", OVERVIEW)
        else:
            from uae.report import write_overview

            write_overview(result, folder / OVERVIEW)
    (folder / REPORT).write_text(json.dumps(result.report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
