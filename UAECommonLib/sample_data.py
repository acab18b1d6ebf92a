"""Sample data that is made, not downloaded: `uae phantom` writes a CT-MR pair of one simulated torso."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uae.errors import UAEError
from uae.paths import cache_folder
from UAECommonLib.process import make_runner
from UAECommonLib.worker_client import error_of

__all__ = ["CATEGORY", "SAMPLE", "SEED", "load_sample", "register_samples", "sample_folder"]

logger = logging.getLogger(__name__)

CATEGORY = "AnatomicalEmbedding"
SAMPLE = "UAEPhantomCTMR"
SEED = 200_001
"""Seeds from 200000 belong to tests and demonstrations: no model was trained on them."""
POLL_S = 0.02
NAMES = {"ct.nii.gz": "Phantom CT", "mr.nii.gz": "Phantom MR"}


def sample_folder(wait: Callable[[Any], None] | None = None) -> Path:
    """The folder of the sample pair, made by a child process if it is not there yet (about a minute).

    Args:
        wait: waits for a runner's end; in the application one that keeps the window alive.

    Returns:
        Folder with ct.nii.gz, mr.nii.gz, landmarks and the true transform.

    Raises:
        UAEError: it could not be made.
    """
    target = cache_folder().parent / "samples" / f"phantom-{SEED}"
    if all((target / name).is_file() for name in NAMES):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".phantom-", dir=target.parent))
    try:
        runner, records = make_runner(), []
        runner.start(
            ["phantom", "--output", str(place / "pair"), "--seed", str(SEED), "--progress", "json"], records.append
        )
        (wait or (lambda one: one.wait()))(runner)
        if runner.exit_code != 0:
            message = str(records[-1].get("message", "")) if records else ""
            raise error_of(runner.exit_code or 1, message or f"the sample pair could not be made: {runner.log.strip()}")
        if target.exists():
            shutil.rmtree(target)
        os.replace(place / "pair", target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return target


def load_sample(scene: Any, wait: Callable[[Any], None] | None = None) -> list[Any]:
    """Add the sample pair to a scene, making it first if need be.

    Returns:
        The CT's and the MR's volume node.

    Raises:
        UAEError: it could not be made.
    """
    import SimpleITK as sitk

    from UAECommonLib.mrml import add_volume

    folder = sample_folder(wait)
    return [add_volume(scene, sitk.ReadImage(str(folder / name)), title) for name, title in NAMES.items()]


def register_samples(icon: str | None = None) -> None:
    """Offer the pair in the module Sample Data; its first use makes the files on this computer.

    Args:
        icon: picture file shown there.
    """
    import SampleData
    import slicer
    from slicer.i18n import tr as _

    if CATEGORY in getattr(slicer.modules, "sampleDataSources", {}):
        return

    def wait(runner: Any) -> None:
        while runner.running:
            slicer.app.processEvents()
            time.sleep(POLL_S)

    def make(_source: Any) -> list[Any]:
        try:
            ct, mr = load_sample(slicer.mrmlScene, wait)
            slicer.util.setSliceViewerLayers(background=ct, foreground=mr, foregroundOpacity=0.5, fit=True)
            return [ct, mr]
        except UAEError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("Sample data"))
            return []

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category=CATEGORY,
        sampleName=SAMPLE,
        uris=[],
        fileNames=[],
        nodeNames=[],
        thumbnailFileName=icon,
        customDownloader=make,
    )
